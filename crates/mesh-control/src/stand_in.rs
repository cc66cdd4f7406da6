//! What holds in place of an object of `security.istio.io` that can't be read: what it closed would be open without it.

use mesh_api::AnyObject;
use serde_json::{Map, Value, json};

const GROUP: &str = "security.istio.io/";
/// Fields that narrow an object down; without one of them it is about more.
const SCOPE: &[&str] = &["selector", "targetRef", "targetRefs"];

/// True for objects of which the last version that could be read stays in force.
pub(crate) fn guards(api_version: &str) -> bool {
    api_version.starts_with(GROUP)
}

/// A key that has signed nothing (the same point as in `mesh-translate`, found by hashing), so that every token fails.
const NOBODYS_KEY: &str = r#"{"keys":[{"kty":"EC","crv":"P-256","alg":"ES256","kid":"none","x":"yJ963_Gz1DnhfovHyQi6zHyOjP3T8ReWjvzYoAvFRmk","y":"gikhYKQu6hmD5SlZuW-VCLG6z-UYaeszhX77g3YiLkk"}]}"#;
/// Issuer of a rule whose own can't be read.
const NOBODY: &str = "unreadable.invalid";
/// Fields of a rule that say where a token is looked for and which headers nobody else may send.
const PLACES: &[&str] = &[
    "issuer",
    "fromHeaders",
    "fromParams",
    "fromCookies",
    "outputPayloadToHeader",
    "outputClaimToHeaders",
    "presence",
];

/// An object that refuses everything that `raw` is about: all requests for an AuthorizationPolicy, plain text for a
/// PeerAuthentication, every token for a RequestAuthentication (a request without one passes, as it does with any). What can't be read of its scope is left out, so that it refuses more rather than less.
///
/// `None` where nothing would be refused in the first place (an AUDIT policy) and for all other kinds.
pub(crate) fn of(raw: &Value) -> Option<AnyObject> {
    let given = &raw["spec"];
    let mut spec = match raw["kind"].as_str()? {
        "AuthorizationPolicy" if given["action"] == "AUDIT" => return None,
        "AuthorizationPolicy" => json!({ "action": "DENY", "rules": [{}] }),
        "PeerAuthentication" => json!({ "mtls": { "mode": "STRICT" } }),
        "RequestAuthentication" => json!({ "jwtRules": no_tokens(raw) }),
        _ => return None,
    };
    for field in SCOPE {
        let readable = |value: &Value| {
            let mut narrowed = spec.clone();
            narrowed[*field] = value.clone();
            with_spec(raw, &narrowed).is_some()
        };
        let Some(value) = given.get(*field) else {
            continue;
        };
        let labels = labels_only(value);
        if let Some(value) = [Some(value), labels.as_ref()]
            .into_iter()
            .flatten()
            .find(|value| readable(value))
        {
            spec[*field] = value.clone();
        }
    }
    with_spec(raw, &spec)
}

/// Rules that look for tokens where those of `raw` do, as far as that can be read, and take none.
fn no_tokens(raw: &Value) -> Vec<Value> {
    let nothing = json!({ "issuer": NOBODY, "jwks": NOBODYS_KEY });
    let given = raw["spec"]["jwtRules"].as_array();
    let given = given.map_or(&[][..], Vec::as_slice);
    let readable = |rule: &Value| with_spec(raw, &json!({ "jwtRules": [rule] })).is_some();
    let closed = |rule: &Value| {
        let mut closed = nothing.clone();
        for field in PLACES {
            let Some(value) = rule.get(*field) else {
                continue;
            };
            let mut narrowed = closed.clone();
            narrowed[*field] = value.clone();
            if readable(&narrowed) {
                closed = narrowed;
            }
        }
        closed
    };
    match given {
        [] => vec![nothing],
        given => given.iter().map(closed).collect(),
    }
}

fn with_spec(raw: &Value, spec: &Value) -> Option<AnyObject> {
    let object = json!({
        "apiVersion": raw["apiVersion"], "kind": raw["kind"], "metadata": raw["metadata"], "spec": spec,
    });
    mesh_api::parse(&object).ok()
}

/// A selector with nothing but those labels that are text.
fn labels_only(selector: &Value) -> Option<Value> {
    let labels = selector.get("matchLabels")?.as_object()?;
    let labels: Map<String, Value> = labels
        .iter()
        .filter(|(_, value)| value.is_string())
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    Some(json!({ "matchLabels": labels }))
}
