//! Telemetry, plugins and patches.

use super::{ERROR, WARNING, long, rows};

#[test]
fn telemetry_and_extensions() {
    let change =
        |text: &str| format!("{{metrics: [{{overrides: [{{tagOverrides: {{a: {{{text}}}}}}}]}}]}}");
    const VALUE: &str = "spec.metrics[0].overrides[0].tagOverrides[a].value";
    let filter = |text: &str| format!("{{accessLogging: [{{filter: {{expression: {text:?}}}}}]}}");
    const EXPRESSION: &str = "spec.accessLogging[0].filter.expression";
    rows(
        "Telemetry",
        ERROR,
        &[
            (change("operation: UPSERT"), VALUE, "UPSERT needs"),
            (
                change("operation: REMOVE, value: a"),
                VALUE,
                "REMOVE takes none",
            ),
            (change("operation: UPSERT, value: request.host"), "", ""),
            (
                "{tracing: [{providers: [{name: ''}]}]}".into(),
                "spec.tracing[0].providers[0].name",
                "empty",
            ),
            (
                "{metrics: [{providers: [{name: ''}]}]}".into(),
                "spec.metrics[0].providers[0].name",
                "empty",
            ),
            (
                "{accessLogging: [{providers: [{name: ''}]}]}".into(),
                "spec.accessLogging[0].providers[0].name",
                "empty",
            ),
            (
                "{tracing: [{customTags: {a: {header: {name: ''}}}}]}".into(),
                "spec.tracing[0].customTags[a].header.name",
                "empty",
            ),
            (
                filter("response.code >= 500 && (a == ')' || b[0] == 1)"),
                "",
                "",
            ),
            (filter("(response.code"), EXPRESSION, "lacks"),
            (filter("response.code)"), EXPRESSION, "closes nothing"),
            (filter("a == 'b"), EXPRESSION, "not closed"),
            (filter(" "), EXPRESSION, "empty"),
        ],
    );
    rows(
        "Telemetry",
        WARNING,
        &[
            ("{tracing: [{}, {}]}".into(), "spec.tracing", "first entry"),
            (
                "{tracing: [{providers: [{name: a}, {name: b}]}]}".into(),
                "spec.tracing[0].providers",
                "first provider",
            ),
        ],
    );
    let digest = long("a", 64);
    rows(
        "WasmPlugin",
        ERROR,
        &[
            ("{url: ''}".into(), "spec.url", "empty"),
            ("{url: a, sha256: abc}".into(), "spec.sha256", "64 hex"),
            (
                format!("{{url: 'oci://a@sha256:{digest}', sha256: {digest}}}"),
                "",
                "",
            ),
            (
                format!("{{url: 'oci://a@sha256:b', sha256: {digest}}}"),
                "spec.sha256",
                "differs",
            ),
            (
                "{url: a, vmConfig: {env: [{name: a}, {name: a}]}}".into(),
                "spec.vmConfig.env[1].name",
                "twice",
            ),
            (
                "{url: a, vmConfig: {env: [{name: a, valueFrom: HOST, value: b}]}}".into(),
                "spec.vmConfig.env[0].value",
                "HOST",
            ),
        ],
    );
    rows(
        "TrafficExtension",
        ERROR,
        &[
            (
                "{wasm: {url: a}, lua: {inlineCode: a}}".into(),
                "spec",
                "exactly one",
            ),
            (
                "{lua: {inlineCode: ''}}".into(),
                "spec.lua.inlineCode",
                "65536",
            ),
            ("{lua: {inlineCode: a}}".into(), "", ""),
        ],
    );
}

#[test]
fn envoy_filters() {
    let patch = |text: &str| format!("{{configPatches: [{{{text}}}]}}");
    let value = "patch: {operation: MERGE, value: {}}";
    let on = |apply_to: &str, matcher: &str| {
        patch(&format!(
            "applyTo: {apply_to}, match: {{{matcher}}}, {value}"
        ))
    };
    let chain = |filter: &str| format!("listener: {{filterChain: {{filter: {filter}}}}}");
    const FILTER: &str = "spec.configPatches[0].match.listener.filterChain.filter";
    let hcm = "envoy.filters.network.http_connection_manager";
    rows(
        "EnvoyFilter",
        ERROR,
        &[
            (
                patch(value),
                "spec.configPatches[0].applyTo",
                "has to be given",
            ),
            (
                patch("applyTo: CLUSTER"),
                "spec.configPatches[0].patch",
                "has to be given",
            ),
            (
                patch("applyTo: CLUSTER, patch: {value: {}}"),
                "spec.configPatches[0].patch.operation",
                "has to be given",
            ),
            (
                patch("applyTo: CLUSTER, patch: {operation: REMOVE}"),
                "",
                "",
            ),
            (
                on("CLUSTER", "proxy: {proxyVersion: '('}"),
                "spec.configPatches[0].match.proxy.proxyVersion",
                "RE2",
            ),
            (
                on(
                    "CLUSTER",
                    &format!("proxy: {{proxyVersion: {}}}", long("a", 1025)),
                ),
                "spec.configPatches[0].match.proxy.proxyVersion",
                "at most 1024",
            ),
            (
                on("CLUSTER", "listener: {portNumber: 1}"),
                "spec.configPatches[0].match.listener",
                "cluster",
            ),
            (
                on("HTTP_FILTER", "cluster: {}"),
                "spec.configPatches[0].match.cluster",
                "listener",
            ),
            (
                on("VIRTUAL_HOST", "listener: {}"),
                "spec.configPatches[0].match.listener",
                "routeConfiguration",
            ),
            (
                on("CLUSTER", "cluster: {}, listener: {}"),
                "spec.configPatches[0].match",
                "exclude",
            ),
            (
                on("CLUSTER", "waypoint: {}"),
                "spec.configPatches[0].match.waypoint",
                "WAYPOINT",
            ),
            (
                on(
                    "NETWORK_FILTER",
                    &chain(&format!("{{name: {hcm}, subFilter: {{name: a}}}}")),
                ),
                &format!("{FILTER}.subFilter"),
                "HTTP_FILTER only",
            ),
            (
                on(
                    "HTTP_FILTER",
                    &chain("{name: envoy.filters.network.tcp_proxy, subFilter: {name: a}}"),
                ),
                &format!("{FILTER}.subFilter"),
                "no filters inside",
            ),
            (
                on(
                    "HTTP_FILTER",
                    &chain(&format!("{{name: {hcm}, subFilter: {{name: a}}}}")),
                ),
                "",
                "",
            ),
            (
                on("HTTP_FILTER", &chain("{name: ''}")),
                &format!("{FILTER}.name"),
                "empty",
            ),
            (
                "{workloadSelector: {labels: {a: b}}, targetRefs: [{kind: Service, name: a}]}"
                    .into(),
                "spec",
                "exclude",
            ),
        ],
    );
    rows(
        "EnvoyFilter",
        WARNING,
        &[
            (
                on(
                    "HTTP_FILTER",
                    &chain("{name: envoy.http_connection_manager}"),
                ),
                &format!("{FILTER}.name"),
                "old name",
            ),
            (
                patch(
                    "applyTo: HTTP_FILTER, patch: {operation: INSERT_BEFORE, value: {name: envoy.lua}}",
                ),
                "spec.configPatches[0].patch.value.name",
                "envoy.filters.http.lua",
            ),
            ("{}".into(), "spec", "generated configuration"),
        ],
    );
}
