//! ca, proxy-config.

use mesh_identity::ca::Authority;

use super::world::World;

const ROOM: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: istio-system}\n";

fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("later than 1970")
        .as_secs()
}

/// A PEM text in YAML, indented.
fn text(pem: &str) -> String {
    pem.lines().map(|line| format!("    {line}\n")).collect()
}

fn secret(name: &str, authority: &Authority, roots: &str, more: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Secret\nmetadata: {{name: {name}, namespace: istio-system}}\nstringData:\n  ca-cert.pem: |\n{}  ca-key.pem: |\n{}  root-cert.pem: |\n{}{more}",
        text(authority.certificate_pem()),
        text(authority.key_pem()),
        text(roots),
    )
}

#[tokio::test]
async fn the_authority_is_shown_and_a_new_root_asked_for_once() {
    let world = World::start().await;
    world.file("room.yaml", ROOM);
    world.mesh("apply -f @room.yaml").await.ok();
    let error = world.mesh("ca status").await.error();
    assert!(
        error.contains("no certificate authority in namespace istio-system"),
        "{error}"
    );

    let year = 365 * 86_400;
    let root = Authority::generate("cluster.local", "Root CA", now(), year).expect("a root");
    let yaml = secret("istio-ca-secret", &root, root.certificate_pem(), "");
    world.file("ca.yaml", &yaml);
    world.mesh("apply -f @ca.yaml").await.ok();
    let status = world.mesh("ca status").await.ok();
    assert!(
        status.contains("Secret istio-system/istio-ca-secret"),
        "{status}"
    );
    assert!(
        status.contains(&format!("{}  ", &root.root()[..16])),
        "{status}"
    );
    assert!(
        status.contains(", signs\n") && status.ends_with("Rotation: none\n"),
        "{status}"
    );
    assert!(!status.contains("KEY"), "{status}");

    let asked = world.mesh("ca rotate --no-wait").await.ok();
    assert!(asked.contains("a new root was asked for"), "{asked}");
    let yaml = world
        .mesh("get secret istio-ca-secret -n istio-system -o yaml")
        .await
        .ok();
    assert!(yaml.contains("security.mesh/rotate-root:"), "{yaml}");
    let again = world.mesh("ca rotate --no-wait").await.ok();
    assert!(again.contains("under way already"), "{again}");
    // Nobody is there to do it.
    let error = world.mesh("ca rotate --timeout 1s").await.error();
    assert!(error.contains("not done within 1s"), "{error}");
}

#[tokio::test]
async fn how_far_a_rotation_is_comes_from_the_control_planes() {
    let world = World::start().await;
    world.file("room.yaml", ROOM);
    world.mesh("apply -f @room.yaml").await.ok();
    let [old, new] = [1, 2]
        .map(|_| Authority::generate("cluster.local", "Root CA", now(), 86_400).expect("a root"));
    let both = format!("{}{}", old.certificate_pem(), new.certificate_pem());
    let next = format!("  next-cert.pem: |\n{}", text(new.certificate_pem()));
    world.file("ca.yaml", &secret("istio-ca-secret", &old, &both, &next));
    world.mesh("apply -f @ca.yaml").await.ok();
    // The second control plane is gone; what it said last is nobody's excuse.
    let said = |waiting: &str, time: u64| {
        let said = serde_json::json!({
            "phase": "trust", "root": "x", "connected": 3, "done": 2, "waiting": [waiting], "time": time,
        });
        format!("'{said}'")
    };
    let map = format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio-ca-rotation, namespace: istio-system}}\ndata:\n  istiod-1_ab: {}\n  istiod-9_old: {}\n",
        said("reviews-v1.default", now()),
        said("ratings-v1.default", 1)
    );
    world.file("progress.yaml", &map);
    world.mesh("apply -f @progress.yaml").await.ok();
    let status = world.mesh("ca status").await.ok();
    assert!(status.contains("Rotation: 1 of 2: all proxies are to trust the next root\n  2 of 3 proxies, waiting for reviews-v1.default\n"), "{status}");
    let watched = world
        .mesh_until("ca rotate", |out| out.contains("1 of 2"))
        .await;
    assert!(
        watched.contains("waiting for reviews-v1.default"),
        "{watched}"
    );
    // Whoever is waited for can be given up, by name, and once.
    let forced = world.mesh("ca rotate --force --no-wait").await.ok();
    assert_eq!(forced, "going on without reviews-v1.default\n");
    let annotations = world
        .mesh("get secret istio-ca-secret -n istio-system -o json")
        .await
        .ok();
    let without = r#""security.mesh/rotate-without": "[\"reviews-v1.default\"]""#;
    assert!(annotations.contains(without), "{annotations}");
    let status = world.mesh("ca status").await.ok();
    assert!(
        status.contains("  goes on without reviews-v1.default\n"),
        "{status}"
    );
    let error = world.mesh("ca rotate --force").await.error();
    assert!(error.contains("nobody else is waited for"), "{error}");
}

#[tokio::test]
async fn force_is_for_a_rotation_that_waits_and_an_authority_elsewhere_shows_its_roots() {
    let world = World::start().await;
    world.file("room.yaml", ROOM);
    world.mesh("apply -f @room.yaml").await.ok();
    let root = Authority::generate("Elsewhere", "Root CA", now(), 86_400).expect("a root");
    let map = format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio-ca-root-cert, namespace: istio-system}}\ndata:\n  root-cert.pem: |\n{}",
        text(root.certificate_pem())
    );
    world.file("map.yaml", &map);
    world.mesh("apply -f @map.yaml").await.ok();
    let status = world.mesh("ca status").await.ok();
    assert!(
        status.starts_with("Authority: elsewhere") && status.contains("O=Elsewhere, CN=Root CA"),
        "{status}"
    );
    let roots = root.certificate_pem();
    world.file("ca.yaml", &secret("istio-ca-secret", &root, roots, ""));
    world.mesh("apply -f @ca.yaml").await.ok();
    let error = world.mesh("ca rotate --force").await.error();
    assert!(error.contains("no rotation is under way"), "{error}");
}

#[tokio::test]
async fn an_operators_root_is_the_operators_to_change() {
    let world = World::start().await;
    world.file("room.yaml", ROOM);
    world.mesh("apply -f @room.yaml").await.ok();
    let root = Authority::generate("Istio", "Root CA", now(), 86_400).expect("a root");
    let middle = root
        .intermediate("Istio", "Intermediate CA", now(), 3600)
        .expect("an intermediate");
    world.file(
        "ca.yaml",
        &secret("cacerts", &middle, root.certificate_pem(), ""),
    );
    world.mesh("apply -f @ca.yaml").await.ok();
    let status = world.mesh("ca status").await.ok();
    assert!(
        status.contains("CN=Intermediate CA") && status.contains("issued by O=Istio, CN=Root CA"),
        "{status}"
    );
    let error = world.mesh("ca rotate").await.error();
    assert!(
        error.contains("both roots into root-cert.pem of Secret cacerts"),
        "{error}"
    );
}

#[tokio::test]
async fn a_proxys_certificates_come_from_its_admin_interface() {
    let world = World::start().await;
    world.file("pod.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: p, labels: {app: a}}\nspec: {containers: [{name: app, image: curl}, {name: istio-proxy, image: 'mesh:0.1.0'}]}\n");
    world.mesh("apply -f @pod.yaml").await.ok();
    for target in ["p", "pod/p", "p.default"] {
        let table = world
            .mesh(&format!("proxy-config secret {target}"))
            .await
            .ok();
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 3, "{table}");
        assert!(lines[0].starts_with("RESOURCE NAME"), "{table}");
        assert!(
            lines[1].starts_with("default         Cert Chain   ACTIVE   true"),
            "{table}"
        );
        assert!(
            lines[2].starts_with("ROOTCA          CA           ACTIVE   true"),
            "{table}"
        );
    }
    let json = world.mesh("proxy-config secret p -o json").await.ok();
    let value: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(value["dynamic_active_secrets"][0]["name"], "default");
    let same = world.mesh("proxy-config rootca-compare p p").await.ok();
    assert!(same.contains("have a root in common"), "{same}");
    let error = world.mesh("proxy-config secret nobody").await.error();
    assert!(error.contains("not found"), "{error}");
}
