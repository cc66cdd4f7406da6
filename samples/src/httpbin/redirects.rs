//! Endpoints whose answer is a status.

use axum::extract::{Path, RawQuery};
use axum::response::{IntoResponse, Response};
use http::header::{LOCATION, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, StatusCode, Uri};

use super::{inspect, number, refuse};

/// Longest chain of redirects.
const MOST: u64 = 100;

fn found(location: &str) -> Response {
    (StatusCode::FOUND, [(LOCATION, location)]).into_response()
}

pub(super) async fn relative(Path(count): Path<String>) -> Response {
    match number(&count, MOST) {
        Ok(0) => refuse(
            StatusCode::BAD_REQUEST,
            "the number of redirects begins at 1",
        ),
        Ok(1) => found("/get"),
        Ok(count) => found(&format!("/relative-redirect/{}", count - 1)),
        Err(refusal) => refusal,
    }
}

pub(super) async fn absolute(Path(count): Path<String>, uri: Uri, headers: HeaderMap) -> Response {
    let host = inspect::authority(&uri, &headers);
    match number(&count, MOST) {
        Ok(0) => refuse(
            StatusCode::BAD_REQUEST,
            "the number of redirects begins at 1",
        ),
        Ok(1) => found(&format!("http://{host}/get")),
        Ok(count) => found(&format!("http://{host}/absolute-redirect/{}", count - 1)),
        Err(refusal) => refusal,
    }
}

pub(super) async fn to(RawQuery(query): RawQuery) -> Response {
    let pairs = inspect::pairs(&query.unwrap_or_default());
    let first = |name: &str| pairs.get(name).and_then(|values| values.first());
    let Some(location) = first("url").and_then(|url| HeaderValue::try_from(url).ok()) else {
        return refuse(
            StatusCode::BAD_REQUEST,
            "the argument url is missing or not a URL",
        );
    };
    let status = match first("status_code") {
        None => Some(StatusCode::FOUND),
        Some(code) => code.parse().ok().filter(StatusCode::is_redirection),
    };
    match status {
        Some(status) => (status, [(LOCATION, location)]).into_response(),
        None => refuse(
            StatusCode::BAD_REQUEST,
            "the argument status_code is not from 300 to 399",
        ),
    }
}

pub(super) async fn status(Path(codes): Path<String>) -> Response {
    match choices(&codes) {
        Ok(choices) => plain(pick(&choices, rand::random())),
        Err(detail) => refuse(StatusCode::BAD_REQUEST, &detail),
    }
}

/// Fails as often as `failure_rate` (0 to 1, default one half) says.
pub(super) async fn unstable(RawQuery(query): RawQuery) -> Response {
    let pairs = inspect::pairs(&query.unwrap_or_default());
    let rate = pairs
        .get("failure_rate")
        .and_then(|values| values.first())
        .map_or(Ok(0.5), |text| text.parse::<f64>());
    match rate {
        Ok(rate) if (0.0..=1.0).contains(&rate) => plain(if rand::random::<f64>() < rate {
            StatusCode::INTERNAL_SERVER_ERROR
        } else {
            StatusCode::OK
        }),
        _ => refuse(
            StatusCode::BAD_REQUEST,
            "the argument failure_rate is not a number from 0 to 1",
        ),
    }
}

/// Codes with their weights: `200`, `200,503`, `200:0.9,503:0.1`.
fn choices(text: &str) -> Result<Vec<(StatusCode, f64)>, String> {
    text.split(',')
        .map(|choice| {
            let (code, weight) = choice.split_once(':').unwrap_or((choice, "1"));
            // Below 200 an answer is only announced: it can't be one.
            let status = code
                .trim()
                .parse::<u16>()
                .ok()
                .filter(|code| (200..600).contains(code));
            let status = status.and_then(|code| StatusCode::from_u16(code).ok());
            let weight = weight
                .trim()
                .parse::<f64>()
                .ok()
                .filter(|weight| weight.is_finite() && *weight >= 0.0);
            status.zip(weight).ok_or_else(|| {
                format!("{choice:?} is not a status from 200 to 599 with an optional weight")
            })
        })
        .collect()
}

/// The choice at the place `random` (0 to 1) of the weights.
fn pick(choices: &[(StatusCode, f64)], random: f64) -> StatusCode {
    let mut left = random * choices.iter().map(|(_, weight)| weight).sum::<f64>();
    for (status, weight) in choices {
        if left < *weight {
            return *status;
        }
        left -= weight;
    }
    choices.last().map_or(StatusCode::OK, |(status, _)| *status)
}

fn plain(status: StatusCode) -> Response {
    match status.as_u16() {
        301..=303 | 305 | 307 | 308 => (status, [(LOCATION, "/redirect/1")]).into_response(),
        401 => (status, [(WWW_AUTHENTICATE, "Basic realm=\"Fake Realm\"")]).into_response(),
        418 => (status, "I'm a teapot!\n").into_response(),
        _ => status.into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weighted_statuses_are_parsed_and_picked() {
        let choices = choices("200:3,503:1").unwrap();
        assert_eq!(pick(&choices, 0.0), StatusCode::OK);
        assert_eq!(pick(&choices, 0.74), StatusCode::OK);
        assert_eq!(pick(&choices, 0.76), StatusCode::SERVICE_UNAVAILABLE);
        for bad in ["", "abc", "99", "101", "600", "200:x", "200:-1", "200,,"] {
            assert!(super::choices(bad).is_err(), "{bad:?}");
        }
    }
}
