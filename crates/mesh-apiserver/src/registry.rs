//! Which resources there are: the built-in ones and those of CRDs.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::Value;

use crate::schema::{Schema, builtin, crd};

/// A column that a CRD declares for `kubectl get`.
#[derive(Debug, Clone, PartialEq)]
pub struct CustomColumn {
    /// The column definition as it is shown.
    pub definition: Value,
    /// Where its value is.
    pub json_path: String,
}

/// Where the numbers of a `scale` subresource are, as field names from the root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScalePaths {
    /// Desired number.
    pub spec: Vec<String>,
    /// Actual number.
    pub status: Vec<String>,
    /// Selector as text, or as an object; `None` when there is none.
    pub selector: Option<Vec<String>>,
}

/// One resource in one version.
#[derive(Debug, Clone)]
pub struct Resource {
    /// API group; empty for the core group.
    pub group: String,
    /// API version.
    pub version: String,
    /// Kind of the objects.
    pub kind: String,
    /// Name in URLs.
    pub plural: String,
    /// Singular name.
    pub singular: String,
    /// Short names for `kubectl`.
    pub short_names: Vec<String>,
    /// Groups of resources, for example `all`.
    pub categories: Vec<String>,
    /// Objects live in namespaces.
    pub namespaced: bool,
    /// Key of the stored objects, the same for all versions, for example `core/pods`.
    pub storage: String,
    /// Subresources: name, kind, verbs.
    pub subresources: Vec<(String, String, Vec<&'static str>)>,
    /// Where scale finds its numbers.
    pub scale: Option<ScalePaths>,
    /// The shape of the objects in this version.
    pub schema: Arc<Schema>,
    /// Columns of a custom resource; `None` for built-in kinds.
    pub columns: Option<Vec<CustomColumn>>,
    /// Fields that may be selected beside the usual ones.
    pub selectable: Vec<String>,
    /// Objects are only answered, never stored (reviews).
    pub virtual_only: bool,
    /// Comes from a CRD.
    pub custom: bool,
    /// Its CRD is being deleted: no new objects.
    pub terminating: bool,
    /// Name, spec hash or the like is shown with this warning when the version is deprecated.
    pub deprecation: Option<String>,
}

/// The verbs of a stored resource.
pub const VERBS: [&str; 8] = [
    "create",
    "delete",
    "deletecollection",
    "get",
    "list",
    "patch",
    "update",
    "watch",
];

impl Resource {
    /// `plural` or `plural.group`, as errors show it.
    pub fn qualified(&self) -> String {
        if self.group.is_empty() {
            self.plural.clone()
        } else {
            format!("{}.{}", self.plural, self.group)
        }
    }

    /// `v1` or `group/version`.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.clone()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    /// Kind of lists.
    pub fn list_kind(&self) -> String {
        format!("{}List", self.kind)
    }

    /// Whether there is such a subresource.
    pub fn has(&self, subresource: &str) -> bool {
        self.subresources
            .iter()
            .any(|(name, _, _)| name == subresource)
    }

    /// Verbs of the resource itself.
    pub fn verbs(&self) -> Vec<&'static str> {
        if self.virtual_only {
            vec!["create"]
        } else {
            VERBS.to_vec()
        }
    }
}

/// All resources; replaced whole when a CRD changes.
#[derive(Debug, Default)]
pub struct Registry {
    all: Vec<Arc<Resource>>,
    by_path: HashMap<(String, String, String), Arc<Resource>>,
}

impl Registry {
    /// The built-in resources and those of the given CRDs.
    pub fn new<'a>(crds: impl IntoIterator<Item = &'a Value>) -> Registry {
        let mut registry = Registry::default();
        builtins().into_iter().for_each(|r| registry.add(r));
        for crd in crds {
            custom(crd).into_iter().for_each(|r| registry.add(r));
        }
        registry
    }

    fn add(&mut self, resource: Resource) {
        let key = (
            resource.group.clone(),
            resource.version.clone(),
            resource.plural.clone(),
        );
        if self.by_path.contains_key(&key) {
            return;
        }
        let resource = Arc::new(resource);
        self.by_path.insert(key, resource.clone());
        self.all.push(resource);
    }

    /// By group, version and plural name.
    pub fn find(&self, group: &str, version: &str, plural: &str) -> Option<&Arc<Resource>> {
        self.by_path
            .get(&(group.to_owned(), version.to_owned(), plural.to_owned()))
    }

    /// A built-in resource that is certain to exist, by storage key.
    pub fn by_storage(&self, storage: &str) -> Option<&Arc<Resource>> {
        self.all.iter().find(|r| r.storage == storage)
    }

    /// All, built-in first.
    pub fn all(&self) -> &[Arc<Resource>] {
        &self.all
    }

    /// Group and versions, the core group first, versions in order of preference.
    pub fn groups(&self) -> Vec<(String, Vec<String>)> {
        let mut groups: Vec<(String, Vec<String>)> = Vec::new();
        for resource in &self.all {
            match groups.iter_mut().find(|(name, _)| *name == resource.group) {
                None => groups.push((resource.group.clone(), vec![resource.version.clone()])),
                Some((_, versions)) if !versions.contains(&resource.version) => {
                    versions.push(resource.version.clone())
                }
                Some(_) => {}
            }
        }
        for (_, versions) in &mut groups {
            versions.sort_by_key(|v| std::cmp::Reverse(version_priority(v)));
        }
        groups
    }
}

/// Order of Kubernetes versions: GA over beta over alpha, higher numbers first, anything else last.
pub fn version_priority(version: &str) -> (u8, u32, u32) {
    let Some(rest) = version.strip_prefix('v') else {
        return (0, 0, 0);
    };
    let (major, stage, minor) = match (rest.split_once("beta"), rest.split_once("alpha")) {
        (Some((a, b)), _) => (a, 2, b),
        (None, Some((a, b))) => (a, 1, b),
        (None, None) => (rest, 3, "0"),
    };
    match (major.parse(), minor.parse()) {
        (Ok(major), Ok(minor)) => (stage, major, minor),
        _ => (0, 0, 0),
    }
}

const STATUS: (&str, &str, &[&str]) = ("status", "", &["get", "patch", "update"]);
const SCALE: (&str, &str, &[&str]) = ("scale", "Scale", &["get", "patch", "update"]);

type Sub = (&'static str, &'static str, &'static [&'static str]);
type Row = (
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    bool,
    &'static [&'static str],
    &'static [Sub],
);
const ALL: &str = "all";
const POD: &[Sub] = &[
    ("attach", "PodAttachOptions", &["create", "get"]),
    ("binding", "Binding", &["create"]),
    ("eviction", "Eviction", &["create"]),
    ("exec", "PodExecOptions", &["create", "get"]),
    ("log", "Pod", &["get"]),
    ("portforward", "PodPortForwardOptions", &["create", "get"]),
    ("proxy", "PodProxyOptions", PROXY_VERBS),
    STATUS,
];
const PROXY_VERBS: &[&str] = &["create", "delete", "get", "patch", "update"];
const SERVICE: &[Sub] = &[("proxy", "ServiceProxyOptions", PROXY_VERBS), STATUS];
const NAMESPACE: &[Sub] = &[("finalize", "Namespace", &["update"]), STATUS];
/// `certificates.k8s.io/v1` CertificateSigningRequest: who approves is not who asks, and who signs is neither.
const SIGNING: &[Sub] = &[("approval", "", &["get", "patch", "update"]), STATUS];
const ACCOUNT: &[Sub] = &[("token", "TokenRequest", &["create"])];
/// The built-in kinds: group, version, kind, plural, namespaced, short names (and "all"), subresources.
const ROWS: &[Row] = &[
    ("", "v1", "ConfigMap", "configmaps", true, &["cm"], &[]),
    ("", "v1", "Endpoints", "endpoints", true, &["ep"], &[]),
    ("", "v1", "Event", "events", true, &["ev"], &[]),
    (
        "",
        "v1",
        "Namespace",
        "namespaces",
        false,
        &["ns"],
        NAMESPACE,
    ),
    ("", "v1", "Node", "nodes", false, &["no"], &[STATUS]),
    ("", "v1", "Pod", "pods", true, &["po", ALL], POD),
    ("", "v1", "Secret", "secrets", true, &[], &[]),
    (
        "",
        "v1",
        "ServiceAccount",
        "serviceaccounts",
        true,
        &["sa"],
        ACCOUNT,
    ),
    (
        "",
        "v1",
        "Service",
        "services",
        true,
        &["svc", ALL],
        SERVICE,
    ),
    (
        "apps",
        "v1",
        "Deployment",
        "deployments",
        true,
        &["deploy", ALL],
        &[SCALE, STATUS],
    ),
    (
        "apps",
        "v1",
        "ReplicaSet",
        "replicasets",
        true,
        &["rs", ALL],
        &[SCALE, STATUS],
    ),
    (
        "apps",
        "v1",
        "StatefulSet",
        "statefulsets",
        true,
        &["sts", ALL],
        &[SCALE, STATUS],
    ),
    (
        "apps",
        "v1",
        "DaemonSet",
        "daemonsets",
        true,
        &["ds", ALL],
        &[STATUS],
    ),
    (
        "apps",
        "v1",
        "ControllerRevision",
        "controllerrevisions",
        true,
        &[],
        &[],
    ),
    ("batch", "v1", "Job", "jobs", true, &[ALL], &[STATUS]),
    (
        "batch",
        "v1",
        "CronJob",
        "cronjobs",
        true,
        &["cj", ALL],
        &[STATUS],
    ),
    (
        "autoscaling",
        "v2",
        "HorizontalPodAutoscaler",
        "horizontalpodautoscalers",
        true,
        &["hpa", ALL],
        &[STATUS],
    ),
    (
        "autoscaling",
        "v1",
        "HorizontalPodAutoscaler",
        "horizontalpodautoscalers",
        true,
        &["hpa", ALL],
        &[STATUS],
    ),
    (
        "policy",
        "v1",
        "PodDisruptionBudget",
        "poddisruptionbudgets",
        true,
        &["pdb"],
        &[STATUS],
    ),
    (
        "certificates.k8s.io",
        "v1",
        "CertificateSigningRequest",
        "certificatesigningrequests",
        false,
        &["csr"],
        SIGNING,
    ),
    (
        "coordination.k8s.io",
        "v1",
        "Lease",
        "leases",
        true,
        &[],
        &[],
    ),
    (
        "discovery.k8s.io",
        "v1",
        "EndpointSlice",
        "endpointslices",
        true,
        &[],
        &[],
    ),
    ("events.k8s.io", "v1", "Event", "events", true, &["ev"], &[]),
    (
        "admissionregistration.k8s.io",
        "v1",
        "MutatingWebhookConfiguration",
        "mutatingwebhookconfigurations",
        false,
        &[],
        &[],
    ),
    (
        "admissionregistration.k8s.io",
        "v1",
        "ValidatingWebhookConfiguration",
        "validatingwebhookconfigurations",
        false,
        &[],
        &[],
    ),
    (
        "apiextensions.k8s.io",
        "v1",
        "CustomResourceDefinition",
        "customresourcedefinitions",
        false,
        &["crd", "crds"],
        &[STATUS],
    ),
    (
        "authentication.k8s.io",
        "v1",
        "TokenReview",
        "tokenreviews",
        false,
        &[],
        &[],
    ),
    (
        "authentication.k8s.io",
        "v1",
        "SelfSubjectReview",
        "selfsubjectreviews",
        false,
        &[],
        &[],
    ),
    (
        "authorization.k8s.io",
        "v1",
        "SubjectAccessReview",
        "subjectaccessreviews",
        false,
        &[],
        &[],
    ),
    (
        "authorization.k8s.io",
        "v1",
        "SelfSubjectAccessReview",
        "selfsubjectaccessreviews",
        false,
        &[],
        &[],
    ),
    (
        "authorization.k8s.io",
        "v1",
        "SelfSubjectRulesReview",
        "selfsubjectrulesreviews",
        false,
        &[],
        &[],
    ),
    (
        "authorization.k8s.io",
        "v1",
        "LocalSubjectAccessReview",
        "localsubjectaccessreviews",
        true,
        &[],
        &[],
    ),
    (
        "rbac.authorization.k8s.io",
        "v1",
        "ClusterRole",
        "clusterroles",
        false,
        &[],
        &[],
    ),
    (
        "rbac.authorization.k8s.io",
        "v1",
        "ClusterRoleBinding",
        "clusterrolebindings",
        false,
        &[],
        &[],
    ),
    (
        "rbac.authorization.k8s.io",
        "v1",
        "Role",
        "roles",
        true,
        &[],
        &[],
    ),
    (
        "rbac.authorization.k8s.io",
        "v1",
        "RoleBinding",
        "rolebindings",
        true,
        &[],
        &[],
    ),
];

fn builtins() -> Vec<Resource> {
    ROWS.iter()
        .map(|(group, version, kind, plural, namespaced, names, subs)| {
            let core = if group.is_empty() { "core" } else { group };
            let is_event = *kind == "Event";
            let schema_name = match (*group, *version) {
                ("events.k8s.io", _) => "EventsEvent",
                ("autoscaling", "v1") => "OldHorizontalPodAutoscaler",
                _ => kind,
            };
            Resource {
                group: (*group).to_owned(),
                version: (*version).to_owned(),
                kind: (*kind).to_owned(),
                plural: (*plural).to_owned(),
                singular: kind.to_lowercase(),
                short_names: names
                    .iter()
                    .filter(|n| **n != ALL)
                    .map(|n| (*n).to_owned())
                    .collect(),
                categories: if names.contains(&ALL) {
                    vec![ALL.to_owned()]
                } else {
                    Vec::new()
                },
                namespaced: *namespaced,
                storage: if is_event {
                    "core/events".to_owned()
                } else {
                    format!("{core}/{plural}")
                },
                subresources: subs
                    .iter()
                    .map(|(name, sub_kind, verbs)| {
                        let sub_kind = if sub_kind.is_empty() { kind } else { sub_kind };
                        ((*name).to_owned(), (*sub_kind).to_owned(), verbs.to_vec())
                    })
                    .collect(),
                scale: subs.iter().any(|s| s.0 == "scale").then(|| ScalePaths {
                    spec: path(".spec.replicas"),
                    status: path(".status.replicas"),
                    selector: Some(path(".spec.selector")),
                }),
                schema: builtin::lookup(schema_name).unwrap_or_else(Schema::any),
                columns: None,
                selectable: Vec::new(),
                virtual_only: kind.ends_with("Review"),
                custom: false,
                terminating: false,
                deprecation: None,
            }
        })
        .collect()
}

/// The served versions of a CRD.
pub fn custom(definition: &Value) -> Vec<Resource> {
    let spec = &definition["spec"];
    let names = &spec["names"];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let list = |value: &Value| -> Vec<String> {
        value.as_array().into_iter().flatten().map(text).collect()
    };
    let (group, plural, kind) = (
        text(&spec["group"]),
        text(&names["plural"]),
        text(&names["kind"]),
    );
    let versions = spec["versions"].as_array().into_iter().flatten();
    versions
        .filter(|version| version["served"] == Value::Bool(true))
        .map(|version| {
            let name = text(&version["name"]);
            let subs = &version["subresources"];
            let mut subresources = Vec::new();
            if subs["status"].is_object() {
                subresources.push(("status".to_owned(), kind.clone(), STATUS.2.to_vec()));
            }
            let scale = subs["scale"].is_object().then(|| ScalePaths {
                spec: path(
                    subs["scale"]["specReplicasPath"]
                        .as_str()
                        .unwrap_or_default(),
                ),
                status: path(
                    subs["scale"]["statusReplicasPath"]
                        .as_str()
                        .unwrap_or_default(),
                ),
                selector: subs["scale"]["labelSelectorPath"].as_str().map(path),
            });
            if scale.is_some() {
                subresources.push(("scale".to_owned(), "Scale".to_owned(), SCALE.2.to_vec()));
            }
            let mut schema = crd::root(version["schema"].get("openAPIV3Schema"));
            schema.name = Some(schema_name(&group, &name, &kind));
            schema.preserve_unknown |= spec["preserveUnknownFields"] == Value::Bool(true);
            let selectable = version["selectableFields"].as_array().into_iter().flatten();
            Resource {
                group: group.clone(),
                version: name.clone(),
                kind: kind.clone(),
                plural: plural.clone(),
                singular: names["singular"]
                    .as_str()
                    .map_or_else(|| kind.to_lowercase(), str::to_owned),
                short_names: list(&names["shortNames"]),
                categories: list(&names["categories"]),
                namespaced: spec["scope"] == "Namespaced",
                storage: format!("{group}/{plural}"),
                subresources,
                scale,
                schema: Arc::new(schema),
                columns: Some(custom_columns(version)),
                selectable: selectable
                    .map(|s| text(&s["jsonPath"]).trim_start_matches('.').to_owned())
                    .collect(),
                virtual_only: false,
                custom: true,
                terminating: !definition["metadata"]["deletionTimestamp"].is_null(),
                deprecation: (version["deprecated"] == Value::Bool(true)).then(|| {
                    let own = version["deprecationWarning"].as_str().map(str::to_owned);
                    own.unwrap_or_else(|| format!("{group}/{name} {kind} is deprecated"))
                }),
            }
        })
        .collect()
}

/// OpenAPI name of a custom type: the group's labels reversed, as Kubernetes does.
fn schema_name(group: &str, version: &str, kind: &str) -> String {
    let reversed: Vec<&str> = group.rsplit('.').collect();
    format!("{}.{version}.{kind}", reversed.join("."))
}

fn custom_columns(version: &Value) -> Vec<CustomColumn> {
    let columns = version["additionalPrinterColumns"]
        .as_array()
        .into_iter()
        .flatten();
    columns
        .map(|column| CustomColumn {
            definition: serde_json::json!({
                "name": column["name"], "type": column["type"],
                "format": column["format"].as_str().unwrap_or_default(),
                "description": column["description"].as_str().unwrap_or_default(),
                "priority": column["priority"].as_i64().unwrap_or_default(),
            }),
            json_path: column["jsonPath"].as_str().unwrap_or_default().to_owned(),
        })
        .collect()
}

fn path(json_path: &str) -> Vec<String> {
    json_path
        .split('.')
        .filter(|p| !p.is_empty())
        .map(str::to_owned)
        .collect()
}
