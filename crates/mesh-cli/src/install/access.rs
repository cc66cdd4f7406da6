//! What the parts of an installation may do with the Kubernetes API: roles and bindings with the names of Istio's charts.
//!
//! No more than the code does: a call that it learns needs its rule here. Applications get nothing.

use serde_json::{Value, json};

use super::metadata;
use super::resolve::Resolved;

const GROUP: &str = "rbac.authorization.k8s.io";
const READ: &[&str] = &["get", "list", "watch"];

/// The rights of the control plane, whose service account is `account` and whose environment variables are `env`.
pub(super) fn control_plane(
    settings: &Resolved,
    account: &str,
    labels: &Value,
    env: &[Value],
) -> [Value; 4] {
    let namespace = &settings.namespace;
    let everywhere = format!("{}-{namespace}", settings.revisioned("istiod-clusterrole"));
    let cluster_wide = json!({ "name": everywhere, "labels": labels });
    let own = metadata(account, namespace, labels.clone());
    let subject = (namespace.as_str(), account);
    let mut rules = cluster_rules();
    rules.extend(signer_rules(env));
    [
        role("ClusterRole", &cluster_wide, &rules),
        binding("ClusterRoleBinding", &cluster_wide, "ClusterRole", subject),
        role("Role", &own, &own_rules()),
        binding("RoleBinding", &own, "Role", subject),
    ]
}

/// A gateway may read the Secrets of its namespace: the control plane asks for this before it hands one out as a credential.
pub(super) fn gateway(name: &str, namespace: &str, account: &str, labels: &Value) -> [Value; 2] {
    let own = metadata(&format!("{name}-sds"), namespace, labels.clone());
    [
        role("Role", &own, &[rule(&[""], &["secrets"], READ)]),
        binding("RoleBinding", &own, "Role", (namespace, account)),
    ]
}

/// In all namespaces.
fn cluster_rules() -> Vec<Value> {
    let mut groups: Vec<&str> = mesh_api::KINDS.iter().map(|info| info.group).collect();
    groups.sort_unstable();
    groups.dedup();
    let mut rules = vec![
        rule(&[""], &["namespaces", "nodes", "pods", "services"], READ),
        rule(&["discovery.k8s.io"], &["endpointslices"], READ),
        rule(&groups, &["*"], READ),
        // Certificates of gateways and of what they call.
        rule(&[""], &["secrets"], READ),
        // Whether the account in a caller's certificate still exists.
        rule(&[""], &["serviceaccounts"], &["get"]),
        // The mesh's root certificate, in every namespace.
        rule(
            &[""],
            &["configmaps"],
            &["create", "get", "list", "patch", "update", "watch"],
        ),
        // The root certificate of the webhooks, and from when on they must answer.
        rule(
            &["admissionregistration.k8s.io"],
            &[
                "mutatingwebhookconfigurations",
                "validatingwebhookconfigurations",
            ],
            &["get", "list", "patch", "update", "watch"],
        ),
        // Whose token it is that a proxy comes with.
        rule(&["authentication.k8s.io"], &["tokenreviews"], &["create"]),
        // Whether a gateway may read Secrets.
        rule(
            &["authorization.k8s.io"],
            &["subjectaccessreviews"],
            &["create"],
        ),
    ];
    for group in groups {
        let statuses: Vec<String> = mesh_api::KINDS
            .iter()
            .filter(|info| info.group == group)
            .map(|info| format!("{}/status", info.plural))
            .collect();
        let statuses: Vec<&str> = statuses.iter().map(String::as_str).collect();
        rules.push(rule(&[group], &statuses, &["patch", "update"]));
    }
    rules
}

/// Where a signer of the cluster has the authority's place: requests to it, and the word that they are good.
fn signer_rules(env: &[Value]) -> Vec<Value> {
    let value = |name: &str| {
        let variable = env.iter().find(|variable| variable["name"] == name)?;
        variable["value"].as_str().filter(|value| !value.is_empty())
    };
    if value("EXTERNAL_CA").is_none() {
        return Vec::new();
    }
    let own = value("PILOT_CERT_PROVIDER").and_then(|provider| provider.strip_prefix("k8s.io/"));
    let domain = value("CERT_SIGNER_DOMAIN").map(|domain| format!("{domain}/*"));
    let mut signers: Vec<String> = [value("K8S_SIGNER"), own]
        .into_iter()
        .flatten()
        .map(str::to_owned)
        .chain(domain)
        .collect();
    signers.dedup();
    let group = &["certificates.k8s.io"];
    let requests = "certificatesigningrequests";
    let mut rules = vec![
        rule(group, &[requests], &["create", "delete", "get", "watch"]),
        rule(group, &["certificatesigningrequests/approval"], &["update"]),
    ];
    // Without names the rule would be for every signer.
    if !signers.is_empty() {
        let mut approve = rule(group, &["signers"], &["approve"]);
        approve["resourceNames"] = json!(signers);
        rules.push(approve);
    }
    rules
}

/// In the namespace of the control plane.
fn own_rules() -> [Value; 3] {
    let all = [
        "create", "delete", "get", "list", "patch", "update", "watch",
    ];
    [
        // The certificate authority.
        rule(&[""], &["secrets"], &all),
        // Reports of replicas that are gone.
        rule(&[""], &["configmaps"], &["delete"]),
        // Who of several replicas leads.
        rule(
            &["coordination.k8s.io"],
            &["leases"],
            &["create", "get", "patch", "update"],
        ),
    ]
}

fn rule(groups: &[&str], resources: &[&str], verbs: &[&str]) -> Value {
    json!({ "apiGroups": groups, "resources": resources, "verbs": verbs })
}

fn role(kind: &str, metadata: &Value, rules: &[Value]) -> Value {
    json!({ "apiVersion": format!("{GROUP}/v1"), "kind": kind, "metadata": metadata, "rules": rules })
}

/// Gives the role of the same name to a service account, by its namespace and name.
fn binding(kind: &str, metadata: &Value, role: &str, (namespace, account): (&str, &str)) -> Value {
    json!({
        "apiVersion": format!("{GROUP}/v1"), "kind": kind, "metadata": metadata,
        "roleRef": { "apiGroup": GROUP, "kind": role, "name": metadata["name"] },
        "subjects": [{ "kind": "ServiceAccount", "name": account, "namespace": namespace }],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signer_elsewhere_is_asked_and_approved_by_name_only() {
        let variable = |name: &str, value: &str| json!({ "name": name, "value": value });
        assert_eq!(
            signer_rules(&[variable("K8S_SIGNER", "example.com/a")]),
            Vec::<Value>::new()
        );
        let env = [
            variable("EXTERNAL_CA", "ISTIOD_RA_KUBERNETES_API"),
            variable("K8S_SIGNER", "example.com/a"),
            variable("CERT_SIGNER_DOMAIN", "example.org"),
        ];
        let rules = signer_rules(&env);
        assert_eq!(rules.len(), 3);
        assert_eq!(
            rules[2]["resourceNames"],
            json!(["example.com/a", "example.org/*"])
        );
        assert!(
            signer_rules(&env[..1])
                .iter()
                .all(|rule| rule["resources"] != json!(["signers"]))
        );
    }
}
