//! What the agent knows of one pod's containers: plain data, changed by events, read by `plan.rs` and `status.rs`.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container as ContainerSpec, Pod};

/// The first delay before a container that keeps ending is started again; doubles each time.
const BACKOFF_FIRST: Duration = Duration::from_secs(10);
/// The longest delay, as the kubelet's.
const BACKOFF_MAX: Duration = Duration::from_secs(300);
/// A container that ran this long begins again without delay.
const BACKOFF_RESET: Duration = Duration::from_secs(600);

/// What a container is for in its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Runs to its end before the next one starts.
    Init,
    /// An init container with `restartPolicy: Always`: started in turn, then runs beside the others and ends after them.
    Sidecar,
    /// An ordinary container.
    Main,
}

/// The pod's restart policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Restart {
    /// Whenever it ends.
    Always,
    /// When it ends with a code other than 0.
    OnFailure,
    /// Never.
    Never,
}

/// How a container's run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// The exit code; 128 + signal when a signal ended it.
    pub exit_code: i32,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// `Completed`, `Error`, `ContainerCannotRun` ...
    pub reason: String,
    /// More for people; may be empty.
    pub message: String,
    /// When it was started.
    pub started_at: Timestamp,
    /// When it ended.
    pub finished_at: Timestamp,
    /// The run's id.
    pub container_id: String,
}

/// The state of one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Run {
    /// Not started, for this reason.
    Waiting {
        /// A word such as `PodInitializing` or `ErrImagePull`.
        reason: String,
        /// More for people; may be empty.
        message: String,
    },
    /// The process is being made.
    Starting,
    /// The process runs.
    Running {
        /// On the agent's clock, for the back-off.
        since: Duration,
        /// Wall clock, for the status.
        started_at: Timestamp,
        /// The run's id.
        container_id: String,
    },
    /// The process ended.
    Exited(Ended),
}

/// One container and its history.
#[derive(Debug, Clone)]
pub struct Container {
    /// The name in the pod.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// Whether a startup probe decides on `started`.
    pub startup_probe: bool,
    /// Whether a readiness probe decides on `ready`.
    pub readiness_probe: bool,
    /// Now.
    pub run: Run,
    /// The run before.
    pub last: Option<Ended>,
    /// How often it was started again.
    pub restarts: i32,
    /// Launch attempts so far; also tells late events of an old run from those of this one.
    pub attempt: u32,
    /// Running, and the startup probe has passed (or there is none).
    pub started: bool,
    /// Started, and the readiness probe passes (or there is none).
    pub ready: bool,
    /// A stop has been asked for and not yet happened.
    pub stopping: bool,
    /// Not to be started before this moment of the agent's clock.
    pub not_before: Duration,
    /// Ends in a row, for the back-off.
    pub crashes: u32,
}

impl Container {
    fn new(spec: &ContainerSpec, role: Role) -> Self {
        let reason = if role == Role::Main {
            "PodInitializing"
        } else {
            "ContainerCreating"
        };
        Self {
            name: spec.name.clone(),
            role,
            startup_probe: spec.startup_probe.is_some(),
            readiness_probe: spec.readiness_probe.is_some(),
            run: Run::Waiting {
                reason: reason.to_owned(),
                message: String::new(),
            },
            last: None,
            restarts: 0,
            attempt: 0,
            started: false,
            ready: false,
            stopping: false,
            not_before: Duration::ZERO,
            crashes: 0,
        }
    }

    /// Whether a process exists or is being made.
    pub fn is_alive(&self) -> bool {
        matches!(self.run, Run::Starting | Run::Running { .. })
    }

    /// Takes note that a launch begins.
    pub fn note_launch(&mut self) {
        if let Run::Exited(ended) = &self.run {
            self.last = Some(ended.clone());
            self.restarts += 1;
        }
        self.attempt += 1;
        self.run = Run::Starting;
        self.started = false;
        self.ready = false;
        self.stopping = false;
    }

    /// Takes note that the process runs.
    pub fn note_running(&mut self, container_id: String, started_at: Timestamp, now: Duration) {
        self.run = Run::Running {
            since: now,
            started_at,
            container_id,
        };
        self.started = !self.startup_probe;
        self.ready = self.started && !self.readiness_probe;
    }

    /// Takes note that no process could be made; a later attempt follows after a delay.
    pub fn note_launch_failure(&mut self, reason: &str, message: String, now: Duration) {
        self.run = Run::Waiting {
            reason: reason.to_owned(),
            message,
        };
        self.crashes = self.crashes.max(1);
        self.not_before = now + backoff(self.crashes);
        self.crashes += 1;
        self.started = false;
        self.ready = false;
        self.stopping = false;
    }

    /// Takes note of the end and sets the moment of the next start.
    pub fn note_exit(&mut self, ended: Ended, now: Duration) {
        if let Run::Running { since, .. } = self.run
            && now.saturating_sub(since) >= BACKOFF_RESET
        {
            self.crashes = 0;
        }
        self.not_before = now + backoff(self.crashes);
        self.crashes += 1;
        self.run = Run::Exited(ended);
        self.started = false;
        self.ready = false;
        self.stopping = false;
    }
}

/// The delay before the next start after `crashes` earlier ends in a row. The first restart is immediate: a process that was killed once
/// is back at once, one that keeps failing waits longer and longer, as with the kubelet.
pub fn backoff(crashes: u32) -> Duration {
    match crashes {
        0 => Duration::ZERO,
        n => BACKOFF_FIRST
            .saturating_mul(1u32 << (n - 1).min(8))
            .min(BACKOFF_MAX),
    }
}

/// Everything that decides about a pod's containers.
#[derive(Debug, Clone)]
pub struct PodState {
    /// Init containers and sidecars in order, then the ordinary ones.
    pub containers: Vec<Container>,
    /// The pod's restart policy.
    pub restart: Restart,
    /// All init containers have done their part once.
    pub initialized: bool,
    /// The pod is to end: nothing is started any more.
    pub terminating: bool,
}

impl PodState {
    /// Takes note that a ConfigMap or Secret changed: containers that could not be configured are tried at once.
    pub fn retry_configuration(&mut self) {
        for container in &mut self.containers {
            if matches!(&container.run, Run::Waiting { reason, .. } if reason == "CreateContainerConfigError")
            {
                container.not_before = Duration::ZERO;
            }
        }
    }

    /// The state of a pod that has not begun.
    pub fn new(pod: &Pod) -> Self {
        let spec = pod.spec.as_ref();
        let inits = spec
            .and_then(|s| s.init_containers.as_deref())
            .unwrap_or_default();
        let mains = spec.map(|s| s.containers.as_slice()).unwrap_or_default();
        let containers = inits
            .iter()
            .map(|c| {
                Container::new(
                    c,
                    if c.restart_policy.as_deref() == Some("Always") {
                        Role::Sidecar
                    } else {
                        Role::Init
                    },
                )
            })
            .chain(mains.iter().map(|c| Container::new(c, Role::Main)))
            .collect();
        let restart = match spec.and_then(|s| s.restart_policy.as_deref()) {
            Some("Never") => Restart::Never,
            Some("OnFailure") => Restart::OnFailure,
            _ => Restart::Always,
        };
        Self {
            containers,
            restart,
            initialized: inits.is_empty(),
            terminating: false,
        }
    }
}
