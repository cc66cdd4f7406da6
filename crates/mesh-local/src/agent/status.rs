//! A pod's status as the API shows it. Pure: state in, JSON out.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::plan::{Outcome, Plan};
use super::sandbox::NODE_IP;
use super::state::{Container, Ended, PodState, Role, Run};

/// What of the status the pod's own state does not tell.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// The pod's address, once it has one.
    pub ip: Option<String>,
    /// When the agent took the pod over.
    pub started_at: Option<Timestamp>,
    /// The pod is in the host network.
    pub host_network: bool,
}

/// The status; `previous` lends the times of conditions that did not change.
pub fn status(
    pod: &Pod,
    state: &PodState,
    plan: &Plan,
    facts: &Facts,
    previous: &Value,
    now: Timestamp,
) -> Value {
    let spec = pod.spec.as_ref();
    let images: Vec<String> = spec
        .iter()
        .flat_map(|s| s.init_containers.iter().flatten().chain(&s.containers))
        .map(|c| c.image.clone().unwrap_or_default())
        .collect();
    let mut inits = Vec::new();
    let mut mains = Vec::new();
    for (index, container) in state.containers.iter().enumerate() {
        let image = images.get(index).map(String::as_str).unwrap_or_default();
        let entry = container_status(container, image, plan.backing_off.contains(&index));
        if container.role == Role::Main {
            mains.push(entry)
        } else {
            inits.push(entry)
        }
    }
    let unready: Vec<&str> = state
        .containers
        .iter()
        .filter(|c| c.role != Role::Init && !c.ready)
        .map(|c| c.name.as_str())
        .collect();
    let finished = matches!(plan.outcome, Outcome::Succeeded);
    // A pod that is ending stays ready as long as its containers are: what to make of that is up to whoever sees its deletionTimestamp.
    let ready = unready.is_empty() && !finished;
    let (reason, message) = if finished {
        ("PodCompleted", String::new())
    } else {
        (
            "ContainersNotReady",
            format!("containers with unready status: [{}]", unready.join(" ")),
        )
    };
    let mut conditions = vec![condition(
        "PodReadyToStartContainers",
        facts.ip.is_some(),
        "",
        "",
    )];
    conditions.push(match (plan.initialized, finished) {
        (true, true) => condition("Initialized", true, "PodCompleted", ""),
        (true, false) => condition("Initialized", true, "", ""),
        (false, _) => condition(
            "Initialized",
            false,
            "ContainersNotInitialized",
            &incomplete(state),
        ),
    });
    for kind in ["Ready", "ContainersReady"] {
        conditions.push(if ready {
            condition(kind, true, "", "")
        } else {
            condition(kind, false, reason, &message)
        });
    }
    conditions.push(condition("PodScheduled", true, "", ""));
    for condition in &mut conditions {
        keep_time(condition, previous, now);
    }
    let mut status = json!({
        "phase": phase(state, plan),
        "conditions": conditions,
        "hostIP": NODE_IP.to_string(),
        "hostIPs": [{"ip": NODE_IP.to_string()}],
        "startTime": facts.started_at.map(|t| second(&t)),
        "containerStatuses": mains,
        // The API server knows it from the pod's resources.
        "qosClass": previous.get("qosClass").and_then(Value::as_str).unwrap_or("BestEffort"),
    });
    if !inits.is_empty() {
        status["initContainerStatuses"] = Value::Array(inits);
    }
    if let Some(ip) = &facts.ip {
        status["podIP"] = json!(ip);
        status["podIPs"] = json!([{"ip": ip}]);
    }
    status
}

fn phase(state: &PodState, plan: &Plan) -> &'static str {
    match plan.outcome {
        Outcome::Succeeded => "Succeeded",
        Outcome::Failed => "Failed",
        Outcome::Gone
            if state.containers.iter().any(
                |c| matches!(&c.run, Run::Exited(e) if c.role == Role::Main && e.exit_code != 0),
            ) =>
        {
            "Failed"
        }
        Outcome::Gone => "Succeeded",
        Outcome::Going
            if state.containers.iter().any(|c| {
                c.role == Role::Main && c.attempt > 0 && !matches!(c.run, Run::Waiting { .. })
            }) =>
        {
            "Running"
        }
        Outcome::Going => "Pending",
    }
}

fn incomplete(state: &PodState) -> String {
    let names: Vec<&str> = state
        .containers
        .iter()
        .filter(|c| match c.role {
            Role::Init => !matches!(&c.run, Run::Exited(ended) if ended.exit_code == 0),
            Role::Sidecar => !c.started,
            Role::Main => false,
        })
        .map(|c| c.name.as_str())
        .collect();
    format!("containers with incomplete status: [{}]", names.join(" "))
}

fn condition(kind: &str, holds: bool, reason: &str, message: &str) -> Value {
    let mut condition = json!({"type": kind, "status": if holds { "True" } else { "False" }, "lastProbeTime": null});
    if !reason.is_empty() {
        condition["reason"] = json!(reason);
        if !message.is_empty() {
            condition["message"] = json!(message);
        }
    }
    condition
}

fn keep_time(condition: &mut Value, previous: &Value, now: Timestamp) {
    let before = previous["conditions"]
        .as_array()
        .and_then(|c| c.iter().find(|c| c["type"] == condition["type"]));
    let same = before
        .filter(|c| c["status"] == condition["status"])
        .map(|c| c["lastTransitionTime"].clone())
        .filter(|t| !t.is_null());
    condition["lastTransitionTime"] = same.unwrap_or_else(|| json!(second(&now)));
}

/// metav1.Time: whole seconds.
fn second(time: &Timestamp) -> String {
    format!("{time:.0}")
}

fn container_status(container: &Container, image: &str, backing_off: bool) -> Value {
    let (state, id) = match &container.run {
        Run::Waiting { reason, message } => (waiting(reason, message), ""),
        Run::Starting => (waiting("ContainerCreating", ""), ""),
        Run::Running {
            started_at,
            container_id,
            ..
        } => (
            json!({"running": {"startedAt": second(started_at)}}),
            container_id.as_str(),
        ),
        Run::Exited(ended) if backing_off => (
            waiting("CrashLoopBackOff", &back_off_message(container)),
            ended.container_id.as_str(),
        ),
        Run::Exited(ended) => (
            json!({"terminated": terminated(ended)}),
            ended.container_id.as_str(),
        ),
    };
    let last = match &container.run {
        Run::Exited(ended) if backing_off => Some(ended),
        _ => container.last.as_ref(),
    };
    let ready = match (&container.run, container.role) {
        (Run::Exited(ended), Role::Init) => ended.exit_code == 0,
        _ => container.ready,
    };
    json!({
        "name": container.name,
        "state": state,
        "lastState": last.map_or_else(|| json!({}), |ended| json!({"terminated": terminated(ended)})),
        "ready": ready,
        "started": container.started,
        "restartCount": container.restarts,
        "image": image,
        "imageID": format!("mesh-builtin://{image}"),
        "containerID": id,
    })
}

fn back_off_message(container: &Container) -> String {
    let delay = super::state::backoff(container.crashes.saturating_sub(1)).as_secs();
    format!(
        "back-off {delay}s restarting failed container={}",
        container.name
    )
}

fn waiting(reason: &str, message: &str) -> Value {
    let mut waiting = json!({"reason": reason});
    if !message.is_empty() {
        waiting["message"] = json!(message);
    }
    json!({"waiting": waiting})
}

fn terminated(ended: &Ended) -> Value {
    let mut out = json!({
        "exitCode": ended.exit_code,
        "reason": ended.reason,
        "startedAt": second(&ended.started_at),
        "finishedAt": second(&ended.finished_at),
        "containerID": ended.container_id,
    });
    if let Some(signal) = ended.signal {
        out["signal"] = json!(signal);
    }
    if !ended.message.is_empty() {
        out["message"] = json!(ended.message);
    }
    out
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::agent::plan::plan;

    #[test]
    fn a_running_pod_and_its_ready_condition() {
        let pod: Pod = serde_json::from_value(json!({"spec": {"containers": [
            {"name": "app", "image": "x", "readinessProbe": {"tcpSocket": {"port": 1}}}]}}))
        .unwrap();
        let mut state = PodState::new(&pod);
        let facts = Facts {
            ip: Some("10.244.0.10".into()),
            ..Facts::default()
        };
        let at = |state: &PodState, previous: &Value, now: i64| {
            let now = Timestamp::from_second(now).unwrap();
            status(
                &pod,
                state,
                &plan(state, Duration::ZERO),
                &facts,
                previous,
                now,
            )
        };
        let ready = |status: &Value| {
            status["conditions"]
                .as_array()
                .unwrap()
                .iter()
                .find(|c| c["type"] == "Ready")
                .unwrap()
                .clone()
        };
        assert_eq!(at(&state, &Value::Null, 1)["phase"], "Pending");
        state.containers[0].note_launch();
        state.containers[0].note_running("id".into(), Timestamp::UNIX_EPOCH, Duration::ZERO);
        let running = at(&state, &Value::Null, 1);
        assert_eq!(running["phase"], "Running");
        assert_eq!(
            ready(&running)["message"],
            "containers with unready status: [app]"
        );
        state.containers[0].ready = true;
        let now_ready = at(&state, &running, 2);
        assert_eq!(ready(&now_ready)["status"], "True");
        assert_eq!(
            ready(&now_ready)["lastTransitionTime"],
            "1970-01-01T00:00:02Z"
        );
        assert_eq!(
            ready(&at(&state, &now_ready, 3))["lastTransitionTime"],
            "1970-01-01T00:00:02Z"
        );
        assert_eq!(
            now_ready["containerStatuses"][0]["state"]["running"]["startedAt"],
            "1970-01-01T00:00:00Z"
        );
    }
}
