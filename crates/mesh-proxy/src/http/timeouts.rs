//! The limits of one request: those of route and connection manager, and what the request's own headers say
//! (Envoy: `FilterUtility::finalTimeout`, "How do I configure timeouts?").

use std::task::Poll;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use mesh_routing::action::Forward;
use mesh_routing::hcm::HttpManager;
use mesh_routing::retry::RetryPolicy;
use tokio::time::Instant;

use crate::attempt::Failure;
use crate::report::Flow;

const TIMEOUT: HeaderName = HeaderName::from_static("x-envoy-upstream-rq-timeout-ms");
const PER_TRY: HeaderName = HeaderName::from_static("x-envoy-upstream-rq-per-try-timeout-ms");
const STREAM: HeaderName = HeaderName::from_static("x-envoy-upstream-stream-duration-ms");
const ALTERNATIVE: HeaderName = HeaderName::from_static("x-envoy-upstream-rq-timeout-alt-response");
const EXPECTED: HeaderName = HeaderName::from_static("x-envoy-expected-rq-timeout-ms");
const GRPC: HeaderName = HeaderName::from_static("grpc-timeout");

/// The limits of one request.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// From the end of the request to the end of the response, all tries together.
    pub global: Option<Duration>,
    /// The same for one try.
    pub per_try: Option<Duration>,
    /// Longest silence within one try.
    pub per_try_idle: Option<Duration>,
    /// Longest silence on the stream.
    pub idle: Option<Duration>,
    /// For the request to arrive whole.
    pub request: Option<Duration>,
    /// For the whole exchange.
    pub stream: Option<Duration>,
    /// Answer 204 instead of 504.
    pub no_content: bool,
    /// When the request began.
    pub started: Instant,
}

impl Timeouts {
    /// Finds the limits, takes their headers off the request and tells the endpoint what to expect. `controls`: the request has headers
    /// that begin with `x-envoy-`.
    pub fn of(
        route: &Forward,
        policy: Option<&RetryPolicy>,
        manager: &HttpManager,
        headers: &mut HeaderMap,
        is_grpc: bool,
        controls: bool,
    ) -> Self {
        // A route that limits the whole exchange has no other timeout (Envoy: `usingNewTimeouts`).
        let old = route.stream_duration.is_none();
        let mut timeouts = Self {
            global: route.timeout.filter(|_| old),
            per_try: policy.and_then(|policy| policy.per_try_timeout),
            per_try_idle: policy.and_then(|policy| policy.per_try_idle_timeout),
            idle: route.idle_timeout.unwrap_or(manager.stream_idle_timeout),
            request: manager.request_timeout,
            stream: manager.max_stream_duration,
            no_content: false,
            started: Instant::now(),
        };
        let grpc_timeout_rules = is_grpc && old && route.grpc_timeout.is_some();
        if grpc_timeout_rules && let Some(limit) = &route.grpc_timeout {
            timeouts.global = limit.apply(grpc_timeout(headers));
        }
        if let Some(limit) = &route.stream_duration {
            timeouts.stream = match (&limit.grpc, grpc_timeout(headers)) {
                (Some(grpc), Some(wanted)) if is_grpc => grpc.apply(Some(wanted)),
                _ => limit.max.unwrap_or(timeouts.stream),
            };
        }
        if controls {
            if let Some(millis) = take_millis(headers, &TIMEOUT) {
                timeouts.global = millis;
            }
            if let Some(millis) = take_millis(headers, &PER_TRY) {
                timeouts.per_try = millis;
            }
            if let Some(millis) = take_millis(headers, &STREAM) {
                timeouts.stream = millis;
            }
            timeouts.no_content = headers.remove(&ALTERNATIVE).is_some();
        }
        if let (Some(per_try), Some(global)) = (timeouts.per_try, timeouts.global)
            && per_try >= global
        {
            timeouts.per_try = None;
        }
        timeouts.announce(headers, grpc_timeout_rules);
        timeouts
    }

    fn announce(&self, headers: &mut HeaderMap, grpc: bool) {
        let Some(expected) = self.per_try.or(self.global) else {
            return;
        };
        let millis = u64::try_from(expected.as_millis()).unwrap_or(u64::MAX);
        headers.insert(EXPECTED, HeaderValue::from(millis));
        if grpc && let Ok(value) = HeaderValue::from_str(&grpc_text(millis)) {
            headers.insert(GRPC, value);
        }
    }

    /// Is there nothing to watch while the response is waited for?
    pub fn are_none(&self, flow: &Flow) -> bool {
        self.global.is_none()
            && self.per_try.is_none()
            && self.per_try_idle.is_none()
            && self.idle.is_none()
            && self.stream.is_none()
            && (self.request.is_none() || flow.is_request_done())
    }

    /// Ends when the first limit is reached, with what that is. `tried`: when the present try began.
    pub async fn expire(&self, flow: &Flow, tried: Instant) -> Failure {
        loop {
            let finished = flow.finished();
            let after_request = |limit: Option<Duration>, from: Instant| {
                limit
                    .zip(finished)
                    .map(|(limit, finished)| finished.max(from) + limit)
            };
            let silent = |limit: Option<Duration>, from: Instant| {
                limit.map(|limit| flow.touched().max(from) + limit)
            };
            let request = self.request.filter(|_| finished.is_none());
            let limits = [
                (after_request(self.global, self.started), Failure::Timeout),
                (after_request(self.per_try, tried), Failure::PerTry),
                (silent(self.per_try_idle, tried), Failure::PerTry),
                (silent(self.idle, self.started), Failure::Idle),
                (request.map(|limit| self.started + limit), Failure::Request),
                (self.end(), Failure::Duration),
            ];
            let first = limits
                .into_iter()
                .filter_map(|(at, failure)| Some((at?, failure)))
                .min_by_key(|(at, _)| *at);
            match first {
                Some((at, failure)) if at <= Instant::now() => return failure,
                Some((at, _)) => tokio::select! {
                    () = tokio::time::sleep_until(at) => {}
                    () = end_of(flow), if finished.is_none() => {}
                },
                None => end_of(flow).await,
            }
        }
    }

    /// End of the stream at the latest.
    pub fn end(&self) -> Option<Instant> {
        self.stream.map(|limit| self.started + limit)
    }
}

/// The client has sent its request whole; never, if it has already.
async fn end_of(flow: &Flow) {
    let was_done = flow.is_request_done();
    std::future::poll_fn(|cx| {
        if flow.is_request_done() && !was_done {
            return Poll::Ready(());
        }
        flow.wait_for_end(cx);
        Poll::Pending
    })
    .await;
}

/// Zero is no limit; a text that is no number is left alone.
fn take_millis(headers: &mut HeaderMap, name: &HeaderName) -> Option<Option<Duration>> {
    let value = headers.remove(name)?;
    let millis: u64 = value.to_str().ok()?.trim().parse().ok()?;
    Some(Some(Duration::from_millis(millis)).filter(|limit| !limit.is_zero()))
}

/// The `grpc-timeout` of a request (gRPC over HTTP/2, "Timeout").
fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(GRPC)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

/// At most eight digits, rounded down to the unit that fits.
fn grpc_text(millis: u64) -> String {
    match millis {
        0..=99_999_999 => format!("{millis}m"),
        100_000_000..=99_999_999_999 => format!("{}S", millis / 1000),
        _ => format!("{}H", (millis / 3_600_000).min(99_999_999)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_timeouts_have_eight_digits_and_a_unit() {
        let parse = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(GRPC, HeaderValue::from_str(text).expect("a value"));
            grpc_timeout(&headers)
        };
        assert_eq!(parse("2S"), Some(Duration::from_secs(2)));
        assert_eq!(parse("1500m"), Some(Duration::from_millis(1500)));
        assert_eq!(parse("1H"), Some(Duration::from_secs(3600)));
        for bad in ["", "S", "5", "123456789m", "-1S", "1x", "1\u{e4}"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
        assert_eq!(grpc_text(1500), "1500m");
        assert_eq!(grpc_text(100_000_000), "100000S");
    }
}
