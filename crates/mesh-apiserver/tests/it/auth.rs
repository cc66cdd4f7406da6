//! Who may come in, service account tokens, what a browser may not do, and the server over TLS.

use std::sync::Arc;

use axum::body::Body;
use kube::api::{Api as KubeApi, ListParams};
use mesh_apiserver::{ApiServer, Identity};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::support::{ADMIN_TOKEN, Answer, Api, CONFIG_MAPS, PODS, config_map, options, pod};

fn real() -> Api {
    let server = ApiServer::open(options(None)).unwrap();
    let router = server.router();
    Api { server, router }
}

async fn with_token(api: &Api, token: &str, path: &str) -> Answer {
    api.send(
        "GET",
        path,
        &[("authorization", &format!("Bearer {token}"))],
        Body::empty(),
    )
    .await
}

#[tokio::test]
async fn only_tokens_open_the_door() {
    let api = real();
    assert_eq!(api.get("/livez").await.ok(), "ok");
    api.get("/version").await.ok();
    api.get(CONFIG_MAPS).await.fails(403);
    api.get("/api").await.fails(403);
    let refused = with_token(&api, "wrong", CONFIG_MAPS).await.fails(401);
    assert_eq!(refused["reason"], "Unauthorized");
    with_token(&api, ADMIN_TOKEN, CONFIG_MAPS).await.ok();
    let admin = format!("Bearer {ADMIN_TOKEN}");
    for (name, value) in [
        ("host", "evil.example"),
        ("origin", "https://evil.example"),
        ("impersonate-user", "nobody"),
    ] {
        api.send(
            "GET",
            CONFIG_MAPS,
            &[("authorization", &admin), (name, value)],
            Body::empty(),
        )
        .await
        .fails(403);
    }
    api.send(
        "GET",
        CONFIG_MAPS,
        &[("authorization", &admin), ("host", "127.0.0.1:6443")],
        Body::empty(),
    )
    .await
    .ok();
}

#[tokio::test]
async fn users_have_tokens_and_groups_of_their_own() {
    const TOKEN: &str = "a-token-that-is-janes";
    let mut options = options(None);
    let jane = Identity::user("jane", "7", &["ops".to_owned()]);
    options.users = vec![(TOKEN.to_owned(), jane)];
    let api = Api::open(options);
    let door = Api {
        server: api.server.clone(),
        router: api.server.router(),
    };
    with_token(&door, TOKEN, "/api").await.ok();
    with_token(&door, TOKEN, CONFIG_MAPS).await.fails(403);
    with_token(&door, &TOKEN[1..], "/api").await.fails(401);
    let binding = json!({
        "kind": "ClusterRoleBinding", "metadata": { "name": "ops" },
        "roleRef": { "kind": "ClusterRole", "name": "view" }, "subjects": [{ "kind": "Group", "name": "ops" }],
    });
    api.post(
        "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
        &binding,
    )
    .await
    .ok();
    with_token(&door, TOKEN, CONFIG_MAPS).await.ok();
    let review = async |audiences: Value| {
        let body = json!({ "spec": { "token": TOKEN, "audiences": audiences } });
        api.post("/apis/authentication.k8s.io/v1/tokenreviews", &body)
            .await
            .ok()["status"]
            .clone()
    };
    assert_eq!(
        review(json!([])).await["user"],
        json!({ "username": "jane", "groups": ["ops", "system:authenticated"], "uid": "7" })
    );
    let other = review(json!(["istio-ca"])).await;
    assert_eq!(other["authenticated"], false, "{other}");
}

#[tokio::test]
async fn service_account_tokens() {
    let api = Api::new();
    let accounts = "/api/v1/namespaces/default/serviceaccounts";
    let account =
        json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": "web" } });
    api.post(accounts, &account).await.ok();
    let mut bound = pod("p");
    bound["spec"]["serviceAccountName"] = "web".into();
    let uid = api.post(PODS, &bound).await.ok()["metadata"]["uid"].clone();
    let ask = |audiences: Value| {
        json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": { "audiences": audiences, "expirationSeconds": 3600, "boundObjectRef": { "kind": "Pod", "name": "p", "uid": uid } },
        })
    };
    let token_for = async |audiences: Value| {
        let answer = api
            .post(&format!("{accounts}/web/token"), &ask(audiences))
            .await;
        assert_eq!(answer.code, 201, "{}", answer.body);
        answer.body["status"]["token"].as_str().unwrap().to_owned()
    };
    let (general, istio) = (
        token_for(json!([])).await,
        token_for(json!(["istio-ca"])).await,
    );

    let mut secret = ask(json!([]));
    secret["spec"]["boundObjectRef"] = json!({ "kind": "Secret", "name": "s" });
    let refused = api.post(&format!("{accounts}/web/token"), &secret).await;
    let refused = refused.fails(400);
    assert!(refused["message"].as_str().unwrap().contains("\"Secret\""));

    let review = async |token: &str, audiences: Value| {
        let body = json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": { "token": token, "audiences": audiences } });
        api.post("/apis/authentication.k8s.io/v1/tokenreviews", &body)
            .await
            .ok()["status"]
            .clone()
    };
    let status = review(&istio, json!(["istio-ca"])).await;
    assert_eq!(
        (&status["authenticated"], &status["audiences"]),
        (&json!(true), &json!(["istio-ca"]))
    );
    assert_eq!(
        status["user"]["username"],
        "system:serviceaccount:default:web"
    );
    assert_eq!(
        status["user"]["extra"]["authentication.kubernetes.io/pod-name"],
        json!(["p"])
    );
    assert_eq!(
        review(&istio, json!([])).await["authenticated"],
        false,
        "a token for others is not for the API"
    );
    assert_eq!(review("junk", json!([])).await["authenticated"], false);

    let door = Api {
        server: api.server.clone(),
        router: api.server.router(),
    };
    with_token(&door, &general, "/api").await.ok();
    with_token(&door, &general, CONFIG_MAPS).await.fails(403);
    with_token(&door, &istio, CONFIG_MAPS).await.fails(401);
    api.delete(&format!("{PODS}/p")).await.ok();
    with_token(&door, &general, CONFIG_MAPS).await.fails(401);
    assert_eq!(
        review(&istio, json!(["istio-ca"])).await["authenticated"],
        false,
        "the pod is gone"
    );
}

#[tokio::test]
async fn a_real_client_over_tls() {
    let authority =
        mesh_identity::ca::Authority::generate("test", "test CA", 1_700_000_000, 2_000_000_000)
            .unwrap();
    let leaf = authority
        .issue_server(
            &["localhost"],
            &["127.0.0.1".parse().unwrap()],
            1_700_000_000,
            2_000_000_000,
        )
        .unwrap();
    let tls = mesh_identity::tls::server_config(&leaf, &["h2", "http/1.1"]).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let api = real();
    let stop = CancellationToken::new();
    let server = tokio::spawn({
        let (server, stop) = (api.server.clone(), stop.clone());
        async move { server.serve(listener, Arc::clone(&tls), stop).await }
    });
    let kubeconfig = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "contexts": [{ "name": "c", "context": { "cluster": "c", "user": "u" } }],
        "users": [{ "name": "u", "user": { "token": ADMIN_TOKEN } }],
        "clusters": [{ "name": "c", "cluster": {
            "server": format!("https://127.0.0.1:{port}"), "certificate-authority-data": base64(authority.certificate_pem()),
        } }],
    });
    let kubeconfig = kube::config::Kubeconfig::from_yaml(&kubeconfig.to_string()).unwrap();
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &Default::default())
        .await
        .unwrap();
    let client = kube::Client::try_from(config).unwrap();
    let namespaces: KubeApi<k8s_openapi::api::core::v1::Namespace> = KubeApi::all(client);
    assert_eq!(
        namespaces
            .list(&ListParams::default())
            .await
            .unwrap()
            .items
            .len(),
        4
    );
    stop.cancel();
    server.await.unwrap();
}

fn base64(text: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(text)
}

#[tokio::test]
async fn fields_are_managed_by_who_writes_them() {
    for (username, manager) in [
        ("system:kube-controller-manager", "kube-controller-manager"),
        ("system:node:mesh-node", "kubelet"),
    ] {
        let api = Api::new();
        let router = api
            .server
            .router_as(mesh_apiserver::Identity::system(username));
        let body = config_map("a", json!({ "k": "1" })).to_string();
        let request = http::Request::post(CONFIG_MAPS)
            .header("content-type", "application/json")
            .body(axum::body::Body::from(body))
            .unwrap();
        let response = tower::ServiceExt::oneshot(router, request).await.unwrap();
        assert_eq!(response.status(), 201);
        let stored = api.get(&format!("{CONFIG_MAPS}/a")).await.ok();
        assert_eq!(stored["metadata"]["managedFields"][0]["manager"], manager);
    }
}
