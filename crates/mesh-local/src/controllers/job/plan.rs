//! What a Job does next, by its status and pods alone (Kubernetes' rules: `job_controller.go`).

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::batch::v1::{Job, JobCondition, JobSpec, JobStatus, UncountedTerminatedPods};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;

use super::super::control::{BURST, count};
use super::super::events::Level;
use super::super::pod;
use super::super::replicaset::surplus;
use super::indexes::Indexes;
use super::{INDEX, TRACKING};

/// Pause before the first failed pod is replaced; it doubles with every failure in a row.
const FIRST_PAUSE: i64 = 10;
const LONGEST_PAUSE: i64 = 600;

/// Something to tell about the job.
pub(super) struct Note {
    pub(super) level: Level,
    pub(super) reason: &'static str,
    pub(super) message: String,
}

/// What to do now.
#[derive(Default)]
pub(super) struct Next {
    pub(super) status: JobStatus,
    /// Pods that the written status counts: their finalizer may go.
    pub(super) release: Vec<Arc<Pod>>,
    pub(super) delete: Vec<Arc<Pod>>,
    /// New pods, with their number in an indexed job.
    pub(super) create: Vec<Option<i32>>,
    pub(super) notes: Vec<Note>,
    /// When to look again should nothing change.
    pub(super) again: Option<Duration>,
}

/// Whether the job has ended, well or badly.
pub(super) fn is_finished(job: &Job) -> bool {
    end_condition(job).is_some()
}

/// When the job ended.
pub(super) fn end(job: &Job) -> Option<jiff::Timestamp> {
    let time = end_condition(job)?.last_transition_time.as_ref()?;
    Some(time.0)
}

fn end_condition(job: &Job) -> Option<&JobCondition> {
    let conditions = job.status.as_ref()?.conditions.as_ref()?;
    conditions
        .iter()
        .find(|c| matches!(c.type_.as_str(), "Complete" | "Failed") && c.status == "True")
}

/// Whether the pod waits to be counted.
pub(super) fn is_tracked(pod: &Pod) -> bool {
    pod.finalizers().iter().any(|name| name == TRACKING)
}

/// How the job stands.
enum Verdict {
    Running,
    Suspended,
    Complete,
    Failed(&'static str, &'static str),
}

/// The pods of one moment, sorted.
struct Census {
    succeeded: Vec<Arc<Pod>>,
    failed: Vec<Arc<Pod>>,
    active: Vec<Arc<Pod>>,
    ending: Vec<Arc<Pod>>,
}

impl Census {
    fn of(spec: &JobSpec, pods: &[Arc<Pod>]) -> Self {
        // A pod that was told to end has failed, unless its replacement is to wait for its end.
        let waits = spec.pod_replacement_policy.as_deref() == Some("Failed");
        let mut census = Self {
            succeeded: Vec::new(),
            failed: Vec::new(),
            active: Vec::new(),
            ending: Vec::new(),
        };
        for pod in pods {
            let ends = pod.metadata.deletion_timestamp.is_some();
            let list = match pod::phase(pod) {
                "Succeeded" => &mut census.succeeded,
                "Failed" => &mut census.failed,
                _ if ends => {
                    census.ending.push(pod.clone());
                    if waits {
                        continue;
                    }
                    &mut census.failed
                }
                _ => &mut census.active,
            };
            list.push(pod.clone());
        }
        census
    }
}

/// Decides. `now` is in whole seconds, as the API writes times.
pub(super) fn next(job: &Job, spec: &JobSpec, pods: &[Arc<Pod>], now: Time) -> Next {
    let census = Census::of(spec, pods);
    let mut next = Next {
        status: job.status.clone().unwrap_or_default(),
        ..Next::default()
    };
    account(spec, pods, &census, &mut next);
    let suspended = spec.suspend == Some(true);
    if suspended {
        next.status.start_time = None;
    } else {
        next.status.start_time.get_or_insert_with(|| now.clone());
    }
    match judge(spec, &census, &next.status, now.0) {
        Verdict::Suspended => {
            next.delete = census.active.clone();
            suspend(&mut next, true, &now);
        }
        Verdict::Running => {
            suspend(&mut next, false, &now);
            work(spec, &census, &mut next, now.0);
        }
        Verdict::Complete => {
            next.delete = census.active.clone();
            let message = "Reached expected number of succeeded pods";
            let quiet = is_quiet(&census, &next.status);
            conclude(
                &mut next,
                ["SuccessCriteriaMet", "Complete"],
                ("CompletionsReached", message),
                quiet,
                &now,
            );
            if quiet {
                next.status.completion_time = Some(now.clone());
                next.note(Level::Normal, "Completed", "Job completed");
            }
        }
        Verdict::Failed(reason, message) => {
            next.delete = census.active.clone();
            let quiet = is_quiet(&census, &next.status);
            conclude(
                &mut next,
                ["FailureTarget", "Failed"],
                (reason, message),
                quiet,
                &now,
            );
            if quiet {
                next.note(Level::Warning, reason, message);
            }
        }
    }
    let ready = census.active.iter().filter(|pod| pod::is_ready(pod));
    next.status.active = count(census.active.len());
    next.status.ready = Some(i32::try_from(ready.count()).unwrap_or(i32::MAX));
    next.status.terminating = Some(i32::try_from(census.ending.len()).unwrap_or(i32::MAX));
    next
}

/// Whether nothing runs any more and every end is counted.
fn is_quiet(census: &Census, status: &JobStatus) -> bool {
    let noted = status.uncounted_terminated_pods.as_ref();
    census.active.is_empty()
        && census.ending.is_empty()
        && noted.is_none_or(|noted| noted.succeeded.is_none() && noted.failed.is_none())
}

impl Next {
    fn note(&mut self, level: Level, reason: &'static str, message: &str) {
        self.notes.push(Note {
            level,
            reason,
            message: message.to_owned(),
        });
    }

    /// Looks again after the shortest of the times asked for.
    fn look_again(&mut self, pause: Duration) {
        self.again = Some(self.again.map_or(pause, |known| known.min(pause)));
    }
}

/// Brings the counts up to date: a pod's end is first noted by its uid, then the pod is let go, then the note becomes a count.
fn account(spec: &JobSpec, pods: &[Arc<Pod>], census: &Census, next: &mut Next) {
    let status = &mut next.status;
    let mut noted = status.uncounted_terminated_pods.take().unwrap_or_default();
    let tracked: BTreeSet<String> = pods
        .iter()
        .filter(|pod| is_tracked(pod))
        .filter_map(|pod| pod.uid())
        .collect();
    let fold = |uids: &mut Option<Vec<String>>, total: &mut Option<i32>| {
        let before = uids.as_ref().map_or(0, Vec::len);
        let mut rest = uids.take().unwrap_or_default();
        rest.retain(|uid| tracked.contains(uid));
        let counted = i32::try_from(before - rest.len()).unwrap_or(i32::MAX);
        *total = Some(total.unwrap_or(0) + counted).filter(|total| *total > 0);
        *uids = Some(rest);
    };
    fold(&mut noted.failed, &mut status.failed);
    fold(&mut noted.succeeded, &mut status.succeeded);
    let mut note = |uids: &mut Option<Vec<String>>, ended: &[Arc<Pod>]| {
        let uids = uids.get_or_insert_default();
        for pod in ended.iter().filter(|pod| is_tracked(pod)) {
            let uid = pod.uid().unwrap_or_default();
            if !uids.contains(&uid) {
                uids.push(uid);
            }
            next.release.push(pod.clone());
        }
    };
    note(&mut noted.failed, &census.failed);
    if is_indexed(spec) {
        // Numbers count themselves: one can't succeed twice.
        let mut done = completed(spec, status);
        let wanted = spec.completions.unwrap_or(0);
        let ended = census.succeeded.iter().filter(|pod| is_tracked(pod));
        next.release.extend(ended.clone().cloned());
        ended
            .filter_map(|pod| index(pod))
            .filter(|index| (0..wanted).contains(index))
            .for_each(|index| done.insert(index));
        status.succeeded = count(done.len());
        status.completed_indexes = Some(done.to_string()).filter(|text| !text.is_empty());
    } else {
        note(&mut noted.succeeded, &census.succeeded);
    }
    for uids in [&mut noted.failed, &mut noted.succeeded] {
        if uids.as_ref().is_some_and(Vec::is_empty) {
            *uids = None;
        }
    }
    status.uncounted_terminated_pods = Some(noted);
}

fn total(
    count: Option<i32>,
    noted: impl Fn(&UncountedTerminatedPods) -> usize,
    status: &JobStatus,
) -> i32 {
    let noted = status.uncounted_terminated_pods.as_ref().map_or(0, noted);
    count.unwrap_or(0) + i32::try_from(noted).unwrap_or(i32::MAX)
}

fn failures(status: &JobStatus) -> i32 {
    let noted = |pods: &UncountedTerminatedPods| pods.failed.as_ref().map_or(0, Vec::len);
    total(status.failed, noted, status)
}

fn successes(status: &JobStatus) -> i32 {
    let noted = |pods: &UncountedTerminatedPods| pods.succeeded.as_ref().map_or(0, Vec::len);
    total(status.succeeded, noted, status)
}

fn judge(spec: &JobSpec, census: &Census, status: &JobStatus, now: jiff::Timestamp) -> Verdict {
    let has = |kind: &str| {
        status
            .conditions
            .iter()
            .flatten()
            .find(|c| c.type_ == kind && c.status == "True")
    };
    if let Some(known) = has("FailureTarget") {
        return failure(known.reason.as_deref().unwrap_or_default());
    }
    let limit = spec.backoff_limit.unwrap_or(6);
    if failures(status) > limit || too_many_restarts(spec, census, limit) {
        return failure("BackoffLimitExceeded");
    }
    let started = status.start_time.as_ref().map(|time| time.0.as_second());
    if let (Some(seconds), Some(started)) = (spec.active_deadline_seconds, started)
        && now.as_second() >= started + seconds
    {
        return failure("DeadlineExceeded");
    }
    let done = match spec.completions {
        Some(wanted) => successes(status) >= wanted,
        None => successes(status) > 0 && census.active.is_empty(),
    };
    if done || has("SuccessCriteriaMet").is_some() {
        Verdict::Complete
    } else if spec.suspend == Some(true) {
        Verdict::Suspended
    } else {
        Verdict::Running
    }
}

fn failure(reason: &str) -> Verdict {
    if reason == "DeadlineExceeded" {
        return Verdict::Failed(
            "DeadlineExceeded",
            "Job was active longer than specified deadline",
        );
    }
    Verdict::Failed(
        "BackoffLimitExceeded",
        "Job has reached the specified backoff limit",
    )
}

/// With `OnFailure` a pod fails within itself: its restarts count.
fn too_many_restarts(spec: &JobSpec, census: &Census, limit: i32) -> bool {
    let policy = spec.template.spec.as_ref();
    if policy.and_then(|spec| spec.restart_policy.as_deref()) != Some("OnFailure") {
        return false;
    }
    let restarts: i32 = census
        .active
        .iter()
        .filter_map(|pod| pod.status.as_ref())
        .flat_map(|status| {
            let init = status.init_container_statuses.iter().flatten();
            init.chain(status.container_statuses.iter().flatten())
        })
        .map(|container| container.restart_count)
        .sum();
    if limit == 0 {
        restarts > 0
    } else {
        restarts >= limit
    }
}

/// Makes pods until enough of them are at work, and ends those that are too much.
fn work(spec: &JobSpec, census: &Census, next: &mut Next, now: jiff::Timestamp) {
    if let (Some(seconds), Some(started)) = (spec.active_deadline_seconds, &next.status.start_time)
    {
        let left = started.0.as_second() + seconds - now.as_second();
        next.look_again(Duration::from_secs(u64::try_from(left).unwrap_or(0)));
    }
    let active = i32::try_from(census.active.len()).unwrap_or(i32::MAX);
    let parallel = spec.parallelism.unwrap_or(1);
    let wanted = match spec.completions {
        Some(completions) => (completions - successes(&next.status)).min(parallel),
        // A work queue in which one pod has found the end gets no new pods.
        None if successes(&next.status) > 0 => active.min(parallel),
        None => parallel,
    };
    let mut kept = census.active.clone();
    if is_indexed(spec) {
        next.delete = misnumbered(spec, census, &next.status);
        kept.retain(|pod| !next.delete.iter().any(|gone| gone.uid() == pod.uid()));
    }
    // With the policy "Failed" a pod that ends still holds its place.
    let waits = spec.pod_replacement_policy.as_deref() == Some("Failed");
    let held = if waits { census.ending.len() } else { 0 };
    let have = kept.len() + held;
    let wanted = usize::try_from(wanted).unwrap_or(0);
    if have > wanted {
        next.delete
            .extend(surplus(&kept, (have - wanted).min(kept.len())));
        return;
    }
    let missing = (wanted - have).min(BURST);
    if missing == 0 {
        return;
    }
    if let Some(pause) = pause(census, now) {
        return next.look_again(pause);
    }
    next.create = if is_indexed(spec) {
        let busy: BTreeSet<i32> = kept
            .iter()
            .chain(&census.ending)
            .filter_map(|p| index(p))
            .collect();
        let free =
            completed(spec, &next.status).free(spec.completions.unwrap_or(0), &busy, missing);
        free.into_iter().map(Some).collect()
    } else {
        vec![None; missing]
    };
}

/// Active pods of an indexed job whose number is done, out of range or taken by another.
fn misnumbered(spec: &JobSpec, census: &Census, status: &JobStatus) -> Vec<Arc<Pod>> {
    let done = completed(spec, status);
    let mut seen = BTreeSet::new();
    let range = 0..spec.completions.unwrap_or(0);
    let surplus = census.active.iter().filter(|pod| match index(pod) {
        Some(number) => !range.contains(&number) || done.contains(number) || !seen.insert(number),
        None => true,
    });
    surplus.cloned().collect()
}

/// Time until a failed pod may be replaced; none when it may be now.
fn pause(census: &Census, now: jiff::Timestamp) -> Option<Duration> {
    let last_success = census.succeeded.iter().filter_map(|pod| ended(pod)).max();
    let failures: Vec<_> = census
        .failed
        .iter()
        .filter_map(|pod| ended(pod))
        .filter(|at| last_success.is_none_or(|success| *at > success))
        .collect();
    let last = failures.iter().max()?;
    let doublings = u32::try_from(failures.len() - 1)
        .unwrap_or(u32::MAX)
        .min(10);
    let pause = (FIRST_PAUSE << doublings).min(LONGEST_PAUSE);
    let left = last.as_second() + pause - now.as_second();
    u64::try_from(left)
        .ok()
        .filter(|left| *left > 0)
        .map(Duration::from_secs)
}

/// When the pod's last container ended, or the pod was told to.
fn ended(pod: &Pod) -> Option<jiff::Timestamp> {
    let status = pod.status.as_ref()?;
    let containers = status.container_statuses.iter().flatten();
    let times = containers.filter_map(|container| {
        let ended = container.state.as_ref()?.terminated.as_ref()?;
        Some(ended.finished_at.as_ref()?.0)
    });
    times
        .max()
        .or(pod.metadata.deletion_timestamp.as_ref().map(|time| time.0))
        .or(pod.metadata.creation_timestamp.as_ref().map(|time| time.0))
}

/// Sets the condition of what is to come, and when nothing runs any more that of what has come.
fn conclude(next: &mut Next, kinds: [&str; 2], why: (&str, &str), quiet: bool, now: &Time) {
    let count = if quiet { 2 } else { 1 };
    for kind in &kinds[..count] {
        set(next, kind, true, why, now);
    }
}

fn suspend(next: &mut Next, suspended: bool, now: &Time) {
    let known = next.status.conditions.iter().flatten();
    let was = known
        .clone()
        .find(|c| c.type_ == "Suspended")
        .map(|c| c.status == "True");
    match (was, suspended) {
        (Some(true), true) | (None | Some(false), false) => {}
        (_, true) => {
            set(
                next,
                "Suspended",
                true,
                ("JobSuspended", "Job suspended"),
                now,
            );
            next.note(Level::Normal, "Suspended", "Job suspended");
        }
        (Some(true), false) => {
            set(next, "Suspended", false, ("JobResumed", "Job resumed"), now);
            // The clock of the deadline starts anew.
            next.status.start_time = Some(now.clone());
            next.note(Level::Normal, "Resumed", "Job resumed");
        }
    }
}

fn set(next: &mut Next, kind: &str, holds: bool, (reason, message): (&str, &str), now: &Time) {
    let status = if holds { "True" } else { "False" };
    let conditions = next.status.conditions.get_or_insert_default();
    if conditions
        .iter()
        .any(|c| c.type_ == kind && c.status == status)
    {
        return;
    }
    conditions.retain(|c| c.type_ != kind);
    conditions.push(JobCondition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        last_probe_time: Some(now.clone()),
        last_transition_time: Some(now.clone()),
    });
}

fn is_indexed(spec: &JobSpec) -> bool {
    spec.completion_mode.as_deref() == Some("Indexed")
}

/// The numbers that are done, as the status says.
fn completed(spec: &JobSpec, status: &JobStatus) -> Indexes {
    let text = status.completed_indexes.as_deref().unwrap_or_default();
    Indexes::read(text, 0..spec.completions.unwrap_or(0).max(0))
}

fn index(pod: &Pod) -> Option<i32> {
    pod.annotations().get(INDEX)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn now() -> Time {
        Time("2026-01-01T00:01:00Z".parse().unwrap())
    }

    fn job(extra: Value, status: Value) -> Job {
        let mut spec =
            json!({ "template": { "spec": { "restartPolicy": "Never", "containers": [] } } });
        for (key, value) in extra.as_object().unwrap() {
            spec[key] = value.clone();
        }
        serde_json::from_value(
            json!({ "metadata": { "name": "j" }, "spec": spec, "status": status }),
        )
        .unwrap()
    }

    /// `1 Running`, `2 Failed 50 counted`: uid (and number), phase, second of its end, whether it was let go.
    fn pods(texts: &[&str]) -> Vec<Arc<Pod>> {
        let pod = |text: &&str| {
            let words: Vec<_> = text.split(' ').collect();
            let ended = words.get(2).map(|second| {
                json!({ "terminated": { "exitCode": 1, "finishedAt": format!("2026-01-01T00:00:{second}Z") } })
            });
            let finalizers = if words.contains(&"counted") {
                json!([])
            } else {
                json!([TRACKING])
            };
            let ends = (words[1] == "Ending").then_some("2026-01-01T00:00:59Z");
            let phase = if words[1] == "Ending" {
                "Running"
            } else {
                words[1]
            };
            Arc::new(
                serde_json::from_value(json!({
                    "metadata": { "name": format!("j-{}", words[0]), "uid": words[0], "finalizers": finalizers,
                                  "deletionTimestamp": ends, "annotations": { INDEX: words[0] } },
                    "status": { "phase": phase, "containerStatuses": [
                        { "name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 2, "state": ended }] },
                }))
                .unwrap(),
            )
        };
        texts.iter().map(pod).collect()
    }

    fn decide(job: &Job, texts: &[&str]) -> Next {
        next(job, job.spec.as_ref().unwrap(), &pods(texts), now())
    }

    fn conditions(next: &Next) -> Vec<(&str, &str)> {
        let all = next.status.conditions.iter().flatten();
        all.map(|c| (c.type_.as_str(), c.reason.as_deref().unwrap()))
            .collect()
    }

    #[test]
    fn pods_are_made_until_enough_have_succeeded() {
        let started = job(json!({ "completions": 5, "parallelism": 2 }), json!({}));
        let next = decide(&started, &[]);
        assert_eq!(next.create, [None, None]);
        assert_eq!(next.status.start_time, Some(now()));
        let next = decide(&started, &["1 Running", "2 Succeeded 50"]);
        assert_eq!((next.create.len(), next.release.len()), (1, 1));
        let late = job(
            json!({ "completions": 5, "parallelism": 2 }),
            json!({ "succeeded": 4 }),
        );
        assert_eq!(decide(&late, &["1 Running"]).create.len(), 0);
        assert_eq!(decide(&late, &["1 Running", "2 Running"]).delete.len(), 1);
    }

    #[test]
    fn an_end_is_noted_then_counted_once() {
        let fresh = job(json!({ "completions": 2, "parallelism": 1 }), json!({}));
        let noted = decide(&fresh, &["1 Succeeded 50"]);
        let uncounted = noted.status.uncounted_terminated_pods.clone().unwrap();
        assert_eq!(uncounted.succeeded, Some(vec!["1".to_owned()]));
        assert_eq!(noted.status.succeeded, None);
        let mut job = fresh.clone();
        job.status = Some(noted.status);
        // The write came through, the process ended before the pod was let go: nothing is counted twice.
        let again = decide(&job, &["1 Succeeded 50"]);
        assert_eq!(
            again
                .status
                .uncounted_terminated_pods
                .clone()
                .unwrap()
                .succeeded,
            Some(vec!["1".to_owned()])
        );
        job.status = Some(again.status);
        for pods in [&["1 Succeeded 50 counted"][..], &[]] {
            let counted = decide(&job, pods);
            assert_eq!(counted.status.succeeded, Some(1), "{pods:?}");
            assert_eq!(
                counted.status.uncounted_terminated_pods.unwrap().succeeded,
                None
            );
        }
    }

    #[test]
    fn a_job_completes_when_its_last_pod_has_ended() {
        let running = job(json!({ "completions": 1, "parallelism": 1 }), json!({}));
        let next = decide(&running, &["1 Succeeded 50"]);
        assert_eq!(
            conditions(&next),
            [("SuccessCriteriaMet", "CompletionsReached")],
            "the end is noted and not yet counted"
        );
        let counted = job(json!({ "completions": 1 }), json!({ "succeeded": 1 }));
        let next = decide(&counted, &["1 Succeeded 50 counted"]);
        assert_eq!(
            conditions(&next),
            [
                ("SuccessCriteriaMet", "CompletionsReached"),
                ("Complete", "CompletionsReached")
            ]
        );
        assert_eq!(next.status.completion_time, Some(now()));
        let queue = job(json!({ "parallelism": 3 }), json!({}));
        let next = decide(&queue, &["1 Succeeded 50", "2 Running"]);
        assert_eq!((conditions(&next), next.create.len()), (vec![], 0));
        assert_eq!(
            conditions(&decide(&queue, &["1 Succeeded 50", "2 Succeeded 51"])).len(),
            1
        );
    }

    #[test]
    fn failed_pods_are_replaced_after_a_growing_pause_up_to_the_limit() {
        let trying = job(
            json!({ "completions": 1, "parallelism": 1, "backoffLimit": 2 }),
            json!({}),
        );
        let next = decide(&trying, &["1 Failed 55"]);
        assert_eq!(
            (next.create.len(), next.again),
            (0, Some(Duration::from_secs(5)))
        );
        assert_eq!(decide(&trying, &["1 Failed 50"]).create.len(), 1);
        let next = decide(&trying, &["1 Failed 40", "2 Failed 50"]);
        assert_eq!(next.again, Some(Duration::from_secs(10)));
        let next = decide(&trying, &["1 Failed 30", "2 Failed 40", "3 Failed 50"]);
        assert_eq!(
            conditions(&next),
            [("FailureTarget", "BackoffLimitExceeded")]
        );
        let mut failing = trying.clone();
        failing.status = Some(next.status);
        let next = decide(&failing, &["3 Failed 50 counted"]);
        assert_eq!(next.status.failed, Some(3));
        assert_eq!(
            conditions(&next),
            [
                ("FailureTarget", "BackoffLimitExceeded"),
                ("Failed", "BackoffLimitExceeded")
            ]
        );
        let restarting = job(
            json!({ "completions": 1, "backoffLimit": 2,
                    "template": { "spec": { "restartPolicy": "OnFailure", "containers": [] } } }),
            json!({}),
        );
        let next = decide(&restarting, &["1 Running"]);
        assert_eq!(
            conditions(&next),
            [("FailureTarget", "BackoffLimitExceeded")]
        );
        assert_eq!(next.delete.len(), 1, "the failed job's pods end first");
    }

    #[test]
    fn deadlines_and_suspension_end_pods() {
        let status = json!({ "startTime": "2026-01-01T00:00:00Z" });
        let late = job(
            json!({ "completions": 1, "activeDeadlineSeconds": 60 }),
            status.clone(),
        );
        let next = decide(&late, &["1 Running"]);
        assert_eq!(conditions(&next), [("FailureTarget", "DeadlineExceeded")]);
        let timely = job(
            json!({ "completions": 1, "activeDeadlineSeconds": 70 }),
            status.clone(),
        );
        assert_eq!(
            decide(&timely, &["1 Running"]).again,
            Some(Duration::from_secs(10))
        );
        let suspended = job(json!({ "completions": 1, "suspend": true }), status);
        let next = decide(&suspended, &["1 Running"]);
        assert_eq!(next.delete.len(), 1);
        assert_eq!(conditions(&next), [("Suspended", "JobSuspended")]);
        let mut resumed = suspended;
        resumed.spec.as_mut().unwrap().suspend = Some(false);
        resumed.status = Some(next.status);
        let next = decide(&resumed, &[]);
        assert_eq!(conditions(&next), [("Suspended", "JobResumed")]);
        assert_eq!(
            (next.create.len(), next.status.start_time),
            (1, Some(now()))
        );
    }

    #[test]
    fn indexed_jobs_run_each_number_until_it_succeeds() {
        let indexed = json!({ "completions": 4, "parallelism": 3, "completionMode": "Indexed" });
        let fresh = job(indexed.clone(), json!({}));
        assert_eq!(decide(&fresh, &[]).create, [Some(0), Some(1), Some(2)]);
        let next = decide(&fresh, &["0 Succeeded 20", "1 Failed 20", "2 Running"]);
        assert_eq!(next.create, [Some(1), Some(3)]);
        assert_eq!(next.status.completed_indexes.as_deref(), Some("0"));
        assert_eq!(next.release.len(), 2);
        let late = job(
            indexed,
            json!({ "completedIndexes": "0-2", "succeeded": 3 }),
        );
        let next = decide(&late, &["1 Running", "3 Running"]);
        assert_eq!(next.delete.len(), 1, "number 1 is done already");
    }

    #[test]
    fn pods_that_end_are_failures_unless_the_policy_waits() {
        let spec = json!({ "completions": 1, "parallelism": 1, "backoffLimit": 6 });
        let eager = job(spec.clone(), json!({}));
        let next = decide(&eager, &["1 Ending 10"]);
        assert_eq!((next.create.len(), next.release.len()), (1, 1));
        let mut patient = spec;
        patient["podReplacementPolicy"] = "Failed".into();
        let next = decide(&job(patient, json!({})), &["1 Ending 10"]);
        assert_eq!((next.create.len(), next.release.len()), (0, 0));
        assert_eq!(next.status.terminating, Some(1));
    }
}
