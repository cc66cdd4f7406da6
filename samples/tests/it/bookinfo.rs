use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::routing::get as get_route;
use http::{HeaderMap, Request, StatusCode};
use mesh_samples::bookinfo::ratings::Variant;
use mesh_samples::bookinfo::{Peer, details, productpage, ratings, reviews};
use mesh_samples::propagate::HEADERS;
use serde_json::json;

use crate::{get, json, start};

fn peer(address: SocketAddr) -> Peer {
    Peer {
        host: address.ip().to_string(),
        port: address.port(),
    }
}

/// An address where nothing listens.
async fn nowhere() -> SocketAddr {
    tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap()
}

fn reviews_of(ratings: SocketAddr, color: Option<&str>) -> Router {
    reviews::router(reviews::Config {
        ratings_enabled: color.is_some(),
        star_color: color.unwrap_or("black").into(),
        ratings: peer(ratings),
        pod_name: "reviews-test".into(),
        cluster_name: None,
    })
}

fn page_of(details: SocketAddr, reviews: SocketAddr, ratings: SocketAddr) -> Router {
    productpage::router(productpage::Config {
        details: peer(details),
        reviews: peer(reviews),
        ratings: peer(ratings),
        flood_factor: 0,
    })
}

async fn shop(color: Option<&str>) -> SocketAddr {
    let details = start(details::router()).await;
    let ratings = start(ratings::router(Variant::Good)).await;
    let reviews = start(reviews_of(ratings, color)).await;
    start(page_of(details, reviews, ratings)).await
}

#[tokio::test]
async fn details_have_the_fields_that_the_page_shows() {
    let address = start(details::router()).await;
    let details = json(address, "/details/0", &[]).await;
    assert_eq!(details["id"], 0);
    for field in [
        "author",
        "year",
        "type",
        "pages",
        "publisher",
        "language",
        "ISBN-10",
        "ISBN-13",
    ] {
        assert!(!details[field].is_null(), "{field} is missing in {details}");
    }
    assert_eq!(
        get(address, "/details/abc", &[]).await.0,
        StatusCode::BAD_REQUEST
    );
    assert_eq!(
        json(address, "/health", &[]).await,
        json!({ "status": "Details is healthy" })
    );
}

#[tokio::test]
async fn reviews_differ_by_version() {
    let ratings = start(ratings::router(Variant::Good)).await;
    let plain = json(start(reviews_of(ratings, None)).await, "/reviews/0", &[]).await;
    assert_eq!(
        (&plain["id"], &plain["podname"], &plain["clustername"]),
        (&json!("0"), &json!("reviews-test"), &json!("null"))
    );
    assert!(plain["reviews"][0].get("rating").is_none());
    for color in ["black", "red"] {
        let starred = json(
            start(reviews_of(ratings, Some(color))).await,
            "/reviews/0",
            &[],
        )
        .await;
        assert_eq!(
            starred["reviews"][0]["rating"],
            json!({ "stars": 5, "color": color })
        );
        assert_eq!(
            starred["reviews"][1]["rating"],
            json!({ "stars": 4, "color": color })
        );
    }
}

#[tokio::test]
async fn reviews_say_when_ratings_are_away() {
    let reviews = start(reviews_of(nowhere().await, Some("red"))).await;
    let answer = json(reviews, "/reviews/0", &[]).await;
    assert_eq!(
        answer["reviews"][0]["rating"],
        json!({ "error": "Ratings service is currently unavailable" })
    );
}

#[tokio::test]
async fn reviews_v3_waits_less_than_v2() {
    let slow = Router::new().route(
        "/ratings/{id}",
        get_route(async || {
            tokio::time::sleep(Duration::from_secs(4)).await;
            axum::Json(json!({ "id": 0, "ratings": { "Reviewer1": 5, "Reviewer2": 4 } }))
        }),
    );
    let slow = start(slow).await;
    let (v2, v3) = (
        start(reviews_of(slow, Some("black"))).await,
        start(reviews_of(slow, Some("red"))).await,
    );
    let (v2, v3) = tokio::join!(json(v2, "/reviews/0", &[]), json(v3, "/reviews/0", &[]));
    assert_eq!(v2["reviews"][0]["rating"]["stars"], 5, "10 s are enough");
    assert!(
        v3["reviews"][0]["rating"]["error"].is_string(),
        "2.5 s are not"
    );
}

async fn post(
    address: SocketAddr,
    path: &str,
    content_type: &str,
    body: &str,
) -> http::Response<hyper::body::Incoming> {
    let client = hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new())
        .build_http();
    let request =
        Request::post(format!("http://{address}{path}")).header("content-type", content_type);
    client
        .request(request.body(Body::from(body.to_owned())).unwrap())
        .await
        .unwrap()
}

#[tokio::test]
async fn ratings_can_be_posted() {
    let address = start(ratings::router(Variant::Good)).await;
    let default = json!({ "id": 7, "ratings": { "Reviewer1": 5, "Reviewer2": 4 } });
    assert_eq!(json(address, "/ratings/7", &[]).await, default);
    assert_eq!(
        post(
            address,
            "/ratings/7",
            "application/json",
            "{\"Reviewer1\":1}"
        )
        .await
        .status(),
        StatusCode::OK
    );
    assert_eq!(
        json(address, "/ratings/7", &[]).await,
        json!({ "id": 7, "ratings": { "Reviewer1": 1 } })
    );
    assert_eq!(
        post(address, "/ratings/7", "application/json", "nonsense")
            .await
            .status(),
        StatusCode::BAD_REQUEST
    );
    assert_eq!(
        get(address, "/ratings/x", &[]).await.0,
        StatusCode::BAD_REQUEST
    );
}

#[tokio::test]
async fn a_faulty_variant_fails_about_half_of_the_time() {
    let address = start(ratings::router(Variant::Faulty)).await;
    let mut failures = 0;
    for _ in 0..100 {
        failures +=
            i32::from(get(address, "/ratings/0", &[]).await.0 == StatusCode::SERVICE_UNAVAILABLE);
    }
    assert!((20..=80).contains(&failures), "{failures} of 100 failed");
}

#[tokio::test]
async fn the_page_shows_everything() {
    let address = shop(Some("red")).await;
    let (status, page) = get(address, "/productpage", &[]).await;
    assert_eq!(status, StatusCode::OK);
    for text in [
        "<title>Simple Bookstore App</title>",
        "The Comedy of Errors",
        "William Shakespeare",
        "PublisherA",
        "data-stars=\"5\" data-color=\"red\"",
        "data-stars=\"4\" data-color=\"red\"",
        "reviews-test",
        "Sign in",
    ] {
        assert!(page.contains(text), "{text:?} is not in {page}");
    }
    assert!(
        !get(shop(None).await, "/productpage", &[])
            .await
            .1
            .contains("data-stars")
    );
}

#[tokio::test]
async fn the_page_says_what_it_could_not_fetch() {
    let nowhere = nowhere().await;
    let address = start(page_of(nowhere, nowhere, nowhere)).await;
    let (status, page) = get(address, "/productpage", &[]).await;
    assert_eq!(status, StatusCode::OK);
    for text in [
        "Error fetching product details",
        "Sorry, product details are currently unavailable for this book.",
        "Error fetching product reviews",
        "Sorry, product reviews are currently unavailable for this book.",
    ] {
        assert!(page.contains(text), "{text:?} is not in {page}");
    }
    assert_eq!(
        get(address, "/api/v1/products/0", &[]).await.0,
        StatusCode::INTERNAL_SERVER_ERROR
    );
}

#[tokio::test]
async fn the_page_gives_up_on_slow_reviews_after_two_tries() {
    let calls = Arc::new(Mutex::new(0));
    let counted = calls.clone();
    let slow = Router::new().route(
        "/reviews/{id}",
        get_route(async move || {
            *counted.lock().unwrap() += 1;
            tokio::time::sleep(Duration::from_secs(60)).await;
        }),
    );
    let details = start(details::router()).await;
    let address = start(page_of(details, start(slow).await, nowhere().await)).await;
    let begun = Instant::now();
    let (_, page) = get(address, "/productpage", &[]).await;
    assert!(
        page.contains("Error fetching product reviews") && page.contains("William Shakespeare")
    );
    assert!(
        begun.elapsed() >= Duration::from_secs(6),
        "two tries of three seconds each"
    );
    assert_eq!(*calls.lock().unwrap(), 2);
}

#[tokio::test]
async fn the_api_answers_in_json() {
    let address = shop(Some("black")).await;
    assert_eq!(
        json(address, "/api/v1/products", &[]).await[0]["title"],
        "The Comedy of Errors"
    );
    assert_eq!(
        json(address, "/api/v1/products/0", &[]).await["publisher"],
        "PublisherA"
    );
    assert_eq!(
        json(address, "/api/v1/products/0/reviews", &[]).await["reviews"][0]["rating"]["stars"],
        5
    );
    assert_eq!(
        json(address, "/api/v1/products/0/ratings", &[]).await["ratings"]["Reviewer2"],
        4
    );
    assert_eq!(
        get(address, "/api/v1/products/..%2Fhealth/ratings", &[])
            .await
            .0,
        StatusCode::BAD_REQUEST
    );
    let metrics = get(address, "/metrics", &[]).await.1;
    assert!(
        metrics
            .contains("request_result_total{destination_app=\"details\",response_code=\"200\"} 1"),
        "{metrics}"
    );
}

/// A stand-in for all services, which remembers the headers of its last call.
fn recorder(seen: Arc<Mutex<HeaderMap>>) -> Router {
    Router::new().fallback(async move |headers: HeaderMap| {
        *seen.lock().unwrap() = headers;
        axum::Json(json!({ "ratings": {}, "reviews": [] }))
    })
}

#[tokio::test]
async fn tracing_headers_reach_every_service() {
    let seen = Arc::new(Mutex::new(HeaderMap::new()));
    let address = start(recorder(seen.clone())).await;
    let page = start(page_of(address, address, address)).await;
    let reviews = start(reviews_of(address, Some("red"))).await;
    for (service, path) in [
        (page, "/productpage"),
        (page, "/api/v1/products/0"),
        (reviews, "/reviews/0"),
    ] {
        let sent: Vec<_> = HEADERS
            .iter()
            .map(|name| (*name, "value-1"))
            .chain([("x-private", "no")])
            .collect();
        get(service, path, &sent).await;
        let seen = std::mem::take(&mut *seen.lock().unwrap());
        for name in HEADERS {
            assert_eq!(
                seen.get(*name).map(|value| value.to_str().unwrap()),
                Some("value-1"),
                "{name} of {path}"
            );
        }
        assert!(!seen.contains_key("x-private"));
    }
}

#[tokio::test]
async fn the_signed_in_user_goes_along() {
    let seen = Arc::new(Mutex::new(HeaderMap::new()));
    let address = start(recorder(seen.clone())).await;
    let page = start(page_of(address, address, address)).await;

    let answer = post(
        page,
        "/login",
        "application/x-www-form-urlencoded",
        "username=jason&passwd=",
    )
    .await;
    assert_eq!(
        (
            answer.status(),
            answer.headers()["location"].to_str().unwrap()
        ),
        (StatusCode::FOUND, "/productpage")
    );
    let cookie = answer.headers()["set-cookie"]
        .to_str()
        .unwrap()
        .split(';')
        .next()
        .unwrap()
        .to_owned();

    let (_, html) = get(page, "/productpage", &[("cookie", &cookie)]).await;
    assert!(
        html.contains("jason") && html.contains("Sign out"),
        "{html}"
    );
    assert_eq!(seen.lock().unwrap()["end-user"], "jason");

    get(page, "/productpage", &[("cookie", "session=%%%; other=1")]).await;
    assert!(!seen.lock().unwrap().contains_key("end-user"));

    let client = hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new())
        .build_http::<Body>();
    let answer = client
        .get(format!("http://{page}/logout").parse().unwrap())
        .await
        .unwrap();
    assert!(
        answer.headers()["set-cookie"]
            .to_str()
            .unwrap()
            .contains("Max-Age=0")
    );
    for bad in ["username=", "username=a%0d%0ab", "x=1"] {
        let answer = post(page, "/login", "application/x-www-form-urlencoded", bad).await;
        assert_eq!(answer.status(), StatusCode::BAD_REQUEST, "{bad}");
    }
}
