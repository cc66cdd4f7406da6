//! One pod: a task that owns its state, asks `plan.rs` what to do, does it, and reports the status.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container as ContainerSpec, Pod};
use kube::api::{Api, DeleteParams, Patch, PatchParams, Preconditions};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::container::{Report, Run, Stop};
use super::env::Addresses;
use super::plan::{Action, Outcome, Plan, plan};
use super::probe::{Kind, Verdict};
use super::sandbox::{NODE_IP, Sandbox};
use super::state::{Ended, PodState, Restart, Run as RunState};
use super::status::{Facts, status};
use super::unsupported::unsupported;
use super::{NODE_NAME, Shared, etc, sandbox, volumes};

/// The pause after a sandbox or volume could not be made; doubles up to [`RETRY_MAX`]. A change of what was missing ends it at once.
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(10);

/// What a worker is told.
#[derive(Debug)]
pub enum Change {
    /// The pod object changed.
    Pod(Box<Pod>),
    /// A ConfigMap or Secret that the pod refers to changed.
    References,
    /// The pod object is gone.
    Removed,
}

/// Runs `pod` until it is gone.
pub async fn run(shared: Arc<Shared>, pod: Pod, changes: mpsc::UnboundedReceiver<Change>) {
    let finished = pod
        .status
        .as_ref()
        .and_then(|s| s.phase.as_deref())
        .is_some_and(|p| p == "Succeeded" || p == "Failed");
    let uid = pod.metadata.uid.clone().unwrap_or_default();
    let dir = shared.run.join("pods").join(&uid);
    let (reports, inbox) = mpsc::channel(64);
    let previous = pod
        .status
        .as_ref()
        .and_then(|s| serde_json::to_value(s).ok())
        .unwrap_or_default();
    let (status, writer) = start_writer(&shared, &pod);
    let mut worker = Worker {
        state: PodState::new(&pod),
        facts: Facts {
            started_at: pod
                .status
                .as_ref()
                .and_then(|s| s.start_time.as_ref())
                .map(|t| t.0)
                .or_else(|| Some(Timestamp::now())),
            host_network: pod.spec.as_ref().and_then(|s| s.host_network) == Some(true),
            ip: None,
        },
        sandbox: None,
        born: Instant::now(),
        end_by: None,
        stops: HashMap::new(),
        removed: false,
        shared,
        uid,
        dir,
        reports,
        inbox,
        changes,
        previous,
        status,
        pod,
    };
    resume(&mut worker.state, &worker.pod);
    if finished {
        worker.rest().await;
    } else {
        worker.go().await;
    }
    worker.clean_up(writer).await;
}

/// Takes over what an earlier run of the cluster left in the status: its processes ended with it.
fn resume(state: &mut PodState, pod: &Pod) {
    let Some(status) = &pod.status else { return };
    let before = status
        .container_statuses
        .iter()
        .chain(&status.init_container_statuses)
        .flatten();
    for old in before {
        let Some(container) = state.containers.iter_mut().find(|c| c.name == old.name) else {
            continue;
        };
        let started = old
            .state
            .as_ref()
            .and_then(|s| s.running.as_ref())
            .and_then(|r| r.started_at.as_ref())
            .map(|t| t.0);
        container.restarts = old.restart_count;
        if let Some(started_at) = started {
            container.restarts += 1;
            container.last = Some(Ended {
                exit_code: 137,
                signal: None,
                reason: "ContainerStatusUnknown".to_owned(),
                message: "The container was running when the cluster was stopped".to_owned(),
                started_at,
                finished_at: Timestamp::now(),
                container_id: old.container_id.clone().unwrap_or_default(),
            });
        }
    }
}

/// Writes the newest status; those in between are skipped, the order is kept.
fn start_writer(shared: &Arc<Shared>, pod: &Pod) -> (watch::Sender<Value>, JoinHandle<()>) {
    let (send, mut receive) = watch::channel(Value::Null);
    let meta = &pod.metadata;
    let api: Api<Pod> = Api::namespaced(
        shared.client.clone(),
        meta.namespace.as_deref().unwrap_or("default"),
    );
    let (name, uid) = (meta.name.clone().unwrap_or_default(), meta.uid.clone());
    let task = tokio::spawn(async move {
        while receive.changed().await.is_ok() {
            let mut tries = 0;
            loop {
                let status = receive.borrow_and_update().clone();
                // The uid makes this fail for another pod of the same name.
                let patch = Patch::Merge(json!({"metadata": {"uid": uid}, "status": status}));
                match api
                    .patch_status(&name, &PatchParams::default(), &patch)
                    .await
                {
                    Ok(_) => break,
                    Err(kube::Error::Api(e)) if e.code == 404 || e.code == 409 && tries > 2 => {
                        break;
                    }
                    Err(error) => {
                        tracing::warn!(pod = name, %error, "the pod's status could not be written");
                        tries += 1;
                        tokio::time::sleep(Duration::from_millis(50 << tries.min(6))).await;
                    }
                }
            }
        }
    });
    (send, task)
}

struct Worker {
    shared: Arc<Shared>,
    pod: Pod,
    uid: String,
    dir: PathBuf,
    state: PodState,
    facts: Facts,
    sandbox: Option<Arc<Sandbox>>,
    born: Instant,
    /// When everything must have ended, once the pod is to end.
    end_by: Option<Instant>,
    stops: HashMap<usize, mpsc::Sender<Stop>>,
    reports: mpsc::Sender<(usize, u32, Report)>,
    inbox: mpsc::Receiver<(usize, u32, Report)>,
    changes: mpsc::UnboundedReceiver<Change>,
    previous: Value,
    status: watch::Sender<Value>,
    removed: bool,
}

impl Worker {
    fn now(&self) -> Duration {
        self.born.elapsed()
    }

    fn names(&self) -> (String, String) {
        let meta = &self.pod.metadata;
        (
            meta.namespace.clone().unwrap_or_default(),
            meta.name.clone().unwrap_or_default(),
        )
    }

    /// A pod that had finished before: nothing to run, only its end to wait for.
    async fn rest(&mut self) {
        self.note_deletion();
        while !self.state.terminating {
            match self.changes.recv().await {
                Some(change) => self.apply(change),
                None => return,
            }
        }
    }

    async fn go(&mut self) {
        self.note_deletion();
        for message in unsupported(
            &self.pod,
            self.shared.uids_mapped,
            self.shared.cgroups.is_some(),
        ) {
            self.shared
                .recorder
                .warning(&self.pod, None, "NotSupported", message);
        }
        self.publish(&Plan::default());
        let Some(mut renew) = self.set_up().await else {
            return;
        };
        loop {
            let plan = plan(&self.state, self.now());
            self.state.initialized = plan.initialized;
            for action in &plan.actions {
                match action {
                    Action::Start(index) => self.start(*index),
                    Action::Stop(index) => self.stop(*index, None),
                }
            }
            self.publish(&plan);
            if plan.outcome == Outcome::Gone {
                return;
            }
            let wake = plan.wake.map(|at| self.born + at);
            let next = [wake, renew].into_iter().flatten().min();
            let sleep = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                report = self.inbox.recv() => if let Some((index, attempt, report)) = report {
                    self.note(index, attempt, report);
                },
                change = self.changes.recv() => match change {
                    Some(Change::References) => {
                        renew = Some(Instant::now());
                        self.state.retry_configuration();
                    }
                    Some(change) => self.apply(change),
                    // The agent is ending, and the cluster with it.
                    None => return,
                },
                () = sleep => {}
            }
            if renew.is_some_and(|at| at <= Instant::now()) && !self.state.terminating {
                renew = match self.write_volumes().await {
                    Ok(after) => after.map(|after| Instant::now() + after),
                    Err(error) => {
                        self.shared.recorder.warning(
                            &self.pod,
                            None,
                            "FailedMount",
                            error.to_string(),
                        );
                        Some(Instant::now() + RETRY_MAX)
                    }
                };
            }
        }
    }

    /// Makes sandbox and volumes, trying again until it works. `None`: the pod ended before. Else the moment of the first token renewal.
    async fn set_up(&mut self) -> Option<Option<Instant>> {
        let mut pause = RETRY_FIRST;
        loop {
            if self.state.terminating {
                return None;
            }
            let failed = match self.try_set_up().await {
                Ok(renew) => return Some(renew.map(|after| Instant::now() + after)),
                Err(failed) => failed,
            };
            self.shared
                .recorder
                .warning(&self.pod, None, failed.0, failed.1);
            let until = Instant::now() + pause;
            pause = (pause * 2).min(RETRY_MAX);
            tokio::select! {
                change = self.changes.recv() => match change {
                    Some(change) => self.apply(change),
                    None => return None,
                },
                () = tokio::time::sleep_until(until) => {}
            }
        }
    }

    async fn try_set_up(&mut self) -> Result<Option<Duration>, (&'static str, String)> {
        if self.sandbox.is_none() {
            let sandbox = self
                .make_sandbox()
                .await
                .map_err(|e| ("FailedCreatePodSandBox", format!("{e:#}")))?;
            self.facts.ip = Some(sandbox.ip.to_string());
            let (namespace, name) = self.names();
            self.shared
                .registry
                .add_pod(&namespace, &name, &self.uid, sandbox.clone());
            self.sandbox = Some(sandbox);
        }
        self.write_volumes()
            .await
            .map_err(|e| ("FailedMount", e.to_string()))
    }

    async fn make_sandbox(&self) -> anyhow::Result<Arc<Sandbox>> {
        if self.facts.host_network {
            return Ok(Arc::new(Sandbox::of_node()));
        }
        let ip = self.shared.ipam.take(std::time::Instant::now());
        let ip: Ipv4Addr =
            ip.ok_or_else(|| anyhow::anyhow!("all addresses of the pod network are in use"))?;
        let index = self.shared.counter.fetch_add(1, Ordering::Relaxed);
        let made = Sandbox::create(ip, etc::kernel_hostname(&self.pod), index).await;
        if made.is_err() {
            self.shared.ipam.release(ip, std::time::Instant::now());
        }
        made.map(Arc::new)
    }

    async fn write_volumes(&self) -> Result<Option<Duration>, volumes::VolumeError> {
        let node = |source: anyhow::Error| volumes::VolumeError::Node {
            volume: "(references)".to_owned(),
            source,
        };
        let references = volumes::gather(&self.shared.client, &self.pod)
            .await
            .map_err(|e| node(e.into()))?;
        let addresses = Addresses {
            pod_ip: self.facts.ip.clone().unwrap_or_default(),
            host_ip: NODE_IP.to_string(),
            node_name: NODE_NAME.to_owned(),
        };
        volumes::write_all(
            &self.shared.client,
            &self.pod,
            &references,
            &addresses,
            &self.dir.join("volumes"),
        )
        .await
    }

    fn spec_of(&self, index: usize) -> Option<(&'static str, &ContainerSpec)> {
        let spec = self.pod.spec.as_ref()?;
        let inits = spec.init_containers.as_deref().unwrap_or_default();
        match index.checked_sub(inits.len()) {
            None => Some(("initContainers", inits.get(index)?)),
            Some(main) => Some(("containers", spec.containers.get(main)?)),
        }
    }

    fn start(&mut self, index: usize) {
        let (Some(sandbox), Some((list, spec))) = (self.sandbox.clone(), self.spec_of(index))
        else {
            return;
        };
        let spec = spec.clone();
        let Some(container) = self.state.containers.get_mut(index) else {
            return;
        };
        container.note_launch();
        let run = Run {
            shared: self.shared.clone(),
            pod: self.pod.clone(),
            spec,
            list,
            sandbox,
            dir: self.dir.clone(),
            attempt: container.attempt,
            reports: self.reports.clone(),
            index,
        };
        let (stop, stops) = mpsc::channel(4);
        self.stops.insert(index, stop);
        tokio::spawn(run.drive(stops));
    }

    fn grace(&self) -> Duration {
        let spec = self
            .pod
            .spec
            .as_ref()
            .and_then(|s| s.termination_grace_period_seconds);
        let seconds = self
            .pod
            .metadata
            .deletion_grace_period_seconds
            .or(spec)
            .unwrap_or(30);
        // No longer than any clock can count: the field takes every 64-bit number.
        Duration::from_secs(u64::from(
            u32::try_from(seconds.clamp(0, i64::from(u32::MAX))).unwrap_or(0),
        ))
    }

    /// Ends a container; `grace` is for this time only, else the pod's counts.
    fn stop(&mut self, index: usize, grace: Option<Duration>) {
        let grace = grace.unwrap_or_else(|| self.grace());
        let deadline = self.end_by.unwrap_or_else(|| Instant::now() + grace);
        if let Some(container) = self.state.containers.get_mut(index) {
            container.stopping = true;
        }
        if let Some(stop) = self.stops.get(&index) {
            let _ = stop.try_send(Stop {
                deadline,
                forced: self.removed,
            });
        }
    }

    fn apply(&mut self, change: Change) {
        match change {
            Change::Pod(pod) => self.pod = *pod,
            Change::References => {}
            Change::Removed => {
                self.removed = true;
                self.state.terminating = true;
                self.hurry(Instant::now());
            }
        }
        self.note_deletion();
    }

    fn note_deletion(&mut self) {
        if self.pod.metadata.deletion_timestamp.is_some() && !self.removed {
            self.state.terminating = true;
            self.hurry(Instant::now() + self.grace());
        }
    }

    /// Moves the end forward, never back; containers that are stopping already are told.
    fn hurry(&mut self, by: Instant) {
        if self.end_by.is_some_and(|end| end <= by) {
            return;
        }
        self.end_by = Some(by);
        for (index, stop) in &self.stops {
            if self
                .state
                .containers
                .get(*index)
                .is_some_and(|c| c.stopping)
            {
                let _ = stop.try_send(Stop {
                    deadline: by,
                    forced: self.removed,
                });
            }
        }
    }

    fn note(&mut self, index: usize, attempt: u32, report: Report) {
        let now = self.now();
        let backing_off = self.state.restart != Restart::Never;
        let Some((list, spec)) = self
            .spec_of(index)
            .map(|(list, spec)| (list, spec.name.clone()))
        else {
            return;
        };
        let Some(container) = self
            .state
            .containers
            .get_mut(index)
            .filter(|c| c.attempt == attempt)
        else {
            return;
        };
        match report {
            Report::Running { id, at } => container.note_running(id, at, now),
            Report::NotStarted(failure) => {
                let again = failure.reason == "ErrImagePull" && attempt > 1;
                let reason = if again {
                    "ImagePullBackOff"
                } else {
                    failure.reason.as_str()
                };
                container.note_launch_failure(reason, failure.message, now);
                self.stops.remove(&index);
            }
            Report::Ended(ended) => {
                let failed = ended.exit_code != 0;
                container.note_exit(ended, now);
                if failed && backing_off && container.not_before > now {
                    let message = format!("Back-off restarting failed container {spec} in pod");
                    self.shared.recorder.warning(
                        &self.pod,
                        Some((list, &spec)),
                        "BackOff",
                        message,
                    );
                }
                self.stops.remove(&index);
            }
            Report::Probe(kind, verdict) => self.note_probe(index, kind, verdict),
        }
    }

    fn note_probe(&mut self, index: usize, kind: Kind, verdict: Verdict) {
        let Some((list, name)) = self
            .spec_of(index)
            .map(|(list, spec)| (list, spec.name.clone()))
        else {
            return;
        };
        let Some(container) = self.state.containers.get_mut(index) else {
            return;
        };
        if !matches!(container.run, RunState::Running { .. }) || container.stopping {
            return;
        }
        if let Verdict::Unhealthy(message) | Verdict::Failing(message, _) = &verdict {
            let message = format!("{} probe failed: {message}", kind.word());
            self.shared
                .recorder
                .warning(&self.pod, Some((list, &name)), "Unhealthy", message);
        }
        match (kind, verdict) {
            (Kind::Startup, Verdict::Passing) => {
                container.started = true;
                container.ready = !container.readiness_probe;
            }
            (Kind::Readiness, Verdict::Passing) => container.ready = true,
            (Kind::Readiness, Verdict::Failing(..)) => container.ready = false,
            (Kind::Startup | Kind::Liveness, Verdict::Failing(_, grace)) => {
                let message = format!(
                    "Container {name} failed {} probe, will be restarted",
                    kind.word().to_lowercase()
                );
                self.shared
                    .recorder
                    .normal(&self.pod, Some((list, &name)), "Killing", message);
                let grace = grace.and_then(|s| u64::try_from(s).ok());
                self.stop(index, grace.map(Duration::from_secs));
            }
            (Kind::Liveness, Verdict::Passing) | (_, Verdict::Unhealthy(_)) => {}
        }
    }

    fn publish(&mut self, plan: &Plan) {
        let next = status(
            &self.pod,
            &self.state,
            plan,
            &self.facts,
            &self.previous,
            Timestamp::now(),
        );
        if next != self.previous {
            self.previous = next.clone();
            self.status.send_replace(next);
        }
    }

    async fn clean_up(self, writer: JoinHandle<()>) {
        let (namespace, name) = self.names();
        self.shared
            .registry
            .remove_pod(&namespace, &name, &self.uid);
        drop(self.status);
        let _ = writer.await;
        let ip = self
            .sandbox
            .as_ref()
            .map(|s| s.ip)
            .filter(|_| !self.facts.host_network);
        // Before the namespace ends, which refuses connections itself.
        if let Some(ip) = ip
            && let Err(error) = sandbox::refuse(ip).await
        {
            tracing::warn!(%error, "connections to a pod that has gone will wait for an answer");
        }
        drop(self.sandbox);
        if let Some(ip) = ip {
            self.shared.ipam.release(ip, std::time::Instant::now());
        }
        remove_dir(&self.dir);
        if self.state.terminating && !self.removed {
            let api: Api<Pod> = Api::namespaced(self.shared.client.clone(), &namespace);
            let params = DeleteParams {
                grace_period_seconds: Some(0),
                preconditions: Some(Preconditions {
                    uid: Some(self.uid.clone()),
                    resource_version: None,
                }),
                ..DeleteParams::default()
            };
            for pause in [10, 50, 250, 1000, 5000] {
                match api.delete(&name, &params).await {
                    Ok(_) => return,
                    Err(kube::Error::Api(e)) if e.code == 404 || e.code == 409 => return,
                    Err(error) => {
                        tracing::warn!(pod = name, %error, "the ended pod could not be removed")
                    }
                }
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
        }
    }
}

/// Removes the pod's folder with the mounts in it.
fn remove_dir(dir: &std::path::Path) {
    for volume in std::fs::read_dir(dir.join("volumes"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let _ = nix::mount::umount2(&volume.path(), nix::mount::MntFlags::MNT_DETACH);
    }
    let _ = std::fs::remove_dir_all(dir);
}
