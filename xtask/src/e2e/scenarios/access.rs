//! What a pod may do with the Kubernetes API: what the roles of its account say.

use anyhow::{Context, ensure};

use crate::e2e::cluster::Cluster;

/// Lets the account of the curl sample look at its namespace.
const BINDING: &str = r"
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: curl-looks, namespace: default}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: view}
subjects: [{kind: ServiceAccount, name: curl, namespace: default}]
";

/// Where a pod finds its token and the certificate of the API.
const FOLDER: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// A pod is refused until its account has a role, and again without it; the mesh's own parts are refused nothing.
pub(super) fn roles(cluster: &mut Cluster) -> anyhow::Result<()> {
    let pods = cluster.pods("app=curl")?;
    let pod = pods.first().context("no pod of the curl sample")?;
    let token = cluster.exec(pod, "curl", &["cat", &format!("{FOLDER}/token")])?;
    let header = format!("Authorization: Bearer {}", token.trim());
    let certificate = format!("{FOLDER}/ca.crt");
    let answer = |path: &str| {
        let url = format!("https://kubernetes.default.svc{path}");
        cluster.curl(
            pod,
            "curl",
            &["--cacert", &certificate, "-H", &header, &url],
        )
    };
    let list = "/api/v1/namespaces/default/pods";
    let refusal = "pods is forbidden: User \\\"system:serviceaccount:default:curl\\\" cannot list resource \\\"pods\\\" in API group \\\"\\\" \
                   in the namespace \\\"default\\\"";
    let expect = |path: &str, text: &str| {
        let answer = answer(path)?;
        ensure!(
            answer.contains(text),
            "{path}: expected {text:?}, got {answer}"
        );
        anyhow::Ok(())
    };
    expect("/api", "APIVersions")?;
    expect(list, refusal)?;
    cluster.apply(BINDING)?;
    expect(list, "PodList")?;
    expect("/api/v1/namespaces/default/secrets", "Forbidden")?;
    expect("/api/v1/pods", "at the cluster scope")?;
    cluster.delete_all(BINDING)?;
    expect(list, refusal)?;
    let printed = cluster.printed();
    ensure!(
        !printed.contains("system:serviceaccount:istio-system"),
        "a part of the mesh lacks a permission:\n{printed}"
    );
    Ok(())
}
