//! Jobs and CronJobs.

use serde_json::{Value, json};

use super::pod;
use crate::cron::Schedule;
use crate::errors::{FieldError, FieldErrorKind};
use crate::names::validate_labels;
use crate::selector::LabelSelector;

/// Labels by which a job finds its pods; the two without prefix are the older names.
const UID_LABELS: [&str; 2] = ["batch.kubernetes.io/controller-uid", "controller-uid"];
const NAME_LABELS: [&str; 2] = ["batch.kubernetes.io/job-name", "job-name"];
/// Characters of a CronJob's name: its jobs' names are eleven longer.
const CRON_JOB_NAME: usize = 52;
/// The controller of this cluster, as `managedBy` names it.
const MANAGER: &str = "kubernetes.io/job-controller";

/// Numbers that depend on each other, and the template.
pub fn job_defaults(spec: &mut Value) {
    if spec.get("completions").is_none() && spec.get("parallelism").is_none() {
        spec["completions"] = 1.into();
    }
    for (field, default) in [
        ("parallelism", json!(1)),
        ("backoffLimit", json!(6)),
        ("podReplacementPolicy", json!("TerminatingOrFailed")),
    ] {
        if spec.get(field).is_none() {
            spec[field] = default;
        }
    }
    if spec["template"]["spec"].is_object() {
        pod::defaults(&mut spec["template"]["spec"]);
    }
}

/// Gives a new job its selector and its pods their labels, unless the user does that.
pub fn prepare_job(job: &mut Value) {
    job["status"] = json!({});
    if job["spec"]["manualSelector"] == true {
        return;
    }
    let (uid, name) = (
        job["metadata"]["uid"].clone(),
        job["metadata"]["name"].clone(),
    );
    let labels = &mut job["spec"]["template"]["metadata"]["labels"];
    for label in UID_LABELS {
        labels[label] = uid.clone();
    }
    for label in NAME_LABELS {
        labels[label] = name.clone();
    }
    if job["spec"].get("selector").is_none() {
        job["spec"]["selector"] = json!({ "matchLabels": { UID_LABELS[0]: uid } });
    }
}

/// Selector, numbers, template, and what may change.
pub fn validate_job(job: &Value, old: Option<&Value>, errors: &mut Vec<FieldError>) {
    let spec = &job["spec"];
    if !spec.is_object() {
        return errors.push(FieldError::required("spec.template", ""));
    }
    validate_job_spec(spec, "spec", errors);
    let labels = &spec["template"]["metadata"]["labels"];
    match LabelSelector::from_object(&spec["selector"]) {
        Err(error) => errors.push(FieldError::invalid(
            "spec.selector",
            spec["selector"].clone(),
            &error.message,
        )),
        Ok(selector) if selector.is_empty() => {
            errors.push(FieldError::required("spec.selector", ""))
        }
        Ok(selector) if !selector.matches_labels(labels) => errors.push(FieldError::invalid(
            "spec.template.metadata.labels",
            labels.clone(),
            "`selector` does not match template `labels`",
        )),
        Ok(_) => {}
    }
    if spec["manualSelector"] != true
        && spec["selector"]["matchLabels"]
            .get(UID_LABELS[0])
            .or(spec["selector"]["matchLabels"].get(UID_LABELS[1]))
            != Some(&job["metadata"]["uid"])
    {
        let detail = "`selector` not auto-generated; set spec.manualSelector to choose it";
        errors.push(FieldError::invalid(
            "spec.selector",
            spec["selector"].clone(),
            detail,
        ));
    }
    if spec["completionMode"] == "Indexed" && spec.get("completions").is_none() {
        let detail = "when completion mode is Indexed";
        errors.push(FieldError::required("spec.completions", detail));
    }
    if let Some(old) = old {
        validate_job_change(spec, old, errors);
    }
}

fn validate_job_change(spec: &Value, old: &Value, errors: &mut Vec<FieldError>) {
    let before = &old["spec"];
    // An indexed job whose numbers are equal may change both.
    let elastic = spec["completionMode"] == "Indexed"
        && spec["completions"] == spec["parallelism"]
        && before["completions"] == before["parallelism"];
    // A job that waits to be started may still get another template.
    let waits = before["suspend"] == true && old["status"].get("startTime").is_none();
    for field in [
        "completions",
        "completionMode",
        "selector",
        "template",
        "managedBy",
    ] {
        let free = (field == "completions" && elastic) || (field == "template" && waits);
        if !free && before[field] != spec[field] {
            let at = format!("spec.{field}");
            errors.push(FieldError::invalid(
                at,
                spec[field].clone(),
                "field is immutable",
            ));
        }
    }
}

fn validate_job_spec(spec: &Value, path: &str, errors: &mut Vec<FieldError>) {
    for field in [
        "parallelism",
        "completions",
        "activeDeadlineSeconds",
        "backoffLimit",
        "ttlSecondsAfterFinished",
    ] {
        if spec[field].as_i64().is_some_and(|number| number < 0) {
            let detail = "must be greater than or equal to 0";
            errors.push(FieldError::invalid(
                format!("{path}.{field}"),
                spec[field].clone(),
                detail,
            ));
        }
    }
    for field in [
        "podFailurePolicy",
        "successPolicy",
        "backoffLimitPerIndex",
        "maxFailedIndexes",
    ] {
        if spec.get(field).is_some() {
            let detail =
                "not supported by this server; leave it out, backoffLimit counts all failed pods";
            errors.push(FieldError::forbidden(format!("{path}.{field}"), detail));
        }
    }
    if spec
        .get("managedBy")
        .is_some_and(|manager| manager != MANAGER)
    {
        errors.push(FieldError::make(
            format!("{path}.managedBy"),
            FieldErrorKind::NotSupported,
            spec["managedBy"].clone(),
            &format!("supported values: \"{MANAGER}\""),
        ));
    }
    let at = format!("{path}.template");
    validate_labels(
        &spec["template"]["metadata"]["labels"],
        &format!("{at}.metadata.labels"),
        errors,
    );
    let template = &spec["template"]["spec"];
    if !template.is_object() {
        return errors.push(FieldError::required(format!("{at}.spec.containers"), ""));
    }
    pod::validate_spec(template, &format!("{at}.spec"), errors);
    if !matches!(
        template["restartPolicy"].as_str(),
        Some("OnFailure" | "Never")
    ) {
        errors.push(FieldError::make(
            format!("{at}.spec.restartPolicy"),
            FieldErrorKind::NotSupported,
            template["restartPolicy"].clone(),
            "supported values: \"OnFailure\", \"Never\"",
        ));
    }
}

/// Schedule, zone, limits, the jobs' template.
pub fn validate_cron_job(object: &Value, errors: &mut Vec<FieldError>) {
    let spec = &object["spec"];
    if !spec.is_object() {
        return errors.push(FieldError::required("spec.schedule", ""));
    }
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    if name.len() > CRON_JOB_NAME {
        let detail = format!("must be no more than {CRON_JOB_NAME} characters");
        errors.push(FieldError::invalid("metadata.name", name, &detail));
    }
    let schedule = spec["schedule"].as_str().unwrap_or_default();
    if schedule.contains("TZ=") {
        let detail = "cannot use TZ or CRON_TZ in schedule, use timeZone field instead";
        errors.push(FieldError::invalid("spec.schedule", schedule, detail));
    } else if let Err(error) = Schedule::parse(schedule) {
        errors.push(FieldError::invalid(
            "spec.schedule",
            schedule,
            &error.to_string(),
        ));
    }
    if let Some(zone) = spec["timeZone"].as_str()
        && crate::cron::zone(Some(zone)).is_err()
    {
        let detail = format!("unknown time zone {zone}");
        errors.push(FieldError::invalid("spec.timeZone", zone, &detail));
    }
    for field in [
        "startingDeadlineSeconds",
        "successfulJobsHistoryLimit",
        "failedJobsHistoryLimit",
    ] {
        if spec[field].as_i64().is_some_and(|number| number < 0) {
            let detail = "must be greater than or equal to 0";
            let at = format!("spec.{field}");
            errors.push(FieldError::invalid(at, spec[field].clone(), detail));
        }
    }
    let template = &spec["jobTemplate"]["spec"];
    if !template.is_object() {
        return errors.push(FieldError::required("spec.jobTemplate.spec.template", ""));
    }
    if template["manualSelector"] == true {
        let at = "spec.jobTemplate.spec.manualSelector";
        errors.push(FieldError::make(
            at,
            FieldErrorKind::NotSupported,
            true.into(),
            "supported values: \"nil\", \"false\"",
        ));
    }
    if template.get("selector").is_some() {
        let detail = "`selector` will be auto-generated";
        errors.push(FieldError::invalid(
            "spec.jobTemplate.spec.selector",
            template["selector"].clone(),
            detail,
        ));
    }
    validate_job_spec(template, "spec.jobTemplate.spec", errors);
}
