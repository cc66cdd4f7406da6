//! `mesh version`: versions of this program, the control plane and the proxies.

use std::collections::BTreeMap;
use std::process::ExitCode;

use serde_json::{Value, json};

use crate::Global;
use crate::cluster::Cluster;
use crate::get::Output;
use crate::install::DEFAULT_REVISION;

/// Show versions of this program, the control plane and the proxies
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Ask the cluster for its control plane and proxies
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub remote: bool,
    /// Numbers only
    #[arg(short, long)]
    pub short: bool,
    /// Form of the output: yaml or json
    #[arg(short, long, value_name = "FORM", value_parser = form)]
    pub output: Option<Output>,
}

/// YAML or JSON.
pub(crate) fn form(text: &str) -> Result<Output, String> {
    match text {
        "yaml" => Ok(Output::Yaml),
        "json" => Ok(Output::Json),
        _ => Err("write yaml or json".to_owned()),
    }
}

/// This program's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// A version, and the revision that has it.
type Instance = (String, String);

/// Versions in the cluster by revision, with the number of instances.
#[derive(Debug, Default)]
struct Remote {
    control_plane: BTreeMap<Instance, usize>,
    proxies: BTreeMap<Instance, usize>,
}

/// Runs the command. A cluster that can't be reached is a note, not a failure.
///
/// # Errors
/// None but output that can't be written.
pub async fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    let remote = match args.remote {
        true => ask(global)
            .await
            .inspect_err(|error| eprintln!("control plane: {error:#}"))
            .ok(),
        false => None,
    };
    match args.output {
        Some(Output::Json) => global
            .out
            .line(serde_json::to_string_pretty(&object(remote.as_ref()))?)?,
        Some(_) => global
            .out
            .print(&mesh_api::yaml::to_string(&object(remote.as_ref())))?,
        None => global.out.print(&text(remote.as_ref(), args.short))?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn ask(global: &Global) -> anyhow::Result<Remote> {
    let cluster = global.cluster().await?;
    let pods = cluster
        .read(&format!(
            "/api/v1/namespaces/{}/pods?labelSelector=app%3Distiod",
            global.istio_namespace
        ))
        .await?;
    let mut remote = Remote {
        control_plane: images(&pods, "discovery"),
        ..Remote::default()
    };
    remote.proxies = proxies(&cluster).await?;
    Ok(remote)
}

async fn proxies(cluster: &Cluster) -> anyhow::Result<BTreeMap<Instance, usize>> {
    Ok(images(
        &cluster.read("/api/v1/pods").await?,
        mesh_inject::PROXY_CONTAINER,
    ))
}

/// Tags of a container's image over all running pods, with the pods' revisions: control planes are labelled, pods with proxies annotated.
fn images(pods: &Value, container: &str) -> BTreeMap<Instance, usize> {
    let mut count = BTreeMap::new();
    for pod in pods["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|pod| pod["status"]["phase"] == "Running")
    {
        let metadata = &pod["metadata"];
        let revision = metadata["annotations"]["istio.io/rev"]
            .as_str()
            .or(metadata["labels"]["istio.io/rev"].as_str())
            .unwrap_or(DEFAULT_REVISION);
        let lists = ["containers", "initContainers"]
            .iter()
            .flat_map(|list| pod["spec"][*list].as_array().into_iter().flatten());
        for image in lists
            .filter(|entry| entry["name"] == container)
            .filter_map(|entry| entry["image"].as_str())
        {
            let name = image.rsplit('/').next().unwrap_or(image);
            let tag = name
                .split_once(':')
                .map_or("latest", |(_, tag)| tag.split('@').next().unwrap_or(tag));
            let instance = (tag.to_owned(), revision.to_owned());
            *count.entry(instance).or_insert(0) += 1;
        }
    }
    count
}

fn text(remote: Option<&Remote>, short: bool) -> String {
    let mut out = if short && remote.is_none() {
        format!("{VERSION}\n")
    } else {
        format!("client version: {VERSION}\n")
    };
    let Some(remote) = remote else {
        return out;
    };
    if remote.control_plane.is_empty() {
        out.push_str("control plane version: none running\n");
    }
    // One that is alone and is called default needs no name.
    let several = [&remote.control_plane, &remote.proxies]
        .iter()
        .any(|map| map.keys().any(|(_, revision)| revision != DEFAULT_REVISION));
    let of = |revision: &str| match several {
        true => format!("revision {revision}"),
        false => String::new(),
    };
    for (version, revision) in remote.control_plane.keys() {
        let of = match of(revision).as_str() {
            "" => String::new(),
            of => format!(" ({of})"),
        };
        out.push_str(&format!("control plane version: {version}{of}\n"));
    }
    if !remote.proxies.is_empty() {
        let list: Vec<String> = remote
            .proxies
            .iter()
            .map(|((version, revision), count)| {
                let of = match of(revision).as_str() {
                    "" => String::new(),
                    of => format!(", {of}"),
                };
                let proxies = if *count == 1 { "proxy" } else { "proxies" };
                format!("{version} ({count} {proxies}{of})")
            })
            .collect();
        out.push_str(&format!("data plane version: {}\n", list.join(", ")));
    }
    out
}

fn object(remote: Option<&Remote>) -> Value {
    let mut object = json!({ "clientVersion": { "version": VERSION } });
    if let Some(remote) = remote {
        let entries = |map: &BTreeMap<Instance, usize>| {
            map.iter()
                .map(|((version, revision), count)| {
                    json!({ "version": version, "revision": revision, "instances": count })
                })
                .collect::<Vec<_>>()
        };
        object["meshVersion"] = json!(entries(&remote.control_plane));
        object["dataPlaneVersion"] = json!(entries(&remote.proxies));
    }
    object
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_runs() {
        let pod = |name: &str, image: &str, phase: &str| json!({ "spec": { "containers": [{ "name": name, "image": image }] }, "status": { "phase": phase } });
        let pods = json!({ "items": [pod("discovery", "mesh:0.1.0", "Running"), pod("istio-proxy", "r:5000/a/mesh:0.2@sha256:1", "Running"), pod("istio-proxy", "mesh:0.1.0", "Failed")] });
        let remote = Remote {
            control_plane: images(&pods, "discovery"),
            proxies: images(&pods, "istio-proxy"),
        };
        assert_eq!(
            text(Some(&remote), false),
            format!(
                "client version: {VERSION}\ncontrol plane version: 0.1.0\ndata plane version: 0.2 (1 proxy)\n"
            )
        );
        assert_eq!(text(None, true), format!("{VERSION}\n"));
        assert_eq!(object(Some(&remote))["dataPlaneVersion"][0]["instances"], 1);
    }

    #[test]
    fn says_whose_proxies_they_are() {
        let pod = |name: &str, tag: &str, place: &str, revision: &str| json!({ "metadata": { place: { "istio.io/rev": revision } }, "spec": { "containers": [{ "name": name, "image": format!("mesh:{tag}") }] }, "status": { "phase": "Running" } });
        let pods = json!({ "items": [
            pod("discovery", "1", "labels", "default"), pod("discovery", "2", "labels", "canary"),
            pod("istio-proxy", "1", "annotations", "default"), pod("istio-proxy", "1", "annotations", "canary"), pod("istio-proxy", "1", "annotations", "canary"),
        ] });
        let remote = Remote {
            control_plane: images(&pods, "discovery"),
            proxies: images(&pods, "istio-proxy"),
        };
        assert_eq!(
            text(Some(&remote), false),
            format!(
                "client version: {VERSION}\ncontrol plane version: 1 (revision default)\ncontrol plane version: 2 (revision canary)\n\
                 data plane version: 1 (2 proxies, revision canary), 1 (1 proxy, revision default)\n"
            )
        );
        let planes = &object(Some(&remote))["meshVersion"];
        assert_eq!(
            planes[1],
            json!({ "version": "2", "revision": "canary", "instances": 1 })
        );
    }
}
