//! From the spec to what is made: every default filled in, every older name translated.

use mesh_api::mesh_config::MeshConfig;
use mesh_inject::InjectorConfig;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::InstallError;
use super::path::merge;
use super::spec::{Component, K8s, Spec, WorkloadValues};

/// Revision of an installation that names none; it is left out of names.
pub(crate) const DEFAULT_REVISION: &str = "default";

/// What is made.
#[derive(Debug)]
pub(super) struct Resolved {
    pub(super) profile: String,
    pub(super) namespace: String,
    pub(super) revision: String,
    /// The spec, typed.
    pub(super) spec: Spec,
    /// The ConfigMap `istio`'s key `mesh`, as text's tree and as it is read.
    pub(super) mesh: Value,
    pub(super) mesh_config: MeshConfig,
    /// The keys of the ConfigMap `istio-sidecar-injector`, and as they are read.
    pub(super) injector_config: Value,
    pub(super) injector_values: Value,
    pub(super) injector: InjectorConfig,
    pub(super) base: bool,
    pub(super) pilot: Option<Part>,
    pub(super) remote: bool,
    pub(super) gateways: Vec<Gateway>,
    /// Names that stand for this revision.
    pub(super) tags: Vec<String>,
    /// Settings that have no effect, by path.
    pub(super) warnings: Vec<String>,
}

/// A Deployment and what belongs to it.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) image: String,
    pub(super) k8s: K8s,
    /// Bounds and target of the HorizontalPodAutoscaler, if there is one.
    pub(super) autoscale: Option<Autoscale>,
}

#[derive(Debug)]
pub(super) struct Autoscale {
    pub(super) min: i64,
    pub(super) max: i64,
    pub(super) cpu: i64,
}

/// A gateway.
#[derive(Debug)]
pub(super) struct Gateway {
    pub(super) name: String,
    pub(super) namespace: String,
    /// Ingress, else egress.
    pub(super) ingress: bool,
    /// Labels by which Gateways select it, beside `app` and `istio`.
    pub(super) labels: Map<String, Value>,
    pub(super) part: Part,
}

impl Resolved {
    /// Reads the spec that [`super::input::Settings`] made.
    pub(super) fn new(tree: &Value) -> Result<Self, InstallError> {
        super::schema::check(tree)?;
        let spec: Spec = typed("spec", tree)?;
        let namespace = namespace(&spec)?;
        let revision = match spec.revision.as_str() {
            "" => DEFAULT_REVISION.to_owned(),
            revision => revision.to_owned(),
        };
        name("revision", &revision)?;
        name("namespace", &namespace)?;
        let mesh = mesh_settings(&spec, &namespace, &revision);
        let mesh_config = MeshConfig::from_value(&mesh)
            .map_err(|error| InstallError::Invalid("meshConfig", error.to_string()))?;
        let injector_values = injector_values(tree, &spec);
        let injector_config = injector_config(&spec);
        let injector = InjectorConfig::from_config_map(
            &injector_config.to_string(),
            &injector_values.to_string(),
        )
        .map_err(|error| InstallError::Invalid("values", error.to_string()))?;
        let mut warnings: Vec<String> = mesh_config
            .unsupported()
            .iter()
            .map(|path| {
                format!("meshConfig.{path} has no effect: this version does not implement it")
            })
            .collect();
        let pilot = pilot(&spec, &mut warnings)?;
        let tags = tags(&spec, &revision)?;
        let mut resolved = Self {
            profile: spec.profile.clone(),
            base: spec.components.base.enabled,
            remote: spec.components.istiod_remote.enabled,
            gateways: Vec::new(),
            tags,
            pilot,
            namespace,
            revision,
            mesh,
            mesh_config,
            injector_config,
            injector_values,
            injector,
            warnings,
            spec,
        };
        resolved.gateways = resolved.all_gateways()?;
        resolved.remote_is_reachable()?;
        Ok(resolved)
    }

    /// A name with the revision at its end, unless that is the default one.
    pub(super) fn revisioned(&self, name: &str) -> String {
        match self.revision.as_str() {
            DEFAULT_REVISION => name.to_owned(),
            revision => format!("{name}-{revision}"),
        }
    }

    /// Whether user ids are left to the platform.
    pub(super) fn platform_chooses_user(&self) -> bool {
        self.spec.values.global.platform == "openshift"
    }

    fn all_gateways(&self) -> Result<Vec<Gateway>, InstallError> {
        let components = &self.spec.components;
        let ingress = components.ingress_gateways.iter().map(|g| (g, true));
        let egress = components.egress_gateways.iter().map(|g| (g, false));
        let mut gateways: Vec<Gateway> = Vec::new();
        for (component, ingress) in ingress.chain(egress).filter(|(g, _)| g.enabled) {
            let gateway = self.gateway(component, ingress)?;
            let same = |g: &Gateway| g.name == gateway.name && g.namespace == gateway.namespace;
            if gateways.iter().any(same) {
                let text = format!("two gateways are called {:?}", gateway.name);
                return Err(InstallError::Invalid("components", text));
            }
            gateways.push(gateway);
        }
        Ok(gateways)
    }

    fn gateway(&self, component: &Component, ingress: bool) -> Result<Gateway, InstallError> {
        let spec = &self.spec;
        let kind = if ingress {
            "istio-ingressgateway"
        } else {
            "istio-egressgateway"
        };
        let values = spec.values.gateways.get(kind).cloned().unwrap_or_default();
        let name = match component.name.as_str() {
            "" => kind,
            name => name,
        };
        self::name("the name of a gateway", name)?;
        let namespace = match component.namespace.as_str() {
            "" => &self.namespace,
            namespace => namespace,
        };
        self::name("the namespace of a gateway", namespace)?;
        let global = &spec.values.global;
        let image = image(
            &global.proxy.image,
            [&component.hub, &global.hub, &spec.hub],
            [&component.tag, &global.tag, &spec.tag],
        );
        let part = part(image, values.as_k8s(), &values.workload, component, spec)?;
        let labels = component.label.iter();
        Ok(Gateway {
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            ingress,
            labels: labels.map(|(k, v)| (k.clone(), json!(v))).collect(),
            part,
        })
    }

    fn remote_is_reachable(&self) -> Result<(), InstallError> {
        let values = &self.spec.values;
        if self.remote
            && values.global.remote_pilot_address.is_empty()
            && values.istiod_remote.injection_url.is_empty()
        {
            return Err(InstallError::Invalid(
                "values.global.remotePilotAddress",
                "the control plane is elsewhere: say where, here or in values.istiodRemote.injectionURL".to_owned(),
            ));
        }
        if self.remote && self.pilot.is_some() {
            return Err(InstallError::Invalid(
                "components",
                "pilot is a control plane in this cluster, istiodRemote one elsewhere: switch one of them off".to_owned(),
            ));
        }
        Ok(())
    }
}

fn typed<T: DeserializeOwned>(what: &'static str, tree: &Value) -> Result<T, InstallError> {
    serde_json::from_value(without_nulls(tree))
        .map_err(|error| InstallError::Invalid(what, error.to_string()))
}

/// Null means: not set.
fn without_nulls(tree: &Value) -> Value {
    match tree {
        Value::Object(map) => map
            .iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(key, value)| (key.clone(), without_nulls(value)))
            .collect(),
        other => other.clone(),
    }
}

/// A DNS label, as names of objects and values of labels are.
pub(crate) fn name(what: &'static str, text: &str) -> Result<(), InstallError> {
    let inside = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if (1..=63).contains(&text.len())
        && text.chars().all(inside)
        && !text.starts_with('-')
        && !text.ends_with('-')
    {
        return Ok(());
    }
    let text = format!(
        "{text:?} is not a name: at most 63 small letters, digits and -, which is not at its ends"
    );
    Err(InstallError::Invalid(what, text))
}

fn namespace(spec: &Spec) -> Result<String, InstallError> {
    let other = &spec.values.global.istio_namespace;
    let chosen = match (spec.namespace.as_str(), other.as_str()) {
        ("", "") => super::NAMESPACE,
        ("", namespace) | (namespace, _) => namespace,
    };
    if other != chosen && !other.is_empty() && other != super::NAMESPACE {
        let text = format!(
            "namespace says {chosen:?}, values.global.istioNamespace {other:?}: drop one of them"
        );
        return Err(InstallError::Invalid("namespace", text));
    }
    Ok(chosen.to_owned())
}

/// The tags of this revision, each once.
fn tags(spec: &Spec, revision: &str) -> Result<Vec<String>, InstallError> {
    let mut all: Vec<String> = Vec::new();
    for tag in &spec.values.revision_tags {
        name("values.revisionTags", tag)?;
        if tag == revision {
            let text = format!("{tag:?} is the revision's own name: a tag is another name for it");
            return Err(InstallError::Invalid("values.revisionTags", text));
        }
        if !all.contains(tag) {
            all.push(tag.clone());
        }
    }
    match spec.values.default_revision.as_str() {
        "" => {}
        chosen if chosen != revision => {
            let text = format!(
                "{chosen:?} is not the revision of this installation, {revision:?}: set it where that revision is installed, or `mesh tag set default --revision {chosen}`"
            );
            return Err(InstallError::Invalid("values.defaultRevision", text));
        }
        DEFAULT_REVISION => {}
        _ if all.iter().any(|tag| tag == DEFAULT_REVISION) => {}
        _ => all.push(DEFAULT_REVISION.to_owned()),
    }
    Ok(all)
}

fn mesh_settings(spec: &Spec, namespace: &str, revision: &str) -> Value {
    let service = match revision {
        DEFAULT_REVISION => "istiod".to_owned(),
        revision => format!("istiod-{revision}"),
    };
    let mut mesh = json!({
        "rootNamespace": namespace,
        "trustDomain": "cluster.local",
        "defaultConfig": { "discoveryAddress": format!("{service}.{namespace}.svc:15012") },
    });
    merge(&mut mesh, Value::Object(spec.mesh_config.clone()));
    mesh
}

/// The chart's values as far as they are the injector's, with the image as a whole.
fn injector_values(tree: &Value, spec: &Spec) -> Value {
    let global = &tree["values"]["global"];
    let mut ours = Map::new();
    for field in [
        "imagePullPolicy",
        "imagePullSecrets",
        "caAddress",
        "logging",
        "meshID",
        "network",
        "multiCluster",
        "proxy_init",
    ] {
        if let Some(value) = global.get(field).filter(|value| !value.is_null()) {
            ours.insert(field.to_owned(), value.clone());
        }
    }
    let mut proxy = global["proxy"].as_object().cloned().unwrap_or_default();
    proxy.shift_remove("autoInject");
    let values = &spec.values.global;
    let image = image(
        &values.proxy.image,
        [&values.hub, &spec.hub],
        [&values.tag, &spec.tag],
    );
    proxy.insert("image".to_owned(), json!(image));
    proxy.retain(|_, value| !value.is_null());
    ours.insert("proxy".to_owned(), proxy.into());
    let mut values = json!({ "global": ours });
    if let Some(rewrite) = spec.values.sidecar_injector_webhook.rewrite_app_http_probe {
        values["sidecarInjectorWebhook"] = json!({ "rewriteAppHTTPProbe": rewrite });
    }
    values
}

fn injector_config(spec: &Spec) -> Value {
    let webhook = &spec.values.sidecar_injector_webhook;
    let policy = match spec.values.global.proxy.auto_inject.as_str() {
        "disabled" => "disabled",
        _ => "enabled",
    };
    let mut config = json!({
        "policy": policy,
        "alwaysInjectSelector": webhook.always_inject_selector,
        "neverInjectSelector": webhook.never_inject_selector,
        "injectedAnnotations": webhook.injected_annotations,
    });
    for (field, value) in [
        ("templates", &webhook.templates),
        ("defaultTemplates", &webhook.default_templates),
        ("aliases", &webhook.aliases),
    ] {
        if let Some(value) = value {
            config[field] = value.clone();
        }
    }
    config
}

/// Environment variables that the control plane reads.
const READ_BY_PILOT: [&str; 11] = [
    "BLOCKED_CIDRS_IN_JWKS_URIS",
    "CERT_SIGNER_DOMAIN",
    "DEFAULT_WORKLOAD_CERT_TTL",
    "EXTERNAL_CA",
    "K8S_SIGNER",
    "MAX_WORKLOAD_CERT_TTL",
    "MESH_LOG",
    "PILOT_CERT_PROVIDER",
    "PILOT_ENABLE_XDS_IDENTITY_CHECK",
    "TOKEN_AUDIENCES",
    "XDS_AUTH",
];

fn pilot(spec: &Spec, warnings: &mut Vec<String>) -> Result<Option<Part>, InstallError> {
    let component = &spec.components.pilot;
    if !component.enabled {
        return Ok(None);
    }
    let (values, global) = (&spec.values.pilot, &spec.values.global);
    let image = image(
        &values.image,
        [&values.hub, &component.hub, &global.hub, &spec.hub],
        [&values.tag, &component.tag, &global.tag, &spec.tag],
    );
    let part = part(
        image,
        values.workload.as_k8s(),
        &values.workload,
        component,
        spec,
    )?;
    let names = part.k8s.env.iter().filter_map(|env| env["name"].as_str());
    let unread = names.filter(|name| !READ_BY_PILOT.contains(name));
    warnings.extend(unread.map(|name| {
        format!("{name} among the control plane's variables has no effect: it does not read it")
    }));
    Ok(Some(part))
}

fn part(
    image: String,
    mut tree: Value,
    values: &WorkloadValues,
    component: &Component,
    spec: &Spec,
) -> Result<Part, InstallError> {
    if component.k8s.is_object() {
        merge(&mut tree, component.k8s.clone());
    }
    let mut k8s: K8s = match tree {
        Value::Null => K8s::default(),
        tree => typed("k8s", &tree)?,
    };
    let global = &spec.values.global;
    if k8s.image_pull_policy.is_empty() {
        k8s.image_pull_policy.clone_from(&global.image_pull_policy);
    }
    if k8s.priority_class_name.is_empty() {
        k8s.priority_class_name
            .clone_from(&global.priority_class_name);
    }
    let autoscale = values.autoscale_enabled.then(|| {
        // Who asks for replicas wants at least so many.
        let min = k8s.replica_count.or(values.autoscale_min).unwrap_or(1);
        Autoscale {
            min,
            max: values.autoscale_max.unwrap_or(5).max(min),
            cpu: values.cpu.target_average_utilization.unwrap_or(80),
        }
    });
    Ok(Part {
        image,
        k8s,
        autoscale,
    })
}

/// The image from its parts: the first hub and tag that are given; a name with a registry or a tag stands for itself.
fn image<const N: usize>(name: &str, hubs: [&String; N], tags: [&String; N]) -> String {
    if name.contains(['/', ':']) {
        return name.to_owned();
    }
    let first = |texts: [&String; N]| {
        let given = texts.into_iter().find(|text| !text.is_empty());
        given.cloned().unwrap_or_default()
    };
    let (hub, tag) = (first(hubs), first(tags));
    let name = if name.is_empty() { "mesh" } else { name };
    let tag = match tag.as_str() {
        "" => crate::version::VERSION,
        tag => tag,
    };
    match hub.as_str() {
        "" => format!("{name}:{tag}"),
        hub => format!("{hub}/{name}:{tag}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::path;
    use super::super::schema::{Type, settings};
    use super::super::{Plan, profile};
    use super::*;

    /// Values to try, the first of which that is not the default must change something.
    fn samples(path: &str, kind: Type) -> Vec<Value> {
        let special = match path.rsplit(['.', ']']).next().unwrap_or_default() {
            "meshConfig" => json!({ "trustDomain": "other" }),
            "overlays" => return Vec::new(),
            "level" => json!("default:debug"),
            "aliases" => json!({ "x": ["sidecar"] }),
            "templates" => json!({ "x": "spec: {}" }),
            "defaultTemplates" => json!(["sidecar"]),
            "alwaysInjectSelector" | "neverInjectSelector" => {
                json!([{ "matchLabels": { "x": "y" } }])
            }
            "podDisruptionBudget" => json!({ "maxUnavailable": 2 }),
            "env" if kind == Type::Objects => json!([{ "name": "XDS_AUTH", "value": "y" }]),
            "revisionTags" => json!(["stable"]),
            _ => Value::Null,
        };
        if !special.is_null() {
            return vec![special];
        }
        match kind {
            Type::Text => vec![json!("other")],
            Type::Bool => vec![json!(true), json!(false)],
            Type::Int => vec![json!(7)],
            Type::Percent => vec![json!("33%")],
            Type::Texts => vec![json!(["x"])],
            Type::Map => vec![json!({ "x": "y" })],
            Type::Object => vec![json!({ "x": "y" })],
            Type::Objects => vec![json!([{ "x": "y" }])],
            Type::OneOf(names) => names.split('|').map(Value::from).collect(),
            Type::No(_) => Vec::new(),
        }
    }

    fn tried(base: &Value, steps: &[path::Step], value: Value) -> Result<Plan, InstallError> {
        let mut spec = base.clone();
        path::set(&mut spec, steps, value).expect("a path of the table");
        Plan::new(&spec)
    }

    /// Nothing is accepted and ignored.
    #[test]
    fn every_setting_has_an_effect() {
        let mut base = profile("default").expect("profile");
        base["components"]["egressGateways"][0]["enabled"] = json!(true);
        base["components"]["base"]["enabled"] = json!(false);
        let mut remote = profile("remote").expect("profile");
        remote["values"]["global"]["remotePilotAddress"] = json!("192.0.2.7");
        remote["values"]["istiodRemote"]["injectionURL"] = json!("https://x/inject");
        remote["components"]["base"]["enabled"] = json!(false);
        let (plan, remote_plan) = (Plan::new(&base), Plan::new(&remote));
        let (plan, remote_plan) = (plan.expect("plan"), remote_plan.expect("plan"));
        let mut idle = Vec::new();
        for (path, kind) in settings() {
            let samples = samples(path, kind);
            if path == "profile" || samples.is_empty() {
                continue;
            }
            let far = ["remotePilotAddress", "istiodRemote"];
            let (base, plan) = match far.iter().any(|word| path.contains(word)) {
                true => (&remote, &remote_plan),
                false => (&base, &plan),
            };
            let steps = path::parse(&path.replace("[]", "[0]")).expect(path);
            let changed = samples.into_iter().any(|value| {
                // Refused is not ignored: what it says together with others was looked at.
                tried(base, &steps, value).map_or(true, |after| {
                    (after.components != plan.components) || after.namespace != plan.namespace
                })
            });
            if !changed {
                idle.push(path);
            }
        }
        assert!(idle.is_empty(), "accepted without effect: {idle:?}");
    }
}
