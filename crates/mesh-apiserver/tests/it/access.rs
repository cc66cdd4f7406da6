//! Who may do what: policies against requests, refusals in Kubernetes' words, no escalation, acting as others, the default roles.

use axum::body::Body;
use mesh_apiserver::Identity;
use serde_json::{Value, json};

use crate::support::{Answer, Api, CONFIG_MAPS, config_map, options};

const RBAC: &str = "/apis/rbac.authorization.k8s.io/v1";
const REVIEWS: &str = "/apis/authorization.k8s.io/v1";

fn user(name: &str, groups: &[&str]) -> Identity {
    let mut identity = Identity::service_account("x", "y", "");
    identity.username = name.to_owned();
    identity.groups = groups.iter().map(|g| (*g).to_owned()).collect();
    identity.groups.push("system:authenticated".to_owned());
    identity
}

fn account(namespace: &str, name: &str) -> Identity {
    Identity::service_account(namespace, name, "")
}

fn acting(api: &Api, identity: Identity) -> Api {
    Api {
        server: api.server.clone(),
        router: api.server.router_as(identity),
    }
}

/// Creates the objects of a YAML text.
async fn given(api: &Api, yaml: &str) {
    for text in yaml.split("---\n") {
        let object: Value = serde_yaml::from_str(text).unwrap();
        post(api, &object).await.ok();
    }
}

async fn post(api: &Api, object: &Value) -> Answer {
    let kind = object["kind"].as_str().unwrap().to_lowercase();
    let base = if kind.contains("role") {
        RBAC
    } else {
        "/api/v1"
    };
    let place = match object["metadata"]["namespace"].as_str() {
        Some(namespace) => format!("/namespaces/{namespace}"),
        None => String::new(),
    };
    api.post(&format!("{base}{place}/{kind}s"), object).await
}

const POLICY: &str = r#"
kind: Namespace
metadata: {name: shop}
---
kind: ClusterRole
metadata: {name: pod-reader}
rules:
- {verbs: [get, list, watch], apiGroups: [""], resources: [pods, pods/log]}
---
kind: ClusterRole
metadata: {name: looker}
rules:
- {verbs: [get], nonResourceURLs: [/metrics, /logs/*]}
- {verbs: ["*"], apiGroups: [apps], resources: ["*"]}
- {verbs: [get], apiGroups: ["*"], resources: ["*/scale"]}
---
kind: Role
metadata: {name: one, namespace: shop}
rules:
- {verbs: [get, update], apiGroups: [""], resources: [configmaps], resourceNames: [settings]}
- {verbs: [create], apiGroups: [""], resources: [pods/exec]}
---
kind: ClusterRoleBinding
metadata: {name: ann-reads}
roleRef: {kind: ClusterRole, name: pod-reader}
subjects: [{kind: User, name: ann}]
---
kind: ClusterRoleBinding
metadata: {name: ops-look}
roleRef: {kind: ClusterRole, name: looker}
subjects: [{kind: Group, name: ops}]
---
kind: RoleBinding
metadata: {name: web-one, namespace: shop}
roleRef: {kind: Role, name: one}
subjects: [{kind: ServiceAccount, name: web}, {kind: User, name: ben}]
---
kind: RoleBinding
metadata: {name: web-reads, namespace: shop}
roleRef: {kind: ClusterRole, name: pod-reader}
subjects: [{kind: ServiceAccount, name: web, namespace: default}]
---
kind: RoleBinding
metadata: {name: dangling, namespace: shop}
roleRef: {kind: Role, name: gone}
subjects: [{kind: User, name: cat}]
"#;

/// Who, what, and whether it is allowed. Methods are followed by the path; the object need not exist: 404 is past the guard.
const REQUESTS: &[(&str, &str, bool)] = &[
    ("ann", "GET /api/v1/pods", true),
    ("ann", "GET /api/v1/pods?watch=false", true),
    ("ann", "GET /api/v1/namespaces/shop/pods", true),
    ("ann", "GET /api/v1/namespaces/shop/pods/p", true),
    ("ann", "GET /api/v1/namespaces/shop/pods/p/log", true),
    ("ann", "GET /api/v1/namespaces/shop/pods/p/status", false),
    ("ann", "POST /api/v1/namespaces/shop/pods/p/exec", false),
    ("ann", "DELETE /api/v1/namespaces/shop/pods/p", false),
    ("ann", "GET /api/v1/secrets", false),
    ("ann", "GET /apis/apps/v1/deployments", false),
    ("ann", "GET /no/such/path", false),
    ("ann", "GET /apis/nobody.example/v1/things", false),
    ("ann", "GET /api", true),
    ("ann", "GET /version", true),
    ("ann", "GET /openapi/v3", true),
    ("ops", "GET /metrics", true),
    ("ops", "GET /logs/a/b", true),
    ("ops", "GET /logs", false),
    ("ops", "POST /metrics", false),
    ("ops", "GET /apis/apps/v1/deployments", true),
    (
        "ops",
        "DELETE /apis/apps/v1/namespaces/shop/deployments",
        true,
    ),
    ("ops", "GET /apis/batch/v1/jobs", false),
    ("ops", "GET /api/v1/namespaces/shop/pods/p/proxy", false),
    (
        "shop/web",
        "GET /api/v1/namespaces/shop/configmaps/settings",
        true,
    ),
    (
        "shop/web",
        "GET /api/v1/namespaces/shop/configmaps/other",
        false,
    ),
    ("shop/web", "GET /api/v1/namespaces/shop/configmaps", false),
    (
        "shop/web",
        "GET /api/v1/namespaces/default/configmaps/settings",
        false,
    ),
    (
        "shop/web",
        "DELETE /api/v1/namespaces/shop/configmaps/settings",
        false,
    ),
    (
        "shop/web",
        "POST /api/v1/namespaces/shop/pods/p/exec?command=x",
        true,
    ),
    // A WebSocket is a GET: it needs get, and create too.
    (
        "shop/web",
        "GET /api/v1/namespaces/shop/pods/p/exec?command=x",
        false,
    ),
    ("shop/web", "GET /api/v1/namespaces/shop/pods", false),
    (
        "ben",
        "GET /api/v1/namespaces/shop/configmaps/settings",
        true,
    ),
    ("default/web", "GET /api/v1/namespaces/shop/pods", true),
    ("default/web", "GET /api/v1/pods", false),
    ("default/web", "GET /api/v1/namespaces/default/pods", false),
    (
        "default/default",
        "GET /api/v1/namespaces/default/pods",
        false,
    ),
    ("default/default", "GET /apis", true),
    ("default/default", "GET /healthz", true),
    ("cat", "GET /api/v1/namespaces/shop/pods", false),
];

#[tokio::test]
async fn policies_and_requests() {
    let api = Api::new();
    given(&api, POLICY).await;
    for (who, request, allowed) in REQUESTS {
        let identity = match who.split_once('/') {
            Some((namespace, name)) => account(namespace, name),
            None if *who == "ops" => user("dan", &["ops"]),
            None => user(who, &[]),
        };
        let (method, path) = request.split_once(' ').unwrap();
        let answer = acting(&api, identity)
            .send(method, path, &[], Body::empty())
            .await;
        assert_eq!(
            answer.code != 403,
            *allowed,
            "{who}: {request}: {} {}",
            answer.code,
            answer.body
        );
    }
}

#[tokio::test]
async fn a_changed_binding_counts_for_the_next_request() {
    let api = Api::new();
    given(&api, POLICY).await;
    let ann = acting(&api, user("ann", &[]));
    ann.get("/api/v1/pods").await.ok();
    let role = format!("{RBAC}/clusterroles/pod-reader");
    let without = json!([{ "op": "replace", "path": "/rules/0/resources", "value": ["nodes"] }]);
    api.patch(&role, "json-patch", &without).await.ok();
    ann.get("/api/v1/pods").await.fails(403);
    ann.get("/api/v1/nodes").await.ok();
    api.delete(&format!("{RBAC}/clusterrolebindings/ann-reads"))
        .await
        .ok();
    ann.get("/api/v1/nodes").await.fails(403);
}

#[tokio::test]
async fn refusals_are_worded_as_in_kubernetes() {
    let api = Api::new();
    given(&api, POLICY).await;
    let web = acting(&api, account("default", "x"));
    let list = web.get("/api/v1/namespaces/default/pods").await.fails(403);
    assert_eq!(
        list["message"],
        "pods is forbidden: User \"system:serviceaccount:default:x\" cannot list resource \"pods\" in API group \"\" in the namespace \"default\""
    );
    assert_eq!(
        (&list["reason"], &list["details"]),
        (&json!("Forbidden"), &json!({ "kind": "pods" }))
    );
    let named = web.get("/apis/apps/v1/namespaces/a/deployments/d/scale");
    assert_eq!(
        named.await.fails(403)["message"],
        "deployments.apps \"d\" is forbidden: User \"system:serviceaccount:default:x\" cannot get resource \"deployments/scale\" in API group \"apps\" in the namespace \"a\""
    );
    let path = web.get("/metrics").await.fails(403);
    assert_eq!(
        path["message"],
        "forbidden: User \"system:serviceaccount:default:x\" cannot get path \"/metrics\""
    );
    let everywhere = web.get("/api/v1/nodes").await.fails(403);
    assert_eq!(
        everywhere["message"],
        "nodes is forbidden: User \"system:serviceaccount:default:x\" cannot list resource \"nodes\" in API group \"\" at the cluster scope"
    );
    let dangling = acting(&api, user("cat", &[]))
        .get("/api/v1/namespaces/shop/pods")
        .await
        .fails(403);
    let message = dangling["message"].as_str().unwrap();
    assert!(
        message.ends_with(": RBAC: role.rbac.authorization.k8s.io \"gone\" not found"),
        "{message}"
    );
}

#[tokio::test]
async fn without_credentials_only_health_and_version() {
    let api = Api::open(options(None));
    let door = Api {
        server: api.server.clone(),
        router: api.server.router(),
    };
    door.get("/readyz").await.ok();
    door.get("/version").await.ok();
    let refused = door.get("/api").await.fails(403);
    assert_eq!(
        refused["message"],
        "forbidden: User \"system:anonymous\" cannot get path \"/api\""
    );
    door.get(CONFIG_MAPS).await.fails(403);
    let bad = [("authorization", "Bearer nonsense")];
    door.send("GET", "/version", &bad, Body::empty())
        .await
        .fails(401);
}

#[tokio::test]
async fn nobody_gives_what_he_does_not_have() {
    let api = Api::new();
    given(
        &api,
        r#"
kind: Namespace
metadata: {name: shop}
---
kind: RoleBinding
metadata: {name: eva-admin, namespace: shop}
roleRef: {kind: ClusterRole, name: admin}
subjects: [{kind: User, name: eva}]
---
kind: ClusterRole
metadata: {name: writes-roles}
rules:
- {verbs: ["*"], apiGroups: [rbac.authorization.k8s.io], resources: [clusterroles, clusterrolebindings]}
---
kind: ClusterRoleBinding
metadata: {name: fay-writes-roles}
roleRef: {kind: ClusterRole, name: writes-roles}
subjects: [{kind: User, name: fay}]
---
kind: ClusterRole
metadata: {name: makes-roles}
rules:
- {verbs: [create, update, patch], apiGroups: [rbac.authorization.k8s.io], resources: [clusterroles, clusterrolebindings]}
- {verbs: [bind], apiGroups: [rbac.authorization.k8s.io], resources: [clusterroles], resourceNames: [view]}
---
kind: ClusterRoleBinding
metadata: {name: gus-makes-roles}
roleRef: {kind: ClusterRole, name: makes-roles}
subjects: [{kind: User, name: gus}]
"#,
    )
    .await;
    let eva = acting(&api, user("eva", &[]));
    let role = |name: &str, rule: Value| json!({ "kind": "Role", "metadata": { "name": name, "namespace": "shop" }, "rules": [rule] });
    let pods = json!({ "verbs": ["get"], "apiGroups": [""], "resources": ["pods"] });
    post(&eva, &role("pods", pods)).await.ok();
    let nodes = json!({ "verbs": ["get", "list"], "apiGroups": [""], "resources": ["nodes"] });
    let refused = post(&eva, &role("nodes", nodes.clone())).await.fails(403);
    assert_eq!(
        refused["message"],
        "roles.rbac.authorization.k8s.io \"nodes\" is forbidden: user \"eva\" (groups=[\"system:authenticated\"]) is attempting to grant \
         RBAC permissions not currently held:\n{APIGroups:[\"\"], Resources:[\"nodes\"], Verbs:[\"get\"]}\n{APIGroups:[\"\"], \
         Resources:[\"nodes\"], Verbs:[\"list\"]}"
    );
    let change = json!({ "rules": [nodes] });
    let path = format!("{RBAC}/namespaces/shop/roles/pods");
    eva.patch(&path, "merge-patch", &change).await.fails(403);
    let label = json!({ "metadata": { "labels": { "a": "b" } } });
    eva.patch(&path, "merge-patch", &label).await.ok();

    let bind = |role: &str| {
        json!({
            "kind": "RoleBinding", "metadata": { "name": role.replace(':', "-"), "namespace": "shop" },
            "roleRef": { "kind": "ClusterRole", "name": role }, "subjects": [{ "kind": "User", "name": "hal" }],
        })
    };
    post(&eva, &bind("view")).await.ok();
    post(&eva, &bind("cluster-admin")).await.fails(403);
    assert_eq!(
        post(&eva, &bind("nobody")).await.fails(404)["message"],
        "clusterroles.rbac.authorization.k8s.io \"nobody\" not found"
    );

    // Who has all verbs on roles has `escalate` and `bind` too, as in Kubernetes.
    let cluster = |name: &str, role: &str| {
        json!({
            "kind": "ClusterRoleBinding", "metadata": { "name": name },
            "roleRef": { "kind": "ClusterRole", "name": role }, "subjects": [{ "kind": "User", "name": "hal" }],
        })
    };
    let fay = acting(&api, user("fay", &[]));
    post(&fay, &cluster("fay", "cluster-admin")).await.ok();
    let gus = acting(&api, user("gus", &[]));
    post(&gus, &cluster("gus-view", "view")).await.ok();
    post(&gus, &cluster("gus-edit", "edit")).await.fails(403);
    let sum = json!({
        "kind": "ClusterRole", "metadata": { "name": "sum" },
        "aggregationRule": { "clusterRoleSelectors": [{ "matchLabels": { "a": "b" } }] },
    });
    let refused = post(&gus, &sum).await.fails(403);
    let message = refused["message"].as_str().unwrap();
    assert!(
        message.ends_with("must have cluster-admin privileges to use an aggregationRule"),
        "{message}"
    );
}

#[tokio::test]
async fn roles_are_made_of_roles() {
    let api = Api::new();
    let view = format!("{RBAC}/clusterroles/view");
    let has = |role: &Value, resource: &str| {
        let rules = role["rules"].as_array().unwrap();
        rules.iter().any(|r| {
            r["resources"]
                .as_array()
                .unwrap()
                .contains(&json!(resource))
        })
    };
    let role = api.get(&view).await.ok();
    assert!(has(&role, "pods/log") && !has(&role, "secrets"), "{role}");
    let admin = api.get(&format!("{RBAC}/clusterroles/admin")).await.ok();
    assert!(has(&admin, "rolebindings") && has(&admin, "secrets") && has(&admin, "pods/log"));
    given(
        &api,
        r#"
kind: ClusterRole
metadata: {name: more, labels: {rbac.authorization.k8s.io/aggregate-to-view: "true"}}
rules:
- {verbs: [get], apiGroups: [networking.istio.io], resources: [gateways]}
"#,
    )
    .await;
    let admin_has = |answer: &Answer| has(&answer.body, "gateways");
    api.until(&format!("{RBAC}/clusterroles/admin"), admin_has)
        .await;
    api.delete(&format!("{RBAC}/clusterroles/more")).await.ok();
    api.until(&view, |answer| !has(&answer.body, "gateways"))
        .await;
}

#[tokio::test]
async fn default_roles_are_repaired_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let view = format!("{RBAC}/clusterroles/system:basic-user");
    let binding = format!("{RBAC}/clusterrolebindings/system:discovery");
    let kept = format!("{RBAC}/clusterrolebindings/system:basic-user");
    {
        let api = Api::in_dir(dir.path());
        let rules =
            json!({ "rules": [{ "verbs": ["get"], "apiGroups": [""], "resources": ["nodes"] }] });
        api.patch(&view, "merge-patch", &rules).await.ok();
        let nobody = json!({ "subjects": [] });
        api.patch(&binding, "merge-patch", &nobody).await.ok();
        let fixed = json!({
            "subjects": [], "metadata": { "annotations": { "rbac.authorization.kubernetes.io/autoupdate": "false" } },
        });
        api.patch(&kept, "merge-patch", &fixed).await.ok();
        api.server.close();
    }
    let api = Api::in_dir(dir.path());
    let rules = api.get(&view).await.ok()["rules"].clone();
    assert_eq!(rules.as_array().unwrap().len(), 3, "{rules}");
    assert_eq!(
        api.get(&binding).await.ok()["subjects"][0]["name"],
        "system:authenticated"
    );
    assert_eq!(api.get(&kept).await.ok()["subjects"], json!([]));
}

#[tokio::test]
async fn roles_that_make_no_sense() {
    let api = Api::new();
    let cases = [
        (
            json!({ "kind": "Role", "metadata": { "name": "r", "namespace": "default" }, "rules": [{ "verbs": [], "apiGroups": [""], "resources": ["pods"] }] }),
            "rules[0].verbs: Required value: verbs must contain at least one value",
        ),
        (
            json!({ "kind": "Role", "metadata": { "name": "r", "namespace": "default" }, "rules": [{ "verbs": ["get"], "nonResourceURLs": ["/x"] }] }),
            "namespaced rules cannot apply to non-resource URLs",
        ),
        (
            json!({ "kind": "ClusterRole", "metadata": { "name": "r" }, "rules": [{ "verbs": ["get"], "resources": ["pods"] }] }),
            "rules[0].apiGroups: Required value: resource rules must supply at least one api group",
        ),
        (
            json!({ "kind": "ClusterRole", "metadata": { "name": "a/b" }, "rules": [] }),
            "metadata.name: Invalid value: \"a/b\": may not contain '/'",
        ),
        (
            json!({ "kind": "ClusterRoleBinding", "metadata": { "name": "b" }, "roleRef": { "kind": "Role", "name": "r" } }),
            "roleRef.kind: Unsupported value: \"Role\": supported values: \"ClusterRole\"",
        ),
        (
            json!({ "kind": "ClusterRoleBinding", "metadata": { "name": "b" }, "roleRef": { "kind": "ClusterRole", "name": "view" }, "subjects": [{ "kind": "ServiceAccount", "name": "x" }] }),
            "subjects[0].namespace: Required value",
        ),
        (
            json!({ "kind": "ClusterRoleBinding", "metadata": { "name": "b" }, "roleRef": { "kind": "ClusterRole", "name": "view" }, "subjects": [{ "kind": "Robot", "name": "x" }] }),
            "subjects[0].kind: Unsupported value: \"Robot\"",
        ),
    ];
    for (object, expected) in cases {
        let error = post(&api, &object).await.fails(422);
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(expected), "{expected}: {message}");
    }
    let other = json!({ "roleRef": { "name": "edit" } });
    let path = format!("{RBAC}/clusterrolebindings/system:discovery");
    let error = api.patch(&path, "merge-patch", &other).await.fails(422);
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .contains("cannot change roleRef")
    );
}

#[tokio::test]
async fn acting_as_somebody_else() {
    let api = Api::new();
    given(&api, POLICY).await;
    let asked = async |api: &Api, headers: &[(&str, &str)], path: &str| {
        api.send("GET", path, headers, Body::empty()).await
    };
    let ann = [("impersonate-user", "ann")];
    asked(&api, &ann, "/api/v1/pods").await.ok();
    asked(&api, &ann, "/api/v1/secrets").await.fails(403);
    let web = [("impersonate-user", "system:serviceaccount:shop:web")];
    let settings = "/api/v1/namespaces/shop/configmaps/settings";
    asked(&api, &web, settings).await.fails(404);
    let who = async |headers: &[(&str, &str)]| {
        let mut all = vec![("content-type", "application/json")];
        all.extend_from_slice(headers);
        let path = "/apis/authentication.k8s.io/v1/selfsubjectreviews";
        api.send("POST", path, &all, "{}").await.ok()["status"]["userInfo"].clone()
    };
    assert_eq!(
        who(&[
            ("impersonate-user", "u"),
            ("impersonate-group", "g"),
            ("impersonate-uid", "7"),
            ("impersonate-extra-team%2Fname", "t"),
        ])
        .await,
        json!({ "username": "u", "groups": ["g", "system:authenticated"], "uid": "7", "extra": { "team/name": ["t"] } })
    );
    assert_eq!(
        who(&web).await["groups"],
        json!([
            "system:serviceaccounts",
            "system:serviceaccounts:shop",
            "system:authenticated"
        ])
    );
    asked(&api, &[("impersonate-group", "g")], "/api")
        .await
        .fails(500);

    // `edit` in a namespace includes its service accounts, nobody else.
    given(
        &api,
        r#"
kind: RoleBinding
metadata: {name: eva-edits, namespace: shop}
roleRef: {kind: ClusterRole, name: edit}
subjects: [{kind: User, name: eva}]
"#,
    )
    .await;
    let eva = acting(&api, user("eva", &[]));
    asked(&eva, &web, settings).await.fails(404);
    let refused = asked(&eva, &ann, settings).await.fails(403);
    assert_eq!(
        refused["message"],
        "users \"ann\" is forbidden: User \"eva\" cannot impersonate resource \"users\" in API group \"\" at the cluster scope"
    );
    let group = [web[0], ("impersonate-group", "system:masters")];
    asked(&eva, &group, settings).await.fails(403);
}

#[tokio::test]
async fn reviews_answer_for_others_and_oneself() {
    let api = Api::new();
    given(&api, POLICY).await;
    let review = async |kind: &str, place: &str, spec: Value| {
        let path = format!("{REVIEWS}{place}/{}s", kind.to_lowercase());
        api.post(&path, &json!({ "kind": kind, "spec": spec }))
            .await
    };
    let pods = json!({ "verb": "list", "resource": "pods", "namespace": "shop" });
    let ask = json!({ "user": "ann", "resourceAttributes": pods });
    let status = review("SubjectAccessReview", "", ask).await.ok()["status"].clone();
    assert_eq!(
        status,
        json!({ "allowed": true, "reason": "RBAC: allowed by ClusterRoleBinding \"ann-reads\" of ClusterRole \"pod-reader\" to User \"ann\"" })
    );
    let web = json!({ "user": "system:serviceaccount:default:web", "resourceAttributes": pods });
    let status = review("LocalSubjectAccessReview", "/namespaces/shop", web.clone());
    assert_eq!(
        status.await.ok()["status"]["reason"],
        "RBAC: allowed by RoleBinding \"web-reads/shop\" of ClusterRole \"pod-reader\" to ServiceAccount \"web/default\""
    );
    let elsewhere = review("LocalSubjectAccessReview", "/namespaces/default", web);
    elsewhere.await.fails(400);
    let paths =
        json!({ "groups": ["ops"], "nonResourceAttributes": { "verb": "get", "path": "/logs/x" } });
    let status = review("SubjectAccessReview", "", paths);
    assert_eq!(status.await.ok()["status"]["allowed"], true);
    let nobody = json!({ "resourceAttributes": pods });
    review("SubjectAccessReview", "", nobody).await.fails(422);
    review("SelfSubjectAccessReview", "", json!({}))
        .await
        .fails(422);
    let own = review(
        "SelfSubjectAccessReview",
        "",
        json!({ "resourceAttributes": pods }),
    );
    assert_eq!(own.await.ok()["status"], json!({ "allowed": true }));

    let web = acting(&api, account("default", "web"));
    let rules = json!({ "kind": "SelfSubjectRulesReview", "spec": { "namespace": "shop" } });
    let answer = web
        .post(&format!("{REVIEWS}/selfsubjectrulesreviews"), &rules)
        .await
        .ok();
    let resources = answer["status"]["resourceRules"].as_array().unwrap();
    let reads = json!({ "verbs": ["get", "list", "watch"], "apiGroups": [""], "resources": ["pods", "pods/log"] });
    assert!(resources.contains(&reads), "{answer}");
    assert_eq!(answer["status"]["incomplete"], false);
    // Asking about others is a right of its own.
    let ask = json!({ "kind": "SubjectAccessReview", "spec": { "user": "ann", "resourceAttributes": pods } });
    web.post(&format!("{REVIEWS}/subjectaccessreviews"), &ask)
        .await
        .fails(403);
}

#[tokio::test]
async fn a_patch_that_creates_needs_both_verbs() {
    let api = Api::new();
    given(
        &api,
        r#"
kind: Role
metadata: {name: patcher, namespace: default}
rules:
- {verbs: [patch], apiGroups: [""], resources: [configmaps]}
---
kind: RoleBinding
metadata: {name: patcher, namespace: default}
roleRef: {kind: Role, name: patcher}
subjects: [{kind: User, name: ida}]
"#,
    )
    .await;
    let ida = acting(&api, user("ida", &[]));
    let path = format!("{CONFIG_MAPS}/a?fieldManager=t");
    let map = config_map("a", json!({ "k": "v" }));
    let refused = ida.patch(&path, "apply", &map).await.fails(403);
    assert!(
        refused["message"]
            .as_str()
            .unwrap()
            .contains("cannot create resource")
    );
    api.post(CONFIG_MAPS, &map).await.ok();
    ida.patch(&format!("{path}&force=true"), "apply", &map)
        .await
        .ok();
}

#[tokio::test]
async fn bindings_are_shown_in_columns() {
    let api = Api::new();
    given(&api, POLICY).await;
    let table = api
        .table(&format!("{RBAC}/namespaces/shop/rolebindings/web-one"))
        .await;
    let cells = table["rows"][0]["cells"].as_array().unwrap();
    assert_eq!(
        (&cells[0], &cells[1], &cells[3], &cells[5]),
        (
            &json!("web-one"),
            &json!("Role/one"),
            &json!("ben"),
            &json!("web")
        )
    );
}
