//! Objects in, mesh out.

// Helpers of tests may fail like the tests themselves.
#![allow(clippy::unwrap_used)]

mod destination_rules;
mod envoy_filters;
mod rules;
mod services;

use mesh_api::core::{CoreObject, EndpointSlice, Node, Pod, Service};
use mesh_model::{Item, Mesh, Objects};
use serde_json::Value;

/// Builds a mesh from YAML documents.
fn mesh(text: &str) -> Mesh {
    Mesh::build(&objects(text))
}

fn objects(text: &str) -> Objects {
    let mut objects = Objects::default();
    for raw in mesh_api::yaml::documents(text, "test").unwrap() {
        objects.upsert(item(&raw));
    }
    objects
}

fn item(raw: &Value) -> Item {
    match raw["kind"].as_str().unwrap() {
        "Service" => Service::from_value(raw).unwrap().into(),
        "EndpointSlice" => EndpointSlice::from_value(raw).unwrap().into(),
        "Pod" => Pod::from_value(raw).unwrap().into(),
        "Node" => Node::from_value(raw).unwrap().into(),
        _ => mesh_api::parse(raw).unwrap().into(),
    }
}
