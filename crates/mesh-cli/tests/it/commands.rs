//! apply, get, delete, logs, exec, version.

use std::process::ExitCode;

use super::world::World;

const CONFIG: &str = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: settings, labels: {app: a}}\ndata: {\"on\": \"yes\", mode: \"0644\"}\n";
const VIRTUAL_SERVICE: &str = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: reviews}\nspec:\n  hosts: [reviews]\n  http:\n  - route: [{destination: {host: reviews}}]\n";
const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, labels: {app: a}}\nspec: {containers: [{name: app, image: curl}, {name: istio-proxy, image: 'mesh:0.1.0'}]}\n";

/// A world with the Istio kinds.
async fn with_crds() -> World {
    let world = World::start().await;
    let crds = mesh_api::yaml::to_string_all(&mesh_api::crds());
    world.file("crds.yaml", &crds);
    let out = world.mesh("apply -f @crds.yaml").await.ok();
    assert_eq!(out.lines().count(), 15, "{out}");
    assert!(out.contains("customresourcedefinition.apiextensions.k8s.io/virtualservices.networking.istio.io created"), "{out}");
    world
}

#[tokio::test]
async fn apply_says_what_it_did() {
    let world = World::start().await;
    world.file("a.yaml", CONFIG);
    assert_eq!(
        world.mesh("apply -f @a.yaml").await.ok(),
        "configmap/settings created\n"
    );
    assert_eq!(
        world.mesh("apply -f @a.yaml").await.ok(),
        "configmap/settings unchanged\n"
    );
    world.file("a.yaml", &CONFIG.replace("0644", "0600"));
    assert_eq!(
        world.mesh("apply -f @a.yaml --dry-run").await.ok(),
        "configmap/settings configured (server dry run)\n"
    );
    assert!(
        world
            .mesh("get cm settings -o yaml")
            .await
            .ok()
            .contains("mode: \"0644\"")
    );
    assert_eq!(
        world.mesh("apply -f @a.yaml").await.ok(),
        "configmap/settings configured\n"
    );
    let yaml = world.mesh("get cm settings -o yaml").await.ok();
    assert!(
        yaml.starts_with("apiVersion: v1\ndata:\n  mode: "),
        "{yaml}"
    );
    assert!(
        yaml.contains("mode: \"0600\"")
            && yaml.contains("\"on\": \"yes\"")
            && !yaml.contains("managedFields"),
        "{yaml}"
    );
    let path = "get --raw /api/v1/namespaces/default/configmaps/settings";
    let raw: serde_json::Value =
        serde_json::from_str(&world.mesh(path).await.ok()).expect("an object");
    assert_eq!(raw["data"]["mode"], "0600");
    let refused = world.mesh("get --raw api").await.error();
    assert!(refused.contains("begins with a slash"), "{refused}");
    // What is read can be applied.
    world.file("b.yaml", &mesh_api::yaml::to_string(&serde_json::json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "shop" } })));
    assert_eq!(
        world.mesh("apply -f @b.yaml -f @a.yaml -n shop").await.ok(),
        "namespace/shop created\nconfigmap/settings created\n"
    );
    assert!(world.mesh("get cm -A").await.ok().contains("shop "));
}

#[tokio::test]
async fn a_kind_can_be_used_right_after_its_crd() {
    let world = World::start().await;
    let mut text = mesh_api::yaml::to_string_all(&mesh_api::crds());
    text.push_str("---\n");
    text.push_str(VIRTUAL_SERVICE);
    world.file("all.yaml", &text);
    let out = world.mesh("apply -f @all.yaml").await.ok();
    assert!(
        out.ends_with("virtualservice.networking.istio.io/reviews created\n"),
        "{out}"
    );
    let table = world.mesh("get vs").await.ok();
    assert!(
        table.starts_with("NAME      GATEWAYS   HOSTS         AGE\nreviews"),
        "{table}"
    );
    assert_eq!(
        world
            .mesh("get virtualservices.networking.istio.io -o name")
            .await
            .ok(),
        "virtualservice.networking.istio.io/reviews\n"
    );
    assert!(
        world
            .mesh("get istio-io -o name")
            .await
            .ok()
            .contains("reviews")
    );
}

#[tokio::test]
async fn bad_manifests_change_nothing_and_say_why() {
    let world = with_crds().await;
    world.file("syntax.yaml", &format!("{CONFIG}---\na: [1\n"));
    let error = world.mesh("apply -f @syntax.yaml").await.error();
    assert!(
        error.contains("syntax.yaml:") && error.contains("document 2"),
        "{error}"
    );
    world.file(
        "field.yaml",
        &format!(
            "{CONFIG}---\n{}",
            VIRTUAL_SERVICE.replace("destination:", "destinatoin:")
        ),
    );
    let error = world.mesh("apply -f @field.yaml").await.error();
    assert!(error.contains("document 2 (VirtualService reviews); nothing was applied: spec.http[0].route[0].destinatoin: unknown field"), "{error}");
    world.file(
        "rule.yaml",
        &format!(
            "{CONFIG}---\n{}",
            VIRTUAL_SERVICE.replace("hosts: [reviews]", "hosts: ['*']")
        ),
    );
    let error = world.mesh("apply -f @rule.yaml").await.error();
    assert!(
        error.contains("spec.hosts[0]") && error.contains("nothing was applied"),
        "{error}"
    );
    assert!(
        world
            .mesh("get cm settings")
            .await
            .error()
            .contains("NotFound")
    );
    // What only the server knows comes too late for that; then it is said how far it got.
    world.file(
        "late.yaml",
        &format!(
            "{CONFIG}---\n{}",
            CONFIG
                .replace("ConfigMap", "Nothing")
                .replace("v1", "nowhere/v1")
        ),
    );
    let ran = world.mesh("apply -f @late.yaml").await;
    assert_eq!(ran.out, "configmap/settings created\n");
    let error = ran.error();
    assert!(
        error.contains("the 1 before it of 2 are applied")
            && error.contains("no kind Nothing in nowhere/v1"),
        "{error}"
    );
    world.file("strict.yaml", &CONFIG.replace("\ndata:", "\ndta:"));
    let error = world.mesh("apply -f @strict.yaml").await.error();
    assert!(error.contains("dta"), "{error}");
    assert!(
        world
            .mesh("apply -f @missing.yaml")
            .await
            .error()
            .contains("missing.yaml")
    );
}

#[tokio::test]
async fn get_finds_what_people_name() {
    let world = World::start().await;
    world.file("a.yaml", &format!("{CONFIG}---\n{POD}"));
    world.mesh("apply -f @a.yaml").await.ok();
    let table = world.mesh("get pods,configmaps -l app=a").await.ok();
    assert!(
        table.contains("pod/p") && table.contains("configmap/settings"),
        "{table}"
    );
    assert!(
        world
            .mesh("get pod/p --show-labels")
            .await
            .ok()
            .contains("app=a")
    );
    assert!(world.mesh("get po p -o wide").await.ok().contains("NODE"));
    let json = world.mesh("get po -o json").await.ok();
    assert!(
        json.contains("\"kind\": \"List\"") && json.contains("\"kind\": \"Pod\""),
        "{json}"
    );
    assert_eq!(
        world
            .mesh("get po --field-selector metadata.name=other -o name")
            .await
            .ok(),
        ""
    );
    assert_eq!(world.mesh("get po -n nowhere").await.ok(), "");
    assert_eq!(
        world.mesh("get po q").await.error(),
        "Error from server (NotFound): pods \"q\" not found"
    );
    assert!(
        world
            .mesh("get gizmos")
            .await
            .error()
            .contains("no resource type \"gizmos\"")
    );
    assert!(
        world
            .mesh("get po p -A")
            .await
            .error()
            .contains("all namespaces")
    );
}

#[tokio::test]
async fn watch_shows_what_happens() {
    let world = World::start().await;
    world.file("a.yaml", CONFIG);
    world.file("b.yaml", &CONFIG.replace("0644", "0600"));
    world.mesh("apply -f @a.yaml").await.ok();
    let started = tokio::sync::Notify::new();
    let watching = world.mesh_until("get cm settings -w -o yaml", |text| {
        if text.contains("0644") {
            started.notify_one();
        }
        text.contains("0600")
    });
    let changing = async {
        started.notified().await;
        world.mesh("apply -f @b.yaml").await.ok();
    };
    let (seen, ()) = tokio::join!(watching, changing);
    assert_eq!(seen.matches("---\n").count(), 2, "{seen}");
    let table = world
        .mesh_until("get cm settings -w", |text| text.contains("settings"))
        .await;
    assert!(table.starts_with("NAME "), "{table}");

    // The columns are as wide as the whole list needs, and wider for what comes.
    world.file("c.yaml", &CONFIG.replace("name: settings", "name: a"));
    let long = "a-name-that-is-longer-than-all-the-others";
    world.file(
        "d.yaml",
        &CONFIG.replace("name: settings", &format!("name: {long}")),
    );
    world.mesh("apply -f @c.yaml").await.ok();
    let started = tokio::sync::Notify::new();
    let watching = world.mesh_until("get cm -w", |text| {
        if text.contains("settings") {
            started.notify_one();
        }
        text.contains(long)
    });
    let changing = async {
        started.notified().await;
        world.mesh("apply -f @d.yaml").await.ok();
    };
    let (table, ()) = tokio::join!(watching, changing);
    let starts: Vec<_> = ["NAME ", "a ", "settings "]
        .into_iter()
        .map(|name| {
            let line = table.lines().find(|line| line.starts_with(name)).unwrap();
            let rest = line.trim_start_matches(|c| c != ' ');
            line.len() - rest.trim_start().len()
        })
        .collect();
    assert!(starts.iter().all(|start| *start == starts[0]), "{table}");
}

#[tokio::test]
async fn delete_by_name_label_and_manifest() {
    let world = World::start().await;
    world.file(
        "a.yaml",
        &format!(
            "{CONFIG}---\n{}",
            CONFIG.replace("name: settings", "name: other")
        ),
    );
    world.mesh("apply -f @a.yaml").await.ok();
    assert_eq!(
        world.mesh("delete cm/other").await.ok(),
        "configmap \"other\" deleted\n"
    );
    assert!(
        world
            .mesh("delete cm other")
            .await
            .error()
            .contains("configmaps \"other\" not found")
    );
    assert_eq!(
        world.mesh("delete cm other --ignore-not-found").await.ok(),
        ""
    );
    assert_eq!(
        world.mesh("delete cm -l app=a").await.ok(),
        "configmap \"settings\" deleted\n"
    );
    world.mesh("apply -f @a.yaml").await.ok();
    assert_eq!(
        world.mesh("delete -f @a.yaml").await.ok().lines().count(),
        2
    );
    assert!(world.mesh("delete cm").await.error().contains("--all"));
    assert!(
        world
            .mesh("delete")
            .await
            .error()
            .contains("nothing to delete")
    );
}

#[tokio::test]
async fn logs_of_the_container_that_is_meant() {
    let world = World::start().await;
    world.file("a.yaml", POD);
    world.mesh("apply -f @a.yaml").await.ok();
    assert_eq!(
        world.mesh("logs p").await.ok(),
        "p app tail None previous false\nsecond\n"
    );
    assert_eq!(
        world
            .mesh("logs pod/p -c istio-proxy --tail 5 -p")
            .await
            .ok(),
        "p istio-proxy tail Some(5) previous true\nsecond\n"
    );
    assert!(world.mesh("logs -l app=a").await.ok().starts_with("p app"));
    assert!(
        world
            .mesh("logs p -c nope")
            .await
            .error()
            .contains("it has app, istio-proxy")
    );
    assert!(world.mesh("logs q").await.error().contains("NotFound"));
}

#[tokio::test]
async fn exec_passes_output_and_exit_code_on() {
    let world = World::start().await;
    world.file("a.yaml", POD);
    world.mesh("apply -f @a.yaml").await.ok();
    assert_eq!(
        world.mesh("exec p -c istio-proxy -- ls -l").await.ok(),
        "istio-proxy [\"ls\", \"-l\"]\n"
    );
    let failed = world.mesh("exec p -- false 7").await;
    assert_eq!(
        format!("{:?}", failed.result.expect("ran")),
        format!("{:?}", ExitCode::from(7))
    );
    assert!(world.mesh("exec p -- nope").await.result.is_err());
}

#[tokio::test]
async fn version_asks_the_cluster() {
    let world = World::start().await;
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(
        world.mesh("version --remote=false").await.ok(),
        format!("client version: {version}\n")
    );
    assert_eq!(
        world.mesh("version --remote=false --short").await.ok(),
        format!("{version}\n")
    );
    assert!(
        world
            .mesh("version")
            .await
            .ok()
            .contains("control plane version: none running")
    );
    assert!(
        world
            .mesh("version -o json")
            .await
            .ok()
            .contains("\"clientVersion\"")
    );
}
