//! watch, with raw requests and through `kube`.

use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api as KubeApi, PostParams};
use kube::runtime::watcher;
use serde_json::json;

use crate::support::{Api, CONFIG_MAPS, config_map};

#[tokio::test]
async fn a_watch_sees_what_matches() {
    let api = Api::new();
    api.post(CONFIG_MAPS, &config_map("before", json!({})))
        .await
        .ok();
    let mut lines = api
        .watch(&format!("{CONFIG_MAPS}?watch=true&labelSelector=on"))
        .await;
    let mut all = api
        .watch(&format!("{CONFIG_MAPS}?watch=true&resourceVersion=0"))
        .await;
    assert_eq!(all.short().await, "ADDED before");
    let at = format!("{CONFIG_MAPS}/before");
    let label = |value: serde_json::Value| json!({ "metadata": { "labels": { "on": value } } });
    api.patch(&at, "merge-patch", &label("1".into())).await.ok();
    api.patch(&at, "merge-patch", &label("2".into())).await.ok();
    api.patch(&at, "merge-patch", &label(json!(null)))
        .await
        .ok();
    api.delete(&at).await.ok();
    for expected in ["ADDED before", "MODIFIED before", "DELETED before"] {
        assert_eq!(lines.short().await, expected);
    }
    for expected in [
        "MODIFIED before",
        "MODIFIED before",
        "MODIFIED before",
        "DELETED before",
    ] {
        assert_eq!(all.short().await, expected);
    }
}

#[tokio::test]
async fn bookmarks_and_initial_events() {
    let api = Api::new();
    api.post(CONFIG_MAPS, &config_map("a", json!({})))
        .await
        .ok();
    let query = "watch=true&allowWatchBookmarks=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&timeoutSeconds=1";
    let mut lines = api.watch(&format!("{CONFIG_MAPS}?{query}")).await;
    assert_eq!(lines.short().await, "ADDED a");
    let mark = lines.next().await.unwrap();
    assert_eq!(mark["type"], "BOOKMARK");
    assert_eq!(
        mark["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"],
        "true"
    );
    // The end of the time is told by a last bookmark and the end of the stream.
    assert_eq!(lines.next().await.unwrap()["type"], "BOOKMARK");
    assert!(lines.next().await.is_none());
    let future = api
        .get(&format!("{CONFIG_MAPS}?watch=true&resourceVersion=99999"))
        .await
        .fails(504);
    assert_eq!(future["reason"], "Timeout");
}

#[tokio::test]
async fn history_is_bounded() {
    let api = Api::new();
    let first = api
        .post(CONFIG_MAPS, &config_map("a", json!({})))
        .await
        .ok();
    for n in 0..4200 {
        api.patch(
            &format!("{CONFIG_MAPS}/a"),
            "merge-patch",
            &json!({ "data": { "n": n.to_string() } }),
        )
        .await
        .ok();
    }
    let revision = first["metadata"]["resourceVersion"].as_str().unwrap();
    let mut lines = api
        .watch(&format!(
            "{CONFIG_MAPS}?watch=true&resourceVersion={revision}"
        ))
        .await;
    let event = lines.next().await.unwrap();
    assert_eq!(
        (&event["type"], &event["object"]["reason"]),
        (&json!("ERROR"), &json!("Expired"))
    );
    assert!(lines.next().await.is_none());
}

#[tokio::test]
async fn a_slow_watcher_is_closed() {
    let api = Api::new();
    api.post(CONFIG_MAPS, &config_map("a", json!({})))
        .await
        .ok();
    let mut slow = api
        .watch(&format!("{CONFIG_MAPS}?watch=true&resourceVersion=0"))
        .await;
    assert_eq!(slow.short().await, "ADDED a");
    for n in 0..1100 {
        api.patch(
            &format!("{CONFIG_MAPS}/a"),
            "merge-patch",
            &json!({ "data": { "n": n.to_string() } }),
        )
        .await
        .ok();
    }
    let mut seen = 0;
    while slow.next().await.is_some() {
        seen += 1;
    }
    assert!(
        seen < 1100,
        "a watcher that reads nothing kept {seen} events waiting"
    );
}

#[tokio::test]
async fn kube_watches_with_both_strategies() {
    let api = Api::new();
    let maps: KubeApi<ConfigMap> = KubeApi::namespaced(api.client(), "default");
    let object: ConfigMap =
        serde_json::from_value(config_map("first", json!({ "a": "b" }))).unwrap();
    maps.create(&PostParams::default(), &object).await.unwrap();
    for config in [
        watcher::Config::default(),
        watcher::Config::default().streaming_lists(),
    ] {
        let mut events = watcher(maps.clone(), config).boxed();
        let mut names = Vec::new();
        loop {
            match tokio::time::timeout(Duration::from_secs(10), events.try_next())
                .await
                .unwrap()
                .unwrap()
                .unwrap()
            {
                watcher::Event::InitApply(object) => names.push(object.metadata.name.unwrap()),
                watcher::Event::InitDone => break,
                _ => {}
            }
        }
        assert!(names.contains(&"first".to_owned()));
        let name = format!("later-{}", names.len());
        maps.create(
            &PostParams::default(),
            &serde_json::from_value(config_map(&name, json!({}))).unwrap(),
        )
        .await
        .unwrap();
        let event = tokio::time::timeout(Duration::from_secs(10), events.try_next())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        assert!(
            matches!(event, watcher::Event::Apply(o) if o.metadata.name.as_deref() == Some(&name))
        );
    }
    api.server.close();
}
