//! Endpoints that take their time.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, RawQuery, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::stream::{self, StreamExt as _};
use http::{HeaderMap, Method, StatusCode, Uri};
use serde_json::{Value, json};

use super::{Shared, bodies, inspect, number, pretty, refuse, typed};
use crate::serve::Peer;

/// Longest delay and longest drip.
const LONGEST: Duration = Duration::from_secs(10);
/// Most objects in a stream.
const MOST_OBJECTS: u64 = 100;
/// Most bytes that drip.
const MOST_DRIPS: u64 = 10 * 1024;

/// A time as a number of seconds or with a unit (`1.5`, `200ms`, `2s`), at most [`LONGEST`].
fn duration(text: &str) -> Option<Duration> {
    let (number, scale) = match text {
        text if text.ends_with("ms") => (text.trim_end_matches("ms"), 0.001),
        text if text.ends_with('s') => (text.trim_end_matches('s'), 1.0),
        text if text.ends_with('m') => (text.trim_end_matches('m'), 60.0),
        text => (text, 1.0),
    };
    let seconds = number.parse::<f64>().ok()? * scale;
    Duration::try_from_secs_f64(seconds)
        .ok()
        .map(|time| time.min(LONGEST))
}

pub(super) async fn delay(
    State(style): State<Shared>,
    Path(seconds): Path<String>,
    peer: Peer,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
) -> Response {
    let Some(delay) = duration(&seconds) else {
        return refuse(
            StatusCode::BAD_REQUEST,
            &format!("{seconds:?} is not a time such as 3, 1.5 or 200ms"),
        );
    };
    tokio::time::sleep(delay).await;
    pretty(&Value::Object(inspect::describe(
        *style, peer, &method, &uri, &headers,
    )))
}

/// So many JSON objects, one a line, each a chunk of its own.
pub(super) async fn stream(
    State(style): State<Shared>,
    Path(count): Path<String>,
    peer: Peer,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
) -> Response {
    let count = match number(&count, MOST_OBJECTS) {
        Ok(count) => count,
        Err(refusal) => return refusal,
    };
    let shown = inspect::describe(*style, peer, &method, &uri, &headers);
    let lines = stream::iter(0..count).map(move |id| {
        let mut object = shown.clone();
        object.insert("id".into(), json!(id));
        Ok::<_, Infallible>(Bytes::from(format!("{}\n", Value::Object(object))))
    });
    typed("application/json", Body::from_stream(lines))
}

/// Random bytes in chunks of `chunk_size` (default 10 KiB), without a length.
pub(super) async fn stream_bytes(Path(count): Path<String>, RawQuery(query): RawQuery) -> Response {
    let arguments = inspect::pairs(&query.unwrap_or_default());
    let count = match number(&count, bodies::MOST_BYTES) {
        Ok(count) => count,
        Err(refusal) => return refusal,
    };
    let size = argument(&arguments, "chunk_size")
        .and_then(|text| text.parse::<usize>().ok())
        .unwrap_or(10 * 1024)
        .max(1);
    let bytes = Bytes::from(bodies::noise(count, bodies::seed(&arguments)));
    let starts = (0..bytes.len()).step_by(size);
    let chunks = stream::iter(starts.map(move |start| {
        let end = (start + size).min(bytes.len());
        Ok::<_, Infallible>(bytes.slice(start..end))
    }));
    typed("application/octet-stream", Body::from_stream(chunks))
}

fn argument<'a>(arguments: &'a BTreeMap<String, Vec<String>>, name: &str) -> Option<&'a str> {
    arguments.get(name)?.first().map(String::as_str)
}

/// `numbytes` stars over `duration`, after `delay`, with status `code`.
pub(super) async fn drip(RawQuery(query): RawQuery) -> Response {
    let arguments = inspect::pairs(&query.unwrap_or_default());
    let time =
        |name: &str, default: Duration| argument(&arguments, name).map_or(Some(default), duration);
    let count = argument(&arguments, "numbytes").map_or(Some(10), |text| text.parse::<u64>().ok());
    let code = argument(&arguments, "code").map_or(Some(StatusCode::OK), |text| {
        text.parse()
            .ok()
            .filter(|code: &StatusCode| code.as_u16() >= 200)
    });
    let (Some(total), Some(delay), Some(count), Some(code)) = (
        time("duration", Duration::from_secs(2)),
        time("delay", Duration::ZERO),
        count,
        code,
    ) else {
        return refuse(
            StatusCode::BAD_REQUEST,
            "duration, delay, numbytes or code is not understood",
        );
    };
    let count = count.clamp(1, MOST_DRIPS);
    let pause = total / u32::try_from(count).unwrap_or(u32::MAX);
    tokio::time::sleep(delay).await;
    let stars = stream::iter(0..count).then(move |index| async move {
        if index > 0 {
            tokio::time::sleep(pause).await;
        }
        Ok::<_, Infallible>(Bytes::from_static(b"*"))
    });
    (
        code,
        typed("application/octet-stream", Body::from_stream(stars)),
    )
        .into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units_and_a_limit() {
        assert_eq!(duration("1.5"), Some(Duration::from_millis(1500)));
        assert_eq!(duration("200ms"), Some(Duration::from_millis(200)));
        assert_eq!(duration("2s"), Some(Duration::from_secs(2)));
        assert_eq!(duration("1m"), Some(LONGEST));
        for bad in ["", "x", "-1", "NaN", "1h"] {
            assert_eq!(duration(bad), None, "{bad:?}");
        }
    }
}
