//! The table of parsed objects.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use mesh_api::core::{EndpointSlice, Namespace, Node, Pod, Service};
use mesh_api::mesh_config::MeshConfig;
use mesh_api::{AnyObject, Meta};

use crate::KeySource;

/// What names an object: kind, namespace (empty for cluster-scoped kinds) and name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// Kind, for instance `VirtualService`.
    pub kind: String,
    /// Namespace; empty for cluster-scoped kinds.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl ObjectKey {
    /// Makes a key.
    pub fn new(
        kind: impl Into<String>,
        namespace: impl Into<String>,
        name: impl Into<String>,
    ) -> Self {
        Self {
            kind: kind.into(),
            namespace: namespace.into(),
            name: name.into(),
        }
    }

    /// The key of an Istio object.
    pub fn of(object: &AnyObject) -> Self {
        let meta = object.meta();
        Self::new(object.kind(), &meta.namespace, &meta.name)
    }
}

impl fmt::Display for ObjectKey {
    /// `Kind namespace/name`, or `Kind name` for cluster-scoped kinds.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namespace.as_str() {
            "" => write!(f, "{} {}", self.kind, self.name),
            namespace => write!(f, "{} {namespace}/{}", self.kind, self.name),
        }
    }
}

/// One object for the table.
#[derive(Debug, Clone)]
pub enum Item {
    /// A Kubernetes Service.
    Service(Service),
    /// A part of a Service's endpoints.
    EndpointSlice(EndpointSlice),
    /// A Pod.
    Pod(Pod),
    /// A Namespace.
    Namespace(Namespace),
    /// A cluster node, for its locality.
    Node(Node),
    /// An object of any Istio kind.
    Istio(AnyObject),
}

impl From<AnyObject> for Item {
    fn from(object: AnyObject) -> Self {
        Self::Istio(object)
    }
}

macro_rules! item_from {
    ($($kind:ident),*) => {
        $(impl From<$kind> for Item {
            fn from(object: $kind) -> Self {
                Self::$kind(object)
            }
        })*
    };
}
item_from!(Service, EndpointSlice, Pod, Namespace, Node);

/// Namespace and name.
pub(crate) type Name = (String, String);

/// All objects that a mesh is made of. Cloning is cheap: the objects are shared.
#[derive(Debug, Clone, Default)]
pub struct Objects {
    pub(crate) services: BTreeMap<Name, Arc<Service>>,
    pub(crate) slices: BTreeMap<Name, Arc<EndpointSlice>>,
    pub(crate) pods: BTreeMap<Name, Arc<Pod>>,
    pub(crate) namespaces: BTreeMap<Name, Arc<Namespace>>,
    pub(crate) nodes: BTreeMap<Name, Arc<Node>>,
    pub(crate) istio: BTreeMap<ObjectKey, Arc<AnyObject>>,
    pub(crate) mesh_config: Arc<MeshConfig>,
    pub(crate) jwks: Arc<BTreeMap<KeySource, Arc<str>>>,
}

impl Objects {
    /// Adds an object, or replaces the one of the same kind, namespace and name. False if nothing changed that a mesh is made of (a new
    /// resourceVersion alone, a probe's result in a pod's status), so that nothing has to be built.
    pub fn upsert(&mut self, item: impl Into<Item>) -> bool {
        match item.into() {
            Item::Service(mut object) => {
                forget_bookkeeping(&mut object.meta);
                put(&mut self.services, name_of(&object.meta), object)
            }
            Item::EndpointSlice(mut object) => {
                forget_bookkeeping(&mut object.meta);
                put(&mut self.slices, name_of(&object.meta), object)
            }
            Item::Pod(mut object) => {
                forget_bookkeeping(&mut object.meta);
                object.status.conditions.clear();
                put(&mut self.pods, name_of(&object.meta), object)
            }
            Item::Namespace(mut object) => {
                forget_bookkeeping(&mut object.meta);
                put(&mut self.namespaces, name_of(&object.meta), object)
            }
            Item::Node(mut object) => {
                forget_bookkeeping(&mut object.meta);
                put(&mut self.nodes, name_of(&object.meta), object)
            }
            Item::Istio(object) => {
                let key = ObjectKey::of(&object);
                if let Some(old) = self.istio.get(&key)
                    && old.meta().generation == object.meta().generation
                    && same_intent(old, &object)
                {
                    return false;
                }
                self.istio.insert(key, Arc::new(object));
                true
            }
        }
    }

    /// Takes an object out. False if it was not there, or if its kind is not one that a mesh is made of.
    pub fn remove(&mut self, key: &ObjectKey) -> bool {
        let name = (key.namespace.clone(), key.name.clone());
        match key.kind.as_str() {
            "Service" => self.services.remove(&name).is_some(),
            "EndpointSlice" => self.slices.remove(&name).is_some(),
            "Pod" => self.pods.remove(&name).is_some(),
            "Namespace" => self.namespaces.remove(&name).is_some(),
            "Node" => self.nodes.remove(&name).is_some(),
            _ => self.istio.remove(key).is_some(),
        }
    }

    /// Replaces the mesh configuration. False if it is the same.
    pub fn set_mesh_config(&mut self, config: MeshConfig) -> bool {
        if *self.mesh_config == config {
            return false;
        }
        self.mesh_config = Arc::new(config);
        true
    }

    /// Sets the key set that was found at a source (JSON, RFC 7517). False if it is the same as before.
    pub fn set_jwks(&mut self, source: KeySource, keys: &str) -> bool {
        if self.jwks.get(&source).is_some_and(|old| **old == *keys) {
            return false;
        }
        Arc::make_mut(&mut self.jwks).insert(source, keys.into());
        true
    }

    /// Forgets the keys of sources that nothing refers to any more.
    pub fn retain_jwks(&mut self, mut wanted: impl FnMut(&KeySource) -> bool) {
        if self.jwks.keys().any(|source| !wanted(source)) {
            Arc::make_mut(&mut self.jwks).retain(|source, _| wanted(source));
        }
    }

    /// The mesh configuration.
    pub fn mesh_config(&self) -> &MeshConfig {
        &self.mesh_config
    }

    /// An Istio object by key.
    pub fn istio(&self, key: &ObjectKey) -> Option<&Arc<AnyObject>> {
        self.istio.get(key)
    }

    /// All Istio objects, ordered by key.
    pub fn istio_objects(&self) -> impl Iterator<Item = (&ObjectKey, &Arc<AnyObject>)> {
        self.istio.iter()
    }

    /// Number of objects of all kinds.
    pub fn len(&self) -> usize {
        self.services.len()
            + self.slices.len()
            + self.pods.len()
            + self.namespaces.len()
            + self.nodes.len()
            + self.istio.len()
    }

    /// True if there is no object at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Equal but for what every write changes. Annotations count, since some of them steer the mesh.
fn same_intent(old: &AnyObject, new: &AnyObject) -> bool {
    let (old_meta, new_meta) = (old.meta(), new.meta());
    if old_meta.resource_version == new_meta.resource_version {
        return old == new;
    }
    // Without a generation (tests, files) only a full comparison tells; with one, the API server has told already.
    let same_meta = old_meta.labels == new_meta.labels
        && old_meta.annotations == new_meta.annotations
        && old_meta.uid == new_meta.uid
        && old_meta.creation_timestamp == new_meta.creation_timestamp;
    same_meta && new_meta.generation > 0
}

/// The parts of the metadata that change with every write and mean nothing to a mesh.
fn forget_bookkeeping(meta: &mut Meta) {
    meta.resource_version.clear();
    meta.generation = 0;
}

fn name_of(meta: &Meta) -> Name {
    (meta.namespace.clone(), meta.name.clone())
}

fn put<T: PartialEq>(table: &mut BTreeMap<Name, Arc<T>>, name: Name, object: T) -> bool {
    if table.get(&name).is_some_and(|old| **old == object) {
        return false;
    }
    table.insert(name, Arc::new(object));
    true
}
