use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use mesh_samples::httpbin::{Style, router};
use serde_json::{Value, json};

use crate::{get, json, start};

async fn send(request: http::request::Builder, body: &str) -> (http::response::Parts, Vec<u8>) {
    let client = hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new())
        .build_http();
    let response = client
        .request(
            request
                .body(Full::<bytes::Bytes>::from(body.to_owned()))
                .unwrap(),
        )
        .await
        .unwrap();
    let (head, body) = response.into_parts();
    (head, body.collect().await.unwrap().to_bytes().to_vec())
}

#[tokio::test]
async fn requests_are_shown_in_both_styles() {
    let lists = start(router(Style::Lists)).await;
    let shown = json(lists, "/get?a=1&a=2&b=x%20y", &[("x-request-id", "r")]).await;
    assert_eq!(shown["args"], json!({ "a": ["1", "2"], "b": ["x y"] }));
    assert_eq!(shown["headers"]["X-Request-Id"], json!(["r"]));
    assert_eq!(shown["headers"]["Host"], json!([lists.to_string()]));
    assert_eq!(
        (&shown["method"], &shown["origin"]),
        (&json!("GET"), &json!("127.0.0.1"))
    );
    assert_eq!(
        shown["url"],
        json!(format!("http://{lists}/get?a=1&a=2&b=x%20y"))
    );

    let plain = start(router(Style::Plain)).await;
    let shown = json(plain, "/get?a=1", &[("x-request-id", "r")]).await;
    assert_eq!(
        (&shown["args"]["a"], &shown["headers"]["X-Request-Id"]),
        (&json!("1"), &json!("r"))
    );
    let origin = json(plain, "/ip", &[("x-forwarded-for", "192.0.2.7, 10.0.0.1")]).await;
    assert_eq!(origin, json!({ "origin": "192.0.2.7" }));
}

#[tokio::test]
async fn bodies_are_shown() {
    let address = start(router(Style::Lists)).await;
    let url = format!("http://{address}/post");
    let (_, body) = send(
        Request::post(&url).header("content-type", "application/json"),
        "{\"k\":[1]}",
    )
    .await;
    let shown: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(
        (&shown["json"], &shown["data"]),
        (&json!({ "k": [1] }), &json!("{\"k\":[1]}"))
    );
    let form = Request::post(&url).header("content-type", "application/x-www-form-urlencoded");
    let shown: Value = serde_json::from_slice(&send(form, "a=1&b=+").await.1).unwrap();
    assert_eq!(shown["form"], json!({ "a": ["1"], "b": [" "] }));
    let (head, _) = send(Request::get(&url), "").await;
    assert_eq!(head.status, StatusCode::METHOD_NOT_ALLOWED);
    let shown: Value = serde_json::from_slice(
        &send(Request::put(format!("http://{address}/anything/x")), "t")
            .await
            .1,
    )
    .unwrap();
    assert_eq!(shown["method"], "PUT");
}

#[tokio::test]
async fn statuses_redirects_and_headers_are_made_to_order() {
    let address = start(router(Style::Lists)).await;
    let url = |path: &str| format!("http://{address}{path}");
    for (path, status, location) in [
        ("/status/418", 418, None),
        ("/status/503", 503, None),
        ("/status/nonsense", 400, None),
        ("/status/302", 302, Some("/redirect/1")),
        ("/redirect/3", 302, Some("/relative-redirect/2")),
        ("/redirect/1", 302, Some("/get")),
        (
            "/redirect-to?url=http%3A%2F%2Fa%2F&status_code=307",
            307,
            Some("http://a/"),
        ),
        ("/redirect-to", 400, None),
        ("/cookies/set?a=1", 302, Some("/cookies")),
        ("/basic-auth/u/p", 401, None),
        ("/hidden-basic-auth/u/p", 404, None),
        ("/bearer", 401, None),
        ("/bytes/x", 400, None),
        ("/range/x", 400, None),
        ("/unstable?failure_rate=1", 500, None),
        ("/unstable?failure_rate=0", 200, None),
        ("/nothing-here", 404, None),
    ] {
        let (head, _) = send(Request::get(url(path)), "").await;
        assert_eq!(head.status.as_u16(), status, "{path}");
        let found = head
            .headers
            .get("location")
            .map(|value| value.to_str().unwrap());
        assert_eq!(found, location, "{path}");
    }
    let (head, _) = send(
        Request::get(url(
            "/response-headers?x-a=1&x-a=2&content-type=text%2Fplain",
        )),
        "",
    )
    .await;
    assert_eq!(head.headers.get_all("x-a").iter().count(), 2);
    assert_eq!(head.headers["content-type"], "text/plain");
    let authorized = Request::get(url("/basic-auth/u/p")).header("authorization", "Basic dTpw");
    assert_eq!(send(authorized, "").await.0.status, StatusCode::OK);
    assert_eq!(
        json(address, "/cookies", &[("cookie", "a=1; b=2")]).await["cookies"],
        json!({ "a": "1", "b": "2" })
    );
}

#[tokio::test]
async fn contents_are_made_to_order() {
    let address = start(router(Style::Lists)).await;
    let url = |path: &str| format!("http://{address}{path}");
    assert_eq!(
        send(Request::get(url("/bytes/1000")), "").await.1.len(),
        1000
    );
    assert_eq!(
        send(Request::get(url("/stream-bytes/1000?chunk_size=7")), "")
            .await
            .1
            .len(),
        1000
    );
    assert_eq!(
        send(Request::get(url("/drip?numbytes=5&duration=0")), "")
            .await
            .1,
        b"*****"
    );
    let (head, body) = send(
        Request::get(url("/range/26")).header("range", "bytes=2-4"),
        "",
    )
    .await;
    assert_eq!((head.status.as_u16(), body.as_slice()), (206, &b"cde"[..]));
    assert_eq!(get(address, "/stream/3", &[]).await.1.lines().count(), 3);
    assert_eq!(get(address, "/base64/aGVsbG8=", &[]).await.1, "hello");
    assert_eq!(
        send(
            Request::get(url("/etag/x")).header("if-none-match", "\"x\""),
            ""
        )
        .await
        .0
        .status
        .as_u16(),
        304
    );
    assert_eq!(
        send(Request::get(url("/etag/x")).header("if-match", "\"y\""), "")
            .await
            .0
            .status
            .as_u16(),
        412
    );
    assert!(
        send(Request::get(url("/image/png")), "")
            .await
            .1
            .starts_with(b"\x89PNG")
    );
    let (head, body) = send(Request::get(url("/gzip")), "").await;
    assert_eq!(head.headers["content-encoding"], "gzip");
    let unpacked: Value =
        serde_json::from_reader(flate2::read::GzDecoder::new(body.as_slice())).unwrap();
    assert_eq!(unpacked["gzipped"], true);
    assert_eq!(json(address, "/delay/0.05", &[]).await["method"], "GET");
}
