//! `reviews`: what two readers say; v2 and v3 add stars that `ratings` knows.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use http::{HeaderMap, StatusCode};
use serde_json::{Value, json};

use super::{PORT, Peer, error, health};
use crate::propagate::propagated;
use crate::serve::{self, PortArgs, env};
use crate::upstream::Upstream;

const TEXTS: [(&str, &str); 2] = [
    (
        "Reviewer1",
        "Two pairs of twins, one town and not a quiet minute: I laughed from the first mix-up to the last.",
    ),
    (
        "Reviewer2",
        "Fast and funny on every page, although the people in it stay lighter than in his later plays.",
    ),
];

/// What tells one version from another.
#[derive(Debug, Clone)]
pub struct Config {
    /// Whether `ratings` is asked (`ENABLE_RATINGS`; v1 does not).
    pub ratings_enabled: bool,
    /// Colour of the stars (`STAR_COLOR`, default black).
    pub star_color: String,
    /// Where `ratings` is.
    pub ratings: Peer,
    /// Name of the pod, part of the answer.
    pub pod_name: String,
    /// Name of the cluster, part of the answer (`CLUSTER_NAME`).
    pub cluster_name: Option<String>,
}

impl Config {
    fn from_env() -> anyhow::Result<Self> {
        Ok(Self {
            ratings_enabled: env("ENABLE_RATINGS")
                .is_some_and(|value| value.eq_ignore_ascii_case("true")),
            star_color: env("STAR_COLOR").unwrap_or_else(|| "black".into()),
            ratings: Peer::from_env("ratings")?,
            pod_name: serve::hostname(),
            cluster_name: env("CLUSTER_NAME"),
        })
    }

    /// v2 waits long for its stars and v3 gives up early: the "request timeouts" task shows the difference.
    fn ratings_timeout(&self) -> Duration {
        if self.star_color == "black" {
            Duration::from_secs(10)
        } else {
            Duration::from_millis(2500)
        }
    }
}

struct Reviews {
    config: Config,
    upstream: Upstream,
}

pub(crate) fn main(args: &[String]) -> anyhow::Result<()> {
    let config = Config::from_env()?;
    let port = PortArgs::port(args, PORT)?;
    serve::block_on(serve::serve("reviews", port, router(config)))
}

/// `/reviews/{id}` and `/health`.
pub fn router(config: Config) -> Router {
    let reviews = Reviews {
        config,
        upstream: Upstream::default(),
    };
    Router::new()
        .route(
            "/health",
            get(async || health(StatusCode::OK, "Reviews is healthy")),
        )
        .route("/reviews/{id}", get(read))
        .with_state(Arc::new(reviews))
}

async fn read(
    State(reviews): State<Arc<Reviews>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Response {
    if id.parse::<u64>().is_err() {
        return error(StatusCode::BAD_REQUEST, "please provide numeric product id");
    }
    let ratings = if reviews.config.ratings_enabled {
        Some(reviews.ratings(&id, &headers).await)
    } else {
        None
    };
    let texts: Vec<Value> = TEXTS
        .iter()
        .map(|(reviewer, text)| {
            let mut review = json!({ "reviewer": reviewer, "text": text });
            if let Some(ratings) = &ratings {
                review["rating"] = rating(ratings.as_ref(), reviewer, &reviews.config.star_color);
            }
            review
        })
        .collect();
    Json(json!({
        "id": id,
        "podname": reviews.config.pod_name,
        "clustername": reviews.config.cluster_name.as_deref().unwrap_or("null"),
        "reviews": texts,
    }))
    .into_response()
}

impl Reviews {
    /// Stars by reviewer, or `None` where `ratings` gave none in time.
    async fn ratings(&self, id: &str, headers: &HeaderMap) -> Option<Value> {
        let config = &self.config;
        let url = config.ratings.url(&format!("/ratings/{id}"));
        match self
            .upstream
            .get(&url, &propagated(headers), config.ratings_timeout())
            .await
        {
            Ok((StatusCode::OK, body)) => {
                let answer: Value = serde_json::from_slice(&body).ok()?;
                answer.get("ratings").cloned()
            }
            Ok((status, _)) => {
                serve::say(&format!("{url} answered {status}"));
                None
            }
            Err(error) => {
                serve::say(&error.to_string());
                None
            }
        }
    }
}

fn rating(ratings: Option<&Value>, reviewer: &str, color: &str) -> Value {
    match ratings {
        Some(ratings) => {
            json!({ "stars": ratings.get(reviewer).and_then(Value::as_i64).unwrap_or(-1), "color": color })
        }
        None => json!({ "error": "Ratings service is currently unavailable" }),
    }
}
