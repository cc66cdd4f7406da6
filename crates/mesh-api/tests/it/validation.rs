//! Validation rules: each row is a specification and the finding that it has to give.

use mesh_api::{Finding, Severity, parse, validate, yaml};

fn findings(kind: &str, spec: &str) -> Vec<Finding> {
    let info = mesh_api::KINDS
        .iter()
        .find(|info| info.kind == kind)
        .expect("known kind");
    let text = format!(
        "{{apiVersion: {}/{}, kind: {kind}, metadata: {{name: x}}, spec: {spec}}}",
        info.group, info.versions[0].name
    );
    let raw = &yaml::documents(&text, "test").unwrap_or_else(|error| panic!("{error}\n{text}"))[0];
    validate(&parse(raw).unwrap_or_else(|error| panic!("{error}\n{text}")))
}

/// Each specification gives exactly the finding at the field, with these words in its message; an empty field means none.
pub(crate) fn table(kind: &str, severity: Severity, rows: &[(&str, &str, &str)]) {
    for (spec, field, words) in rows {
        let all = findings(kind, spec);
        let found: Vec<_> = all
            .iter()
            .filter(|finding| finding.severity == severity)
            .collect();
        if field.is_empty() {
            assert!(found.is_empty(), "{spec}\n{found:#?}");
            continue;
        }
        assert!(
            found
                .iter()
                .any(|finding| finding.field == *field && finding.message.contains(words)),
            "{spec}\nexpected {field}: {words}\nfound {all:#?}"
        );
    }
}

/// A rule with one HTTP route.
macro_rules! http {
    ($route:literal) => {
        concat!("{hosts: [a], http: [", $route, "]}")
    };
}

#[test]
fn virtual_services_that_are_refused() {
    table(
        "VirtualService",
        Severity::Error,
        &[
            (http!("{route: [{destination: {host: a}}]}"), "", ""),
            (
                http!(
                    "{match: [{headers: {end-user: {exact: jason}, x: {}}, uri: {prefix: ''}}], route: [{destination: {host: a, subset: v1}, weight: 0}]}"
                ),
                "",
                "",
            ),
            (
                "{http: [{delegate: {name: b}}]}",
                "spec.http[0].delegate",
                "further",
            ),
            (
                "{http: [{route: [{destination: {host: a}}]}], gateways: [g]}",
                "spec.gateways",
                "delegate",
            ),
            (
                "{tcp: [{route: [{destination: {host: a}}]}]}",
                "spec.hosts",
                "at least one host",
            ),
            ("{hosts: ['*'], http: []}", "spec.hosts[0]", "all sidecars"),
            (
                "{hosts: ['*'], gateways: [mesh, g], http: []}",
                "spec.hosts[0]",
                "all sidecars",
            ),
            (
                "{hosts: ['*'], gateways: [g], http: [{route: [{destination: {host: a}}]}]}",
                "",
                "",
            ),
            ("{hosts: [a, a], http: []}", "spec.hosts[1]", "overlaps"),
            (
                "{hosts: ['*.b.c', a.b.c], http: []}",
                "spec.hosts[1]",
                "overlaps",
            ),
            (
                "{hosts: ['a.*.c'], http: []}",
                "spec.hosts[0]",
                "wildcard inside",
            ),
            ("{hosts: [a], exportTo: ['*', b]}", "spec.exportTo", "alone"),
            (
                "{hosts: [a], gateways: [a/b/c]}",
                "spec.gateways[0]",
                "not a gateway",
            ),
            (http!("{name: none}"), "spec.http[0]", "one of route"),
            (
                http!("{route: [{destination: {host: a}}], redirect: {uri: /b}}"),
                "spec.http[0]",
                "exclude",
            ),
            (
                http!("{route: [{destination: {host: a}}], delegate: {name: b}}"),
                "spec.http[0].delegate",
                "exclude",
            ),
            (
                http!("{redirect: {uri: /b}, fault: {abort: {httpStatus: 500}}}"),
                "spec.http[0].fault",
                "nothing is sent on",
            ),
            (
                http!("{directResponse: {status: 200}, rewrite: {uri: /b}}"),
                "spec.http[0].rewrite",
                "nothing is sent on",
            ),
            (
                http!("{route: [{destination: {host: a}, weight: -1}]}"),
                "spec.http[0].route[0].weight",
                "negative",
            ),
            (
                http!("{route: [{destination: {host: a}}, {destination: {host: b}}]}"),
                "spec.http[0].route",
                "above 0",
            ),
            (
                http!("{route: [{destination: {host: '*.a'}}]}"),
                "spec.http[0].route[0].destination.host",
                "wildcard",
            ),
            (
                http!("{route: [{destination: {host: ''}}]}"),
                "spec.http[0].route[0].destination.host",
                "needs a host",
            ),
            (
                http!("{route: [{destination: {host: a, port: {number: 0}}}]}"),
                "spec.http[0].route[0].destination.port.number",
                "1 to 65535",
            ),
            (
                http!("{match: [{uri: {}}], route: [{destination: {host: a}}]}"),
                "spec.http[0].match[0].uri",
                "empty",
            ),
            (
                http!("{match: [{uri: {regex: '(?!a)'}}], route: [{destination: {host: a}}]}"),
                "spec.http[0].match[0].uri.regex",
                "RE2",
            ),
            (
                http!(
                    "{match: [{headers: {'a b': {exact: x}}}], route: [{destination: {host: a}}]}"
                ),
                "spec.http[0].match[0].headers[a b]",
                "header name",
            ),
            (
                http!(
                    "{match: [{headers: {'@request.auth.claims.a': {exact: x}}}], route: [{destination: {host: a}}]}"
                ),
                "spec.http[0].match[0].headers[@request.auth.claims.a]",
                "gateways only",
            ),
            (
                http!("{route: [{destination: {host: a}}], timeout: 10us}"),
                "spec.http[0].timeout",
                "1ms",
            ),
            (
                http!("{route: [{destination: {host: a}}], retries: {attempts: -1}}"),
                "spec.http[0].retries.attempts",
                "negative",
            ),
            (
                http!("{route: [{destination: {host: a}}], retries: {perTryTimeout: 1s}}"),
                "spec.http[0].retries.attempts",
                "turns retries off",
            ),
            (
                http!(
                    "{route: [{destination: {host: a}}], retries: {attempts: 1, retryOn: 'a5xx,503'}}"
                ),
                "spec.http[0].retries.retryOn",
                "a5xx",
            ),
            (
                http!(
                    "{route: [{destination: {host: a}}], retries: {attempts: 1, retryOn: '5xx, reset,503'}}"
                ),
                "",
                "",
            ),
            (
                http!(
                    "{route: [{destination: {host: a}}], fault: {delay: {percentage: {value: 101}, fixedDelay: 1s}}}"
                ),
                "spec.http[0].fault.delay.percentage.value",
                "0.0001",
            ),
            (
                http!("{route: [{destination: {host: a}}], fault: {abort: {httpStatus: 700}}}"),
                "spec.http[0].fault.abort.httpStatus",
                "200 to 600",
            ),
            (
                http!("{route: [{destination: {host: a}}], fault: {abort: {grpcStatus: NOPE}}}"),
                "spec.http[0].fault.abort.grpcStatus",
                "UNAVAILABLE",
            ),
            (
                http!(
                    "{route: [{destination: {host: a}}], fault: {delay: {exponentialDelay: 1s}}}"
                ),
                "spec.http[0].fault.delay.exponentialDelay",
                "never implemented",
            ),
            (
                http!("{redirect: {redirectCode: 302}}"),
                "spec.http[0].redirect",
                "at least one",
            ),
            (
                http!("{redirect: {uri: /a, redirectCode: 200}}"),
                "spec.http[0].redirect.redirectCode",
                "301",
            ),
            (
                http!("{redirect: {scheme: ftp}}"),
                "spec.http[0].redirect.scheme",
                "http",
            ),
            (
                http!("{match: [{uri: {exact: /a}}], redirect: {prefixRewrite: /b}}"),
                "spec.http[0].redirect.prefixRewrite",
                "uri.prefix",
            ),
            (
                http!("{directResponse: {status: 99}}"),
                "spec.http[0].directResponse.status",
                "200",
            ),
            (
                http!("{directResponse: {status: 200, body: {bytes: '???'}}}"),
                "spec.http[0].directResponse.body.bytes",
                "base64",
            ),
            (
                http!(
                    "{route: [{destination: {host: a}}], rewrite: {uri: /a, uriRegexRewrite: {match: a, rewrite: b}}}"
                ),
                "spec.http[0].rewrite.uriRegexRewrite",
                "exclude",
            ),
            (
                http!(
                    "{route: [{destination: {host: a}}], headers: {request: {set: {x: '100%'}}}}"
                ),
                "spec.http[0].headers.request.set[x]",
                "%%",
            ),
            (
                http!(
                    "{route: [{destination: {host: a}}], headers: {request: {set: {x: 'a %REQ(b)% 100%%'}}}}"
                ),
                "",
                "",
            ),
            (
                http!("{route: [{destination: {host: a}}], headers: {response: {remove: [Host]}}}"),
                "spec.http[0].headers.response.remove[0]",
                "removed",
            ),
            (
                http!(
                    "{route: [{destination: {host: a}}], mirror: {host: b}, mirrors: [{destination: {host: c}}]}"
                ),
                "spec.http[0].mirrors",
                "exclude",
            ),
            (
                http!("{route: [{destination: {host: a}}], corsPolicy: {allowMethods: [FETCH]}}"),
                "spec.http[0].corsPolicy.allowMethods[0]",
                "FETCH",
            ),
            (
                http!("{route: [{destination: {host: a}}], corsPolicy: {maxAge: 1500ms}}"),
                "spec.http[0].corsPolicy.maxAge",
                "whole seconds",
            ),
            (
                "{hosts: [a.b], tls: [{match: [{sniHosts: [c.d]}], route: [{destination: {host: a}}]}]}",
                "spec.tls[0].match[0].sniHosts[0]",
                "add it to hosts",
            ),
            (
                "{hosts: [a.b], tls: [{match: [], route: [{destination: {host: a}}]}]}",
                "spec.tls[0].match",
                "needs a match",
            ),
            (
                "{hosts: [a.b], tcp: [{match: [{destinationSubnets: [10.0.0.0/33]}], route: []}]}",
                "spec.tcp[0].route",
                "needs a destination",
            ),
            (
                "{hosts: [a.b], tcp: [{match: [{destinationSubnets: [10.0.0.0/33]}], route: []}]}",
                "spec.tcp[0].match[0].destinationSubnets[0]",
                "10.0.0.0/33",
            ),
        ],
    );
}

#[test]
fn virtual_services_that_give_warnings() {
    table(
        "VirtualService",
        Severity::Warning,
        &[
            (http!("{route: [{destination: {host: a}}]}"), "", ""),
            ("{hosts: [a]}", "spec", "does nothing"),
            (
                "{hosts: [a], gateways: [g.ns.svc.cluster.local]}",
                "spec.gateways[0]",
                "old form",
            ),
            (
                http!(
                    "{route: [{destination: {host: a}}]}, {match: [{uri: {exact: /}}], route: [{destination: {host: b}}]}"
                ),
                "spec.http[1]",
                "http[0] matches every",
            ),
            (
                http!(
                    "{match: [{uri: {prefix: /a}}], route: [{destination: {host: a}}]}, {match: [{uri: {exact: /b}}, {uri: {prefix: /a/b}, port: 80}], route: [{destination: {host: b}}]}"
                ),
                "spec.http[1].match[1]",
                "http[0]",
            ),
            (
                http!(
                    "{match: [{uri: {prefix: /a}, port: 80}], route: [{destination: {host: a}}]}, {match: [{uri: {prefix: /a/b}}], route: [{destination: {host: b}}]}"
                ),
                "",
                "",
            ),
            (
                http!(
                    "{match: [{headers: {End-User: {exact: x}}}], route: [{destination: {host: a}}]}"
                ),
                "spec.http[0].match[0].headers[End-User]",
                "lower case",
            ),
        ],
    );
}

#[test]
fn destination_rules() {
    table(
        "DestinationRule",
        Severity::Error,
        &[
            (
                "{host: reviews, subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}, trafficPolicy: {loadBalancer: {simple: RANDOM}}}]}",
                "",
                "",
            ),
            ("{}", "spec.host", "empty"),
            (
                "{host: a, subsets: [{name: v1}, {name: v1}]}",
                "spec.subsets[1].name",
                "twice",
            ),
            (
                "{host: a, subsets: [{name: V_1}]}",
                "spec.subsets[0].name",
                "lower-case",
            ),
            (
                "{host: a, subsets: [{name: v, labels: {'a b': c}}]}",
                "spec.subsets[0].labels",
                "label key",
            ),
            (
                "{host: a, trafficPolicy: {}}",
                "spec.trafficPolicy",
                "empty",
            ),
            (
                "{host: a, trafficPolicy: {loadBalancer: {simple: RANDOM, consistentHash: {useSourceIp: true}}}}",
                "spec.trafficPolicy.loadBalancer",
                "exclude",
            ),
            (
                "{host: a, trafficPolicy: {loadBalancer: {consistentHash: {}}}}",
                "spec.trafficPolicy.loadBalancer.consistentHash",
                "exactly one",
            ),
            (
                "{host: a, trafficPolicy: {loadBalancer: {consistentHash: {useSourceIp: true, maglev: {tableSize: 10}}}}}",
                "spec.trafficPolicy.loadBalancer.consistentHash.maglev.tableSize",
                "prime",
            ),
            (
                "{host: a, trafficPolicy: {loadBalancer: {localityLbSetting: {distribute: [{from: r/*, to: {r/a: 60, r/b: 30}}]}}}}",
                "spec.trafficPolicy.loadBalancer.localityLbSetting.distribute[0].to",
                "100",
            ),
            (
                "{host: a, trafficPolicy: {loadBalancer: {localityLbSetting: {failover: [{from: r, to: r}]}}}}",
                "spec.trafficPolicy.loadBalancer.localityLbSetting.failover[0]",
                "itself",
            ),
            (
                "{host: a, trafficPolicy: {connectionPool: {}}}",
                "spec.trafficPolicy.connectionPool",
                "needed",
            ),
            (
                "{host: a, trafficPolicy: {connectionPool: {http: {maxRetries: -1}}}}",
                "spec.trafficPolicy.connectionPool.http.maxRetries",
                "negative",
            ),
            (
                "{host: a, trafficPolicy: {connectionPool: {http: {useClientProtocol: true, h2UpgradePolicy: UPGRADE}}}}",
                "spec.trafficPolicy.connectionPool.http.useClientProtocol",
                "exclude",
            ),
            (
                "{host: a, trafficPolicy: {connectionPool: {tcp: {connectTimeout: 1us}}}}",
                "spec.trafficPolicy.connectionPool.tcp.connectTimeout",
                "1ms",
            ),
            (
                "{host: a, trafficPolicy: {outlierDetection: {maxEjectionPercent: 101}}}",
                "spec.trafficPolicy.outlierDetection.maxEjectionPercent",
                "100",
            ),
            (
                "{host: a, trafficPolicy: {outlierDetection: {consecutiveLocalOriginFailures: 3}}}",
                "spec.trafficPolicy.outlierDetection.consecutiveLocalOriginFailures",
                "split",
            ),
            (
                "{host: a, trafficPolicy: {tls: {mode: MUTUAL}}}",
                "spec.trafficPolicy.tls.clientCertificate",
                "MUTUAL",
            ),
            (
                "{host: a, trafficPolicy: {tls: {mode: SIMPLE, insecureSkipVerify: true, subjectAltNames: [a]}}}",
                "spec.trafficPolicy.tls.subjectAltNames",
                "no meaning",
            ),
            (
                "{host: a, trafficPolicy: {portLevelSettings: [{port: {number: 80}}]}}",
                "spec.trafficPolicy.portLevelSettings[0]",
                "only a port",
            ),
            (
                "{host: a, trafficPolicy: {portLevelSettings: [{tls: {mode: DISABLE}}]}}",
                "spec.trafficPolicy.portLevelSettings[0].port.number",
                "port",
            ),
            (
                "{host: a, trafficPolicy: {tunnel: {targetHost: b, targetPort: 1, protocol: GET}}}",
                "spec.trafficPolicy.tunnel.protocol",
                "CONNECT",
            ),
            (
                "{host: a, exportTo: ['*'], workloadSelector: {matchLabels: {a: b}}}",
                "spec.exportTo",
                "own namespace",
            ),
        ],
    );
    table(
        "DestinationRule",
        Severity::Warning,
        &[(
            "{host: a, trafficPolicy: {outlierDetection: {consecutiveErrors: 5}}}",
            "spec.trafficPolicy.outlierDetection.consecutiveErrors",
            "old form",
        )],
    );
}

#[test]
fn gateways() {
    const HTTP: &str = "{selector: {istio: ingressgateway}, servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*', ns/a.b, ./*.c.d]}]}";
    table(
        "Gateway",
        Severity::Error,
        &[
            (HTTP, "", ""),
            ("{}", "spec.servers", "at least one"),
            (&HTTP.replace("80", "0"), "spec.servers[0].port.number", "65535"),
            (&HTTP.replace("name: http", "name: ''"), "spec.servers[0].port.name", "needs a name"),
            (&HTTP.replace("protocol: HTTP", "protocol: FTP"), "spec.servers[0].port.protocol", "FTP"),
            (&HTTP.replace("protocol: HTTP", "protocol: HTTP, targetPort: 1"), "spec.servers[0].port.targetPort", "ServiceEntry"),
            (&HTTP.replace("protocol: HTTP", "protocol: HTTPS"), "spec.servers[0].tls", "HTTPS"),
            (&HTTP.replace("ns/a.b", "short"), "spec.servers[0].hosts[1]", "short name"),
            (&HTTP.replace("hosts", "bind: nowhere, hosts"), "spec.servers[0].bind", "unix"),
            (&HTTP.replace("hosts", "tls: {httpsRedirect: true}, hosts"), "", ""),
            (&HTTP.replace("hosts", "tls: {mode: SIMPLE, credentialName: c}, hosts"), "spec.servers[0].tls.mode", "httpsRedirect"),
            (&HTTP.replace("protocol: HTTP}", "protocol: HTTPS}, tls: {mode: SIMPLE}"), "spec.servers[0].tls.credentialName", "certificate is needed"),
            (&HTTP.replace("protocol: HTTP}", "protocol: HTTPS}, tls: {mode: SIMPLE, credentialName: c}"), "", ""),
            (&HTTP.replace("protocol: HTTP}", "protocol: HTTPS}, tls: {mode: MUTUAL, serverCertificate: a, privateKey: b}"), "spec.servers[0].tls.caCertificates", "roots"),
            (&HTTP.replace("protocol: HTTP}", "protocol: HTTPS}, tls: {mode: SIMPLE, credentialName: c, serverCertificate: a, privateKey: b}"), "spec.servers[0].tls.credentialName", "exclude"),
            (&HTTP.replace("protocol: HTTP}", "protocol: TLS}, tls: {mode: ISTIO_MUTUAL, credentialName: c}"), "spec.servers[0].tls.mode", "mesh's certificates"),
            (&HTTP.replace("}]}", "}, {port: {number: 80, name: http, protocol: HTTP}, hosts: [x.y]}]}"), "spec.servers[1].port.name", "same port"),
        ],
    );
    table(
        "Gateway",
        Severity::Warning,
        &[(
            &HTTP.replace(
                "protocol: HTTP}",
                "protocol: HTTPS}, tls: {mode: SIMPLE, credentialName: c, cipherSuites: [NOPE]}",
            ),
            "spec.servers[0].tls.cipherSuites[0]",
            "unknown",
        )],
    );
}

#[test]
fn other_kinds() {
    let error = |kind, spec, field, words| table(kind, Severity::Error, &[(spec, field, words)]);
    error(
        "ServiceEntry",
        "{hosts: ['*']}",
        "spec.hosts[0]",
        "every host",
    );
    error(
        "ServiceEntry",
        "{hosts: [a.b], resolution: STATIC, endpoints: [{address: c.d}]}",
        "spec.endpoints[0].address",
        "STATIC",
    );
    error(
        "ServiceEntry",
        "{hosts: [a.b], ports: [{number: 1, name: a}, {number: 1, name: b}]}",
        "spec.ports[1].number",
        "twice",
    );
    error(
        "ServiceEntry",
        "{hosts: [a.b], ports: [{number: 443, name: tls, protocol: TLS}], resolution: DNS}",
        "",
        "",
    );
    error("WorkloadEntry", "{}", "spec.address", "needed");
    error("WorkloadGroup", "{}", "spec.template", "template");
    error(
        "Sidecar",
        "{egress: [{hosts: [a]}]}",
        "spec.egress[0].hosts[0]",
        "no namespace",
    );
    error(
        "Sidecar",
        "{egress: [{hosts: ['./*', istio-system/*]}]}",
        "",
        "",
    );
    error(
        "EnvoyFilter",
        "{configPatches: [{applyTo: CLUSTER, patch: {operation: MERGE}}]}",
        "spec.configPatches[0].patch.value",
        "value",
    );
    error(
        "ProxyConfig",
        "{concurrency: -1}",
        "spec.concurrency",
        "negative",
    );
    error(
        "AuthorizationPolicy",
        "{action: DENY}",
        "spec.rules",
        "refuses nothing",
    );
    error("AuthorizationPolicy", "{}", "", "");
    error(
        "AuthorizationPolicy",
        "{rules: [{from: [{source: {ipBlocks: [x]}}]}]}",
        "spec.rules[0].from[0].source.ipBlocks[0]",
        "IP address",
    );
    error(
        "AuthorizationPolicy",
        "{rules: [{when: [{key: nope, values: [a]}]}]}",
        "spec.rules[0].when[0].key",
        "unknown",
    );
    error(
        "AuthorizationPolicy",
        "{selector: {matchLabels: {a: b}}, targetRefs: [{kind: Service, name: a}]}",
        "spec",
        "only one of",
    );
    error(
        "PeerAuthentication",
        "{portLevelMtls: {80: {mode: STRICT}}}",
        "spec.portLevelMtls",
        "selector",
    );
    error(
        "RequestAuthentication",
        "{jwtRules: [{jwksUri: 'ftp://a'}]}",
        "spec.jwtRules[0].jwksUri",
        "https",
    );
    error(
        "Telemetry",
        "{tracing: [{randomSamplingPercentage: 101}]}",
        "spec.tracing[0].randomSamplingPercentage",
        "100",
    );
    error("WasmPlugin", "{url: 's3://a'}", "spec.url", "scheme");
    error("TrafficExtension", "{}", "spec", "exactly one");
}

#[test]
fn conditions_name_headers_that_can_be() {
    let tried = |name: &str, field: &str, words: &str| {
        let spec =
            format!("{{rules: [{{when: [{{key: 'request.headers[{name}]', values: [a]}}]}}]}}");
        table(
            "AuthorizationPolicy",
            Severity::Error,
            &[(&spec, field, words)],
        );
    };
    for name in ["foo bar", "", "é", ":foo", "a]["] {
        tried(
            name,
            "spec.rules[0].when[0].key",
            "not the name of a header",
        );
    }
    for name in ["x-user", "X_User~1", ":path", ":Authority", "host"] {
        tried(name, "", "");
    }
}

#[test]
fn metadata_is_checked_too() {
    let raw = serde_json::json!({
        "apiVersion": "networking.istio.io/v1", "kind": "Sidecar", "spec": { "egress": [{ "hosts": ["./*"] }] },
        "metadata": { "name": "A_b", "annotations": { "internal.istio.io/parents": "x", "istio.io/dry-run": "true" } },
    });
    let fields: Vec<_> = validate(&parse(&raw).expect("parsed"))
        .into_iter()
        .map(|finding| finding.field)
        .collect();
    assert_eq!(
        fields,
        [
            "metadata.name",
            "metadata.annotations[internal.istio.io/parents]",
            "metadata.annotations[istio.io/dry-run]"
        ]
    );
}
