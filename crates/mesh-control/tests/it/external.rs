//! A signer of the cluster in place of the mesh's own authority, against the local cluster's API server with its roles: a task of the test
//! signs what is approved, well or badly.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::{Request, State};
use axum::middleware::Next;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{Struct, Value as Wire};
use mesh_apiserver::{ApiServer, Auth, Identity, node::NoNode};
use mesh_control::{External, Options};
use mesh_identity::csr;
use mesh_identity::spiffe::SpiffeId;
use mesh_identity::token::TokenKeys;
use mesh_identity::trust::{self, TrustBundle};
use mesh_xds::certificate::CertificateRequest;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, IsCa,
    KeyPair, SanType,
};
use serde_json::{Value, json};
use tonic::Code;

use crate::authority::{ask, now, request, source, until};
use crate::control::{Plane, get, start_with};

const SIGNER: &str = "example.com/mesh";
const CSRS: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
const MAPS: &str = "/api/v1/namespaces/istio-system/configmaps";

fn workload() -> SpiffeId {
    "spiffe://cluster.local/ns/default/sa/default"
        .parse()
        .unwrap()
}

/// What the signer does with requests of workloads.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mood {
    Good,
    OtherKey,
    OtherName,
    MoreNames,
    Authority,
    OtherRoot,
    TooLong,
    Expired,
    Garbage,
    Fails,
    Sleeps,
}

struct Cluster {
    router: axum::Router,
    server: ApiServer,
    mood: Arc<Mutex<Mood>>,
    root: Arc<CertifiedIssuer<'static, KeyPair>>,
    /// Requests are denied by somebody else as soon as they are there.
    denied: Arc<Mutex<bool>>,
}

fn issuer(name: &str) -> Arc<CertifiedIssuer<'static, KeyPair>> {
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    Arc::new(CertifiedIssuer::self_signed(params, key).unwrap())
}

impl Cluster {
    async fn new() -> Self {
        let (store, _) = mesh_store::Store::open(None).unwrap();
        let issuer_of_tokens = "https://kubernetes.default.svc.cluster.local";
        let auth = Auth {
            admin_tokens: Vec::new(),
            tokens: Arc::new(TokenKeys::generate(issuer_of_tokens).unwrap()),
        };
        let options = mesh_apiserver::Options::new(store, auth, Arc::new(NoNode));
        let server = ApiServer::open(options).unwrap();
        let cluster = Self {
            router: server.router_as(Identity::admin()),
            server,
            mood: Arc::new(Mutex::new(Mood::Good)),
            root: issuer("Root of the signer"),
            denied: Arc::default(),
        };
        for crd in mesh_api::crds() {
            let path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
            cluster.post(path, crd).await;
        }
        let namespace = json!({ "metadata": { "name": "istio-system" } });
        cluster.post("/api/v1/namespaces", namespace).await;
        let account = json!({ "metadata": { "name": "default" } });
        let accounts = "/api/v1/namespaces/default/serviceaccounts";
        let _ = cluster.call("POST", accounts, account).await;
        cluster.grant().await;
        tokio::spawn(sign(
            cluster.client(),
            Arc::clone(&cluster.root),
            Arc::clone(&cluster.mood),
        ));
        cluster
    }

    /// The control plane may do what it needs: everything but certificates, and of these what the documentation says.
    async fn grant(&self) {
        let mut groups: Vec<&str> = mesh_api::KINDS.iter().map(|info| info.group).collect();
        groups.extend([
            "",
            "discovery.k8s.io",
            "coordination.k8s.io",
            "admissionregistration.k8s.io",
            "authentication.k8s.io",
            "authorization.k8s.io",
        ]);
        let rule = |groups: &[&str], resources: &[&str], verbs: &[&str]| json!({ "apiGroups": groups, "resources": resources, "verbs": verbs });
        let group = ["certificates.k8s.io"];
        let mut approve = rule(&group, &["signers"], &["approve"]);
        approve["resourceNames"] = json!(["example.com/*"]);
        let role = json!({ "metadata": { "name": "istiod" }, "rules": [
            rule(&groups, &["*"], &["*"]),
            rule(&group, &["certificatesigningrequests"], &["create", "get", "watch", "delete"]),
            rule(&group, &["certificatesigningrequests/approval"], &["update"]),
            approve,
        ] });
        let rbac = "/apis/rbac.authorization.k8s.io/v1";
        self.post(&format!("{rbac}/clusterroles"), role).await;
        let binding = json!({
            "metadata": { "name": "istiod" },
            "roleRef": { "kind": "ClusterRole", "name": "istiod" },
            "subjects": [{ "kind": "ServiceAccount", "name": "istiod", "namespace": "istio-system" }],
        });
        self.post(&format!("{rbac}/clusterrolebindings"), binding)
            .await;
    }

    fn client(&self) -> kube::Client {
        kube::Client::new(self.router.clone(), "default")
    }

    async fn call(&self, method: &str, path: &str, body: Value) -> Result<Value, kube::Error> {
        let kind = match method {
            "PATCH" => "application/merge-patch+json",
            _ => "application/json",
        };
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", kind)
            .body(serde_json::to_vec(&body).unwrap())
            .unwrap();
        self.client().request(request).await
    }

    async fn post(&self, path: &str, body: Value) -> Value {
        let created = self.call("POST", path, body).await;
        created.unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    async fn token(&self) -> String {
        let path = "/api/v1/namespaces/default/serviceaccounts/default/token";
        let body = json!({ "spec": { "audiences": ["istio-ca"] } });
        let token = self.post(path, body).await;
        token["status"]["token"].as_str().unwrap().to_owned()
    }

    /// The ConfigMap of the mesh configuration.
    async fn configure(&self, mesh: &Value) {
        let body = json!({ "metadata": { "name": "istio" }, "data": { "mesh": mesh.to_string() } });
        if self.call("POST", MAPS, body.clone()).await.is_err() {
            let path = format!("{MAPS}/istio");
            self.call("PATCH", &path, body).await.unwrap();
        }
    }

    async fn trust(&self, certificates: &[(&str, &[&str])]) {
        let all: Vec<Value> = certificates
            .iter()
            .map(|(pem, signers)| json!({ "pem": pem, "certSigners": signers }))
            .collect();
        self.configure(&json!({ "caCertificates": all })).await;
    }

    async fn start(&self, signer: &str, domain: &str, provider: &str) -> Plane {
        let kind = "ISTIOD_RA_KUBERNETES_API";
        let mut external = External::read(kind, signer, domain, provider)
            .unwrap()
            .unwrap();
        external.patience = Duration::from_secs(5);
        let istiod = Identity::service_account("istio-system", "istiod", "");
        let state = (self.router.clone(), Arc::clone(&self.denied));
        let router = self
            .server
            .router_as(istiod)
            .layer(axum::middleware::from_fn_with_state(state, deny));
        let mut options = Options::new(kube::Client::new(router, "default"), "0.1.0");
        options.grpc = None;
        for address in [
            &mut options.secure_grpc,
            &mut options.webhook,
            &mut options.monitoring,
            &mut options.http,
        ] {
            *address = SocketAddr::from(([127, 0, 0, 1], 0));
        }
        options.external = Some(external);
        start_with(options).await
    }

    /// The roots that a namespace's ConfigMap says, once it says some.
    async fn published(
        &self,
        namespace: &str,
        wanted: impl Fn(&TrustBundle) -> bool,
    ) -> TrustBundle {
        let path = format!("/api/v1/namespaces/{namespace}/configmaps/istio-ca-root-cert");
        until("the roots", async || {
            let map = self.call("GET", &path, Value::Null).await.ok()?;
            let roots = TrustBundle::from_pem(map["data"]["root-cert.pem"].as_str()?).ok()?;
            wanted(&roots).then_some(roots)
        })
        .await
    }

    async fn ready(&self, plane: &Plane) -> TrustBundle {
        until("readiness", async || {
            let answer = get(plane.addresses.http, "/ready", "10.0.0.1").await;
            (answer.0 == 200).then_some(())
        })
        .await;
        self.published("default", |_| true).await
    }
}

/// Somebody who denies what was just created, before anybody else sees it.
async fn deny(
    State((router, denied)): State<(axum::Router, Arc<Mutex<bool>>)>,
    request: Request,
    next: Next,
) -> axum::response::Response {
    let creates = request.method() == "POST" && request.uri().path() == CSRS;
    let answer = next.run(request).await;
    if !creates || !*denied.lock().unwrap() {
        return answer;
    }
    let (parts, body) = answer.into_parts();
    let bytes = axum::body::to_bytes(body, 1 << 20).await.unwrap();
    let mut object: Value = serde_json::from_slice(&bytes).unwrap();
    object["status"]["conditions"] =
        json!([{ "type": "Denied", "status": "True", "reason": "Policy", "message": "not today" }]);
    let name = object["metadata"]["name"].as_str().unwrap().to_owned();
    let client = kube::Client::new(router, "default");
    let request = http::Request::put(format!("{CSRS}/{name}/approval"))
        .header("content-type", "application/json")
        .body(serde_json::to_vec(&object).unwrap())
        .unwrap();
    client.request::<Value>(request).await.unwrap();
    axum::response::Response::from_parts(parts, bytes.into())
}

/// Signs what is approved, until the test ends.
async fn sign(
    client: kube::Client,
    root: Arc<CertifiedIssuer<'static, KeyPair>>,
    mood: Arc<Mutex<Mood>>,
) {
    let other = issuer("Root of nobody");
    loop {
        let list = http::Request::get(CSRS).body(Vec::new()).unwrap();
        let list: Value = client.request(list).await.unwrap();
        for item in list["items"].as_array().into_iter().flatten() {
            let conditions = &item["status"]["conditions"];
            let is = |kind: &str| conditions.to_string().contains(kind);
            if !is("Approved") || is("Failed") || item["status"]["certificate"].is_string() {
                continue;
            }
            assert!(
                item["spec"]["username"]
                    .as_str()
                    .unwrap()
                    .ends_with(":istiod")
            );
            let now = *mood.lock().unwrap();
            if let Some(status) = answer(item, now, &root, &other) {
                let mut item = item.clone();
                item["status"] = status;
                let name = item["metadata"]["name"].as_str().unwrap();
                let put = http::Request::put(format!("{CSRS}/{name}/status"))
                    .header("content-type", "application/json")
                    .body(serde_json::to_vec(&item).unwrap())
                    .unwrap();
                // It may be gone already.
                let _ = client.request::<Value>(put).await;
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn answer(
    item: &Value,
    mood: Mood,
    root: &CertifiedIssuer<'static, KeyPair>,
    other: &CertifiedIssuer<'static, KeyPair>,
) -> Option<Value> {
    let pem = BASE64
        .decode(item["spec"]["request"].as_str().unwrap())
        .unwrap();
    let pem = String::from_utf8(pem).unwrap();
    let mut asked = CertificateSigningRequestParams::from_pem(&pem).unwrap();
    let seconds = item["spec"]["expirationSeconds"].as_i64().unwrap();
    let at = |seconds: i64| {
        let time = i64::try_from(now()).unwrap() + seconds;
        time::OffsetDateTime::from_unix_timestamp(time).unwrap()
    };
    let params = &mut asked.params;
    params.not_before = at(-60);
    params.not_after = at(seconds);
    params.extended_key_usages = vec![
        rcgen::ExtendedKeyUsagePurpose::ServerAuth,
        rcgen::ExtendedKeyUsagePurpose::ClientAuth,
    ];
    let is_server = params
        .subject_alt_names
        .iter()
        .any(|name| matches!(name, SanType::DnsName(_)));
    let uri = |text: &str| SanType::URI(text.try_into().unwrap());
    let mut issuer = root;
    match mood {
        _ if is_server => {}
        Mood::Good | Mood::OtherKey => {}
        Mood::OtherName => {
            params.subject_alt_names = vec![uri("spiffe://cluster.local/ns/default/sa/admin")];
        }
        Mood::MoreNames => params
            .subject_alt_names
            .push(uri("spiffe://cluster.local/ns/default/sa/admin")),
        Mood::Authority => params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained),
        Mood::OtherRoot => issuer = other,
        Mood::TooLong => params.not_after = at(100 * 86_400),
        Mood::Expired => params.not_after = at(-30),
        Mood::Garbage => {}
        Mood::Fails => {
            let failed = json!({ "type": "Failed", "status": "True", "reason": "Quota", "message": "no more" });
            return Some(json!({ "conditions": [failed] }));
        }
        Mood::Sleeps => return None,
    }
    let mut certificate = match mood {
        Mood::OtherKey if !is_server => {
            let key = KeyPair::generate().unwrap();
            asked.params.signed_by(&key, issuer).unwrap().pem()
        }
        _ => asked.signed_by(issuer).unwrap().pem(),
    };
    if mood == Mood::Garbage && !is_server {
        certificate = root.pem();
    }
    Some(json!({ "certificate": BASE64.encode(certificate) }))
}

fn names_signer(csr: &str, signer: &str) -> CertificateRequest {
    let value = Wire {
        kind: Some(Kind::StringValue(signer.to_owned())),
    };
    CertificateRequest {
        metadata: Some(Struct {
            fields: [("CertSigner".to_owned(), value)].into_iter().collect(),
        }),
        ..request(csr)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signer_of_the_cluster_signs_and_nothing_else_is_handed_on() {
    let cluster = Cluster::new().await;
    cluster.trust(&[(&cluster.root.pem(), &[SIGNER])]).await;
    let plane = cluster.start(SIGNER, "", "").await;
    let trusted = cluster.ready(&plane).await;
    assert_eq!(trusted, TrustBundle::from_pem(&cluster.root.pem()).unwrap());
    let token = cluster.token().await;
    let credentials = source(&trusted, Some(&token), None);
    let address = plane.addresses.secure_grpc;

    let (good, _) = csr::make(&workload()).unwrap();
    let hour = CertificateRequest {
        validity_duration: 3600,
        ..request(&good)
    };
    let mut chain = ask(address, &credentials, hour).await.unwrap().cert_chain;
    assert_eq!(
        TrustBundle::from_pem(&chain.pop().unwrap()).unwrap(),
        trusted
    );
    let leaf = &trust::describe(&chain.concat()).unwrap()[0];
    assert_eq!(leaf.uris, [workload().to_string()]);
    assert!(leaf.not_after <= now() + 3600);
    assert!(trusted.root_of(&chain.concat()).is_some());
    // Nothing is left of it, and no key was made here.
    until("the end of the request", async || {
        let list = cluster.call("GET", CSRS, Value::Null).await.unwrap();
        list["items"].as_array().unwrap().is_empty().then_some(())
    })
    .await;
    let secret = "/api/v1/namespaces/istio-system/secrets/istio-ca-secret";
    assert!(cluster.call("GET", secret, Value::Null).await.is_err());

    // What comes from the signer is judged.
    let mut refused = Vec::new();
    for (mood, code, label) in [
        (Mood::OtherKey, Code::Internal, "signer_answer"),
        (Mood::OtherName, Code::Internal, "signer_answer"),
        (Mood::MoreNames, Code::Internal, "signer_answer"),
        (Mood::Authority, Code::Internal, "signer_answer"),
        (Mood::OtherRoot, Code::Internal, "signer_answer"),
        (Mood::TooLong, Code::Internal, "signer_answer"),
        (Mood::Expired, Code::Internal, "signer_answer"),
        (Mood::Garbage, Code::Internal, "signer_answer"),
        (Mood::Fails, Code::Internal, "signer_failed"),
        (Mood::Sleeps, Code::Unavailable, "signer_timeout"),
    ] {
        *cluster.mood.lock().unwrap() = mood;
        let (pem, _) = csr::make(&workload()).unwrap();
        let error = ask(address, &credentials, request(&pem)).await.unwrap_err();
        assert_eq!(error.code(), code, "{mood:?}: {error}");
        refused.push(label);
    }
    *cluster.mood.lock().unwrap() = Mood::Good;
    *cluster.denied.lock().unwrap() = true;
    let error = ask(address, &credentials, request(&good))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied, "{error}");
    assert!(error.message().contains("not today"), "{error}");
    *cluster.denied.lock().unwrap() = false;
    let (_, metrics) = get(plane.addresses.monitoring, "/metrics", "localhost").await;
    for (label, count) in [
        ("signer_answer", 8),
        ("signer_failed", 1),
        ("signer_timeout", 1),
        ("signer_denied", 1),
    ] {
        let line = format!("\ncitadel_server_csr_sign_err_count{{error=\"{label}\"}} {count}\n");
        assert!(metrics.contains(&line), "{line} is missing in:\n{metrics}");
    }
    // It goes on.
    ask(address, &credentials, request(&good)).await.unwrap();
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_judged_before_a_signer_sees_them() {
    let cluster = Cluster::new().await;
    cluster.trust(&[(&cluster.root.pem(), &[SIGNER])]).await;
    let plane = cluster.start(SIGNER, "example.com", "").await;
    let trusted = cluster.ready(&plane).await;
    let token = cluster.token().await;
    let credentials = source(&trusted, Some(&token), None);
    let address = plane.addresses.secure_grpc;
    let own = || {
        vec![SanType::URI(
            workload().to_string().as_str().try_into().unwrap(),
        )]
    };
    let made = |change: &dyn Fn(&mut CertificateParams)| {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.subject_alt_names = own();
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        params.serialize_request(&key).unwrap().pem().unwrap()
    };
    let good = made(&|_| {});
    let masters = made(&|params| {
        let organization = rcgen::DnType::OrganizationName;
        params
            .distinguished_name
            .push(organization, "system:masters");
    });
    let nameless = made(&|params| params.subject_alt_names.clear());
    let short = CertificateRequest {
        validity_duration: 300,
        ..request(&good)
    };
    for (what, asked, code) in [
        ("a subject", request(&masters), Code::PermissionDenied),
        ("no name", request(&nameless), Code::PermissionDenied),
        ("too short", short, Code::InvalidArgument),
        // Roots of a signer must be known before it is asked.
        (
            "another signer",
            names_signer(&good, "other"),
            Code::InvalidArgument,
        ),
        (
            "a path",
            names_signer(&good, "../mesh"),
            Code::InvalidArgument,
        ),
    ] {
        let error = ask(address, &credentials, asked).await.unwrap_err();
        assert_eq!(error.code(), code, "{what}: {error}");
    }
    ask(address, &credentials, names_signer(&good, "mesh"))
        .await
        .unwrap();
    // A token of somebody else is none here either.
    let nobody = source(&trusted, Some("nobody"), None);
    let error = ask(address, &nobody, request(&good)).await.unwrap_err();
    assert_eq!(error.code(), Code::Unauthenticated, "{error}");
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn roots_of_a_signer_change_with_an_overlap_or_not_at_all() {
    let cluster = Cluster::new().await;
    let root = cluster.root.pem();
    let bundle = |pems: &[&str]| TrustBundle::from_pem(&pems.concat()).unwrap();
    // Without roots nobody could trust anything: an operator brings them in the ConfigMap, which is his.
    let plane = cluster.start(SIGNER, "", "").await;
    let map = |pem: &str| json!({ "metadata": { "name": "istio-ca-root-cert" }, "data": { "root-cert.pem": pem } });
    let path = format!("{MAPS}/istio-ca-root-cert");
    cluster.post(MAPS, map(&root)).await;
    assert_eq!(cluster.ready(&plane).await, bundle(&[&root]));
    let next = issuer("Next root").pem();
    let both = format!("{root}{next}");
    cluster.call("PATCH", &path, map(&both)).await.unwrap();
    cluster
        .published("default", |roots| *roots == bundle(&[&root, &next]))
        .await;
    let stranger = issuer("Another root").pem();
    cluster.call("PATCH", &path, map(&stranger)).await.unwrap();
    until("the refusal", async || {
        let (_, metrics) = get(plane.addresses.monitoring, "/metrics", "localhost").await;
        metrics
            .contains("\ncitadel_server_cert_load_failure_count 1\n")
            .then_some(())
    })
    .await;
    let own = cluster.published("istio-system", |_| true).await;
    assert_eq!(
        own,
        bundle(&[&stranger]),
        "the operator's map is not ours to correct"
    );
    cluster
        .published("default", |roots| *roots == bundle(&[&root, &next]))
        .await;
    // The mesh configuration wins over the ConfigMap.
    cluster.trust(&[(&next, &[]), (&root, &[SIGNER])]).await;
    cluster
        .published("default", |roots| *roots == bundle(&[&next, &root]))
        .await;
    cluster
        .published("istio-system", |roots| *roots == bundle(&[&next, &root]))
        .await;
    plane.stop().await;
}
