//! Changing the root while everybody goes on talking: first everybody trusts the next root beside the present one, then everybody gets a
//! certificate of it, then nobody trusts the old one any more. The Secret says how far that is, so it goes on wherever it was interrupted.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use mesh_identity::ca::Authority;
use mesh_identity::trust::TrustBundle;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::Options;
use crate::ca::secret::{
    CERTIFICATE, COMMON_NAME, KEY, ORGANIZATION, ROOT_LIFETIME, ROOTS, SELF_SIGNED, SecretError,
    part, secrets,
};
use crate::ca::{Held, Issuing, Origin};
use crate::leader::Leader;
use crate::nodes::Nodes;
use crate::serving::now;

pub(crate) mod waiting;

use waiting::{Judged, Pod};

/// Who wants a new root sets this annotation on the Secret, to anything.
pub(crate) const REQUEST: &str = "security.mesh/rotate-root";
/// The next root and its key, while they are only trusted.
pub(crate) const NEXT_CERTIFICATE: &str = "next-cert.pem";
const NEXT_KEY: &str = "next-key.pem";
/// Where each control plane says how far its proxies are.
const PROGRESS: &str = "istio-ca-rotation";
/// Annotation of the Secret: fingerprint of the root before the present one, for control planes that missed the steps between.
pub(crate) const FORMER: &str = "security.mesh/former-root";
/// Whom an operator does not want to wait for: names as the progress shows them, a list in JSON.
pub(crate) const WITHOUT: &str = "security.mesh/rotate-without";
/// Time from one look to the next while the root changes.
const LOOK: Duration = Duration::from_secs(1);
/// Time from one look to the next otherwise: for a root that grows old.
const REST: Duration = Duration::from_secs(3600);
/// What another control plane said longer ago does not count: it is gone, and its proxies are with us.
const FRESH_SECONDS: u64 = 30;
/// A root is changed when this share of its validity is left (Istio: the last 20 %).
const OLD_AGE: f64 = 0.2;
/// Names of proxies that are shown at most.
const SHOWN: usize = 200;

/// How far a rotation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Phase {
    /// There is none.
    Idle,
    /// The next root is to be trusted by all.
    Trust,
    /// All are to have a certificate of the next root, which signs now.
    Renew,
}

/// What a control plane sees of its proxies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Progress {
    pub(crate) phase: Phase,
    /// Fingerprint of the root that signs.
    pub(crate) root: String,
    /// Pods and others whose proxies are connected and authenticated.
    pub(crate) connected: usize,
    /// Those that are so far.
    pub(crate) done: usize,
    /// Those that are waited for (of the leader: of all control planes), and those that an operator goes on without.
    pub(crate) waiting: Vec<String>,
    /// How many more there are.
    #[serde(default)]
    pub(crate) more: usize,
    /// Marks of the pods that are so far.
    #[serde(default)]
    pub(crate) pods: BTreeSet<String>,
    /// Those who are no pods that are known, and are not so far.
    #[serde(default)]
    pub(crate) strangers: BTreeSet<String>,
    /// When this was seen, seconds since 1970.
    pub(crate) time: u64,
}

/// The parts of the Secret, or the API, that stand in the way; it is tried again.
type Step = Result<(), SecretError>;

/// Takes part in rotations, for ever. Everybody reports, the leader acts.
pub(crate) async fn run(
    options: Arc<Options>,
    replica: String,
    nodes: Nodes,
    leader: Leader,
    mut issuing: Issuing,
) {
    let mut said = None;
    loop {
        let held = issuing.borrow_and_update().clone();
        let mut wait = REST;
        if let Some(held) = held.filter(|held| held.origin == Origin::SelfSigned) {
            let active = held.phase != Phase::Idle || held.requested;
            if active {
                wait = LOOK;
            }
            let leads = *leader.borrow();
            if let Err(error) = step(&options, &replica, &nodes, leads, &held, &mut said).await {
                tracing::warn!(%error, "rotating the root; trying again");
            }
        }
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            changed = issuing.changed() => if changed.is_err() { return },
        }
    }
}

async fn step(
    options: &Options,
    replica: &str,
    nodes: &Nodes,
    leads: bool,
    held: &Held,
    said: &mut Option<Progress>,
) -> Step {
    if held.phase == Phase::Idle {
        let old = is_old(held, now());
        if leads && (held.requested || old) {
            tracing::info!(
                old,
                "a new root is made, and trusted beside the present one"
            );
            return edit(options, begin).await;
        }
        if said.take().is_some() {
            report(options, replica, None).await?;
        }
        return Ok(());
    }
    let pods = waiting::pods(options).await?;
    let judged = waiting::judge(&pods, &nodes.trust_said(held));
    let mut progress = progress(held, &judged);
    let done = match leads {
        true => {
            let waits_for = lack(options, replica, (&progress, &judged), &pods).await?;
            let without = without(options).await?;
            let (still, excused): (Vec<String>, Vec<String>) = waits_for
                .into_iter()
                .partition(|name| !without.contains(name));
            if still.is_empty() && !excused.is_empty() {
                tracing::warn!(proxies = ?excused, "the rotation of the root goes on without these, as an operator asked");
            }
            show(&mut progress, &still);
            still.is_empty()
        }
        false => {
            let own: Vec<String> = judged.waiting().into_iter().collect();
            show(&mut progress, &own);
            false
        }
    };
    let same = |said: &Progress| {
        let renewed = progress.time.saturating_sub(said.time) > FRESH_SECONDS / 3;
        !renewed
            && Progress {
                time: said.time,
                ..progress.clone()
            } == *said
    };
    if !said.as_ref().is_some_and(same) {
        report(options, replica, Some(&progress)).await?;
        *said = Some(progress.clone());
    }
    if !done {
        return Ok(());
    }
    tracing::info!(phase = ?held.phase, root = progress.root, "all proxies are so far; the rotation of the root goes on");
    match held.phase {
        Phase::Trust => edit(options, switch).await,
        _ => edit(options, retire).await,
    }
}

/// Whether little is left of the validity of the root that signs.
fn is_old(held: &Held, now: u64) -> bool {
    let certificate = held.own().map_or("", Authority::certificate_pem);
    let described = mesh_identity::trust::describe(certificate).unwrap_or_default();
    described.first().is_some_and(|root| {
        let left = root.not_after.saturating_sub(now) as f64;
        left < (root.not_after - root.not_before) as f64 * OLD_AGE
    })
}

/// Who is lacking until everybody is so far: every pod with a proxy must be, at one of the control planes, and everybody else who is connected.
async fn lack(
    options: &Options,
    replica: &str,
    (own, judged): (&Progress, &Judged),
    pods: &[Pod],
) -> Result<BTreeSet<String>, SecretError> {
    let map = config_maps(options).get_opt(PROGRESS).await?;
    let data = map.map(|map| map.data["data"].clone()).unwrap_or_default();
    let texts: BTreeMap<String, String> = serde_json::from_value(data).unwrap_or_default();
    let others = texts.iter().filter(|(name, _)| *name != replica);
    let fresh = |text: &String| {
        let said: Progress = serde_json::from_str(text).ok()?;
        (own.time.saturating_sub(said.time) <= FRESH_SECONDS).then_some(said)
    };
    let others: Vec<Progress> = others.filter_map(|(_, text)| fresh(text)).collect();
    let mut lacking = judged.waiting();
    let mut done = own.pods.clone();
    for said in others {
        if said.phase != own.phase || said.root != own.root {
            lacking.insert("proxies of other control planes".to_owned());
            continue;
        }
        lacking.extend(said.strangers);
        lacking.extend(said.waiting);
        done.extend(said.pods);
    }
    // A stream of before may still stand at another control plane.
    for pod in pods {
        if done.contains(&pod.mark()) {
            lacking.remove(&pod.shown());
        } else if pod.meshed {
            lacking.insert(pod.shown());
        }
    }
    Ok(lacking)
}

/// Those whom an operator does not want to wait for.
async fn without(options: &Options) -> Result<BTreeSet<String>, SecretError> {
    let secret = secrets(options).get(SELF_SIGNED).await?;
    let annotations = secret.metadata.annotations.unwrap_or_default();
    let text = annotations.get(WITHOUT).map_or("[]", String::as_str);
    serde_json::from_str(text).map_err(|error| {
        SecretError::Content(format!(
            "the annotation {WITHOUT} is not a list of names in JSON: {error}"
        ))
    })
}

/// Puts names into a report, as many as there is room for.
fn show(progress: &mut Progress, names: &[String]) {
    progress.waiting = names.iter().take(SHOWN).cloned().collect();
    progress.more = names.len() - progress.waiting.len();
}

/// Changes the Secret, if nobody else did meanwhile.
async fn edit(
    options: &Options,
    change: fn(&mut DynamicObject) -> Result<(), SecretError>,
) -> Step {
    let api = secrets(options);
    let mut secret = api.get(SELF_SIGNED).await?;
    change(&mut secret)?;
    api.replace(SELF_SIGNED, &PostParams::default(), &secret)
        .await?;
    Ok(())
}

fn get(secret: &DynamicObject, name: &str) -> Result<String, SecretError> {
    let text = part(&secret.data["data"], name)?;
    match text.is_empty() {
        true => Err(SecretError::Content(format!("it has no {name}"))),
        false => Ok(text),
    }
}

fn put(secret: &mut DynamicObject, name: &str, text: &str) {
    secret.data["data"][name] = json!(BASE64.encode(text));
}

/// A next root, trusted after the present one.
fn begin(secret: &mut DynamicObject) -> Result<(), SecretError> {
    if let Some(annotations) = &mut secret.metadata.annotations {
        annotations.remove(REQUEST);
        annotations.remove(WITHOUT);
    }
    let next = Authority::generate(ORGANIZATION, COMMON_NAME, now(), ROOT_LIFETIME)?;
    let present = get(secret, CERTIFICATE)?;
    let both = format!("{present}{}", next.certificate_pem());
    put(secret, NEXT_CERTIFICATE, next.certificate_pem());
    put(secret, NEXT_KEY, next.key_pem());
    put(secret, ROOTS, &both);
    Ok(())
}

/// The next root signs; the old one is still trusted. Its key is gone from here on.
fn switch(secret: &mut DynamicObject) -> Result<(), SecretError> {
    let (old, next) = (get(secret, CERTIFICATE)?, get(secret, NEXT_CERTIFICATE)?);
    let key = get(secret, NEXT_KEY)?;
    put(secret, CERTIFICATE, &next);
    put(secret, KEY, &key);
    put(secret, ROOTS, &format!("{next}{old}"));
    let former = TrustBundle::from_pem(&old)
        .map_err(|error| SecretError::Content(format!("its {CERTIFICATE}: {error}")))?
        .fingerprints();
    let annotations = secret.metadata.annotations.get_or_insert_default();
    annotations.remove(WITHOUT);
    let first = former.into_iter().next();
    annotations.extend(first.map(|former| (FORMER.to_owned(), former)));
    if let Some(data) = secret.data["data"].as_object_mut() {
        data.remove(NEXT_CERTIFICATE);
        data.remove(NEXT_KEY);
    }
    Ok(())
}

/// The old root is trusted no more.
fn retire(secret: &mut DynamicObject) -> Result<(), SecretError> {
    if let Some(annotations) = &mut secret.metadata.annotations {
        annotations.remove(WITHOUT);
    }
    let present = get(secret, CERTIFICATE)?;
    put(secret, ROOTS, &present);
    Ok(())
}

/// How far a Secret's rotation is.
pub(crate) fn phase(data: &Value, trusted: &TrustBundle) -> Phase {
    if data.get(NEXT_CERTIFICATE).is_some() {
        Phase::Trust
    } else if trusted.fingerprints().len() > 1 {
        Phase::Renew
    } else {
        Phase::Idle
    }
}

/// Writes what this control plane sees, or takes it away.
async fn report(options: &Options, replica: &str, progress: Option<&Progress>) -> Step {
    let text = progress.and_then(|progress| serde_json::to_string(progress).ok());
    let api = config_maps(options);
    let patch = json!({ "data": { replica: text } });
    let patched = api
        .patch(PROGRESS, &PatchParams::default(), &Patch::Merge(patch))
        .await;
    match patched {
        Err(kube::Error::Api(status)) if status.code == 404 => {
            let data: BTreeMap<&str, String> =
                text.map(|text| (replica, text)).into_iter().collect();
            let map = json!({
                "apiVersion": "v1", "kind": "ConfigMap",
                "metadata": { "name": PROGRESS, "namespace": options.namespace },
                "data": data,
            });
            let map: DynamicObject =
                serde_json::from_value(map).map_err(kube::Error::SerdeError)?;
            api.create(&PostParams::default(), &map).await?;
        }
        patched => drop(patched?),
    }
    Ok(())
}

fn config_maps(options: &Options) -> Api<DynamicObject> {
    let gvk = GroupVersionKind::gvk("", "v1", "ConfigMap");
    let resource = ApiResource::from_gvk_with_plural(&gvk, "configmaps");
    Api::namespaced_with(options.client.clone(), &options.namespace, &resource)
}

/// What this control plane sees.
fn progress(held: &Held, judged: &Judged) -> Progress {
    let marks = |done: bool| {
        let pods = judged.pods.iter();
        pods.filter(move |(_, said)| said.1 == done)
            .map(|(mark, _)| mark.clone())
    };
    let pods: BTreeSet<String> = marks(true).collect();
    Progress {
        phase: held.phase,
        root: held.root.clone(),
        connected: judged.pods.len() + judged.strangers.len(),
        done: pods.len(),
        waiting: Vec::new(),
        more: 0,
        pods,
        strangers: judged.strangers.clone(),
        time: now(),
    }
}
