//! Flags that every command has, and the cluster that they choose.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};

use crate::cluster::Cluster;

/// Flags that every command has.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Global {
    /// Kubeconfig file of the cluster [default: KUBECONFIG, else the local cluster of `mesh all-in-one`, else ~/.kube/config]
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "MESH_KUBECONFIG",
        hide_env = true
    )]
    pub kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig file
    #[arg(long, global = true, value_name = "NAME")]
    pub context: Option<String>,
    /// Namespace
    #[arg(short, long, global = true, value_name = "NAME")]
    pub namespace: Option<String>,
    /// Namespace of the mesh's own parts
    #[arg(long = "istioNamespace", visible_alias = "istio-namespace", global = true, value_name = "NAME", default_value = crate::install::NAMESPACE)]
    pub istio_namespace: String,
    /// The cluster is the one that this process is a pod of.
    #[arg(skip)]
    pub in_cluster: bool,
    /// Where results go.
    #[arg(skip)]
    pub out: crate::out::Out,
}

impl Global {
    /// Connects to the cluster that the flags choose: `--kubeconfig`, else KUBECONFIG, else `~/.kube/config` if `--context` names one of its
    /// contexts, else the service account of the pod that this runs in, else the local cluster, else `~/.kube/config`.
    pub(crate) async fn cluster(&self) -> anyhow::Result<Cluster> {
        let config = self.config().await?;
        let namespace = self
            .namespace
            .clone()
            .unwrap_or_else(|| config.default_namespace.clone());
        let server = config.cluster_url.to_string();
        let client = kube::Client::try_from(config)
            .with_context(|| format!("preparing the connection to {server}"))?;
        Ok(Cluster::new(client, namespace, server))
    }

    /// Whether flags choose a cluster.
    pub fn is_chosen(&self) -> bool {
        self.in_cluster || self.kubeconfig.is_some() || self.context.is_some()
    }

    /// A client for the cluster that is chosen as for every command, and host and port of its API server.
    ///
    /// # Errors
    /// There is none, or its kubeconfig can't be used.
    pub async fn client(&self) -> anyhow::Result<(kube::Client, String, u16)> {
        let config = self.config().await?;
        let url = config.cluster_url.clone();
        let host = url.host().unwrap_or_default().trim_matches(['[', ']']);
        let host = host.to_owned();
        let client = kube::Client::try_from(config)
            .with_context(|| format!("preparing the connection to {url}"))?;
        Ok((client, host, url.port_u16().unwrap_or(443)))
    }

    async fn config(&self) -> anyhow::Result<kube::Config> {
        if self.in_cluster {
            return kube::Config::incluster().map_err(|error| {
                anyhow::anyhow!("--in-cluster: {error}; run this in a pod with a service account")
            });
        }
        let options = KubeConfigOptions {
            context: self.context.clone(),
            ..KubeConfigOptions::default()
        };
        if let Some(path) = &self.kubeconfig {
            return from_file(path, &options).await;
        }
        let environment = Kubeconfig::from_env()
            .map_err(words)
            .context("reading the files that KUBECONFIG names")?;
        if let Some(file) = environment {
            return kube::Config::from_custom_kubeconfig(file, &options)
                .await
                .context("using the files that KUBECONFIG names");
        }
        if self.context.is_some() {
            return kube::Config::from_kubeconfig(&options)
                .await
                .map_err(words)
                .context("using ~/.kube/config for --context");
        }
        if let Ok(config) = kube::Config::incluster() {
            return Ok(config);
        }
        let users = in_home(".kube/config");
        let local = local_kubeconfig().filter(|path| is_running(path));
        let there = [local, users]
            .into_iter()
            .flatten()
            .find(|path| path.exists());
        match there {
            Some(path) => from_file(&path, &options).await,
            None => anyhow::bail!(
                "no cluster: start a local one with `mesh all-in-one`, or name one with --kubeconfig FILE, --context NAME or the environment variable KUBECONFIG; there is no ~/.kube/config either"
            ),
        }
    }
}

/// Does the local cluster of this kubeconfig run? It holds a lock beside it; of one that has stopped the file stays, and is nobody's.
fn is_running(kubeconfig: &Path) -> bool {
    let lock = std::fs::File::open(kubeconfig.with_file_name("lock"));
    lock.is_ok_and(|lock| lock.try_lock_shared().is_err())
}

async fn from_file(path: &Path, options: &KubeConfigOptions) -> anyhow::Result<kube::Config> {
    let file = Kubeconfig::read_from(path)
        .map_err(words)
        .context("reading the kubeconfig")?;
    kube::Config::from_custom_kubeconfig(file, options)
        .await
        .with_context(|| format!("using the kubeconfig {}", path.display()))
}

/// An error once: some have their cause in their own text, and it is shown behind them too.
fn words(error: KubeconfigError) -> anyhow::Error {
    match error {
        KubeconfigError::ReadConfig(cause, path) => {
            anyhow::Error::new(cause).context(path.display().to_string())
        }
        error => anyhow::anyhow!("{error}"),
    }
}

/// Where `mesh all-in-one` keeps the kubeconfig of its cluster, unless it is told another state directory.
fn local_kubeconfig() -> Option<PathBuf> {
    let state = variable("XDG_STATE_HOME").or_else(|| in_home(".local/state"))?;
    Some(state.join("mesh/kubeconfig"))
}

fn in_home(path: &str) -> Option<PathBuf> {
    Some(variable("HOME")?.join(path))
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_local_cluster_counts_while_it_holds_its_lock() {
        let state = tempfile::tempdir().expect("a folder");
        let kubeconfig = state.path().join("kubeconfig");
        std::fs::write(&kubeconfig, "{}").expect("written");
        assert!(!is_running(&kubeconfig));
        let lock = std::fs::File::create(state.path().join("lock")).expect("a lock");
        assert!(!is_running(&kubeconfig));
        lock.lock().expect("locked");
        assert!(is_running(&kubeconfig));
    }
}
