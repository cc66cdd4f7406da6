//! One line per Istio kind: names, versions, columns, schema, parser and validator. CRDs are made from it.

use serde_json::{Value, json};

use crate::object::{AnyObject, ParseError, parsers};
use crate::validate::{self, Finding};
use crate::{extensions, networking, schema, security, telemetry};

/// What is known about a kind.
#[derive(Debug, Clone, Copy)]
pub struct KindInfo {
    /// API group.
    pub group: &'static str,
    /// Kind, for instance `VirtualService`.
    pub kind: &'static str,
    /// Name in URLs, for instance `virtualservices`.
    pub plural: &'static str,
    /// Name in singular, for instance `virtualservice`.
    pub singular: &'static str,
    /// Abbreviations that kubectl accepts.
    pub short_names: &'static [&'static str],
    /// Versions, all served, all with the same fields; the preferred one first.
    pub versions: &'static [Version],
    /// Columns of `kubectl get`, beside the name.
    pub columns: &'static [Column],
    /// Groups of kinds, as in `kubectl get istio-io`.
    pub categories: &'static [&'static str],
    /// Structural OpenAPI schema of the specification.
    pub schema: fn() -> Value,
    /// Reads an object of this kind (without checking apiVersion and kind).
    pub parse: fn(&Value) -> Result<AnyObject, ParseError>,
    /// Checks the specification of an object of this kind; nothing for other kinds.
    pub validate: fn(&AnyObject) -> Vec<Finding>,
}

/// A served version of a kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    /// Name, for instance `v1beta1`.
    pub name: &'static str,
    /// True for the one version in which objects are stored.
    pub storage: bool,
}

/// A column of `kubectl get`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Column {
    /// Heading.
    pub name: &'static str,
    /// OpenAPI type: `string` or `date`.
    pub kind: &'static str,
    /// Where the value is.
    pub json_path: &'static str,
    /// What it means.
    pub description: &'static str,
}

impl KindInfo {
    /// Name of the CRD object, `<plural>.<group>`.
    pub fn crd_name(&self) -> String {
        format!("{}.{}", self.plural, self.group)
    }

    /// The version in which objects are stored.
    pub fn storage_version(&self) -> &'static str {
        self.versions
            .iter()
            .find(|version| version.storage)
            .map_or("v1", |version| version.name)
    }
}

const V1_BETA_ALPHA: &[Version] = &[stored("v1"), served("v1beta1"), served("v1alpha3")];
const V1_BETA: &[Version] = &[stored("v1"), served("v1beta1")];
const AGE: Column = Column {
    name: "Age",
    kind: "date",
    json_path: ".metadata.creationTimestamp",
    description: "When the object was created.",
};

const fn stored(name: &'static str) -> Version {
    Version {
        name,
        storage: true,
    }
}

const fn served(name: &'static str) -> Version {
    Version {
        name,
        storage: false,
    }
}

const fn column(name: &'static str, json_path: &'static str, description: &'static str) -> Column {
    Column {
        name,
        kind: "string",
        json_path,
        description,
    }
}

macro_rules! kinds {
    ($($group:literal $category:literal $kind:ident = $spec:path, $plural:literal, $singular:literal, $short:expr, $versions:expr, $columns:expr;)*) => {
        /// Registry lines by kind.
        #[allow(non_upper_case_globals)]
        pub(crate) mod info {
            use super::{
                AGE, AnyObject, KindInfo, V1_BETA, V1_BETA_ALPHA, column, extensions, networking, parsers, schema, security, served, stored, telemetry,
                validate,
            };
            $(pub(crate) static $kind: KindInfo = KindInfo {
                group: $group,
                kind: stringify!($kind),
                plural: $plural,
                singular: $singular,
                short_names: $short,
                versions: $versions,
                columns: $columns,
                categories: &["istio-io", $category],
                schema: schema::structural::<$spec>,
                parse: parsers::$kind,
                validate: |object| match object {
                    AnyObject::$kind(object) => validate::spec(&object.spec),
                    _ => Vec::new(),
                },
            };)*
        }

        /// All Istio kinds.
        pub static KINDS: &[&KindInfo] = &[$(&info::$kind,)*];
    };
}

kinds! {
    "extensions.istio.io" "extensions-istio-io" TrafficExtension = extensions::TrafficExtension, "trafficextensions", "trafficextension", &[],
        &[stored("v1alpha1")], &[AGE];
    "extensions.istio.io" "extensions-istio-io" WasmPlugin = extensions::WasmPlugin, "wasmplugins", "wasmplugin", &[],
        &[stored("v1alpha1")], &[AGE];
    "networking.istio.io" "networking-istio-io" DestinationRule = networking::DestinationRule, "destinationrules", "destinationrule", &["dr"],
        V1_BETA_ALPHA, &[column("Host", ".spec.host", "Host that the rule is for."), AGE];
    "networking.istio.io" "networking-istio-io" EnvoyFilter = networking::EnvoyFilter, "envoyfilters", "envoyfilter", &[],
        &[stored("v1alpha3")], &[];
    "networking.istio.io" "networking-istio-io" Gateway = networking::Gateway, "gateways", "gateway", &["gw"],
        V1_BETA_ALPHA, &[];
    "networking.istio.io" "networking-istio-io" ProxyConfig = networking::ProxyConfig, "proxyconfigs", "proxyconfig", &[],
        &[stored("v1beta1")], &[];
    "networking.istio.io" "networking-istio-io" ServiceEntry = networking::ServiceEntry, "serviceentries", "serviceentry", &["se"],
        V1_BETA_ALPHA, &[
            column("Hosts", ".spec.hosts", "Hosts of the service."),
            column("Location", ".spec.location", "Whether the service belongs to the mesh."),
            column("Resolution", ".spec.resolution", "How endpoints are found."),
            AGE,
        ];
    "networking.istio.io" "networking-istio-io" Sidecar = networking::Sidecar, "sidecars", "sidecar", &[],
        V1_BETA_ALPHA, &[];
    "networking.istio.io" "networking-istio-io" VirtualService = networking::VirtualService, "virtualservices", "virtualservice", &["vs"],
        V1_BETA_ALPHA, &[
            column("Gateways", ".spec.gateways", "Gateways that apply these rules."),
            column("Hosts", ".spec.hosts", "Hosts that the rules are for."),
            AGE,
        ];
    "networking.istio.io" "networking-istio-io" WorkloadEntry = networking::WorkloadEntry, "workloadentries", "workloadentry", &["we"],
        V1_BETA_ALPHA, &[AGE, column("Address", ".spec.address", "Address of the workload.")];
    "networking.istio.io" "networking-istio-io" WorkloadGroup = networking::WorkloadGroup, "workloadgroups", "workloadgroup", &["wg"],
        V1_BETA_ALPHA, &[AGE];
    "security.istio.io" "security-istio-io" AuthorizationPolicy = security::AuthorizationPolicy, "authorizationpolicies", "authorizationpolicy", &["ap"],
        V1_BETA, &[column("Action", ".spec.action", "What happens on a match."), AGE];
    "security.istio.io" "security-istio-io" PeerAuthentication = security::PeerAuthentication, "peerauthentications", "peerauthentication", &["pa"],
        V1_BETA, &[column("Mode", ".spec.mtls.mode", "Mode of mutual TLS."), AGE];
    "security.istio.io" "security-istio-io" RequestAuthentication = security::RequestAuthentication, "requestauthentications", "requestauthentication", &["ra"],
        V1_BETA, &[];
    "telemetry.istio.io" "telemetry-istio-io" Telemetry = telemetry::Telemetry, "telemetries", "telemetry", &["telemetry"],
        &[served("v1"), stored("v1alpha1")], &[AGE];
}

/// Finds a kind by group and kind.
pub fn lookup(group: &str, kind: &str) -> Option<&'static KindInfo> {
    KINDS
        .iter()
        .copied()
        .find(|info| info.group == group && info.kind == kind)
}

/// The CRD objects (`apiextensions.k8s.io/v1`) of all Istio kinds.
pub fn crds() -> Vec<Value> {
    KINDS.iter().map(|info| crd(info)).collect()
}

/// What an API server refuses by itself, also while no webhook answers: rules in CEL on the specification, with Istio's messages. None of them goes
/// through a list or a text, so that what they cost at most, which API servers estimate before they take a CRD, is next to nothing.
fn rules(kind: &str) -> &'static [(&'static str, &'static str)] {
    match kind {
        "AuthorizationPolicy" | "RequestAuthentication" | "Telemetry" | "WasmPlugin" => &[(
            "(has(self.selector) ? 1 : 0) + (has(self.targetRef) ? 1 : 0) + (has(self.targetRefs) && size(self.targetRefs) > 0 ? 1 : 0) <= 1",
            "only one of targetRefs or selector can be set",
        )],
        "TrafficExtension" => &[(
            "!(has(self.selector) && has(self.targetRefs) && size(self.targetRefs) > 0)",
            "only one of targetRefs or selector can be set",
        )],
        "EnvoyFilter" => &[(
            "!(has(self.workloadSelector) && has(self.targetRefs) && size(self.targetRefs) > 0)",
            "only one of targetRefs or workloadSelector can be set",
        )],
        "PeerAuthentication" => &[(
            "!has(self.portLevelMtls) || (has(self.selector) && has(self.selector.matchLabels) && size(self.selector.matchLabels) > 0)",
            "portLevelMtls requires selector",
        )],
        "ServiceEntry" => &[
            (
                "!(has(self.workloadSelector) && has(self.endpoints) && size(self.endpoints) > 0)",
                "only one of WorkloadSelector or Endpoints can be set",
            ),
            (
                "(has(self.resolution) && self.resolution != 'NONE') || !has(self.endpoints) || size(self.endpoints) == 0",
                "NONE mode cannot set endpoints",
            ),
            (
                "!has(self.resolution) || self.resolution != 'DNS_ROUND_ROBIN' || !has(self.endpoints) || size(self.endpoints) <= 1",
                "DNS_ROUND_ROBIN mode cannot have multiple endpoints",
            ),
        ],
        "WorkloadEntry" => &[(
            "has(self.address) || has(self.network)",
            "Address is required",
        )],
        _ => &[],
    }
}

fn crd(info: &KindInfo) -> Value {
    let columns: Vec<_> = info
        .columns
        .iter()
        .map(|c| json!({ "name": c.name, "type": c.kind, "jsonPath": c.json_path, "description": c.description }))
        .collect();
    let mut spec = (info.schema)();
    let rules = rules(info.kind);
    if !rules.is_empty() {
        let rules = rules.iter();
        let rules: Vec<_> = rules
            .map(|(rule, message)| json!({ "rule": rule, "message": message }))
            .collect();
        spec["x-kubernetes-validations"] = json!(rules);
    }
    let schema = json!({ "openAPIV3Schema": {
        "type": "object",
        "properties": { "spec": spec, "status": schema::status() },
    } });
    let versions: Vec<_> = info
        .versions
        .iter()
        .map(|version| {
            let mut entry = json!({
                "name": version.name,
                "served": true,
                "storage": version.storage,
                "subresources": { "status": {} },
                "schema": schema,
            });
            if !columns.is_empty() {
                entry["additionalPrinterColumns"] = json!(columns);
            }
            entry
        })
        .collect();
    let mut names = json!({
        "categories": info.categories,
        "kind": info.kind,
        "listKind": format!("{}List", info.kind),
        "plural": info.plural,
        "singular": info.singular,
    });
    if !info.short_names.is_empty() {
        names["shortNames"] = json!(info.short_names);
    }
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": { "name": info.crd_name(), "labels": { "app": "istio-pilot", "istio": "security" } },
        "spec": { "group": info.group, "names": names, "scope": "Namespaced", "versions": versions },
    })
}
