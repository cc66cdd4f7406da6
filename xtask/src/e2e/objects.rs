//! Everything that an API server holds, to be compared with what it holds later.

use std::collections::BTreeMap;

use anyhow::{Context, bail};
use serde_json::Value;

use super::cluster::Cluster;

/// Fields of `metadata` that change when nothing is said anew: they count, or say who wrote what.
const COUNTED: &[&str] = &["resourceVersion", "generation", "managedFields"];

/// Where kubectl keeps what it has applied, of an object that was there before too.
const APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Kinds that come and go by themselves.
const FLEETING: &[&str] = &["events"];

/// The objects of every kind, by `RESOURCE NAMESPACE/NAME`, without what the system keeps writing into them.
pub struct Objects(BTreeMap<String, Value>);

impl Objects {
    /// Reads them all.
    pub fn read(cluster: &Cluster) -> anyhow::Result<Self> {
        let mut found = BTreeMap::new();
        for path in lists(cluster)? {
            let list = raw(cluster, &path)?;
            for item in list["items"].as_array().into_iter().flatten() {
                let metadata = &item["metadata"];
                let (namespace, name) = (&metadata["namespace"], &metadata["name"]);
                let key = format!(
                    "{path} {}/{}",
                    namespace.as_str().unwrap_or_default(),
                    name.as_str().unwrap_or_default()
                );
                found.insert(key, said(item.clone()));
            }
        }
        if found.is_empty() {
            bail!("the API server has no object at all");
        }
        Ok(Self(found))
    }

    /// Fails by name where the API server holds something else now.
    pub fn same(&self, cluster: &Cluster) -> anyhow::Result<()> {
        let now = Self::read(cluster)?;
        let mut differences = Vec::new();
        for (key, object) in &self.0 {
            match now.0.get(key) {
                None => differences.push(format!("{key} is gone")),
                Some(other) if other != object => {
                    differences.push(format!("{key} was {object} and is {other}"));
                }
                Some(_) => {}
            }
        }
        let new = now.0.keys().filter(|key| !self.0.contains_key(*key));
        differences.extend(new.map(|key| format!("{key} is left")));
        if !differences.is_empty() {
            bail!("{}", differences.join("\n"));
        }
        Ok(())
    }
}

/// The paths of all lists, over all namespaces.
fn lists(cluster: &Cluster) -> anyhow::Result<Vec<String>> {
    let mut groups = vec!["/api/v1".to_owned()];
    for group in raw(cluster, "/apis")?["groups"]
        .as_array()
        .into_iter()
        .flatten()
    {
        let version = group["preferredVersion"]["groupVersion"].as_str();
        groups.push(format!(
            "/apis/{}",
            version.context("a group without a version")?
        ));
    }
    let mut paths = Vec::new();
    for group in groups {
        for resource in raw(cluster, &group)?["resources"]
            .as_array()
            .into_iter()
            .flatten()
        {
            let name = resource["name"]
                .as_str()
                .context("a resource without a name")?;
            let verbs = resource["verbs"].as_array();
            let listed = verbs.is_some_and(|verbs| verbs.iter().any(|verb| verb == "list"));
            if listed && !FLEETING.contains(&name) {
                paths.push(format!("{group}/{name}"));
            }
        }
    }
    Ok(paths)
}

fn raw(cluster: &Cluster, path: &str) -> anyhow::Result<Value> {
    let text = cluster.mesh(&["get", "--raw", path])?;
    serde_json::from_str(&text).with_context(|| format!("reading {path}"))
}

/// An object without its state: what somebody said it is to be.
fn said(mut object: Value) -> Value {
    if object["spec"]["renewTime"].is_string() {
        object["spec"]["renewTime"].take();
    }
    if let Some(fields) = object.as_object_mut() {
        fields.remove("status");
    }
    if let Some(metadata) = object["metadata"].as_object_mut() {
        for field in COUNTED {
            metadata.remove(*field);
        }
        if let Some(annotations) = metadata
            .get_mut("annotations")
            .and_then(Value::as_object_mut)
        {
            annotations.remove(APPLIED);
            if annotations.is_empty() {
                metadata.remove("annotations");
            }
        }
    }
    object
}
