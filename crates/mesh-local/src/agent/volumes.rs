//! A pod's volumes on the node: gathers what they refer to, computes their files (pure), writes them atomically.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{
    ConfigMap, Container, DownwardAPIVolumeFile, KeyToPath, Pod, Secret, Service, ServiceAccount,
    Volume,
};
use kube::api::{Api, PostParams};
use nix::mount::{MsFlags, mount};

use super::env::{
    Addresses, EnvError, References, field_value, not_found, quantity_value, resource_value,
};
use super::rootfs::VolumeMount;

/// The mode of files whose volume names none.
const DEFAULT_MODE: u32 = 0o644;
/// Tokens are renewed after this part of their life.
const RENEW_AT: f64 = 0.8;

/// Why a volume can't be made; the pod waits and tries again.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// A reference is missing.
    #[error("MountVolume.SetUp failed for volume \"{volume}\": {source}")]
    Reference {
        /// The volume.
        volume: String,
        /// What is missing.
        source: EnvError,
    },
    /// A kind of volume that this node does not have.
    #[error(
        "volume \"{volume}\" is of a kind that the local cluster does not have: use emptyDir, configMap, secret, projected or downwardAPI"
    )]
    Kind {
        /// The volume.
        volume: String,
    },
    /// The node failed.
    #[error("MountVolume.SetUp failed for volume \"{volume}\": {source:#}")]
    Node {
        /// The volume.
        volume: String,
        /// What went wrong.
        source: anyhow::Error,
    },
    /// A container mounts what the pod does not have.
    #[error("container \"{container}\" mounts volume \"{volume}\", which the pod does not have")]
    Unknown {
        /// The container.
        container: String,
        /// The volume.
        volume: String,
    },
}

/// One file of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeFile {
    /// Its content.
    pub content: Vec<u8>,
    /// Its mode.
    pub mode: u32,
}

/// The files of a volume by relative path.
pub type Files = BTreeMap<String, VolumeFile>;

/// The names of ConfigMaps and Secrets that a pod refers to, in volumes and environments.
pub fn referenced(pod: &Pod) -> (BTreeSet<String>, BTreeSet<String>) {
    let (mut maps, mut secrets) = (BTreeSet::new(), BTreeSet::new());
    let Some(spec) = &pod.spec else {
        return (maps, secrets);
    };
    for volume in spec.volumes.iter().flatten() {
        maps.extend(volume.config_map.as_ref().map(|c| c.name.clone()));
        secrets.extend(volume.secret.as_ref().and_then(|s| s.secret_name.clone()));
        for source in volume
            .projected
            .iter()
            .flat_map(|p| p.sources.iter().flatten())
        {
            maps.extend(source.config_map.as_ref().map(|c| c.name.clone()));
            secrets.extend(source.secret.as_ref().map(|s| s.name.clone()));
        }
    }
    for container in spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten())
    {
        for from in container.env_from.iter().flatten() {
            maps.extend(from.config_map_ref.as_ref().map(|r| r.name.clone()));
            secrets.extend(from.secret_ref.as_ref().map(|r| r.name.clone()));
        }
        for from in container
            .env
            .iter()
            .flatten()
            .filter_map(|e| e.value_from.as_ref())
        {
            maps.extend(from.config_map_key_ref.as_ref().map(|r| r.name.clone()));
            secrets.extend(from.secret_key_ref.as_ref().map(|r| r.name.clone()));
        }
    }
    (maps, secrets)
}

/// Reads everything that the pod refers to. What does not exist is left out; whether that matters is decided where it is used.
pub async fn gather(client: &kube::Client, pod: &Pod) -> Result<References, kube::Error> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let (maps, secrets) = referenced(pod);
    let mut references = References::default();
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    for name in maps {
        if let Some(map) = api.get_opt(&name).await? {
            references.config_maps.insert(name, map);
        }
    }
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    for name in secrets {
        if let Some(secret) = api.get_opt(&name).await? {
            references.secrets.insert(name, secret);
        }
    }
    let services: Api<Service> = Api::namespaced(client.clone(), namespace);
    references.services = services.list(&Default::default()).await?.items;
    if namespace != "default" {
        let api: Api<Service> = Api::namespaced(client.clone(), "default");
        references.services.extend(api.get_opt("kubernetes").await?);
    }
    Ok(references)
}

fn pick(
    files: &mut Files,
    data: BTreeMap<String, Vec<u8>>,
    items: Option<&Vec<KeyToPath>>,
    mode: u32,
    strict: Option<(&'static str, &str)>,
) -> Result<(), EnvError> {
    let Some(items) = items else {
        files.extend(
            data.into_iter()
                .map(|(key, content)| (key, VolumeFile { content, mode })),
        );
        return Ok(());
    };
    for item in items {
        match (data.get(&item.key), strict) {
            (Some(content), _) => {
                let mode = item.mode.map_or(mode, |m| m as u32);
                files.insert(
                    item.path.clone(),
                    VolumeFile {
                        content: content.clone(),
                        mode,
                    },
                );
            }
            (None, Some((kind, name))) => {
                return Err(EnvError::Missing {
                    kind,
                    name: name.to_owned(),
                    what: format!("has no key \"{}\"", item.key),
                });
            }
            (None, None) => {}
        }
    }
    Ok(())
}

struct Source<'a> {
    pod: &'a Pod,
    references: &'a References,
    addresses: &'a Addresses,
}

impl Source<'_> {
    fn config_map(
        &self,
        files: &mut Files,
        name: &str,
        items: Option<&Vec<KeyToPath>>,
        optional: Option<bool>,
        mode: u32,
    ) -> Result<(), EnvError> {
        let strict = (optional != Some(true)).then_some(("configmap", name));
        let Some(map) = self.references.config_maps.get(name) else {
            return if strict.is_some() {
                Err(not_found("configmap", name))
            } else {
                Ok(())
            };
        };
        let mut data: BTreeMap<String, Vec<u8>> = map
            .data
            .iter()
            .flatten()
            .map(|(k, v)| (k.clone(), v.clone().into_bytes()))
            .collect();
        data.extend(
            map.binary_data
                .iter()
                .flatten()
                .map(|(k, v)| (k.clone(), v.0.clone())),
        );
        pick(files, data, items, mode, strict)
    }

    fn secret(
        &self,
        files: &mut Files,
        name: &str,
        items: Option<&Vec<KeyToPath>>,
        optional: Option<bool>,
        mode: u32,
    ) -> Result<(), EnvError> {
        let strict = (optional != Some(true)).then_some(("secret", name));
        let Some(secret) = self.references.secrets.get(name) else {
            return if strict.is_some() {
                Err(not_found("secret", name))
            } else {
                Ok(())
            };
        };
        let data = secret
            .data
            .iter()
            .flatten()
            .map(|(k, v)| (k.clone(), v.0.clone()))
            .collect();
        pick(files, data, items, mode, strict)
    }

    fn downward(
        &self,
        files: &mut Files,
        items: &[DownwardAPIVolumeFile],
        mode: u32,
    ) -> Result<(), EnvError> {
        for item in items {
            let value = match (&item.field_ref, &item.resource_field_ref) {
                (Some(field), _) => field_value(self.pod, field, self.addresses)?,
                (None, Some(resource)) => resource_value(self.pod, None, resource)?,
                (None, None) => String::new(),
            };
            let mode = item.mode.map_or(mode, |m| m as u32);
            files.insert(
                item.path.clone(),
                VolumeFile {
                    content: value.into_bytes(),
                    mode,
                },
            );
        }
        Ok(())
    }
}

/// The files of `volume`, without service account tokens; `None` when it is not a volume made of files.
pub fn files(
    volume: &Volume,
    pod: &Pod,
    references: &References,
    addresses: &Addresses,
) -> Result<Option<Files>, EnvError> {
    let source = Source {
        pod,
        references,
        addresses,
    };
    let mut files = Files::new();
    let mode = |mode: Option<i32>| mode.map_or(DEFAULT_MODE, |m| m as u32);
    if let Some(map) = &volume.config_map {
        source.config_map(
            &mut files,
            &map.name,
            map.items.as_ref(),
            map.optional,
            mode(map.default_mode),
        )?;
    } else if let Some(secret) = &volume.secret {
        let name = secret.secret_name.as_deref().unwrap_or_default();
        source.secret(
            &mut files,
            name,
            secret.items.as_ref(),
            secret.optional,
            mode(secret.default_mode),
        )?;
    } else if let Some(downward) = &volume.downward_api {
        source.downward(
            &mut files,
            downward.items.as_deref().unwrap_or_default(),
            mode(downward.default_mode),
        )?;
    } else if let Some(projected) = &volume.projected {
        let mode = mode(projected.default_mode);
        for part in projected.sources.iter().flatten() {
            if let Some(map) = &part.config_map {
                source.config_map(
                    &mut files,
                    &map.name,
                    map.items.as_ref(),
                    map.optional,
                    mode,
                )?;
            }
            if let Some(secret) = &part.secret {
                source.secret(
                    &mut files,
                    &secret.name,
                    secret.items.as_ref(),
                    secret.optional,
                    mode,
                )?;
            }
            if let Some(downward) = &part.downward_api {
                source.downward(
                    &mut files,
                    downward.items.as_deref().unwrap_or_default(),
                    mode,
                )?;
            }
        }
    } else {
        return Ok(None);
    }
    Ok(Some(files))
}

/// Writes the pod's volumes below `dir`; called again when something changed. Gives the time until the first token is to be renewed.
pub async fn write_all(
    client: &kube::Client,
    pod: &Pod,
    references: &References,
    addresses: &Addresses,
    dir: &Path,
) -> Result<Option<Duration>, VolumeError> {
    let group = pod
        .spec
        .as_ref()
        .and_then(|s| s.security_context.as_ref())
        .and_then(|c| c.fs_group)
        .and_then(|g| u32::try_from(g).ok());
    let mut renew: Option<Duration> = None;
    for volume in pod.spec.iter().flat_map(|s| s.volumes.iter().flatten()) {
        let name = volume.name.clone();
        let path = dir.join(&name);
        let node = |source: anyhow::Error| VolumeError::Node {
            volume: name.clone(),
            source,
        };
        if let Some(empty) = &volume.empty_dir {
            let size = empty.size_limit.as_ref().and_then(|q| quantity_value(&q.0));
            make_empty_dir(&path, size, group).map_err(node)?;
            continue;
        }
        let computed = files(volume, pod, references, addresses);
        let found = computed.map_err(|source| VolumeError::Reference {
            volume: name.clone(),
            source,
        })?;
        let mut found = found.ok_or_else(|| VolumeError::Kind {
            volume: name.clone(),
        })?;
        for part in volume
            .projected
            .iter()
            .flat_map(|p| p.sources.iter().flatten())
        {
            let Some(token) = &part.service_account_token else {
                continue;
            };
            let seconds = token.expiration_seconds.unwrap_or(3600);
            let content = request_token(client, pod, token.audience.as_deref(), seconds)
                .await
                .map_err(node)?
                .into_bytes();
            found.insert(
                token.path.clone(),
                VolumeFile {
                    content,
                    mode: 0o644,
                },
            );
            let after =
                Duration::from_secs(u64::try_from(seconds).unwrap_or(3600)).mul_f64(RENEW_AT);
            renew = Some(renew.map_or(after, |r| r.min(after)));
        }
        write_atomically(&path, &found, group).map_err(node)?;
    }
    Ok(renew)
}

async fn request_token(
    client: &kube::Client,
    pod: &Pod,
    audience: Option<&str>,
    seconds: i64,
) -> anyhow::Result<String> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let account = pod
        .spec
        .as_ref()
        .and_then(|s| s.service_account_name.as_deref())
        .unwrap_or("default");
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), namespace);
    let request = TokenRequest {
        spec: Some(TokenRequestSpec {
            audiences: Some(audience.map(str::to_owned).into_iter().collect()),
            expiration_seconds: Some(seconds),
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Pod".to_owned()),
                name: pod.metadata.name.clone(),
                uid: pod.metadata.uid.clone(),
            }),
            ..TokenRequestSpec::default()
        }),
        ..TokenRequest::default()
    };
    let answer = accounts
        .create_token_request(account, &PostParams::default(), &request)
        .await;
    let answer = answer
        .with_context(|| format!("asking for a token of service account {namespace}/{account}"))?;
    answer
        .status
        .and_then(|s| s.token)
        .context("the API gave no token")
}

fn make_empty_dir(path: &Path, size: Option<f64>, group: Option<u32>) -> anyhow::Result<()> {
    if path.exists() {
        return Ok(());
    }
    fs::create_dir_all(path)?;
    // The node's runtime folder lies in memory, so both media are the same; a limit needs a file system of its own.
    if let Some(size) = size {
        let options = format!("size={},mode=0777", size as u64);
        mount(
            Some("mesh"),
            path,
            Some("tmpfs"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            Some(options.as_str()),
        )
        .context("mounting")?;
    }
    own(path, group, if group.is_some() { 0o2777 } else { 0o777 })
}

fn own(path: &Path, group: Option<u32>, mode: u32) -> anyhow::Result<()> {
    // Where only one uid is mapped the group does not exist; everything runs as that one then.
    if let Some(group) = group {
        let _ = std::os::unix::fs::chown(path, None, Some(group));
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .with_context(|| format!("setting the mode of {}", path.display()))
}

/// Writes files so that readers see all old or all new ones: a new folder, then `..data` is switched, as the kubelet does.
pub fn write_atomically(dir: &Path, files: &Files, group: Option<u32>) -> anyhow::Result<()> {
    if current(dir).is_some_and(|held| held == *files) {
        return Ok(());
    }
    fs::create_dir_all(dir)?;
    own(dir, group, 0o755)?;
    let stamp = format!("..{}", uuid::Uuid::new_v4());
    let fresh = dir.join(&stamp);
    fs::create_dir(&fresh)?;
    own(&fresh, group, 0o755)?;
    for (path, file) in files {
        if path.split('/').any(|part| part == "..") || path.starts_with('/') {
            anyhow::bail!("path \"{path}\" leaves the volume");
        }
        let target = fresh.join(path);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&target, &file.content)?;
        own(&target, group, file.mode)?;
    }
    let old = fs::read_link(dir.join("..data")).ok();
    symlink(&stamp, dir.join("..data_tmp"))?;
    fs::rename(dir.join("..data_tmp"), dir.join("..data"))?;
    let tops: BTreeSet<&str> = files
        .keys()
        .filter_map(|path| path.split('/').next())
        .collect();
    for top in &tops {
        if fs::symlink_metadata(dir.join(top)).is_err() {
            symlink(Path::new("..data").join(top), dir.join(top))?;
        }
    }
    for entry in fs::read_dir(dir)?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with("..") && !tops.contains(name.as_str()) {
            let _ = fs::remove_file(entry.path());
        }
    }
    if let Some(old) = old {
        let _ = fs::remove_dir_all(dir.join(old));
    }
    Ok(())
}

/// What the volume holds now.
fn current(dir: &Path) -> Option<Files> {
    fn collect(base: &Path, at: &Path, files: &mut Files) -> std::io::Result<()> {
        for entry in fs::read_dir(at)? {
            let path = entry?.path();
            if path.is_dir() {
                collect(base, &path, files)?;
            } else {
                let name = path
                    .strip_prefix(base)
                    .map(|p| p.to_string_lossy().into_owned())
                    .unwrap_or_default();
                let mode = fs::metadata(&path)?.permissions().mode() & 0o7777;
                files.insert(
                    name,
                    VolumeFile {
                        content: fs::read(&path)?,
                        mode,
                    },
                );
            }
        }
        Ok(())
    }
    let data = dir.join("..data").canonicalize().ok()?;
    let mut files = Files::new();
    collect(&data, &data, &mut files).ok()?;
    Some(files)
}

/// Where `container` mounts the pod's volumes.
pub fn mounts(
    pod: &Pod,
    container: &Container,
    dir: &Path,
    env: &BTreeMap<String, String>,
) -> Result<Vec<VolumeMount>, VolumeError> {
    let volumes: Vec<&Volume> = pod
        .spec
        .iter()
        .flat_map(|s| s.volumes.iter().flatten())
        .collect();
    let mut mounts = Vec::new();
    for wanted in container.volume_mounts.iter().flatten() {
        let Some(volume) = volumes.iter().find(|v| v.name == wanted.name) else {
            return Err(VolumeError::Unknown {
                container: container.name.clone(),
                volume: wanted.name.clone(),
            });
        };
        let sub_path = wanted
            .sub_path_expr
            .as_deref()
            .map(|e| super::env::expand(e, env))
            .or_else(|| wanted.sub_path.clone());
        mounts.push(VolumeMount {
            source: PathBuf::from(dir).join(&wanted.name),
            sub_path: sub_path.filter(|s| !s.is_empty()),
            target: wanted.mount_path.clone(),
            read_only: wanted.read_only.unwrap_or(false) || volume.empty_dir.is_none(),
        });
    }
    // Outer mounts first, so that they don't hide inner ones.
    mounts.sort_by_key(|m| m.target.trim_end_matches('/').matches('/').count());
    Ok(mounts)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_projected_volume_has_all_its_parts() {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p", "labels": {"a": "b"}}, "spec": {"containers": [], "volumes": [
            {"name": "v", "projected": {"defaultMode": 0o400, "sources": [
                {"configMap": {"name": "ca", "items": [{"key": "ca.crt", "path": "sub/ca.pem"}]}},
                {"secret": {"name": "s", "optional": true}},
                {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}}]}}]}}))
        .unwrap();
        let mut references = References::default();
        let volume = &pod.spec.as_ref().unwrap().volumes.as_ref().unwrap()[0];
        let missing = files(volume, &pod, &references, &Addresses::default()).unwrap_err();
        assert!(
            missing.to_string().contains("configmap \"ca\" not found"),
            "{missing}"
        );
        references.config_maps.insert(
            "ca".into(),
            serde_json::from_value(json!({"data": {"ca.crt": "PEM", "other": "x"}})).unwrap(),
        );
        let files = files(volume, &pod, &references, &Addresses::default())
            .unwrap()
            .unwrap();
        let text: Vec<(&str, &[u8], u32)> = files
            .iter()
            .map(|(p, f)| (p.as_str(), f.content.as_slice(), f.mode))
            .collect();
        assert_eq!(
            text,
            [
                ("labels", &b"a=\"b\"\n"[..], 0o400),
                ("sub/ca.pem", &b"PEM"[..], 0o400)
            ]
        );
    }

    #[test]
    fn writing_again_replaces_everything_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let file = |text: &str| VolumeFile {
            content: text.into(),
            mode: 0o644,
        };
        let one = Files::from([("a".to_owned(), file("1")), ("b".to_owned(), file("1"))]);
        write_atomically(dir.path(), &one, None).unwrap();
        let before = fs::read_link(dir.path().join("..data")).unwrap();
        write_atomically(dir.path(), &one, None).unwrap();
        assert_eq!(
            fs::read_link(dir.path().join("..data")).unwrap(),
            before,
            "nothing changed, nothing written"
        );
        write_atomically(
            dir.path(),
            &Files::from([("a".to_owned(), file("2")), ("c/d".to_owned(), file("2"))]),
            None,
        )
        .unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("a")).unwrap(), "2");
        assert_eq!(fs::read_to_string(dir.path().join("c/d")).unwrap(), "2");
        assert!(!dir.path().join("b").exists());
        let outside = write_atomically(
            dir.path(),
            &Files::from([("../x".to_owned(), file("2"))]),
            None,
        );
        assert!(
            outside
                .unwrap_err()
                .to_string()
                .contains("leaves the volume")
        );
    }
}
