//! `mesh verify-install`: whether an installation is there, whole and working.

use std::process::ExitCode;

use serde_json::Value;

use crate::Global;
use crate::apply::Change;
use crate::install::{Component, NAMESPACE, Plan, Settings};
use crate::installer::objects::{Session, label};
use crate::installer::record::{self, Phase};
use crate::installer::tags;
use crate::installer::{build, ready};

/// Check an installation object by object
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// What should be there [default: what was asked for at the last installation of the revision]
    #[command(flatten)]
    pub settings: Settings,
}

/// Runs the command. It ends with 1 if something is missing, different or not ready.
///
/// # Errors
/// No installation, settings that can't be taken, a cluster that can't be reached.
pub async fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    let cluster = global.cluster().await?;
    let mut session = crate::installer::session(&cluster).await?;
    session.default_tag = tags::default_revision(&cluster).await?.is_some();
    let plan = wanted(&session, &args.settings, global).await?;
    let mut wrong = 0;
    for component in &plan.components {
        for object in &component.objects {
            match check(&session, component, object).await? {
                None => global.out.line(format_args!("✔ {}", label(object)))?,
                Some(why) => {
                    wrong += 1;
                    global
                        .out
                        .line(format_args!("✘ {}: {why}", label(object)))?;
                }
            }
        }
    }
    let all = plan.objects().count();
    if wrong > 0 {
        eprintln!(
            "{wrong} of {all} objects are not as they should be: `mesh install` with the same settings puts them right"
        );
        return Ok(ExitCode::FAILURE);
    }
    global.out.line(format_args!(
        "✔ {all} objects of revision {:?} are as they should be",
        plan.revision
    ))?;
    Ok(ExitCode::SUCCESS)
}

async fn wanted(
    session: &Session<'_>,
    settings: &Settings,
    global: &Global,
) -> anyhow::Result<Plan> {
    if !settings.filename.is_empty() || !settings.set.is_empty() {
        let spec = settings.spec(crate::installer::namespace(global))?;
        return Ok(Plan::new(&spec)?);
    }
    let revision = settings.revision.as_deref().unwrap_or("default");
    let namespace = &global.istio_namespace;
    let found = record::read(session, namespace, revision).await?;
    let Some(found) = found else {
        let elsewhere = match namespace.as_str() {
            NAMESPACE => "; --istioNamespace and --revision name others",
            _ => "",
        };
        anyhow::bail!(
            "there is no installation of revision {revision:?} in namespace {namespace}{elsewhere}"
        );
    };
    if found.phase == Phase::Installing {
        eprintln!(
            "Warning: the last installation (version {}) did not finish",
            found.version
        );
    }
    Ok(Plan::new(&found.spec)?)
}

/// What is wrong with an object.
async fn check(
    session: &Session<'_>,
    component: &Component,
    object: &Value,
) -> anyhow::Result<Option<String>> {
    if session.kind(object).is_none() {
        return Ok(Some("the cluster does not have this kind".to_owned()));
    }
    let Some(live) = session.live(object).await? else {
        return Ok(Some("it is missing".to_owned()));
    };
    if session
        .apply(&build::as_marked(object, &live), true)
        .await?
        .change
        != Change::Unchanged
    {
        return Ok(Some("it was changed since it was installed".to_owned()));
    }
    if object["kind"] == "Deployment" && !ready::is_available(&live) {
        let trouble = ready::trouble(session, &live).await?;
        return Ok(Some(match trouble.as_slice() {
            [] => "not all replicas are available".to_owned(),
            some => some.join("; "),
        }));
    }
    if object["webhooks"].is_array() {
        let alone = Component {
            name: component.name,
            objects: vec![object.clone()],
        };
        return Ok(ready::without_bundle(session, &alone)
            .await?
            .map(|_| "it has no caBundle".to_owned()));
    }
    Ok(None)
}
