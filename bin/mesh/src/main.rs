//! The `mesh` binary: the command tree and its dispatch.
//!
//! In: the command line, or the name it was called by. Out: an exit code. Never: anything that a crate could do.
//! Start here: [`Command`] lists the modes; each one's work is in the crate that the dispatch calls.

mod all_in_one;
mod attached;
mod control;
mod offline;
mod proxy;

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use mesh_cli::global::Global;

/// A complete service mesh in one binary.
#[derive(Parser)]
#[command(
    name = "mesh",
    version,
    about,
    propagate_version = true,
    disable_help_subcommand = true
)]
struct Mesh {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a local cluster with the mesh in it: API, control plane, gateway, and samples on request
    AllInOne(all_in_one::Args),
    /// Install the mesh into a cluster, or change an installation
    Install(mesh_cli::installer::Args),
    /// Bring an installation to this version
    Upgrade(mesh_cli::upgrade::Args),
    /// Remove an installation from a cluster
    Uninstall(mesh_cli::uninstall::Args),
    /// Check an installation object by object
    VerifyInstall(mesh_cli::verify_install::Args),
    /// Give revisions names by which namespaces choose their control plane
    Tag(mesh_cli::tag::Args),
    /// Print the objects of an installation
    Manifest(mesh_cli::manifest::Args),
    /// Show the built-in profiles of an installation
    Profile(mesh_cli::profile::Args),
    /// Apply manifests
    Apply(mesh_cli::apply::Args),
    /// Show objects
    Get(mesh_cli::get::Args),
    /// Show objects in full, with their events
    Describe(mesh_cli::describe::Args),
    /// Delete objects
    Delete(mesh_cli::delete::Args),
    /// Add the sidecar to the pods in manifests, and print the result
    KubeInject(mesh_cli::kube_inject::Args),
    /// Print the log of a container
    Logs(mesh_cli::logs::Args),
    /// Run a command in a container
    Exec(mesh_cli::exec::Args),
    /// Wait until the proxy of this pod is ready
    Wait(mesh_cli::wait::Args),
    /// Make one request to the proxy of this pod
    Request(mesh_cli::request::Args),
    /// Show what a proxy has: its certificates and roots
    #[command(alias = "pc")]
    ProxyConfig(mesh_cli::proxy_config::Args),
    /// Show which proxies are connected and have taken what they were sent, or in what one differs
    #[command(visible_alias = "ps")]
    ProxyStatus(mesh_cli::proxy_status::Args),
    /// Look at the mesh's certificate authority, or change its root
    Ca(mesh_cli::ca::Args),
    /// Print the versions of this program and of the control plane
    Version(mesh_cli::version::Args),
    /// Print manifests with the samples' images replaced by the mesh's own, for a cluster that pulls nothing
    Offline(offline::Args),
    /// Export, import or check a state directory
    State(mesh_cli::state::Args),
    /// Print a shell's completion script
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Run the control plane (in a pod, or beside a cluster with --kubeconfig)
    #[command(alias = "discovery")]
    Control(control::Args),
    /// Run the proxy of a pod, as a sidecar or as a gateway
    Proxy(proxy::Args),
    /// Set up traffic capture in this network namespace
    #[command(
        alias = "istio-iptables",
        disable_help_flag = true,
        disable_version_flag = true
    )]
    Init {
        /// The flags of istio-iptables; `mesh init --help` lists them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        flags: Vec<String>,
    },
    /// Run one of the built-in sample applications
    Sample {
        /// Its name, such as productpage
        name: String,
        /// Its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    // Stages of the local cluster and applets come first: they must not start threads, and their arguments are not ours.
    if let Some(code) = mesh_local::stage_main(&args) {
        return code;
    }
    if let Some(code) = called_by_another_name(&args) {
        return code;
    }
    match run(parse(args)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The commands that no cluster is chosen for.
const WITHOUT_CLUSTER: [&str; 9] = [
    "all-in-one",
    "proxy",
    "wait",
    "request",
    "offline",
    "state",
    "completion",
    "manifest",
    "profile",
];

/// What flags that choose a cluster mean to all-in-one, which does not look for one by itself.
const ATTACHED: [(&str, &str); 3] = [
    (
        "kubeconfig",
        "Not a local cluster: be control plane, injector and ingress gateway beside the cluster of this kubeconfig",
    ),
    (
        "context",
        "The same beside the cluster of this context (of KUBECONFIG or ~/.kube/config where no kubeconfig is given)",
    ),
    (
        "istio_namespace",
        "Namespace of the mesh's own parts in that cluster",
    ),
];

/// What a flag that chooses a cluster means to a command that none is chosen for, if anything.
fn meaning(command: &str, flag: &str) -> Option<&'static str> {
    let found = ATTACHED.iter().find(|(name, _)| *name == flag);
    found
        .filter(|_| command == "all-in-one")
        .map(|(_, help)| *help)
}

/// The command tree. Where the flags that choose a cluster mean nothing, they don't show in the help.
fn command_line() -> clap::Command {
    let tree = Mesh::command();
    let global: Vec<clap::Arg> = tree
        .get_arguments()
        .filter(|arg| arg.is_global_set())
        .map(|arg| arg.clone().hide(true))
        .collect();
    WITHOUT_CLUSTER.iter().fold(tree, |tree, name| {
        let args = global
            .iter()
            .map(|arg| match meaning(name, arg.get_id().as_str()) {
                Some(help) => arg.clone().hide(false).help(help),
                None => arg.clone(),
            });
        tree.mut_subcommand(name, |command| command.args(args))
    })
}

fn parse(args: Vec<OsString>) -> Mesh {
    let mut tree = command_line();
    let matches = tree
        .try_get_matches_from_mut(args)
        .unwrap_or_else(|error| error.exit());
    if let Some(name) = matches
        .subcommand_name()
        .filter(|name| WITHOUT_CLUSTER.contains(name))
    {
        let given = tree.get_arguments().find(|arg| {
            let id = arg.get_id().as_str();
            arg.is_global_set() && meaning(name, id).is_none() && is_given(&matches, id)
        });
        if let Some(flag) = given.and_then(|arg| arg.get_long()) {
            let message = format!(
                "--{flag} chooses a cluster, and `mesh {name}` talks to none: leave it out"
            );
            tree.error(ErrorKind::ArgumentConflict, message).exit();
        }
    }
    let mut mesh = Mesh::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    if let Command::AllInOne(args) = &mesh.command {
        mesh.global.in_cluster = args.in_cluster;
        // The cluster of an environment may be somebody's production.
        if !is_given(&matches, "kubeconfig") {
            mesh.global.kubeconfig = None;
        }
    }
    mesh
}

fn is_given(matches: &clap::ArgMatches, flag: &str) -> bool {
    matches.value_source(flag) == Some(ValueSource::CommandLine)
}

/// `curl`, `sleep` and the like are links to this binary in the pods of the local cluster.
fn called_by_another_name(args: &[OsString]) -> Option<ExitCode> {
    let name = Path::new(args.first()?).file_name()?.to_str()?.to_owned();
    if !mesh_samples::is_applet(&name) {
        return None;
    }
    let rest: Vec<String> = args[1..]
        .iter()
        .map(|a| a.to_string_lossy().into_owned())
        .collect();
    provide_crypto();
    mesh_samples::applet(&name, &rest)
}

fn run(mesh: Mesh) -> anyhow::Result<ExitCode> {
    provide_crypto();
    let global = mesh.global;
    match mesh.command {
        // Starts processes in namespaces: no thread may exist yet.
        Command::AllInOne(args) if global.is_chosen() => block_on(attached::run(args, &global)),
        Command::AllInOne(args) => all_in_one::run(args),
        Command::Proxy(args) => proxy::run(args),
        Command::Control(args) => block_on(control::run(args, &global)),
        Command::Install(args) => block_on(mesh_cli::installer::run(args, &global)),
        Command::Upgrade(args) => block_on(mesh_cli::upgrade::run(args, &global)),
        Command::Uninstall(args) => block_on(mesh_cli::uninstall::run(args, &global)),
        Command::VerifyInstall(args) => block_on(mesh_cli::verify_install::run(args, &global)),
        Command::Tag(args) => block_on(mesh_cli::tag::run(args, &global)),
        Command::Manifest(args) => mesh_cli::manifest::run(args, &global),
        Command::Profile(args) => mesh_cli::profile::run(args, &global),
        Command::Apply(args) => block_on(mesh_cli::apply::run(args, &global)),
        Command::Get(args) => block_on(mesh_cli::get::run(args, &global)),
        Command::Describe(args) => block_on(mesh_cli::describe::run(args, &global)),
        Command::Delete(args) => block_on(mesh_cli::delete::run(args, &global)),
        Command::KubeInject(args) => block_on(mesh_cli::kube_inject::run(args, &global)),
        Command::Logs(args) => block_on(mesh_cli::logs::run(args, &global)),
        Command::Exec(args) => block_on(mesh_cli::exec::run(args, &global)),
        Command::Wait(args) => block_on(mesh_cli::wait::run(args)),
        Command::Request(args) => block_on(mesh_cli::request::run(args)),
        Command::ProxyConfig(args) => block_on(mesh_cli::proxy_config::run(args, &global)),
        Command::ProxyStatus(args) => block_on(mesh_cli::proxy_status::run(args, &global)),
        Command::Ca(args) => block_on(mesh_cli::ca::run(args, &global)),
        Command::Version(args) => block_on(mesh_cli::version::run(args, &global)),
        Command::Offline(args) => offline::run(&args).map(|()| ExitCode::SUCCESS),
        Command::State(args) => mesh_cli::state::run(args),
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut command_line(), "mesh", &mut script);
            print(&script).map(|()| ExitCode::SUCCESS)
        }
        Command::Init { flags } => {
            let mut report = Vec::new();
            let done = mesh_net::capture::run_init(&flags, &mut report);
            print(&report)?;
            let Err(error) = done else {
                return Ok(ExitCode::SUCCESS);
            };
            let code = error.exit_code();
            eprintln!("error: setting up traffic capture: {error}");
            Ok(ExitCode::from(code))
        }
        Command::Sample { name, args } => {
            mesh_samples::run(&name, &args).map(|()| ExitCode::SUCCESS)
        }
    }
}

/// rustls asks for the process's provider where a library does not name one.
fn provide_crypto() {
    // It fails only when one is installed already.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let runtime = runtime.context("starting the runtime")?;
    let done = runtime.block_on(work);
    // A read from a terminal can't be cancelled, and nothing else is worth waiting for.
    runtime.shutdown_background();
    done
}

/// Writes to standard output; where its reader has seen enough, the program ends as the signal would end it.
fn print(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(141),
        written => written.context("writing to standard output"),
    }
}
