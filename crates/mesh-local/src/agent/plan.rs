//! Decides what a pod needs next. Pure: state and time in, actions out.
//!
//! The order is Kubernetes' (Pod Lifecycle, Init Containers, Sidecar Containers): init containers one by one, a sidecar counts as done when
//! it has started, then the ordinary containers together; at the end the sidecars go last, in reverse order.

use std::time::Duration;

use super::state::{Container, PodState, Restart, Role, Run};

/// One thing to do, by index into [`PodState::containers`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Start the container.
    Start(usize),
    /// Stop it: hook, SIGTERM, SIGKILL.
    Stop(usize),
}

/// Where the pod stands as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Outcome {
    /// It goes on.
    #[default]
    Going,
    /// Every container ended well and none is started again.
    Succeeded,
    /// It ended for good, at least one container badly.
    Failed,
    /// It was to end and nothing of it runs any more.
    Gone,
}

/// What to do now and when to look again.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// In order.
    pub actions: Vec<Action>,
    /// The moment of the agent's clock at which a back-off ends.
    pub wake: Option<Duration>,
    /// Containers that wait for the end of a back-off.
    pub backing_off: Vec<usize>,
    /// Whether all init containers have done their part.
    pub initialized: bool,
    /// Where the pod stands.
    pub outcome: Outcome,
}

impl Plan {
    fn start(&mut self, index: usize, container: &Container, now: Duration) {
        if container.is_alive() {
            return;
        }
        if container.not_before <= now {
            self.actions.push(Action::Start(index));
            return;
        }
        self.backing_off.push(index);
        self.wake = Some(
            self.wake
                .map_or(container.not_before, |wake| wake.min(container.not_before)),
        );
    }

    fn stop(&mut self, index: usize, container: &Container) {
        if container.is_alive() && !container.stopping {
            self.actions.push(Action::Stop(index));
        }
    }
}

/// What `pod` needs at `now`.
pub fn plan(pod: &PodState, now: Duration) -> Plan {
    let mut plan = Plan {
        initialized: pod.initialized,
        ..Plan::default()
    };
    if pod.terminating {
        plan_end(pod, &mut plan, Outcome::Gone);
        return plan;
    }
    if !pod.initialized {
        match plan_init(pod, now, &mut plan) {
            Init::Pending => return plan,
            Init::Failed => {
                plan_end(pod, &mut plan, Outcome::Failed);
                return plan;
            }
            Init::Done => plan.initialized = true,
        }
    }
    if let Some(outcome) = finished(pod) {
        plan_end(pod, &mut plan, outcome);
        return plan;
    }
    for (index, container) in pod.containers.iter().enumerate() {
        let wanted = match container.role {
            Role::Init => false,
            Role::Sidecar => true,
            Role::Main => wants_run(container, pod.restart),
        };
        if wanted {
            plan.start(index, container, now);
        }
    }
    plan
}

enum Init {
    Pending,
    Failed,
    Done,
}

fn plan_init(pod: &PodState, now: Duration, plan: &mut Plan) -> Init {
    for (index, container) in pod.containers.iter().enumerate() {
        match (container.role, &container.run) {
            (Role::Main, _) => break,
            (Role::Init, Run::Exited(ended)) if ended.exit_code == 0 => {}
            (Role::Init, Run::Exited(_)) if pod.restart == Restart::Never => return Init::Failed,
            (Role::Sidecar, Run::Running { .. }) if container.started => {}
            (Role::Sidecar, _) if later_init_began(pod, index) => plan.start(index, container, now),
            _ => {
                plan.start(index, container, now);
                return Init::Pending;
            }
        }
    }
    Init::Done
}

/// A sidecar that had started once and is being started again does not hold up the init containers after it.
fn later_init_began(pod: &PodState, index: usize) -> bool {
    pod.containers
        .iter()
        .skip(index + 1)
        .any(|later| later.role != Role::Main && later.attempt > 0)
}

fn wants_run(container: &Container, restart: Restart) -> bool {
    match (&container.run, restart) {
        (Run::Exited(_), Restart::Never) => false,
        (Run::Exited(ended), Restart::OnFailure) => ended.exit_code != 0,
        _ => true,
    }
}

fn finished(pod: &PodState) -> Option<Outcome> {
    let mut outcome = Outcome::Succeeded;
    for container in pod.containers.iter().filter(|c| c.role == Role::Main) {
        let Run::Exited(ended) = &container.run else {
            return None;
        };
        if wants_run(container, pod.restart) {
            return None;
        }
        if ended.exit_code != 0 {
            outcome = Outcome::Failed;
        }
    }
    Some(outcome)
}

/// Stops what still runs: first everything but the sidecars together, then the sidecars one by one from the last.
fn plan_end(pod: &PodState, plan: &mut Plan, outcome: Outcome) {
    let mut alive = false;
    for (index, container) in pod.containers.iter().enumerate() {
        if container.role != Role::Sidecar && container.is_alive() {
            alive = true;
            plan.stop(index, container);
        }
    }
    if alive {
        return;
    }
    match pod
        .containers
        .iter()
        .enumerate()
        .rev()
        .find(|(_, c)| c.is_alive())
    {
        Some((index, container)) => plan.stop(index, container),
        None => plan.outcome = outcome,
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use k8s_openapi::api::core::v1::Pod;
    use serde_json::json;

    use super::*;
    use crate::agent::state::Ended;

    const T0: Duration = Duration::ZERO;

    fn pod(restart: &str) -> PodState {
        let pod: Pod = serde_json::from_value(json!({"spec": {
            "restartPolicy": restart,
            "initContainers": [{"name": "setup"}, {"name": "proxy", "restartPolicy": "Always", "startupProbe": {"tcpSocket": {"port": 1}}}],
            "containers": [{"name": "app"}, {"name": "helper"}],
        }}))
        .unwrap();
        PodState::new(&pod)
    }

    fn running(pod: &mut PodState, index: usize) {
        pod.containers[index].note_launch();
        pod.containers[index].note_running("id".into(), Timestamp::UNIX_EPOCH, T0);
    }

    fn exit(pod: &mut PodState, index: usize, exit_code: i32, now: Duration) {
        let ended = Ended {
            exit_code,
            signal: None,
            reason: String::new(),
            message: String::new(),
            started_at: Timestamp::UNIX_EPOCH,
            finished_at: Timestamp::UNIX_EPOCH,
            container_id: "id".into(),
        };
        pod.containers[index].note_exit(ended, now);
    }

    fn up(restart: &str) -> PodState {
        let mut pod = pod(restart);
        running(&mut pod, 0);
        exit(&mut pod, 0, 0, T0);
        running(&mut pod, 1);
        pod.containers[1].started = true;
        pod.initialized = plan(&pod, T0).initialized;
        running(&mut pod, 2);
        running(&mut pod, 3);
        pod
    }

    #[test]
    fn starts_in_kubernetes_order() {
        let mut pod = pod("Always");
        assert_eq!(plan(&pod, T0).actions, [Action::Start(0)]);
        running(&mut pod, 0);
        assert_eq!(plan(&pod, T0).actions, []);
        exit(&mut pod, 0, 0, T0);
        assert_eq!(plan(&pod, T0).actions, [Action::Start(1)]);
        running(&mut pod, 1);
        assert_eq!(
            plan(&pod, T0).actions,
            [],
            "the sidecar's startup probe has not passed"
        );
        pod.containers[1].started = true;
        let next = plan(&pod, T0);
        assert!(next.initialized);
        assert_eq!(next.actions, [Action::Start(2), Action::Start(3)]);
    }

    #[test]
    fn a_failed_init_container_is_tried_again_or_ends_the_pod() {
        let mut again = pod("Always");
        running(&mut again, 0);
        exit(&mut again, 0, 1, T0);
        assert_eq!(
            plan(&again, T0).actions,
            [Action::Start(0)],
            "the first restart is immediate"
        );
        running(&mut again, 0);
        exit(&mut again, 0, 1, T0);
        let waiting = plan(&again, T0);
        assert_eq!(
            (waiting.actions.len(), waiting.wake),
            (0, Some(Duration::from_secs(10)))
        );
        let mut never = pod("Never");
        running(&mut never, 0);
        exit(&mut never, 0, 1, T0);
        assert_eq!(plan(&never, T0).outcome, Outcome::Failed);
    }

    #[test]
    fn a_killed_sidecar_comes_back_alone_and_at_once() {
        let mut pod = up("Always");
        exit(&mut pod, 1, 137, T0);
        assert_eq!(plan(&pod, T0).actions, [Action::Start(1)]);
    }

    #[test]
    fn sidecars_end_last() {
        let mut pod = up("Always");
        pod.terminating = true;
        assert_eq!(plan(&pod, T0).actions, [Action::Stop(2), Action::Stop(3)]);
        exit(&mut pod, 2, 0, T0);
        pod.containers[3].stopping = true;
        assert_eq!(plan(&pod, T0).actions, []);
        exit(&mut pod, 3, 0, T0);
        assert_eq!(plan(&pod, T0).actions, [Action::Stop(1)]);
        exit(&mut pod, 1, 0, T0);
        assert_eq!(plan(&pod, T0).outcome, Outcome::Gone);
    }

    #[test]
    fn a_finished_pod_stops_its_sidecars() {
        let mut pod = up("OnFailure");
        exit(&mut pod, 2, 0, T0);
        exit(&mut pod, 3, 1, T0);
        assert_eq!(plan(&pod, T0).actions, [Action::Start(3)]);
        exit(&mut pod, 3, 0, T0);
        assert_eq!(plan(&pod, T0).actions, [Action::Stop(1)]);
        exit(&mut pod, 1, 143, T0);
        assert_eq!(plan(&pod, T0).outcome, Outcome::Succeeded);
    }

    #[test]
    fn back_off_doubles_and_is_forgotten_after_a_long_run() {
        let mut pod = up("Always");
        for wait in [0, 10, 20, 40, 80, 160, 300, 300] {
            exit(&mut pod, 2, 1, T0);
            assert_eq!(pod.containers[2].not_before, Duration::from_secs(wait));
            pod.containers[2].note_launch();
            pod.containers[2].note_running("id".into(), Timestamp::UNIX_EPOCH, T0);
        }
        let later = Duration::from_secs(601);
        exit(&mut pod, 2, 1, later);
        assert_eq!(pod.containers[2].not_before, later);
        assert_eq!(pod.containers[2].restarts, 8);
    }
}
