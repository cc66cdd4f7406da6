//! Gateways' secrets, as proxies get them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::Secret;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::secret::Type;
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{Struct, Value as Wire};
use mesh_xds::client::Named;
use mesh_xds::types::SECRET;
use mesh_xds::{AdsClient, ClientConfig, Handler, Node, Rejection, Update};
use prost::Message;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

use crate::api::Api;
use crate::authority::{cluster, ready, source, until};
use crate::control::{Plane, start};

const NAMES: [&str; 2] = ["kubernetes://cert", "kubernetes://clients-cacert"];

struct Secrets(mpsc::UnboundedSender<Secret>);

impl Handler for Secrets {
    async fn update(&mut self, update: Update) -> Vec<Rejection> {
        if update.type_url == SECRET {
            for resource in update.upserts {
                let _ = self.0.send(Secret::decode(resource.value).unwrap());
            }
        }
        Vec::new()
    }
}

/// A gateway in the namespace and of the account of the token `good`, which asks for two secrets.
async fn gateway(plane: &Plane, api: &Api) -> mpsc::UnboundedReceiver<Secret> {
    let trusted = ready(plane, api).await;
    let text = |text: &str| Wire {
        kind: Some(Kind::StringValue(text.to_owned())),
    };
    let labels = Struct {
        fields: [("istio".to_owned(), text("gateway"))].into(),
    };
    let labels = Wire {
        kind: Some(Kind::StructValue(labels)),
    };
    let node = Node {
        id: "router~10.244.7.99~gateway.default~default.svc.cluster.local".to_owned(),
        metadata: Some(Struct {
            fields: [("LABELS".to_owned(), labels)].into(),
        }),
        ..Default::default()
    };
    let address = format!("localhost:{}", plane.addresses.secure_grpc.port());
    let mut config = ClientConfig::new(vec![address], node);
    config.credentials = Some(source(&trusted, Some("good"), None));
    let names: BTreeSet<String> = NAMES.map(str::to_owned).into();
    let (sender, names) = watch::channel(Arc::new(names));
    config.named = Some(Named {
        type_url: SECRET.to_owned(),
        names,
    });
    let (client, _state) = AdsClient::new(config);
    let (secrets, receiver) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let _wanted = sender;
        client.run(Secrets(secrets)).await;
    });
    receiver
}

fn objects(api: &Api) {
    api.apply(
        "gateways",
        json!({
            "apiVersion": "networking.istio.io/v1", "kind": "Gateway", "metadata": {"name": "secure", "namespace": "default"},
            "spec": {"selector": {"istio": "gateway"}, "servers": [{
                "port": {"number": 443, "name": "https", "protocol": "HTTPS"}, "hosts": ["*"],
                "tls": {"mode": "MUTUAL", "credentialName": "cert", "caCertCredentialName": "clients"},
            }]},
        }),
    );
}

fn secret(name: &str, data: &[(&str, &str)]) -> Value {
    let data: serde_json::Map<String, Value> = data
        .iter()
        .map(|(key, text)| ((*key).to_owned(), BASE64.encode(text).into()))
        .collect();
    json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": "default"}, "data": data})
}

/// What a message holds: of a certificate its key, of roots the roots.
fn content(secret: &Secret) -> (String, String) {
    let data = match &secret.r#type {
        Some(Type::TlsCertificate(certificate)) => certificate.private_key.clone(),
        Some(Type::ValidationContext(context)) => context.trusted_ca.clone(),
        other => panic!("{other:?}"),
    };
    let Some(Specifier::InlineBytes(bytes)) = data.unwrap().specifier else {
        panic!("not inline")
    };
    (secret.name.clone(), String::from_utf8(bytes).unwrap())
}

async fn next(secrets: &mut mpsc::UnboundedReceiver<Secret>) -> (String, String) {
    let next = tokio::time::timeout(Duration::from_secs(20), secrets.recv()).await;
    content(&next.expect("a secret").expect("a stream"))
}

/// Waits until the Gateway's status tells a text.
async fn told(api: &Api, text: &str) {
    until(text, async || {
        let gateway = api.get("gateways", "default", "secure")?;
        gateway["status"].to_string().contains(text).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_gets_its_secrets_as_they_come_and_change() {
    let api = cluster();
    objects(&api);
    let plane = start(&api).await;
    let mut secrets = gateway(&plane, &api).await;
    told(&api, "there is no such Secret").await;
    api.apply(
        "secrets",
        secret("cert", &[("tls.crt", "c"), ("tls.key", "k1")]),
    );
    assert_eq!(
        next(&mut secrets).await,
        (NAMES[0].to_owned(), "k1".to_owned())
    );
    // Another's Secret is nobody's business, and an incomplete one is told.
    api.apply(
        "secrets",
        secret("other", &[("tls.crt", "c"), ("tls.key", "x")]),
    );
    api.apply("secrets", secret("clients", &[("wrong", "r")]));
    told(&api, "has no ca.crt").await;
    api.apply("secrets", secret("clients", &[("ca.crt", "r")]));
    assert_eq!(
        next(&mut secrets).await,
        (NAMES[1].to_owned(), "r".to_owned())
    );
    api.apply(
        "secrets",
        secret("cert", &[("tls.crt", "c"), ("tls.key", "k2")]),
    );
    assert_eq!(
        next(&mut secrets).await,
        (NAMES[0].to_owned(), "k2".to_owned())
    );
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_that_may_not_read_secrets_gets_none() {
    let api = cluster();
    objects(&api);
    api.apply(
        "secrets",
        secret("cert", &[("tls.crt", "c"), ("tls.key", "k")]),
    );
    let denied = json!({"metadata": {"name": "system:serviceaccount:default:default"}});
    api.apply("denials", denied);
    let plane = start(&api).await;
    let mut secrets = gateway(&plane, &api).await;
    told(&api, "may not list secrets").await;
    assert!(secrets.try_recv().is_err());
    plane.stop().await;
}
