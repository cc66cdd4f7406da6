//! A container's environment, command line and downward API values. Pure: objects in, strings out.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{
    ConfigMap, Container, EnvVarSource, ObjectFieldSelector, Pod, ResourceFieldSelector, Secret,
    Service,
};

/// Why an environment can't be made; the container waits with `CreateContainerConfigError`.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum EnvError {
    /// A ConfigMap or Secret, or a key of it, does not exist.
    #[error("{kind} \"{name}\" {what}: create it or mark the reference optional")]
    Missing {
        /// `configmap` or `secret`.
        kind: &'static str,
        /// Its name.
        name: String,
        /// `not found`, or the key that it lacks.
        what: String,
    },
    /// A field path that the downward API does not have.
    #[error("field path \"{0}\" is not one that the downward API offers")]
    FieldPath(String),
    /// A resource name that the downward API does not have.
    #[error("resource \"{0}\" is not one that the downward API offers")]
    Resource(String),
}

/// The objects that environment and volumes refer to, by name within the pod's namespace.
#[derive(Debug, Default, Clone)]
pub struct References {
    /// ConfigMaps by name.
    pub config_maps: BTreeMap<String, ConfigMap>,
    /// Secrets by name.
    pub secrets: BTreeMap<String, Secret>,
    /// Services of the namespace, for the service variables, and `kubernetes` of `default`.
    pub services: Vec<Service>,
}

/// What of a pod is not in its spec but in the agent's hands.
#[derive(Debug, Clone, Default)]
pub struct Addresses {
    /// The pod's address.
    pub pod_ip: String,
    /// The node's address.
    pub host_ip: String,
    /// The node's name.
    pub node_name: String,
}

/// The environment in order; later entries replace earlier ones of the same name.
pub fn environment(
    pod: &Pod,
    container: &Container,
    references: &References,
    addresses: &Addresses,
) -> Result<Vec<(String, String)>, EnvError> {
    let mut env = Env::default();
    let links = pod
        .spec
        .as_ref()
        .and_then(|s| s.enable_service_links)
        .unwrap_or(true);
    for (name, value) in service_variables(&references.services, links) {
        env.set(name, value);
    }
    for source in container.env_from.iter().flatten() {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        if let Some(reference) = &source.config_map_ref {
            let map = config_map(references, &reference.name, reference.optional)?;
            for (key, value) in map.and_then(|m| m.data.as_ref()).into_iter().flatten() {
                env.set(format!("{prefix}{key}"), value.clone());
            }
        }
        if let Some(reference) = &source.secret_ref {
            let secret = secret(references, &reference.name, reference.optional)?;
            for (key, value) in secret.and_then(|m| m.data.as_ref()).into_iter().flatten() {
                env.set(format!("{prefix}{key}"), text(value));
            }
        }
    }
    for variable in container.env.iter().flatten() {
        let value = match (&variable.value, &variable.value_from) {
            (Some(value), _) => Some(expand(value, &env.values)),
            (None, Some(source)) => from_source(pod, container, source, references, addresses)?,
            (None, None) => Some(String::new()),
        };
        if let Some(value) = value {
            env.set(variable.name.clone(), value);
        }
    }
    Ok(env.into_pairs())
}

#[derive(Default)]
struct Env {
    order: Vec<String>,
    values: BTreeMap<String, String>,
}

impl Env {
    fn set(&mut self, name: String, value: String) {
        if self.values.insert(name.clone(), value).is_none() {
            self.order.push(name);
        }
    }

    fn into_pairs(mut self) -> Vec<(String, String)> {
        let values = &mut self.values;
        self.order
            .into_iter()
            .filter_map(|name| values.remove_entry(&name))
            .collect()
    }
}

fn from_source(
    pod: &Pod,
    container: &Container,
    source: &EnvVarSource,
    references: &References,
    addresses: &Addresses,
) -> Result<Option<String>, EnvError> {
    if let Some(field) = &source.field_ref {
        return field_value(pod, field, addresses).map(Some);
    }
    if let Some(resource) = &source.resource_field_ref {
        return resource_value(pod, Some(container), resource).map(Some);
    }
    if let Some(key) = &source.config_map_key_ref {
        let map = config_map(references, &key.name, key.optional)?;
        let value = map
            .and_then(|m| m.data.as_ref())
            .and_then(|data| data.get(&key.key))
            .cloned();
        return required("configmap", &key.name, &key.key, key.optional, value);
    }
    if let Some(key) = &source.secret_key_ref {
        let secret = secret(references, &key.name, key.optional)?;
        let value = secret
            .and_then(|m| m.data.as_ref())
            .and_then(|data| data.get(&key.key))
            .map(text);
        return required("secret", &key.name, &key.key, key.optional, value);
    }
    Ok(None)
}

fn required(
    kind: &'static str,
    name: &str,
    key: &str,
    optional: Option<bool>,
    value: Option<String>,
) -> Result<Option<String>, EnvError> {
    match value {
        None if optional != Some(true) => Err(EnvError::Missing {
            kind,
            name: name.to_owned(),
            what: format!("has no key \"{key}\""),
        }),
        value => Ok(value),
    }
}

fn config_map<'a>(
    references: &'a References,
    name: &str,
    optional: Option<bool>,
) -> Result<Option<&'a ConfigMap>, EnvError> {
    match references.config_maps.get(name) {
        None if optional != Some(true) => Err(not_found("configmap", name)),
        found => Ok(found),
    }
}

fn secret<'a>(
    references: &'a References,
    name: &str,
    optional: Option<bool>,
) -> Result<Option<&'a Secret>, EnvError> {
    match references.secrets.get(name) {
        None if optional != Some(true) => Err(not_found("secret", name)),
        found => Ok(found),
    }
}

/// The error for an object that is not there.
pub fn not_found(kind: &'static str, name: &str) -> EnvError {
    EnvError::Missing {
        kind,
        name: name.to_owned(),
        what: "not found".to_owned(),
    }
}

fn text(value: &ByteString) -> String {
    String::from_utf8_lossy(&value.0).into_owned()
}

/// The value of a downward API field (Kubernetes, "Downward API", available fields).
pub fn field_value(
    pod: &Pod,
    field: &ObjectFieldSelector,
    addresses: &Addresses,
) -> Result<String, EnvError> {
    let meta = &pod.metadata;
    let spec = pod.spec.as_ref();
    let value = match field.field_path.as_str() {
        "metadata.name" => meta.name.clone(),
        "metadata.namespace" => meta.namespace.clone(),
        "metadata.uid" => meta.uid.clone(),
        "metadata.labels" => Some(pairs(meta.labels.as_ref())),
        "metadata.annotations" => Some(pairs(meta.annotations.as_ref())),
        "spec.nodeName" => Some(addresses.node_name.clone()),
        "spec.serviceAccountName" => Some(
            spec.and_then(|s| s.service_account_name.clone())
                .unwrap_or_else(|| "default".to_owned()),
        ),
        "status.hostIP" | "status.hostIPs" => Some(addresses.host_ip.clone()),
        "status.podIP" | "status.podIPs" => Some(addresses.pod_ip.clone()),
        path => return keyed_field(pod, path),
    };
    Ok(value.unwrap_or_default())
}

fn keyed_field(pod: &Pod, path: &str) -> Result<String, EnvError> {
    let unknown = || EnvError::FieldPath(path.to_owned());
    let (map, key) = path
        .strip_suffix("']")
        .and_then(|p| p.split_once("['"))
        .ok_or_else(unknown)?;
    let map = match map {
        "metadata.labels" => pod.metadata.labels.as_ref(),
        "metadata.annotations" => pod.metadata.annotations.as_ref(),
        _ => return Err(unknown()),
    };
    Ok(map.and_then(|m| m.get(key)).cloned().unwrap_or_default())
}

/// `key="value"` lines, the value quoted as Go's `%q` does for ordinary text.
fn pairs(map: Option<&BTreeMap<String, String>>) -> String {
    map.into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={value:?}\n"))
        .collect()
}

/// The value of a `resourceFieldRef`: the limit or request of a container, divided by the divisor, rounded up.
///
/// An absent limit is the node's capacity in Kubernetes; here it is the number of processors, or 0 for memory as "no limit is known".
pub fn resource_value(
    pod: &Pod,
    own: Option<&Container>,
    selector: &ResourceFieldSelector,
) -> Result<String, EnvError> {
    let unknown = || EnvError::Resource(selector.resource.clone());
    let named = selector.container_name.as_deref();
    let all = pod.spec.iter().flat_map(|s| {
        s.containers
            .iter()
            .chain(s.init_containers.iter().flatten())
    });
    let container = match named {
        Some(name) => all.into_iter().find(|c| c.name == name),
        None => own,
    };
    let (kind, resource) = selector.resource.split_once('.').ok_or_else(unknown)?;
    let resources = container.and_then(|c| c.resources.as_ref());
    let limits = resources.and_then(|r| r.limits.as_ref());
    let quantities = match kind {
        "limits" => limits,
        "requests" => resources.and_then(|r| r.requests.as_ref()),
        _ => return Err(unknown()),
    };
    if !matches!(resource, "cpu" | "memory" | "ephemeral-storage") {
        return Err(unknown());
    }
    let amount = match quantities.and_then(|q| q.get(resource)) {
        Some(quantity) => quantity_value(&quantity.0).ok_or_else(unknown)?,
        None if kind == "limits" && resource == "cpu" => {
            std::thread::available_parallelism().map_or(1.0, |n| n.get() as f64)
        }
        None => 0.0,
    };
    let divisor = selector
        .divisor
        .as_ref()
        .and_then(|d| quantity_value(&d.0))
        .filter(|d| *d > 0.0)
        .unwrap_or(1.0);
    Ok(format!("{:.0}", (amount / divisor).ceil()))
}

/// A Kubernetes quantity as a number: `500m` is 0.5, `64Mi` is 67108864. `None`: not a quantity.
pub fn quantity_value(text: &str) -> Option<f64> {
    const SUFFIXES: [(&str, f64); 13] = [
        ("Ki", 1024.0),
        ("Mi", 1_048_576.0),
        ("Gi", 1_073_741_824.0),
        ("Ti", 1_099_511_627_776.0),
        ("Pi", 1_125_899_906_842_624.0),
        ("n", 1e-9),
        ("u", 1e-6),
        ("m", 1e-3),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
        ("P", 1e15),
    ];
    let text = text.trim();
    let (number, factor) = SUFFIXES
        .iter()
        .find_map(|(suffix, factor)| Some((text.strip_suffix(suffix)?, *factor)))
        .unwrap_or((text, 1.0));
    number
        .parse::<f64>()
        .ok()
        .filter(|n| n.is_finite())
        .map(|n| n * factor)
}

/// Replaces `$(NAME)` by values that are known; `$$` escapes, unknown references stay as they are (Kubernetes, "Define Dependent
/// Environment Variables").
pub fn expand(text: &str, values: &BTreeMap<String, String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|r| r.split_once(')')) {
            match values.get(name) {
                Some(value) => out.push_str(value),
                None => out.push_str(&format!("$({name})")),
            }
            rest = after;
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    out
}

/// `NAME_SERVICE_HOST`, `NAME_SERVICE_PORT`, `NAME_SERVICE_PORT_PORTNAME` and `NAME_PORT` for every Service with an address;
/// without `links` only those of `kubernetes`.
fn service_variables(services: &[Service], links: bool) -> Vec<(String, String)> {
    let mut out = Vec::new();
    for service in services {
        let Some(name) = service.metadata.name.as_deref() else {
            continue;
        };
        let spec = service.spec.as_ref();
        let Some(ip) = spec
            .and_then(|s| s.cluster_ip.as_deref())
            .filter(|ip| !ip.is_empty() && *ip != "None")
        else {
            continue;
        };
        let ports = spec.and_then(|s| s.ports.as_deref()).unwrap_or_default();
        let Some(first) = ports.first().filter(|_| links || name == "kubernetes") else {
            continue;
        };
        let prefix = variable_name(name);
        out.push((format!("{prefix}_SERVICE_HOST"), ip.to_owned()));
        out.push((format!("{prefix}_SERVICE_PORT"), first.port.to_string()));
        for port in ports {
            if let Some(port_name) = &port.name {
                out.push((
                    format!("{prefix}_SERVICE_PORT_{}", variable_name(port_name)),
                    port.port.to_string(),
                ));
            }
        }
        let protocol = first.protocol.as_deref().unwrap_or("TCP").to_lowercase();
        out.push((
            format!("{prefix}_PORT"),
            format!("{protocol}://{ip}:{}", first.port),
        ));
    }
    out
}

fn variable_name(name: &str) -> String {
    name.to_uppercase().replace(['-', '.'], "_")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "web-1", "namespace": "shop", "labels": {"app": "web"}},
            "spec": {"serviceAccountName": "seller", "containers": [{"name": "app",
                "resources": {"limits": {"cpu": "1500m", "memory": "64Mi"}},
                "envFrom": [{"prefix": "P_", "configMapRef": {"name": "settings"}}],
                "env": [
                    {"name": "A", "value": "x"},
                    {"name": "B", "value": "$(A)-$(P_KEY)-$(NOBODY)-$$(A)"},
                    {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                    {"name": "APP", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
                    {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
                    {"name": "MEM", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}},
                    {"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": "secret", "key": "p"}}},
                    {"name": "LATER", "valueFrom": {"configMapKeyRef": {"name": "none", "key": "k", "optional": true}}},
                ]}]},
        }))
        .unwrap()
    }

    fn references() -> References {
        let mut references = References::default();
        references.config_maps.insert(
            "settings".into(),
            serde_json::from_value(json!({"data": {"KEY": "value"}})).unwrap(),
        );
        references.secrets.insert(
            "secret".into(),
            serde_json::from_value(json!({"data": {"p": "cHc="}})).unwrap(),
        );
        references.services.push(
            serde_json::from_value(json!({"metadata": {"name": "my-db"},
                "spec": {"clusterIP": "10.96.0.7", "ports": [{"name": "tcp-db", "port": 5432}]}}))
            .unwrap(),
        );
        references
    }

    #[test]
    fn every_source_of_a_variable() {
        let pod = pod();
        let addresses = Addresses {
            pod_ip: "10.244.0.9".into(),
            ..Addresses::default()
        };
        let env = environment(
            &pod,
            &pod.spec.as_ref().unwrap().containers[0],
            &references(),
            &addresses,
        )
        .unwrap();
        let lookup: BTreeMap<_, _> = env.into_iter().collect();
        let expected = [
            ("MY_DB_SERVICE_HOST", "10.96.0.7"),
            ("MY_DB_SERVICE_PORT_TCP_DB", "5432"),
            ("P_KEY", "value"),
            ("B", "x-value-$(NOBODY)-$(A)"),
            ("IP", "10.244.0.9"),
            ("APP", "web"),
            ("CPU", "2"),
            ("MEM", "64"),
            ("PASSWORD", "pw"),
        ];
        for (name, value) in expected {
            assert_eq!(lookup.get(name).map(String::as_str), Some(value), "{name}");
        }
        assert!(!lookup.contains_key("LATER"));
    }

    #[test]
    fn a_missing_reference_is_named() {
        let pod = pod();
        let error = environment(
            &pod,
            &pod.spec.as_ref().unwrap().containers[0],
            &References::default(),
            &Addresses::default(),
        );
        assert!(
            error
                .unwrap_err()
                .to_string()
                .starts_with("configmap \"settings\" not found")
        );
    }

    #[test]
    fn quantities() {
        assert_eq!(quantity_value("500m"), Some(0.5));
        assert_eq!(quantity_value("2Gi"), Some(2_147_483_648.0));
        assert_eq!(quantity_value("much"), None);
    }
}
