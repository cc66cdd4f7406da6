//! Patches inside of HTTP connection managers: HTTP filters, and route tables that are not resources of their own.

use envoy_types::pb::envoy::config::listener::v3::Filter;
use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType as NetworkConfig;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::RouteSpecifier;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_filter::ConfigType;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, HttpFilter,
};
use mesh_api::networking::envoy_filter::PatchContext;
use mesh_envoy_json::Lists;
use prost::{Message, Name};

use super::{Changes, Patch, Patcher, list, matching, route};

/// The filter that has to be the last one of a manager.
const ROUTER: &str = "envoy.filters.http.router";

/// Patches a connection manager; other network filters stay as they are.
pub(super) fn patch_manager(
    patcher: &Patcher<'_>,
    place: PatchContext,
    filter: &mut Filter,
    patches: &[Patch<'_>],
    changes: &mut Changes,
) {
    let Some(NetworkConfig::TypedConfig(config)) = &mut filter.config_type else {
        return;
    };
    let inline_routes = patcher.has_any(&route::KINDS);
    if config.type_url != HttpConnectionManager::type_url()
        || (patches.is_empty() && !inline_routes)
    {
        return;
    }
    let Ok(mut manager) = HttpConnectionManager::decode(config.value.as_slice()) else {
        return;
    };
    let mut own = Changes::default();
    patch_filters(&mut manager.http_filters, patches, &mut own);
    if let Some(RouteSpecifier::RouteConfig(table)) = &mut manager.route_specifier {
        route::patch_table(patcher, place, table, &mut own);
    }
    if !own.is_empty() {
        config.value = manager.encode_to_vec();
    }
    changes.objects.extend(own.objects);
    changes.problems.extend(own.problems);
}

fn patch_filters(filters: &mut Vec<HttpFilter>, patches: &[Patch<'_>], changes: &mut Changes) {
    for patch in patches {
        let wanted = matching::http_filter(patch.patch);
        let matches = |filter: &HttpFilter| filter.name == wanted;
        list::apply(filters, *patch, !wanted.is_empty(), matches, end, changes);
    }
    for filter in filters {
        for patch in patches {
            if let Some(lists) = patch.merges()
                && matching::http_filter(patch.patch) == filter.name
            {
                merge(filter, *patch, lists, changes);
            }
        }
    }
}

/// Before the router, which Envoy wants at the end.
fn end(filters: &[HttpFilter]) -> usize {
    match filters.last() {
        Some(last) if last.name == ROUTER => filters.len() - 1,
        _ => filters.len(),
    }
}

fn merge(filter: &mut HttpFilter, patch: Patch<'_>, lists: Lists, changes: &mut Changes) {
    let Some(given) = patch.value::<HttpFilter>(changes) else {
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
