//! A folder with objects and a node.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use mesh_api::core::{CoreObject, EndpointSlice, Namespace, Node as ClusterNode, Pod, Service};
use mesh_api::mesh_config::MeshConfig;
use mesh_api::yaml;
use mesh_model::{Item, Mesh, Node, Objects};
use mesh_translate::{Resource, Resources};
use mesh_xds::json::Naming;
use serde_json::{Value, json};

/// Reads the documents of a file in a case's folder.
pub(crate) fn documents(path: &Path) -> Vec<Value> {
    let text =
        fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    yaml::documents(&text, &path.display().to_string()).unwrap()
}

/// Parses any object of the kinds that a mesh is made of.
pub(crate) fn item(raw: &Value) -> Item {
    match raw["kind"].as_str().unwrap() {
        "Service" => Service::from_value(raw).unwrap().into(),
        "EndpointSlice" => EndpointSlice::from_value(raw).unwrap().into(),
        "Pod" => Pod::from_value(raw).unwrap().into(),
        "Namespace" => Namespace::from_value(raw).unwrap().into(),
        "Node" => ClusterNode::from_value(raw).unwrap().into(),
        _ => mesh_api::parse(raw)
            .unwrap_or_else(|error| panic!("{error}\n{raw:#}"))
            .into(),
    }
}

pub(crate) fn objects(raw: &[Value]) -> Objects {
    let mut objects = Objects::default();
    for raw in raw {
        objects.upsert(item(raw));
    }
    objects
}

/// A case of `tests/golden`.
pub(crate) struct Case {
    pub(crate) folder: PathBuf,
    pub(crate) raw: Vec<Value>,
    pub(crate) objects: Objects,
    pub(crate) node: Node,
    /// Beginnings of `type/name` of resources that the golden file shows.
    show: Vec<String>,
}

impl Case {
    pub(crate) fn all() -> Vec<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let mut folders: Vec<_> = fs::read_dir(root)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.is_dir())
            .collect();
        folders.sort();
        assert!(folders.len() > 5, "the golden folders are gone");
        folders.into_iter().map(Self::read).collect()
    }

    pub(crate) fn named(name: &str) -> Self {
        Self::read(
            Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("tests/golden")
                .join(name),
        )
    }

    fn read(folder: PathBuf) -> Self {
        let settings = documents(&folder.join("node.yaml")).remove(0);
        // One file of objects, or a list of them.
        let bases = match &settings["base"] {
            Value::Array(list) => list.clone(),
            Value::Null => Vec::new(),
            one => vec![one.clone()],
        };
        let mut raw: Vec<Value> = bases
            .iter()
            .flat_map(|base| documents(&folder.join(base.as_str().unwrap())))
            .collect();
        raw.extend(documents(&folder.join("objects.yaml")));
        let mut objects = objects(&raw);
        if let Some(config) = settings.get("meshConfig") {
            objects.set_mesh_config(MeshConfig::from_value(config).unwrap());
        }
        let node =
            Node::from_xds_id(settings["id"].as_str().unwrap(), &settings["metadata"]).unwrap();
        let show = settings["show"]
            .as_array()
            .unwrap()
            .iter()
            .map(|prefix| prefix.as_str().unwrap().to_owned())
            .collect();
        Self {
            folder,
            raw,
            objects,
            node,
            show,
        }
    }

    pub(crate) fn mesh(&self) -> Mesh {
        Mesh::build(&self.objects)
    }

    /// What a person would want to see of the resources: names of all, content of those that the case shows.
    pub(crate) fn text(&self, mesh: &Mesh, resources: &Resources) -> String {
        let problems: Vec<_> = mesh.problems().iter().map(ToString::to_string).collect();
        let tables = [("nameTables", &resources.name_tables)];
        let tables = tables.into_iter().filter(|(_, table)| !table.is_empty());
        let all: Vec<_> = by_type(resources).into_iter().chain(tables).collect();
        let names: Vec<_> = all
            .iter()
            .copied()
            .map(|(kind, table)| (kind.to_owned(), json!(table.keys().collect::<Vec<_>>())))
            .collect();
        let mut shown = serde_json::Map::new();
        for (kind, table) in all {
            for (name, resource) in table {
                let path = format!("{kind}/{name}");
                if self.show.iter().any(|prefix| path.starts_with(prefix)) {
                    shown.insert(path, sorted(to_json(resource)));
                }
            }
        }
        let mut text = json!({ "problems": problems, "notes": resources.notes, "names": serde_json::Map::from_iter(names), "resources": shown });
        let of_node: Vec<_> = resources.problems.iter().map(ToString::to_string).collect();
        if !of_node.is_empty() {
            text["problemsOfNode"] = json!(of_node);
        }
        if !resources.secrets.is_empty() {
            let by =
                |(name, objects): (&String, &std::collections::BTreeSet<mesh_model::ObjectKey>)| {
                    (
                        name.clone(),
                        json!(objects.iter().map(ToString::to_string).collect::<Vec<_>>()),
                    )
                };
            text["secrets"] = resources.secrets.iter().map(by).collect();
        }
        format!("{text:#}\n")
    }
}

pub(crate) fn by_type(resources: &Resources) -> [(&'static str, &BTreeMap<String, Resource>); 4] {
    [
        ("clusters", &resources.clusters),
        ("endpoints", &resources.endpoints),
        ("listeners", &resources.listeners),
        ("routes", &resources.routes),
    ]
}

pub(crate) fn to_json(resource: &Resource) -> Value {
    mesh_xds::json::Descriptors::keep();
    mesh_xds::json::to_json(resource.type_url, &resource.body, Naming::Proto).unwrap()
}

/// Maps of protobuf have no order; people want one.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let fields: BTreeMap<_, _> = fields
                .into_iter()
                .map(|(key, value)| (key, sorted(value)))
                .collect();
            Value::Object(fields.into_iter().collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        other => other,
    }
}
