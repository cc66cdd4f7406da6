//! The control plane as a whole.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_control::{Addresses, Control, Options};
use mesh_xds::types::{CLUSTER, ENDPOINT, LISTENER, ROUTE};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use crate::api::Api;
use crate::discovery::{self, ID};
use crate::world;

pub struct Plane {
    pub addresses: Addresses,
    stop: Option<oneshot::Sender<()>>,
    task: tokio::task::JoinHandle<()>,
}

/// Options with ports of the system's choice.
pub fn options(api: &Api) -> Options {
    let mut options = Options::new(api.client(), "0.1.0");
    options.grpc = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
    options.linger = Duration::ZERO;
    for address in [
        &mut options.secure_grpc,
        &mut options.webhook,
        &mut options.monitoring,
        &mut options.http,
    ] {
        *address = SocketAddr::from(([127, 0, 0, 1], 0));
    }
    options
}

pub async fn start(api: &Api) -> Plane {
    start_with(options(api)).await
}

pub async fn start_with(options: Options) -> Plane {
    let control = Control::bind(options).await.unwrap();
    let addresses = control.addresses();
    let (stop, stopped) = oneshot::channel::<()>();
    let task = tokio::spawn(async move {
        control
            .run(async {
                let _ = stopped.await;
            })
            .await
            .unwrap();
    });
    Plane {
        addresses,
        stop: Some(stop),
        task,
    }
}

impl Plane {
    pub async fn stop(mut self) {
        drop(self.stop.take());
        let ended = tokio::time::timeout(Duration::from_secs(20), &mut self.task).await;
        ended.expect("the control plane stops").unwrap();
    }
}

/// Status code and body of a GET over plain HTTP.
pub async fn get(address: SocketAddr, path: &str, host: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    exchange(&mut stream, &request).await
}

async fn exchange<S: AsyncReadExt + AsyncWriteExt + Unpin>(
    stream: &mut S,
    request: &str,
) -> (u16, String) {
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // A server that closes without a TLS goodbye has still answered.
    let _ = stream.read_to_end(&mut answer).await;
    let answer = String::from_utf8(answer).unwrap();
    let code = answer.split(' ').nth(1).unwrap().parse().unwrap();
    let body = answer.split_once("\r\n\r\n").unwrap().1.to_owned();
    (code, body)
}

pub async fn eventually<T>(what: &str, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    for _ in 0..400 {
        if let Some(value) = probe().await {
            return value;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{what} did not happen");
}

pub async fn debug(plane: &Plane, path: &str) -> Value {
    let (code, body) = get(plane.addresses.http, path, "localhost").await;
    assert_eq!(code, 200, "{body}");
    serde_json::from_str(&body).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sidecar_gets_everything_and_then_each_change() {
    let api = Api::new();
    world::bookinfo(&api);
    let plane = start(&api).await;
    let mut proxy = discovery::connect(plane.addresses.grpc.unwrap(), ID);
    let first = proxy.complete().await;
    let reviews = "outbound|9080||reviews.default.svc.cluster.local";
    assert!(
        first.held[CLUSTER].contains_key(reviews),
        "{:?}",
        first.held[CLUSTER].keys()
    );
    assert!(first.held[ENDPOINT].contains_key(reviews));
    assert!(first.held[LISTENER].contains_key("virtualOutbound"));
    assert!(first.held[ROUTE].contains_key("9080"));
    assert!(first.mentions(ENDPOINT, "10.244.7.11"));

    api.apply("virtualservices", world::virtual_service("jason"));
    proxy
        .until("the route", |view| view.mentions(ROUTE, "jason"))
        .await;

    // A change of endpoints sends endpoints and nothing else.
    let before = proxy.view.borrow().updates.len();
    let mut slice = api.get("endpointslices", "default", "reviews-x").unwrap();
    slice["endpoints"][1]["conditions"]["ready"] = json!(false);
    api.apply("endpointslices", slice);
    let view = proxy
        .until("the endpoints", |view| {
            !view.mentions(ENDPOINT, "10.244.7.11")
        })
        .await;
    let types: Vec<&str> = view.updates[before..]
        .iter()
        .map(|(type_url, _)| type_url.as_str())
        .collect();
    assert_eq!(types, [ENDPOINT]);

    api.delete("virtualservices", "default", "reviews");
    proxy
        .until("the removal", |view| !view.mentions(ROUTE, "jason"))
        .await;
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_object_is_reported_and_stops_nothing() {
    let api = Api::new();
    world::bookinfo(&api);
    api.apply("virtualservices", world::broken());
    api.apply("virtualservices", world::virtual_service("jason"));
    let plane = start(&api).await;
    let mut proxy = discovery::connect(plane.addresses.grpc.unwrap(), ID);
    proxy
        .until("the good one", |view| view.mentions(ROUTE, "jason"))
        .await;
    let status = eventually("the status", async || {
        let object = api.get("virtualservices", "default", "broken")?;
        object.get("status").cloned()
    })
    .await;
    assert_eq!(status["conditions"][0]["status"], "False");
    let message = status["conditions"][0]["message"].as_str().unwrap();
    assert!(message.contains("hosts"), "{message}");
    assert_eq!(status["validationMessages"][0]["level"], "ERROR");
    let good = api.get("virtualservices", "default", "reviews").unwrap();
    assert!(
        good.get("status").is_none(),
        "an object without problems is left alone: {good}"
    );

    // Mended, it takes effect and its status says so.
    let mut mended = world::virtual_service("mended");
    mended["metadata"]["name"] = json!("broken");
    api.delete("virtualservices", "default", "reviews");
    api.apply("virtualservices", mended);
    proxy
        .until("the mended one", |view| view.mentions(ROUTE, "mended"))
        .await;
    eventually("the new status", async || {
        let object = api.get("virtualservices", "default", "broken")?;
        (object["status"]["conditions"][0]["status"] == "True").then_some(())
    })
    .await;
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_of_another_revision_are_not_read_and_get_no_status() {
    let api = Api::new();
    world::bookinfo(&api);
    let with = |mut object: Value, revision: &str| {
        object["metadata"]["labels"] = json!({ "istio.io/rev": revision });
        object
    };
    api.apply("virtualservices", with(world::broken(), "canary"));
    api.apply(
        "virtualservices",
        with(world::virtual_service("theirs"), "canary"),
    );
    let plane = start(&api).await;
    let mut proxy = discovery::connect(plane.addresses.grpc.unwrap(), ID);
    let first = proxy.complete().await;
    assert!(!first.mentions(ROUTE, "theirs"));
    api.apply(
        "virtualservices",
        with(world::virtual_service("ours"), "default"),
    );
    // One that is written after it, so that its turn has come when this one's has.
    let mut own = world::broken();
    own["metadata"]["name"] = json!("z-own");
    api.apply("virtualservices", own);
    proxy
        .until("the route", |view| view.mentions(ROUTE, "ours"))
        .await;
    eventually("the status of the object without a revision", async || {
        let object = api.get("virtualservices", "default", "z-own")?;
        object.get("status").map(|_| ())
    })
    .await;
    let theirs = api.get("virtualservices", "default", "broken").unwrap();
    assert!(theirs.get("status").is_none(), "{theirs}");
    api.apply(
        "virtualservices",
        with(world::virtual_service("ours"), "canary"),
    );
    proxy
        .until("the removal", |view| !view.mentions(ROUTE, "ours"))
        .await;
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_control_plane_that_ends_serves_on_for_a_moment() {
    let api = Api::new();
    world::bookinfo(&api);
    webhooks(&api);
    let mut options = options(&api);
    // A moment that ends when the test does.
    options.linger = Duration::from_secs(3600);
    let mut plane = start_with(options).await;
    let ready = async |code: u16| {
        eventually(&format!("/ready with {code}"), async || {
            (get(plane.addresses.http, "/ready", "10.244.0.9").await.0 == code).then_some(())
        })
        .await;
    };
    ready(200).await;
    drop(plane.stop.take());
    ready(503).await;
    let request = json!({"uid": "u", "operation": "CREATE", "namespace": "default", "object": world::virtual_service("x")});
    let answer = review(&api, &plane, "/validate", request).await;
    assert_eq!(answer["response"]["allowed"], true, "{answer}");
    let mut proxy = discovery::connect(plane.addresses.grpc.unwrap(), ID);
    proxy.complete().await;
    // It still follows what changes.
    api.apply("virtualservices", world::virtual_service("late"));
    proxy
        .until("the route", |view| view.mentions(ROUTE, "late"))
        .await;
    assert!(
        TcpStream::connect(plane.addresses.secure_grpc)
            .await
            .is_ok()
    );
    plane.task.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_under_way_is_finished_when_a_control_plane_closes() {
    let api = Api::new();
    world::bookinfo(&api);
    webhooks(&api);
    let mut plane = start(&api).await;
    let mut stream = caller(&api, &plane).await;
    let request = json!({"uid": "u", "operation": "CREATE", "namespace": "default", "object": world::virtual_service("x")});
    let (head, body) = review_request("/validate", request);
    let (first, rest) = body.split_at(10);
    // The server has seen the request once it asks for the body.
    let head = head.replace("\r\nhost", "\r\nexpect: 100-continue\r\nhost");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut seen = Vec::new();
    while !seen.ends_with(b"\r\n\r\n") {
        seen.push(stream.read_u8().await.unwrap());
    }
    assert!(seen.starts_with(b"HTTP/1.1 100"));
    stream.write_all(first.as_bytes()).await.unwrap();
    drop(plane.stop.take());
    eventually("the end of new connections", async || {
        TcpStream::connect(plane.addresses.webhook)
            .await
            .is_err()
            .then_some(())
    })
    .await;
    let (code, answer) = exchange(&mut stream, rest).await;
    assert_eq!(code, 200, "{answer}");
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_kind_is_waited_for() {
    let api = Api::new().without("virtualservices");
    world::bookinfo(&api);
    let plane = start(&api).await;
    let mut proxy = discovery::connect(plane.addresses.grpc.unwrap(), ID);
    proxy.complete().await;
    api.add_kind("virtualservices");
    api.apply("virtualservices", world::virtual_service("jason"));
    proxy
        .until("the route", |view| view.mentions(ROUTE, "jason"))
        .await;
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_control_plane_sends_only_the_difference() {
    let api = Api::new();
    world::bookinfo(&api);
    let first = start(&api).await;
    let mut proxy = discovery::connect(first.addresses.grpc.unwrap(), ID);
    let held = proxy.complete().await;
    drop(proxy);
    first.stop().await;
    api.apply("virtualservices", world::virtual_service("jason"));
    let second = start(&api).await;
    let mut proxy = discovery::run(second.addresses.grpc.unwrap(), ID, None, held.versions());
    let view = proxy
        .until("the route", |view| view.mentions(ROUTE, "jason"))
        .await;
    let names: Vec<&String> = view.updates.iter().flat_map(|(_, names)| names).collect();
    assert_eq!(names, ["9080"], "only the route that changed");
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn debug_pages_show_who_took_what() {
    let api = Api::new();
    world::bookinfo(&api);
    let plane = start(&api).await;
    let refused = "outbound|9080||reviews.default.svc.cluster.local";
    let mut proxy = discovery::run(
        plane.addresses.grpc.unwrap(),
        ID,
        Some(refused),
        Default::default(),
    );
    proxy.complete().await;
    let row = eventually("the acknowledgements", async || {
        let row = debug(&plane, "/debug/syncz").await[0].clone();
        (row["route_status"] == "SYNCED" && row["cluster_status"] == "NACK").then_some(row)
    })
    .await;
    assert_eq!(row["proxy"], "reviews-v1.default");
    assert_eq!(row["listener_status"], "SYNCED");
    let ads = debug(&plane, "/debug/adsz").await;
    assert_eq!(
        ads["clients"][0]["watches"]["CDS"]["rejected"][refused],
        "refused by the test"
    );
    let dump = debug(&plane, "/debug/config_dump?proxyID=reviews-v1.default").await;
    assert!(dump.to_string().contains("virtualOutbound"));
    let (code, body) = get(
        plane.addresses.http,
        "/debug/config_dump?proxyID=nobody.default",
        "localhost",
    )
    .await;
    assert_eq!(code, 404, "{body}");
    let (code, _) = get(plane.addresses.http, "/debug/syncz", "evil.example").await;
    assert_eq!(code, 403, "another name in Host");
    let (_, metrics) = get(plane.addresses.monitoring, "/metrics", "localhost").await;
    assert!(
        metrics.contains("pilot_xds{version=\"0.1.0\"} 1"),
        "{metrics}"
    );
    assert!(metrics.contains("pilot_services 1"), "{metrics}");
    assert!(
        metrics.contains("pilot_total_xds_rejects_total 2")
            || metrics.contains("pilot_total_xds_rejects_total 1"),
        "{metrics}"
    );
    drop(proxy);
    eventually("the disconnection", async || {
        (debug(&plane, "/debug/adsz").await["totalClients"] == 0).then_some(())
    })
    .await;
    plane.stop().await;
}

/// A connection to the webhooks, trusting what the control plane wrote into the webhook's configuration.
async fn caller(api: &Api, plane: &Plane) -> tokio_rustls::client::TlsStream<TcpStream> {
    use base64::Engine;
    let bundle = eventually("the CA bundle", async || {
        let configuration = api.get(
            "mutatingwebhookconfigurations",
            "",
            "istio-sidecar-injector",
        )?;
        configuration["webhooks"][0]["clientConfig"]["caBundle"]
            .as_str()
            .map(str::to_owned)
    })
    .await;
    let bundle = base64::engine::general_purpose::STANDARD
        .decode(bundle)
        .unwrap();
    let config =
        mesh_identity::tls::client_config(&String::from_utf8(bundle).unwrap(), &["http/1.1"])
            .unwrap();
    let name = rustls::pki_types::ServerName::try_from("istiod.istio-system.svc").unwrap();
    let stream = TcpStream::connect(plane.addresses.webhook).await.unwrap();
    tokio_rustls::TlsConnector::from(config)
        .connect(name, stream)
        .await
        .unwrap()
}

/// Head and body of a request with an AdmissionReview.
fn review_request(path: &str, request: Value) -> (String, String) {
    let body =
        json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request})
            .to_string();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: istiod.istio-system.svc\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    (head, body)
}

/// Posts an AdmissionReview to the webhooks.
async fn review(api: &Api, plane: &Plane, path: &str, request: Value) -> Value {
    let mut stream = caller(api, plane).await;
    let (head, body) = review_request(path, request);
    let (code, body) = exchange(&mut stream, &(head + &body)).await;
    assert_eq!(code, 200, "{body}");
    serde_json::from_str(&body).unwrap()
}

fn webhooks(api: &Api) {
    let service = |path: &str| json!({"service": {"name": "istiod", "namespace": "istio-system", "path": path, "port": 443}});
    api.apply(
        "mutatingwebhookconfigurations",
        json!({
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration",
            "metadata": {"name": "istio-sidecar-injector"},
            "webhooks": [{"name": "namespace.sidecar-injector.istio.io", "failurePolicy": "Fail", "clientConfig": service("/inject")}],
        }),
    );
    api.apply(
        "validatingwebhookconfigurations",
        json!({
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
            "metadata": {"name": "istio-validator-istio-system"},
            "webhooks": [{"name": "rev.validation.istio.io", "failurePolicy": "Ignore", "clientConfig": service("/validate")}],
        }),
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_webhooks_inject_and_validate_over_trusted_tls() {
    let api = Api::new();
    world::bookinfo(&api);
    webhooks(&api);
    let plane = start(&api).await;
    eventually("readiness", async || {
        (get(plane.addresses.http, "/ready", "10.244.0.9").await.0 == 200).then_some(())
    })
    .await;
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"generateName": "details-", "namespace": "default", "labels": {"app": "details"}},
        "spec": {"containers": [{"name": "details", "image": "details:1"}]},
    });
    let request =
        json!({"uid": "u1", "operation": "CREATE", "namespace": "default", "object": pod});
    let answer = review(&api, &plane, "/inject", request).await;
    assert_eq!(answer["response"]["uid"], "u1");
    assert_eq!(answer["response"]["allowed"], true, "{answer}");
    use base64::Engine;
    let patch = base64::engine::general_purpose::STANDARD
        .decode(answer["response"]["patch"].as_str().unwrap())
        .unwrap();
    let patch: json_patch::Patch = serde_json::from_slice(&patch).unwrap();
    let mut injected = pod;
    json_patch::patch(&mut injected, &patch).unwrap();
    // The node's kubelet runs native sidecars, so the proxy is an init container.
    let names: Vec<&str> = injected["spec"]["initContainers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|container| container["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["istio-init", "istio-proxy"]);

    let request = json!({"uid": "u2", "operation": "CREATE", "namespace": "default", "object": world::broken()});
    let answer = review(&api, &plane, "/validate", request).await;
    assert_eq!(answer["response"]["allowed"], false);
    let message = answer["response"]["status"]["message"].as_str().unwrap();
    assert!(message.contains("spec.hosts"), "{message}");
    let request = json!({"uid": "u3", "operation": "CREATE", "namespace": "default", "object": world::virtual_service("x")});
    let answer = review(&api, &plane, "/validate", request).await;
    assert_eq!(answer["response"]["allowed"], true, "{answer}");

    eventually("binding validation", async || {
        let configuration = api.get(
            "validatingwebhookconfigurations",
            "",
            "istio-validator-istio-system",
        )?;
        (configuration["webhooks"][0]["failurePolicy"] == "Fail").then_some(())
    })
    .await;
    // The bundle heals, and the authority survives a restart.
    let secret = api
        .get("secrets", "istio-system", "istio-ca-secret")
        .unwrap();
    let mut configuration = api
        .get(
            "mutatingwebhookconfigurations",
            "",
            "istio-sidecar-injector",
        )
        .unwrap();
    configuration["webhooks"][0]["clientConfig"]["caBundle"] = json!("AAAA");
    api.apply("mutatingwebhookconfigurations", configuration);
    eventually("healing", async || {
        let configuration = api.get(
            "mutatingwebhookconfigurations",
            "",
            "istio-sidecar-injector",
        )?;
        (configuration["webhooks"][0]["clientConfig"]["caBundle"] != "AAAA").then_some(())
    })
    .await;
    plane.stop().await;
    let second = start(&api).await;
    let request = json!({"uid": "u4", "operation": "CREATE", "namespace": "default", "object": world::virtual_service("x")});
    review(&api, &second, "/validate", request).await;
    assert_eq!(
        api.get("secrets", "istio-system", "istio-ca-secret")
            .unwrap()["data"],
        secret["data"]
    );
    second.stop().await;
}

fn accepted(object: &Value) -> Option<(String, String)> {
    let conditions = object["status"]["conditions"].as_array()?;
    let condition = conditions
        .iter()
        .find(|condition| condition["type"] == "Accepted")?;
    let text = |field: &str| condition[field].as_str().unwrap().to_owned();
    Some((text("status"), text("message")))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_proxy_refuses_stands_on_all_objects_that_made_it() {
    let api = Api::new();
    world::bookinfo(&api);
    api.apply(
        "destinationrules",
        json!({
            "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
            "metadata": {"name": "rule", "namespace": "default"},
            "spec": {"host": "reviews", "trafficPolicy": {"loadBalancer": {"simple": "RANDOM"}}},
        }),
    );
    api.apply("envoyfilters", json!({
        "apiVersion": "networking.istio.io/v1alpha3", "kind": "EnvoyFilter",
        "metadata": {"name": "patch", "namespace": "default"},
        "spec": {"configPatches": [{
            "applyTo": "CLUSTER", "match": {"cluster": {"service": "reviews.default.svc.cluster.local"}},
            "patch": {"operation": "MERGE", "value": {"connect_timeout": "3s"}},
        }]},
    }));
    let plane = start(&api).await;
    let refused = "outbound|9080||reviews.default.svc.cluster.local";
    let mut proxy = discovery::run(
        plane.addresses.grpc.unwrap(),
        ID,
        Some(refused),
        Default::default(),
    );
    proxy.complete().await;
    for (plural, name) in [("destinationrules", "rule"), ("envoyfilters", "patch")] {
        let (status, message) = eventually("the refusal", async || {
            accepted(&api.get(plural, "default", name)?)
        })
        .await;
        assert_eq!(status, "False");
        assert_eq!(
            message,
            format!("sidecar reviews-v1.default: cluster {refused}: refused by the test")
        );
    }
    drop(proxy);
    eventually("its end", async || {
        let (status, _) = accepted(&api.get("envoyfilters", "default", "patch")?)?;
        (status == "True").then_some(())
    })
    .await;
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_several_control_planes_writes_statuses_and_another_takes_over() {
    let api = Api::new();
    world::bookinfo(&api);
    let holder = |api: &Api| {
        let lease = api.get("leases", "istio-system", "istio-status-leader")?;
        let holder = lease["spec"]["holderIdentity"].as_str()?.to_owned();
        (!holder.is_empty()).then_some(holder)
    };
    let first = start(&api).await;
    let leader = eventually("an election", async || holder(&api)).await;
    let second = start(&api).await;
    api.apply("virtualservices", world::broken());
    let told = async |name: &str| {
        eventually("the status", async || {
            let object = api.get("virtualservices", "default", name)?;
            object.get("status").cloned()
        })
        .await
    };
    told("broken").await;
    assert_eq!(holder(&api).as_ref(), Some(&leader));
    first.stop().await;
    let next = eventually("another leader", async || {
        holder(&api).filter(|holder| *holder != leader)
    })
    .await;
    assert_ne!(next, leader);
    let mut other = world::broken();
    other["metadata"]["name"] = json!("other");
    api.apply("virtualservices", other);
    told("other").await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revision_has_its_own_settings_and_marks_its_pods() {
    let api = Api::new();
    world::bookinfo(&api);
    webhooks(&api);
    let options = options(&api).of_revision("canary");
    assert_eq!(options.service, "istiod-canary");
    let plane = start_with(Options {
        service: "istiod".to_owned(),
        ..options
    })
    .await;
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"generateName": "details-", "namespace": "default", "labels": {"app": "details"}},
        "spec": {"containers": [{"name": "details", "image": "details:1"}]},
    });
    eventually("readiness", async || {
        (get(plane.addresses.http, "/ready", "10.244.0.9").await.0 == 200).then_some(())
    })
    .await;
    let request = json!({"uid": "u", "operation": "CREATE", "namespace": "default", "object": pod});
    let answer = review(&api, &plane, "/inject", request).await;
    use base64::Engine;
    let patch = base64::engine::general_purpose::STANDARD
        .decode(answer["response"]["patch"].as_str().unwrap())
        .unwrap();
    let patch: json_patch::Patch = serde_json::from_slice(&patch).unwrap();
    let mut injected = pod;
    json_patch::patch(&mut injected, &patch).unwrap();
    assert_eq!(
        injected["metadata"]["annotations"]["istio.io/rev"],
        "canary"
    );
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_named() {
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut options = Options::new(Api::new().client(), "0.1.0");
    for address in [
        &mut options.webhook,
        &mut options.monitoring,
        &mut options.http,
    ] {
        *address = SocketAddr::from(([127, 0, 0, 1], 0));
    }
    options.grpc = Some(taken.local_addr().unwrap());
    let error = Control::bind(options).await.err().unwrap().to_string();
    assert!(
        error.contains(&taken.local_addr().unwrap().to_string()),
        "{error}"
    );
    assert!(error.contains("discovery"), "{error}");
}
