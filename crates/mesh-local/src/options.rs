//! What the command line hands to the local cluster. Sent as JSON from the parent to the node process.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::users::ClusterUser;

/// Where the cluster keeps what must outlive it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum StateDir {
    /// `$XDG_STATE_HOME/mesh`, else `~/.local/state/mesh`.
    Default,
    /// In memory, under a temporary directory that is removed at the end (`--state-dir ''`).
    Memory,
    /// This directory; made (0700) when it does not exist.
    Path(PathBuf),
}

/// One port of a Service that is to be reachable on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPort {
    /// The Service's namespace.
    pub namespace: String,
    /// The Service's name.
    pub service: String,
    /// The port of the Service (not the target port).
    pub port: u16,
    /// The address on the host; port 0 takes a free one. Bound before anything starts, so that a port in use is told at once.
    pub address: SocketAddr,
    /// The flag that the user changes when the port is taken, such as `--http-port`; for the error message.
    pub flag: String,
    /// Printed at the end as `TITLE  http://ADDRESS PATH`: the title and the path. `None`: nothing is printed.
    pub link: Option<(String, String)>,
}

/// What a [`BootWave`] waits for after its documents are applied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitFor {
    /// The Deployment's namespace.
    pub namespace: String,
    /// The Deployment's name; the wave waits until every replica of its current generation is available.
    pub deployment: String,
}

/// A set of manifests that is applied together when the cluster starts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BootWave {
    /// What people read in the progress line, such as `control plane`.
    pub title: String,
    /// The objects as JSON, applied in order by server-side apply (field manager `mesh-boot`, forced).
    pub documents: Vec<serde_json::Value>,
    /// Waited for before the next wave begins; empty = the next wave follows at once.
    pub wait: Vec<WaitFor>,
}

/// Everything `all-in-one` can be told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClusterOptions {
    /// Where state is kept.
    pub state_dir: StateDir,
    /// The host address of the Kubernetes API (default `127.0.0.1:6443`; port 0 takes a free one).
    pub api_address: SocketAddr,
    /// Who may use the API beside the administrator and service accounts; what they may do is up to roles (default none).
    pub users: Vec<ClusterUser>,
    /// Ports of Services on the host.
    pub host_ports: Vec<HostPort>,
    /// Applied in order when the cluster starts; empty for `--profile empty`.
    pub boot: Vec<BootWave>,
    /// How long one wave may take, in seconds, before the start is given up with an error that names what is missing (default 120).
    pub boot_timeout_seconds: u64,
    /// The log filter of the node process, in `tracing`'s syntax (default `warn`).
    pub log_filter: String,
    /// Stop after the boot waves and the summary; for scripts and tests (default false).
    pub exit_when_ready: bool,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        Self {
            state_dir: StateDir::Default,
            api_address: SocketAddr::from(([127, 0, 0, 1], 6443)),
            users: Vec::new(),
            host_ports: Vec::new(),
            boot: Vec::new(),
            boot_timeout_seconds: 120,
            log_filter: "warn".to_owned(),
            exit_when_ready: false,
        }
    }
}
