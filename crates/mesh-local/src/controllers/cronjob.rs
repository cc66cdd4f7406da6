//! CronJob: starts a Job at the times of its schedule.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::batch::v1::{CronJob, CronJobSpec, CronJobStatus, Job};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{DeleteParams, PostParams};
use kube::{Api, ResourceExt as _};
use mesh_apiserver::cron::{self, Schedule};
use serde_json::json;

use super::control::{self, api_message};
use super::events::{Level, reference};
use super::pod;
use super::queue::{Key, Queue};
use super::{Context, Doing as _, Error, Outcome};

const COMPONENT: &str = "cronjob-controller";
/// On a job: the time of the schedule that it was started for.
const SCHEDULED: &str = "batch.kubernetes.io/cronjob-scheduled-timestamp";

pub(super) fn queue(context: &Context) -> Arc<Queue> {
    let queue = Queue::new("cronjob");
    let own = queue.clone();
    context.cron_jobs.subscribe(move |_, new| {
        if let Some(cron_job) = new {
            own.add(Key::of(&**cron_job));
        }
    });
    let own = queue.clone();
    context.jobs.subscribe(move |old, new| {
        if let Some(job) = new.or(old)
            && let Some(owner) = pod::controller(&job.metadata)
            && owner.kind == "CronJob"
        {
            own.add(Key::new(
                job.namespace().unwrap_or_default(),
                owner.name.clone(),
            ));
        }
    });
    queue
}

pub(super) async fn reconcile(context: Arc<Context>, key: Key) -> Outcome {
    let Some(cron_job) = context.cron_jobs.get(&key) else {
        return Ok(None);
    };
    let spec = &cron_job.spec;
    if cron_job.metadata.deletion_timestamp.is_some() {
        return Ok(None);
    }
    let run = Run {
        context: &context,
        cron_job: &cron_job,
        spec,
        api: Api::namespaced(context.client.clone(), &key.namespace),
    };
    run.clean_up().await?;
    let mut status = run.status();
    let started = run.start_due(&mut status).await;
    if cron_job.status.as_ref() != Some(&status) {
        let fields = json!({
            "active": status.active,
            "lastScheduleTime": status.last_schedule_time,
            "lastSuccessfulTime": status.last_successful_time,
        });
        control::write_status(&context, &context.cron_jobs, &*cron_job, fields).await?;
    }
    started
}

/// One look at a CronJob.
struct Run<'a> {
    context: &'a Context,
    cron_job: &'a CronJob,
    spec: &'a CronJobSpec,
    api: Api<Job>,
}

impl Run<'_> {
    fn jobs(&self) -> Vec<Arc<Job>> {
        let uid = self.cron_job.uid();
        let namespace = self.cron_job.namespace().unwrap_or_default();
        let mut jobs = self.context.jobs.in_namespace(&namespace);
        jobs.retain(|job| pod::controller(&job.metadata).map(|owner| &owner.uid) == uid.as_ref());
        jobs
    }

    fn report(&self, level: Level, reason: &'static str, message: String) {
        let events = &self.context.events;
        events.publish(COMPONENT, self.cron_job, level, reason, message);
    }

    /// Deletes finished jobs beyond the limits, the oldest first.
    async fn clean_up(&self) -> Result<(), Error> {
        for (kind, limit) in [
            (
                "Complete",
                self.spec.successful_jobs_history_limit.unwrap_or(3),
            ),
            ("Failed", self.spec.failed_jobs_history_limit.unwrap_or(1)),
        ] {
            let mut ended = self.jobs();
            ended.retain(|job| finished(job) == Some(kind));
            ended.sort_by_key(|job| {
                (
                    job.metadata.creation_timestamp.as_ref().map(|time| time.0),
                    job.name_any(),
                )
            });
            let surplus = ended
                .len()
                .saturating_sub(usize::try_from(limit).unwrap_or(0));
            for job in &ended[..surplus] {
                self.delete(job).await?;
            }
        }
        Ok(())
    }

    async fn delete(&self, job: &Job) -> Result<(), Error> {
        let name = job.name_any();
        match self.api.delete(&name, &DeleteParams::background()).await {
            Ok(_) => {
                self.context.jobs.forget(job);
                let message = format!("Deleted job {name}");
                self.report(Level::Normal, "SuccessfulDelete", message);
                Ok(())
            }
            Err(error) if super::is_not_found(&error) => Ok(()),
            Err(error) => Err(error).doing(|| format!("deleting Job {name}")),
        }
    }

    /// The status by the jobs that there are.
    fn status(&self) -> CronJobStatus {
        let known = self.cron_job.status.clone().unwrap_or_default();
        let jobs = self.jobs();
        let active: Vec<ObjectReference> = jobs
            .iter()
            .filter(|job| finished(job).is_none())
            .map(|job| named(job))
            .collect();
        let successes = jobs
            .iter()
            .filter(|job| finished(job) == Some("Complete"))
            .filter_map(|job| job.status.as_ref()?.completion_time.clone());
        CronJobStatus {
            active: Some(active).filter(|list| !list.is_empty()),
            last_schedule_time: known.last_schedule_time,
            last_successful_time: successes.chain(known.last_successful_time).max(),
        }
    }

    /// Starts the job of the latest time that has passed, and says when the next one is.
    async fn start_due(&self, status: &mut CronJobStatus) -> Outcome {
        if self.spec.suspend == Some(true) {
            return Ok(None);
        }
        let (schedule, zone) = match (
            Schedule::parse(&self.spec.schedule),
            cron::zone(self.spec.time_zone.as_deref()),
        ) {
            (Ok(schedule), Ok(zone)) => (schedule, zone),
            (Err(error), _) | (_, Err(error)) => {
                let message = format!("unparseable schedule: {:?}: {error}", self.spec.schedule);
                self.report(Level::Warning, "UnparseableSchedule", message);
                return Ok(None);
            }
        };
        let now = jiff::Timestamp::now();
        let earliest = status
            .last_schedule_time
            .as_ref()
            .or(self.cron_job.metadata.creation_timestamp.as_ref())
            .map_or(now, |time| time.0);
        if let Some(due) = schedule.latest(earliest, now, &zone) {
            match verdict(self.spec, status, due, now) {
                Verdict::Start => self.start(status, due, &[]).await?,
                Verdict::Replace => {
                    let mut running = self.jobs();
                    running.retain(|job| finished(job).is_none());
                    self.start(status, due, &running).await?;
                }
                Verdict::Wait => {
                    let message = "Not starting job because prior execution is running and concurrency policy is Forbid";
                    self.report(Level::Normal, "JobAlreadyActive", message.to_owned());
                }
                Verdict::TooLate => {
                    let message = format!("Missed scheduled time to start a job: {due}");
                    self.report(Level::Warning, "MissSchedule", message);
                    status.last_schedule_time = Some(Time(due));
                }
            }
        }
        let next = schedule.next(now, &zone);
        Ok(next.map(|next| {
            // A little past the second, so that the clock has certainly reached it.
            Duration::try_from(next.duration_since(now)).unwrap_or_default()
                + Duration::from_millis(50)
        }))
    }

    async fn start(
        &self,
        status: &mut CronJobStatus,
        due: jiff::Timestamp,
        replaced: &[Arc<Job>],
    ) -> Result<(), Error> {
        for job in replaced {
            self.delete(job).await?;
        }
        let job = self.job(due);
        let name = job.name_any();
        match self.api.create(&PostParams::default(), &job).await {
            Ok(job) => {
                let message = format!("Created job {name}");
                self.report(Level::Normal, "SuccessfulCreate", message);
                status.active = Some(self.status().active.into_iter().flatten())
                    .map(|active| active.chain([named(&job)]).collect());
                self.context.jobs.observe(job);
            }
            // Started already, by this process before it could write the status.
            Err(kube::Error::Api(answer)) if answer.code == 409 => {}
            Err(error) => {
                let message = format!("Error creating job: {}", api_message(&error));
                self.report(Level::Warning, "FailedCreate", message);
                return Err(error).doing(|| format!("creating Job {name}"));
            }
        }
        status.last_schedule_time = Some(Time(due));
        Ok(())
    }

    /// The job of that time; its name says which, so that there is one.
    fn job(&self, due: jiff::Timestamp) -> Job {
        let template = self.spec.job_template.clone();
        let meta = template.metadata.unwrap_or_default();
        let mut annotations = meta.annotations.unwrap_or_default();
        annotations.insert(SCHEDULED.into(), due.to_string());
        Job {
            metadata: ObjectMeta {
                name: Some(format!(
                    "{}-{}",
                    self.cron_job.name_any(),
                    due.as_second().div_euclid(60)
                )),
                namespace: self.cron_job.namespace(),
                labels: meta.labels,
                annotations: Some(annotations),
                owner_references: Some(vec![pod::controlled_by(self.cron_job)]),
                ..ObjectMeta::default()
            },
            spec: template.spec,
            status: None,
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Start,
    /// Start, and end what still runs.
    Replace,
    /// Not while the job before runs.
    Wait,
    /// The deadline of that time is over.
    TooLate,
}

fn verdict(
    spec: &CronJobSpec,
    status: &CronJobStatus,
    due: jiff::Timestamp,
    now: jiff::Timestamp,
) -> Verdict {
    let late = now.as_second() - due.as_second();
    if spec
        .starting_deadline_seconds
        .is_some_and(|deadline| late > deadline)
    {
        return Verdict::TooLate;
    }
    let running = status.active.as_ref().is_some_and(|list| !list.is_empty());
    match spec.concurrency_policy.as_deref() {
        Some("Forbid") if running => Verdict::Wait,
        Some("Replace") if running => Verdict::Replace,
        _ => Verdict::Start,
    }
}

fn named(job: &Job) -> ObjectReference {
    ObjectReference {
        resource_version: None,
        ..reference(job)
    }
}

/// `Complete` or `Failed` once the job has ended.
fn finished(job: &Job) -> Option<&str> {
    let conditions = job.status.as_ref()?.conditions.as_ref()?;
    conditions
        .iter()
        .find(|c| matches!(c.type_.as_str(), "Complete" | "Failed") && c.status == "True")
        .map(|c| c.type_.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_decides_what_starts() {
        let at = |second: i64| jiff::Timestamp::from_second(1_800_000_000 + second).unwrap();
        for (policy, running, late, deadline, expected) in [
            ("Allow", true, 0, None, Verdict::Start),
            ("Forbid", false, 0, None, Verdict::Start),
            ("Forbid", true, 0, None, Verdict::Wait),
            ("Replace", true, 0, None, Verdict::Replace),
            ("Replace", false, 0, None, Verdict::Start),
            ("Allow", false, 11, Some(10), Verdict::TooLate),
            ("Allow", false, 10, Some(10), Verdict::Start),
        ] {
            let spec: CronJobSpec = serde_json::from_value(json!({
                "schedule": "* * * * *", "jobTemplate": {}, "concurrencyPolicy": policy,
                "startingDeadlineSeconds": deadline,
            }))
            .unwrap();
            let status = CronJobStatus {
                active: running.then(|| vec![ObjectReference::default()]),
                ..CronJobStatus::default()
            };
            assert_eq!(
                verdict(&spec, &status, at(0), at(late)),
                expected,
                "{policy} {running} {late}"
            );
        }
    }
}
