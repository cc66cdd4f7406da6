//! The services of the samples about who may do what.

use std::collections::HashMap;

use envoy_types::pb::envoy::service::auth::v3::attribute_context::{HttpRequest, Peer, Request};
use envoy_types::pb::envoy::service::auth::v3::check_response::HttpResponse;
use envoy_types::pb::envoy::service::auth::v3::{AttributeContext, CheckRequest, CheckResponse};
use mesh_samples::{ext_authz, jwt_server};

fn ask(header: Option<&str>, principal: &str) -> CheckResponse {
    let header = header.map(|value| ("x-ext-authz".to_owned(), value.to_owned()));
    let question = CheckRequest {
        attributes: Some(AttributeContext {
            source: Some(Peer {
                principal: principal.to_owned(),
                ..Peer::default()
            }),
            request: Some(Request {
                http: Some(HttpRequest {
                    headers: HashMap::from_iter(header),
                    ..HttpRequest::default()
                }),
                ..Request::default()
            }),
            ..AttributeContext::default()
        }),
    };
    ext_authz::judge(&question, "a")
}

#[test]
fn a_header_or_a_service_account_lets_pass() {
    let code = |answer: CheckResponse| answer.status.unwrap().code;
    assert_eq!(code(ask(Some("allow"), "")), 0);
    assert_eq!(
        code(ask(Some("deny"), "spiffe://td/ns/x/sa/a")),
        7,
        "the header counts more"
    );
    assert_eq!(code(ask(None, "spiffe://td/ns/x/sa/a")), 0);
    assert_eq!(code(ask(None, "spiffe://td/ns/x/sa/ba")), 7);
    let refused = ask(None, "");
    let Some(HttpResponse::DeniedResponse(denied)) = refused.http_response else {
        panic!("{refused:?}");
    };
    assert_eq!(denied.status.unwrap().code, 403);
    assert!(
        denied
            .body
            .starts_with("denied by ext_authz for not found header")
    );
}

#[test]
fn flags_are_those_of_the_field() {
    let args = |list: &[&str]| list.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>();
    let settings = ext_authz::Settings::parse(&args(&["-http", "1", "--grpc=2"])).unwrap();
    assert_eq!(
        (settings.http, settings.grpc, &*settings.service_account),
        (1, 2, "a")
    );
    let settings = jwt_server::Settings::parse(&args(&["-cert", "c", "-key", "k"])).unwrap();
    assert_eq!((settings.http, settings.https), (8000, 8443));
    assert_eq!(settings.files, Some(("c".to_owned(), "k".to_owned())));
    let error = jwt_server::Settings::parse(&args(&["-port", "1"])).unwrap_err();
    assert!(error.to_string().contains("no flag -port"), "{error}");
    assert!(ext_authz::Settings::parse(&args(&["http"])).is_err());
    assert!(ext_authz::Settings::parse(&args(&["-http"])).is_err());
}

#[test]
fn the_keys_are_a_key_set() {
    let set: serde_json::Value = serde_json::from_str(jwt_server::KEYS).unwrap();
    let keys = set["keys"].as_array().unwrap();
    assert_eq!(keys.len(), 2);
    assert!(
        keys.iter()
            .all(|key| key["kty"] == "RSA" && key["kid"].is_string())
    );
}
