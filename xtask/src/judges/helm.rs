//! A real helm with our chart: it makes the objects that `mesh manifest generate` prints, one by one, and installs a mesh that works.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use serde::Deserialize as _;
use serde_json::Value;

use super::install;
use crate::e2e::Cluster;
use crate::run;

/// Settings, as helm is told them; the same stand below `values` for us, but for those of [`TOP`].
const CASES: [&[&str]; 12] = [
    &[],
    &["profile=demo"],
    &["profile=preview", "revision=canary"],
    &["profile=openshift"],
    &["profile=remote", "global.remotePilotAddress=192.0.2.7"],
    &[
        "profile=remote",
        "revision=canary",
        "revisionTags={prod}",
        "global.remotePilotAddress=istiod.example",
    ],
    &[
        "profile=remote",
        "istiodRemote.injectionURL=https://istiod.example/inject",
        "istiodRemote.injectionCABundle=QUFBQQ==",
    ],
    &[
        "profile=preview",
        "global.platform=openshift",
        "meshConfig.defaultConfig.proxyMetadata.SOME=thing",
    ],
    &[
        "profile=minimal",
        "revision=canary",
        "revisionTags={prod,stage}",
        "global.hub=registry.example/x",
        "global.tag=t",
    ],
    &[
        "pilot.replicaCount=3",
        "pilot.autoscaleEnabled=false",
        "pilot.nodeSelector.disk=ssd",
        "pilot.podAnnotations.a=b",
        "gateways.istio-ingressgateway.type=NodePort",
        "gateways.istio-ingressgateway.autoscaleMax=9",
    ],
    &[
        "global.imagePullPolicy=Always",
        "global.imagePullSecrets={one,two}",
        "global.proxy.autoInject=disabled",
        "sidecarInjectorWebhook.reinvocationPolicy=IfNeeded",
        "sidecarInjectorWebhook.rewriteAppHTTPProbe=false",
    ],
    &[
        "meshConfig.trustDomain=td",
        "meshConfig.outboundTrafficPolicy.mode=REGISTRY_ONLY",
        "meshConfig.defaultConfig.concurrency=2",
    ],
];

/// Settings that are not below `values` for us.
const TOP: [&str; 3] = ["profile", "revision", "meshConfig"];

/// Labels and annotations that say who installs, and with what.
const OWNERS: [&str; 3] = [
    "app.kubernetes.io/managed-by",
    "install.operator.istio.io/owning-resource",
    "install.mesh/build",
];

/// Hears helm.
pub fn run(mesh: &Path) -> anyhow::Result<()> {
    let helm = install::helm("v36")?;
    let place = tempfile::tempdir()?;
    let chart = place.path().join("chart");
    run::output(
        Command::new(mesh)
            .args(["manifest", "chart", "-o"])
            .arg(&chart),
    )?;
    run::output(
        Command::new(&helm)
            .arg("lint")
            .arg(&chart)
            .env("HOME", place.path()),
    )?;
    for case in CASES {
        same(mesh, &helm, &chart, case).with_context(|| format!("with the settings {case:?}"))?;
    }
    kinds(&helm, &chart)?;
    packed(&helm, &chart, place.path())?;
    println!(
        "helm template: {} settings, object by object as `mesh manifest generate`",
        CASES.len()
    );
    let cluster = Cluster::empty(mesh, None)?;
    let verdict = installed(&helm, &chart, &cluster);
    if verdict.is_err() {
        cluster.show_state();
    }
    verdict.and(cluster.stop())
}

fn same(mesh: &Path, helm: &Path, chart: &Path, settings: &[&str]) -> anyhow::Result<()> {
    let mut ours = Command::new(mesh);
    ours.args(["manifest", "generate"]);
    let mut theirs = Command::new(helm);
    theirs
        .args(["template", "mesh", "-n", "istio-system"])
        .arg(chart);
    for setting in settings {
        let top = TOP.iter().any(|top| {
            let rest = setting.strip_prefix(top);
            rest.is_some_and(|rest| rest.starts_with(['.', '=']))
        });
        let ours_is = match top {
            true => (*setting).to_owned(),
            false => format!("values.{setting}"),
        };
        ours.args(["--set", &ours_is]);
        theirs.args(["--set", setting]);
    }
    let wanted = objects(&run::output(&mut ours)?)?;
    let given = objects(&run::output(&mut theirs)?)?;
    let names = |all: &BTreeMap<String, Value>| all.keys().cloned().collect::<Vec<_>>();
    ensure!(
        names(&wanted) == names(&given),
        "the objects are {:?}, helm makes {:?}",
        names(&wanted),
        names(&given)
    );
    for (name, object) in &wanted {
        ensure!(
            object == &given[name],
            "{name} is {object}, helm makes {}",
            given[name]
        );
    }
    Ok(())
}

/// A release without the kinds is the same but for them.
fn kinds(helm: &Path, chart: &Path) -> anyhow::Result<()> {
    let template = |setting: &str| {
        let mut command = Command::new(helm);
        command.args(["template", "mesh", "-n", "istio-system", "--set", setting]);
        run::output(command.arg(chart))
    };
    let (with, without) = (
        template("base.enabled=true")?,
        template("base.enabled=false")?,
    );
    let count = |text: &str| text.matches("kind: CustomResourceDefinition").count();
    ensure!(
        count(&with) > 10 && count(&without) == 0,
        "base.enabled: {} kinds with, {} without",
        count(&with),
        count(&without)
    );
    ensure!(
        objects(&with)? == objects(&without)?,
        "base.enabled changes more than the kinds"
    );
    Ok(())
}

/// The archive of the chart is the chart.
fn packed(helm: &Path, chart: &Path, place: &Path) -> anyhow::Result<()> {
    let archive = place.join("chart.tgz");
    std::fs::write(&archive, crate::dist::chart::archive(chart)?)?;
    let template = |chart: &Path| {
        let mut command = Command::new(helm);
        run::output(
            command
                .args(["template", "mesh", "-n", "istio-system"])
                .arg(chart),
        )
    };
    ensure!(
        template(&archive)? == template(chart)?,
        "helm makes other objects of the packed chart"
    );
    Ok(())
}

/// Objects by kind and name. Kinds and the namespace are helm's own business.
fn objects(text: &str) -> anyhow::Result<BTreeMap<String, Value>> {
    let mut found = BTreeMap::new();
    for document in serde_yaml::Deserializer::from_str(text) {
        let mut object = Value::deserialize(document)?;
        let kind = object["kind"].as_str().unwrap_or_default().to_owned();
        if ["", "CustomResourceDefinition", "Namespace"].contains(&kind.as_str()) {
            continue;
        }
        let name = format!("{kind} {}", object["metadata"]["name"]);
        plain(&mut object)?;
        let twice = found.insert(name.clone(), object);
        ensure!(twice.is_none(), "{name} is there twice");
    }
    Ok(found)
}

/// Leaves out who installs; texts that hold YAML or JSON become what they hold.
fn plain(value: &mut Value) -> anyhow::Result<()> {
    match value {
        Value::Object(map) => {
            for (key, value) in map.iter_mut() {
                if !["labels", "annotations", "matchLabels"].contains(&key.as_str()) {
                    continue;
                }
                if let Some(all) = value.as_object_mut() {
                    all.retain(|name, _| !OWNERS.contains(&name.as_str()));
                }
            }
            map.retain(|key, value| {
                key != "annotations" || value.as_object().is_none_or(|all| !all.is_empty())
            });
            map.values_mut().try_for_each(plain)
        }
        Value::Array(list) => list.iter_mut().try_for_each(plain),
        Value::String(text) if text.contains('\n') || text.starts_with('{') => {
            *value = serde_yaml::from_str(text).with_context(|| format!("reading {text:?}"))?;
            Ok(())
        }
        _ => Ok(()),
    }
}

/// A release is installed, upgraded and removed; in between the mesh injects.
fn installed(helm: &Path, chart: &Path, cluster: &Cluster) -> anyhow::Result<()> {
    let call = |args: &[&str]| {
        let mut command = cluster.with_kubeconfig(helm);
        run::output(command.args(args))
    };
    let folder = chart.to_string_lossy();
    let common = [
        "mesh",
        &folder,
        "-n",
        "istio-system",
        "--wait",
        "--timeout",
        "60s",
    ];
    let install = [
        &["install"],
        &common[..],
        &["--create-namespace", "--set", "profile=demo"],
    ];
    call(&install.concat())?;
    cluster.apply(POD)?;
    cluster.wait("a pod with its sidecar", || {
        let pod = cluster.get(&["pod", "inside", "-n", "helm"])?;
        let ready = pod["status"]["conditions"].as_array().is_some_and(|all| {
            all.iter()
                .any(|c| c["type"] == "Ready" && c["status"] == "True")
        });
        let sidecar = pod.to_string().contains("\"istio-proxy\"");
        Ok((ready && sidecar).then_some(()))
    })?;
    // Another revision beside it, by a release of its own.
    let second = [
        "second",
        &folder,
        "-n",
        "istio-system",
        "--wait",
        "--timeout",
        "60s",
        "--set",
        "profile=minimal,revision=canary,base.enabled=false",
    ];
    call(&[&["install"], &second[..]].concat())?;
    call(&["uninstall", "second", "-n", "istio-system", "--wait"])?;
    let upgrade = [
        &["upgrade"],
        &common[..],
        &["--set", "profile=demo,pilot.podAnnotations.round=second"],
    ];
    call(&upgrade.concat())?;
    cluster.delete_all(POD)?;
    call(&[
        "uninstall",
        "mesh",
        "-n",
        "istio-system",
        "--wait",
        "--timeout",
        "60s",
    ])?;
    let left = cluster.get(&["deployments,services", "-n", "istio-system"])?;
    let left = left["items"].as_array().map_or(0, Vec::len);
    ensure!(
        left == 0,
        "helm uninstall left {left} Deployments and Services"
    );
    println!(
        "helm install, upgrade, uninstall: a pod was injected in between, and a second release came and went"
    );
    Ok(())
}

const POD: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: helm, labels: {istio-injection: enabled}}
---
apiVersion: v1
kind: Pod
metadata: {name: inside, namespace: helm}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: curl, image: curlimages/curl, command: [sleep, infinity]}]
";
