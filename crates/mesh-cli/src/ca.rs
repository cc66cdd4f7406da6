//! `mesh ca`: the mesh's certificate authority: what is trusted, and a new root while everybody goes on talking.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use mesh_identity::trust::describe;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::Global;
use crate::cluster::Cluster;
use crate::proxy_config::{time, unix_now};

/// The Secrets of the authority, its annotation that asks for a new root, and where control planes say how far they are.
const SELF_SIGNED: &str = "istio-ca-secret";
const PLUGGED_IN: &str = "cacerts";
const REQUEST: &str = "security.mesh/rotate-root";
const PROGRESS: &str = "istio-ca-rotation";
/// Annotation of the Secret: whom the rotation goes on without.
const WITHOUT: &str = "security.mesh/rotate-without";
/// Where the roots are published; of an authority elsewhere nothing else is known.
const PUBLISHED: &str = "istio-ca-root-cert";
const LOOK: Duration = Duration::from_secs(1);

/// Look at the mesh's certificate authority, or change its root
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum What {
    /// Show the authority, the roots that are trusted, and how far a rotation is
    Status,
    /// Change the root: trust a new one everywhere, renew all certificates, then forget the old one
    Rotate {
        /// How long to watch; the rotation goes on without being watched
        #[arg(long, value_name = "DURATION", default_value = "10m")]
        timeout: String,
        /// Don't watch
        #[arg(long)]
        no_wait: bool,
        /// Let the rotation that is under way go on without those that are waited for now (they are named); until they have renewed they can
        /// talk to nobody
        #[arg(long)]
        force: bool,
    },
}

/// Runs the command.
///
/// # Errors
/// No authority, one that is not ours to change, or a rotation that takes longer than was to be waited.
pub async fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    let cluster = global.cluster().await?;
    match args.what {
        What::Status => status(&cluster, global).await,
        What::Rotate {
            timeout,
            no_wait,
            force,
        } => {
            let timeout: mesh_api::Duration = timeout.parse()?;
            match force {
                true => go_on(&cluster, global).await?,
                false => request(&cluster, global).await?,
            }
            if no_wait {
                if !force {
                    global
                        .out
                        .line("a new root was asked for; `mesh ca status` shows how far that is")?;
                }
                return Ok(ExitCode::SUCCESS);
            }
            watch(&cluster, global, timeout.0).await
        }
    }
}

/// An authority as its Secret shows it.
struct Authority {
    name: &'static str,
    certificate: String,
    roots: String,
    /// The next root is there, and not in use yet.
    next: bool,
    requested: bool,
    /// Whom the rotation goes on without.
    without: Vec<String>,
}

impl Authority {
    fn words(&self) -> &'static str {
        let several = describe(&self.roots).is_ok_and(|roots| roots.len() > 1);
        match () {
            () if self.requested => "a new root was asked for",
            () if self.name == PLUGGED_IN => {
                "none: the authority is an operator's (Secret cacerts)"
            }
            () if self.next => "1 of 2: all proxies are to trust the next root",
            () if several => "2 of 2: all proxies are to get a certificate of the new root",
            () => "none",
        }
    }
}

async fn authority(cluster: &Cluster, global: &Global) -> anyhow::Result<Authority> {
    for name in [PLUGGED_IN, SELF_SIGNED] {
        let path = format!(
            "/api/v1/namespaces/{}/secrets/{name}",
            global.istio_namespace
        );
        let Some(secret) = cluster.read_optional(&path).await? else {
            continue;
        };
        let text = |key: &str| {
            let encoded = secret["data"][key].as_str().unwrap_or_default();
            String::from_utf8(BASE64.decode(encoded).unwrap_or_default()).unwrap_or_default()
        };
        let either = |first: &str, second: &str| match text(first) {
            empty if empty.is_empty() => text(second),
            found => found,
        };
        let certificate = either("ca-cert.pem", "tls.crt");
        let roots = match either("root-cert.pem", "ca.crt") {
            empty if empty.is_empty() => certificate.clone(),
            found => found,
        };
        return Ok(Authority {
            name,
            certificate,
            roots,
            next: !text("next-cert.pem").is_empty(),
            requested: !secret["metadata"]["annotations"][REQUEST].is_null(),
            without: secret["metadata"]["annotations"][WITHOUT]
                .as_str()
                .and_then(|text| serde_json::from_str(text).ok())
                .unwrap_or_default(),
        });
    }
    anyhow::bail!(
        "no certificate authority in namespace {}: neither Secret {PLUGGED_IN} nor {SELF_SIGNED} (is the control plane running there?)",
        global.istio_namespace
    )
}

async fn status(cluster: &Cluster, global: &Global) -> anyhow::Result<ExitCode> {
    let authority = match authority(cluster, global).await {
        Ok(authority) => authority,
        Err(missing) => return elsewhere(cluster, global, missing).await,
    };
    let signer = describe(&authority.certificate)
        .ok()
        .and_then(|all| all.into_iter().next())
        .with_context(|| format!("Secret {} holds no certificate", authority.name))?;
    let out = &global.out;
    out.line(format!(
        "Authority: Secret {}/{}",
        global.istio_namespace, authority.name
    ))?;
    out.line(format!(
        "  {} (issued by {})",
        signer.subject, signer.issuer
    ))?;
    out.line(format!(
        "  valid until {}{}",
        time(signer.not_after),
        expired(signer.not_after)
    ))?;
    out.line("Trusted roots:")?;
    for root in describe(&authority.roots).unwrap_or_default() {
        let signs = if root.fingerprint == signer.fingerprint {
            ", signs"
        } else {
            ""
        };
        out.line(format!(
            "  {}  {}, until {}{}{signs}",
            &root.fingerprint[..16],
            root.subject,
            time(root.not_after),
            expired(root.not_after)
        ))?;
    }
    out.line(format!("Rotation: {}", authority.words()))?;
    for (_, said) in progress(cluster, global).await? {
        out.line(format!("  {}", said.words()))?;
        for name in said.waiting.iter().skip(NAMED) {
            out.line(format!("    and for {name}"))?;
        }
    }
    for name in &authority.without {
        out.line(format!("  goes on without {name}"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Without a Secret an authority elsewhere may sign: its roots are published all the same.
async fn elsewhere(
    cluster: &Cluster,
    global: &Global,
    missing: anyhow::Error,
) -> anyhow::Result<ExitCode> {
    let path = format!(
        "/api/v1/namespaces/{}/configmaps/{PUBLISHED}",
        global.istio_namespace
    );
    let map = cluster.read_optional(&path).await?.unwrap_or(Value::Null);
    let Some(text) = map["data"]["root-cert.pem"].as_str() else {
        return Err(missing);
    };
    let out = &global.out;
    out.line("Authority: elsewhere (EXTERNAL_CA): there is no Secret with a key of the mesh")?;
    out.line("Trusted roots:")?;
    for root in describe(text).unwrap_or_default() {
        out.line(format!(
            "  {}  {}, until {}{}",
            &root.fingerprint[..16],
            root.subject,
            time(root.not_after),
            expired(root.not_after)
        ))?;
    }
    out.line("Rotation: by whoever runs the authority")?;
    Ok(ExitCode::SUCCESS)
}

fn expired(end: u64) -> &'static str {
    match end <= unix_now() {
        true => " (EXPIRED)",
        false => "",
    }
}

async fn request(cluster: &Cluster, global: &Global) -> anyhow::Result<()> {
    let authority = authority(cluster, global).await?;
    anyhow::ensure!(
        authority.name == SELF_SIGNED,
        "the authority is an operator's: to change it, put both roots into root-cert.pem of Secret {PLUGGED_IN}, wait until `mesh proxy-config secret` shows both at all proxies, \
         then put the new certificate and key there, and when all certificates are renewed take the old root out"
    );
    if authority.words() != "none" {
        return global.out.line("a rotation is under way already");
    }
    annotate(cluster, global, REQUEST, &time(unix_now())).await
}

/// Tells the control plane to go on without those that it waits for now, and says who that is.
async fn go_on(cluster: &Cluster, global: &Global) -> anyhow::Result<()> {
    let authority = authority(cluster, global).await?;
    anyhow::ensure!(
        authority.name == SELF_SIGNED && authority.words() != "none",
        "no rotation is under way; --force is for one that waits (`mesh ca status` shows whom for)"
    );
    let all = progress(cluster, global).await?;
    let mut names: Vec<String> = authority.without.clone();
    let fresh = |said: &&Progress| unix_now().saturating_sub(said.time) <= FRESH_SECONDS;
    for said in all.values().filter(fresh) {
        let new = said.waiting.iter().filter(|name| !names.contains(name));
        let new: Vec<String> = new.cloned().collect();
        for name in &new {
            global.out.line(format!("going on without {name}"))?;
        }
        names.extend(new);
    }
    anyhow::ensure!(
        names.len() > authority.without.len(),
        "nobody else is waited for (`mesh ca status` shows how far the rotation is)"
    );
    annotate(cluster, global, WITHOUT, &serde_json::to_string(&names)?).await
}

/// Puts an annotation on the Secret of the authority.
async fn annotate(
    cluster: &Cluster,
    global: &Global,
    name: &str,
    value: &str,
) -> anyhow::Result<()> {
    let path = format!(
        "/api/v1/namespaces/{}/secrets/{SELF_SIGNED}",
        global.istio_namespace
    );
    let patch = json!({ "metadata": { "annotations": { name: value } } });
    let kind = [("content-type", "application/merge-patch+json")];
    cluster
        .request("PATCH", &path, &kind, serde_json::to_vec(&patch)?)
        .await?;
    Ok(())
}

async fn watch(cluster: &Cluster, global: &Global, timeout: Duration) -> anyhow::Result<ExitCode> {
    let end = Instant::now() + timeout;
    let mut shown = String::new();
    loop {
        let authority = authority(cluster, global).await?;
        let step = authority.words();
        if step == "none" {
            let roots = describe(&authority.roots).unwrap_or_default();
            let root = roots.first().map_or("", |root| root.fingerprint.as_str());
            global.out.line(format!("done: the only root is {root}"))?;
            return Ok(ExitCode::SUCCESS);
        }
        let all = progress(cluster, global).await?;
        let all: Vec<String> = all.values().map(Progress::words).collect();
        let line = match all.is_empty() {
            true => step.to_owned(),
            false => format!("{step}; {}", all.join("; ")),
        };
        if line != shown {
            global.out.line(&line)?;
            shown = line;
        }
        anyhow::ensure!(
            Instant::now() < end,
            "not done within {timeout:?} ({shown}); it goes on, both roots are trusted meanwhile, and `mesh ca status` shows how far it is \
             (`mesh ca rotate --force` goes on without those that are waited for)"
        );
        tokio::time::sleep(LOOK).await;
    }
}

/// What a control plane says of its proxies.
#[derive(Deserialize)]
struct Progress {
    connected: usize,
    done: usize,
    waiting: Vec<String>,
    #[serde(default)]
    more: usize,
    /// When the control plane said it, seconds since 1970.
    #[serde(default)]
    time: u64,
}

/// What a control plane said longer ago is about proxies that it has no more (it says it again every ten seconds).
const FRESH_SECONDS: u64 = 30;

/// Names in one line at most.
const NAMED: usize = 10;

impl Progress {
    fn words(&self) -> String {
        let mut text = format!("{} of {} proxies", self.done, self.connected);
        if !self.waiting.is_empty() {
            let named = self.waiting.iter().take(NAMED).cloned();
            let named: Vec<String> = named.collect();
            text.push_str(&format!(", waiting for {}", named.join(", ")));
            let more = self.waiting.len() - named.len() + self.more;
            if more > 0 {
                text.push_str(&format!(" and {more} more"));
            }
        }
        text
    }
}

async fn progress(
    cluster: &Cluster,
    global: &Global,
) -> anyhow::Result<BTreeMap<String, Progress>> {
    let path = format!(
        "/api/v1/namespaces/{}/configmaps/{PROGRESS}",
        global.istio_namespace
    );
    let map = cluster.read_optional(&path).await?.unwrap_or(Value::Null);
    let data = map["data"].as_object();
    let read = |(name, text): (&String, &Value)| {
        let said = serde_json::from_str(text.as_str()?).ok()?;
        Some((name.clone(), said))
    };
    Ok(data.into_iter().flatten().filter_map(read).collect())
}
