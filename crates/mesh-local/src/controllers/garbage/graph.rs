//! Who owns whom. Pure.

use std::collections::{HashMap, HashSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

/// Finalizer of an owner that waits until its blocking dependents are gone.
pub(super) const FOREGROUND: &str = "foregroundDeletion";
/// Finalizer of an owner that goes without its dependents.
pub(super) const ORPHAN: &str = "orphan";

/// One object.
#[derive(Debug, Clone)]
pub(super) struct Node<K> {
    pub(super) kind: K,
    pub(super) uid: String,
    pub(super) namespace: Option<String>,
    pub(super) name: String,
    pub(super) version: Option<String>,
    pub(super) owners: Vec<OwnerReference>,
    pub(super) finalizers: Vec<String>,
    /// Whether its deletion was asked for.
    pub(super) ending: bool,
}

impl<K> Node<K> {
    pub(super) fn has_finalizer(&self, name: &str) -> bool {
        self.finalizers.iter().any(|finalizer| finalizer == name)
    }

    /// Whether the object keeps the owner with `uid` from going in the foreground.
    pub(super) fn blocks(&self, uid: &str) -> bool {
        self.owners
            .iter()
            .any(|owner| owner.uid == uid && owner.block_owner_deletion == Some(true))
    }
}

impl<K: std::fmt::Display> std::fmt::Display for Node<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{} {namespace}/{}", self.kind, self.name),
            None => write!(f, "{} {}", self.kind, self.name),
        }
    }
}

/// What becomes of an object by the state of its owners.
#[derive(Debug, PartialEq)]
pub(super) enum Verdict {
    /// It has no owners, or all are there.
    Keep,
    /// All its owners are gone.
    Delete,
    /// Some are: these references stay.
    Detach(Vec<OwnerReference>),
}

/// Judges an object with `owners`, of which those with a uid in `absent` are gone.
pub(super) fn judge(owners: &[OwnerReference], absent: &HashSet<String>) -> Verdict {
    let present: Vec<_> = owners
        .iter()
        .filter(|owner| !absent.contains(&owner.uid))
        .cloned()
        .collect();
    if present.len() == owners.len() {
        Verdict::Keep
    } else if present.is_empty() {
        Verdict::Delete
    } else {
        Verdict::Detach(present)
    }
}

/// All known objects by uid.
#[derive(Debug)]
pub(super) struct Graph<K> {
    nodes: HashMap<String, Node<K>>,
    /// Uids of the dependents of an owner, known or not.
    dependents: HashMap<String, HashSet<String>>,
}

impl<K> Default for Graph<K> {
    fn default() -> Self {
        Self {
            nodes: HashMap::new(),
            dependents: HashMap::new(),
        }
    }
}

impl<K: PartialEq> Graph<K> {
    pub(super) fn get(&self, uid: &str) -> Option<&Node<K>> {
        self.nodes.get(uid)
    }

    pub(super) fn dependents(&self, uid: &str) -> impl Iterator<Item = &Node<K>> {
        self.dependents
            .get(uid)
            .into_iter()
            .flatten()
            .filter_map(|uid| self.nodes.get(uid))
    }

    /// Takes in an object or its new state; the uids of the objects to settle.
    pub(super) fn insert(&mut self, node: Node<K>) -> Vec<String> {
        let uid = node.uid.clone();
        let mut concerned = self.unlink(&uid);
        for owner in &node.owners {
            self.dependents
                .entry(owner.uid.clone())
                .or_default()
                .insert(uid.clone());
        }
        if node.ending || !node.owners.is_empty() {
            concerned.push(uid.clone());
        }
        self.nodes.insert(uid, node);
        concerned
    }

    /// Takes in the end of an object; the uids of the objects to settle: its dependents, and owners that waited for it.
    pub(super) fn remove(&mut self, uid: &str) -> Vec<String> {
        let mut concerned = self.unlink(uid);
        self.nodes.remove(uid);
        concerned.extend(self.dependents.get(uid).into_iter().flatten().cloned());
        concerned
    }

    /// Removes the objects of `kind` that are not among `uids`.
    pub(super) fn retain(&mut self, kind: &K, uids: &HashSet<String>) -> Vec<String> {
        let gone: Vec<_> = self
            .nodes
            .values()
            .filter(|node| node.kind == *kind && !uids.contains(&node.uid))
            .map(|node| node.uid.clone())
            .collect();
        gone.iter().flat_map(|uid| self.remove(uid)).collect()
    }

    /// Forgets whom the object belonged to; the owners among them that wait for their dependents.
    fn unlink(&mut self, uid: &str) -> Vec<String> {
        let owners: Vec<_> = self
            .nodes
            .get(uid)
            .into_iter()
            .flat_map(|node| &node.owners)
            .map(|o| o.uid.clone())
            .collect();
        for owner in &owners {
            if let Some(dependents) = self.dependents.get_mut(owner) {
                dependents.remove(uid);
                if dependents.is_empty() {
                    self.dependents.remove(owner);
                }
            }
        }
        owners
            .into_iter()
            .filter(|owner| self.nodes.get(owner).is_some_and(|node| node.ending))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(uid: &str, blocks: bool) -> OwnerReference {
        OwnerReference {
            uid: uid.into(),
            block_owner_deletion: Some(blocks),
            ..OwnerReference::default()
        }
    }

    fn node(uid: &str, owners: &[&str]) -> Node<u8> {
        Node {
            kind: 0,
            uid: uid.into(),
            namespace: None,
            name: uid.into(),
            version: None,
            owners: owners.iter().map(|uid| owner(uid, true)).collect(),
            finalizers: Vec::new(),
            ending: false,
        }
    }

    #[test]
    fn objects_go_with_their_last_owner() {
        let owners = [owner("a", false), owner("b", false)];
        let absent = |uids: &[&str]| uids.iter().map(|uid| (*uid).to_owned()).collect();
        assert_eq!(judge(&owners, &absent(&[])), Verdict::Keep);
        assert_eq!(
            judge(&owners, &absent(&["a"])),
            Verdict::Detach(vec![owner("b", false)])
        );
        assert_eq!(judge(&owners, &absent(&["a", "b"])), Verdict::Delete);
        assert_eq!(judge(&[], &absent(&["a"])), Verdict::Keep);
    }

    #[test]
    fn the_end_of_an_owner_concerns_its_dependents() {
        let mut graph = Graph::default();
        assert_eq!(graph.insert(node("owner", &[])), Vec::<String>::new());
        assert_eq!(graph.insert(node("child", &["owner"])), ["child"]);
        assert_eq!(graph.dependents("owner").count(), 1);
        assert_eq!(graph.remove("owner"), ["child"]);
        assert!(graph.get("child").is_some() && graph.get("owner").is_none());
    }

    #[test]
    fn the_end_of_a_dependent_concerns_an_owner_that_waits() {
        let mut graph = Graph::default();
        graph.insert(Node {
            ending: true,
            finalizers: vec![FOREGROUND.into()],
            ..node("owner", &[])
        });
        graph.insert(node("child", &["owner"]));
        assert!(graph.get("child").unwrap().blocks("owner"));
        assert_eq!(graph.remove("child"), ["owner"]);
        assert_eq!(graph.dependents("owner").count(), 0);
    }

    #[test]
    fn a_list_tells_what_is_gone() {
        let mut graph = Graph::default();
        graph.insert(node("owner", &[]));
        graph.insert(node("child", &["owner"]));
        graph.insert(Node {
            kind: 1,
            ..node("other", &[])
        });
        assert_eq!(
            graph.retain(&0, &HashSet::from(["child".to_owned()])),
            ["child"]
        );
        assert!(graph.get("owner").is_none() && graph.get("other").is_some());
    }
}
