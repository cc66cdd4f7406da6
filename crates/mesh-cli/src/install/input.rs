//! What is asked for: a profile, files over it, `--set` over these.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use super::path::{self, Step, merge};
use super::schema;

/// Profiles by name, and what each is for.
pub const PROFILES: [(&str, &str); 7] = [
    ("default", include_str!("profiles/default.yaml")),
    ("demo", include_str!("profiles/demo.yaml")),
    ("minimal", include_str!("profiles/minimal.yaml")),
    ("empty", include_str!("profiles/empty.yaml")),
    ("remote", include_str!("profiles/remote.yaml")),
    ("openshift", include_str!("profiles/openshift.yaml")),
    ("preview", include_str!("profiles/preview.yaml")),
];

/// Where settings come from.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Settings {
    /// IstioOperator file with settings, or `-` for standard input; may be repeated, later ones win
    #[arg(short, long, value_name = "FILE")]
    pub filename: Vec<PathBuf>,
    /// Setting by its path, such as profile=demo or values.global.hub=registry.example/mesh; may be repeated, over all files
    #[arg(short, long, value_name = "PATH=VALUE")]
    pub set: Vec<String>,
    /// Name of this control plane where several run in one cluster (the setting `revision`)
    #[arg(short, long, value_name = "NAME")]
    pub revision: Option<String>,
}

impl Settings {
    /// All settings laid over each other, as the spec of an IstioOperator. `namespace` is that of the mesh's own parts, where it was given.
    ///
    /// # Errors
    /// A file that can't be read, an unknown profile, a setting that there is not or that has a wrong value; with where it stands.
    pub fn spec(&self, namespace: Option<&str>) -> anyhow::Result<Value> {
        let mut over = json!({});
        for file in &self.filename {
            let (origin, spec) = read(file)?;
            schema::check(&spec).with_context(|| origin.clone())?;
            merge(&mut over, spec);
        }
        let mut sets = Vec::new();
        for setting in &self.set {
            let parsed = parse(setting).with_context(|| format!("--set {setting}"))?;
            if parsed.0 == [Step::Key("profile".to_owned())] {
                over["profile"] = parsed.1;
            } else {
                sets.push((setting, parsed));
            }
        }
        let name = over["profile"].as_str().unwrap_or("default").to_owned();
        let mut spec = profile(&name)?;
        merge(&mut spec, over);
        for (setting, (steps, value)) in sets {
            let done = match value {
                Value::Null => path::remove(&mut spec, &steps).map(|_| ()),
                value => path::set(&mut spec, &steps, value),
            };
            done.map_err(anyhow::Error::msg)
                .with_context(|| format!("--set {setting}"))?;
        }
        if let Some(revision) = &self.revision {
            spec["revision"] = json!(revision);
        }
        if let Some(namespace) = namespace {
            spec["namespace"] = json!(namespace);
        }
        Ok(spec)
    }
}

/// The spec of a profile, whole.
///
/// # Errors
/// No such profile; the message names those that there are.
pub fn profile(name: &str) -> anyhow::Result<Value> {
    let of = |name: &str| PROFILES.iter().find(|(known, _)| *known == name);
    let (Some((_, text)), Some((_, base))) = (of(name), of("default")) else {
        let known: Vec<&str> = PROFILES.iter().map(|(name, _)| *name).collect();
        bail!(
            "there is no profile {name:?}; there are {}",
            known.join(", ")
        );
    };
    let mut spec = operator(base, "profile default")?;
    if name != "default" {
        merge(&mut spec, operator(text, &format!("profile {name}"))?);
    }
    let mut whole = json!({ "profile": name, "hub": "", "tag": crate::version::VERSION });
    merge(&mut whole, spec);
    Ok(whole)
}

fn read(file: &Path) -> anyhow::Result<(String, Value)> {
    let (name, text) = crate::files::text(file)?;
    let spec = operator(&text, &name)?;
    Ok((name, spec))
}

/// The spec of a text with one IstioOperator.
fn operator(text: &str, name: &str) -> anyhow::Result<Value> {
    let mut documents = mesh_api::yaml::documents(text, name)?;
    let (Some(mut document), None) = (documents.pop(), documents.pop()) else {
        bail!("{name}: one document is wanted, an IstioOperator with its spec");
    };
    let kind = document["kind"].as_str().unwrap_or_default();
    let version = document["apiVersion"].as_str().unwrap_or_default();
    if kind != "IstioOperator" || version != "install.istio.io/v1alpha1" {
        bail!(
            "{name}: kind {kind:?} in {version:?} holds no settings of an installation; write apiVersion: install.istio.io/v1alpha1, kind: IstioOperator, spec: ..."
        );
    }
    let fields = document.as_object().into_iter().flatten();
    for (field, _) in fields {
        if !["apiVersion", "kind", "metadata", "spec", "status"].contains(&field.as_str()) {
            bail!("{name}: {field}: settings stand below spec");
        }
    }
    let spec = document["spec"].take();
    match spec {
        Value::Null => Ok(json!({})),
        Value::Object(_) => Ok(spec),
        _ => bail!("{name}: spec: a map of settings is wanted"),
    }
}

/// Reads one `PATH=VALUE`, and checks it by itself.
fn parse(setting: &str) -> anyhow::Result<(Vec<Step>, Value)> {
    let Some((path, text)) = setting.split_once('=') else {
        bail!("write PATH=VALUE, such as profile=demo");
    };
    let path = path.strip_prefix("spec.").unwrap_or(path);
    let steps = path::parse(path).map_err(anyhow::Error::msg)?;
    let value = schema::value_of(&steps, text)?;
    let alone: Vec<Step> = steps
        .iter()
        .map(|step| match step {
            Step::Key(_) => step.clone(),
            Step::Index(_) | Step::Item(..) => Step::Index(0),
        })
        .collect();
    let mut only = Value::Null;
    path::set(&mut only, &alone, value.clone()).map_err(anyhow::Error::msg)?;
    schema::check(&only)?;
    Ok((steps, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(sets: &[&str]) -> anyhow::Result<Value> {
        let settings = Settings {
            set: sets.iter().map(|set| (*set).to_owned()).collect(),
            ..Settings::default()
        };
        settings.spec(None)
    }

    #[test]
    fn profiles_pass_the_check() {
        for (name, _) in PROFILES {
            let spec = profile(name).expect(name);
            schema::check(&spec).expect(name);
            assert_eq!(spec["profile"], name);
        }
        let error = profile("demos").expect_err("unknown").to_string();
        assert!(error.contains("default, demo, minimal"), "{error}");
    }

    #[test]
    fn later_settings_win() {
        let directory = tempfile::tempdir().expect("directory");
        let file = |name: &str, spec: &str| {
            let path = directory.path().join(name);
            let text =
                format!("apiVersion: install.istio.io/v1alpha1\nkind: IstioOperator\nspec: {spec}");
            std::fs::write(&path, text).expect("file");
            path
        };
        let settings = Settings {
            filename: vec![
                file("a.yaml", "{profile: demo, hub: one, tag: t1}"),
                file("b.yaml", "{hub: two}"),
            ],
            set: vec!["tag=1.20".to_owned()],
            revision: Some("canary".to_owned()),
        };
        let spec = settings.spec(Some("mesh")).expect("settings");
        assert_eq!(
            (&spec["profile"], &spec["hub"], &spec["tag"]),
            (&json!("demo"), &json!("two"), &json!("1.20"))
        );
        assert_eq!(
            (&spec["revision"], &spec["namespace"]),
            (&json!("canary"), &json!("mesh"))
        );
        let wrong = Settings {
            filename: vec![file("c.yaml", "{hubb: x}")],
            ..Settings::default()
        };
        let error = format!("{:#}", wrong.spec(None).expect_err("unknown"));
        assert!(
            error.contains("c.yaml: hubb: there is no such setting; did you mean hub?"),
            "{error}"
        );
        let path = directory.path().join("d.yaml");
        std::fs::write(&path, "kind: Pod\napiVersion: v1").expect("file");
        let wrong = Settings {
            filename: vec![path],
            ..Settings::default()
        };
        let error = format!("{:#}", wrong.spec(None).expect_err("a pod"));
        assert!(error.contains("holds no settings"), "{error}");
    }

    #[test]
    fn a_gateway_is_meant_by_position_or_name() {
        for path in [
            "ingressGateways[0]",
            "ingressGateways[name:istio-ingressgateway]",
        ] {
            let spec = spec(&[&format!("components.{path}.k8s.replicaCount=3")]).expect(path);
            let gateway = &spec["components"]["ingressGateways"][0];
            assert_eq!(gateway["k8s"]["replicaCount"], 3, "{path}");
            assert_eq!(gateway["enabled"], true, "{path}");
        }
        for (sets, part) in [
            (&["x"][..], "write PATH=VALUE"),
            (&["a.b=1"][..], "--set a.b=1: a.b: there is no such setting"),
            (&["components.pilot.enabled=maybe"][..], "true or false"),
            (&["profile=big"][..], "there is no profile \"big\""),
        ] {
            let error = format!("{:#}", spec(sets).expect_err("refused"));
            assert!(error.contains(part), "{error}");
        }
    }
}
