//! PodDisruptionBudgets: their validation, and what they say to an eviction.

use serde_json::{Value, json};

use crate::ApiServer;
use crate::errors::{ApiError, FieldError};
use crate::request::Request;
use crate::selector::LabelSelector;
use crate::storage::{Expect, WriteError};
use crate::write::now;

const BUDGETS: &str = "policy/poddisruptionbudgets";
/// Rounds of an eviction that others keep overtaking.
const ATTEMPTS: usize = 16;
/// Evictions that a budget remembers while their pods end (as in Kubernetes).
const MAX_DISRUPTED: usize = 2000;

/// One of the two numbers, each a count or a percentage.
pub fn validate(object: &Value, errors: &mut Vec<FieldError>) {
    let spec = &object["spec"];
    let fields = ["minAvailable", "maxUnavailable"];
    if fields.iter().all(|field| !spec[*field].is_null()) {
        let detail = "minAvailable and maxUnavailable cannot be both set";
        errors.push(FieldError::invalid("spec", spec.clone(), detail));
    }
    for field in fields {
        let good = match &spec[field] {
            Value::Null => true,
            Value::String(text) => text
                .strip_suffix('%')
                .and_then(|text| text.parse::<u32>().ok())
                .is_some_and(|percent| percent <= 100),
            number => number.as_i64().is_some_and(|number| number >= 0),
        };
        if !good {
            let detail = "must be a whole number that is not negative, or a percentage up to 100%";
            let at = format!("spec.{field}");
            errors.push(FieldError::invalid(at, spec[field].clone(), detail));
        }
    }
    if let Err(error) = LabelSelector::from_object(&spec["selector"]) {
        let shown = spec["selector"].clone();
        errors.push(FieldError::invalid("spec.selector", shown, &error.message));
    }
}

/// Takes one disruption from the budget of `pod`, if there is one.
///
/// # Errors
/// 429 when the budget allows none now, 500 when two budgets select the pod.
pub async fn take(api: &ApiServer, request: &Request, pod: &Value) -> Result<(), ApiError> {
    if ends_already(pod) {
        return Ok(());
    }
    let namespace = request.target.namespace.as_deref().unwrap_or_default();
    let name = pod["metadata"]["name"].as_str().unwrap_or_default();
    for _ in 0..ATTEMPTS {
        let mut budgets = api.storage().list(BUDGETS, Some(namespace)).items;
        budgets.retain(|(_, budget)| selects(&budget.value, pod));
        let (key, budget) = match budgets.as_slice() {
            [] => return Ok(()),
            [one] => one,
            _ => {
                let message = "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.";
                return Err(ApiError::internal(message));
            }
        };
        if !is_ready(pod) && unhealthy_may_go(&budget.value) {
            return Ok(());
        }
        let taken = spend(&budget.value, name)?;
        if request.dry_run()? {
            return Ok(());
        }
        match api
            .storage()
            .put(BUDGETS, key, Expect::Revision(budget.revision), taken)
            .await
        {
            Ok(_) => return Ok(()),
            Err(WriteError::Changed) => {}
            Err(error) => return Err(ApiError::internal(error)),
        }
    }
    Err(refusal(
        "the budget keeps changing; try again".to_owned(),
        Value::Null,
    ))
}

/// A pod that serves nobody is no disruption.
fn ends_already(pod: &Value) -> bool {
    !pod["metadata"]["deletionTimestamp"].is_null()
        || matches!(
            pod["status"]["phase"].as_str(),
            None | Some("Pending" | "Succeeded" | "Failed")
        )
}

fn is_ready(pod: &Value) -> bool {
    pod["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}

fn selects(budget: &Value, pod: &Value) -> bool {
    let selector = &budget["spec"]["selector"];
    selector.is_object()
        && LabelSelector::from_object(selector)
            .is_ok_and(|selector| selector.matches_labels(&pod["metadata"]["labels"]))
}

/// Kubernetes' `unhealthyPodEvictionPolicy`: always, or as long as enough others are healthy.
fn unhealthy_may_go(budget: &Value) -> bool {
    let number = |field: &str| budget["status"][field].as_i64().unwrap_or_default();
    budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
        || (number("desiredHealthy") > 0 && number("currentHealthy") >= number("desiredHealthy"))
}

/// The budget with one disruption less.
fn spend(budget: &Value, pod: &str) -> Result<Value, ApiError> {
    let name = budget["metadata"]["name"].as_str().unwrap_or_default();
    let number = |field: &str| budget["status"][field].as_i64().unwrap_or_default();
    if number("observedGeneration")
        < budget["metadata"]["generation"]
            .as_i64()
            .unwrap_or_default()
    {
        let message =
            format!("The disruption budget {name} is still being processed by the server.");
        return Err(refusal(message, json!({ "retryAfterSeconds": 10 })));
    }
    let disrupted = budget["status"]["disruptedPods"]
        .as_object()
        .map_or(0, serde_json::Map::len);
    if number("disruptionsAllowed") <= 0 || disrupted > MAX_DISRUPTED {
        let why = format!(
            "The disruption budget {name} needs {} healthy pods and has {} currently",
            number("desiredHealthy"),
            number("currentHealthy")
        );
        let causes = json!({ "causes": [{ "reason": "DisruptionBudget", "message": why }] });
        let message = "Cannot evict pod as it would violate the pod's disruption budget.";
        return Err(refusal(message.to_owned(), causes));
    }
    let mut taken = budget.clone();
    taken["status"]["disruptionsAllowed"] = (number("disruptionsAllowed") - 1).into();
    taken["status"]["disruptedPods"][pod] = now().into();
    Ok(taken)
}

fn refusal(message: String, details: Value) -> ApiError {
    let mut error = ApiError::new(429, "TooManyRequests", message);
    error.details = (!details.is_null()).then_some(details);
    error
}
