//! Golden folders: `objects.yaml` and `node.yaml` in, `expected.json` out. `UPDATE_GOLDEN=1` rewrites.

use std::fs;
use std::sync::Arc;

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::listener::v3::Listener;
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use mesh_routing::{Snapshot, XdsState, compile};
use mesh_translate::{Resource, Resources, translate};
use prost::Message;

use crate::case::{Case, by_type, to_json};

#[test]
fn resources_are_as_expected() {
    let update = std::env::var_os("UPDATE_GOLDEN").is_some();
    let mut failed = Vec::new();
    for case in Case::all() {
        let mesh = case.mesh();
        let text = case.text(&mesh, &translate(&mesh, &case.node));
        let path = case.folder.join("expected.json");
        if update {
            fs::write(&path, &text).unwrap();
        } else if fs::read_to_string(&path).unwrap_or_default() != text {
            let actual = std::env::temp_dir().join(format!(
                "mesh-translate-{}.json",
                case.folder.file_name().unwrap().display()
            ));
            fs::write(&actual, &text).unwrap();
            failed.push(format!("diff {} {}", path.display(), actual.display()));
        }
    }
    assert!(
        failed.is_empty(),
        "golden files differ (UPDATE_GOLDEN=1 rewrites them):\n{}",
        failed.join("\n")
    );
}

/// Every resource compiles in our proxy, and what it names exists.
#[test]
fn the_proxy_takes_everything() {
    for case in Case::all() {
        let mesh = case.mesh();
        snapshot(
            &translate(&mesh, &case.node),
            &case.folder.display().to_string(),
        );
    }
}

/// Compiles resources as the proxy does.
pub(crate) fn snapshot(resources: &Resources, what: &str) -> Snapshot {
    let state = XdsState {
        listeners: decoded::<Listener>(resources.listeners.iter()),
        routes: decoded::<RouteConfiguration>(resources.routes.iter()),
        clusters: decoded::<Cluster>(resources.clusters.iter()),
        endpoints: decoded::<ClusterLoadAssignment>(resources.endpoints.iter()),
    };
    let (snapshot, rejections) = compile(&state, None);
    assert_eq!(rejections, [], "{what}");
    snapshot
}

fn decoded<'a, M: Message + Default>(
    table: impl Iterator<Item = (&'a String, &'a Resource)>,
) -> std::collections::BTreeMap<String, Arc<M>> {
    table
        .map(|(name, resource)| {
            (
                name.clone(),
                Arc::new(M::decode(resource.body.as_ref()).unwrap()),
            )
        })
        .collect()
}

/// A bootstrap file with all resources of a case, for a check by stock Envoy (`envoy --mode validate`). Written only on request, since the check
/// itself belongs to the judges: `ENVOY_BOOTSTRAPS=<folder>`.
#[test]
fn bootstraps_for_stock_envoy() {
    let folder = std::env::var_os("ENVOY_BOOTSTRAPS").map(std::path::PathBuf::from);
    for mut case in Case::all() {
        let mesh = case.mesh();
        // Filters of our own and Istio's are for proxies that have them.
        case.node.stock_envoy = true;
        let resources = translate(&mesh, &case.node);
        let text = bootstrap(&resources);
        // Whatever is written has to be readable again.
        mesh_xds::json::from_json(
            "type.googleapis.com/envoy.config.bootstrap.v3.Bootstrap",
            &text,
        )
        .unwrap();
        if let Some(folder) = &folder {
            let name = case.folder.file_name().unwrap().to_str().unwrap();
            fs::write(folder.join(format!("{name}.json")), format!("{text:#}")).unwrap();
        }
    }
}

/// Everything static: discovered routes go into their listeners, endpoints into their clusters.
pub(crate) fn bootstrap(resources: &Resources) -> serde_json::Value {
    let [(_, clusters), (_, endpoints), (_, listeners), (_, routes)] = by_type(resources);
    let mut clusters: Vec<_> = clusters.values().map(to_json).collect();
    for cluster in &mut clusters {
        let name = cluster["name"].as_str().unwrap().to_owned();
        if let Some(assignment) = endpoints.get(&name) {
            let fields = cluster.as_object_mut().unwrap();
            fields.remove("eds_cluster_config");
            fields.insert("type".to_owned(), "STATIC".into());
            fields.insert("load_assignment".to_owned(), to_json(assignment));
        }
    }
    clusters.push(serde_json::json!({ "name": "sds-grpc", "type": "STATIC" }));
    let mut listeners: Vec<_> = listeners.values().map(to_json).collect();
    for listener in &mut listeners {
        let extra = listener.get("default_filter_chain").cloned();
        if let Some(mut chain) = extra {
            inline_routes(&mut chain, routes);
            listener["default_filter_chain"] = chain;
        }
        for chain in listener["filter_chains"].as_array_mut().unwrap() {
            inline_routes(chain, routes);
        }
    }
    // Secrets of the control plane come over the aggregated stream.
    let ads = serde_json::json!({
        "api_type": "GRPC", "transport_api_version": "V3", "grpc_services": [{ "envoy_grpc": { "cluster_name": "sds-grpc" } }],
    });
    serde_json::json!({ "node": { "id": "n", "cluster": "c" }, "dynamic_resources": { "ads_config": ads }, "static_resources": { "clusters": clusters, "listeners": listeners } })
}

fn inline_routes(
    chain: &mut serde_json::Value,
    routes: &std::collections::BTreeMap<String, Resource>,
) {
    for filter in chain["filters"].as_array_mut().unwrap() {
        let config = filter["typed_config"].as_object_mut().unwrap();
        if let Some(rds) = config.remove("rds") {
            let name = rds["route_config_name"].as_str().unwrap();
            config.insert("route_config".to_owned(), to_json(&routes[name]));
        }
    }
}
