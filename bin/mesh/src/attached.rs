//! `mesh all-in-one` for a cluster that is there: control plane, injector and ingress gateway in this process, beside the cluster (`--kubeconfig`,
//! `--context`) or in one of its pods (`--in-cluster`).
//!
//! The cluster gets kinds, webhooks and the Services `istiod` and `istio-ingressgateway`, which lead to this process. The gateway's Service goes with
//! the process; the rest stays until `mesh uninstall`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::ValueEnum as _;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{ConfigMap, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Client, ResourceExt as _};
use mesh_cli::Global;
use mesh_cli::install::{Profile, Settings};
use mesh_cli::installer::{self, How};
use mesh_control::{Control, Options};
use mesh_proxy::{ProxyOptions, Role, RunError};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::all_in_one::Args;

const GATEWAY: &str = "istio-ingressgateway";
const ACCOUNT: &str = "istio-ingressgateway-service-account";
const MANAGER: &str = "mesh-all-in-one";
/// Validity of the gateway's token, and how often a new one is asked for.
const TOKEN_SECONDS: i64 = 3600;
const TOKEN_RENEWAL: Duration = Duration::from_secs(1800);
/// How often the mesh's roots are looked at: until they are there, and then.
const ROOTS_AWAITED: Duration = Duration::from_millis(250);
const ROOTS_RENEWAL: Duration = Duration::from_secs(10);

/// Runs control plane and gateway until SIGTERM or SIGINT.
pub async fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    mesh_telemetry::log::init(&args.log, false)?;
    crate::proxy::open_files();
    fits(&args)?;
    let (client, host, port) = global.client().await?;
    let namespace = global.istio_namespace.as_str();
    let address = match args.address {
        Some(address) => address,
        None => own_address(&host, port).await?,
    };
    alone(&client, namespace).await?;
    let place = tempfile::Builder::new()
        .prefix("mesh-")
        .tempdir_in(memory())?;
    // The ports first: where one is taken, the cluster is left as it is.
    let control = Control::bind(options(client.clone(), namespace)).await?;
    // Signals end it too.
    installer::run(objects(address), global)
        .await
        .context("preparing the cluster")?;
    let gateway = args
        .with_gateway()
        .then(|| Gateway::new(&client, namespace, address, &args));
    let (end, ended) = oneshot::channel::<()>();
    let control = tokio::spawn(control.run(async {
        // Dropped is ended too.
        let _ = ended.await;
    }));
    let outcome = tokio::select! {
        outcome = serve(gateway.as_ref(), place.path()) => outcome,
        () = failed(&control) => Err(anyhow::anyhow!("the control plane ended")),
    };
    if let Some(gateway) = &gateway {
        gateway.remove().await;
    }
    drop(end);
    control.await.context("the control plane")??;
    outcome?;
    println!(
        "ended. The webhooks stay, and nobody answers them: until `mesh uninstall` (--purge: kinds too) no pod can be made in namespaces with injection"
    );
    Ok(ExitCode::SUCCESS)
}

/// Serves until a signal ends it.
async fn serve(gateway: Option<&Gateway>, place: &Path) -> anyhow::Result<()> {
    let Some(gateway) = gateway else {
        crate::control::stopped().await;
        return Ok(());
    };
    // From then on the proxy minds the signals, and drains.
    let proxy = tokio::select! {
        proxy = gateway.start(place) => proxy?,
        () = crate::control::stopped() => return Ok(()),
    };
    gateway.keep(place, proxy).await
}

/// Waits until a task is over.
async fn failed<T>(task: &tokio::task::JoinHandle<T>) {
    while !task.is_finished() {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Refuses the flags of a local cluster.
fn fits(args: &Args) -> anyhow::Result<()> {
    let given = [
        ("--sample", !args.samples.is_empty()),
        ("--state-dir", args.state_dir.is_some()),
        ("--token-auth-file", args.token_auth_file.is_some()),
        ("--api-port", args.api_port.is_some()),
    ];
    if let Some((flag, _)) = given.into_iter().find(|(_, given)| *given) {
        bail!(
            "{flag} is for a local cluster, and --kubeconfig, --context and --in-cluster choose one that is there: leave one of them out \
             (samples: `mesh offline -f samples/... | kubectl apply -f -`)"
        );
    }
    match args.profile {
        Profile::Default | Profile::Minimal => Ok(()),
        other => bail!(
            "--profile {}: beside a cluster that is there, default (control plane and ingress gateway) and minimal (control plane) can be had; \
             for the others use `mesh install --set profile=NAME`",
            other
                .to_possible_value()
                .map_or_else(String::new, |value| value.get_name().to_owned())
        ),
    }
}

/// The address of this machine, or pod, on the way to the API server: that is where the cluster finds us.
async fn own_address(host: &str, port: u16) -> anyhow::Result<IpAddr> {
    if let Some(pod) = std::env::var("POD_IP").ok().and_then(|ip| ip.parse().ok()) {
        return Ok(pod);
    }
    let mut found = tokio::net::lookup_host((host, port))
        .await
        .with_context(|| format!("resolving {host}"))?;
    let api = found
        .next()
        .with_context(|| format!("{host} has no address"))?;
    let any = if api.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    // Nothing is sent: the system only chooses the way.
    let socket = UdpSocket::bind(any)?;
    socket
        .connect(api)
        .with_context(|| format!("finding the way to {api}"))?;
    let own = socket.local_addr()?.ip();
    if own.is_loopback() {
        bail!(
            "the API server is at {api}, which tells nothing of the address that the cluster's pods find this machine at; say --address IP \
             (with kind, the gateway of Docker's network `kind`: docker network inspect kind)"
        );
    }
    Ok(own)
}

/// Another control plane's gateway, and its clients, would be taken away from it.
async fn alone(client: &Client, namespace: &str) -> anyhow::Result<()> {
    let deployments: Api<Deployment> = Api::all(client.clone());
    let others = deployments
        .list(&ListParams::default().labels("app=istiod"))
        .await
        .context("looking for control planes in the cluster")?;
    if let Some(other) = others.items.first() {
        bail!(
            "the cluster has a control plane (Deployment {} in namespace {}): uninstall it first, or use it",
            other.name_any(),
            other.namespace().unwrap_or_default()
        );
    }
    let services: Api<Service> = Api::namespaced(client.clone(), namespace);
    let gateway = services
        .get_opt(GATEWAY)
        .await
        .context("looking for a gateway")?;
    let selector = gateway
        .and_then(|gateway| gateway.spec)
        .and_then(|spec| spec.selector);
    if selector.is_some_and(|selector| !selector.is_empty()) {
        bail!(
            "the Service {GATEWAY} in namespace {namespace} has pods of its own: remove it first, or take --profile minimal"
        );
    }
    Ok(())
}

/// A folder in memory, for the gateway's token.
fn memory() -> std::path::PathBuf {
    let shared = Path::new("/dev/shm");
    match shared.is_dir() {
        true => shared.to_owned(),
        false => std::env::temp_dir(),
    }
}

fn options(client: Client, namespace: &str) -> Options {
    let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    Options {
        namespace: namespace.to_owned(),
        grpc: None,
        monitoring: local(15014),
        // The gateway has 8080.
        http: local(0),
        ..Options::new(client, env!("CARGO_PKG_VERSION"))
    }
}

/// Kinds, webhooks, and the Service that leads to us.
fn objects(address: IpAddr) -> installer::Args {
    installer::Args {
        settings: Settings {
            set: vec![
                "profile=remote".to_owned(),
                format!("values.global.remotePilotAddress={address}"),
            ],
            ..Settings::default()
        },
        how: How {
            skip_confirmation: true,
            dry_run: false,
            force: false,
            force_lock: false,
            readiness_timeout: Duration::from_secs(60),
        },
    }
}

/// Resolves when the proxy has ended.
type Ended = oneshot::Receiver<Result<(), RunError>>;

/// The ingress gateway in this process.
struct Gateway {
    client: Client,
    namespace: String,
    address: IpAddr,
    http: u16,
    https: u16,
}

impl Gateway {
    fn new(client: &Client, namespace: &str, address: IpAddr, args: &Args) -> Self {
        Self {
            client: client.clone(),
            namespace: namespace.to_owned(),
            address,
            http: args.http_port,
            https: args.https_port,
        }
    }

    /// Starts the proxy as soon as there is what it needs; what comes back resolves when it has ended.
    async fn start(&self, place: &Path) -> anyhow::Result<Ended> {
        self.apply()
            .await
            .context("applying the gateway's Service")?;
        self.token(place).await?;
        while !self.roots(place).await? {
            tokio::time::sleep(ROOTS_AWAITED).await;
        }
        let labels = format!("app=\"{GATEWAY}\"\nistio=\"ingressgateway\"\n");
        std::fs::write(place.join("labels"), labels)?;
        let options = self.options(place)?;
        let (done, proxy) = oneshot::channel();
        std::thread::Builder::new()
            .name("gateway".into())
            .spawn(move || {
                // Nobody waits any more where the control plane has failed.
                let _ = done.send(mesh_proxy::run(options));
            })?;
        println!(
            "gateway: http://{}/",
            SocketAddr::new(self.address, self.http)
        );
        Ok(proxy)
    }

    /// Renews what the proxy lives on until it has ended.
    async fn keep(&self, place: &Path, mut proxy: Ended) -> anyhow::Result<()> {
        let mut tokens = tokio::time::interval(TOKEN_RENEWAL);
        let mut roots = tokio::time::interval(ROOTS_RENEWAL);
        loop {
            let renewed = tokio::select! {
                ended = &mut proxy => {
                    ended.context("the gateway's thread ended")??;
                    return Ok(());
                }
                _ = tokens.tick() => self.token(place).await,
                _ = roots.tick() => match self.restore().await {
                    Ok(()) => self.roots(place).await.map(drop),
                    Err(error) => Err(error),
                },
            };
            if let Err(error) = renewed {
                tracing::warn!("{error:#}; the gateway goes on with what it has");
            }
        }
    }

    /// Makes the Service again where somebody has deleted it. Another process's is left alone.
    async fn restore(&self) -> anyhow::Result<()> {
        match self.slice().await?.is_some() {
            true => Ok(()),
            false => self.apply().await,
        }
    }

    async fn slice(&self) -> anyhow::Result<Option<EndpointSlice>> {
        let slices: Api<EndpointSlice> = Api::namespaced(self.client.clone(), &self.namespace);
        slices
            .get_opt(GATEWAY)
            .await
            .context("reading the gateway's EndpointSlice")
    }

    fn options(&self, place: &Path) -> anyhow::Result<ProxyOptions> {
        let file = |name: &str| place.join(name).display().to_string();
        // Not this pod's own name: its labels are not those of a gateway.
        let pod = format!("{GATEWAY}-all-in-one");
        let config = json!({ "discoveryAddress": "localhost:15012" });
        let vars = [
            ("POD_NAME", pod),
            ("POD_NAMESPACE", self.namespace.clone()),
            ("INSTANCE_IP", self.address.to_string()),
            ("SERVICE_ACCOUNT", ACCOUNT.to_owned()),
            ("PROXY_CONFIG", config.to_string()),
            ("ISTIO_META_WORKLOAD_NAME", GATEWAY.to_owned()),
            ("ISTIO_META_CLUSTER_ID", "Kubernetes".to_owned()),
            ("MESH_STATE_DIR", "none".to_owned()),
            ("MESH_TOKEN_FILE", file("token")),
            ("CA_ROOT_CA", file("root-cert.pem")),
        ];
        let vars = vars.map(|(name, value)| (name.to_owned(), value));
        let options = ProxyOptions::from_vars(Role::Router, vars.into(), &place.join("labels"))?;
        Ok(options)
    }

    /// Asks for a token for the gateway's account.
    async fn token(&self, place: &Path) -> anyhow::Result<()> {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), &self.namespace);
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: Some(vec!["istio-ca".to_owned()]),
                expiration_seconds: Some(TOKEN_SECONDS),
                ..TokenRequestSpec::default()
            }),
            ..TokenRequest::default()
        };
        let answer = accounts
            .create_token_request(ACCOUNT, &PostParams::default(), &request)
            .await
            .with_context(|| format!("asking for a token for the service account {ACCOUNT}"))?;
        let token = answer.status.and_then(|status| status.token);
        let token = token.context("the API server gave no token")?;
        replace(&place.join("token"), &token)
    }

    /// Writes the mesh's roots where the proxy looks for them; false while there are none.
    async fn roots(&self, place: &Path) -> anyhow::Result<bool> {
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.namespace);
        let map = maps
            .get_opt("istio-ca-root-cert")
            .await
            .context("reading the mesh's roots")?;
        let data = map.and_then(|map| map.data).unwrap_or_default();
        let Some(roots) = data.get("root-cert.pem") else {
            return Ok(false);
        };
        let file = place.join("root-cert.pem");
        if std::fs::read_to_string(&file).ok().as_deref() != Some(roots) {
            replace(&file, roots)?;
        }
        Ok(true)
    }

    async fn apply(&self) -> anyhow::Result<()> {
        let labels = json!({ "app": GATEWAY, "istio": "ingressgateway", "app.kubernetes.io/managed-by": "mesh", "install.operator.istio.io/owning-resource": "installed-state" });
        let metadata =
            |name: &str| json!({ "name": name, "namespace": self.namespace, "labels": labels });
        let ports = [
            ("status-port", 15021, 15021),
            ("http2", 80, self.http),
            ("https", 443, self.https),
        ];
        let service = ports.map(|(name, port, target)| json!({ "name": name, "port": port, "targetPort": target, "protocol": "TCP" }));
        let slice = ports
            .map(|(name, _, target)| json!({ "name": name, "port": target, "protocol": "TCP" }));
        let mut sliced = metadata(GATEWAY);
        sliced["labels"]["kubernetes.io/service-name"] = json!(GATEWAY);
        sliced["labels"]["endpointslice.kubernetes.io/managed-by"] = json!("mesh");
        self.put::<ServiceAccount>(
            ACCOUNT,
            json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata(ACCOUNT) }),
        )
        .await?;
        self.put::<Service>(GATEWAY, json!({ "apiVersion": "v1", "kind": "Service", "metadata": metadata(GATEWAY), "spec": { "ports": service } })).await?;
        self.put::<EndpointSlice>(GATEWAY, json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": sliced,
            "addressType": if self.address.is_ipv4() { "IPv4" } else { "IPv6" },
            "endpoints": [{ "addresses": [self.address.to_string()], "conditions": { "ready": true } }],
            "ports": slice,
        })).await
    }

    async fn put<K>(&self, name: &str, object: Value) -> anyhow::Result<()>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>
            + Clone
            + std::fmt::Debug
            + DeserializeOwned,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), &self.namespace);
        api.patch(
            name,
            &PatchParams::apply(MANAGER).force(),
            &Patch::Apply(&object),
        )
        .await
        .with_context(|| format!("applying {} {name}", object["kind"]))?;
        Ok(())
    }

    /// Takes the Service away, which would lead nowhere, but where it leads to a successor. That this fails doesn't keep the process.
    async fn remove(&self) {
        if let Err(error) = self.take_away().await {
            tracing::warn!("removing the gateway's Service: {error:#}");
        }
    }

    async fn take_away(&self) -> anyhow::Result<()> {
        let own = self.address.to_string();
        let Some(slice) = self.slice().await? else {
            return Ok(());
        };
        if !slice
            .endpoints
            .iter()
            .flatten()
            .any(|endpoint| endpoint.addresses.contains(&own))
        {
            return Ok(());
        }
        let as_it_was = DeleteParams::default().preconditions(Preconditions {
            uid: slice.metadata.uid,
            resource_version: slice.metadata.resource_version,
        });
        let slices: Api<EndpointSlice> = Api::namespaced(self.client.clone(), &self.namespace);
        slices.delete(GATEWAY, &as_it_was).await?;
        let services: Api<Service> = Api::namespaced(self.client.clone(), &self.namespace);
        services.delete(GATEWAY, &DeleteParams::default()).await?;
        Ok(())
    }
}

/// Puts a file in its place in one step: the proxy reads it at any time.
fn replace(path: &Path, text: &str) -> anyhow::Result<()> {
    let new = path.with_extension("new");
    std::fs::write(&new, text).with_context(|| format!("writing {}", new.display()))?;
    std::fs::rename(&new, path).with_context(|| format!("writing {}", path.display()))
}
