//! Patches of clusters.

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::core::v3::transport_socket::ConfigType;
use envoy_types::pb::google::protobuf::value::Kind;
use mesh_api::networking::envoy_filter::{ApplyTo, PatchContext, PatchOperation};
use mesh_envoy_json::Lists;
use mesh_model::NodeKind;
use prost::Message;

use super::{Changes, Patch, Patcher, matching};
use crate::resources::{CLUSTER, Resources};

pub(super) fn apply(patcher: &Patcher<'_>, resources: &mut Resources) {
    if !patcher.has_any(&[ApplyTo::Cluster]) {
        return;
    }
    let names: Vec<String> = resources.clusters.keys().cloned().collect();
    for name in names {
        let context = if name.starts_with("inbound|") || name == crate::names::INBOUND_PASSTHROUGH {
            PatchContext::SidecarInbound
        } else {
            patcher.outbound()
        };
        patch_one(patcher, &name, context, resources);
    }
    add(patcher, resources);
}

fn patch_one(patcher: &Patcher<'_>, name: &str, context: PatchContext, resources: &mut Resources) {
    let Some(Ok(mut cluster)) = resources
        .clusters
        .get(name)
        .map(|resource| Cluster::decode(resource.body.as_ref()))
    else {
        return;
    };
    let hosts = hosts(&cluster);
    let mut changes = Changes::default();
    for patch in patcher.patches(ApplyTo::Cluster, context) {
        if !matching::cluster(patch.patch, name, &hosts) {
            continue;
        }
        if patch.is(PatchOperation::Remove) {
            resources.clusters.remove(name);
            resources.endpoints.remove(name);
            return;
        }
        if let Some(lists) = patch.merges() {
            merge(&mut cluster, patch, lists, &mut changes);
        }
    }
    // The name is what routes refer to.
    cluster.name = name.to_owned();
    resources.patched(CLUSTER, name, &cluster, changes.objects, changes.problems);
}

/// The configuration of a transport socket of the same name is merged, since an `Any` as such would be replaced.
fn merge(cluster: &mut Cluster, patch: Patch<'_>, lists: Lists, changes: &mut Changes) {
    let before = cluster.transport_socket.clone();
    patch.merge_into(cluster, lists, changes);
    if let (Some(before), Some(after)) = (before, &mut cluster.transport_socket)
        && before.name == after.name
        && let (Some(ConfigType::TypedConfig(mut base)), Some(ConfigType::TypedConfig(given))) =
            (before.config_type, after.config_type.as_mut())
        && base != *given
    {
        patch.merge_any(&mut base, given, lists, changes);
        *given = base;
    }
}

fn add(patcher: &Patcher<'_>, resources: &mut Resources) {
    let places = match patcher.node.kind {
        NodeKind::Sidecar => &[PatchContext::SidecarOutbound, PatchContext::SidecarInbound][..],
        NodeKind::Router => &[PatchContext::Gateway],
    };
    for patch in &patcher.patches {
        let wanted = patch.patch.apply_to == ApplyTo::Cluster
            && patch.is(PatchOperation::Add)
            && places
                .iter()
                .any(|place| matching::adds_to(patch.patch, *place));
        let mut changes = Changes::default();
        if wanted && let Some(cluster) = patch.value::<Cluster>(&mut changes) {
            changes.done(*patch);
            let name = cluster.name.clone();
            resources.patched(CLUSTER, &name, &cluster, changes.objects, changes.problems);
        }
    }
}

/// Hosts of the services that a cluster stands for, from its metadata.
fn hosts(cluster: &Cluster) -> Vec<String> {
    let istio = cluster
        .metadata
        .as_ref()
        .and_then(|metadata| metadata.filter_metadata.get("istio"));
    let services = istio.and_then(|fields| fields.fields.get("services"));
    let Some(Kind::ListValue(list)) = services.and_then(|value| value.kind.as_ref()) else {
        return Vec::new();
    };
    let host = |value: &envoy_types::pb::google::protobuf::Value| match &value.kind {
        Some(Kind::StructValue(service)) => match &service.fields.get("host")?.kind {
            Some(Kind::StringValue(host)) => Some(host.clone()),
            _ => None,
        },
        _ => None,
    };
    list.values.iter().filter_map(host).collect()
}
