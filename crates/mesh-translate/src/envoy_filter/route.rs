//! Patches of route tables, virtual hosts and routes.

use envoy_types::pb::envoy::config::route::v3::{RouteConfiguration, VirtualHost};
use mesh_api::networking::envoy_filter::{ApplyTo, PatchContext, PatchOperation};
use prost::Message;

use super::{Changes, Patcher, list, matching};
use crate::resources::{ROUTE, Resources};

/// The kinds that touch route tables.
pub(super) const KINDS: [ApplyTo; 3] = [
    ApplyTo::RouteConfiguration,
    ApplyTo::VirtualHost,
    ApplyTo::HttpRoute,
];

/// Patches the tables that are resources of their own.
pub(super) fn apply(patcher: &Patcher<'_>, resources: &mut Resources) {
    if !patcher.has_any(&KINDS) {
        return;
    }
    let names: Vec<String> = resources.routes.keys().cloned().collect();
    for name in names {
        let Some(Ok(mut table)) = resources
            .routes
            .get(&name)
            .map(|resource| RouteConfiguration::decode(resource.body.as_ref()))
        else {
            continue;
        };
        let mut changes = Changes::default();
        patch_table(patcher, patcher.outbound(), &mut table, &mut changes);
        resources.patched(ROUTE, &name, &table, changes.objects, changes.problems);
    }
}

/// Patches one table, wherever it stands.
pub(super) fn patch_table(
    patcher: &Patcher<'_>,
    place: PatchContext,
    table: &mut RouteConfiguration,
    changes: &mut Changes,
) {
    // Conditions mean the table as it was generated, and its name is what listeners refer to.
    let name = table.name.clone();
    for patch in patcher.patches(ApplyTo::RouteConfiguration, place) {
        if let Some(lists) = patch.merges()
            && matching::table(patcher, patch.patch, place, &name)
        {
            patch.merge_into(table, lists, changes);
        }
    }
    table.name.clone_from(&name);
    let mut kept = Vec::with_capacity(table.virtual_hosts.len());
    for mut host in std::mem::take(&mut table.virtual_hosts) {
        if patch_host(patcher, place, &name, &mut host, changes) {
            kept.push(host);
        }
    }
    table.virtual_hosts = kept;
    for patch in patcher.patches(ApplyTo::VirtualHost, place) {
        if patch.is(PatchOperation::Add)
            && matching::table(patcher, patch.patch, place, &name)
            && let Some(host) = patch.value(changes)
        {
            table.virtual_hosts.push(host);
            changes.done(patch);
        }
    }
}

/// False if the host is to be removed.
fn patch_host(
    patcher: &Patcher<'_>,
    place: PatchContext,
    table: &str,
    host: &mut VirtualHost,
    changes: &mut Changes,
) -> bool {
    for patch in patcher.patches(ApplyTo::VirtualHost, place) {
        if !matching::table(patcher, patch.patch, place, table)
            || !matching::virtual_host(patch.patch, host)
        {
            continue;
        }
        if patch.is(PatchOperation::Remove) {
            changes.done(patch);
            return false;
        }
        if let Some(lists) = patch.merges() {
            patch.merge_into(host, lists, changes);
        } else if patch.is(PatchOperation::Replace)
            && let Some(value) = patch.value(changes)
        {
            *host = value;
            changes.done(patch);
        }
    }
    patch_routes(patcher, place, table, host, changes);
    true
}

fn patch_routes(
    patcher: &Patcher<'_>,
    place: PatchContext,
    table: &str,
    host: &mut VirtualHost,
    changes: &mut Changes,
) {
    let patches: Vec<_> = patcher
        .patches(ApplyTo::HttpRoute, place)
        .filter(|patch| {
            matching::table(patcher, patch.patch, place, table)
                && matching::virtual_host(patch.patch, host)
        })
        .collect();
    host.routes.retain_mut(|route| {
        for patch in &patches {
            if !matching::route(patch.patch, route) {
                continue;
            }
            if patch.is(PatchOperation::Remove) {
                changes.done(*patch);
                return false;
            }
            if let Some(lists) = patch.merges() {
                patch.merge_into(route, lists, changes);
            }
        }
        true
    });
    for patch in patches {
        let named = matching::wanted_route(patch.patch).is_some();
        let matches = |route: &_| matching::route(patch.patch, route);
        let absent = || !host.routes.iter().any(matches);
        // Even at the top a route is put only where the one exists that the patch names.
        if patch.is(PatchOperation::Remove)
            || (patch.is(PatchOperation::InsertFirst) && named && absent())
        {
            continue;
        }
        list::apply(&mut host.routes, patch, named, matches, <[_]>::len, changes);
    }
}
