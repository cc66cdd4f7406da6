//! `mesh kube-inject`: adds the sidecar to manifests, without a webhook.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use mesh_api::mesh_config::MeshConfig;
use mesh_inject::{InjectContext, InjectorConfig, inject_manifest};
use serde_json::Value;

use crate::Global;
use crate::cluster::Cluster;
use crate::files;

/// The revision that has no name in the names of its objects.
const DEFAULT_REVISION: &str = "default";
/// The first version of the kubelet whose native sidecars are for everybody.
const NATIVE_SIDECARS: u32 = 33;

/// Add the sidecar to the pods in manifests, and print the result
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Manifests, YAML or JSON, or `-` for standard input
    #[arg(short, long, required = true, value_name = "FILE")]
    pub filename: PathBuf,
    /// Write to a file instead of standard output
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Settings of the injector, as in the key `config` of its ConfigMap [default: the cluster's]
    #[arg(long = "injectConfigFile", value_name = "FILE")]
    pub inject_config_file: Option<PathBuf>,
    /// Values of the installation, as in the key `values` of the injector's ConfigMap [default: the cluster's, with --injectConfigFile none]
    #[arg(
        long = "valuesFile",
        value_name = "FILE",
        requires = "inject_config_file"
    )]
    pub values_file: Option<PathBuf>,
    /// Settings of the mesh, as in the key `mesh` of its ConfigMap [default: the cluster's]
    #[arg(long = "meshConfigFile", value_name = "FILE")]
    pub mesh_config_file: Option<PathBuf>,
    /// The injector's ConfigMap
    #[arg(
        long = "injectConfigMapName",
        value_name = "NAME",
        default_value = "istio-sidecar-injector"
    )]
    pub inject_config_map_name: String,
    /// The mesh's ConfigMap
    #[arg(
        long = "meshConfigMapName",
        value_name = "NAME",
        default_value = "istio"
    )]
    pub mesh_config_map_name: String,
    /// Revision of the control plane that the proxies belong to
    #[arg(long, value_name = "NAME", default_value = DEFAULT_REVISION)]
    pub revision: String,
}

/// Runs the command. Everything that is no pod and has none in it comes out as it was.
///
/// # Errors
/// A manifest or a setting that can't be read, a pod that can't be injected, a cluster that is needed and can't be reached; nothing is written
/// then.
pub async fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    let (name, text) = files::text(&args.filename)?;
    let settings = Settings::load(&args, global).await?;
    let (result, notes) = injected(&text, &name, &settings)?;
    for note in notes {
        eprintln!("{note}");
    }
    match &args.output {
        Some(path) => {
            std::fs::write(path, result).with_context(|| format!("writing {}", path.display()))?
        }
        None => global.out.print(&result)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// All that injection needs beside the manifest.
struct Settings {
    config: InjectorConfig,
    mesh: MeshConfig,
    namespace: String,
    revision: String,
    native_sidecars: bool,
}

impl Settings {
    async fn load(args: &Args, global: &Global) -> anyhow::Result<Self> {
        let from_files = args.inject_config_file.is_some() && args.mesh_config_file.is_some();
        // Where files say everything no cluster is asked for anything.
        let cluster = match from_files {
            true => None,
            false => Some(global.cluster().await?),
        };
        let live = Live {
            cluster: cluster.as_ref(),
            namespace: &global.istio_namespace,
            revision: &args.revision,
        };
        let (config, values) = match &args.inject_config_file {
            Some(path) => {
                let values = args.values_file.as_deref().map(read).transpose()?;
                (read(path)?, values.unwrap_or_default())
            }
            None => {
                let data = live.config_map(&args.inject_config_map_name).await?;
                (text_of(&data, "config"), text_of(&data, "values"))
            }
        };
        let mesh = match &args.mesh_config_file {
            Some(path) => read(path)?,
            None => text_of(&live.config_map(&args.mesh_config_map_name).await?, "mesh"),
        };
        let namespace = match (&global.namespace, &cluster) {
            (Some(name), _) => name.clone(),
            (None, Some(cluster)) => cluster.namespace.clone(),
            (None, None) => "default".to_owned(),
        };
        Ok(Self {
            config: InjectorConfig::from_config_map(&config, &values)
                .context("reading the injector's settings")?,
            mesh: MeshConfig::from_yaml(&mesh).context("reading the mesh's settings")?,
            namespace,
            revision: args.revision.clone(),
            native_sidecars: live.native_sidecars().await,
        })
    }
}

fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}

fn text_of(data: &Value, key: &str) -> String {
    data[key].as_str().unwrap_or_default().to_owned()
}

/// What the cluster says.
struct Live<'a> {
    cluster: Option<&'a Cluster>,
    namespace: &'a str,
    revision: &'a str,
}

impl Live<'_> {
    /// The data of a ConfigMap of the mesh.
    async fn config_map(&self, name: &str) -> anyhow::Result<Value> {
        let cluster = self.cluster.context("no cluster was chosen")?;
        let name = match self.revision {
            DEFAULT_REVISION => name.to_owned(),
            revision => format!("{name}-{revision}"),
        };
        let path = format!("/api/v1/namespaces/{}/configmaps/{name}", self.namespace);
        let map = cluster.read_optional(&path).await?;
        let map = map.with_context(|| {
            format!(
                "there is no ConfigMap {}/{name}: is the mesh installed (--istioNamespace, --revision)? Without it say the settings by \
                 --injectConfigFile and --meshConfigFile",
                self.namespace
            )
        })?;
        Ok(map["data"].clone())
    }

    /// Whether every kubelet can run native sidecars; who may not see the nodes gets the kind of sidecar that runs everywhere.
    async fn native_sidecars(&self) -> bool {
        let Some(cluster) = self.cluster else {
            return false;
        };
        let nodes = cluster.read("/api/v1/nodes").await.unwrap_or_default();
        let nodes = nodes["items"].as_array().map_or(&[][..], Vec::as_slice);
        let new = |node: &Value| {
            let version = node["status"]["nodeInfo"]["kubeletVersion"].as_str();
            version
                .and_then(minor)
                .is_some_and(|minor| minor >= NATIVE_SIDECARS)
        };
        !nodes.is_empty() && nodes.iter().all(new)
    }
}

/// 33 of `v1.33.1`.
fn minor(version: &str) -> Option<u32> {
    let digits = version.strip_prefix("v1.")?;
    digits
        .split(|c: char| !c.is_ascii_digit())
        .next()?
        .parse()
        .ok()
}

/// The text with the sidecars in it, and what is to be said about it. JSON stays JSON; documents without a pod stay as they are written.
fn injected(text: &str, name: &str, settings: &Settings) -> anyhow::Result<(String, Vec<String>)> {
    let labels = BTreeMap::new();
    let context = InjectContext {
        namespace: &settings.namespace,
        namespace_labels: &labels,
        mesh: &settings.mesh,
        config: &settings.config,
        revision: &settings.revision,
        native_sidecars: settings.native_sidecars,
        workload: None,
    };
    let json = text.trim_start().starts_with(['{', '[']);
    let (mut parts, mut notes) = (Vec::new(), Vec::new());
    for (index, part) in documents(text).into_iter().enumerate() {
        let name = format!("{name}: document {}", index + 1);
        let mut objects = mesh_api::yaml::documents(part, &name)?.into_iter();
        // Nothing but comments, or nothing at all.
        let Some(object) = objects.next().filter(|object| !object.is_null()) else {
            continue;
        };
        let result = inject_manifest(&object, &context)
            .map_err(|(place, error)| anyhow::anyhow!("{name}: {place}: {error}"))?;
        notes.extend(result.notes);
        parts.push(if result.object == object {
            format!("{}\n", part.trim_end())
        } else if json {
            format!("{}\n", serde_json::to_string_pretty(&result.object)?)
        } else {
            mesh_api::yaml::to_string(&result.object)
        });
    }
    Ok((parts.join("---\n"), notes))
}

/// The documents of a YAML text, as they are written. A line that begins with `---` is never part of one (YAML 1.2.2, 9.1.2).
fn documents(text: &str) -> Vec<&str> {
    let (mut parts, mut start, mut at) = (Vec::new(), 0, 0);
    for line in text.split_inclusive('\n') {
        let rest = line.strip_prefix("---");
        if let Some(rest) = rest.filter(|r| r.trim().is_empty() || r.starts_with([' ', '\t'])) {
            parts.push(&text[start..at]);
            // What stands on the same line belongs to the document.
            start = match rest.trim() {
                "" => at + line.len(),
                _ => at + 3,
            };
        }
        at += line.len();
    }
    parts.push(&text[start..]);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            config: InjectorConfig::default(),
            mesh: MeshConfig::default(),
            namespace: "default".to_owned(),
            revision: DEFAULT_REVISION.to_owned(),
            native_sidecars: true,
        }
    }

    const SERVICE: &str =
        "# A comment that stays.\nkind: Service\napiVersion: v1\nmetadata: {name: a}\n";
    const POD: &str =
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {containers: [{name: c}]}\n";

    #[test]
    fn what_has_no_pod_comes_out_as_it_is_written() {
        let text = format!("---\n{SERVICE}---\n# nothing\n--- \n{POD}");
        let (result, notes) = injected(&text, "x", &settings()).expect("injected");
        let rest = result.strip_prefix(SERVICE).expect("the service first");
        assert!(rest.starts_with("---\napiVersion: v1\nkind: Pod"), "{rest}");
        assert_eq!((result.matches("---\n").count(), notes.len()), (1, 0));
        let (twice, notes) = injected(&result, "x", &settings()).expect("injected");
        assert_eq!(twice, result);
        assert_eq!(
            notes,
            ["Pod default/p: left as it is: the pod has a sidecar already"]
        );
    }

    #[test]
    fn json_stays_json() {
        let text = r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p"},"spec":{"containers":[{"name":"c"}]}}"#;
        let (result, _) = injected(text, "x", &settings()).expect("injected");
        let object: Value = serde_json::from_str(&result).expect("JSON");
        assert_eq!(object["spec"]["initContainers"][1]["name"], "istio-proxy");
    }

    #[test]
    fn errors_name_the_document_and_the_object() {
        let text = format!(
            "{SERVICE}---\n{}",
            POD.replace(
                "name: p",
                "name: p, annotations: {sidecar.istio.io/inject: maybe}"
            )
        );
        let error = injected(&text, "x.yaml", &settings())
            .expect_err("refused")
            .to_string();
        assert!(
            error.starts_with("x.yaml: document 2: Pod default/p: "),
            "{error}"
        );
    }

    #[test]
    fn versions_of_kubelets_are_read() {
        assert_eq!(minor("v1.33.1"), Some(33));
        assert_eq!(minor("v1.28.4-gke.100"), Some(28));
        assert_eq!(minor("v1.36+"), Some(36));
        assert_eq!(minor("v2"), None);
    }
}
