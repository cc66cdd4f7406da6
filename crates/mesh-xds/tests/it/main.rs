//! Tests of the discovery service: the rules of a stream, and both ends over loopback.

#![allow(clippy::unwrap_used)]

mod properties;
mod stream;
mod subscription;

use mesh_xds::{Resource, ResourceSet};

/// A resource whose content is its version.
pub fn resource(type_url: &str, name: &str, version: &str) -> Resource {
    Resource {
        name: name.to_owned(),
        version: version.to_owned(),
        type_url: type_url.to_owned(),
        value: version.to_owned().into_bytes().into(),
    }
}

/// A set from (type, name, version).
pub fn set(resources: &[(&str, &str, &str)]) -> ResourceSet {
    resources
        .iter()
        .map(|(type_url, name, version)| resource(type_url, name, version))
        .collect()
}
