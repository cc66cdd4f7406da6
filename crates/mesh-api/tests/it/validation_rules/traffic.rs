//! Kinds that lead traffic.

use mesh_api::parse;
use serde_json::json;

use super::{ERROR, WARNING, http, long, rows};

#[test]
fn gateways() {
    let server = |port: &str, rest: &str| {
        format!("{{servers: [{{port: {{number: 443, name: a, {port}}}, hosts: [a.b], {rest}}}]}}")
    };
    let https = |tls: &str| server("protocol: HTTPS", &format!("tls: {{{tls}}}"));
    rows(
        "Gateway",
        ERROR,
        &[
            ("{servers: [{port: {number: 80, name: a, protocol: HTTP}, hosts: []}]}".into(), "spec.servers[0].hosts", "at least one"),
            ("{servers: [{port: {number: 80, name: a, protocol: HTTP}, hosts: ['a.*.b']}]}".into(), "spec.servers[0].hosts[0]", "wildcard inside"),
            ("{servers: [{port: {number: 80, name: a, protocol: HTTP}, hosts: ['A_b/a.b']}]}".into(), "spec.servers[0].hosts[0]", "nor a namespace"),
            ("{servers: [{port: {number: 80, name: a, protocol: HTTP}, bind: 'unix:///a', hosts: [a.b]}]}".into(), "spec.servers[0].port.number", "write 0"),
            ("{servers: [{port: {number: 0, name: a, protocol: HTTP}, bind: 'unix:///a', hosts: [a.b]}]}".into(), "", ""),
            (server("protocol: HTTP", "tls: {httpsRedirect: true, credentialNames: [a]}"), "spec.servers[0].tls.mode", "only have httpsRedirect"),
            (server("protocol: HTTP", "tls: {caCertificates: a}"), "spec.servers[0].tls.mode", "only have httpsRedirect"),
            (server("protocol: TCP", "tls: {mode: SIMPLE, credentialName: a}"), "spec.servers[0].tls", "has no TLS"),
            (server("protocol: TLS", "tls: {mode: PASSTHROUGH, httpsRedirect: true}"), "spec.servers[0].tls.httpsRedirect", "only a port with protocol HTTP"),
            (server("protocol: HTTP, targetPort: 1", ""), "spec.servers[0].port.targetPort", "leave it out"),
            (server("protocol: HTTP", "defaultEndpoint: '127.0.0.1:1'"), "spec.servers[0].defaultEndpoint", "Sidecar"),
            (https("mode: ISTIO_MUTUAL, caCrl: a"), "spec.servers[0].tls.mode", "mesh's certificates"),
            (https("mode: ISTIO_MUTUAL"), "", ""),
            (https("mode: SIMPLE, serverCertificate: a"), "spec.servers[0].tls.credentialName", "certificate is needed"),
            (https("mode: OPTIONAL_MUTUAL, serverCertificate: a, privateKey: b"), "spec.servers[0].tls.caCertificates", "roots"),
            (https("mode: MUTUAL, credentialName: a"), "", ""),
            (https("mode: MUTUAL, credentialName: a, caCrl: b"), "spec.servers[0].tls.caCrl", "into the secret"),
            (https("mode: SIMPLE, serverCertificate: a, privateKey: b, caCrl: c"), "spec.servers[0].tls.caCrl", "no client certificates"),
            (https("mode: SIMPLE, credentialNames: [a, b, c]"), "spec.servers[0].tls.credentialNames", "at most two"),
            (https("mode: SIMPLE, tlsCertificates: [{serverCertificate: a}]"), "spec.servers[0].tls.tlsCertificates[0].serverCertificate", "certificate and key"),
            (https("mode: SIMPLE, credentialName: a, credentialNames: [b]"), "spec.servers[0].tls.credentialName", "exclude"),
        ],
    );
    rows(
        "Gateway",
        WARNING,
        &[
            (
                https("mode: PASSTHROUGH, credentialName: a"),
                "spec.servers[0].tls",
                "no effect",
            ),
            (
                https("mode: SIMPLE, credentialName: a, minProtocolVersion: TLSV1_1"),
                "spec.servers[0].tls.minProtocolVersion",
                "below 1.2",
            ),
            (
                https("mode: SIMPLE, credentialName: a, ecdhCurves: [P-256, P-256]"),
                "spec.servers[0].tls.ecdhCurves[1]",
                "twice",
            ),
            (
                https("mode: SIMPLE, credentialName: a, ecdhCurves: [P-1]"),
                "spec.servers[0].tls.ecdhCurves[0]",
                "unknown",
            ),
        ],
    );
}

#[test]
fn virtual_services() {
    let to = "route: [{destination: {host: a}}]";
    let with = |rest: &str| http(&format!("{{{to}, {rest}}}"));
    let body = |size: usize| {
        http(&format!(
            "{{directResponse: {{status: 200, body: {{string: {}}}}}}}",
            long("a", size)
        ))
    };
    let claim = |name: &str| {
        format!(
            "{{hosts: [a.b], gateways: [g], http: [{{match: [{{headers: {{'{name}': {{exact: x}}}}}}], {to}}}]}}"
        )
    };
    let claims = |name: &str| claim(&format!("@request.auth.claims{name}"));
    let field = |name: &str| format!("spec.http[0].match[0].headers[@request.auth.claims{name}]");
    rows(
        "VirtualService",
        ERROR,
        &[
            ("{http: [], tls: [{match: [{sniHosts: [a]}], route: [{destination: {host: a}}]}]}".into(), "spec.tls", "delegate"),
            (format!("{{tcp: [{{{to}}}]}}"), "spec.tcp", "delegate"),
            (http("{redirect: {uri: /a}, rewrite: {uri: /b}}"), "spec.http[0].rewrite", "nothing is sent on"),
            (http("{directResponse: {status: 200}, fault: {abort: {httpStatus: 500}}}"), "spec.http[0].fault", "nothing is sent on"),
            (http("{redirect: {uri: /a}, directResponse: {status: 200}}"), "spec.http[0]", "exclude"),
            (http("{route: [{destination: {host: a}, weight: 0}, {destination: {host: b}, weight: 0}]}"), "spec.http[0].route", "above 0"),
            (with("fault: {abort: {httpStatus: 199}}"), "spec.http[0].fault.abort.httpStatus", "200 to 600"),
            (with("fault: {abort: {http2Error: x}}"), "spec.http[0].fault.abort.http2Error", "never implemented"),
            (with("fault: {abort: {httpStatus: 500, percentage: {value: 0.00001}}}"), "spec.http[0].fault.abort.percentage.value", "0.0001"),
            (with("mirror: {host: b}, mirrorPercentage: {value: -1}"), "spec.http[0].mirrorPercentage.value", "0.0001"),
            (with("mirror: {host: b}, mirrorPercent: 101"), "spec.http[0].mirrorPercent", "0 to 100"),
            (http("{redirect: {uri: /a, prefixRewrite: /b}}"), "spec.http[0].redirect.prefixRewrite", "exclude"),
            (http("{redirect: {prefixRewrite: /b}}"), "", ""),
            (http("{redirect: {authority: b, port: 1, derivePort: FROM_REQUEST_PORT}}"), "spec.http[0].redirect.port", "exclude"),
            (body((1 << 20) + 1), "spec.http[0].directResponse.body", "at most 1048576"),
            (body(100 * 1024), "", ""),
            (with(&format!("rewrite: {{uriRegexRewrite: {{match: {}, rewrite: b}}}}", long("a", 1025))), "spec.http[0].rewrite.uriRegexRewrite.match", "at most 1024"),
            (with("rewrite: {}"), "spec.http[0].rewrite", "needed"),
            (with("retries: {attempts: 0, retryOn: 5xx}"), "spec.http[0].retries.attempts", "turns retries off"),
            (with("retries: {attempts: 0, backoff: 1s}"), "spec.http[0].retries.attempts", "turns retries off"),
            (with("headers: {request: {set: {Host: a, ':authority': b}}}"), "spec.http[0].headers.request.set", "are the same"),
            (with("headers: {request: {add: {'a b': c}}}"), "spec.http[0].headers.request.add[a b]", "not a header name"),
            (with("headers: {request: {remove: [':path']}}"), "spec.http[0].headers.request.remove[0]", "removed"),
            (with("corsPolicy: {allowOrigins: [{}]}"), "spec.http[0].corsPolicy.allowOrigins[0]", "empty"),
            (with("corsPolicy: {exposeHeaders: ['a b']}"), "spec.http[0].corsPolicy.exposeHeaders[0]", "not a header name"),
            (claims(".groups"), "", ""),
            (claims("[a.b][c]"), "", ""),
            (claims(""), &field(""), "names no claim"),
            (claims("."), &field("."), "names no claim"),
            (claims("[a][]"), &field("[a][]"), "names no claim"),
            (claims("x"), &field("x"), "names no claim"),
            (claims(".a").replace("gateways: [g]", "gateways: [g, mesh]"), &field(".a"), "gateways only"),
            ("{hosts: [a.b], tls: [{match: [{sniHosts: []}], route: [{destination: {host: a}}]}]}".into(), "spec.tls[0].match[0].sniHosts", "needed"),
        ],
    );
    rows(
        "VirtualService",
        WARNING,
        &[
            (body(100 * 1024 + 1), "spec.http[0].directResponse.body", "should come from a server"),
            ("{hosts: ['1.2.3.4'], tls: [{match: [{sniHosts: ['1.2.3.4']}], route: [{destination: {host: a}}]}]}".into(), "spec.tls[0].match[0].sniHosts[0]", "address"),
        ],
    );
}

#[test]
fn destination_rules() {
    let policy = |text: &str| format!("{{host: a, trafficPolicy: {{{text}}}}}");
    let balancer = |text: &str| policy(&format!("loadBalancer: {{{text}}}"));
    let locality = |text: &str| balancer(&format!("localityLbSetting: {{{text}}}"));
    let hash = |text: &str| balancer(&format!("consistentHash: {{useSourceIp: true, {text}}}"));
    let pool = |text: &str| policy(&format!("connectionPool: {{{text}}}"));
    const SETTING: &str = "spec.trafficPolicy.loadBalancer.localityLbSetting";
    let at = |rest: &str| format!("{SETTING}.{rest}");
    const HASH: &str = "spec.trafficPolicy.loadBalancer.consistentHash";
    const POOL: &str = "spec.trafficPolicy.connectionPool";
    rows(
        "DestinationRule",
        ERROR,
        &[
            (
                policy("tunnel: {targetHost: a, targetPort: 1}, proxyProtocol: {version: V2}"),
                "spec.trafficPolicy.proxyProtocol",
                "exclude",
            ),
            (
                policy("tunnel: {targetHost: 'a b', targetPort: 0}"),
                "spec.trafficPolicy.tunnel.targetHost",
                "needed",
            ),
            (
                policy("tunnel: {targetHost: a, targetPort: 0}"),
                "spec.trafficPolicy.tunnel.targetPort",
                "1 to 65535",
            ),
            (
                policy("retryBudget: {percent: 101}"),
                "spec.trafficPolicy.retryBudget.percent",
                "0 to 100",
            ),
            (
                policy("outlierDetection: {minHealthPercent: -1}"),
                "spec.trafficPolicy.outlierDetection.minHealthPercent",
                "0 to 100",
            ),
            (
                policy("outlierDetection: {outlierDetectionHttpErrorCodes: [99]}"),
                "spec.trafficPolicy.outlierDetection.outlierDetectionHttpErrorCodes",
                "100 to 599",
            ),
            (
                policy("outlierDetection: {interval: 1500us}"),
                "spec.trafficPolicy.outlierDetection.interval",
                "whole milliseconds",
            ),
            (
                pool("http: {http2KeepAlive: {interval: 1s}}"),
                &format!("{POOL}.http.http2KeepAlive.timeout"),
                "needed",
            ),
            (
                pool("http: {http2KeepAlive: {timeout: 1s}}"),
                &format!("{POOL}.http.http2KeepAlive.interval"),
                "needed",
            ),
            (
                pool("http: {http2KeepAlive: {interval: 1us, timeout: 1s}}"),
                &format!("{POOL}.http.http2KeepAlive.interval"),
                "1ms",
            ),
            (
                pool("tcp: {maxConnections: -1}"),
                &format!("{POOL}.tcp.maxConnections"),
                "negative",
            ),
            (pool("tcp: {idleTimeout: 0s}"), "", ""),
            (
                pool("tcp: {idleTimeout: 1us}"),
                &format!("{POOL}.tcp.idleTimeout"),
                "1ms",
            ),
            (
                hash("maglev: {tableSize: 0}"),
                &format!("{HASH}.maglev.tableSize"),
                "prime",
            ),
            (
                hash("maglev: {tableSize: 5000011}"),
                &format!("{HASH}.maglev.tableSize"),
                "below 5000011",
            ),
            (hash("maglev: {tableSize: 65537}"), "", ""),
            (
                hash("minimumRingSize: 1, ringHash: {}"),
                &format!("{HASH}.minimumRingSize"),
                "exclude",
            ),
            (
                hash("maglev: {tableSize: 3}, ringHash: {}"),
                &format!("{HASH}.maglev"),
                "exclude",
            ),
            (hash("httpHeaderName: a"), HASH, "exactly one"),
            (
                balancer("consistentHash: {httpCookie: {ttl: 0s}}"),
                &format!("{HASH}.httpCookie.name"),
                "needs a name",
            ),
            (
                balancer("localityLbSetting: {}, zoneAwareLbSetting: {}"),
                "spec.trafficPolicy.loadBalancer.zoneAwareLbSetting",
                "exclude",
            ),
            (
                balancer("warmup: {}"),
                "spec.trafficPolicy.loadBalancer.warmup.duration",
                "needed",
            ),
            (
                balancer("warmup: {duration: 1s, aggression: 0.5}"),
                "spec.trafficPolicy.loadBalancer.warmup.aggression",
                "at least 1",
            ),
            (
                locality("distribute: [{from: a, to: {b: 100}}], failover: [{from: a, to: b}]"),
                &at("failover"),
                "exclude",
            ),
            (
                locality("distribute: [{from: a/*, to: {'b': 100}}, {from: a/b/*, to: {c: 100}}]"),
                &at("distribute[1].from"),
                "overlaps",
            ),
            (
                locality("distribute: [{from: a/b, to: {'b': 100}}, {from: a/c, to: {c: 100}}]"),
                "",
                "",
            ),
            (
                locality("distribute: [{from: a, to: {'b/*': 50, b/c: 50}}]"),
                &at("distribute[0].to[b/c]"),
                "overlaps",
            ),
            (
                locality("distribute: [{from: '*/a', to: {b: 100}}]"),
                &at("distribute[0].from"),
                "last part",
            ),
            (
                locality("distribute: [{from: a, to: {b: 101}}]"),
                &at("distribute[0].to"),
                "add up to 100",
            ),
            (
                locality("failover: [{from: a/b, to: c}]"),
                &at("failover[0].from"),
                "without zone",
            ),
            (
                locality("failover: [{from: a, to: '*'}]"),
                &at("failover[0].to"),
                "wildcard",
            ),
            (
                policy("tls: {mode: MUTUAL, credentialName: a, caCertificates: b}"),
                "spec.trafficPolicy.tls.credentialName",
                "exclude",
            ),
            (
                policy("tls: {mode: SIMPLE, insecureSkipVerify: true, caCertificates: b}"),
                "spec.trafficPolicy.tls.caCertificates",
                "no meaning",
            ),
            (
                policy("tls: {mode: SIMPLE, credentialName: 'configmap://a/b'}"),
                "spec.trafficPolicy.tls.credentialName",
                "Secret",
            ),
        ],
    );
    rows(
        "DestinationRule",
        WARNING,
        &[
            (
                locality("failover: [{from: a, to: b}]"),
                "spec.trafficPolicy.outlierDetection",
                "failover needs",
            ),
            (
                balancer("warmupDurationSecs: 1s"),
                "spec.trafficPolicy.loadBalancer.warmupDurationSecs",
                "old form",
            ),
            (
                hash("minimumRingSize: 1"),
                &format!("{HASH}.minimumRingSize"),
                "old form",
            ),
        ],
    );
}

#[test]
fn service_entries_and_workloads() {
    let entry = |rest: &str| format!("{{hosts: [a.b], {rest}}}");
    let http = "ports: [{number: 80, name: http, protocol: HTTP}]";
    let at = |resolution: &str, address: &str| {
        entry(&format!(
            "resolution: {resolution}, {http}, endpoints: [{{address: '{address}'}}]"
        ))
    };
    rows(
        "ServiceEntry",
        ERROR,
        &[
            ("{hosts: []}".into(), "spec.hosts", "at least one"),
            (entry("addresses: [10.0.0.0/8], resolution: DNS"), "spec.addresses[0]", "NONE or STATIC"),
            (entry("addresses: [x]"), "spec.addresses[0]", "IP address"),
            (entry("ports: [{number: 1, name: a}, {number: 2, name: a}]"), "spec.ports[1].name", "twice"),
            (entry("ports: [{number: 1, name: a, protocol: FTP}]"), "spec.ports[0].protocol", "FTP"),
            (entry("ports: [{number: 0, name: a}]"), "spec.ports[0].number", "1 to 65535"),
            (entry("resolution: NONE, endpoints: [{address: 1.2.3.4}]"), "spec.endpoints", "takes no endpoints"),
            (entry("resolution: STATIC, workloadSelector: {labels: {a: b}}, endpoints: [{address: 1.2.3.4}]"), "spec.endpoints", "exclude"),
            (entry("resolution: STATIC, endpoints: [{address: 'unix:///a'}]"), "spec.endpoints[0].address", "exactly one"),
            (at("STATIC", "unix:///a"), "", ""),
            (at("DNS", "unix:///a"), "spec.endpoints[0].address", "STATIC"),
            (at("DNS", "a_b c"), "spec.endpoints[0].address", "not an IP address"),
            (at("DNS", "c.d"), "", ""),
            (entry(&format!("resolution: STATIC, {http}, endpoints: [{{address: 1.2.3.4, ports: {{other: 1}}}}]")), "spec.endpoints[0].ports[other]", "no port"),
            ("{hosts: ['*.b'], resolution: DNS}".into(), "spec.endpoints", "can't be resolved"),
            (entry("resolution: DNS_ROUND_ROBIN, endpoints: [{address: c.d}, {address: e.f}]"), "spec.endpoints", "one endpoint"),
            (entry(&format!("resolution: DYNAMIC_DNS, {http}")), "spec.hosts", "wildcard"),
            (format!("{{hosts: ['*.b'], resolution: DYNAMIC_DNS, {http}}}"), "", ""),
            (format!("{{hosts: ['*.b'], addresses: [1.2.3.4], resolution: DYNAMIC_DNS, {http}}}"), "spec.addresses", "no addresses"),
            ("{hosts: ['*.b'], resolution: DYNAMIC_DNS, ports: [{number: 1, name: a, protocol: TCP}]}".into(), "spec.ports[0].protocol", "DYNAMIC_DNS"),
            ("{hosts: [a.b, c.d], resolution: DNS, ports: [{number: 1, name: a, protocol: TCP}]}".into(), "spec.ports[0].protocol", "several hosts"),
            ("{hosts: [a.b, c.d], ports: [{number: 1, name: a, protocol: TCP}]}".into(), "", ""),
        ],
    );
    rows(
        "WorkloadEntry",
        ERROR,
        &[
            ("{network: a}".into(), "", ""),
            (
                "{address: 'unix://a'}".into(),
                "spec.address",
                "unix:///path",
            ),
            (
                "{address: 'unix:///a', ports: {a: 1}}".into(),
                "spec.ports",
                "no ports",
            ),
            (
                "{address: 1.2.3.4, ports: {a: 0}}".into(),
                "spec.ports[a]",
                "1 to 65535",
            ),
        ],
    );
    let group = |probe: &str| format!("{{template: {{}}, probe: {{{probe}}}}}");
    rows(
        "WorkloadGroup",
        ERROR,
        &[
            (group(""), "spec.probe", "exactly one"),
            (
                group("tcpSocket: {port: 1}, exec: {command: [a]}"),
                "spec.probe",
                "exactly one",
            ),
            (
                group("tcpSocket: {port: 0}"),
                "spec.probe.tcpSocket.port",
                "1 to 65535",
            ),
            (
                group("exec: {command: []}"),
                "spec.probe.exec.command",
                "needed",
            ),
            (
                group("httpGet: {port: 1, scheme: FTP}"),
                "spec.probe.httpGet.scheme",
                "HTTPS",
            ),
            (
                group("tcpSocket: {port: 1}, periodSeconds: -1"),
                "spec.probe.periodSeconds",
                "negative",
            ),
        ],
    );
}

#[test]
fn sidecars() {
    let ingress = |rest: &str| {
        format!("{{ingress: [{{port: {{number: 80, name: a, protocol: HTTP}}, {rest}}}]}}")
    };
    let tls = |rest: &str| {
        format!(
            "{{ingress: [{{port: {{number: 443, name: a, protocol: HTTPS}}, tls: {{{rest}}}}}]}}"
        )
    };
    let egress = |one: &str, two: &str| {
        format!("{{egress: [{{{one}, hosts: ['./*']}}, {{{two}, hosts: ['./*']}}]}}")
    };
    let port = "port: {number: 80, name: a, protocol: HTTP}";
    rows(
        "Sidecar",
        ERROR,
        &[
            ("{}".into(), "spec", "needs ingress"),
            ("{egress: [{hosts: []}]}".into(), "spec.egress[0].hosts", "at least one"),
            ("{egress: [{hosts: ['A_/b']}]}".into(), "spec.egress[0].hosts[0]", "nor a namespace"),
            ("{egress: [{hosts: ['./*']}, {hosts: ['./*']}]}".into(), "spec.egress[0].port", "only the last"),
            (egress(port, port), "spec.egress[1].port.number", "twice"),
            (egress("port: {number: 0, protocol: TCP}, bind: 'unix:///a'", "port: {number: 0, protocol: TCP}, bind: 'unix:///a'"), "spec.egress[1].bind", "twice"),
            (egress(port, "port: {number: 0, protocol: TCP}"), "spec.egress[1].bind", "unix sockets"),
            (egress(port, "port: {number: 81, protocol: X}"), "spec.egress[1].port.protocol", "unknown"),
            (format!("{{ingress: [{{{port}}}, {{{port}}}]}}"), "spec.ingress[1].port.number", "twice"),
            (ingress("defaultEndpoint: '10.0.0.1:80'"), "spec.ingress[0].defaultEndpoint", "127.0.0.1"),
            (ingress("defaultEndpoint: '127.0.0.1:0'"), "spec.ingress[0].defaultEndpoint", "127.0.0.1"),
            (ingress("defaultEndpoint: '[::]:80'"), "", ""),
            (ingress("defaultEndpoint: 'unix:///a'"), "", ""),
            (ingress("bind: a"), "spec.ingress[0].bind", "not an IP"),
            (ingress("connectionPool: {}"), "spec.ingress[0].connectionPool", "needed"),
            (ingress("tls: {mode: SIMPLE, serverCertificate: a, privateKey: b}"), "spec.ingress[0].tls", "has no TLS"),
            (tls("mode: SIMPLE, serverCertificate: a, privateKey: b"), "", ""),
            (tls("mode: ISTIO_MUTUAL"), "spec.ingress[0].tls.mode", "outside the mesh"),
            (tls("mode: SIMPLE, credentialName: a"), "spec.ingress[0].tls.credentialName", "files"),
            ("{inboundConnectionPool: {http: {maxRetries: -1}}}".into(), "spec.inboundConnectionPool.http.maxRetries", "negative"),
            ("{outboundTrafficPolicy: {mode: REGISTRY_ONLY, egressProxy: {host: a.b, port: {number: 1}}}}".into(), "spec.outboundTrafficPolicy.egressProxy", "ALLOW_ANY only"),
            ("{outboundTrafficPolicy: {mode: ALLOW_ANY, egressProxy: {host: a.b}}}".into(), "spec.outboundTrafficPolicy.egressProxy.port.number", "65535"),
            ("{outboundTrafficPolicy: {mode: ALLOW_ANY, egressProxy: {host: a.b, port: {number: 1}}}}".into(), "", ""),
        ],
    );
    let dynamic = json!({
        "apiVersion": "networking.istio.io/v1", "kind": "Sidecar", "metadata": { "name": "a" },
        "spec": { "outboundTrafficPolicy": { "mode": "ALLOW_ANY_DYNAMIC_DNS" } },
    });
    let error = parse(&dynamic).expect_err("a mode that Istio refuses");
    assert_eq!(error.path, "spec.outboundTrafficPolicy.mode");
    rows(
        "Sidecar",
        WARNING,
        &[(
            "{egress: [{hosts: ['*/*', a/b]}]}".into(),
            "spec.egress[0].hosts",
            "everything",
        )],
    );
}
