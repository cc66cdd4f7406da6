//! The root when somebody meddles with it: Secrets that are deleted or changed, proxies that lie or are dead while it changes, and a flood
//! on the plain port.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use mesh_identity::ca::Authority;
use mesh_identity::trust::TrustBundle;
use mesh_xds::channel::CredentialSource;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use crate::api::Api;
use crate::authority::{
    DAY, Truster, cluster, discover, first, now, plugged_in, ready, roots_in, source, until,
};
use crate::control::{Plane, get, start};

const SECRET: (&str, &str, &str) = ("secrets", "istio-system", "istio-ca-secret");

/// The value of a metric once it is not zero.
async fn counted(plane: &Plane, name: &str) -> u64 {
    until(name, async || {
        let (_, metrics) = get(plane.addresses.monitoring, "/metrics", "localhost").await;
        let line = metrics
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        line.parse().ok().filter(|count| *count > 0)
    })
    .await
}

fn secret(api: &Api) -> Option<Value> {
    api.get(SECRET.0, SECRET.1, SECRET.2)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_secret_is_written_again_and_a_changed_one_does_not_swap_the_root() {
    let api = cluster();
    let plane = start(&api).await;
    let trusted = ready(&plane, &api).await;
    let before = secret(&api).unwrap();
    for count in 1..=2 {
        api.delete(SECRET.0, SECRET.1, SECRET.2);
        let again = until("the Secret", async || secret(&api)).await;
        for key in ["ca-cert.pem", "ca-key.pem", "root-cert.pem"] {
            assert_eq!(again["data"][key], before["data"][key], "{key}");
        }
        until("the count", async || {
            let name = "citadel_server_secret_restored_count";
            (counted(&plane, name).await == count).then_some(())
        })
        .await;
    }
    // Somebody else's authority in its place is none.
    let other = Authority::generate("cluster.local", "Root CA", now(), 100 * DAY).unwrap();
    let text = |pem: &str| json!(BASE64.encode(pem));
    let mut changed = before.clone();
    changed["data"]["ca-cert.pem"] = text(other.certificate_pem());
    changed["data"]["ca-key.pem"] = text(other.key_pem());
    changed["data"]["root-cert.pem"] = text(other.certificate_pem());
    api.apply("secrets", changed);
    counted(&plane, "citadel_server_cert_load_failure_count").await;
    let leaf = first(&plane, &trusted).await;
    assert!(trusted.root_of(&leaf.chain_pem).is_some());
    assert_eq!(roots_in(&api, "default").as_deref(), Some(trusted.pem()));
    plane.stop().await;
    // A start takes what is there.
    let again = start(&api).await;
    until("the other root", async || {
        (roots_in(&api, "default").as_deref() == Some(other.roots().pem())).then_some(())
    })
    .await;
    again.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_control_plane_that_missed_the_steps_of_a_rotation_follows_it() {
    let api = cluster();
    let plane = start(&api).await;
    let trusted = ready(&plane, &api).await;
    let old_root = trusted.fingerprints().swap_remove(0);
    let next = Authority::generate("cluster.local", "Root CA", now(), 100 * DAY).unwrap();
    let text = |pem: &str| json!(BASE64.encode(pem));
    let mut last = secret(&api).unwrap();
    last["data"]["ca-cert.pem"] = text(next.certificate_pem());
    last["data"]["ca-key.pem"] = text(next.key_pem());
    last["data"]["root-cert.pem"] = text(next.certificate_pem());
    last["metadata"]["annotations"] = json!({"security.mesh/former-root": old_root});
    api.apply("secrets", last);
    until("the root that the others have", async || {
        (roots_in(&api, "default").as_deref() == Some(next.roots().pem())).then_some(())
    })
    .await;
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operators_root_changes_in_two_steps_or_not_at_all() {
    let api = cluster();
    let old = Authority::generate("Istio", "Old root", now(), 1000 * DAY).unwrap();
    let new = Authority::generate("Istio", "New root", now(), 1000 * DAY).unwrap();
    let with_roots = |of: &Authority, roots: &[&Authority]| {
        let mut secret = plugged_in(of);
        let pem: String = roots.iter().map(|root| root.certificate_pem()).collect();
        secret["data"]["root-cert.pem"] = json!(BASE64.encode(pem));
        secret
    };
    let published = async |roots: &[&Authority]| {
        let wanted: Vec<&str> = roots.iter().map(|root| root.root()).collect();
        until("the roots", async || {
            let found = TrustBundle::from_pem(&roots_in(&api, "default")?).unwrap();
            (found.fingerprints() == wanted).then_some(found)
        })
        .await
    };
    api.apply("secrets", plugged_in(&old));
    let plane = start(&api).await;
    let trusted = ready(&plane, &api).await;
    let failures = "citadel_server_cert_load_failure_count";

    api.apply("secrets", plugged_in(&new));
    let refused = counted(&plane, failures).await;
    first(&plane, &trusted).await;
    assert_eq!(roots_in(&api, "default").as_deref(), Some(trusted.pem()));
    // Deleted: nobody makes another root either.
    api.delete("secrets", "istio-system", "cacerts");
    until("the second failure", async || {
        (counted(&plane, failures).await > refused).then_some(())
    })
    .await;
    first(&plane, &trusted).await;
    assert_eq!(secret(&api), None);
    // In one step, with both roots: those who know the old one alone would not trust what the new one signs.
    let before = counted(&plane, failures).await;
    api.apply("secrets", with_roots(&new, &[&old, &new]));
    until("the third failure", async || {
        (counted(&plane, failures).await > before).then_some(())
    })
    .await;
    first(&plane, &trusted).await;
    assert_eq!(roots_in(&api, "default").as_deref(), Some(trusted.pem()));
    // Step by step.
    api.apply("secrets", with_roots(&old, &[&old, &new]));
    published(&[&old, &new]).await;
    api.apply("secrets", with_roots(&new, &[&old, &new]));
    published(&[&new, &old]).await;
    api.apply("secrets", with_roots(&new, &[&new]));
    let trusted = published(&[&new]).await;
    until("a certificate of the new root", async || {
        let leaf = first(&plane, &trusted).await;
        (trusted.root_of(&leaf.chain_pem).as_deref() == Some(new.root())).then_some(())
    })
    .await;
    plane.stop().await;
}

/// What a control plane says of a rotation.
fn said(api: &Api) -> Option<Value> {
    let map = api.get("configmaps", "istio-system", "istio-ca-rotation")?;
    let text = map["data"]
        .as_object()?
        .values()
        .next()?
        .as_str()?
        .to_owned();
    serde_json::from_str(&text).ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_speaks_for_a_dead_proxy_and_an_operator_goes_on_without_it() {
    let api = cluster();
    for pod in ["reviews-v1", "reviews-v2"] {
        let mut pod = api.get("pods", "default", pod).unwrap();
        pod["metadata"]["annotations"] = json!({"sidecar.istio.io/status": "{}"});
        api.apply("pods", pod);
    }
    let plane = start(&api).await;
    let old = ready(&plane, &api).await;
    let old_root = old.fingerprints().remove(0);
    let trust = Arc::new(Mutex::new(old.clone()));
    let token = |name: &'static str| -> CredentialSource {
        let trust = Arc::clone(&trust);
        Arc::new(move || source(&trust.lock().unwrap(), Some(name), None)())
    };
    let trusts = || vec![old_root.clone()];
    let honest = Truster::start(&plane, token("bound"), "reviews-v1", trusts(), &old_root);
    // It has a good token, and says that it is the pod whose proxy is dead.
    let liar = Truster::start(&plane, token("good"), "reviews-v2", trusts(), &old_root);
    until("both connections", async || {
        let (_, metrics) = get(plane.addresses.monitoring, "/metrics", "localhost").await;
        let connected = |line: &str| line.starts_with("pilot_xds") && line.ends_with(" 2");
        metrics.lines().any(connected).then_some(())
    })
    .await;
    let mut asked = secret(&api).unwrap();
    asked["metadata"]["annotations"] = json!({"security.mesh/rotate-root": "now"});
    api.apply("secrets", asked);
    let both = until("the next root", async || {
        let roots = TrustBundle::from_pem(&roots_in(&api, "default")?).unwrap();
        (roots.fingerprints().len() == 2).then_some(roots)
    })
    .await;
    let new_root = both.fingerprints().remove(1);
    *trust.lock().unwrap() = both.clone();
    let waits_for = async |names: &[&str]| {
        until("those who are waited for", async || {
            let said = said(&api)?;
            (said["waiting"] == json!(names)).then_some(said)
        })
        .await
    };
    let stranger = "spiffe://cluster.local/ns/default/sa/default (not known as a pod)";
    waits_for(&["reviews-v1.default", "reviews-v2.default", stranger]).await;
    honest.say(both.fingerprints(), &old_root);
    waits_for(&["reviews-v2.default", stranger]).await;
    // Whatever it says, nobody counts it for the pod.
    liar.say(both.fingerprints(), &new_root);
    waits_for(&["reviews-v2.default"]).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let roots = TrustBundle::from_pem(&roots_in(&api, "default").unwrap()).unwrap();
    assert_eq!(roots.fingerprints(), both.fingerprints(), "it went on");

    // An operator gives it up: the rest goes as ever.
    let force = || {
        let mut forced = secret(&api).unwrap();
        forced["metadata"]["annotations"]["security.mesh/rotate-without"] =
            json!("[\"reviews-v2.default\"]");
        api.apply("secrets", forced);
    };
    force();
    until("the change of the signer", async || {
        let roots = TrustBundle::from_pem(&roots_in(&api, "default")?).unwrap();
        (roots.fingerprints() == [new_root.clone(), old_root.clone()]).then_some(())
    })
    .await;
    // That was for one step alone.
    waits_for(&["reviews-v1.default", "reviews-v2.default"]).await;
    honest.say(both.fingerprints(), &new_root);
    waits_for(&["reviews-v2.default"]).await;
    force();
    until("the end of the old root", async || {
        let roots = TrustBundle::from_pem(&roots_in(&api, "default")?).unwrap();
        (roots.fingerprints() == [new_root.clone()]).then_some(())
    })
    .await;
    let annotations = secret(&api).unwrap()["metadata"]["annotations"].clone();
    assert_eq!(annotations, json!({"security.mesh/former-root": old_root}));
    honest.task.abort();
    liar.task.abort();
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_on_the_plain_port_leaves_the_secure_one_alone() {
    let api = cluster();
    let plane = start(&api).await;
    let trusted = ready(&plane, &api).await;
    let plain = plane.addresses.grpc.unwrap();
    let mut flood = Vec::new();
    for _ in 0..40 {
        flood.push(TcpStream::connect(plain).await.unwrap());
    }
    // Sixteen of an address stay, the others are closed at once.
    let mut closed = 0;
    for stream in &mut flood {
        let mut buffer = [0; 256];
        let read = stream.read(&mut buffer);
        // The server begins with its settings, so that there is something to read for those who stay.
        let read = tokio::time::timeout(Duration::from_secs(20), read).await;
        if matches!(read.expect("an answer"), Ok(0) | Err(_)) {
            closed += 1;
        }
    }
    assert_eq!(closed, 24);
    let (_, metrics) = get(plane.addresses.monitoring, "/metrics", "localhost").await;
    let line = "pilot_xds_auth_failures_total{reason=\"plain_connections\"} 24\n";
    assert!(metrics.contains(line), "{metrics}");
    let own = "sidecar~10.244.7.10~reviews-v1.default~default.svc.cluster.local";
    let credentials = source(&trusted, Some("good"), None);
    let first = discover(plane.addresses.secure_grpc, own, None, credentials).await;
    assert!(first.is_ok(), "{first:?}");
    // Places come back.
    drop(flood);
    until("a place", async || {
        let mut stream = TcpStream::connect(plain).await.unwrap();
        let mut buffer = [0; 256];
        let read = tokio::time::timeout(Duration::from_secs(20), stream.read(&mut buffer)).await;
        matches!(read, Ok(Ok(1..))).then_some(())
    })
    .await;
    plane.stop().await;
}
