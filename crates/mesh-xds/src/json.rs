//! The JSON form of Envoy's messages, both ways (protobuf's JSON mapping, with every `Any` expanded).

/// How fields are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// `connect_timeout`, as Envoy's `/config_dump`.
    Proto,
    /// `connectTimeout`, as `istioctl proxy-config -o json`.
    Camel,
}
