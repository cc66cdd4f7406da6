//! One run of one container, from resolving its program to its exit; a task that reports to the pod's worker.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container as ContainerSpec, LifecycleHandler, Pod};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::Child;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::attach::{self, Streams};
use super::env::{Addresses, environment};
use super::launch::{LaunchFailure, LaunchSpec, ProcessSpec};
use super::logs::RunLog;
use super::probe::{self, Kind, Verdict};
use super::process::{self, Target, exit_code};
use super::resolve::{DEFAULT_PATH, START_ERROR, privileges, program};
use super::rootfs::RootSpec;
use super::sandbox::Sandbox;
use super::state::Ended;
use super::{Shared, cgroup, etc, volumes};

/// A container gets this much after SIGTERM although its hook, or the containers that ended before it, used the grace period up (the
/// kubelet's minimum).
const LAST_GRACE: Duration = Duration::from_secs(2);
/// How long the last output of a container that has ended may take to be read: a client that is attached and reads nothing holds it up.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Ask a container to end by this moment.
#[derive(Debug, Clone, Copy)]
pub struct Stop {
    /// SIGKILL comes then.
    pub deadline: Instant,
    /// Without a moment for SIGTERM: the pod object is gone already.
    pub forced: bool,
}

/// What a run reports.
#[derive(Debug)]
pub enum Report {
    /// The program runs.
    Running {
        /// The run's id.
        id: String,
        /// When it started.
        at: Timestamp,
    },
    /// It could not be started.
    NotStarted(LaunchFailure),
    /// A probe.
    Probe(Kind, Verdict),
    /// It ended.
    Ended(Ended),
}

/// A run that is to be made.
pub struct Run {
    /// The agent.
    pub shared: Arc<Shared>,
    /// The pod.
    pub pod: Pod,
    /// The container.
    pub spec: ContainerSpec,
    /// Its list in the spec, for Events.
    pub list: &'static str,
    /// The pod's namespaces.
    pub sandbox: Arc<Sandbox>,
    /// The pod's folder on the node.
    pub dir: PathBuf,
    /// Counts the runs.
    pub attempt: u32,
    /// Index and attempt come back with each report.
    pub reports: mpsc::Sender<(usize, u32, Report)>,
    /// The container's index in the pod's state.
    pub index: usize,
}

/// The end of a container whose program could not be executed, as the kubelet shows it: it began at no time.
fn never_ran(failure: LaunchFailure) -> Ended {
    Ended {
        exit_code: 128,
        signal: None,
        reason: failure.reason,
        message: failure.message,
        started_at: Timestamp::UNIX_EPOCH,
        finished_at: Timestamp::now(),
        container_id: format!("mesh://{}", uuid::Uuid::new_v4().simple()),
    }
}

impl Run {
    async fn report(&self, report: Report) {
        let _ = self.reports.send((self.index, self.attempt, report)).await;
    }

    fn names(&self) -> (&str, &str) {
        let meta = &self.pod.metadata;
        (
            meta.namespace.as_deref().unwrap_or_default(),
            meta.name.as_deref().unwrap_or_default(),
        )
    }

    fn event(&self, warning: bool, reason: &'static str, message: String) {
        let container = Some((self.list, self.spec.name.as_str()));
        if warning {
            self.shared
                .recorder
                .warning(&self.pod, container, reason, message);
        } else {
            self.shared
                .recorder
                .normal(&self.pod, container, reason, message);
        }
    }

    /// Runs it to its end.
    pub async fn drive(self, stops: mpsc::Receiver<Stop>) {
        match self.launch().await {
            Ok(started) => self.watch(started, stops).await,
            Err(failure) if failure.reason == START_ERROR => {
                self.event(true, "Failed", format!("Error: {}", failure.message));
                self.report(Report::Ended(never_ran(failure))).await;
            }
            Err(failure) => {
                self.event(
                    true,
                    "Failed",
                    format!("Error: {}: {}", failure.reason, failure.message),
                );
                self.report(Report::NotStarted(failure)).await;
            }
        }
    }

    async fn launch(&self) -> Result<Started, LaunchFailure> {
        let mut spec = self.launch_spec().await?;
        let name = &self.spec.name;
        self.event(false, "Created", format!("Created container: {name}"));
        let broken =
            |e: std::io::Error| failure("CreateContainerError", format!("making the log: {e}"));
        let logs = self.dir.join("logs");
        std::fs::create_dir_all(&logs).map_err(broken)?;
        let log =
            RunLog::create(logs.join(format!("{name}-{}.log", self.attempt))).map_err(broken)?;
        let unstreamed = |e: std::io::Error| {
            failure(
                "CreateContainerError",
                format!("making the standard streams: {e}"),
            )
        };
        let (prepared, input) = attach::prepare(&self.spec).map_err(unstreamed)?;
        if spec.process.tty {
            spec.process.describe_terminal();
        }
        let mut child = process::start(self.sandbox.clone(), &spec, input).await?;
        let (streams, screen) = Streams::connect(prepared, &self.spec)
            .await
            .map_err(unstreamed)?;
        let (out, err) = (streams.out.clone(), streams.err.clone());
        let mut copies = Vec::new();
        if let Some(screen) = screen {
            let copy = log.clone().copy("stdout", screen, out.clone());
            copies.push(tokio::spawn(copy));
        }
        if let Some(pipe) = child.stdout.take() {
            copies.push(tokio::spawn(log.clone().copy("stdout", pipe, out)));
        }
        if let Some(pipe) = child.stderr.take() {
            copies.push(tokio::spawn(log.clone().copy("stderr", pipe, err)));
        }
        let target = Target {
            sandbox: self.sandbox.clone(),
            pid: child.id().unwrap_or_default(),
            process: spec.process,
            cgroup: spec.cgroup,
            run: self.shared.run.clone(),
        };
        Ok(Started {
            child,
            target,
            log,
            streams: Arc::new(streams),
            copies,
        })
    }

    async fn launch_spec(&self) -> Result<LaunchSpec, LaunchFailure> {
        let config = |message: String| failure("CreateContainerConfigError", message);
        let references = volumes::gather(&self.shared.client, &self.pod)
            .await
            .map_err(|e| config(e.to_string()))?;
        let addresses = Addresses {
            pod_ip: self.sandbox.ip.to_string(),
            host_ip: super::NODE_IP.to_string(),
            node_name: super::NODE_NAME.to_owned(),
        };
        let own = environment(&self.pod, &self.spec, &references, &addresses)
            .map_err(|e| config(e.to_string()))?;
        let program = program(&self.spec, &own).map_err(|e| failure(e.reason(), e.to_string()))?;
        if self.attempt == 1 {
            let image = self.spec.image.as_deref().unwrap_or_default();
            self.event(
                false,
                "Pulled",
                format!("Container image \"{image}\" already present on machine"),
            );
        }
        let who = privileges(
            &self.pod,
            &self.spec,
            program.image,
            self.shared.uids_mapped,
        )
        .map_err(|e| failure(e.reason(), e.to_string()))?;
        let env = self.full_environment(program.image.map(|i| i.env).unwrap_or_default(), own);
        let lookup: BTreeMap<String, String> = env.iter().cloned().collect();
        let mounts = volumes::mounts(&self.pod, &self.spec, &self.dir.join("volumes"), &lookup)
            .map_err(|e| config(e.to_string()))?;
        let root = self.dir.join("root").join(&self.spec.name);
        std::fs::create_dir_all(&root).map_err(|e| config(e.to_string()))?;
        let etc = etc::files(
            &self.pod,
            self.sandbox.ip,
            who.uid.unwrap_or(0),
            who.gid.unwrap_or(0),
        );
        let cgroup = match &self.shared.cgroups {
            Some(base) => {
                let name = format!(
                    "{}-{}",
                    self.pod.metadata.uid.as_deref().unwrap_or_default(),
                    self.spec.name
                );
                Some(cgroup::make(base, &name, &self.spec).map_err(|e| {
                    failure(
                        "CreateContainerError",
                        format!("making the control group: {e}"),
                    )
                })?)
            }
            None => None,
        };
        let applets = program
            .image
            .map(|i| i.applets)
            .unwrap_or_default()
            .iter()
            .map(|a| (*a).to_owned())
            .collect();
        Ok(LaunchSpec {
            root: RootSpec {
                dir: root,
                binary: self.shared.run.join("mesh"),
                applets,
                etc,
                mounts,
            },
            process: ProcessSpec {
                argv: program.argv,
                env,
                cwd: program.cwd,
                privileges: who,
                tty: self.spec.tty == Some(true),
            },
            cgroup,
        })
    }

    fn full_environment(
        &self,
        image: &[(&str, &str)],
        own: Vec<(String, String)>,
    ) -> Vec<(String, String)> {
        let mut env = vec![
            ("PATH".to_owned(), DEFAULT_PATH.to_owned()),
            ("HOSTNAME".to_owned(), etc::hostname(&self.pod)),
            ("HOME".to_owned(), "/".to_owned()),
        ];
        env.extend(
            image
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
        );
        env.retain(|(name, _)| !own.iter().any(|(n, _)| n == name));
        env.extend(own);
        env
    }

    async fn watch(&self, started: Started, mut stops: mpsc::Receiver<Stop>) {
        let Started {
            mut child,
            target,
            log,
            streams,
            copies,
        } = started;
        let (namespace, pod) = self.names();
        let pid = target.pid;
        self.shared.registry.started(
            namespace,
            pod,
            &self.spec.name,
            target.clone(),
            streams.clone(),
            log.clone(),
        );
        let started_at = Timestamp::now();
        let id = format!("mesh://{}", uuid::Uuid::new_v4().simple());
        self.event(
            false,
            "Started",
            format!("Started container {}", self.spec.name),
        );
        let mut message = self.post_start(&mut child, &target).await;
        let probes = if message.is_none() {
            self.report(Report::Running {
                id: id.clone(),
                at: started_at,
            })
            .await;
            Some(self.start_probes(&target))
        } else {
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
            None
        };
        let status = tokio::select! {
            status = child.wait() => status,
            Some(stop) = stops.recv() => self.stop(&mut child, &target, stop, &mut stops).await,
        };
        if let Some(probes) = probes {
            probes.abort();
        }
        // All processes of the container have ended, so what they wrote is there to be read.
        let _ = tokio::time::timeout(LAST_WORDS, futures::future::join_all(copies)).await;
        log.end();
        streams.end();
        self.shared
            .registry
            .ended(namespace, pod, &self.spec.name, pid);
        if let Some(group) = &target.cgroup {
            let _ = std::fs::remove_dir(group);
        }
        let exit_code = status.map_or(255, exit_code);
        if message.is_none()
            && exit_code != 0
            && self.spec.termination_message_policy.as_deref() == Some("FallbackToLogsOnError")
        {
            message = Some(log.tail(80));
        }
        let ended = Ended {
            exit_code,
            // PID 1 of the container passes a signal's number on as 128 + number.
            signal: None,
            reason: if exit_code == 0 { "Completed" } else { "Error" }.to_owned(),
            message: message.unwrap_or_default(),
            started_at,
            finished_at: Timestamp::now(),
            container_id: id,
        };
        self.report(Report::Ended(ended)).await;
    }

    fn start_probes(&self, target: &Target) -> tokio::task::JoinHandle<()> {
        let (send, mut receive) = mpsc::channel(4);
        let (reports, index, attempt) = (self.reports.clone(), self.index, self.attempt);
        let run = probe::run_all(self.spec.clone(), target.clone(), send);
        tokio::spawn(async move {
            let forward = async {
                while let Some((kind, verdict)) = receive.recv().await {
                    let _ = reports
                        .send((index, attempt, Report::Probe(kind, verdict)))
                        .await;
                }
            };
            tokio::join!(run, forward);
        })
    }

    /// Runs the postStart hook; `Some`: it failed and the container is to be killed.
    async fn post_start(&self, child: &mut Child, target: &Target) -> Option<String> {
        let handler = self.spec.lifecycle.as_ref()?.post_start.as_ref()?;
        let result = tokio::select! {
            result = self.hook(handler, target, Duration::from_secs(3600)) => result,
            _ = child.wait() => return None,
        };
        let error = result.err()?;
        self.event(
            true,
            "FailedPostStartHook",
            format!("PostStartHook failed: {error}"),
        );
        Some(format!("PostStartHook failed: {error}"))
    }

    async fn hook(
        &self,
        handler: &LifecycleHandler,
        target: &Target,
        limit: Duration,
    ) -> Result<(), String> {
        if let Some(exec) = &handler.exec {
            return probe::run_exec(exec, target, limit).await;
        }
        if let Some(get) = &handler.http_get {
            let get = probe::http_get(get, &self.spec, target);
            return tokio::time::timeout(limit, get)
                .await
                .unwrap_or_else(|_| Err("no answer in time".to_owned()));
        }
        if let Some(sleep) = &handler.sleep {
            tokio::time::sleep(
                Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0)).min(limit),
            )
            .await;
            return Ok(());
        }
        Err("this kind of hook is not supported: use exec, httpGet or sleep".to_owned())
    }

    async fn stop(
        &self,
        child: &mut Child,
        target: &Target,
        stop: Stop,
        stops: &mut mpsc::Receiver<Stop>,
    ) -> std::io::Result<std::process::ExitStatus> {
        self.event(
            false,
            "Killing",
            format!("Stopping container {}", self.spec.name),
        );
        let (mut deadline, mut forced) = (stop.deadline, stop.forced);
        if let Some(handler) = self
            .spec
            .lifecycle
            .as_ref()
            .and_then(|l| l.pre_stop.as_ref())
        {
            let limit = deadline.saturating_duration_since(Instant::now());
            tokio::select! {
                status = child.wait() => return status,
                result = self.hook(handler, target, limit) => if let Err(error) = result {
                    self.event(true, "FailedPreStopHook", format!("PreStopHook failed: {error}"));
                },
                Some(sooner) = stops.recv() => {
                    deadline = deadline.min(sooner.deadline);
                    forced |= sooner.forced;
                }
            }
        }
        if !forced {
            deadline = deadline.max(Instant::now() + LAST_GRACE);
        }
        let _ = kill(Pid::from_raw(target.pid as i32), Signal::SIGTERM);
        loop {
            tokio::select! {
                status = child.wait() => return status,
                Some(sooner) = stops.recv() => deadline = deadline.min(sooner.deadline),
                () = tokio::time::sleep_until(deadline) => break,
            }
        }
        let _ = kill(Pid::from_raw(target.pid as i32), Signal::SIGKILL);
        child.wait().await
    }
}

/// A run whose program was started.
struct Started {
    child: Child,
    target: Target,
    log: Arc<RunLog>,
    streams: Arc<Streams>,
    /// The tasks that copy its output; they end with it.
    copies: Vec<JoinHandle<()>>,
}

fn failure(reason: &str, message: String) -> LaunchFailure {
    LaunchFailure {
        reason: reason.to_owned(),
        message,
    }
}
