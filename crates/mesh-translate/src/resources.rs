//! The set of resources of one node.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::Hasher;

use bytes::Bytes;
use mesh_model::{ObjectKey, Problem, Severity};
use prost::{Message, Name};

/// One encoded resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    /// Type URL of the message, such as `type.googleapis.com/envoy.config.cluster.v3.Cluster`.
    pub type_url: &'static str,
    /// The encoded message. Shared, not copied, when the resource is cloned.
    pub body: Bytes,
    /// Version: 128 bits of hash over the content, in hexadecimal.
    pub hash: String,
}

/// Everything that one node gets, by name within each type.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resources {
    /// `envoy.config.listener.v3.Listener`.
    pub listeners: BTreeMap<String, Resource>,
    /// `envoy.config.route.v3.RouteConfiguration`.
    pub routes: BTreeMap<String, Resource>,
    /// `envoy.config.cluster.v3.Cluster`.
    pub clusters: BTreeMap<String, Resource>,
    /// `envoy.config.endpoint.v3.ClusterLoadAssignment`.
    pub endpoints: BTreeMap<String, Resource>,
    /// `istio.networking.nds.v1.NameTable`, one for a node that answers DNS queries.
    pub name_tables: BTreeMap<String, Resource>,
    /// Names of the secrets that the other resources ask the control plane for (SDS over the aggregated stream), with the objects that name them.
    pub secrets: BTreeMap<String, BTreeSet<ObjectKey>>,
    /// What could not be translated for this node, for people; ordered, without repetition.
    pub notes: Vec<String>,
    /// EnvoyFilters that changed a resource, by the resource's type URL and name.
    pub patched_by: BTreeMap<(&'static str, String), BTreeSet<ObjectKey>>,
    /// What of objects can't be done for this node: patches that don't fit, authorizers that are not there.
    pub problems: Vec<Problem>,
}

impl Resources {
    /// Notes that objects need secrets.
    pub(crate) fn need(&mut self, secrets: BTreeSet<String>, objects: &[ObjectKey]) {
        for name in secrets {
            let by = self.secrets.entry(name).or_default();
            by.extend(objects.iter().cloned());
        }
    }

    /// Notes that a part of an object has no effect on this node.
    pub(crate) fn report(&mut self, object: &ObjectKey, field: &str, message: String) {
        self.problem(object, field, Severity::Error, message);
    }

    /// Notes that a part of an object does less on this node than one may think.
    pub(crate) fn warn(&mut self, object: &ObjectKey, field: &str, message: String) {
        self.problem(object, field, Severity::Warning, message);
    }

    fn problem(&mut self, object: &ObjectKey, field: &str, severity: Severity, message: String) {
        self.problems.push(Problem {
            object: object.clone(),
            field: field.to_owned(),
            severity,
            message,
            code: None,
        });
    }

    /// Puts a resource that patches of these objects changed in the place of the one before; nothing happens if there are none.
    pub(crate) fn patched<M: Message + Name>(
        &mut self,
        type_url: &'static str,
        name: &str,
        message: &M,
        objects: BTreeSet<ObjectKey>,
        problems: Vec<Problem>,
    ) {
        self.problems.extend(problems);
        if objects.is_empty() {
            return;
        }
        let table = match type_url {
            LISTENER => &mut self.listeners,
            ROUTE => &mut self.routes,
            _ => &mut self.clusters,
        };
        let body = mesh_envoy_json::ordered(type_url, &message.encode_to_vec());
        debug_assert_eq!(M::type_url(), type_url);
        table.insert(name.to_owned(), Resource::from_bytes(type_url, body));
        self.patched_by.insert((type_url, name.to_owned()), objects);
    }
}

/// Type URL of listeners.
pub const LISTENER: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";
/// Type URL of route configurations.
pub const ROUTE: &str = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration";
/// Type URL of clusters.
pub const CLUSTER: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
/// Type URL of endpoints.
pub const ENDPOINT: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";

impl Resource {
    /// Encodes a message.
    pub(crate) fn new<M: Message + Name>(type_url: &'static str, message: &M) -> Self {
        debug_assert_eq!(M::type_url(), type_url);
        Self::from_bytes(type_url, message.encode_to_vec())
    }

    /// Takes a message that is encoded already.
    pub(crate) fn from_bytes(type_url: &'static str, body: Vec<u8>) -> Self {
        let hash = content_hash(&body);
        Self {
            type_url,
            body: body.into(),
            hash,
        }
    }
}

/// Two 64-bit FNV-style hashes with different seeds: stable between versions of the standard library and between machines, so that a proxy that
/// reconnects to another control plane gets only what changed. Not meant against an adversary: content comes from the mesh itself.
fn content_hash(body: &[u8]) -> String {
    format!(
        "{:016x}{:016x}",
        fnv(0xcbf2_9ce4_8422_2325, body),
        fnv(0x9e37_79b9_7f4a_7c15, body)
    )
}

fn fnv(seed: u64, body: &[u8]) -> u64 {
    let mut hash = Fnv(seed ^ body.len() as u64);
    hash.write(body);
    hash.finish()
}

/// FNV-1a over words of eight bytes, with a final mix since words leave the upper bits better mixed than the lower ones.
struct Fnv(u64);

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        let mixed = (self.0 ^ (self.0 >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        mixed ^ (mixed >> 32)
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.0 = (self.0 ^ u64::from_le_bytes(word)).wrapping_mul(0x0000_0100_0000_01b3);
            self.0 ^= self.0 >> 29;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_depends_on_every_byte_and_on_nothing_else() {
        let text: Vec<u8> = (0..=255).collect();
        let original = content_hash(&text);
        assert_eq!(original, content_hash(&text));
        assert_eq!(original.len(), 32);
        for index in 0..text.len() {
            let mut changed = text.clone();
            changed[index] ^= 1;
            assert_ne!(content_hash(&changed), original, "byte {index}");
        }
        assert_ne!(content_hash(b"a"), content_hash(b"a\0"));
    }
}
