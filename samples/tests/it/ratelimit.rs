//! The rate limit service.

use bytes::Bytes;
use envoy_types::pb::envoy::extensions::common::ratelimit::v3::RateLimitDescriptor;
use envoy_types::pb::envoy::extensions::common::ratelimit::v3::rate_limit_descriptor::{
    Entry, RateLimitOverride,
};
use envoy_types::pb::envoy::service::ratelimit::v3::rate_limit_response::Code;
use envoy_types::pb::envoy::service::ratelimit::v3::{RateLimitRequest, RateLimitResponse};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_samples::ratelimit::{Config, Limiter, Service};
use prost::Message as _;

const FILE: &str = r#"
domain: ratelimit
descriptors:
  - key: PATH
    value: "/productpage"
    rate_limit: {unit: minute, requests_per_unit: 2, name: page}
  - key: PATH
    value: "/static*"
    rate_limit: {unlimited: true}
  - key: PATH
    rate_limit: {unit: minute, requests_per_unit: 100}
  - key: user
    descriptors:
      - key: plan
        value: free
        rate_limit: {unit: second, requests_per_unit: 1}
      - key: plan
        value: trial
        shadow_mode: true
        rate_limit: {unit: second, requests_per_unit: 1}
"#;

fn config() -> Config {
    Config::parse(&[("config.yaml".to_owned(), FILE.to_owned())]).unwrap()
}

fn question(entries: &[(&str, &str)]) -> RateLimitRequest {
    let entry = |(key, value): &(&str, &str)| Entry {
        key: (*key).to_owned(),
        value: (*value).to_owned(),
    };
    RateLimitRequest {
        domain: "ratelimit".to_owned(),
        descriptors: vec![RateLimitDescriptor {
            entries: entries.iter().map(entry).collect(),
            ..RateLimitDescriptor::default()
        }],
        hits_addend: 0,
    }
}

/// `ok` or `over`, the limit and what is left of it.
fn told(answer: &RateLimitResponse) -> String {
    let word = match answer.overall_code {
        code if code == Code::Ok as i32 => "ok",
        _ => "over",
    };
    match &answer.statuses[0].current_limit {
        Some(limit) => format!(
            "{word} {} {}",
            limit.requests_per_unit, answer.statuses[0].limit_remaining
        ),
        None => word.to_owned(),
    }
}

#[test]
fn requests_are_counted_in_windows() {
    let (limiter, config) = (Limiter::default(), config());
    let page = question(&[("PATH", "/productpage")]);
    for (now, expected) in [
        (60, "ok 2 1"),
        (61, "ok 2 0"),
        (119, "over 2 0"),
        (120, "ok 2 1"),
    ] {
        let answer = limiter.judge(&config, &page, now);
        assert_eq!(told(&answer), expected, "at {now}");
        let reset = answer.statuses[0].duration_until_reset.unwrap();
        assert_eq!(reset.seconds, 60 - i64::try_from(now % 60).unwrap());
    }
}

#[test]
fn the_most_specific_descriptor_has_the_limit() {
    let config = config();
    for (entries, expected) in [
        (vec![("PATH", "/")], "ok 100 99"),
        (vec![("PATH", "/static/x")], "ok"),
        (vec![("other", "x")], "ok"),
        (vec![("user", "jason")], "ok"),
        (vec![("user", "jason"), ("plan", "free")], "ok 1 0"),
        (vec![("user", "jason"), ("plan", "paid")], "ok"),
        (vec![("PATH", "/productpage"), ("more", "x")], "ok"),
    ] {
        let answer = Limiter::default().judge(&config, &question(&entries), 0);
        assert_eq!(told(&answer), expected, "{entries:?}");
    }
    let limiter = Limiter::default();
    let trial = question(&[("user", "jason"), ("plan", "trial")]);
    limiter.judge(&config, &trial, 0);
    let second = limiter.judge(&config, &trial, 0);
    assert_eq!(told(&second), "ok 1 0", "a shadow refuses nobody");
    let mut own = question(&[("other", "x")]);
    own.descriptors[0].limit = Some(RateLimitOverride {
        requests_per_unit: 7,
        unit: 3,
    });
    own.hits_addend = 3;
    assert_eq!(told(&limiter.judge(&config, &own, 0)), "ok 7 4");
    let users = |name| question(&[("user", name), ("plan", "free")]);
    limiter.judge(&config, &users("a"), 0);
    assert_eq!(told(&limiter.judge(&config, &users("b"), 0)), "ok 1 0");
    assert_eq!(told(&limiter.judge(&config, &users("a"), 0)), "over 1 0");
}

#[test]
fn bad_files_are_refused_with_their_name() {
    let file = |text: &str| ("limits.yaml".to_owned(), text.to_owned());
    for (text, expected) in [
        ("descriptors: []", "domain"),
        ("domain: d\nlimits: []", "limits"),
        (
            "domain: d\ndescriptors: [{key: a, rate_limit: {unit: fortnight, requests_per_unit: 1}}]",
            "fortnight",
        ),
        (
            "domain: d\ndescriptors: [{key: a, rate_limit: {requests_per_unit: 1}}]",
            "d.a has no unit",
        ),
        (
            "domain: d\ndescriptors: [{key: a}, {key: a}]",
            "d.a is there twice",
        ),
    ] {
        let error = Config::parse(&[file(text)]).unwrap_err().to_string();
        assert!(
            error.starts_with("limits.yaml: ") && error.contains(expected),
            "{error}"
        );
    }
    let error = Config::parse(&[file("domain: d"), file("domain: d")]).unwrap_err();
    assert!(error.to_string().contains("another file"), "{error}");
}

#[tokio::test]
async fn it_speaks_grpc() {
    let at = crate::start(Service::new(config()).grpc()).await;
    let stream = tokio::net::TcpStream::connect(at).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    let message = question(&[("PATH", "/")]).encode_to_vec();
    let mut framed = vec![0];
    framed.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
    framed.extend_from_slice(&message);
    for (body, status) in [(framed, "0"), (vec![1, 2, 3], "3")] {
        let request = http::Request::post(format!(
            "http://{at}/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit"
        ))
        .header("content-type", "application/grpc")
        .body(Full::new(Bytes::from(body)))
        .unwrap();
        let response = sender.send_request(request).await.unwrap();
        assert_eq!(response.headers()["content-type"], "application/grpc");
        let body = response.into_body().collect().await.unwrap();
        assert_eq!(body.trailers().unwrap()["grpc-status"], status);
        let bytes = body.to_bytes();
        if status == "0" {
            let answer = RateLimitResponse::decode(&bytes[5..]).unwrap();
            assert_eq!(told(&answer), "ok 100 99");
        }
    }
}
