//! Configuration and listeners in Envoy's forms (`envoy.admin.v3`).

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_routing::compile::{CLUSTER, ENDPOINTS, LISTENER, ROUTE};
use mesh_xds::json::{Descriptors, JsonError, Naming, any_to_json};
use prost::Message;
use serde_json::{Value, json};

use crate::shared::Shared;

/// `/config_dump`.
pub fn config(shared: &Shared, with_endpoints: bool) -> Result<Value, JsonError> {
    let _read_once = Descriptors::hold();
    let state = shared.snapshot().state();
    let node = json!({
        "id": shared.options.node_id(),
        "cluster": shared.identity.node.cluster,
        "metadata": shared.options.metadata,
    });
    let clusters = each(
        CLUSTER,
        &state.clusters,
        |_, value| json!({ "cluster": value }),
    )?;
    let listeners = each(
        LISTENER,
        &state.listeners,
        |name, value| json!({ "name": name, "active_state": { "listener": value } }),
    )?;
    let routes = each(
        ROUTE,
        &state.routes,
        |_, value| json!({ "route_config": value }),
    )?;
    let mut configs = vec![
        section("Bootstrap", json!({ "bootstrap": { "node": node } })),
        section("Clusters", json!({ "dynamic_active_clusters": clusters })),
        section("Listeners", json!({ "dynamic_listeners": listeners })),
        section("Routes", json!({ "dynamic_route_configs": routes })),
        section(
            "Secrets",
            json!({ "dynamic_active_secrets": super::secrets::dump(shared) }),
        ),
    ];
    if with_endpoints {
        let endpoints = each(
            ENDPOINTS,
            &state.endpoints,
            |_, value| json!({ "endpoint_config": value }),
        )?;
        configs.insert(
            2,
            section(
                "Endpoints",
                json!({ "dynamic_endpoint_configs": endpoints }),
            ),
        );
    }
    Ok(json!({ "configs": configs }))
}

fn section(kind: &str, mut content: Value) -> Value {
    let mut object = serde_json::Map::new();
    object.insert(
        "@type".to_owned(),
        json!(format!(
            "type.googleapis.com/envoy.admin.v3.{kind}ConfigDump"
        )),
    );
    if let Some(fields) = content.as_object_mut() {
        object.append(fields);
    }
    Value::Object(object)
}

fn each<M: Message>(
    type_url: &str,
    messages: &BTreeMap<String, Arc<M>>,
    wrap: impl Fn(&str, Value) -> Value,
) -> Result<Vec<Value>, JsonError> {
    let one = |(name, message): (&String, &Arc<M>)| {
        let value = any_to_json(type_url, &message.encode_to_vec(), Naming::Proto)?;
        Ok(wrap(name, value))
    };
    messages.iter().map(one).collect()
}

pub(super) fn socket(address: std::net::SocketAddr) -> Value {
    json!({ "socket_address": { "address": address.ip().to_string(), "port_value": address.port() } })
}

/// `/listeners`.
pub fn listeners_text(shared: &Shared) -> String {
    shared
        .snapshot()
        .listeners()
        .map(|l| format!("{}::{}\n", l.name, l.address))
        .collect()
}

/// `/listeners?format=json`.
pub fn listeners_json(shared: &Shared) -> Value {
    let snapshot = shared.snapshot();
    let all: Vec<Value> = snapshot
        .listeners()
        .map(|l| json!({ "name": &*l.name, "local_address": socket(l.address) }))
        .collect();
    json!({ "listener_statuses": all })
}
