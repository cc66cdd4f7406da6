//! What is special about built-in kinds: defaults, validation, tables, discovery.

use serde_json::{Value, json};

use crate::support::{Api, CONFIG_MAPS, DEPLOYMENTS, PODS, config_map, deployment, pod};

const SERVICES: &str = "/api/v1/namespaces/default/services";

fn service(name: &str, spec: Value) -> Value {
    json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": name }, "spec": spec })
}

#[tokio::test]
async fn services_get_addresses() {
    let api = Api::new();
    let own = api.get(&format!("{SERVICES}/kubernetes")).await.ok();
    assert_eq!(own["spec"]["clusterIP"], "10.96.0.1");
    let made = api
        .post(
            SERVICES,
            &service("a", json!({ "ports": [{ "port": 80 }] })),
        )
        .await
        .ok();
    assert!(
        made["spec"]["clusterIP"]
            .as_str()
            .unwrap()
            .starts_with("10.96.")
    );
    assert_eq!(
        made["spec"]["clusterIPs"],
        json!([made["spec"]["clusterIP"]])
    );
    assert_eq!(
        made["spec"]["ports"],
        json!([{ "port": 80, "protocol": "TCP", "targetPort": 80 }])
    );
    let headless = api
        .post(SERVICES, &service("h", json!({ "clusterIP": "None" })))
        .await
        .ok();
    assert_eq!(headless["spec"]["clusterIP"], "None");
    let dns = json!({ "clusterIP": "10.96.0.10", "ports": [{ "port": 53, "protocol": "UDP" }] });
    api.post(SERVICES, &service("dns", dns.clone())).await.ok();
    api.post(SERVICES, &service("dns2", dns)).await.fails(422);
    api.post(
        SERVICES,
        &service(
            "out",
            json!({ "clusterIP": "192.168.1.1", "ports": [{ "port": 1 }] }),
        ),
    )
    .await
    .fails(422);

    let node = api
        .post(
            SERVICES,
            &service(
                "n",
                json!({ "type": "NodePort", "ports": [{ "port": 80 }] }),
            ),
        )
        .await
        .ok();
    let port = node["spec"]["ports"][0]["nodePort"].as_u64().unwrap();
    assert!((30000..=32767).contains(&port));
    // A client that sends its manifest again keeps what was given, and may go back to ClusterIP.
    let again = api
        .put(
            &format!("{SERVICES}/n"),
            &service(
                "n",
                json!({ "type": "NodePort", "ports": [{ "port": 80 }] }),
            ),
        )
        .await
        .ok();
    assert_eq!(
        (
            &again["spec"]["clusterIP"],
            &again["spec"]["ports"][0]["nodePort"]
        ),
        (&node["spec"]["clusterIP"], &json!(port))
    );
    let mut moved = again.clone();
    moved["spec"]["clusterIP"] = "10.96.9.9".into();
    moved["spec"]["clusterIPs"] = json!(["10.96.9.9"]);
    api.put(&format!("{SERVICES}/n"), &moved).await.fails(422);

    for (spec, field) in [
        (json!({}), "spec.ports"),
        (json!({ "ports": [{ "port": 0 }] }), "spec.ports[0].port"),
        (
            json!({ "ports": [{ "port": 1 }, { "port": 2 }] }),
            "spec.ports[0].name",
        ),
        (
            json!({ "ports": [{ "port": 1, "protocol": "FOO" }] }),
            "spec.ports[0].protocol",
        ),
        (json!({ "type": "ExternalName" }), "spec.externalName"),
    ] {
        let error = api.post(SERVICES, &service("bad", spec)).await.fails(422);
        assert!(
            error["details"]["causes"]
                .as_array()
                .unwrap()
                .iter()
                .any(|c| c["field"] == field),
            "{error}"
        );
    }
}

#[tokio::test]
async fn pods_get_identity_and_defaults() {
    let api = Api::new();
    let made = api.post(PODS, &pod("p")).await.ok();
    let spec = &made["spec"];
    for (field, value) in [
        ("restartPolicy", json!("Always")),
        ("dnsPolicy", json!("ClusterFirst")),
        ("serviceAccountName", json!("default")),
        ("terminationGracePeriodSeconds", json!(30)),
        ("schedulerName", json!("default-scheduler")),
    ] {
        assert_eq!(spec[field], value, "{field}");
    }
    assert_eq!(spec["containers"][0]["imagePullPolicy"], "Always");
    assert_eq!(
        spec["containers"][0]["volumeMounts"][0]["mountPath"],
        "/var/run/secrets/kubernetes.io/serviceaccount"
    );
    let volume = &spec["volumes"][0];
    assert!(
        volume["name"]
            .as_str()
            .unwrap()
            .starts_with("kube-api-access-")
    );
    assert_eq!(
        volume["projected"]["sources"][1]["configMap"]["name"],
        "kube-root-ca.crt"
    );
    assert_eq!(
        made["status"],
        json!({ "phase": "Pending", "qosClass": "BestEffort" })
    );

    let mut bare = pod("bare");
    bare["spec"]["automountServiceAccountToken"] = false.into();
    assert!(
        api.post(PODS, &bare).await.ok()["spec"]
            .get("volumes")
            .is_none()
    );
    let mut stranger = pod("s");
    stranger["spec"]["serviceAccountName"] = "nobody".into();
    let refused = api.post(PODS, &stranger).await.fails(403);
    assert!(
        refused["message"]
            .as_str()
            .unwrap()
            .contains("serviceaccount \"nobody\" not found"),
        "{refused}"
    );

    let mut moved = made.clone();
    moved["spec"]["hostNetwork"] = true.into();
    let error = api.put(&format!("{PODS}/p"), &moved).await.fails(422);
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .contains("pod updates may not change fields other than"),
        "{error}"
    );
    moved = made.clone();
    moved["spec"]["containers"][0]["image"] = "app:2".into();
    api.put(&format!("{PODS}/p"), &moved).await.ok();
}

#[tokio::test]
async fn bad_workloads_name_the_field() {
    let api = Api::new();
    for (pointer, value, field) in [
        (
            "/spec/template/metadata/labels",
            json!({ "app": "other" }),
            "spec.template.metadata.labels",
        ),
        ("/spec/selector", json!({}), "spec.selector"),
        (
            "/spec/template/spec/containers",
            json!([]),
            "spec.template.spec.containers",
        ),
        (
            "/spec/template/spec/containers/0/image",
            json!(""),
            "spec.template.spec.containers[0].image",
        ),
        (
            "/spec/template/spec/containers/0/name",
            json!("Bad_Name"),
            "spec.template.spec.containers[0].name",
        ),
        (
            "/spec/template/spec/containers/0/ports/0/containerPort",
            json!(99999),
            "spec.template.spec.containers[0].ports[0].containerPort",
        ),
        ("/metadata/labels", json!({ "a b": "c" }), "metadata.labels"),
    ] {
        let mut object = deployment("d");
        *object.pointer_mut(pointer).unwrap() = value;
        let error = api.post(DEPLOYMENTS, &object).await.fails(422);
        assert_eq!(error["reason"], "Invalid");
        assert!(
            error["details"]["causes"]
                .as_array()
                .unwrap()
                .iter()
                .any(|c| c["field"] == field),
            "{pointer}: {error}"
        );
    }
    let made = api.post(DEPLOYMENTS, &deployment("d")).await.ok();
    assert_eq!(
        made["spec"]["strategy"]["rollingUpdate"],
        json!({ "maxUnavailable": "25%", "maxSurge": "25%" })
    );
    let mut changed = made.clone();
    changed["spec"]["selector"]["matchLabels"]["more"] = "x".into();
    changed["spec"]["template"]["metadata"]["labels"]["more"] = "x".into();
    let error = api
        .put(&format!("{DEPLOYMENTS}/d"), &changed)
        .await
        .fails(422);
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .contains("field is immutable"),
        "{error}"
    );
}

#[tokio::test]
async fn namespaces_end_in_two_steps() {
    let api = Api::new();
    let at = "/api/v1/namespaces/team";
    let body = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "team" } });
    let made = api.post("/api/v1/namespaces", &body).await.ok();
    assert_eq!(
        made["metadata"]["labels"]["kubernetes.io/metadata.name"],
        "team"
    );
    assert_eq!(
        (&made["spec"]["finalizers"][0], &made["status"]["phase"]),
        (&json!("kubernetes"), &json!("Active"))
    );
    let ending = api.delete(at).await.ok();
    assert_eq!(ending["status"]["phase"], "Terminating");
    let refused = api
        .post(&format!("{at}/configmaps"), &config_map("late", json!({})))
        .await
        .fails(403);
    assert!(
        refused["message"]
            .as_str()
            .unwrap()
            .contains("because it is being terminated"),
        "{refused}"
    );
    let mut finalized = api.get(at).await.ok();
    finalized["spec"]["finalizers"] = json!([]);
    api.put(&format!("{at}/finalize"), &finalized).await.ok();
    api.get(at).await.fails(404);
}

#[tokio::test]
async fn config_maps_secrets_and_events() {
    let api = Api::new();
    let secrets = "/api/v1/namespaces/default/secrets";
    let secret = json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": "s" }, "stringData": { "k": "hello" } });
    let made = api.post(secrets, &secret).await.ok();
    assert_eq!(
        (&made["data"]["k"], &made["type"]),
        (&json!("aGVsbG8="), &json!("Opaque"))
    );
    assert!(made.get("stringData").is_none());
    let mut fixed = config_map("fixed", json!({ "a": "b" }));
    fixed["immutable"] = true.into();
    api.post(CONFIG_MAPS, &fixed).await.ok();
    api.patch(
        &format!("{CONFIG_MAPS}/fixed"),
        "merge-patch",
        &json!({ "data": { "a": "c" } }),
    )
    .await
    .fails(422);

    let event = json!({
        "apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": { "name": "e" }, "note": "it happened",
        "regarding": { "kind": "Pod", "name": "p" }, "reason": "Because", "type": "Normal", "eventTime": "2026-01-01T00:00:00.000000Z",
    });
    api.post("/apis/events.k8s.io/v1/namespaces/default/events", &event)
        .await
        .ok();
    let core = api
        .get("/api/v1/namespaces/default/events?fieldSelector=involvedObject.name%3Dp")
        .await
        .ok();
    assert_eq!(core["items"][0]["message"], "it happened");
    let new = api
        .get("/apis/events.k8s.io/v1/namespaces/default/events/e")
        .await
        .ok();
    assert_eq!(
        (&new["note"], &new["apiVersion"]),
        (&json!("it happened"), &json!("events.k8s.io/v1"))
    );
}

#[tokio::test]
async fn tables_count_native_sidecars() {
    let api = Api::new();
    let mut object = pod("p");
    object["spec"]["initContainers"] = json!([
        { "name": "init", "image": "i:1" }, { "name": "proxy", "image": "m:1", "restartPolicy": "Always" },
    ]);
    api.post(PODS, &object).await.ok();
    let status = json!({ "status": {
        "phase": "Running", "podIP": "10.244.0.5",
        "conditions": [{ "type": "Initialized", "status": "True" }, { "type": "Ready", "status": "True" }],
        "initContainerStatuses": [
            { "name": "init", "image": "i:1", "imageID": "", "ready": true, "restartCount": 0,
              "state": { "terminated": { "exitCode": 0, "reason": "Completed" } } },
            { "name": "proxy", "image": "m:1", "imageID": "", "ready": true, "started": true, "restartCount": 1,
              "state": { "running": {} } },
        ],
        "containerStatuses": [
            { "name": "main", "image": "app", "imageID": "", "ready": true, "restartCount": 0, "state": { "running": {} } },
        ],
    } });
    api.patch(&format!("{PODS}/p/status"), "merge-patch", &status)
        .await
        .ok();
    let table = api.table(PODS).await;
    let names: Vec<&str> = table["columnDefinitions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["name"].as_str().unwrap())
        .collect();
    assert_eq!(&names[..5], ["Name", "Ready", "Status", "Restarts", "Age"]);
    let cells = &table["rows"][0]["cells"];
    assert_eq!(
        (&cells[1], &cells[2], &cells[3], &cells[5]),
        (
            &json!("2/2"),
            &json!("Running"),
            &json!("1"),
            &json!("10.244.0.5")
        )
    );
    assert_eq!(table["rows"][0]["object"]["kind"], "PartialObjectMetadata");
    let all = [
        "/api/v1/services",
        "/api/v1/namespaces",
        "/api/v1/nodes",
        "/api/v1/endpoints",
        "/apis/apps/v1/deployments",
        "/apis/discovery.k8s.io/v1/endpointslices",
        "/api/v1/secrets",
        "/api/v1/events",
    ];
    for path in all {
        let table = api.table(path).await;
        let columns = table["columnDefinitions"].as_array().unwrap().len();
        for row in table["rows"].as_array().unwrap() {
            assert_eq!(row["cells"].as_array().unwrap().len(), columns, "{path}");
        }
    }
}

#[tokio::test]
async fn discovery_tells_what_is_served() {
    let api = Api::new();
    assert_eq!(api.get("/version").await.ok()["gitVersion"], "v1.36.0");
    for path in ["/healthz", "/livez", "/readyz"] {
        assert_eq!(api.get(path).await.ok(), "ok");
    }
    assert_eq!(api.get("/api").await.ok()["versions"], json!(["v1"]));
    let core = api.get("/api/v1").await.ok();
    let names: Vec<&str> = core["resources"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["name"].as_str().unwrap())
        .collect();
    for name in [
        "pods",
        "pods/log",
        "pods/exec",
        "services",
        "serviceaccounts/token",
        "namespaces/finalize",
    ] {
        assert!(names.contains(&name), "{name}");
    }
    let groups = api.get("/apis").await.ok();
    assert!(
        groups["groups"]
            .as_array()
            .unwrap()
            .iter()
            .any(|g| g["name"] == "apps")
    );
    let accept =
        "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json";
    let aggregated = api.send("GET", "/apis", &[("accept", accept)], "").await;
    assert!(
        aggregated.headers["content-type"]
            .to_str()
            .unwrap()
            .contains("as=APIGroupDiscoveryList")
    );
    let apps = aggregated.ok()["items"]
        .as_array()
        .unwrap()
        .iter()
        .find(|g| g["metadata"]["name"] == "apps")
        .cloned()
        .unwrap();
    assert_eq!(
        apps["versions"][0]["resources"][0]["resource"],
        "deployments"
    );
    api.get("/apis/nope").await.fails(404);
    let v2 = api.get("/openapi/v2").await.ok();
    assert!(v2["definitions"].get("io.k8s.api.core.v1.Pod").is_some());
}
