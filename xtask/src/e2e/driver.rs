//! Where the walk happens: a local cluster, or a Kubernetes that is made for it, or one that is there.
//!
//! In: the driver's name and settings. Out: a cluster with the mesh and the samples in it. A cluster that was made for the walk is deleted
//! in the end; of one that was there, the samples and the mesh are removed.

mod kind;
mod minikube;
mod shell;

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::ValueEnum;

use self::shell::{Real, Shell};
use super::cluster::{Cluster, Remote};
use super::collect;
use super::objects::Objects;

/// Where the walk happens.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Driver {
    /// A local cluster: no Kubernetes, no Docker, root or user namespaces.
    Local,
    /// A kind cluster, made and deleted; needs kind and Docker.
    Kind,
    /// A minikube cluster, made and deleted; needs minikube and one of its drivers.
    Minikube,
    /// The cluster of a kubeconfig (KUBECONFIG or --kubeconfig); the image must be loaded there.
    Kubeconfig,
}

/// Which images the samples run from on a Kubernetes.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Images {
    /// The mesh's own image, which is loaded from an archive: nothing is pulled.
    Mesh,
    /// Those that the manifests name, from their registries.
    Registry,
}

/// What the drivers of a Kubernetes are told.
#[derive(clap::Args)]
pub struct Options {
    /// Kubernetes version of a cluster that is made, such as v1.36.4; its driver's own default if not given.
    #[arg(long, value_name = "VERSION")]
    kubernetes_version: Option<String>,
    /// Name of a cluster that is made.
    #[arg(long, value_name = "NAME", default_value = "mesh-e2e")]
    cluster_name: String,
    /// The image archive that is loaded into it; made as by `cargo xtask dist` where none is given.
    #[arg(long, value_name = "FILE")]
    image_archive: Option<PathBuf>,
    /// The kubeconfig of the driver of that name.
    #[arg(long, value_name = "FILE", env = "KUBECONFIG")]
    kubeconfig: Option<PathBuf>,
    /// Its context, where it is not the current one.
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
    /// Begin with an empty local cluster: install the mesh and the samples as on a Kubernetes, and see in the end that the API is as before.
    #[arg(long)]
    install: bool,
    /// What the samples run from, on a Kubernetes.
    #[arg(long, value_enum, default_value = "mesh")]
    images: Images,
    /// Leave the cluster, the mesh and the samples as they are in the end.
    #[arg(long)]
    keep: bool,
    /// Where everything that tells of a failure is written.
    #[arg(long, value_name = "FILE", default_value = "target/e2e-failure.tar.gz")]
    pub failure_archive: PathBuf,
}

/// A program that makes clusters. Each step is a command line or a few; what they print is shown.
trait Provider {
    /// Its name, as it is called.
    fn program(&self) -> &'static str;
    /// Makes the cluster, and a kubeconfig for it.
    ///
    /// # Errors
    /// There is one of that name already: it may be somebody's.
    fn create(&self, shell: &mut dyn Shell) -> anyhow::Result<()>;
    /// Loads an image archive into every node.
    fn load(&self, shell: &mut dyn Shell, archive: &Path) -> anyhow::Result<()>;
    /// Writes the nodes' own logs below a folder.
    fn logs(&self, shell: &mut dyn Shell, folder: &Path) -> anyhow::Result<()>;
    /// Deletes the cluster.
    fn delete(&self, shell: &mut dyn Shell) -> anyhow::Result<()>;
}

/// Runs the walk where the driver says.
pub fn run(
    driver: Driver,
    binary: &Path,
    kubectl: Option<&Path>,
    options: &Options,
    walk: impl FnOnce(&mut Cluster) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    if options.install && driver != Driver::Local {
        bail!(
            "--install is for the local driver; the others install the mesh anyway, on clusters where more than the walk happens"
        );
    }
    let place = tempfile::Builder::new().prefix("mesh-e2e-").tempdir()?;
    let kubeconfig = place.path().join("kubeconfig");
    let name = options.cluster_name.clone();
    let version = options.kubernetes_version.clone();
    let provider: Box<dyn Provider> = match driver {
        Driver::Local if options.install => {
            return installed(Cluster::empty(binary, kubectl)?, options, walk);
        }
        Driver::Local => {
            let cluster = Cluster::start(binary, kubectl)?;
            return walk_to_the_end(cluster, options, walk);
        }
        Driver::Kubeconfig => {
            let kubeconfig = options.kubeconfig.clone().context(
                "the driver kubeconfig is told its cluster by --kubeconfig FILE or the variable KUBECONFIG",
            )?;
            let cluster = Cluster::remote(binary, kubectl, options.remote(kubeconfig))?;
            return walk_to_the_end(cluster, options, walk);
        }
        Driver::Kind => Box::new(kind::Kind {
            name,
            version,
            kubeconfig: kubeconfig.clone(),
        }),
        Driver::Minikube => Box::new(minikube::Minikube { name, version }),
    };
    let mut shell = Real::new(&kubeconfig);
    let archive = match &options.image_archive {
        Some(archive) => archive.clone(),
        None => crate::dist::archive(None)?,
    };
    provider.create(&mut shell)?;
    let outcome = (|| {
        provider.load(&mut shell, &archive)?;
        let mut cluster = Cluster::remote(binary, kubectl, options.remote(kubeconfig.clone()))?;
        let provider = Some((&*provider, &mut shell as &mut dyn Shell));
        walk_and_collect(&mut cluster, options, provider, walk)
    })();
    if options.keep {
        let kubeconfig = place.keep().join("kubeconfig");
        println!(
            "kept: the {} cluster {}; export KUBECONFIG={}",
            provider.program(),
            options.cluster_name,
            kubeconfig.display()
        );
        return outcome;
    }
    let deleted = provider.delete(&mut shell);
    outcome.and(deleted)
}

impl Options {
    fn remote(&self, kubeconfig: PathBuf) -> Remote {
        Remote {
            kubeconfig,
            context: self.context.clone(),
            own_images: self.images == Images::Mesh,
        }
    }
}

/// The walk on a cluster that nobody deletes for us.
fn walk_to_the_end(
    mut cluster: Cluster,
    options: &Options,
    walk: impl FnOnce(&mut Cluster) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let outcome = walk_and_collect(&mut cluster, options, None, walk);
    if options.keep {
        cluster.keep();
        return outcome;
    }
    let stopped = cluster.stop().context("stopping the cluster");
    outcome.and(stopped)
}

/// The walk on an empty cluster, which has every object that it had, as it was, when all is removed.
fn installed(
    mut cluster: Cluster,
    options: &Options,
    walk: impl FnOnce(&mut Cluster) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let before = Objects::read(&cluster)?;
    let outcome = walk_and_collect(&mut cluster, options, None, walk);
    if options.keep {
        cluster.keep();
        return outcome;
    }
    let outcome = outcome.and_then(|()| {
        cluster.remove()?;
        let same = cluster.wait("the API to be as it was", || {
            before.same(&cluster).map(Some)
        });
        same.context("after uninstall --purge")
    });
    let stopped = cluster.stop().context("stopping the cluster");
    outcome.and(stopped)
}

/// Installs, deploys the samples and walks; what tells of a failure is collected.
fn walk_and_collect(
    cluster: &mut Cluster,
    options: &Options,
    provider: Option<(&dyn Provider, &mut dyn Shell)>,
    walk: impl FnOnce(&mut Cluster) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let outcome = cluster.deploy().and_then(|()| {
        println!("first page after {} ms", cluster.first_page.as_millis());
        walk(cluster)
    });
    if outcome.is_err() {
        collected(cluster, options, provider);
    }
    outcome
}

/// Scenarios that are not for every cluster, and what they need.
const PARTICULAR: &[(&str, Needs)] = &[
    (
        "on the node's network nothing but TLS is seen",
        Needs::Local,
    ),
    (
        "without the capture rules in a pod, its edges are not counted",
        Needs::Local,
    ),
    ("without the capture rules nothing is counted", Needs::Local),
    ("a pod may do with the API what its roles say", Needs::Local),
    (
        "the proxy runs as uid 1337 where uids are mapped",
        Needs::Local,
    ),
    (
        "a killed sidecar and a killed application come back",
        Needs::Local,
    ),
    (
        "bad input is refused with its reason and changes nothing",
        Needs::Local,
    ),
    ("state survives SIGKILL of the main process", Needs::Local),
    ("policy: connections by port and identity", Needs::Bash),
    ("TCP by weight through the gateway", Needs::Bash),
    (
        "a service outside is reached through a forward proxy",
        Needs::Bash,
    ),
    (
        "a rolling restart, scaling and changes under load lose nothing",
        Needs::Bash,
    ),
    (
        "policy: deny all, then allow by identity, with Bookinfo",
        Needs::Shell,
    ),
    (
        "policy: requests by identity, method, path and address",
        Needs::Shell,
    ),
    (
        "policy: a dry run counts and refuses nothing, AUDIT neither",
        Needs::Shell,
    ),
    ("policy: a service of one's own decides", Needs::Shell),
    ("tokens are judged, the good and the bad", Needs::Shell),
    (
        "web servers by weight, for clients in the mesh",
        Needs::OwnPrograms,
    ),
    (
        "web servers by content, and from canary to whole",
        Needs::OwnPrograms,
    ),
    ("a local rate limit by EnvoyFilter", Needs::Shell),
    ("example global-rate-limit", Needs::OwnPrograms),
    (
        "an upgrade in place, under load, loses nothing",
        Needs::Installed,
    ),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Needs {
    /// A mesh that `mesh install` brought, with a record of its settings.
    Installed,
    /// Processes, namespaces or start flags of the local cluster.
    Local,
    /// A shell in the clients' images: the host's on the local cluster, none in the mesh's image.
    Shell,
    /// The programs that the local cluster has under images' names, and a shell: those in the registries say other things, or need more beside them.
    OwnPrograms,
    /// A shell that can open connections; those of the registries can't.
    Bash,
}

/// Why a scenario is not for this cluster.
pub fn left_out(driver: Driver, options: &Options, scenario: &str) -> Option<&'static str> {
    let listed = PARTICULAR.iter().find(|(name, _)| *name == scenario);
    let needs = match listed {
        Some((_, needs)) => *needs,
        None if scenario.starts_with("example ") => Needs::Shell,
        None => return None,
    };
    if driver == Driver::Local {
        let missing = needs == Needs::Installed && !options.install;
        return missing.then_some("needs a mesh that was installed (--install)");
    }
    match needs {
        Needs::Installed => None,
        Needs::Local => Some("looks into the local cluster itself"),
        Needs::OwnPrograms => Some("needs what the local cluster has in place of the images"),
        Needs::Bash => Some("needs bash in the client's image"),
        Needs::Shell if options.images == Images::Mesh => {
            Some("needs a shell in the client's image (--images registry)")
        }
        Needs::Shell => None,
    }
}

/// Writes the archive of a failure; that this fails too must not hide why.
fn collected(
    cluster: &Cluster,
    options: &Options,
    provider: Option<(&dyn Provider, &mut dyn Shell)>,
) {
    cluster.show_state();
    let written = tempfile::tempdir().map_err(Into::into).and_then(|place| {
        if let Some((provider, shell)) = provider {
            let logs = provider.logs(shell, place.path());
            if let Err(error) = logs {
                eprintln!(
                    "the logs of {} could not be had: {error:#}",
                    provider.program()
                );
            }
        }
        collect::everything(cluster, place.path(), &options.failure_archive)
    });
    let archive = options.failure_archive.display();
    match written {
        Ok(()) => eprintln!("objects, events, logs and what the proxies have: {archive}"),
        Err(error) => eprintln!("writing {archive}: {error:#}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::scenarios;
    use super::*;

    #[test]
    fn what_is_left_out_exists() {
        for (name, _) in PARTICULAR {
            let exists = scenarios::ALL.iter().any(|(scenario, _)| scenario == name);
            assert!(exists, "no scenario {name:?}");
        }
    }
}
