//! `mesh proxy-status`: which proxies are connected to which control plane, whether they have taken what they were sent, and in what one of them differs.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use crate::Global;
use crate::cluster::{Cluster, query};
use crate::pages::{self, Page};
use crate::proxy_config;
use crate::table::Table;

/// Where control planes serve their debug pages, on the pod's loopback address.
const DEBUG_PORT: u16 = 8080;
/// What the statuses of types are called, in the order of their columns.
const TYPES: [&str; 7] = ["CDS", "LDS", "EDS", "RDS", "ECDS", "SDS", "NDS"];
/// Those that the long table has, as istioctl's.
const COLUMNS: usize = 5;
/// What was never sent.
const NOT_SENT: &str = "NOT SENT";

/// Show which proxies are connected and have taken what they were sent, or in what one differs
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// POD, POD.NAMESPACE or TYPE/NAME: compare what this proxy has with what its control plane has for it; it ends with 1 if they differ
    #[arg(value_name = "POD")]
    target: Option<String>,
    /// Proxies of the control plane of this revision alone
    #[arg(short, long, value_name = "NAME")]
    revision: Option<String>,
    /// 1: the state of each type: SYNCED, STALE (not acknowledged yet), NACK (refused) or NOT SENT
    #[arg(short, long, value_name = "LEVEL", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=1))]
    verbosity: u8,
    /// Form of the output: table or json
    #[arg(short, long, value_name = "FORM", default_value = "table", value_parser = ["table", "json"], conflicts_with = "target")]
    output: String,
}

/// A connected proxy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Proxy {
    /// `POD.NAMESPACE`.
    name: String,
    cluster: String,
    istiod: String,
    version: String,
    /// State by type.
    types: BTreeMap<String, String>,
}

/// Runs the command.
///
/// # Errors
/// No control plane that runs, or none that answers; a proxy that is not there or not connected.
pub async fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    let cluster = global.cluster().await?;
    let planes = control_planes(&cluster, &global.istio_namespace, args.revision.as_deref());
    let planes = planes.await?;
    if let Some(target) = &args.target {
        return compare(&cluster, &planes, target, global).await;
    }
    let mut proxies = Vec::new();
    for plane in &planes {
        let page = async |path: &str| {
            let page = plane.page(&cluster, path).await?;
            page.json().with_context(|| plane.asking())
        };
        proxies.extend(joined(
            &page("/debug/syncz").await?,
            &page("/debug/adsz").await?,
            &plane.name,
        ));
    }
    proxies.sort_by(|one, other| (&one.name, &one.istiod).cmp(&(&other.name, &other.istiod)));
    if args.output == "json" {
        let all: Vec<Value> = proxies.iter().map(tree).collect();
        global.out.line(serde_json::to_string_pretty(&all)?)?;
    } else {
        let table = table(&proxies, args.verbosity > 0);
        global.out.print(&table.render(&table.widths(), true))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A pod of a control plane.
struct Plane {
    namespace: String,
    name: String,
}

impl Plane {
    fn asking(&self) -> String {
        format!(
            "asking the control plane of pod {} in namespace {}",
            self.name, self.namespace
        )
    }

    async fn page(&self, cluster: &Cluster, path: &str) -> anyhow::Result<Page> {
        pages::get(cluster, &self.namespace, &self.name, DEBUG_PORT, path)
            .await
            .with_context(|| self.asking())
    }
}

async fn control_planes(
    cluster: &Cluster,
    namespace: &str,
    revision: Option<&str>,
) -> anyhow::Result<Vec<Plane>> {
    let selector = match revision {
        Some(revision) => format!("app=istiod,istio.io/rev={revision}"),
        None => "app=istiod".to_owned(),
    };
    let path = format!(
        "/api/v1/namespaces/{namespace}/pods?labelSelector={}",
        query(&selector)
    );
    let pods = cluster.read(&path).await?;
    let running = pods["items"].as_array().into_iter().flatten();
    let running = running.filter(|pod| {
        pod["status"]["phase"] == "Running" && pod["metadata"]["deletionTimestamp"].is_null()
    });
    let planes: Vec<Plane> = running
        .filter_map(|pod| pod["metadata"]["name"].as_str())
        .map(|name| Plane {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })
        .collect();
    if planes.is_empty() {
        bail!(
            "no control plane{} runs in namespace {namespace} (pods labelled app=istiod); --istioNamespace names another",
            revision.map_or(String::new(), |revision| format!(
                " of revision {revision:?}"
            ))
        );
    }
    Ok(planes)
}

/// Proxies of one control plane: of two pages, by their names.
fn joined(syncz: &Value, adsz: &Value, istiod: &str) -> Vec<Proxy> {
    let mut types: BTreeMap<&str, BTreeMap<String, String>> = BTreeMap::new();
    for client in adsz["clients"].as_array().into_iter().flatten() {
        // KIND~ADDRESS~POD.NAMESPACE~DOMAIN
        let id = client["connectionId"].as_str().unwrap_or_default();
        let name = id.split('~').nth(2).unwrap_or(id);
        let watches = client["watches"].as_object().into_iter().flatten();
        let of = watches.filter_map(|(kind, watch)| {
            let status = watch["status"].as_str()?;
            Some((kind.clone(), status.to_owned()))
        });
        types.entry(name).or_default().extend(of);
    }
    let rows = syncz.as_array().into_iter().flatten();
    rows.map(|row| {
        let text = |field: &str| row[field].as_str().unwrap_or_default().to_owned();
        let name = text("proxy");
        Proxy {
            types: types.get(name.as_str()).cloned().unwrap_or_default(),
            name,
            cluster: text("cluster_id"),
            istiod: istiod.to_owned(),
            version: text("istio_version"),
        }
    })
    .collect()
}

fn tree(proxy: &Proxy) -> Value {
    json!({
        "proxy": proxy.name, "cluster_id": proxy.cluster, "istiod": proxy.istiod, "istio_version": proxy.version, "types": proxy.types,
    })
}

/// istioctl's columns.
fn table(proxies: &[Proxy], by_type: bool) -> Table {
    let mut headings = vec!["NAME", "CLUSTER"];
    if by_type {
        headings.extend(&TYPES[..COLUMNS]);
    }
    headings.extend(["ISTIOD", "VERSION"]);
    if !by_type {
        headings.push("SUBSCRIBED TYPES");
    }
    let rows = proxies.iter().map(|proxy| {
        let status = |kind: &str| proxy.types.get(kind).map_or(NOT_SENT, String::as_str);
        let mut row = vec![proxy.name.clone(), proxy.cluster.clone()];
        if by_type {
            row.extend(TYPES[..COLUMNS].iter().map(|kind| status(kind).to_owned()));
        }
        row.extend([proxy.istiod.clone(), proxy.version.clone()]);
        if !by_type {
            let known = TYPES
                .iter()
                .copied()
                .filter(|kind| status(kind) != NOT_SENT);
            let known: Vec<&str> = known.collect();
            row.push(format!("{} ({})", known.len(), known.join(",")));
        }
        row
    });
    Table::new(&headings, rows.collect())
}

/// Compares one proxy with its control plane.
async fn compare(
    cluster: &Cluster,
    planes: &[Plane],
    target: &str,
    global: &Global,
) -> anyhow::Result<ExitCode> {
    let (namespace, pod) = proxy_config::pod_of(cluster, target).await?;
    let path = format!(
        "/debug/config_dump?proxyID={}",
        query(&format!("{pod}.{namespace}"))
    );
    let mut wanted = None;
    for plane in planes {
        let page = plane.page(cluster, &path).await?;
        if page.status != http::StatusCode::NOT_FOUND {
            wanted = Some(page.json().with_context(|| plane.asking())?);
            break;
        }
    }
    let Some(wanted) = wanted else {
        bail!(
            "proxy {pod}.{namespace} is not connected to a control plane in namespace {}; `mesh proxy-status` lists those that are",
            global.istio_namespace
        );
    };
    let found = proxy_config::admin(cluster, &namespace, &pod, "/config_dump?include_eds").await;
    let found =
        found.with_context(|| format!("asking the proxy of pod {pod} in namespace {namespace}"))?;
    let (wanted, found) = (sent(&wanted), held(&found));
    let mut differ = false;
    for (kind, title) in [
        ("CDS", "Clusters"),
        ("LDS", "Listeners"),
        ("RDS", "Routes"),
        ("EDS", "Endpoints"),
    ] {
        let nothing = BTreeMap::new();
        let (ours, its) = (
            wanted.get(kind).unwrap_or(&nothing),
            found.get(kind).unwrap_or(&nothing),
        );
        if ours == its {
            global.out.line(format_args!("{title} Match"))?;
            continue;
        }
        differ = true;
        global.out.line(format_args!("{title} Don't Match"))?;
        let (ours, its) = (json!(ours), json!(its));
        let (ours, its) = (
            mesh_api::yaml::to_string(&ours),
            mesh_api::yaml::to_string(&its),
        );
        let difference = similar::TextDiff::from_lines(&ours, &its)
            .unified_diff()
            .header(&format!("Control plane {title}"), &format!("Proxy {title}"))
            .to_string();
        global.out.print(&difference)?;
    }
    Ok(match differ {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}

/// Resources by type and name.
type Resources = BTreeMap<&'static str, BTreeMap<String, Value>>;

/// What a control plane has for a proxy, of its debug page.
fn sent(dump: &Value) -> Resources {
    let mut all = Resources::new();
    for config in dump["configs"].as_array().into_iter().flatten() {
        let known = TYPES.iter().find(|kind| config["type"] == **kind);
        let name = config["name"].as_str().unwrap_or_default();
        if let Some(kind) = known {
            let of_kind = all.entry(kind).or_default();
            of_kind.insert(name.to_owned(), bare(&config["resource"]));
        }
    }
    all
}

/// What a proxy has, of its own dump (`envoy.admin.v3.ConfigDump`).
fn held(dump: &Value) -> Resources {
    let mut all = Resources::new();
    for (kind, list, place, name) in [
        ("CDS", "dynamic_active_clusters", "/cluster", "name"),
        ("LDS", "dynamic_listeners", "/active_state/listener", "name"),
        ("RDS", "dynamic_route_configs", "/route_config", "name"),
        (
            "EDS",
            "dynamic_endpoint_configs",
            "/endpoint_config",
            "cluster_name",
        ),
    ] {
        let sections = dump["configs"].as_array().into_iter().flatten();
        let entries = sections.filter_map(|section| section[list].as_array());
        for resource in entries.flatten().filter_map(|entry| entry.pointer(place)) {
            let name = resource[name].as_str().unwrap_or_default();
            let of_kind = all.entry(kind).or_default();
            of_kind.insert(name.to_owned(), bare(resource));
        }
    }
    all
}

/// Without the name of its type, which one of the two has.
fn bare(resource: &Value) -> Value {
    let mut resource = resource.clone();
    if let Some(fields) = resource.as_object_mut() {
        fields.shift_remove("@type");
    }
    resource
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proxies_are_shown_in_istioctls_columns() {
        let syncz = json!([
            { "proxy": "b.default", "cluster_id": "Kubernetes", "istio_version": "1.2.3" },
            { "proxy": "a.default", "cluster_id": "Kubernetes", "istio_version": "1.2.3" },
        ]);
        let watches = json!({ "CDS": { "status": "SYNCED" }, "LDS": { "status": "STALE" }, "RDS": { "status": "NOT SENT" }, "NDS": { "status": "SYNCED" } });
        let adsz = json!({ "clients": [{ "connectionId": "sidecar~10.0.0.1~b.default~default.svc.cluster.local", "watches": watches }] });
        let proxies = joined(&syncz, &adsz, "istiod-0");
        let shown = |by_type| {
            let table = table(&proxies, by_type);
            table.render(&table.widths(), true)
        };
        assert_eq!(
            shown(false),
            "NAME        CLUSTER      ISTIOD     VERSION   SUBSCRIBED TYPES\n\
             b.default   Kubernetes   istiod-0   1.2.3     3 (CDS,LDS,NDS)\n\
             a.default   Kubernetes   istiod-0   1.2.3     0 ()\n"
        );
        let long = shown(true);
        let second = long.lines().nth(1).expect("a row");
        let words: Vec<&str> = second.split_whitespace().collect();
        assert_eq!(
            words.join(" "),
            "b.default Kubernetes SYNCED STALE NOT SENT NOT SENT NOT SENT istiod-0 1.2.3"
        );
    }

    #[test]
    fn both_dumps_are_read() {
        let cluster =
            json!({ "@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster", "name": "c" });
        let given = json!({ "configs": [
            { "type": "CDS", "name": "c", "resource": cluster },
            { "type": "SDS", "name": "default", "resource": { "name": "default" } },
        ] });
        let own = json!({ "configs": [
            { "@type": "x", "dynamic_active_clusters": [{ "cluster": { "name": "c" } }] },
            { "@type": "y", "dynamic_endpoint_configs": [{ "endpoint_config": { "cluster_name": "c" } }] },
        ] });
        assert_eq!(sent(&given)["CDS"], held(&own)["CDS"]);
        assert!(held(&own)["EDS"].contains_key("c"));
    }
}
