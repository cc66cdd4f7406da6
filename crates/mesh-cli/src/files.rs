//! Manifests from files, directories and standard input.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde_json::Value;

/// An object of a manifest, with where it came from.
#[derive(Debug, Clone)]
pub(crate) struct Manifest {
    /// File and number of the document, for messages.
    pub(crate) origin: String,
    /// The object.
    pub(crate) object: Value,
    /// `apiVersion`.
    pub(crate) api_version: String,
    /// `kind`.
    pub(crate) kind: String,
    /// `metadata.name`.
    pub(crate) name: String,
    /// `metadata.namespace`, if the object says it.
    pub(crate) namespace: Option<String>,
}

/// Reads all manifests before anything is done with one of them.
pub(crate) fn read(paths: &[PathBuf], recursive: bool) -> anyhow::Result<Vec<Manifest>> {
    let mut manifests = Vec::new();
    for path in paths {
        for file in expand(path, recursive)? {
            let (name, text) = text(&file)?;
            let objects = mesh_api::yaml::documents(&text, &name)?;
            for (index, object) in objects.into_iter().enumerate() {
                manifests.push(manifest(object, format!("{name}: document {}", index + 1))?);
            }
        }
    }
    if manifests.is_empty() {
        anyhow::bail!(
            "no objects in {}",
            paths
                .iter()
                .map(|path| path.display().to_string())
                .collect::<Vec<_>>()
                .join(", ")
        );
    }
    Ok(manifests)
}

/// The name of a file and its text; `-` is standard input.
pub(crate) fn text(path: &Path) -> anyhow::Result<(String, String)> {
    if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin()
            .read_to_string(&mut text)
            .context("reading standard input")?;
        return Ok(("stdin".to_owned(), text));
    }
    let name = path.display().to_string();
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {name}"))?;
    Ok((name, text))
}

/// The files of a path: itself, or what lies in the directory, in order of names.
fn expand(path: &Path, recursive: bool) -> anyhow::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let entries = std::fs::read_dir(path)
        .with_context(|| format!("reading the directory {}", path.display()))?;
    let mut inside: Vec<PathBuf> = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()
        .with_context(|| format!("reading the directory {}", path.display()))?;
    inside.sort();
    let mut files = Vec::new();
    for entry in inside {
        if entry.is_dir() {
            if recursive {
                files.extend(expand(&entry, true)?);
            }
        } else if entry.extension().is_some_and(|extension| {
            extension == "yaml" || extension == "yml" || extension == "json"
        }) {
            files.push(entry);
        }
    }
    Ok(files)
}

fn manifest(object: Value, origin: String) -> anyhow::Result<Manifest> {
    let text = |path: &str| {
        object
            .pointer(path)
            .and_then(Value::as_str)
            .filter(|text| !text.is_empty())
            .map(str::to_owned)
    };
    let need = |path: &str, field: &str| {
        text(path).with_context(|| format!("{origin}: {field} is missing; every object needs apiVersion, kind and metadata.name"))
    };
    let (api_version, kind, name) = (
        need("/apiVersion", "apiVersion")?,
        need("/kind", "kind")?,
        need("/metadata/name", "metadata.name")?,
    );
    let namespace = text("/metadata/namespace");
    Ok(Manifest {
        origin,
        api_version,
        kind,
        name,
        namespace,
        object,
    })
}

impl Manifest {
    /// The object for messages: where it came from, kind and name.
    pub(crate) fn describe(&self) -> String {
        format!("{} ({} {})", self.origin, self.kind, self.name)
    }

    /// The namespace in which the object belongs; the flag must not contradict the object.
    pub(crate) fn namespace<'a>(
        &'a self,
        flag: Option<&'a str>,
        default: &'a str,
    ) -> anyhow::Result<&'a str> {
        match (self.namespace.as_deref(), flag) {
            (Some(own), Some(flag)) if own != flag => {
                anyhow::bail!(
                    "{}: the object says namespace {own:?}, but -n says {flag:?}; drop one of them",
                    self.describe()
                )
            }
            (Some(own), _) => Ok(own),
            (None, flag) => Ok(flag.unwrap_or(default)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(directory: &Path, name: &str, text: &str) -> PathBuf {
        let path = directory.join(name);
        std::fs::write(&path, text).expect("temporary file");
        path
    }

    #[test]
    fn directories_are_read_in_order_and_recursively_on_request() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let object =
            |name: &str| format!("{{apiVersion: v1, kind: Pod, metadata: {{name: {name}}}}}");
        file(directory.path(), "b.yaml", &object("b"));
        file(
            directory.path(),
            "a.yml",
            &format!("{}\n---\n{}", object("a1"), object("a2")),
        );
        file(directory.path(), "notes.txt", "not YAML: [");
        std::fs::create_dir(directory.path().join("c")).expect("directory");
        file(&directory.path().join("c"), "c.json", &object("c"));
        let names = |recursive| {
            read(&[directory.path().to_owned()], recursive)
                .expect("manifests")
                .into_iter()
                .map(|m| m.name)
                .collect::<Vec<_>>()
        };
        assert_eq!(names(false), ["a1", "a2", "b"]);
        assert_eq!(names(true), ["a1", "a2", "b", "c"]);
    }

    #[test]
    fn errors_name_file_and_document() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = file(
            directory.path(),
            "x.yaml",
            "{apiVersion: v1, kind: Pod, metadata: {name: a}}\n---\n{apiVersion: v1, metadata: {name: a}}\n",
        );
        let error = read(std::slice::from_ref(&path), false)
            .expect_err("kind is missing")
            .to_string();
        assert!(
            error.contains("x.yaml: document 2: kind is missing"),
            "{error}"
        );
        let path = file(directory.path(), "y.yaml", "a: 1\na: 2\n");
        let error = read(&[path], false).expect_err("duplicate").to_string();
        assert!(error.contains("y.yaml:2:1"), "{error}");
    }

    #[test]
    fn a_namespace_flag_must_not_contradict() {
        let manifest = manifest(serde_json::json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "a", "namespace": "b" } }), "f".into()).expect("manifest");
        assert_eq!(manifest.namespace(None, "default").expect("own"), "b");
        assert!(manifest.namespace(Some("c"), "default").is_err());
    }
}
