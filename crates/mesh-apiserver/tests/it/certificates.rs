//! CertificateSigningRequests: who asks is what the server saw, who approves and signs needs the verb for the signer.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use mesh_apiserver::Identity;
use mesh_identity::ca::Authority;
use mesh_identity::csr;
use serde_json::{Value, json};

use crate::support::Api;

const CSRS: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
const RBAC: &str = "/apis/rbac.authorization.k8s.io/v1";
const DAY: u64 = 86_400;

fn asking(name: &str, signer: &str) -> Value {
    let id = "spiffe://cluster.local/ns/a/sa/b".parse().unwrap();
    let pem = csr::make(&id).unwrap().0;
    json!({
        "apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest", "metadata": { "name": name },
        "spec": {
            "request": BASE64.encode(pem), "signerName": signer, "expirationSeconds": 86_400,
            "usages": ["digital signature", "client auth"], "username": "somebody-else", "groups": ["system:masters"],
        },
        "status": { "conditions": [{ "type": "Approved", "status": "True" }] },
    })
}

fn acting(api: &Api, name: &str) -> Api {
    let identity = Identity::service_account("istio-system", name, "");
    Api {
        server: api.server.clone(),
        router: api.server.router_as(identity),
    }
}

/// Everybody may read and write requests and both subresources; the verb for the signer decides.
async fn grant(api: &Api, account: &str, verb: &str, signer: &str) {
    let role = json!({
        "kind": "ClusterRole", "metadata": { "name": account },
        "rules": [
            { "verbs": ["create", "get", "update", "patch"], "apiGroups": ["certificates.k8s.io"],
              "resources": ["certificatesigningrequests", "certificatesigningrequests/approval", "certificatesigningrequests/status"] },
            { "verbs": [verb], "apiGroups": ["certificates.k8s.io"], "resources": ["signers"], "resourceNames": [signer] },
        ],
    });
    api.post(&format!("{RBAC}/clusterroles"), &role).await.ok();
    let binding = json!({
        "kind": "ClusterRoleBinding", "metadata": { "name": account },
        "roleRef": { "kind": "ClusterRole", "name": account },
        "subjects": [{ "kind": "ServiceAccount", "name": account, "namespace": "istio-system" }],
    });
    api.post(&format!("{RBAC}/clusterrolebindings"), &binding)
        .await
        .ok();
}

fn condition(kind: &str) -> Value {
    json!({ "type": kind, "status": "True", "reason": "Test", "message": "m" })
}

#[tokio::test]
async fn a_request_is_approved_and_signed_by_those_who_may() {
    let api = Api::new();
    grant(&api, "approver", "approve", "example.com/*").await;
    grant(&api, "signer", "sign", "example.com/mesh").await;
    let (approver, signer) = (acting(&api, "approver"), acting(&api, "signer"));
    let made = approver
        .post(CSRS, &asking("one", "example.com/mesh"))
        .await;
    assert_eq!(made.code, 201, "{}", made.body);
    let spec = &made.body["spec"];
    assert_eq!(
        spec["username"],
        "system:serviceaccount:istio-system:approver"
    );
    assert!(
        !spec["groups"]
            .as_array()
            .unwrap()
            .contains(&json!("system:masters"))
    );
    assert!(made.body["status"]["conditions"].is_null(), "{}", made.body);

    let path = format!("{CSRS}/one");
    let (approval, status) = (format!("{path}/approval"), format!("{path}/status"));
    let mut approved = made.body.clone();
    approved["status"]["conditions"] = json!([condition("Approved")]);
    approved["status"]["certificate"] = json!(BASE64.encode("x"));
    approved["spec"]["signerName"] = json!("example.com/other");
    let refused = signer.put(&approval, &approved).await;
    assert_eq!(refused.code, 403, "{}", refused.body);
    let done = approver.put(&approval, &approved).await;
    assert_eq!(done.code, 200, "{}", done.body);
    let condition_now = &done.body["status"]["conditions"][0];
    assert!(condition_now["lastTransitionTime"].is_string());
    assert!(done.body["status"]["certificate"].is_null());
    assert_eq!(done.body["spec"]["signerName"], "example.com/mesh");

    let root = Authority::generate("o", "Root", 1_700_000_000, 100_000 * DAY).unwrap();
    let mut signed = done.body.clone();
    signed["status"]["certificate"] = json!(BASE64.encode(root.certificate_pem()));
    signed["status"]["conditions"] = json!([]);
    let refused = approver.put(&status, &signed).await;
    assert_eq!(refused.code, 403, "{}", refused.body);
    let issued = signer.put(&status, &signed).await;
    assert_eq!(issued.code, 200, "{}", issued.body);
    // What was decided is not the signer's to change.
    assert_eq!(issued.body["status"]["conditions"][0]["type"], "Approved");
    let mut again = issued.body.clone();
    again["status"]["certificate"] = json!(BASE64.encode("other"));
    assert_eq!(signer.put(&status, &again).await.code, 422);
    // The object itself: neither what was asked nor what became of it.
    let mut edited = issued.body.clone();
    edited["metadata"]["labels"] = json!({ "a": "b" });
    edited["spec"]["username"] = json!("admin");
    edited["status"] = json!({});
    let edited = approver.put(&path, &edited).await;
    assert_eq!(edited.body["metadata"]["labels"]["a"], "b");
    assert_eq!(edited.body["spec"], issued.body["spec"]);
    assert_eq!(edited.body["status"], issued.body["status"]);
    // A decision can't be taken back, nor be both.
    let mut undone = edited.body.clone();
    undone["status"]["conditions"] = json!([]);
    assert_eq!(approver.put(&approval, &undone).await.code, 422);
    undone["status"]["conditions"] = json!([condition("Approved"), condition("Denied")]);
    assert_eq!(approver.put(&approval, &undone).await.code, 422);
    // Columns of kubectl.
    let accept = "application/json;as=Table;v=v1;g=meta.k8s.io";
    let table = api
        .send(
            "GET",
            CSRS,
            &[("accept", accept)],
            axum::body::Body::empty(),
        )
        .await;
    let cells = &table.body["rows"][0]["cells"];
    assert_eq!(cells[2], "example.com/mesh", "{cells}");
    assert_eq!(cells[5], "Approved,Issued", "{cells}");
}

#[tokio::test]
async fn the_verb_is_for_one_signer() {
    let api = Api::new();
    grant(&api, "approver", "approve", "example.com/mesh").await;
    let approver = acting(&api, "approver");
    for (name, signer, code) in [
        ("mine", "example.com/mesh", 200),
        ("other", "example.com/other", 403),
        ("foreign", "example.org/mesh", 403),
    ] {
        let made = approver.post(CSRS, &asking(name, signer)).await.ok();
        let mut approved = made.clone();
        approved["status"] = json!({ "conditions": [condition("Denied")] });
        let answer = approver
            .put(&format!("{CSRS}/{name}/approval"), &approved)
            .await;
        assert_eq!(answer.code, code, "{name}: {}", answer.body);
    }
}

#[tokio::test]
async fn requests_that_make_no_sense_are_refused() {
    let api = Api::new();
    let good = asking("x", "example.com/mesh");
    let with = |field: &str, value: Value| {
        let mut bad = good.clone();
        bad["spec"][field] = value;
        bad
    };
    let mut params = rcgen::CertificateParams::default();
    params
        .distinguished_name
        .push(rcgen::DnType::OrganizationName, "system:masters");
    let key = rcgen::KeyPair::generate().unwrap();
    let masters = params.serialize_request(&key).unwrap().pem().unwrap();
    let mut admin = with("signerName", json!("kubernetes.io/kube-apiserver-client"));
    admin["spec"]["request"] = json!(BASE64.encode(masters));
    for (what, object, code) in [
        ("no PEM", with("request", json!(BASE64.encode("x"))), 422),
        ("no base64", with("request", json!("!")), 422),
        ("no signer", with("signerName", json!("")), 422),
        ("no domain", with("signerName", json!("mesh")), 422),
        ("one label", with("signerName", json!("example/mesh")), 422),
        (
            "two slashes",
            with("signerName", json!("example.com/a/b")),
            422,
        ),
        ("too short", with("expirationSeconds", json!(599)), 422),
        ("no usage", with("usages", json!([])), 422),
        ("unknown usage", with("usages", json!(["everything"])), 422),
        ("twice", with("usages", json!(["any", "any"])), 422),
        ("an administrator", admin, 403),
        ("good", good.clone(), 201),
    ] {
        let answer = api.post(CSRS, &object).await;
        assert_eq!(answer.code, code, "{what}: {}", answer.body);
    }
}
