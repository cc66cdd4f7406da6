//! What the server serves, as clients ask before anything else: versions, groups, resources, health.

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderMap, Method};
use serde_json::{Value, json};

use crate::ApiServer;
use crate::errors::ApiError;
use crate::registry::{Registry, Resource};

/// Version that the server claims.
const VERSION: (&str, &str, &str) = ("1", "36", "v1.36.0");

/// Answers discovery and health paths; `None` for all others.
pub fn answer(
    api: &ApiServer,
    method: &Method,
    path: &str,
    headers: &HeaderMap,
) -> Option<Response> {
    let path = path.trim_end_matches('/');
    let segments: Vec<&str> = path.split('/').skip(1).collect();
    let registry = api.registry();
    let value = match segments.as_slice() {
        ["healthz" | "livez" | "readyz"] | ["healthz" | "livez" | "readyz", _] => {
            return Some(text_response("text/plain; charset=utf-8", "ok".to_owned()));
        }
        ["version"] => version(),
        ["api"] | ["apis"] => {
            let groups = segments[0] == "apis";
            if let Some(version) = wants_aggregated(headers) {
                let body = aggregated(&registry, groups, version);
                let media = format!(
                    "application/json;g=apidiscovery.k8s.io;v={version};as=APIGroupDiscoveryList"
                );
                return Some(text_response(&media, body.to_string()));
            }
            if groups {
                group_list(&registry)
            } else {
                api_versions(api)
            }
        }
        [] | [""] => json!({ "paths": paths(&registry) }),
        ["api", version] => return Some(resource_list(&registry, "", version)),
        ["apis", group] => match group_object(&registry, group) {
            Some(found) => found,
            None => return Some(ApiError::no_resource().into_response()),
        },
        ["apis", group, version] => return Some(resource_list(&registry, group, version)),
        _ => return None,
    };
    if !matches!(*method, Method::GET | Method::HEAD) {
        return Some(ApiError::method_not_allowed().into_response());
    }
    Some(text_response("application/json", value.to_string()))
}

fn text_response(media: &str, body: String) -> Response {
    let mut response = Response::new(Body::from(body));
    if let Ok(media) = media.parse() {
        response.headers_mut().insert(CONTENT_TYPE, media);
    }
    response
}

fn version() -> Value {
    json!({
        "major": VERSION.0, "minor": VERSION.1, "gitVersion": VERSION.2, "gitCommit": "", "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z", "goVersion": "", "compiler": "rustc", "platform": "linux/amd64",
    })
}

fn api_versions(api: &ApiServer) -> Value {
    json!({
        "kind": "APIVersions", "versions": ["v1"],
        "serverAddressByClientCIDRs": [{ "clientCIDR": "0.0.0.0/0", "serverAddress": api.options().advertise.to_string() }],
    })
}

fn paths(registry: &Registry) -> Vec<String> {
    let mut all = vec!["/api".to_owned(), "/api/v1".to_owned(), "/apis".to_owned()];
    for (group, versions) in registry
        .groups()
        .into_iter()
        .filter(|(group, _)| !group.is_empty())
    {
        all.push(format!("/apis/{group}"));
        all.extend(
            versions
                .iter()
                .map(|version| format!("/apis/{group}/{version}")),
        );
    }
    all.extend(
        [
            "/healthz",
            "/livez",
            "/openapi/v2",
            "/openapi/v3",
            "/readyz",
            "/version",
        ]
        .map(str::to_owned),
    );
    all
}

fn group_of(name: &str, versions: &[String]) -> Value {
    let versions: Vec<Value> = versions
        .iter()
        .map(|v| json!({ "groupVersion": format!("{name}/{v}"), "version": v }))
        .collect();
    json!({ "name": name, "versions": versions, "preferredVersion": versions[0] })
}

fn group_list(registry: &Registry) -> Value {
    let groups = registry
        .groups()
        .into_iter()
        .filter(|(name, _)| !name.is_empty());
    let groups: Vec<Value> = groups
        .map(|(name, versions)| group_of(&name, &versions))
        .collect();
    json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": groups })
}

fn group_object(registry: &Registry, group: &str) -> Option<Value> {
    let (name, versions) = registry
        .groups()
        .into_iter()
        .find(|(name, _)| name == group && !name.is_empty())?;
    let mut object = group_of(&name, &versions);
    object["kind"] = "APIGroup".into();
    object["apiVersion"] = "v1".into();
    Some(object)
}

fn resource_list(registry: &Registry, group: &str, version: &str) -> Response {
    let found: Vec<_> = registry
        .all()
        .iter()
        .filter(|r| r.group == group && r.version == version)
        .collect();
    if found.is_empty() {
        return ApiError::no_resource().into_response();
    }
    let resources: Vec<Value> = found.iter().flat_map(|r| entries(r)).collect();
    let group_version = if group.is_empty() {
        version.to_owned()
    } else {
        format!("{group}/{version}")
    };
    let list = json!({
        "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources,
    });
    text_response("application/json", list.to_string())
}

fn entries(resource: &Resource) -> Vec<Value> {
    let mut main = json!({
        "name": resource.plural, "singularName": resource.singular, "namespaced": resource.namespaced,
        "kind": resource.kind, "verbs": resource.verbs(),
    });
    if !resource.short_names.is_empty() {
        main["shortNames"] = json!(resource.short_names);
    }
    if !resource.categories.is_empty() {
        main["categories"] = json!(resource.categories);
    }
    if !resource.virtual_only {
        // Clients take it for a hash of the storage version and only compare it.
        main["storageVersionHash"] = format!("{:08x}", crc(&resource.storage)).into();
    }
    let mut all = vec![main];
    for (name, kind, verbs) in &resource.subresources {
        let mut entry = json!({
            "name": format!("{}/{name}", resource.plural), "singularName": "", "namespaced": resource.namespaced,
            "kind": kind, "verbs": verbs,
        });
        if let Some((group, version)) = kind_home(kind) {
            entry["group"] = group.into();
            entry["version"] = version.into();
        }
        all.push(entry);
    }
    all
}

fn crc(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash: u32, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}

/// Group and version of subresource kinds that live elsewhere.
fn kind_home(kind: &str) -> Option<(&'static str, &'static str)> {
    match kind {
        "Scale" => Some(("autoscaling", "v1")),
        "Eviction" => Some(("policy", "v1")),
        "TokenRequest" => Some(("authentication.k8s.io", "v1")),
        _ => None,
    }
}

/// The aggregated form (`v2` or `v2beta1`) when the client prefers it.
fn wants_aggregated(headers: &HeaderMap) -> Option<&'static str> {
    let accept = headers.get(ACCEPT)?.to_str().ok()?;
    for range in accept
        .split(',')
        .filter(|r| r.trim_start().starts_with("application/json"))
    {
        if !range.contains("as=APIGroupDiscoveryList") {
            return None;
        }
        for version in ["v2", "v2beta1"] {
            if range.split(';').any(|p| p.trim() == format!("v={version}")) {
                return Some(version);
            }
        }
    }
    None
}

fn aggregated(registry: &Registry, groups: bool, form: &str) -> Value {
    let wanted = registry
        .groups()
        .into_iter()
        .filter(|(name, _)| name.is_empty() != groups);
    let items: Vec<Value> = wanted
        .map(|(group, versions)| {
            let versions: Vec<Value> = versions
                .iter()
                .map(|version| {
                    let all = registry
                        .all()
                        .iter()
                        .filter(|r| r.group == group && r.version == *version);
                    let resources: Vec<Value> = all.map(|r| aggregated_resource(r)).collect();
                    json!({ "version": version, "resources": resources, "freshness": "Current" })
                })
                .collect();
            let metadata = if group.is_empty() {
                json!({ "creationTimestamp": null })
            } else {
                json!({ "name": group })
            };
            json!({ "metadata": metadata, "versions": versions })
        })
        .collect();
    let api_version = format!("apidiscovery.k8s.io/{form}");
    json!({ "kind": "APIGroupDiscoveryList", "apiVersion": api_version, "metadata": {}, "items": items })
}

fn aggregated_resource(resource: &Resource) -> Value {
    let kind_of = |kind: &str| {
        let (group, version) = kind_home(kind).unwrap_or((&resource.group, &resource.version));
        json!({ "group": group, "version": version, "kind": kind })
    };
    let mut entry = json!({
        "resource": resource.plural, "responseKind": kind_of(&resource.kind),
        "scope": if resource.namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": resource.singular, "verbs": resource.verbs(),
    });
    if !resource.short_names.is_empty() {
        entry["shortNames"] = json!(resource.short_names);
    }
    if !resource.categories.is_empty() {
        entry["categories"] = json!(resource.categories);
    }
    let subresources: Vec<Value> = resource
        .subresources
        .iter()
        .map(|(name, kind, verbs)| json!({ "subresource": name, "responseKind": kind_of(kind), "verbs": verbs }))
        .collect();
    if !subresources.is_empty() {
        entry["subresources"] = subresources.into();
    }
    entry
}
