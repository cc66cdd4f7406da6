//! How a proxy is started: from the environment that the injector writes.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::agent::probes::{self, AppProbe};
use crate::dns::DnsOptions;
use crate::identity::IdentityOptions;

/// Which kind of proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Beside an application.
    Sidecar,
    /// A gateway.
    Router,
}

impl Role {
    /// As it stands in the node id.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sidecar => "sidecar",
            Self::Router => "router",
        }
    }
}

/// Ports that the proxy itself serves; 0 switches one off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// Admin, on 127.0.0.1. Default 15000.
    pub admin: u16,
    /// Agent (merged metrics, readiness), on all addresses. Default 15020.
    pub agent: u16,
    /// Health, on all addresses. Default 15021.
    pub health: u16,
    /// Metrics, on all addresses. Default 15090.
    pub metrics: u16,
}

impl Default for Ports {
    fn default() -> Self {
        Self {
            admin: 15000,
            agent: 15020,
            health: 15021,
            metrics: 15090,
        }
    }
}

/// Everything that a proxy must know before its first resource.
#[derive(Debug, Clone)]
pub struct ProxyOptions {
    /// Which kind.
    pub role: Role,
    /// `host:port` of control planes; empty runs on the kept resources alone. In TLS where there is an identity and the port is 15012, else
    /// in plain text.
    pub discovery: Vec<String>,
    /// How it gets its certificate; `None` does without mutual TLS. Set where `CA_ADDR` is, or the control plane's port is 15012.
    pub identity: Option<IdentityOptions>,
    /// The pod's name.
    pub pod: String,
    /// Its namespace.
    pub namespace: String,
    /// Its address.
    pub ip: IpAddr,
    /// DNS domain of the namespace, as `default.svc.cluster.local`.
    pub domain: String,
    /// Labels of the pod.
    pub labels: BTreeMap<String, String>,
    /// Node metadata sent to the control plane (`ISTIO_META_*` and what follows from the rest).
    pub metadata: Map<String, Value>,
    /// Worker threads, at least 1.
    pub concurrency: usize,
    /// Ports that the proxy itself serves.
    pub ports: Ports,
    /// Where the last good resources are kept; `None` keeps none.
    pub state_dir: Option<PathBuf>,
    /// How long connections may finish after SIGTERM. Default 5 s.
    pub termination_drain: Duration,
    /// Set (`EXIT_ON_ZERO_ACTIVE_CONNECTIONS`), the last connection decides about the end in place of `termination_drain`, but not before this time
    /// is over (`MINIMUM_DRAIN_DURATION`, 5 s).
    pub exit_on_zero: Option<Duration>,
    /// How long connections may go on after their filter chain was changed or taken away, and the drain time of `/drain_listeners?graceful`
    /// (`drainDuration`). Default 45 s, as with Istio.
    pub drain: Duration,
    /// Where the application's own metrics are, from `ISTIO_PROMETHEUS_ANNOTATIONS` (port, path).
    pub app_metrics: Option<(u16, String)>,
    /// How the application's DNS queries are answered; `None` where they are not captured. Set for a sidecar with `ISTIO_META_DNS_CAPTURE`.
    pub dns: Option<DnsOptions>,
    /// Probes of the application that the agent makes, by the path that stands for them, from `ISTIO_KUBE_APP_PROBERS`.
    pub app_probes: BTreeMap<String, AppProbe>,
}

/// Why the environment cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// A variable does not parse.
    #[error("environment variable {name}={value:?}: {reason}")]
    Variable {
        /// Its name.
        name: &'static str,
        /// Its value.
        value: String,
        /// What is wrong, and what is expected.
        reason: String,
    },
    /// The pod's resolvers cannot be read.
    #[error("reading the resolvers to which DNS queries go on from {RESOLV_CONF}: {0}")]
    Resolvers(std::io::Error),
    /// A file of labels cannot be read.
    #[error("reading labels from {path}: {source}")]
    Labels {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// The pod's resolvers.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Where the pod's labels are mounted (downward API).
const LABELS_FILE: &str = "/etc/istio/pod/labels";
/// Where state is kept unless told otherwise; an emptyDir that outlives the container, not the pod.
const STATE_DIR: &str = "/var/lib/istio/data";

/// Where the control plane is unless told otherwise, for a proxy without an identity.
const CONTROL_PLANE: &str = "istiod.istio-system.svc:15010";
/// The same for one with an authority (Istio's default).
const SECURE_CONTROL_PLANE: &str = "istiod.istio-system.svc:15012";
/// Ending of the address of a control plane that is spoken to in TLS.
pub(crate) const SECURE_PORT: &str = ":15012";
/// Where the certificate and its key are kept for the next process, in memory.
const CREDENTIALS_DIR: &str = "/var/run/secrets/workload-spiffe-credentials";

impl ProxyOptions {
    /// Reads the environment of this process and the pod's labels.
    pub fn from_env(role: Role) -> Result<Self, OptionsError> {
        Self::from_vars(role, std::env::vars().collect(), Path::new(LABELS_FILE))
    }

    /// The same from given variables. `POD_NAME`, `POD_NAMESPACE`, `INSTANCE_IP`, `SERVICE_ACCOUNT`, `PROXY_CONFIG` (JSON, Istio's
    /// `ProxyConfig`), `ISTIO_META_*`, `ISTIO_CPU_LIMIT`, `TERMINATION_DRAIN_DURATION_SECONDS`, `EXIT_ON_ZERO_ACTIVE_CONNECTIONS`, `MINIMUM_DRAIN_DURATION`, `ENVOY_STATUS_PORT`,
    /// `ENVOY_PROMETHEUS_PORT`, `MESH_STATE_DIR`, `ISTIO_PROMETHEUS_ANNOTATIONS`, `ISTIO_KUBE_APP_PROBERS`, `DNS_PROXY_ADDR` count, and for the identity `CA_ADDR`, `TRUST_DOMAIN`,
    /// `SECRET_TTL`, `SECRET_GRACE_PERIOD_RATIO`, `SECRET_GRACE_PERIOD_RATIO_JITTER`, `CA_ROOT_CA`, `MESH_TOKEN_FILE`, `MESH_CREDENTIALS_DIR`.
    pub fn from_vars(
        role: Role,
        vars: BTreeMap<String, String>,
        labels: &Path,
    ) -> Result<Self, OptionsError> {
        let get = |name: &str| vars.get(name).map(|v| v.trim()).filter(|v| !v.is_empty());
        let config = proxy_config(get("PROXY_CONFIG"))?;
        let field = |name: &str| config.get(name).and_then(Value::as_str);
        let namespace = get("POD_NAMESPACE").unwrap_or("default").to_owned();
        let ip = match get("INSTANCE_IP").map(|list| list.split(',').next().unwrap_or(list)) {
            Some(text) => text
                .parse()
                .map_err(|_| bad("INSTANCE_IP", text, "is not an IP address"))?,
            None => IpAddr::V4(Ipv4Addr::LOCALHOST),
        };
        let labels = read_labels(labels)?;
        let mut options = Self {
            role,
            identity: identity(&get, field("discoveryAddress"))?,
            discovery: vec![
                field("discoveryAddress")
                    .unwrap_or(match get("CA_ADDR") {
                        Some(_) => SECURE_CONTROL_PLANE,
                        None => CONTROL_PLANE,
                    })
                    .to_owned(),
            ],
            pod: get("POD_NAME").unwrap_or("unknown").to_owned(),
            domain: get("DNS_DOMAIN")
                .map_or_else(|| format!("{namespace}.svc.cluster.local"), str::to_owned),
            namespace,
            ip,
            metadata: Map::new(),
            labels,
            concurrency: concurrency(&config, get("ISTIO_CPU_LIMIT"))?,
            ports: ports(
                &config,
                get("ENVOY_STATUS_PORT"),
                get("ENVOY_PROMETHEUS_PORT"),
            )?,
            state_dir: state_dir(get("MESH_STATE_DIR")),
            termination_drain: termination_drain(
                field("terminationDrainDuration"),
                get("TERMINATION_DRAIN_DURATION_SECONDS"),
            )?,
            exit_on_zero: exit_on_zero(&get)?,
            drain: seconds("drainDuration", field("drainDuration"), 45)?,
            app_metrics: get("ISTIO_PROMETHEUS_ANNOTATIONS")
                .map(app_metrics)
                .transpose()?
                .flatten(),
            dns: dns(role, &get)?,
            app_probes: app_probes(get("ISTIO_KUBE_APP_PROBERS"))?,
        };
        options.metadata = options.node_metadata(&vars);
        let own = options.ports.agent;
        if options
            .app_metrics
            .as_ref()
            .is_some_and(|(port, _)| *port == own)
        {
            let text = get("ISTIO_PROMETHEUS_ANNOTATIONS").unwrap_or_default();
            let reason = format!("port {own} is the agent's, which would ask itself");
            return Err(bad("ISTIO_PROMETHEUS_ANNOTATIONS", text, reason));
        }
        Ok(options)
    }

    /// The node id: `sidecar~10.0.0.1~pod.namespace~domain` (Istio).
    pub fn node_id(&self) -> String {
        format!(
            "{}~{}~{}.{}~{}",
            self.role.name(),
            self.ip,
            self.pod,
            self.namespace,
            self.domain
        )
    }

    fn node_metadata(&self, vars: &BTreeMap<String, String>) -> Map<String, Value> {
        let mut metadata = Map::new();
        for (name, value) in vars {
            if let Some(key) = name.strip_prefix("ISTIO_META_") {
                metadata.insert(key.to_owned(), json!(value));
            }
        }
        let service_account = vars
            .get("SERVICE_ACCOUNT")
            .map_or("default", String::as_str);
        metadata.insert("NAME".to_owned(), json!(self.pod));
        metadata.insert("NAMESPACE".to_owned(), json!(self.namespace));
        metadata.insert("SERVICE_ACCOUNT".to_owned(), json!(service_account));
        metadata.insert("INSTANCE_IPS".to_owned(), json!(self.ip.to_string()));
        metadata.insert("LABELS".to_owned(), json!(self.labels));
        // As Istio's proxy with ISTIO_META_ISTIO_VERSION: it can give itself out for another version, to try how versions go together.
        metadata
            .entry("MESH_VERSION")
            .or_insert_with(|| json!(env!("CARGO_PKG_VERSION")));
        metadata
    }
}

fn bad(name: &'static str, value: &str, reason: impl Into<String>) -> OptionsError {
    OptionsError::Variable {
        name,
        value: value.to_owned(),
        reason: reason.into(),
    }
}

fn proxy_config(text: Option<&str>) -> Result<Value, OptionsError> {
    let Some(text) = text else {
        return Ok(json!({}));
    };
    // The injector writes JSON; people write YAML, of which JSON is a part.
    serde_yaml::from_str::<Value>(text)
        .map_err(|e| bad("PROXY_CONFIG", text, format!("is not a ProxyConfig: {e}")))
}

/// Everything about the certificate that the environment says.
fn identity<'a>(
    get: &impl Fn(&str) -> Option<&'a str>,
    discovery: Option<&str>,
) -> Result<Option<IdentityOptions>, OptionsError> {
    let secure = discovery.filter(|address| address.ends_with(SECURE_PORT));
    let Some(authority) = get("CA_ADDR").or(secure).map(str::to_owned) else {
        return Ok(None);
    };
    let path = |name: &str, default: &str| PathBuf::from(get(name).unwrap_or(default));
    let share = |name: &'static str, default: f64| match get(name) {
        None => Ok(default),
        Some(text) => text
            .parse::<f64>()
            .ok()
            .filter(|share| (0.0..=1.0).contains(share))
            .ok_or_else(|| bad(name, text, "is not a share (0 to 1)")),
    };
    let lifetime = get("SECRET_TTL").unwrap_or("24h");
    if let Some(algorithm) = get("ECC_SIGNATURE_ALGORITHM").filter(|name| *name != "ECDSA") {
        let reason = "is not supported: keys are ECDSA P-256";
        return Err(bad("ECC_SIGNATURE_ALGORITHM", algorithm, reason));
    }
    for name in ["PROV_CERT", "FILE_MOUNTED_CERTS", "OUTPUT_CERTS"] {
        if let Some(value) = get(name).filter(|value| *value != "false") {
            let reason = "is not supported: the certificate comes from the mesh's authority, and stays in memory";
            return Err(bad(name, value, reason));
        }
    }
    Ok(Some(IdentityOptions {
        authority,
        trust_domain: get("TRUST_DOMAIN").unwrap_or("cluster.local").to_owned(),
        service_account: get("SERVICE_ACCOUNT").unwrap_or("default").to_owned(),
        token_file: path("MESH_TOKEN_FILE", "/var/run/secrets/tokens/istio-token"),
        roots_file: path("CA_ROOT_CA", "/var/run/secrets/istio/root-cert.pem"),
        credentials_dir: Some(path("MESH_CREDENTIALS_DIR", CREDENTIALS_DIR))
            .filter(|dir| dir.is_dir()),
        signer: get("ISTIO_META_CERT_SIGNER")
            .filter(|name| !name.is_empty())
            .map(str::to_owned),
        lifetime: go_duration(lifetime)
            .ok_or_else(|| bad("SECRET_TTL", lifetime, "is not a duration, such as 24h"))?,
        grace: share("SECRET_GRACE_PERIOD_RATIO", 0.5)?,
        jitter: share("SECRET_GRACE_PERIOD_RATIO_JITTER", 0.01)?,
    }))
}

/// A duration as Go writes it, whole hours, minutes and seconds: `24h`, `24h0m0s`.
fn go_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = 0_u64;
    while !rest.is_empty() {
        let (number, after) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit())?);
        let (factor, after) = match after.split_at_checked(1)? {
            ("h", after) => (3600, after),
            ("m", after) => (60, after),
            ("s", after) => (1, after),
            _ => return None,
        };
        total = number
            .parse::<u64>()
            .ok()?
            .checked_mul(factor)?
            .checked_add(total)?;
        rest = after;
    }
    (total > 0).then(|| Duration::from_secs(total))
}

fn concurrency(config: &Value, cpu_limit: Option<&str>) -> Result<usize, OptionsError> {
    if let Some(workers) = config.get("concurrency").and_then(Value::as_u64) {
        // Istio: 0 is one worker for each core.
        return Ok(if workers == 0 {
            cores()
        } else {
            workers as usize
        });
    }
    match cpu_limit {
        None => Ok(cores().min(2)),
        Some(text) => {
            let limit: usize = text
                .parse()
                .map_err(|_| bad("ISTIO_CPU_LIMIT", text, "is not a number of cores"))?;
            Ok(limit.clamp(1, cores()))
        }
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn ports(
    config: &Value,
    status: Option<&str>,
    prometheus: Option<&str>,
) -> Result<Ports, OptionsError> {
    let mut ports = Ports::default();
    let number = |name: &'static str, text: &str| {
        text.parse()
            .map_err(|_| bad(name, text, "is not a port (0 to 65535)"))
    };
    if let Some(port) = config.get("proxyAdminPort").and_then(Value::as_u64) {
        ports.admin = number("PROXY_CONFIG", &port.to_string())?;
    }
    if let Some(port) = config.get("statusPort").and_then(Value::as_u64) {
        ports.agent = number("PROXY_CONFIG", &port.to_string())?;
    }
    if let Some(text) = status {
        ports.health = number("ENVOY_STATUS_PORT", text)?;
    }
    if let Some(text) = prometheus {
        ports.metrics = number("ENVOY_PROMETHEUS_PORT", text)?;
    }
    Ok(ports)
}

fn state_dir(chosen: Option<&str>) -> Option<PathBuf> {
    match chosen {
        Some("none") => None,
        Some(dir) => Some(PathBuf::from(dir)),
        None => Some(PathBuf::from(STATE_DIR)).filter(|dir| dir.is_dir()),
    }
}

fn termination_drain(
    config: Option<&str>,
    seconds: Option<&str>,
) -> Result<Duration, OptionsError> {
    let name = "TERMINATION_DRAIN_DURATION_SECONDS";
    if let Some(text) = seconds {
        return text
            .parse()
            .map(Duration::from_secs)
            .map_err(|_| bad(name, text, "is not a number of seconds"));
    }
    self::seconds("terminationDrainDuration", config, 5)
}

/// Go's names for true, as in all variables of Istio.
fn is_true(value: &str) -> bool {
    matches!(value, "1" | "t" | "T" | "true" | "TRUE" | "True")
}

/// Gateways have no application whose queries could be captured.
fn dns<'a>(
    role: Role,
    get: &impl Fn(&str) -> Option<&'a str>,
) -> Result<Option<DnsOptions>, OptionsError> {
    if role != Role::Sidecar || !get("ISTIO_META_DNS_CAPTURE").is_some_and(is_true) {
        return Ok(None);
    }
    let text = std::fs::read_to_string(RESOLV_CONF).map_err(OptionsError::Resolvers)?;
    let address = get("DNS_PROXY_ADDR");
    let options = DnsOptions::read(&text, address);
    options
        .map(Some)
        .map_err(|reason| bad("DNS_PROXY_ADDR", address.unwrap_or_default(), reason))
}

fn exit_on_zero<'a>(
    get: &impl Fn(&str) -> Option<&'a str>,
) -> Result<Option<Duration>, OptionsError> {
    let name = "EXIT_ON_ZERO_ACTIVE_CONNECTIONS";
    match get(name) {
        None | Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(None),
        Some(value) if is_true(value) => {
            let name = "MINIMUM_DRAIN_DURATION";
            let text = get(name).unwrap_or("5s");
            go_duration(text)
                .map(Some)
                .ok_or_else(|| bad(name, text, "is not a duration, such as 5s"))
        }
        Some(other) => Err(bad(name, other, "is neither true nor false")),
    }
}

/// A duration of the `ProxyConfig`, in seconds as `5s`.
fn seconds(name: &'static str, text: Option<&str>, default: u64) -> Result<Duration, OptionsError> {
    let Some(text) = text else {
        return Ok(Duration::from_secs(default));
    };
    let digits = text
        .strip_suffix('s')
        .and_then(|n| n.parse::<f64>().ok())
        .filter(|n| (0.0..1e6).contains(n));
    let reason = format!("{name} is not a duration in seconds, as 5s");
    digits
        .map(Duration::from_secs_f64)
        .ok_or_else(|| bad("PROXY_CONFIG", text, reason))
}

/// The pod's own scrape annotations, as the injector passes them on: `{"scrape":"true","port":"9080","path":"/metrics"}`.
fn app_metrics(text: &str) -> Result<Option<(u16, String)>, OptionsError> {
    let name = "ISTIO_PROMETHEUS_ANNOTATIONS";
    let value: Value =
        serde_json::from_str(text).map_err(|e| bad(name, text, format!("is not JSON: {e}")))?;
    let field = |key: &str, default: &str| {
        value
            .get(key)
            .and_then(Value::as_str)
            .unwrap_or(default)
            .to_owned()
    };
    if field("scrape", "true") != "true" {
        return Ok(None);
    }
    let port = field("port", "80");
    let port = port
        .parse()
        .map_err(|_| bad(name, text, format!("port {port:?} is not a port")))?;
    Ok(Some((port, field("path", "/metrics"))))
}

/// The application's own probes, as the injector passes them on.
fn app_probes(text: Option<&str>) -> Result<BTreeMap<String, AppProbe>, OptionsError> {
    let Some(text) = text else {
        return Ok(BTreeMap::new());
    };
    probes::parse(text).map_err(|reason| bad("ISTIO_KUBE_APP_PROBERS", text, reason))
}

/// Lines of `key="value"`, as the downward API writes them.
fn read_labels(path: &Path) -> Result<BTreeMap<String, String>, OptionsError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(source) => {
            return Err(OptionsError::Labels {
                path: path.to_owned(),
                source,
            });
        }
    };
    let pair = |line: &str| {
        let (key, value) = line.split_once('=')?;
        Some((
            key.to_owned(),
            value
                .trim_matches('"')
                .replace("\\\"", "\"")
                .replace("\\\\", "\\"),
        ))
    };
    Ok(text.lines().filter_map(pair).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vars(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    #[test]
    fn who_has_an_authority_speaks_to_the_control_plane_in_tls() {
        let of = |pairs| {
            let vars = vars(pairs);
            ProxyOptions::from_vars(Role::Sidecar, vars, Path::new("/nowhere")).expect("options")
        };
        let secure = of(&[("CA_ADDR", "istiod.istio-system.svc:15012")]);
        assert_eq!(secure.discovery, ["istiod.istio-system.svc:15012"]);
        let plain = of(&[]);
        assert_eq!(plain.discovery, ["istiod.istio-system.svc:15010"]);
        assert!(plain.identity.is_none());
    }

    #[test]
    fn reads_the_injectors_environment() {
        let dir = tempfile::tempdir().expect("a folder");
        let labels = dir.path().join("labels");
        std::fs::write(&labels, "app=\"reviews\"\nversion=\"v1\"\n").expect("labels");
        let vars = vars(&[
            ("POD_NAME", "reviews-1"),
            ("POD_NAMESPACE", "default"),
            ("INSTANCE_IP", "10.244.0.5"),
            (
                "PROXY_CONFIG",
                r#"{"discoveryAddress":"istiod.istio-system.svc:15012","concurrency":1}"#,
            ),
            ("ISTIO_META_CLUSTER_ID", "Kubernetes"),
        ]);
        let options = ProxyOptions::from_vars(Role::Sidecar, vars, &labels).expect("options");
        assert_eq!(
            options.node_id(),
            "sidecar~10.244.0.5~reviews-1.default~default.svc.cluster.local"
        );
        assert_eq!(options.discovery, ["istiod.istio-system.svc:15012"]);
        let identity = options.identity.expect("the port is the secure one");
        assert_eq!(identity.authority, "istiod.istio-system.svc:15012");
        assert_eq!(identity.lifetime, Duration::from_secs(86_400));
        assert_eq!(options.concurrency, 1);
        assert_eq!(options.metadata["LABELS"]["version"], "v1");
        assert_eq!(options.metadata["CLUSTER_ID"], "Kubernetes");
    }

    #[test]
    fn workers_follow_the_cpu_limit_unless_their_number_is_set() {
        let workers = |pairs: &[(&str, &str)]| {
            ProxyOptions::from_vars(Role::Sidecar, vars(pairs), Path::new("/nowhere"))
                .expect("options")
                .concurrency
        };
        let limit = ("ISTIO_CPU_LIMIT", "1");
        assert_eq!(workers(&[limit]), 1);
        assert_eq!(
            workers(&[limit, ("PROXY_CONFIG", r#"{"concurrency":3}"#)]),
            3
        );
        assert_eq!(
            workers(&[limit, ("PROXY_CONFIG", r#"{"concurrency":0}"#)]),
            cores()
        );
        // The downward API says the node's cores where there is no limit.
        assert_eq!(workers(&[("ISTIO_CPU_LIMIT", "100000")]), cores());
    }

    #[test]
    fn the_end_is_timed_as_istios_agent_does_it() {
        let read = |pairs: &[(&str, &str)]| {
            ProxyOptions::from_vars(Role::Sidecar, vars(pairs), Path::new("/nowhere"))
        };
        let on = ("EXIT_ON_ZERO_ACTIVE_CONNECTIONS", "true");
        for (pairs, limit, exit_on_zero) in [
            (&[][..], 5, None),
            (&[("TERMINATION_DRAIN_DURATION_SECONDS", "7")], 7, None),
            (
                &[(
                    "PROXY_CONFIG",
                    r#"{"terminationDrainDuration":"9s","drainDuration":"3s"}"#,
                )],
                9,
                None,
            ),
            (&[on], 5, Some(5)),
            (&[on, ("MINIMUM_DRAIN_DURATION", "1m2s")], 5, Some(62)),
        ] {
            let options = read(pairs).expect("options");
            assert_eq!(options.termination_drain, Duration::from_secs(limit));
            assert_eq!(options.exit_on_zero, exit_on_zero.map(Duration::from_secs));
        }
        for wrong in [
            ("EXIT_ON_ZERO_ACTIVE_CONNECTIONS", "maybe"),
            ("MINIMUM_DRAIN_DURATION", "soon"),
        ] {
            let error = read(&[on, wrong]).expect_err("no time").to_string();
            assert!(error.contains(wrong.0), "{error}");
        }
    }

    #[test]
    fn bad_variables_are_named() {
        let vars = vars(&[("INSTANCE_IP", "here")]);
        let error = ProxyOptions::from_vars(Role::Router, vars, Path::new("/nowhere"))
            .expect_err("no address");
        assert!(
            error.to_string().contains("INSTANCE_IP=\"here\""),
            "{error}"
        );
    }
}
