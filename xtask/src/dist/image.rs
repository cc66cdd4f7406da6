//! The image: what is in it, and the archive around it.
//!
//! The forms are those of the OCI image specification (layout, manifest, configuration) and of `docker save` (`manifest.json`).

use std::io::Write;

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use tar::{Builder, EntryType, Header};

use super::Name;

/// Uid and gid of the proxy and the control plane.
const USER: u32 = 1337;
/// Where the binary is; the samples' manifests say it, too.
const BINARY: &str = "usr/local/bin/mesh";
/// Programs that the binary is by the name by which it is called: those that pods of the samples are asked for, and the name by which hooks
/// and people call the agent in the proxy's container.
pub(super) const APPLETS: &[&str] = &[
    "curl",
    "ext-authz",
    "fortio",
    "jwt-server",
    "pilot-agent",
    "ratelimit",
    "sleep",
];

const PASSWD: &str = "\
root:x:0:0:root:/:/sbin/nologin
istio-proxy:x:1337:1337:istio-proxy:/:/sbin/nologin
nobody:x:65534:65534:nobody:/:/sbin/nologin
";
const GROUP: &str = "\
root:x:0:
istio-proxy:x:1337:
nogroup:x:65534:
";
/// Without it the C library would look for plug-ins that are not there.
const NSSWITCH: &str = "hosts: files dns\n";

/// What an entry of an archive is.
#[derive(Clone, Copy)]
enum Kind<'a> {
    File(&'a [u8]),
    Folder,
    /// A symbolic link to this path.
    Link(&'a str),
}

/// One entry of an archive.
#[derive(Clone, Copy)]
pub(super) struct Entry<'a> {
    path: &'a str,
    kind: Kind<'a>,
    mode: u32,
    /// Owner and group, by number.
    owner: u32,
}

impl<'a> Entry<'a> {
    pub(super) fn file(path: &'a str, content: &'a [u8]) -> Self {
        Self {
            path,
            kind: Kind::File(content),
            mode: 0o644,
            owner: 0,
        }
    }

    fn folder(path: &'a str) -> Self {
        Self {
            path,
            kind: Kind::Folder,
            mode: 0o755,
            owner: 0,
        }
    }
}

/// The archive of these entries, in their order: the same bytes for the same content, without times and names of people.
pub(super) fn pack(entries: &[Entry<'_>]) -> anyhow::Result<Vec<u8>> {
    let mut archive = Builder::new(Vec::new());
    for entry in entries {
        let mut header = Header::new_ustar();
        header.set_mode(entry.mode);
        header.set_uid(entry.owner.into());
        header.set_gid(entry.owner.into());
        header.set_mtime(0);
        header.set_size(0);
        match entry.kind {
            Kind::File(content) => {
                header.set_entry_type(EntryType::Regular);
                header.set_size(u64::try_from(content.len())?);
                archive.append_data(&mut header, entry.path, content)?;
            }
            Kind::Folder => {
                header.set_entry_type(EntryType::Directory);
                archive.append_data(&mut header, format!("{}/", entry.path), &[][..])?;
            }
            Kind::Link(to) => {
                header.set_entry_type(EntryType::Symlink);
                archive.append_link(&mut header, entry.path, to)?;
            }
        }
    }
    Ok(archive.into_inner()?)
}

/// The only layer.
pub(super) struct Layer {
    pub(super) plain: Vec<u8>,
    pub(super) compressed: Vec<u8>,
}

/// The layer with a binary in it.
pub(super) fn layer(binary: &[u8]) -> anyhow::Result<Layer> {
    let authorities = authorities();
    let links: Vec<String> = APPLETS
        .iter()
        .map(|name| format!("usr/local/bin/{name}"))
        .collect();
    let of_proxy = |path| Entry {
        owner: USER,
        ..Entry::folder(path)
    };
    let mut entries = vec![
        Entry::folder("bin"),
        // Manifests ask for it by this path.
        Entry {
            kind: Kind::Link("/usr/local/bin/mesh"),
            mode: 0o777,
            ..Entry::folder("bin/sleep")
        },
        Entry::folder("etc"),
        Entry::file("etc/group", GROUP.as_bytes()),
        Entry::file("etc/nsswitch.conf", NSSWITCH.as_bytes()),
        Entry::file("etc/passwd", PASSWD.as_bytes()),
        Entry::folder("etc/ssl"),
        Entry::folder("etc/ssl/certs"),
        Entry::file("etc/ssl/certs/ca-certificates.crt", authorities.as_bytes()),
        Entry {
            mode: 0o1777,
            ..Entry::folder("tmp")
        },
        Entry::folder("usr"),
        Entry::folder("usr/local"),
        Entry::folder("usr/local/bin"),
    ];
    entries.extend(links.iter().map(|path| Entry {
        kind: Kind::Link("mesh"),
        mode: 0o777,
        ..Entry::folder(path)
    }));
    entries.push(Entry {
        mode: 0o755,
        ..Entry::file(BINARY, binary)
    });
    entries.extend([
        Entry::folder("var"),
        Entry::folder("var/lib"),
        Entry::folder("var/lib/istio"),
        of_proxy("var/lib/istio/data"),
        of_proxy("var/lib/mesh"),
    ]);
    let plain = pack(&entries)?;
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(&plain)?;
    let compressed = encoder.finish()?;
    Ok(Layer { plain, compressed })
}

/// The certificates that Mozilla trusts, as PEM.
fn authorities() -> String {
    let mut pem = String::new();
    for certificate in webpki_root_certs::TLS_SERVER_ROOT_CERTS {
        let text = STANDARD.encode(certificate);
        pem.push_str("-----BEGIN CERTIFICATE-----\n");
        for start in (0..text.len()).step_by(64) {
            pem.push_str(&text[start..text.len().min(start + 64)]);
            pem.push('\n');
        }
        pem.push_str("-----END CERTIFICATE-----\n");
    }
    pem
}

/// The whole archive.
pub(super) fn archive(layer: &Layer, architecture: &str, name: &Name) -> anyhow::Result<Vec<u8>> {
    let config = serde_json::to_vec(&config(layer, architecture, name))?;
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar+gzip", &layer.compressed)],
    }))?;
    let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
    entry["platform"] = json!({ "architecture": architecture, "os": "linux" });
    entry["annotations"] = json!({
        "io.containerd.image.name": name.full(),
        "org.opencontainers.image.ref.name": name.tag(),
    });
    let index = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [entry],
    }))?;
    let docker = serde_json::to_vec(&json!([{
        "Config": blob(&config),
        "RepoTags": [name.short()],
        "Layers": [blob(&layer.compressed)],
    }]))?;
    let layout = serde_json::to_vec(&json!({ "imageLayoutVersion": "1.0.0" }))?;
    let mut blobs = [
        (blob(&config), config.as_slice()),
        (blob(&manifest), &manifest),
        (blob(&layer.compressed), &layer.compressed),
    ];
    blobs.sort();
    let mut entries = vec![
        Entry::file("oci-layout", &layout),
        Entry::file("index.json", &index),
        Entry::file("manifest.json", &docker),
        Entry::folder("blobs"),
        Entry::folder("blobs/sha256"),
    ];
    entries.extend(
        blobs
            .iter()
            .map(|(path, content)| Entry::file(path, content)),
    );
    pack(&entries)
}

/// The configuration. It says no time, so that the same binary is the same image.
fn config(layer: &Layer, architecture: &str, name: &Name) -> Value {
    json!({
        "architecture": architecture,
        "os": "linux",
        "config": {
            // A number: by it alone Kubernetes can tell that it is not root.
            "User": USER.to_string(),
            "Env": ["PATH=/usr/local/bin"],
            "Entrypoint": [format!("/{BINARY}")],
            "WorkingDir": "/",
            "Labels": {
                "org.opencontainers.image.title": "mesh",
                "org.opencontainers.image.description": "A complete service mesh in one binary",
                "org.opencontainers.image.licenses": env!("CARGO_PKG_LICENSE"),
                "org.opencontainers.image.version": name.tag(),
            },
        },
        "rootfs": { "type": "layers", "diff_ids": [sha256(&layer.plain)] },
        "history": [{ "created_by": "cargo xtask dist" }],
    })
}

fn descriptor(media_type: &str, content: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": sha256(content), "size": content.len() })
}

fn sha256(content: &[u8]) -> String {
    format!("sha256:{}", hex(content))
}

/// Where a blob is in the archive.
fn blob(content: &[u8]) -> String {
    format!("blobs/sha256/{}", hex(content))
}

pub(super) fn hex(content: &[u8]) -> String {
    let sum = digest(&SHA256, content);
    sum.as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
