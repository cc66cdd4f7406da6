//! The one message on the discovery stream that is Istio's own: the table of names by which an agent answers DNS queries.

use std::collections::BTreeMap;

use prost::Message;
use serde_json::{Value, json};

use crate::JsonError;

/// Type URL of [`NameTable`].
pub const NAME_TABLE: &str = "type.googleapis.com/istio.networking.nds.v1.NameTable";

/// `istio.networking.nds.v1.NameTable` (`pkg/dns/proto/nds.proto` of Istio): names of services and their addresses.
#[derive(Clone, PartialEq, Message)]
pub struct NameTable {
    /// By the full name of the host, without a dot at its end; `*.` may begin it.
    #[prost(btree_map = "string, message", tag = "1")]
    pub table: BTreeMap<String, NameInfo>,
}

/// What a name stands for.
#[derive(Clone, PartialEq, Message)]
pub struct NameInfo {
    /// Addresses, IPv4 and IPv6.
    #[prost(string, repeated, tag = "1")]
    pub ips: Vec<String>,
    /// `Kubernetes` for its Services, `External` for ServiceEntries.
    #[prost(string, tag = "2")]
    pub registry: String,
    /// Name of the Kubernetes Service; it may be called by this, too, in its namespace.
    #[prost(string, tag = "3")]
    pub shortname: String,
    /// Its namespace.
    #[prost(string, tag = "4")]
    pub namespace: String,
}

impl prost::Name for NameTable {
    const NAME: &'static str = "NameTable";
    const PACKAGE: &'static str = "istio.networking.nds.v1";

    fn full_name() -> String {
        format!("{}.{}", Self::PACKAGE, Self::NAME)
    }

    fn type_url() -> String {
        NAME_TABLE.to_owned()
    }
}

impl NameTable {
    /// Its JSON form: `{"table": {"HOST": {"ips": [], "registry": ""}}}`, without empty fields.
    pub fn to_json(&self) -> Value {
        let entry = |info: &NameInfo| {
            let mut value = json!({ "ips": info.ips, "registry": info.registry });
            for (field, text) in [
                ("shortname", &info.shortname),
                ("namespace", &info.namespace),
            ] {
                if !text.is_empty() {
                    value[field] = json!(text);
                }
            }
            value
        };
        let entries = self
            .table
            .iter()
            .map(|(host, info)| (host.clone(), entry(info)));
        json!({ "table": entries.collect::<serde_json::Map<_, _>>() })
    }

    /// The JSON form of an encoded table.
    pub(crate) fn json_of(bytes: &[u8]) -> Result<Value, JsonError> {
        let table = Self::decode(bytes)
            .map_err(|error| JsonError::Decode("NameTable".to_owned(), error))?;
        Ok(table.to_json())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wire_form_is_istios() {
        let info = NameInfo {
            ips: vec!["10.96.0.1".to_owned()],
            registry: "Kubernetes".to_owned(),
            shortname: "a".to_owned(),
            namespace: "b".to_owned(),
        };
        let table = NameTable {
            table: [("a.b.svc".to_owned(), info)].into(),
        };
        // Field 1, a map entry: key (1) and value (2) with the fields 1 to 4.
        let expected =
            b"\x0a\x28\x0a\x07a.b.svc\x12\x1d\x0a\x0910.96.0.1\x12\x0aKubernetes\x1a\x01a\x22\x01b";
        assert_eq!(table.encode_to_vec().len(), expected.len());
        assert_eq!(table.encode_to_vec(), expected);
        let json = json!({ "table": { "a.b.svc": {
            "ips": ["10.96.0.1"], "registry": "Kubernetes", "shortname": "a", "namespace": "b",
        } } });
        assert_eq!(NameTable::json_of(expected).expect("a table"), json);
        assert!(NameTable::json_of(b"\x0a\x05").is_err());
    }
}
