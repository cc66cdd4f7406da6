//! `productpage`: the shop's front, as HTML for people and JSON for programs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::{Path, State};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Form, Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::header::{CONTENT_TYPE, COOKIE, LOCATION, SET_COOKIE};
use http::{HeaderMap, HeaderValue, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::page::{self, Section};
use super::{PORT, Peer, error};
use crate::propagate::propagated;
use crate::serve::{self, PortArgs, env};
use crate::upstream::Upstream;

/// Time that one call to another service may take.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Calls that are made to `reviews` before the page gives up.
const REVIEWS_TRIES: usize = 2;
/// Longest user name that a session takes, in bytes.
const MAX_USER: usize = 64;

/// Where the other services are.
#[derive(Debug, Clone)]
pub struct Config {
    /// The service `details`.
    pub details: Peer,
    /// The service `reviews`.
    pub reviews: Peer,
    /// The service `ratings`.
    pub ratings: Peer,
    /// Requests that go to `reviews` beside the one that a page needs (`FLOOD_FACTOR`, default 0, at most 1000).
    pub flood_factor: usize,
}

impl Config {
    fn from_env() -> anyhow::Result<Self> {
        let flood_factor = match env("FLOOD_FACTOR") {
            None => 0,
            Some(text) => text.parse().ok().filter(|factor| *factor <= 1000).ok_or_else(|| {
                anyhow::anyhow!("the environment variable FLOOD_FACTOR is {text:?}; set it to a number from 0 to 1000")
            })?,
        };
        Ok(Self {
            details: Peer::from_env("details")?,
            reviews: Peer::from_env("reviews")?,
            ratings: Peer::from_env("ratings")?,
            flood_factor,
        })
    }
}

struct Shop {
    config: Config,
    upstream: Upstream,
    /// Answers by service and status code, for `/metrics`.
    results: Mutex<BTreeMap<(&'static str, u16), u64>>,
}

/// What a service answered: its JSON, or the status to report and the text for people.
type Answer = Result<Value, (StatusCode, String)>;

pub(crate) fn main(args: &[String]) -> anyhow::Result<()> {
    let config = Config::from_env()?;
    let port = PortArgs::port(args, PORT)?;
    serve::block_on(serve::serve("productpage", port, router(config)))
}

/// All of the shop's front.
pub fn router(config: Config) -> Router {
    let shop = Shop {
        config,
        upstream: Upstream::default(),
        results: Mutex::default(),
    };
    Router::new()
        .route("/", get(async || Html(page::INDEX)))
        .route("/index.html", get(async || Html(page::INDEX)))
        .route("/health", get(async || "Product page is healthy"))
        .route("/metrics", get(metrics))
        .route("/productpage", get(product_page))
        .route("/login", post(login))
        .route("/logout", get(logout))
        .route(
            "/static/cover.svg",
            get(async || ([(CONTENT_TYPE, "image/svg+xml")], page::COVER)),
        )
        .route("/api/v1/products", get(async || Json(json!([product()]))))
        .route("/api/v1/products/{id}", get(api_details))
        .route("/api/v1/products/{id}/reviews", get(api_reviews))
        .route("/api/v1/products/{id}/ratings", get(api_ratings))
        .with_state(Arc::new(shop))
}

/// The one book of the shop.
fn product() -> Value {
    json!({ "id": 0, "title": page::BOOK_TITLE, "descriptionHtml": page::BOOK_DESCRIPTION })
}

async fn product_page(State(shop): State<Arc<Shop>>, headers: HeaderMap) -> Response {
    let user = session_user(&headers);
    let outgoing = outgoing(&headers, user.as_deref());
    shop.flood(&outgoing);
    let details = shop.details("0", &outgoing).await;
    let reviews = shop.reviews("0", &outgoing).await;
    let html = page::render(user.as_deref(), section(&details), section(&reviews));
    Html(html).into_response()
}

fn section(answer: &Answer) -> Section<'_> {
    match answer {
        Ok(value) => Section::Value(value),
        Err((_, message)) => Section::Error(message),
    }
}

async fn api_details(
    State(shop): State<Arc<Shop>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Response {
    match product_id(&id) {
        Ok(id) => answer(
            shop.details(id, &outgoing(&headers, session_user(&headers).as_deref()))
                .await,
        ),
        Err(refusal) => refusal,
    }
}

async fn api_reviews(
    State(shop): State<Arc<Shop>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Response {
    match product_id(&id) {
        Ok(id) => answer(
            shop.reviews(id, &outgoing(&headers, session_user(&headers).as_deref()))
                .await,
        ),
        Err(refusal) => refusal,
    }
}

async fn api_ratings(
    State(shop): State<Arc<Shop>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Response {
    match product_id(&id) {
        Ok(id) => answer(
            shop.ratings(id, &outgoing(&headers, session_user(&headers).as_deref()))
                .await,
        ),
        Err(refusal) => refusal,
    }
}

fn product_id(id: &str) -> Result<&str, Response> {
    // Digits alone: the text becomes part of another service's URL.
    if !id.is_empty() && id.len() <= 19 && id.bytes().all(|byte| byte.is_ascii_digit()) {
        Ok(id)
    } else {
        Err(error(
            StatusCode::BAD_REQUEST,
            "please provide numeric product id",
        ))
    }
}

fn answer(answer: Answer) -> Response {
    match answer {
        Ok(value) => Json(value).into_response(),
        Err((status, message)) => error(status, &message),
    }
}

impl Shop {
    async fn details(&self, id: &str, headers: &HeaderMap) -> Answer {
        let url = self.config.details.url(&format!("/details/{id}"));
        self.call("details", &url, headers)
            .await
            .map_err(|status| (status, unavailable("details")))
    }

    /// Tries twice: the "fault injection" task shows a page that gives up after twice the timeout.
    async fn reviews(&self, id: &str, headers: &HeaderMap) -> Answer {
        let url = self.config.reviews.url(&format!("/reviews/{id}"));
        let mut last = StatusCode::INTERNAL_SERVER_ERROR;
        for _ in 0..REVIEWS_TRIES {
            match self.call("reviews", &url, headers).await {
                Ok(value) => return Ok(value),
                Err(status) => last = status,
            }
        }
        Err((last, unavailable("reviews")))
    }

    async fn ratings(&self, id: &str, headers: &HeaderMap) -> Answer {
        let url = self.config.ratings.url(&format!("/ratings/{id}"));
        self.call("ratings", &url, headers)
            .await
            .map_err(|status| (status, unavailable("ratings")))
    }

    /// One call; the status is what the failed service answered, or 500 where it did not answer.
    async fn call(
        &self,
        service: &'static str,
        url: &str,
        headers: &HeaderMap,
    ) -> Result<Value, StatusCode> {
        let (status, result) = match self.upstream.get(url, headers, TIMEOUT).await {
            Ok((StatusCode::OK, body)) => {
                let parsed = serde_json::from_slice(&body).map_err(|_| StatusCode::BAD_GATEWAY);
                (StatusCode::OK, parsed)
            }
            Ok((status, _)) => {
                serve::say(&format!("{url} answered {status}"));
                (status, Err(status))
            }
            Err(error) => {
                serve::say(&error.to_string());
                (
                    StatusCode::INTERNAL_SERVER_ERROR,
                    Err(StatusCode::INTERNAL_SERVER_ERROR),
                )
            }
        };
        let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        *results.entry((service, status.as_u16())).or_default() += 1;
        result
    }

    /// Sends the extra requests of `FLOOD_FACTOR`; nobody waits for their answers.
    fn flood(&self, headers: &HeaderMap) {
        let url = self.config.reviews.url("/reviews/0");
        for _ in 0..self.config.flood_factor {
            let (upstream, url, headers) = (self.upstream.clone(), url.clone(), headers.clone());
            tokio::spawn(async move {
                let _ = upstream.get(&url, &headers, TIMEOUT).await;
            });
        }
    }
}

fn unavailable(what: &str) -> String {
    format!("Sorry, product {what} are currently unavailable for this book.")
}

async fn metrics(State(shop): State<Arc<Shop>>) -> Response {
    let mut text = String::from(
        "# HELP request_result_total Answers of the services that the page called\n# TYPE request_result_total counter\n",
    );
    for ((service, status), count) in shop
        .results
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .iter()
    {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "request_result_total{{destination_app=\"{service}\",response_code=\"{status}\"}} {count}"
        );
    }
    (
        [(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")],
        text,
    )
        .into_response()
}

/// Headers of the calls that one request causes. The signed-in user decides `end-user`; without one a client may bring
/// the header itself, so that `curl -H 'end-user: jason'` shows the same as signing in.
fn outgoing(incoming: &HeaderMap, user: Option<&str>) -> HeaderMap {
    let mut headers = propagated(incoming);
    if let Some(value) = user.and_then(|user| HeaderValue::from_str(user).ok()) {
        headers.insert("end-user", value);
    }
    headers
}

#[derive(Deserialize)]
struct Login {
    #[serde(default)]
    username: String,
}

async fn login(form: Result<Form<Login>, axum::extract::rejection::FormRejection>) -> Response {
    let Ok(Form(login)) = form else {
        return error(
            StatusCode::BAD_REQUEST,
            "please send the form field username",
        );
    };
    let user = login.username.trim();
    if user.is_empty()
        || user.len() > MAX_USER
        || !user.bytes().all(|byte| (0x20..0x7f).contains(&byte))
    {
        return error(
            StatusCode::BAD_REQUEST,
            "please choose a user name of 1 to 64 ASCII letters",
        );
    }
    let cookie = format!(
        "session={}; Path=/; HttpOnly; SameSite=Lax",
        URL_SAFE_NO_PAD.encode(user)
    );
    to_product_page(&cookie)
}

async fn logout() -> Response {
    to_product_page("session=; Path=/; HttpOnly; SameSite=Lax; Max-Age=0")
}

fn to_product_page(cookie: &str) -> Response {
    (
        StatusCode::FOUND,
        [(LOCATION, "/productpage"), (SET_COOKIE, cookie)],
    )
        .into_response()
}

/// The user in the session cookie. It is not signed: anybody may sign in as anybody, as the tasks need it.
fn session_user(headers: &HeaderMap) -> Option<String> {
    let value = headers
        .get_all(COOKIE)
        .iter()
        .filter_map(|cookie| cookie.to_str().ok())
        .flat_map(|cookie| cookie.split(';'))
        .find_map(|pair| pair.trim().strip_prefix("session="))?;
    let user = String::from_utf8(URL_SAFE_NO_PAD.decode(value).ok()?).ok()?;
    (!user.is_empty() && user.len() <= MAX_USER).then_some(user)
}
