//! The objects of an installation, by component, in the order in which they are applied.
//!
//! The same objects go to the local cluster and to any Kubernetes. Pure: nothing is applied here.

mod access;
mod control_plane;
mod gateway;
mod input;
mod path;
mod remote;
mod resolve;
mod schema;
mod spec;
pub(crate) mod webhooks;
mod workload;

use std::collections::BTreeMap;

use mesh_inject::InjectError;
use serde_json::{Value, json};

pub use input::{PROFILES, Settings, profile};
pub use schema::SettingError;

pub(crate) use resolve::{DEFAULT_REVISION, name as check_name};

use resolve::Resolved;

/// Namespace of the mesh's own parts, where no other is asked for.
pub const NAMESPACE: &str = "istio-system";

/// Label of everything that this program installs.
pub(crate) const MANAGED_BY: (&str, &str) = ("app.kubernetes.io/managed-by", "mesh");
/// Istio's label of what an installation owns; the value is that of [`Plan::owner`].
pub(crate) const OWNER: &str = "install.operator.istio.io/owning-resource";
/// Istio's label of the component that an object belongs to.
pub(crate) const COMPONENT: &str = "operator.istio.io/component";

/// What is installed into the local cluster.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Profile {
    /// Control plane and ingress gateway.
    #[default]
    Default,
    /// As default, and an egress gateway, with small resource requests.
    Demo,
    /// Control plane only.
    Minimal,
    /// Nothing.
    Empty,
}

/// How it is installed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstallOptions {
    /// What is installed.
    pub profile: Profile,
    /// Image of every part; default `mesh:<version>`.
    pub image: String,
    /// Revision of the control plane; `default`, or a name that all its objects carry.
    pub revision: String,
    /// Worker threads of each proxy; none leaves it to the proxy (by CPU limit). The local cluster sets 1.
    pub concurrency: Option<u32>,
}

impl Default for InstallOptions {
    fn default() -> Self {
        Self {
            profile: Profile::Default,
            image: concat!("mesh:", env!("CARGO_PKG_VERSION")).to_owned(),
            revision: "default".to_owned(),
            concurrency: None,
        }
    }
}

/// Why no objects can be made.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// A setting that can't be taken.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// A setting whose value means nothing.
    #[error("{0}: {1}")]
    Invalid(&'static str, String),
    /// An overlay that does not fit.
    #[error("overlay of {kind} {name}: {reason}")]
    Overlay {
        /// Kind of the object.
        kind: String,
        /// Its name.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A profile that can't be read; a bug.
    #[error("{0:#}")]
    Profile(anyhow::Error),
    /// Settings from which no gateway pod can be made.
    #[error(transparent)]
    Inject(#[from] InjectError),
}

/// The objects of a part of the mesh.
#[derive(Debug, Clone, PartialEq)]
pub struct Component {
    /// Istio's name for it: `Base`, `Pilot`, `IstiodRemote`, `IngressGateways`, `EgressGateways`.
    pub name: &'static str,
    /// The objects, in order.
    pub objects: Vec<Value>,
}

/// An installation.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Name of the profile.
    pub profile: String,
    /// Namespace of the mesh's own parts.
    pub namespace: String,
    /// Revision of the control plane, `default` where none was named.
    pub revision: String,
    /// The parts, in order: kinds, control plane, gateways.
    pub components: Vec<Component>,
    /// Settings that have no effect, each with the reason.
    pub warnings: Vec<String>,
}

impl Plan {
    /// Makes the objects that a spec asks for (of [`Settings::spec`]).
    ///
    /// # Errors
    /// A setting that there is not, or whose value means nothing.
    pub fn new(spec: &Value) -> Result<Self, InstallError> {
        let settings = Resolved::new(spec)?;
        let mut components = Vec::new();
        let mut add = |name, objects: Vec<Value>| {
            if !objects.is_empty() {
                components.push(Component { name, objects });
            }
        };
        add("Base", base(&settings));
        if let Some(part) = &settings.pilot {
            add("Pilot", control_plane::objects(&settings, part)?);
        }
        if settings.remote {
            add("IstiodRemote", remote::objects(&settings));
        }
        for (name, ingress) in [("IngressGateways", true), ("EgressGateways", false)] {
            let mut all = Vec::new();
            for gateway in settings.gateways.iter().filter(|g| g.ingress == ingress) {
                all.extend(gateway::objects(&settings, gateway)?);
            }
            add(name, all);
        }
        let owner = owner(&settings.revision);
        for component in &mut components {
            for object in &mut component.objects {
                mark(object, component.name, &settings.revision, &owner);
            }
        }
        Ok(Self {
            profile: settings.profile,
            namespace: settings.namespace,
            revision: settings.revision,
            components,
            warnings: settings.warnings,
        })
    }

    /// All objects, in order.
    pub fn objects(&self) -> impl Iterator<Item = &Value> {
        self.components.iter().flat_map(|part| &part.objects)
    }

    /// Value of the label by which an installation knows what it owns.
    #[must_use]
    pub fn owner(&self) -> String {
        owner(&self.revision)
    }
}

/// Istio's name for the installation of a revision.
pub(crate) fn owner(revision: &str) -> String {
    match revision {
        DEFAULT_REVISION => "installed-state".to_owned(),
        revision => format!("installed-state-{revision}"),
    }
}

/// The objects for the local cluster, in waves: (1) namespace and CRDs, (2) the control plane, (3) gateways. A wave may only be applied
/// once the one before it is there; the gateways need a control plane that is ready. The profile `empty` has no wave.
///
/// One node, one of each part, nobody who drains it: no autoscalers and no disruption budgets.
///
/// # Errors
/// Settings from which no gateway pod can be made; a bug unless the image is empty.
pub fn manifests(options: &InstallOptions) -> Result<Vec<Vec<Value>>, InstallError> {
    let name = match options.profile {
        Profile::Default => "default",
        Profile::Demo => "demo",
        Profile::Minimal => "minimal",
        Profile::Empty => "empty",
    };
    let mut spec = profile(name).map_err(InstallError::Profile)?;
    let single = json!({ "autoscaleEnabled": false });
    let mut over = json!({
        "revision": options.revision,
        "values": {
            "global": { "proxy": { "image": options.image }, "defaultPodDisruptionBudget": { "enabled": false } },
            "pilot": { "image": options.image, "autoscaleEnabled": false },
            "gateways": { "istio-ingressgateway": single, "istio-egressgateway": single },
        },
    });
    if let Some(threads) = options.concurrency {
        over["meshConfig"] = json!({ "defaultConfig": { "concurrency": threads } });
    }
    path::merge(&mut spec, over);
    let mut waves: Vec<Vec<Value>> = Vec::new();
    for component in Plan::new(&spec)?.components {
        match (component.name, waves.last_mut()) {
            ("EgressGateways", Some(gateways)) => gateways.extend(component.objects),
            _ => waves.push(component.objects),
        }
    }
    Ok(waves)
}

/// Namespaces and kinds.
fn base(settings: &Resolved) -> Vec<Value> {
    let mut namespaces: Vec<&str> = Vec::new();
    let parts = settings.pilot.is_some() || settings.remote || !settings.gateways.is_empty();
    if settings.base || parts {
        namespaces.push(&settings.namespace);
    }
    for gateway in &settings.gateways {
        if !namespaces.contains(&gateway.namespace.as_str()) {
            namespaces.push(&gateway.namespace);
        }
    }
    let mut all: Vec<Value> = namespaces
        .iter()
        .map(
            |name| json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name } }),
        )
        .collect();
    if settings.base {
        all.extend(mesh_api::crds());
    }
    all
}

/// Labels an object with what it belongs to. Namespaces and kinds are shared by all revisions, so they have no owner.
fn mark(object: &mut Value, component: &str, revision: &str, owner: &str) {
    let labels = &mut object["metadata"]["labels"];
    labels[MANAGED_BY.0] = json!(MANAGED_BY.1);
    labels[COMPONENT] = json!(component);
    labels["operator.istio.io/version"] = json!(crate::version::VERSION);
    if component != "Base" {
        labels["istio.io/rev"] = json!(revision);
        labels[OWNER] = json!(owner);
    }
}

fn metadata(name: &str, namespace: &str, labels: Value) -> Value {
    json!({ "name": name, "namespace": namespace, "labels": labels })
}

fn account(
    mut metadata: Value,
    pull_secrets: &[String],
    annotations: &BTreeMap<String, String>,
) -> Value {
    if !annotations.is_empty() {
        metadata["annotations"] = json!(annotations);
    }
    let mut account = json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata });
    if !pull_secrets.is_empty() {
        let names = pull_secrets.iter().map(|name| json!({ "name": name }));
        account["imagePullSecrets"] = names.collect();
    }
    account
}
