//! Patches of listeners, filter chains and network filters.

use envoy_types::pb::envoy::config::core::v3::TrafficDirection;
use envoy_types::pb::envoy::config::core::v3::transport_socket::ConfigType as SocketConfig;
use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType;
use envoy_types::pb::envoy::config::listener::v3::{Filter, FilterChain, Listener};
use mesh_api::networking::envoy_filter::{ApplyTo, PatchContext, PatchOperation};
use mesh_envoy_json::Lists;
use mesh_model::NodeKind;
use prost::Message;

use super::{Changes, Patch, Patcher, filter, list, matching, route};
use crate::resources::{LISTENER, Resources};

/// The kinds that touch listeners but for route tables in them.
const KINDS: [ApplyTo; 4] = [
    ApplyTo::Listener,
    ApplyTo::FilterChain,
    ApplyTo::NetworkFilter,
    ApplyTo::HttpFilter,
];

pub(super) fn apply(patcher: &Patcher<'_>, resources: &mut Resources) {
    if !patcher.has_any(&KINDS) && !patcher.has_any(&route::KINDS) {
        return;
    }
    let names: Vec<String> = resources.listeners.keys().cloned().collect();
    for name in names {
        patch_one(patcher, &name, resources);
    }
    add(patcher, resources);
}

fn patch_one(patcher: &Patcher<'_>, name: &str, resources: &mut Resources) {
    let Some(Ok(mut listener)) = resources
        .listeners
        .get(name)
        .map(|resource| Listener::decode(resource.body.as_ref()))
    else {
        return;
    };
    let place = place(patcher, &listener);
    let mut changes = Changes::default();
    for patch in patcher.patches(ApplyTo::Listener, place) {
        if !matching::listener(patch.patch, &listener) {
            continue;
        }
        if patch.is(PatchOperation::Remove) {
            resources.listeners.remove(name);
            return;
        }
        if let Some(lists) = patch.merges() {
            patch.merge_into(&mut listener, lists, &mut changes);
        }
    }
    name.clone_into(&mut listener.name);
    patch_chains(patcher, place, &mut listener, &mut changes);
    resources.patched(LISTENER, name, &listener, changes.objects, changes.problems);
}

fn place(patcher: &Patcher<'_>, listener: &Listener) -> PatchContext {
    match patcher.node.kind {
        NodeKind::Sidecar if listener.traffic_direction == TrafficDirection::Inbound as i32 => {
            PatchContext::SidecarInbound
        }
        _ => patcher.outbound(),
    }
}

fn add(patcher: &Patcher<'_>, resources: &mut Resources) {
    let places = match patcher.node.kind {
        NodeKind::Sidecar => &[PatchContext::SidecarOutbound, PatchContext::SidecarInbound][..],
        NodeKind::Router => &[PatchContext::Gateway],
    };
    for patch in &patcher.patches {
        let wanted = patch.patch.apply_to == ApplyTo::Listener
            && patch.is(PatchOperation::Add)
            && places
                .iter()
                .any(|place| matching::adds_to(patch.patch, *place));
        let mut changes = Changes::default();
        if wanted && let Some(listener) = patch.value::<Listener>(&mut changes) {
            changes.done(*patch);
            let name = listener.name.clone();
            resources.patched(
                LISTENER,
                &name,
                &listener,
                changes.objects,
                changes.problems,
            );
        }
    }
}

fn patch_chains(
    patcher: &Patcher<'_>,
    place: PatchContext,
    listener: &mut Listener,
    changes: &mut Changes,
) {
    let of_listener = |apply_to| {
        let patches = patcher.patches(apply_to, place);
        patches
            .filter(|patch| matching::listener(patch.patch, listener))
            .collect::<Vec<_>>()
    };
    let patches = Patches {
        chains: of_listener(ApplyTo::FilterChain),
        network: of_listener(ApplyTo::NetworkFilter),
        http: of_listener(ApplyTo::HttpFilter),
    };
    let name = listener.name.clone();
    let mut patched = |chain: &mut FilterChain| {
        // A chain without filters is no chain that we made.
        chain.filters.is_empty() || patch_chain(patcher, place, &patches, &name, chain, changes)
    };
    listener.filter_chains.retain_mut(&mut patched);
    if let Some(chain) = &mut listener.default_filter_chain
        && !patched(chain)
    {
        listener.default_filter_chain = None;
    }
    for patch in &patches.chains {
        if patch.is(PatchOperation::Add)
            && let Some(chain) = patch.value(changes)
        {
            listener.filter_chains.push(chain);
            changes.done(*patch);
        }
    }
}

/// The patches for one listener.
struct Patches<'a> {
    chains: Vec<Patch<'a>>,
    network: Vec<Patch<'a>>,
    http: Vec<Patch<'a>>,
}

/// False if the chain is to be removed.
fn patch_chain(
    patcher: &Patcher<'_>,
    place: PatchContext,
    patches: &Patches<'_>,
    listener: &str,
    chain: &mut FilterChain,
    changes: &mut Changes,
) -> bool {
    for patch in &patches.chains {
        if !matching::chain(patch.patch, listener, chain) {
            continue;
        }
        if patch.is(PatchOperation::Remove) {
            changes.done(*patch);
            return false;
        }
        if let Some(lists) = patch.merges() {
            merge_chain(chain, *patch, lists, changes);
        }
    }
    let of_chain = |patches: &[Patch<'_>]| -> Vec<bool> {
        patches
            .iter()
            .map(|patch| matching::chain(patch.patch, listener, chain))
            .collect()
    };
    let (network, http) = (of_chain(&patches.network), of_chain(&patches.http));
    let network: Vec<Patch<'_>> = pick(&patches.network, &network);
    let http: Vec<Patch<'_>> = pick(&patches.http, &http);
    patch_filters(&mut chain.filters, &network, changes);
    for network_filter in &mut chain.filters {
        let of_filter: Vec<Patch<'_>> = http
            .iter()
            .copied()
            .filter(|patch| names_filter(*patch, network_filter))
            .collect();
        filter::patch_manager(patcher, place, network_filter, &of_filter, changes);
    }
    true
}

fn pick<'a>(patches: &[Patch<'a>], wanted: &[bool]) -> Vec<Patch<'a>> {
    patches
        .iter()
        .zip(wanted)
        .filter(|(_, wanted)| **wanted)
        .map(|(patch, _)| *patch)
        .collect()
}

/// As for clusters, the configuration of a transport socket of the same name is merged.
fn merge_chain(chain: &mut FilterChain, patch: Patch<'_>, lists: Lists, changes: &mut Changes) {
    let before = chain.transport_socket.clone();
    patch.merge_into(chain, lists, changes);
    if let (Some(before), Some(after)) = (before, &mut chain.transport_socket)
        && before.name == after.name
        && let (Some(SocketConfig::TypedConfig(mut base)), Some(SocketConfig::TypedConfig(given))) =
            (before.config_type, after.config_type.as_mut())
        && base != *given
    {
        patch.merge_any(&mut base, given, lists, changes);
        *given = base;
    }
}

/// Additions and removals first, then what is merged into the filters that are there, as Istio does.
fn patch_filters(filters: &mut Vec<Filter>, patches: &[Patch<'_>], changes: &mut Changes) {
    for patch in patches {
        let named = !matching::network_filter(patch.patch).is_empty();
        let matches = |filter: &Filter| names_filter(*patch, filter);
        list::apply(filters, *patch, named, matches, <[_]>::len, changes);
    }
    for filter in filters {
        for patch in patches {
            if let Some(lists) = patch.merges()
                && names_filter(*patch, filter)
            {
                merge_filter(filter, *patch, lists, changes);
            }
        }
    }
}

fn merge_filter(filter: &mut Filter, patch: Patch<'_>, lists: Lists, changes: &mut Changes) {
    let Some(given) = patch.value::<Filter>(changes) else {
        return;
    };
    if let (Some(ConfigType::TypedConfig(base)), Some(ConfigType::TypedConfig(given))) =
        (&mut filter.config_type, &given.config_type)
    {
        patch.merge_any(base, given, lists, changes);
    }
    if !given.name.is_empty() && given.name != filter.name {
        filter.name = given.name;
        changes.done(patch);
    }
}

fn names_filter(patch: Patch<'_>, filter: &Filter) -> bool {
    let wanted = matching::network_filter(patch.patch);
    wanted.is_empty() || wanted == filter.name
}
