//! `mesh all-in-one`: what the local cluster starts with.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use mesh_cli::install::{self, InstallOptions, Profile};
use mesh_local::{BootWave, ClusterOptions, ClusterUser, HostPort, StateDir, WaitFor};
use serde_json::{Value, json};

/// Flags of `mesh all-in-one`.
#[derive(clap::Args)]
pub struct Args {
    /// Also deploy a sample (may be repeated): bookinfo, httpbin, helloworld, curl
    #[arg(long = "sample", value_name = "NAME")]
    pub(crate) samples: Vec<String>,
    /// Not a local cluster: be control plane, injector and ingress gateway of the Kubernetes that this pod is in (--kubeconfig and --context: of one beside
    /// which this runs)
    #[arg(long)]
    pub(crate) in_cluster: bool,
    /// What to install: empty is a cluster without a mesh
    #[arg(long, value_enum, default_value = "default")]
    pub(crate) profile: Profile,
    /// Where the cluster's state is kept; '' keeps it in memory [default: $XDG_STATE_HOME/mesh or ~/.local/state/mesh]
    // Text, not a path: a path may not be empty for the parser.
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: Option<String>,
    /// Users of the Kubernetes API beside the administrator: lines of token,user,uid,"group1,group2" (Kubernetes' static token file)
    #[arg(long, value_name = "FILE")]
    pub(crate) token_auth_file: Option<PathBuf>,
    /// Address that the host's ports are bound to [default: 127.0.0.1]; beside a Kubernetes, the one that it finds this machine at [default: the one
    /// towards its API server]
    #[arg(long, value_name = "IP")]
    pub(crate) address: Option<IpAddr>,
    /// Port of the Kubernetes API; 0 takes a free one [default: 6443]
    #[arg(long, value_name = "PORT")]
    pub(crate) api_port: Option<u16>,
    /// Port of the ingress gateway for HTTP; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 8080)]
    pub(crate) http_port: u16,
    /// Port of the ingress gateway for HTTPS; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 8443)]
    pub(crate) https_port: u16,
    /// Log filter of the cluster's own process, such as info or mesh_local=debug
    #[arg(long, value_name = "FILTER", default_value = "warn")]
    pub(crate) log: String,
}

impl Args {
    /// Where the host's ports are bound.
    fn host(&self) -> IpAddr {
        self.address.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
    }

    /// Whether the profile has an ingress gateway.
    pub(crate) fn with_gateway(&self) -> bool {
        matches!(self.profile, Profile::Default | Profile::Demo)
    }
}

/// Runs the local cluster until it is stopped.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let options = ClusterOptions {
        state_dir: match &args.state_dir {
            None => StateDir::Default,
            Some(dir) if dir.is_empty() => StateDir::Memory,
            Some(dir) => StateDir::Path(PathBuf::from(dir)),
        },
        api_address: SocketAddr::new(args.host(), args.api_port.unwrap_or(6443)),
        users: users(args.token_auth_file.as_deref())?,
        host_ports: host_ports(&args),
        boot: boot(&args)?,
        log_filter: args.log.clone(),
        ..ClusterOptions::default()
    };
    mesh_local::all_in_one(options)
}

fn users(file: Option<&Path>) -> anyhow::Result<Vec<ClusterUser>> {
    let Some(file) = file else {
        return Ok(Vec::new());
    };
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("reading the users in {}", file.display()))?;
    ClusterUser::list(&text).with_context(|| format!("reading the users in {}", file.display()))
}

fn host_ports(args: &Args) -> Vec<HostPort> {
    if !args.with_gateway() {
        return Vec::new();
    }
    let page = args.samples.iter().any(|s| s == "bookinfo");
    let link = if page {
        ("product page".to_owned(), "/productpage".to_owned())
    } else {
        ("gateway".to_owned(), "/".to_owned())
    };
    let port = |port, host, flag: &str, link| HostPort {
        namespace: install::NAMESPACE.to_owned(),
        service: "istio-ingressgateway".to_owned(),
        port,
        address: SocketAddr::new(args.host(), host),
        flag: flag.to_owned(),
        link,
    };
    vec![
        port(80, args.http_port, "--http-port", Some(link)),
        port(443, args.https_port, "--https-port", None),
    ]
}

/// The mesh's own parts first, then the samples: the injection webhook must answer before their pods are made.
fn boot(args: &Args) -> anyhow::Result<Vec<BootWave>> {
    // One worker a proxy: a laptop runs a dozen of them, and round robin is strictly in turn with one.
    let options = InstallOptions {
        profile: args.profile,
        concurrency: Some(1),
        ..InstallOptions::default()
    };
    let manifests = install::manifests(&options).context("making the mesh's own manifests")?;
    let titles = ["resource kinds", "control plane", "gateways"];
    let mut waves: Vec<BootWave> = titles
        .into_iter()
        .zip(manifests)
        .map(|(title, documents)| wave(title, documents))
        .collect();
    // The gateway starts while the samples do.
    let gateways = waves
        .get_mut(2)
        .map(|gateways| std::mem::take(&mut gateways.wait));
    let mut samples = Vec::new();
    for name in &args.samples {
        samples.extend(sample(name)?);
    }
    if !samples.is_empty() {
        if args.profile != Profile::Empty {
            let labels = json!({"istio-injection": "enabled"});
            samples.insert(0, json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default", "labels": labels}}));
        } else {
            // Without the mesh there are no kinds for its rules.
            samples.retain(|document| {
                !document["apiVersion"]
                    .as_str()
                    .unwrap_or_default()
                    .contains("istio.io/")
            });
        }
        waves.push(wave(
            &format!("samples: {}", args.samples.join(", ")),
            samples,
        ));
    }
    if let (Some(gateways), Some(last)) = (gateways, waves.last_mut()) {
        last.wait.extend(gateways);
    }
    Ok(waves)
}

/// A wave that waits for its own Deployments.
fn wave(title: &str, documents: Vec<Value>) -> BootWave {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let wait = documents
        .iter()
        .filter(|document| document["kind"] == "Deployment")
        .filter_map(|document| {
            let metadata = &document["metadata"];
            let namespace = text(&metadata["namespace"]).unwrap_or_else(|| "default".to_owned());
            Some(WaitFor {
                namespace,
                deployment: text(&metadata["name"])?,
            })
        })
        .collect();
    BootWave {
        title: title.to_owned(),
        documents,
        wait,
    }
}

fn sample(name: &str) -> anyhow::Result<Vec<Value>> {
    let Some(files) = mesh_samples::manifests(name) else {
        let known: Vec<&str> = mesh_samples::manifest_names().collect();
        bail!(
            "--sample {name}: there is no such sample; there are {}",
            known.join(", ")
        );
    };
    let mut documents = Vec::new();
    for (file, text) in files {
        documents.extend(mesh_api::yaml::documents(text, file)?);
    }
    Ok(documents)
}
