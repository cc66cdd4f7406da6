//! The control plane's metrics, with the names that Istio's dashboards ask for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mesh_model::Mesh;
use mesh_xds::types;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

type Labels = Vec<(&'static str, String)>;

/// All metrics. Counters named `…_total` are registered without the ending, which the text form adds.
pub(crate) struct Metrics {
    registry: Registry,
    xds: Family<Labels, Gauge>,
    pushes: Family<Labels, Counter>,
    convergence: Histogram,
    build: Histogram,
    rejects: Family<Labels, Gauge>,
    total_rejects: Counter,
    expired_nonce: Family<Labels, Counter>,
    refused: Family<Labels, Counter>,
    services: Gauge,
    virtual_services: Gauge,
    pub(crate) inject_requests: Counter,
    pub(crate) inject_success: Counter,
    pub(crate) inject_failure: Counter,
    pub(crate) inject_skip: Counter,
    pub(crate) validation_passed: Family<Labels, Counter>,
    pub(crate) validation_failed: Family<Labels, Counter>,
    pub(crate) citadel: Citadel,
    connected: AtomicU64,
    version: String,
}

const SECONDS: [f64; 11] = [
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 3.0, 5.0, 10.0,
];

impl Metrics {
    pub(crate) fn new(version: &str) -> Self {
        let mut registry = Registry::default();
        let info: Family<Labels, Gauge> = Family::default();
        registry.register("pilot_info", "Version of the control plane", info.clone());
        info.get_or_create(&vec![("version", version.to_owned())])
            .set(1);
        let build_info: Family<Labels, Gauge> = Family::default();
        registry.register("istio_build", "Component and version", build_info.clone());
        build_info
            .get_or_create(&vec![
                ("component", "pilot".to_owned()),
                ("tag", version.to_owned()),
            ])
            .set(1);
        let metrics = Self {
            registry: Registry::default(),
            xds: Family::default(),
            pushes: Family::default(),
            convergence: Histogram::new(SECONDS),
            build: Histogram::new(SECONDS),
            rejects: Family::default(),
            total_rejects: Counter::default(),
            expired_nonce: Family::default(),
            refused: Family::default(),
            services: Gauge::default(),
            virtual_services: Gauge::default(),
            inject_requests: Counter::default(),
            inject_success: Counter::default(),
            inject_failure: Counter::default(),
            inject_skip: Counter::default(),
            validation_passed: Family::default(),
            validation_failed: Family::default(),
            citadel: Citadel::default(),
            connected: AtomicU64::new(0),
            version: version.to_owned(),
        };
        metrics.register(&mut registry);
        metrics.citadel.register(&mut registry);
        Self {
            registry,
            ..metrics
        }
    }

    fn register(&self, registry: &mut Registry) {
        add(registry, "pilot_xds", "Connected proxies", &self.xds);
        add(
            registry,
            "pilot_xds_pushes",
            "Responses sent, by type",
            &self.pushes,
        );
        add(
            registry,
            "pilot_proxy_convergence_time",
            "Seconds from a change to its being sent to a proxy",
            &self.convergence,
        );
        add(
            registry,
            "pilot_pushcontext_init_seconds",
            "Seconds from a change to the mesh that holds it",
            &self.build,
        );
        add(
            registry,
            "pilot_xds_rejects",
            "Resources refused by proxies, by type",
            &self.rejects,
        );
        add(
            registry,
            "pilot_total_xds_rejects",
            "Responses refused by proxies",
            &self.total_rejects,
        );
        add(
            registry,
            "pilot_xds_expired_nonce",
            "Answers to what was not asked",
            &self.expired_nonce,
        );
        add(
            registry,
            "pilot_xds_auth_failures",
            "Discovery streams refused for want of credentials, by reason",
            &self.refused,
        );
        add(
            registry,
            "pilot_services",
            "Services in the mesh",
            &self.services,
        );
        add(
            registry,
            "pilot_virt_services",
            "VirtualServices in the mesh",
            &self.virtual_services,
        );
        add(
            registry,
            "sidecar_injection_requests",
            "Pods that came to the injector",
            &self.inject_requests,
        );
        add(
            registry,
            "sidecar_injection_success",
            "Pods that got a sidecar",
            &self.inject_success,
        );
        add(
            registry,
            "sidecar_injection_failure",
            "Pods that were refused",
            &self.inject_failure,
        );
        add(
            registry,
            "sidecar_injection_skip",
            "Pods that need no sidecar",
            &self.inject_skip,
        );
        add(
            registry,
            "galley_validation_passed",
            "Objects found valid, by kind",
            &self.validation_passed,
        );
        add(
            registry,
            "galley_validation_failed",
            "Objects found invalid, by kind",
            &self.validation_failed,
        );
    }

    pub(crate) fn mesh_built(&self, mesh: &Mesh, took: Duration) {
        let (virtual_services, _, _) = mesh.rule_counts();
        self.services.set(count(mesh.services().count()));
        self.virtual_services.set(count(virtual_services));
        self.build.observe(took.as_secs_f64());
    }

    pub(crate) fn node_connected(self: &Arc<Self>) -> Connected {
        self.connected.fetch_add(1, Ordering::Relaxed);
        self.show_connected();
        Connected(Arc::clone(self))
    }

    fn show_connected(&self) {
        let connected = i64::try_from(self.connected.load(Ordering::Relaxed)).unwrap_or(i64::MAX);
        self.xds
            .get_or_create(&vec![("version", self.version.clone())])
            .set(connected);
    }

    pub(crate) fn sent(&self, type_url: &str, since_change: Option<Duration>) {
        self.pushes.get_or_create(&kind(type_url)).inc();
        if let Some(took) = since_change {
            self.convergence.observe(took.as_secs_f64());
        }
    }

    pub(crate) fn rejected(&self, type_url: &str, resources: usize) {
        self.total_rejects.inc();
        self.rejects
            .get_or_create(&kind(type_url))
            .set(count(resources));
    }

    pub(crate) fn accepted(&self, type_url: &str) {
        if let Some(gauge) = self.rejects.get(&kind(type_url)) {
            gauge.set(0);
        }
    }

    /// Counts a stream that was not let in.
    pub(crate) fn xds_refused(&self, reason: &'static str) {
        self.refused
            .get_or_create(&vec![("reason", reason.to_owned())])
            .inc();
    }

    pub(crate) fn stale(&self, type_url: &str) {
        self.expired_nonce.get_or_create(&kind(type_url)).inc();
    }

    /// The exposition in OpenMetrics text.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String can't fail; a metric that can't be written is left out.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

/// The authority's metrics. Gauges that only go up: counters would be written with the ending `_total`, which Istio's names don't have.
#[derive(Default)]
pub(crate) struct Citadel {
    pub(crate) requests: Gauge,
    pub(crate) authentication_failures: Gauge,
    pub(crate) unreadable: Gauge,
    pub(crate) forbidden: Gauge,
    errors: Family<Labels, Gauge>,
    pub(crate) issued: Gauge,
    pub(crate) load_failures: Gauge,
    pub(crate) restored: Gauge,
    pub(crate) root_expiry: Gauge,
    pub(crate) chain_expiry: Gauge,
}

impl Citadel {
    fn register(&self, registry: &mut Registry) {
        add(
            registry,
            "citadel_server_csr_count",
            "Certificate requests",
            &self.requests,
        );
        add(
            registry,
            "citadel_server_authentication_failure_count",
            "Certificate requests of callers that could not be authenticated",
            &self.authentication_failures,
        );
        add(
            registry,
            "citadel_server_csr_parsing_err_count",
            "Certificate requests that could not be read",
            &self.unreadable,
        );
        add(
            registry,
            "citadel_server_id_extraction_err_count",
            "Certificate requests for what the caller must not have",
            &self.forbidden,
        );
        add(
            registry,
            "citadel_server_csr_sign_err_count",
            "Certificate requests refused, by reason",
            &self.errors,
        );
        add(
            registry,
            "citadel_server_success_cert_issuance_count",
            "Certificates issued",
            &self.issued,
        );
        add(
            registry,
            "citadel_server_cert_load_failure_count",
            "Times that the authority's Secret could not be used",
            &self.load_failures,
        );
        add(
            registry,
            "citadel_server_secret_restored_count",
            "Times that the authority's Secret was deleted and written again",
            &self.restored,
        );
        add(
            registry,
            "citadel_server_root_cert_expiry_timestamp",
            "End of validity of the first root to expire, seconds since 1970",
            &self.root_expiry,
        );
        add(
            registry,
            "citadel_server_cert_chain_expiry_timestamp",
            "End of validity of the issuing certificate and its chain, seconds since 1970",
            &self.chain_expiry,
        );
    }

    /// Counts a refused request.
    pub(crate) fn refused(&self, reason: &'static str) {
        self.errors
            .get_or_create(&vec![("error", reason.to_owned())])
            .inc();
    }
}

fn add(registry: &mut Registry, name: &str, help: &str, metric: &(impl Metric + Clone)) {
    registry.register(name, help, metric.clone());
}

/// Counts a connected node until it is dropped.
pub(crate) struct Connected(Arc<Metrics>);

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.connected.fetch_sub(1, Ordering::Relaxed);
        self.0.show_connected();
    }
}

fn kind(type_url: &str) -> Labels {
    vec![("type", types::short_name(type_url).to_lowercase())]
}

/// Labels of a Kubernetes kind.
pub(crate) fn resource(kind: &str) -> Labels {
    vec![("resource", kind.to_owned())]
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
