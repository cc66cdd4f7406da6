//! `ratings`: stars per reviewer, in memory; with variants that misbehave on purpose.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use bytes::Bytes;
use http::StatusCode;
use serde_json::{Value, json};

use super::{PORT, error, health};
use crate::serve::{self, PortArgs, env};

/// Products for which posted ratings are kept; more are refused.
const MAX_POSTED: usize = 1000;

/// How the service behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// Answers every request.
    Good,
    /// Answers half of the requests with 503.
    Faulty,
    /// Answers half of the requests after seven seconds.
    Delayed,
    /// Answers for a minute, then 503 for a minute, and so on.
    Unavailable,
    /// Its `/health` is good for 15 minutes, then bad for 15 minutes, and so on; requests follow it.
    Unhealthy,
}

impl Variant {
    fn from_env() -> anyhow::Result<Self> {
        if let Some(database) = env("DB_TYPE") {
            return Err(no_database(&format!("DB_TYPE={database}")));
        }
        match env("SERVICE_VERSION").as_deref() {
            Some(version) if version == "v2" || version.starts_with("v2-") => {
                Err(no_database(&format!("SERVICE_VERSION={version}")))
            }
            Some("v-faulty") => Ok(Self::Faulty),
            Some("v-delayed") => Ok(Self::Delayed),
            Some("v-unavailable") => Ok(Self::Unavailable),
            Some("v-unhealthy") => Ok(Self::Unhealthy),
            _ => Ok(Self::Good),
        }
    }
}

fn no_database(setting: &str) -> anyhow::Error {
    anyhow::anyhow!(
        "{setting} asks for ratings from a MySQL or MongoDB database, which this build does not have; \
         use ratings v1, which keeps them in memory"
    )
}

struct Ratings {
    variant: Variant,
    started: Instant,
    posted: Mutex<BTreeMap<u64, Value>>,
}

pub(crate) fn main(args: &[String]) -> anyhow::Result<()> {
    let variant = Variant::from_env()?;
    let port = PortArgs::port(args, PORT)?;
    serve::block_on(serve::serve("ratings", port, router(variant)))
}

/// `GET` and `POST /ratings/{id}`, and `/health`.
pub fn router(variant: Variant) -> Router {
    let ratings = Ratings {
        variant,
        started: Instant::now(),
        posted: Mutex::default(),
    };
    Router::new()
        .route("/health", get(healthy))
        .route("/ratings/{id}", get(read).post(write))
        .with_state(Arc::new(ratings))
}

/// Whether a service that changes every `period` is in one of its good periods.
fn in_good_period(up: Duration, period: Duration) -> bool {
    (up.as_secs() / period.as_secs()).is_multiple_of(2)
}

impl Ratings {
    fn is_healthy(&self) -> bool {
        self.variant != Variant::Unhealthy
            || in_good_period(self.started.elapsed(), Duration::from_secs(15 * 60))
    }

    fn is_available(&self) -> bool {
        match self.variant {
            Variant::Unavailable => in_good_period(self.started.elapsed(), Duration::from_secs(60)),
            Variant::Faulty => rand::random_bool(0.5),
            _ => self.is_healthy(),
        }
    }
}

async fn healthy(State(ratings): State<Arc<Ratings>>) -> Response {
    if ratings.is_healthy() {
        health(StatusCode::OK, "Ratings is healthy")
    } else {
        health(StatusCode::INTERNAL_SERVER_ERROR, "Ratings is not healthy")
    }
}

async fn read(State(ratings): State<Arc<Ratings>>, Path(id): Path<String>) -> Response {
    let Ok(id) = id.parse::<u64>() else {
        return error(StatusCode::BAD_REQUEST, "please provide numeric product ID");
    };
    if ratings.variant == Variant::Delayed && rand::random_bool(0.5) {
        tokio::time::sleep(Duration::from_secs(7)).await;
    }
    if !ratings.is_available() {
        return error(StatusCode::SERVICE_UNAVAILABLE, "Service unavailable");
    }
    let posted = ratings
        .posted
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    let stars = posted
        .get(&id)
        .cloned()
        .unwrap_or_else(|| json!({ "Reviewer1": 5, "Reviewer2": 4 }));
    Json(json!({ "id": id, "ratings": stars })).into_response()
}

async fn write(
    State(ratings): State<Arc<Ratings>>,
    Path(id): Path<String>,
    body: Bytes,
) -> Response {
    let Ok(id) = id.parse::<u64>() else {
        return error(StatusCode::BAD_REQUEST, "please provide numeric product ID");
    };
    let Ok(stars @ Value::Object(_)) = serde_json::from_slice::<Value>(&body) else {
        return error(StatusCode::BAD_REQUEST, "please provide valid ratings JSON");
    };
    let mut posted = ratings
        .posted
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    if posted.len() >= MAX_POSTED && !posted.contains_key(&id) {
        return error(
            StatusCode::INSUFFICIENT_STORAGE,
            "ratings of too many products are kept already",
        );
    }
    posted.insert(id, stars.clone());
    Json(json!({ "id": id, "ratings": stars })).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn periods_alternate_beginning_with_a_good_one() {
        let minute = Duration::from_secs(60);
        for (seconds, good) in [
            (0, true),
            (59, true),
            (60, false),
            (119, false),
            (120, true),
        ] {
            assert_eq!(
                in_good_period(Duration::from_secs(seconds), minute),
                good,
                "after {seconds} s"
            );
        }
    }
}
