//! What was asked for at the last installation of a revision, kept in the cluster: for `verify-install`, and to tell an installation that
//! did not finish.

use anyhow::Context as _;
use serde_json::{Value, json};

use super::objects::Session;
use super::tags::label_of;
use crate::cluster::query;
use crate::install::{COMPONENT, MANAGED_BY, OWNER, Plan, owner};
use crate::version::VERSION;

/// How far an installation came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Installing,
    Installed,
}

/// An installation.
#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) phase: Phase,
    pub(crate) version: String,
    pub(crate) profile: String,
    /// The whole spec.
    pub(crate) spec: Value,
}

fn name(revision: &str) -> String {
    format!("mesh-{}", owner(revision))
}

/// Where the record of a revision is.
pub(super) fn path(namespace: &str, revision: &str) -> String {
    format!(
        "/api/v1/namespaces/{namespace}/configmaps/{}",
        name(revision)
    )
}

/// Reads the record of a revision, if there is one.
///
/// # Errors
/// One that can't be read.
pub(crate) async fn read(
    session: &Session<'_>,
    namespace: &str,
    revision: &str,
) -> anyhow::Result<Option<Record>> {
    let path = path(namespace, revision);
    let Some(found) = session.cluster.read_optional(&path).await? else {
        return Ok(None);
    };
    let text = |key: &str| found["data"][key].as_str().unwrap_or_default().to_owned();
    let spec = mesh_api::yaml::documents(&text("spec"), &path)
        .with_context(|| format!("reading what was installed from {path}"))?;
    Ok(Some(Record {
        phase: match text("phase").as_str() {
            "installed" => Phase::Installed,
            _ => Phase::Installing,
        },
        version: text("version"),
        profile: text("profile"),
        spec: spec.into_iter().next().unwrap_or_default(),
    }))
}

/// The plans of all installations but that of `except`, whose records are in a namespace. A record that this version can't read is passed over.
pub(crate) async fn other_plans(
    session: &Session<'_>,
    namespace: &str,
    except: &str,
) -> anyhow::Result<Vec<Plan>> {
    let selector = format!("{COMPONENT}=Record,{}={}", MANAGED_BY.0, MANAGED_BY.1);
    let path = format!(
        "/api/v1/namespaces/{namespace}/configmaps?labelSelector={}",
        query(&selector)
    );
    let list = session.cluster.read(&path).await?;
    let mut plans = Vec::new();
    for map in list["items"].as_array().into_iter().flatten() {
        let revision = label_of(map, "istio.io/rev");
        if revision == except {
            continue;
        }
        match read(session, namespace, revision).await {
            Ok(Some(found)) => plans.extend(Plan::new(&found.spec)),
            Ok(None) => {}
            Err(error) => eprintln!("Warning: {error:#}"),
        }
    }
    Ok(plans)
}

/// Writes it.
pub(super) async fn write(
    session: &Session<'_>,
    plan: &Plan,
    spec: &Value,
    phase: Phase,
) -> anyhow::Result<()> {
    let phase = match phase {
        Phase::Installing => "installing",
        Phase::Installed => "installed",
    };
    let record = json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {
            "name": name(&plan.revision), "namespace": plan.namespace,
            "labels": { MANAGED_BY.0: MANAGED_BY.1, COMPONENT: "Record", OWNER: plan.owner(), "istio.io/rev": plan.revision },
        },
        "data": { "phase": phase, "version": VERSION, "profile": plan.profile, "spec": mesh_api::yaml::to_string(spec) },
    });
    session.apply(&record, false).await.map(|_| ())
}
