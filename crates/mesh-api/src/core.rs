//! Core Kubernetes kinds, lean: only the fields that a mesh reads, lenient about all others.

mod config;
mod node;
mod pod;
mod service;

pub use config::{ConfigMap, Namespace, Secret, ServiceAccount};
pub use node::Node;
pub use pod::{Container, ContainerPort, Pod, PodCondition, PodSpec, PodStatus};
pub use service::{
    Endpoint, EndpointConditions, EndpointPort, EndpointSlice, IntOrString, LoadBalancerIngress,
    LoadBalancerStatus, Service, ServicePort, ServiceSpec, ServiceStatus, TargetRef,
};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::meta::Meta;
use crate::object::{ParseError, typed};

/// A core kind.
pub trait CoreObject: DeserializeOwned {
    /// Kind, for instance `Service`.
    const KIND: &'static str;
    /// Group and version, for instance `v1`.
    const API_VERSION: &'static str;
    /// Name in URLs, for instance `services`.
    const PLURAL: &'static str;

    /// Metadata of the object.
    fn meta(&self) -> &Meta;

    /// Reads an object. Apart from the metadata's name nothing has to be there; unknown fields are ignored.
    ///
    /// # Errors
    /// A known field with a value of the wrong form.
    fn from_value(raw: &Value) -> Result<Self, ParseError> {
        typed(raw, "")
    }
}

/// Implements [`CoreObject`] for types with a `meta` field.
macro_rules! core_object {
    ($($kind:ident = $api_version:literal, $plural:literal;)*) => {
        $(impl CoreObject for $kind {
            const KIND: &'static str = stringify!($kind);
            const API_VERSION: &'static str = $api_version;
            const PLURAL: &'static str = $plural;

            fn meta(&self) -> &Meta {
                &self.meta
            }
        })*
    };
}

core_object! {
    ConfigMap = "v1", "configmaps";
    EndpointSlice = "discovery.k8s.io/v1", "endpointslices";
    Namespace = "v1", "namespaces";
    Node = "v1", "nodes";
    Pod = "v1", "pods";
    Secret = "v1", "secrets";
    Service = "v1", "services";
    ServiceAccount = "v1", "serviceaccounts";
}

/// For fields where a Kubernetes API may serve null instead of nothing.
fn null_as_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}
