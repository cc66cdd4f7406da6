//! The certificate authority and the secure port, as workloads see them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{Struct, Value as Wire};
use mesh_identity::ca::{Authority, Leaf};
use mesh_identity::spiffe::SpiffeId;
use mesh_identity::trust::{self, TrustBundle};
use mesh_identity::{channel, csr};
use mesh_xds::certificate::{self, CertificateRequest, CertificateResponse};
use mesh_xds::channel::{Connector, CredentialSource, Credentials};
use mesh_xds::types::CLUSTER;
use mesh_xds::{AdsClient, ClientConfig, Handler, Node, Rejection, Update};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tonic::{Code, Status};

use crate::api::Api;
use crate::control::{Plane, get, options, start, start_with};
use crate::world;

pub const DAY: u64 = 86_400;

fn reviews() -> SpiffeId {
    "spiffe://cluster.local/ns/default/sa/default"
        .parse()
        .unwrap()
}

/// A cluster with the tokens that the tests use.
pub fn cluster() -> Api {
    let api = Api::new();
    world::bookinfo(&api);
    let user = |name: &str, groups: &[&str]| json!({"username": name, "groups": groups});
    let accounts = ["system:serviceaccounts", "system:authenticated"];
    let own = user("system:serviceaccount:default:default", &accounts);
    for (token, status) in [
        (
            "good",
            json!({"authenticated": true, "audiences": ["istio-ca"], "user": own}),
        ),
        (
            "foreign",
            json!({"authenticated": true, "audiences": ["elsewhere"], "user": own}),
        ),
        ("ignorant", json!({"authenticated": true, "user": own})),
        (
            "person",
            json!({"authenticated": true, "audiences": ["istio-ca"], "user": user("system:serviceaccount:default:default", &["system:authenticated"])}),
        ),
        (
            "admin",
            json!({"authenticated": true, "audiences": ["istio-ca"], "user": user("kubernetes-admin", &accounts)}),
        ),
        (
            "pathlike",
            json!({"authenticated": true, "audiences": ["istio-ca"], "user": user("system:serviceaccount:default:../sa/admin", &accounts)}),
        ),
        // Bound to pods: the right one, one that is gone, an earlier one of the name, one that runs as somebody else.
        ("bound", bound("default", "reviews-v1", "v1-0000")),
        ("bound-gone", bound("default", "reviews-v9", "v9-0000")),
        ("bound-earlier", bound("default", "reviews-v1", "v1-9999")),
        ("bound-other", bound("admin", "reviews-v1", "v1-0000")),
        (
            "deleted",
            json!({"authenticated": false, "error": "the token's pod does not exist any more"}),
        ),
    ] {
        api.apply(
            "tokens",
            json!({"metadata": {"name": token}, "status": status}),
        );
    }
    api.apply("serviceaccounts", json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": "default"}}));
    let mut pod = api.get("pods", "default", "reviews-v1").unwrap();
    pod["metadata"]["uid"] = json!("v1-0000");
    api.apply("pods", pod);
    api
}

/// What the cluster says of a token of an account that is bound to a pod.
fn bound(account: &str, pod: &str, uid: &str) -> Value {
    json!({"authenticated": true, "audiences": ["istio-ca"], "user": {
        "username": format!("system:serviceaccount:default:{account}"),
        "groups": ["system:serviceaccounts", "system:authenticated"],
        "extra": {"authentication.kubernetes.io/pod-name": [pod], "authentication.kubernetes.io/pod-uid": [uid]},
    }})
}

/// Asks again until there is an answer.
pub async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    for _ in 0..400 {
        if let Some(answer) = ask().await {
            return answer;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{what} did not come");
}

/// What a namespace's ConfigMap says.
pub fn roots_in(api: &Api, namespace: &str) -> Option<String> {
    let map = api.get("configmaps", namespace, "istio-ca-root-cert")?;
    Some(map["data"]["root-cert.pem"].as_str()?.to_owned())
}

/// The roots, once the control plane is ready too.
pub async fn ready(plane: &Plane, api: &Api) -> TrustBundle {
    until("readiness", async || {
        (get(plane.addresses.http, "/ready", "10.0.0.1").await.0 == 200).then_some(())
    })
    .await;
    let roots = until("the roots", async || roots_in(api, "default")).await;
    TrustBundle::from_pem(&roots).unwrap()
}

pub fn source(trusted: &TrustBundle, token: Option<&str>, leaf: Option<&Leaf>) -> CredentialSource {
    let credentials = Credentials {
        tls: channel::client(trusted, leaf).unwrap(),
        token: token.map(str::to_owned),
    };
    Arc::new(move || Ok(credentials.clone()))
}

fn connector() -> Connector {
    Arc::new(|address| Box::pin(TcpStream::connect(address)))
}

pub async fn ask(
    address: SocketAddr,
    credentials: &CredentialSource,
    request: CertificateRequest,
) -> Result<CertificateResponse, Status> {
    let name = format!("localhost:{}", address.port());
    let limit = Duration::from_secs(20);
    let connection = mesh_xds::channel::open(&name, &connector(), Some(credentials), limit)
        .await
        .map_err(|error| Status::unavailable(error.to_string()))?;
    certificate::create(&connection, request).await
}

pub fn request(csr: &str) -> CertificateRequest {
    CertificateRequest {
        csr: csr.to_owned(),
        ..Default::default()
    }
}

/// A certificate, as a workload gets its first one.
pub async fn first(plane: &Plane, trusted: &TrustBundle) -> Leaf {
    let (csr, key) = csr::make(&reviews()).unwrap();
    let credentials = source(trusted, Some("good"), None);
    let answer = ask(plane.addresses.secure_grpc, &credentials, request(&csr)).await;
    let mut chain = answer.unwrap().cert_chain;
    assert_eq!(
        TrustBundle::from_pem(&chain.pop().unwrap()).unwrap(),
        *trusted
    );
    Leaf {
        chain_pem: chain.concat(),
        key_pem: key,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_gets_a_certificate_by_its_token_and_the_next_by_its_certificate() {
    let api = cluster();
    let plane = start(&api).await;
    let trusted = ready(&plane, &api).await;
    let leaf = first(&plane, &trusted).await;
    let described = &trust::describe(&leaf.chain_pem).unwrap()[0];
    assert_eq!(described.uris, [reviews().to_string()]);
    let validity = described.not_after - described.not_before;
    assert!((DAY..DAY + 600).contains(&validity), "{validity}");

    let (csr, _) = csr::make(&reviews()).unwrap();
    let by_certificate = source(&trusted, None, Some(&leaf));
    let address = plane.addresses.secure_grpc;
    let hour = CertificateRequest {
        validity_duration: 3600,
        ..request(&csr)
    };
    let next = ask(address, &by_certificate, hour).await.unwrap();
    let next = &trust::describe(&next.cert_chain[0]).unwrap()[0];
    assert_eq!(next.uris, [reviews().to_string()]);
    assert!(next.not_after - next.not_before < 3600 + 600);

    // A certificate is not enough when the account behind it is gone.
    api.delete("serviceaccounts", "default", "default");
    let refused = ask(address, &by_certificate, request(&csr))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused}");
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_the_callers_is_refused_and_counted() {
    let api = cluster();
    let plane = start(&api).await;
    let trusted = ready(&plane, &api).await;
    let address = plane.addresses.secure_grpc;
    let good = csr::make(&reviews()).unwrap().0;
    let mut refusals = 0;
    let tokens = [
        None,
        Some("unknown"),
        Some("foreign"),
        Some("ignorant"),
        Some("person"),
        Some("admin"),
        Some("pathlike"),
        Some("deleted"),
        Some("bound-gone"),
        Some("bound-earlier"),
        Some("bound-other"),
    ];
    for token in tokens {
        let credentials = source(&trusted, token, None);
        let refused = ask(address, &credentials, request(&good))
            .await
            .unwrap_err();
        assert_eq!(
            refused.code(),
            Code::Unauthenticated,
            "{token:?}: {refused}"
        );
        refusals += 1;
    }
    // A certificate of another root does not even get a connection.
    let stranger = Authority::generate("elsewhere", "Root CA", now(), DAY).unwrap();
    let (csr, key) = csr::make(&reviews()).unwrap();
    let checked = csr::check(&csr, &[reviews()]).unwrap();
    let chain_pem = stranger
        .issue_workload(&checked, &reviews(), now(), DAY)
        .unwrap();
    let stranger = Leaf {
        chain_pem,
        key_pem: key,
    };
    let credentials = source(&trusted, Some("good"), Some(&stranger));
    assert!(ask(address, &credentials, request(&good)).await.is_err());

    let foreign = |id: &str| csr::make(&id.parse().unwrap()).unwrap().0;
    let setting = |name: &str| {
        let value = Wire {
            kind: Some(Kind::StringValue("x".to_owned())),
        };
        Some(Struct {
            fields: [(name.to_owned(), value)].into_iter().collect(),
        })
    };
    let credentials = source(&trusted, Some("good"), None);
    let cases = [
        (
            request(&foreign("spiffe://cluster.local/ns/default/sa/admin")),
            Code::PermissionDenied,
        ),
        (
            request(&foreign(
                "spiffe://cluster.local/ns/istio-system/sa/default",
            )),
            Code::PermissionDenied,
        ),
        (
            request(&foreign("spiffe://elsewhere/ns/default/sa/default")),
            Code::PermissionDenied,
        ),
        (request(""), Code::InvalidArgument),
        (request(&"A".repeat(32 << 10)), Code::InvalidArgument),
        (
            CertificateRequest {
                validity_duration: 100 * 86_400,
                ..request(&good)
            },
            Code::InvalidArgument,
        ),
        (
            CertificateRequest {
                metadata: setting("ImpersonatedIdentity"),
                ..request(&good)
            },
            Code::InvalidArgument,
        ),
        (
            CertificateRequest {
                metadata: setting("CertSigner"),
                ..request(&good)
            },
            Code::InvalidArgument,
        ),
    ];
    for (request, code) in cases {
        let refused = ask(address, &credentials, request.clone())
            .await
            .unwrap_err();
        assert_eq!(refused.code(), code, "{request:?}: {refused}");
        refusals += 1;
    }
    let (_, metrics) = get(plane.addresses.monitoring, "/metrics", "localhost").await;
    for line in [
        format!("citadel_server_csr_count {refusals}"),
        "citadel_server_authentication_failure_count 11".to_owned(),
        "citadel_server_id_extraction_err_count 3".to_owned(),
        "citadel_server_csr_parsing_err_count 2".to_owned(),
        "citadel_server_success_cert_issuance_count 0".to_owned(),
        "citadel_server_csr_sign_err_count{error=\"name\"} 3".to_owned(),
    ] {
        assert!(
            metrics.contains(&format!("\n{line}\n")),
            "{line} is missing in:\n{metrics}"
        );
    }
    plane.stop().await;
}

pub fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_roots_are_in_every_namespace_whoever_changes_them() {
    let api = cluster();
    let plane = start(&api).await;
    let trusted = ready(&plane, &api).await;
    let in_place = async |namespace: &str| {
        until("the roots", async || {
            (roots_in(&api, namespace).as_deref() == Some(trusted.pem())).then_some(())
        })
        .await;
    };
    in_place("istio-system").await;
    api.apply(
        "namespaces",
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "later"}}),
    );
    in_place("later").await;
    let mut map = api
        .get("configmaps", "later", "istio-ca-root-cert")
        .unwrap();
    map["data"]["root-cert.pem"] = json!("somebody else's");
    api.apply("configmaps", map);
    in_place("later").await;
    api.delete("configmaps", "later", "istio-ca-root-cert");
    in_place("later").await;

    // The key survives the control plane, and nobody makes a second one.
    plane.stop().await;
    let again = start(&api).await;
    assert_eq!(ready(&again, &api).await, trusted);
    again.stop().await;
}

/// A Secret `cacerts` as Istio's documentation has it made.
pub fn plugged_in(root: &Authority) -> Value {
    let middle = root
        .intermediate("Istio", "Intermediate CA", now(), 100 * DAY)
        .unwrap();
    let text = |pem: &str| json!(BASE64.encode(pem));
    json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "cacerts", "namespace": "istio-system"},
        "data": {
            "ca-cert.pem": text(middle.certificate_pem()), "ca-key.pem": text(middle.key_pem()),
            "root-cert.pem": text(root.certificate_pem()),
            "cert-chain.pem": text(&format!("{}{}", middle.certificate_pem(), root.certificate_pem())),
        },
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operators_authority_wins_and_a_broken_one_is_not_passed_over() {
    let api = cluster();
    let root = Authority::generate("Istio", "Root CA", now(), 1000 * DAY).unwrap();
    api.apply("secrets", plugged_in(&root));
    let plane = start(&api).await;
    let trusted = ready(&plane, &api).await;
    assert_eq!(trusted, *root.roots());
    let leaf = first(&plane, &trusted).await;
    assert_eq!(trust::describe(&leaf.chain_pem).unwrap().len(), 2);
    assert_eq!(api.get("secrets", "istio-system", "istio-ca-secret"), None);

    let mut broken = plugged_in(&root);
    broken["data"]["ca-key.pem"] = json!(BASE64.encode("no key"));
    api.apply("secrets", broken);
    let addresses = plane.addresses;
    until("the failure", async || {
        let (_, metrics) = get(addresses.monitoring, "/metrics", "localhost").await;
        // It is counted again with everything that is looked at meanwhile.
        let count = metrics
            .lines()
            .find_map(|line| line.strip_prefix("citadel_server_cert_load_failure_count "))?;
        (count != "0").then_some(())
    })
    .await;
    // What was good before goes on.
    first(&plane, &trusted).await;
    assert_eq!(api.get("secrets", "istio-system", "istio-ca-secret"), None);
    plane.stop().await;
}

struct Updates(mpsc::Sender<String>);

impl Handler for Updates {
    async fn update(&mut self, update: Update) -> Vec<Rejection> {
        let _ = self.0.send(update.type_url).await;
        Vec::new()
    }
}

/// Opens a discovery stream on the secure port: the first type that comes, or why there is no stream.
pub async fn discover(
    address: SocketAddr,
    id: &str,
    account: Option<&str>,
    credentials: CredentialSource,
) -> Result<String, String> {
    let text = |text: &str| Wire {
        kind: Some(Kind::StringValue(text.to_owned())),
    };
    let fields = account.map(|account| ("SERVICE_ACCOUNT".to_owned(), text(account)));
    let node = Node {
        id: id.to_owned(),
        metadata: Some(Struct {
            fields: fields.into_iter().collect(),
        }),
        ..Default::default()
    };
    let mut config = ClientConfig::new(vec![format!("localhost:{}", address.port())], node);
    config.credentials = Some(credentials);
    let (client, mut state) = AdsClient::new(config);
    let (sender, mut updates) = mpsc::channel(16);
    let running = tokio::spawn(client.run(Updates(sender)));
    let failed = async {
        loop {
            state.changed().await.unwrap();
            if let mesh_xds::ConnectionState::Connecting { last_error } =
                &*state.borrow_and_update()
                && !last_error.is_empty()
            {
                return last_error.clone();
            }
        }
    };
    let result = tokio::time::timeout(Duration::from_secs(20), async {
        tokio::select! {
            Some(update) = updates.recv() => Ok(update),
            error = failed => Err(error),
        }
    });
    let result = result.await.expect("an answer");
    running.abort();
    result
}

#[tokio::test(flavor = "multi_thread")]
async fn discovery_on_the_secure_port_is_for_whom_the_node_says_it_is() {
    let api = cluster();
    let plane = start(&api).await;
    let trusted = ready(&plane, &api).await;
    let address = plane.addresses.secure_grpc;
    let own = "sidecar~10.244.7.10~reviews-v1.default~default.svc.cluster.local";
    let other = "sidecar~10.244.7.10~reviews-v1.istio-system~istio-system.svc.cluster.local";
    let leaf = first(&plane, &trusted).await;
    let token = || source(&trusted, Some("good"), None);
    let certificate = || source(&trusted, None, Some(&leaf));
    let bound = || source(&trusted, Some("bound"), None);
    for credentials in [token(), certificate(), bound()] {
        assert_eq!(
            discover(address, own, Some("default"), credentials)
                .await
                .as_deref(),
            Ok(CLUSTER)
        );
    }
    for (what, id, account, credentials, code) in [
        (
            "nothing",
            own,
            None,
            source(&trusted, None, None),
            "Unauthenticated",
        ),
        (
            "a bad token",
            own,
            None,
            source(&trusted, Some("foreign"), None),
            "Unauthenticated",
        ),
        (
            "another namespace",
            other,
            None,
            token(),
            "PermissionDenied",
        ),
        (
            "another namespace by certificate",
            other,
            None,
            certificate(),
            "PermissionDenied",
        ),
        (
            "another account",
            own,
            Some("admin"),
            token(),
            "PermissionDenied",
        ),
        (
            "another pod",
            "sidecar~10.244.7.11~reviews-v2.default~default.svc.cluster.local",
            None,
            bound(),
            "PermissionDenied",
        ),
    ] {
        let error = discover(address, id, account, credentials)
            .await
            .unwrap_err();
        assert!(error.contains(code), "{what}: {error}");
    }
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_discovery_can_be_switched_off() {
    let api = cluster();
    let plane = start_with(mesh_control::Options {
        grpc: None,
        ..options(&api)
    })
    .await;
    assert_eq!(plane.addresses.grpc, None);
    ready(&plane, &api).await;
    plane.stop().await;
}

/// A proxy as far as a rotation goes: it says what it is told to say.
pub struct Truster {
    said: Arc<std::sync::Mutex<(Vec<String>, String)>>,
    again: tokio::sync::watch::Sender<u64>,
    pub task: tokio::task::JoinHandle<()>,
}

impl Truster {
    pub fn start(
        plane: &Plane,
        credentials: CredentialSource,
        pod: &str,
        roots: Vec<String>,
        root: &str,
    ) -> Self {
        let said = Arc::new(std::sync::Mutex::new((roots, root.to_owned())));
        let node = Node {
            id: format!("sidecar~10.244.7.10~{pod}.default~default.svc.cluster.local"),
            ..Default::default()
        };
        let address = plane.addresses.secure_grpc;
        let mut config = ClientConfig::new(vec![format!("localhost:{}", address.port())], node);
        config.credentials = Some(credentials);
        let says = Arc::clone(&said);
        config.node_update = Some(Arc::new(move |node: &mut Node| {
            let text = |text: &String| Wire {
                kind: Some(Kind::StringValue(text.clone())),
            };
            let (roots, root) = &*says.lock().unwrap();
            let roots = envoy_types::pb::google::protobuf::ListValue {
                values: roots.iter().map(text).collect(),
            };
            let fields = [
                (
                    "roots".to_owned(),
                    Wire {
                        kind: Some(Kind::ListValue(roots)),
                    },
                ),
                ("root".to_owned(), text(root)),
            ];
            let trust = Struct {
                fields: fields.into_iter().collect(),
            };
            let trust = Wire {
                kind: Some(Kind::StructValue(trust)),
            };
            let metadata = node.metadata.get_or_insert_default();
            metadata.fields.insert("TRUST".to_owned(), trust);
        }));
        let (again, reconnect) = tokio::sync::watch::channel(0);
        config.reconnect = Some(reconnect);
        let (client, _) = AdsClient::new(config);
        let (sender, mut updates) = mpsc::channel(16);
        let task = tokio::spawn(async move {
            tokio::select! {
                () = client.run(Updates(sender)) => {}
                () = async { while updates.recv().await.is_some() {} } => {}
            }
        });
        Self { said, again, task }
    }

    pub fn say(&self, roots: Vec<String>, root: &str) {
        *self.said.lock().unwrap() = (roots, root.to_owned());
        self.again.send_modify(|number| *number += 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_is_changed_when_everybody_trusts_the_next_and_forgotten_when_nobody_needs_it() {
    let api = cluster();
    let plane = start(&api).await;
    let old = ready(&plane, &api).await;
    let old_root = old.fingerprints().remove(0);
    let credentials = source(&old, Some("bound"), None);
    let trusts = vec![old_root.clone()];
    let proxy = Truster::start(&plane, credentials, "reviews-v1", trusts, &old_root);
    let addresses = plane.addresses;
    until("the proxy's connection", async || {
        let (_, metrics) = get(addresses.monitoring, "/metrics", "localhost").await;
        let connected = |line: &str| line.starts_with("pilot_xds") && line.ends_with(" 1");
        metrics.lines().any(connected).then_some(())
    })
    .await;
    let mut secret = api
        .get("secrets", "istio-system", "istio-ca-secret")
        .unwrap();
    secret["metadata"]["annotations"] = json!({"security.mesh/rotate-root": "now"});
    api.apply("secrets", secret);

    // 1. Both are trusted, the old one signs.
    let both = until("the next root", async || {
        let roots = TrustBundle::from_pem(&roots_in(&api, "default")?).unwrap();
        (roots.fingerprints().len() == 2).then_some(roots)
    })
    .await;
    assert_eq!(both.fingerprints()[0], old_root);
    let new_root = both.fingerprints().remove(1);
    let waiting = async |what: &str| {
        until(what, async || {
            let map = api.get("configmaps", "istio-system", "istio-ca-rotation")?;
            let said = map["data"]
                .as_object()?
                .values()
                .next()?
                .as_str()?
                .to_owned();
            said.contains("reviews-v1.default").then_some(said)
        })
        .await
    };
    let said = waiting("the proxy that is waited for").await;
    assert!(
        said.contains("\"phase\":\"trust\"") && said.contains("\"done\":0"),
        "{said}"
    );
    let key = |name: &str| {
        let secret = api
            .get("secrets", "istio-system", "istio-ca-secret")
            .unwrap();
        secret["data"][name].as_str().map(str::to_owned)
    };
    assert!(key("next-key.pem").is_some());
    assert!(
        api.get("secrets", "istio-system", "istio-ca-secret")
            .unwrap()["metadata"]["annotations"]
            .get("security.mesh/rotate-root")
            .is_none()
    );

    // 2. The proxy trusts both: the new one signs, and that is what the order says.
    proxy.say(both.fingerprints(), &old_root);
    until("the change of the signer", async || {
        let roots = TrustBundle::from_pem(&roots_in(&api, "default")?).unwrap();
        (roots.fingerprints() == [new_root.clone(), old_root.clone()]).then_some(())
    })
    .await;
    assert_eq!(key("next-key.pem"), None);
    let trusted = both.with_first(&new_root);
    until("a certificate of the new root", async || {
        let (csr, _) = csr::make(&reviews()).unwrap();
        let credentials = source(&trusted, Some("good"), None);
        let answer = ask(plane.addresses.secure_grpc, &credentials, request(&csr))
            .await
            .ok()?;
        (trusted.root_of(&answer.cert_chain[0])? == new_root).then_some(())
    })
    .await;

    // 3. The proxy has one, too: the old root is gone.
    proxy.say(both.fingerprints(), &new_root);
    until("the end of the old root", async || {
        let roots = TrustBundle::from_pem(&roots_in(&api, "default")?).unwrap();
        (roots.fingerprints() == [new_root.clone()]).then_some(())
    })
    .await;
    until("the end of the progress", async || {
        let map = api.get("configmaps", "istio-system", "istio-ca-rotation")?;
        map["data"]
            .as_object()
            .is_none_or(|data| data.is_empty())
            .then_some(())
    })
    .await;
    proxy.task.abort();
    plane.stop().await;
}
