//! What is counted about clusters and endpoints. Every worker counts in a place of its own, so that counting costs a plain addition; who
//! reads adds up.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($(#[$doc:meta])* $name:ident { $($(#[$each:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$each])* $variant,)* }

        impl $name {
            /// All of them with their names in Envoy's statistics.
            pub const ALL: &'static [(Self, &'static str)] = &[$((Self::$variant, $text),)*];
        }
    };
}

counters! {
    /// Of a cluster. Names ending in `_active` go up and down.
    Counter {
        /// Connections opened.
        CxTotal = "upstream_cx_total",
        /// Connections open.
        CxActive = "upstream_cx_active",
        /// Of them HTTP/1.1, opened.
        CxHttp1Total = "upstream_cx_http1_total",
        /// Of them HTTP/2, opened.
        CxHttp2Total = "upstream_cx_http2_total",
        /// Connecting failed (also by a timeout).
        CxConnectFail = "upstream_cx_connect_fail",
        /// Connecting took too long.
        CxConnectTimeout = "upstream_cx_connect_timeout",
        /// Connections of TCP clients that were given up after all their attempts.
        CxAttemptsExceeded = "upstream_cx_connect_attempts_exceeded",
        /// A connection was wanted beyond the limit.
        CxOverflow = "upstream_cx_overflow",
        /// Closed since they had had all their requests.
        CxMaxRequests = "upstream_cx_max_requests",
        /// Closed since they were old enough.
        CxMaxDuration = "upstream_cx_max_duration_reached",
        /// Closed since they were unused.
        CxIdleTimeout = "upstream_cx_idle_timeout",
        /// Requests sent (tries count).
        RqTotal = "upstream_rq_total",
        /// Requests under way.
        RqActive = "upstream_rq_active",
        /// Responses.
        RqCompleted = "upstream_rq_completed",
        /// Responses of 2xx.
        Rq2xx = "upstream_rq_2xx",
        /// Responses of 3xx.
        Rq3xx = "upstream_rq_3xx",
        /// Responses of 4xx.
        Rq4xx = "upstream_rq_4xx",
        /// Responses of 5xx.
        Rq5xx = "upstream_rq_5xx",
        /// Requests that waited for a connection.
        PendingTotal = "upstream_rq_pending_total",
        /// Requests that wait for a connection.
        PendingActive = "upstream_rq_pending_active",
        /// Requests refused by a limit.
        PendingOverflow = "upstream_rq_pending_overflow",
        /// Requests refused since connecting failed.
        PendingFailure = "upstream_rq_pending_failure_eject",
        /// Requests that took too long.
        RqTimeout = "upstream_rq_timeout",
        /// Tries that took too long.
        RqPerTryTimeout = "upstream_rq_per_try_timeout",
        /// Requests broken off by the endpoint.
        RqRxReset = "upstream_rq_rx_reset",
        /// Retries.
        RqRetry = "upstream_rq_retry",
        /// Retries that helped.
        RqRetrySuccess = "upstream_rq_retry_success",
        /// Retries refused by a limit.
        RqRetryOverflow = "upstream_rq_retry_overflow",
        /// Requests that failed though all their retries were made.
        RqRetryLimitExceeded = "upstream_rq_retry_limit_exceeded",
        /// Picks that ignored health.
        LbPanic = "lb_healthy_panic",
        /// Picks that found nobody.
        NoneHealthy = "upstream_cx_none_healthy",
        /// Endpoints taken out.
        EjectionsEnforced = "outlier_detection.ejections_enforced_total",
        /// Endpoints that were to be taken out when too many were.
        EjectionsOverflow = "outlier_detection.ejections_overflow",
        /// Detected by 5xx in a row.
        Detected5xx = "outlier_detection.ejections_detected_consecutive_5xx",
        /// Of them taken out.
        Enforced5xx = "outlier_detection.ejections_enforced_consecutive_5xx",
        /// Detected by gateway failures in a row.
        DetectedGateway = "outlier_detection.ejections_detected_consecutive_gateway_failure",
        /// Of them taken out.
        EnforcedGateway = "outlier_detection.ejections_enforced_consecutive_gateway_failure",
        /// Detected by local origin failures in a row.
        DetectedLocal = "outlier_detection.ejections_detected_consecutive_local_origin_failure",
        /// Of them taken out.
        EnforcedLocal = "outlier_detection.ejections_enforced_consecutive_local_origin_failure",
        /// Detected by success rate.
        DetectedRate = "outlier_detection.ejections_detected_success_rate",
        /// Of them taken out.
        EnforcedRate = "outlier_detection.ejections_enforced_success_rate",
        /// Detected by local origin success rate.
        DetectedLocalRate = "outlier_detection.ejections_detected_local_origin_success_rate",
        /// Of them taken out.
        EnforcedLocalRate = "outlier_detection.ejections_enforced_local_origin_success_rate",
        /// Detected by failure percentage.
        DetectedPercentage = "outlier_detection.ejections_detected_failure_percentage",
        /// Of them taken out.
        EnforcedPercentage = "outlier_detection.ejections_enforced_failure_percentage",
        /// Detected by local origin failure percentage.
        DetectedLocalPercentage = "outlier_detection.ejections_detected_failure_percentage_local_origin",
        /// Of them taken out.
        EnforcedLocalPercentage = "outlier_detection.ejections_enforced_failure_percentage_local_origin",
        /// TLS handshakes finished.
        SslHandshake = "ssl.handshake",
        /// Of them on an earlier session.
        SslSessionReused = "ssl.session_reused",
        /// TLS handshakes that failed for another reason than the certificate.
        SslError = "ssl.connection_error",
        /// Certificates that lead to no authority that is trusted.
        SslFailVerify = "ssl.fail_verify_error",
        /// Certificates for another name.
        SslFailName = "ssl.fail_verify_san",
        /// Connections not made since a secret was not there.
        SslNotReady = "client_ssl_socket_factory.upstream_context_secrets_not_ready",
        /// Lookups made.
        DnsAttempt = "update_attempt",
        /// Lookups answered.
        DnsSuccess = "update_success",
        /// Lookups that failed.
        DnsFailure = "update_failure",
    }
}

counters! {
    /// Of an endpoint, in the order of `/clusters`.
    HostCounter {
        /// Connections open.
        CxActive = "cx_active",
        /// Connecting failed.
        CxConnectFail = "cx_connect_fail",
        /// Connections opened.
        CxTotal = "cx_total",
        /// Requests under way.
        RqActive = "rq_active",
        /// Responses of 5xx, and requests without a response.
        RqError = "rq_error",
        /// Other responses.
        RqSuccess = "rq_success",
        /// Requests that took too long.
        RqTimeout = "rq_timeout",
        /// Requests sent.
        RqTotal = "rq_total",
    }
}

/// The counters of one worker. Only that worker writes; anybody may read.
#[derive(Debug)]
pub struct Shard<const N: usize>([AtomicU64; N]);

/// Counters of a cluster.
pub type ClusterShard = Shard<{ Counter::ALL.len() }>;
/// Counters of an endpoint.
pub type HostShard = Shard<{ HostCounter::ALL.len() }>;

impl<const N: usize> Default for Shard<N> {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; N])
    }
}

impl<const N: usize> Shard<N> {
    fn change(&self, index: usize, by: u64) {
        if let Some(value) = self.0.get(index) {
            // One writer: no need for an atomic addition.
            value.store(
                value.load(Ordering::Relaxed).wrapping_add(by),
                Ordering::Relaxed,
            );
        }
    }

    fn value(&self, index: usize) -> u64 {
        self.0.get(index).map_or(0, |v| v.load(Ordering::Relaxed))
    }
}

impl ClusterShard {
    /// One more.
    pub fn inc(&self, counter: Counter) {
        self.change(counter as usize, 1);
    }

    /// One less.
    pub fn dec(&self, counter: Counter) {
        self.change(counter as usize, u64::MAX);
    }

    /// The present value.
    pub fn of(&self, counter: Counter) -> u64 {
        self.value(counter as usize)
    }

    /// One more, where several threads may count at once.
    pub(crate) fn inc_shared(&self, counter: Counter) {
        if let Some(value) = self.0.get(counter as usize) {
            value.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl HostShard {
    /// One more.
    pub fn inc(&self, counter: HostCounter) {
        self.change(counter as usize, 1);
    }

    /// One less.
    pub fn dec(&self, counter: HostCounter) {
        self.change(counter as usize, u64::MAX);
    }

    /// The present value.
    pub fn of(&self, counter: HostCounter) -> u64 {
        self.value(counter as usize)
    }
}
