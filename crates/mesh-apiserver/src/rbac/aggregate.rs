//! ClusterRoles that are made of others: those with an `aggregationRule` get the rules of all ClusterRoles that it selects.

use serde_json::{Value, json};

use super::{CLUSTER_ROLES, Rule};
use crate::ApiServer;
use crate::selector::LabelSelector;
use crate::storage::{Expect, WriteError};

/// Rounds until nothing changes any more: a role may be made of roles that are made of roles.
const ROUNDS: usize = 16;

/// Brings all aggregated roles up to date, soon.
pub fn start(api: &ApiServer) {
    let api = api.clone();
    tokio::spawn(async move {
        if let Err(error) = run(&api).await {
            tracing::error!(%error, "aggregating ClusterRoles failed; any change of a ClusterRole tries again");
        }
    });
}

/// Brings all aggregated roles up to date.
///
/// # Errors
/// What the store says. A role that others change at the same time is tried again.
pub async fn run(api: &ApiServer) -> Result<(), WriteError> {
    for _ in 0..ROUNDS {
        let all = api.storage().list(CLUSTER_ROLES, None).items;
        let mut quiet = true;
        for (key, stored) in &all {
            let others = all.iter().filter(|(other, _)| other != key);
            let Some(rules) = aggregated(&stored.value, others.map(|(_, role)| &role.value)) else {
                continue;
            };
            if stored.value["rules"] == rules {
                continue;
            }
            quiet = false;
            let mut new = stored.value.clone();
            new["rules"] = rules;
            let expect = Expect::Revision(stored.revision);
            match api.storage().put(CLUSTER_ROLES, key, expect, new).await {
                Ok(_) | Err(WriteError::Changed) => {}
                Err(error) => return Err(error),
            }
        }
        if quiet {
            break;
        }
    }
    Ok(())
}

/// The rules that `role` should have, in the order of the names of those that it is made of; `None` when it has its own.
fn aggregated<'a>(role: &Value, others: impl Iterator<Item = &'a Value>) -> Option<Value> {
    let selectors = role["aggregationRule"]["clusterRoleSelectors"].as_array()?;
    let selectors: Vec<LabelSelector> = selectors
        .iter()
        .filter_map(|selector| LabelSelector::from_object(selector).ok())
        .collect();
    let mut rules: Vec<Rule> = Vec::new();
    for other in others.filter(|other| selectors.iter().any(|s| s.matches(other))) {
        for rule in Rule::list(other) {
            if !rules.contains(&rule) {
                rules.push(rule);
            }
        }
    }
    Some(json!(
        rules.iter().map(Rule::to_json).collect::<Vec<Value>>()
    ))
}
