//! Kinds that say who may do what.

use super::{ERROR, WARNING, long, rows};

#[test]
fn authorization_policies() {
    let rule = |rule: &str| format!("{{rules: [{{{rule}}}]}}");
    let source = |text: &str| rule(&format!("from: [{{source: {{{text}}}}}]"));
    let operation = |text: &str| rule(&format!("to: [{{operation: {{{text}}}}}]"));
    let when =
        |key: &str, values: &str| rule(&format!("when: [{{key: '{key}', values: [{values}]}}]"));
    let custom =
        |rule: &str| format!("{{action: CUSTOM, provider: {{name: a}}, rules: [{{{rule}}}]}}");
    const KEY: &str = "spec.rules[0].when[0].key";
    const PATH: &str = "spec.rules[0].to[0].operation.paths[0]";
    let at = |field: &str| format!("spec.rules[0].from[0].source.{field}");
    rows(
        "AuthorizationPolicy",
        ERROR,
        &[
            (
                "{targetRef: {kind: Pod, name: a}}".into(),
                "spec.targetRef.kind",
                "a target is",
            ),
            (
                "{targetRefs: [{kind: Service, name: ''}]}".into(),
                "spec.targetRefs[0].name",
                "empty",
            ),
            (
                "{targetRefs: [{kind: Service, name: a, namespace: b}]}".into(),
                "spec.targetRefs[0].namespace",
                "own namespace",
            ),
            (
                "{targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: a}]}".into(),
                "",
                "",
            ),
            (
                "{action: CUSTOM, provider: {name: a}}".into(),
                "spec.rules",
                "needs rules",
            ),
            (
                "{action: CUSTOM, rules: [{}]}".into(),
                "spec.provider.name",
                "needs the name",
            ),
            (
                "{provider: {name: a}}".into(),
                "spec.provider",
                "CUSTOM only",
            ),
            (
                custom("from: [{source: {principals: [a]}}]"),
                &at("principals"),
                "as in Istio",
            ),
            (
                custom("from: [{source: {notNamespaces: [a]}}]"),
                &at("notNamespaces"),
                "as in Istio",
            ),
            (
                custom("from: [{source: {requestPrincipals: [a]}}]"),
                &at("requestPrincipals"),
                "as in Istio",
            ),
            (custom("from: [{source: {ipBlocks: [10.0.0.0/8]}}]"), "", ""),
            (
                custom("when: [{key: source.principal, values: [a]}]"),
                KEY,
                "as in Istio",
            ),
            (
                custom("when: [{key: 'request.auth.claims[a]', values: [a]}]"),
                KEY,
                "as in Istio",
            ),
            (
                custom("when: [{key: 'request.headers[a]', values: [a]}]"),
                "",
                "",
            ),
            (
                rule("from: [{}]"),
                "spec.rules[0].from[0].source",
                "at least one field",
            ),
            (source(""), "spec.rules[0].from[0].source", "at least one"),
            (
                rule("to: [{}]"),
                "spec.rules[0].to[0].operation",
                "at least one field",
            ),
            (
                operation(""),
                "spec.rules[0].to[0].operation",
                "at least one",
            ),
            (
                operation("methods: ['']"),
                "spec.rules[0].to[0].operation.methods[0]",
                "empty",
            ),
            (
                source("serviceAccounts: [a], namespaces: [b]"),
                &at("serviceAccounts"),
                "mixed",
            ),
            (
                source(&format!("serviceAccounts: [{}]", long("a", 321))),
                &at("serviceAccounts[0]"),
                "at most 320",
            ),
            (
                source("serviceAccounts: [a/b/c]"),
                &at("serviceAccounts[0]"),
                "NAMESPACE/NAME",
            ),
            (
                source("remoteIpBlocks: [10.0.0.0/33]"),
                &at("remoteIpBlocks[0]"),
                "block",
            ),
            (
                operation("ports: ['65536']"),
                "spec.rules[0].to[0].operation.ports[0]",
                "0 to 65535",
            ),
            (
                operation("notPorts: [http]"),
                "spec.rules[0].to[0].operation.notPorts[0]",
                "0 to 65535",
            ),
            (operation("paths: ['/a/{*}/b/{**}']"), "", ""),
            (operation("paths: ['/a/{*}/b/{**}/c']"), "", ""),
            (operation("paths: ['/{**}/{*}']"), PATH, "nothing variable"),
            (operation("paths: ['/a{*}']"), PATH, "as a whole"),
            (operation("paths: ['/a/{b}']"), PATH, "as a whole"),
            (operation("paths: ['/{*}/b*']"), PATH, "no other wildcards"),
            (operation("paths: ['/a*']"), "", ""),
            (
                when("source.ip", "x"),
                "spec.rules[0].when[0].values[0]",
                "IP address",
            ),
            (
                when("destination.port", "http"),
                "spec.rules[0].when[0].values[0]",
                "0 to 65535",
            ),
            (
                when("source.namespace", "''"),
                "spec.rules[0].when[0].values[0]",
                "empty",
            ),
            (
                when("source.namespace", ""),
                "spec.rules[0].when[0].values",
                "needed",
            ),
            (when("request.auth.claims", "a"), KEY, "unknown"),
            (when("request.auth.claims[]", "a"), KEY, "unknown"),
            (when("request.auth.claims[a][b]", "a"), "", ""),
            (when("experimental.envoy.filters.a.b[c]", "a"), "", ""),
            (when("experimental.envoy.filters.a", "a"), KEY, "unknown"),
        ],
    );
    let deny = |rule: &str| format!("{{action: DENY, rules: [{{{rule}}}]}}");
    rows(
        "AuthorizationPolicy",
        WARNING,
        &[
            (
                deny("to: [{operation: {methods: [GET]}}]"),
                "spec.rules[0]",
                "every connection",
            ),
            (
                deny("from: [{source: {notRequestPrincipals: ['*']}}]"),
                "spec.rules[0]",
                "every connection",
            ),
            (deny("from: [{source: {principals: [a]}}]"), "", ""),
            (
                deny("to: [{operation: {methods: [GET], ports: ['80']}}]"),
                "",
                "",
            ),
            (deny(""), "", ""),
            (operation("methods: [GET]"), "", ""),
        ],
    );
}

#[test]
fn authentication() {
    rows(
        "PeerAuthentication",
        ERROR,
        &[
            (
                "{selector: {matchLabels: {a: b}}, portLevelMtls: {0: {mode: STRICT}}}".into(),
                "spec.portLevelMtls[0]",
                "1 to 65535",
            ),
            (
                "{selector: {matchLabels: {a: b}}, portLevelMtls: {65536: {mode: STRICT}}}".into(),
                "spec.portLevelMtls[65536]",
                "1 to 65535",
            ),
            (
                "{selector: {matchLabels: {a: b}}, portLevelMtls: {65535: {mode: STRICT}}}".into(),
                "",
                "",
            ),
        ],
    );
    let jwt = |rule: &str| format!("{{jwtRules: [{{issuer: a, {rule}}}]}}");
    let at = |field: &str| format!("spec.jwtRules[0].{field}");
    rows(
        "RequestAuthentication",
        ERROR,
        &[
            (
                "{jwtRules: [{jwks: '{\"keys\":[]}'}]}".into(),
                "spec.jwtRules[0].issuer",
                "needed",
            ),
            ("{jwtRules: [{jwksUri: 'https://a.b/c'}]}".into(), "", ""),
            (jwt("jwksUri: 'https://'"), &at("jwksUri"), "https://HOST"),
            (jwt("jwksUri: 'https:///a'"), &at("jwksUri"), "https://HOST"),
            (
                jwt("jwksUri: 'http://a:b/'"),
                &at("jwksUri"),
                "https://HOST",
            ),
            (jwt("jwksUri: 'http://[::1]/'"), "", ""),
            (
                jwt(&format!("jwksUri: 'http://{}'", long("a", 2048))),
                &at("jwksUri"),
                "2048",
            ),
            (
                jwt("jwksUri: 'http://a', jwks: '{\"keys\":[]}'"),
                &at("jwks"),
                "exclude",
            ),
            (jwt("jwks: '{}'"), &at("jwks"), "JSON Web Key Set"),
            (jwt("jwks: nonsense"), &at("jwks"), "JSON Web Key Set"),
            (jwt("audiences: ['']"), &at("audiences[0]"), "empty"),
            (
                jwt("fromHeaders: [{name: ''}]"),
                &at("fromHeaders[0].name"),
                "not the name",
            ),
            (jwt("fromParams: ['']"), &at("fromParams[0]"), "empty"),
            (jwt("fromCookies: ['']"), &at("fromCookies[0]"), "empty"),
            (
                jwt("outputClaimToHeaders: [{header: 'a b', claim: c}]"),
                &at("outputClaimToHeaders[0].header"),
                "not the name",
            ),
            (
                jwt("outputClaimToHeaders: [{header: ':path', claim: c}]"),
                &at("outputClaimToHeaders[0].header"),
                "not the name",
            ),
            (
                jwt("outputClaimToHeaders: [{header: a, claim: ''}]"),
                &at("outputClaimToHeaders[0].claim"),
                "empty",
            ),
            (
                jwt("outputPayloadToHeader: 'a b'"),
                &at("outputPayloadToHeader"),
                "not the name",
            ),
            (jwt("timeout: 1us"), &at("timeout"), "1ms"),
        ],
    );
    rows(
        "RequestAuthentication",
        WARNING,
        &[(
            jwt("jwks: '{\"keys\":[{\"d\":\"x\"}]}'"),
            &at("jwks"),
            "private key",
        )],
    );
}
