//! Request headers that an application copies from the request it serves to the requests it makes meanwhile, so that a
//! mesh can join the hops to one trace and route by who is asking.

use http::{HeaderMap, HeaderName};

/// Names of the headers to copy: request id, the trace contexts of the tracers that Istio supports (Istio's "distributed
/// tracing" documentation), and what the Bookinfo tasks route and authorise by.
pub const HEADERS: &[&str] = &[
    "x-request-id",
    "traceparent",
    "tracestate",
    "baggage",
    "b3",
    "x-b3-traceid",
    "x-b3-spanid",
    "x-b3-parentspanid",
    "x-b3-sampled",
    "x-b3-flags",
    "x-ot-span-context",
    "x-datadog-trace-id",
    "x-datadog-parent-id",
    "x-datadog-sampling-priority",
    "x-cloud-trace-context",
    "grpc-trace-bin",
    "sw8",
    "end-user",
    "user-agent",
    "cookie",
    "authorization",
    "jwt",
];

/// The headers of `incoming` that go on.
pub fn propagated(incoming: &HeaderMap) -> HeaderMap {
    let mut outgoing = HeaderMap::with_capacity(8);
    for name in HEADERS.iter().copied().map(HeaderName::from_static) {
        for value in incoming.get_all(&name) {
            outgoing.append(name.clone(), value.clone());
        }
    }
    outgoing
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn copies_listed_headers_with_all_values_and_nothing_else() {
        let mut incoming = HeaderMap::new();
        for name in HEADERS {
            incoming.insert(HeaderName::from_static(name), HeaderValue::from_static("v"));
        }
        incoming.append("baggage", HeaderValue::from_static("second"));
        incoming.insert("host", HeaderValue::from_static("productpage"));
        incoming.insert("content-length", HeaderValue::from_static("5"));

        let outgoing = propagated(&incoming);

        assert_eq!(outgoing.keys_len(), HEADERS.len());
        assert_eq!(outgoing.get_all("baggage").iter().count(), 2);
        assert!(!outgoing.contains_key("host") && !outgoing.contains_key("content-length"));
    }
}
