//! `cargo xtask dist`: the static binary, an image archive of it, made without Docker, and its Helm chart as an archive.
//!
//! The archive is an OCI image layout and a `docker save` file in one, so `kind load image-archive`, `minikube image load`, `docker load` and
//! `ctr images import` take it. The same binary makes the same archives, byte for byte; their checksums are printed, and stand beside them in files that
//! `sha256sum --check` reads.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

pub(crate) mod chart;
mod image;

/// A layer may have this many bytes, compressed.
const LARGEST_LAYER: usize = 20 << 20;

/// Flags of `dist`.
#[derive(clap::Args)]
pub struct Args {
    /// Pack this binary instead of building one; it must be linked statically
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Build for this target; the default is this machine's
    #[arg(long, value_name = "TRIPLE", conflicts_with = "binary")]
    target: Option<String>,
    /// Name of the image, without its tag
    #[arg(long, value_name = "NAME", default_value = "mesh")]
    image: String,
    /// Tag of the image
    #[arg(long, value_name = "TAG", default_value = env!("CARGO_PKG_VERSION"))]
    tag: String,
    /// Where the archive goes [default: target/dist/mesh-TAG-ARCHITECTURE.tar]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Take a binary of any size, for trying things out
    #[arg(long)]
    any_size: bool,
}

/// Builds the binary if none is given, and writes the archives.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let path = match &args.binary {
        Some(path) => path.clone(),
        None => build(args.target.as_deref())?,
    };
    let name = Name::new(&args.image, &args.tag)?;
    let largest = if args.any_size {
        usize::MAX
    } else {
        LARGEST_LAYER
    };
    let output = write(&path, &name, args.output.as_deref(), largest)?;
    println!("{}: {}", name.full(), output.display());
    let folder = output.parent().unwrap_or(Path::new(""));
    let architecture = architecture(&std::fs::read(&path)?)?;
    let chart = chart::pack(&path, architecture, folder)?;
    match &chart {
        Some(chart) => println!("Helm chart: {}", chart.display()),
        None => println!(
            "Helm chart: not packed, since this machine can't run a binary for {architecture}; that of another architecture's binary makes the same objects"
        ),
    }
    for file in [Some(output), chart].into_iter().flatten() {
        sign(&file)?;
    }
    Ok(())
}

/// Prints the checksum of a file, and writes it beside it.
fn sign(file: &Path) -> anyhow::Result<()> {
    let content = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let line = format!("{}  {name}\n", image::hex(&content));
    print!("{line}");
    let beside = file.with_file_name(format!("{name}.sha256"));
    std::fs::write(&beside, line).with_context(|| format!("writing {}", beside.display()))
}

/// The archive of the image `mesh` with this version's tag, in its usual place: of this binary of any size, or of one that is built.
pub fn archive(binary: Option<&Path>) -> anyhow::Result<PathBuf> {
    let name = Name::new("mesh", env!("CARGO_PKG_VERSION"))?;
    match binary {
        Some(path) => write(path, &name, None, usize::MAX),
        None => write(&build(None)?, &name, None, LARGEST_LAYER),
    }
}

fn write(
    path: &Path,
    name: &Name,
    output: Option<&Path>,
    largest: usize,
) -> anyhow::Result<PathBuf> {
    let binary = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    let architecture = architecture(&binary).with_context(|| path.display().to_string())?;
    let layer = image::layer(&binary)?;
    let size = layer.compressed.len();
    println!(
        "layer: {:.1} MiB, compressed {:.1} MiB",
        mebibytes(layer.plain.len()),
        mebibytes(size)
    );
    if size > largest {
        bail!(
            "the layer has {:.1} MiB compressed, at most {:.1} MiB are allowed (--any-size lets it pass)",
            mebibytes(size),
            mebibytes(largest)
        );
    }
    let archive = image::archive(&layer, architecture, name)?;
    let output = output.map_or_else(
        || {
            let file = format!("mesh-{}-{architecture}.tar", name.tag());
            target_dir().join("dist").join(file)
        },
        Path::to_path_buf,
    );
    if let Some(folder) = output.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    std::fs::write(&output, archive).with_context(|| format!("writing {}", output.display()))?;
    Ok(output)
}

fn mebibytes(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Cargo's folder: where this task's own binary was built, else that of the work tree.
fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from)
}

/// Builds `mesh` with the profile `dist`, linked statically.
///
/// The target is named even where it is this machine's own: so the flags hold for the program alone, and not for the build scripts and macros.
fn build(target: Option<&str>) -> anyhow::Result<PathBuf> {
    let target = match target {
        Some(target) => target.to_owned(),
        None => host()?,
    };
    let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args([
            "build",
            "--package",
            "mesh",
            "--profile",
            "dist",
            "--target",
            &target,
        ])
        .env(
            "RUSTFLAGS",
            format!("{flags} -C target-feature=+crt-static"),
        );
    let status = cargo.status().context("running cargo")?;
    if !status.success() {
        bail!("building mesh for {target} failed ({status})");
    }
    Ok(target_dir().join(target).join("dist/mesh"))
}

fn host() -> anyhow::Result<String> {
    let output = Command::new("rustc")
        .arg("-vV")
        .output()
        .context("running rustc -vV")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(line.context("rustc -vV does not name the host")?.to_owned())
}

/// The architecture of an ELF binary, as images name it. The image has no libraries, so a binary that asks for a loader is refused.
fn architecture(binary: &[u8]) -> anyhow::Result<&'static str> {
    const INTERPRETER: u32 = 3;
    let number = |at: usize, length: usize| -> Option<u64> {
        let bytes = binary.get(at..at.checked_add(length)?)?;
        Some(
            bytes
                .iter()
                .rev()
                .fold(0, |sum, byte| sum << 8 | u64::from(*byte)),
        )
    };
    // 64 bits, little-endian (elf(5)).
    if binary.get(..6) != Some(&b"\x7fELF\x02\x01"[..]) {
        bail!("not a 64-bit ELF binary for Linux");
    }
    let architecture = match number(18, 2) {
        Some(62) => "amd64",
        Some(183) => "arm64",
        other => bail!("a binary for a machine that is not known here (e_machine {other:?})"),
    };
    let (start, size, count) = (number(32, 8), number(54, 2), number(56, 2));
    let (Some(start), Some(size), Some(count)) = (start, size, count) else {
        bail!("the ELF header is cut off");
    };
    let kinds = (0..count).map(|index| {
        let at = start.checked_add(size.checked_mul(index)?)?;
        number(usize::try_from(at).ok()?, 4)
    });
    for kind in kinds {
        if kind.context("the program headers are cut off")? == u64::from(INTERPRETER) {
            bail!(
                "linked dynamically, and the image has no libraries; build it with RUSTFLAGS='-C target-feature=+crt-static' and --target, \
                 or let this task build it"
            );
        }
    }
    Ok(architecture)
}

/// The name of an image, with its tag.
pub(crate) struct Name {
    /// With registry and path.
    repository: String,
    tag: String,
}

impl Name {
    fn new(image: &str, tag: &str) -> anyhow::Result<Self> {
        // With this tag Kubernetes would pull the image whatever was loaded.
        if tag == "latest" {
            bail!("--tag latest: Kubernetes pulls such an image always; take a version");
        }
        let tag_right = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if tag.is_empty() || tag.len() > 128 || !tag.chars().all(tag_right) {
            bail!(
                "--tag {tag:?}: letters, digits, \".\", \"_\" and \"-\" are allowed, at most 128"
            );
        }
        let name_right =
            |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-/:".contains(c);
        if image.is_empty() || !image.chars().all(name_right) || image.contains("//") {
            bail!(
                "--image {image:?} is not the name of an image, such as registry.example/team/mesh"
            );
        }
        // As Docker completes names: the first part is a registry if it looks like a host.
        let repository = match image.split_once('/') {
            None => format!("docker.io/library/{image}"),
            Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => image.to_owned(),
            Some(_) => format!("docker.io/{image}"),
        };
        Ok(Self {
            repository,
            tag: tag.to_owned(),
        })
    }

    /// As containerd names it.
    fn full(&self) -> String {
        format!("{}:{}", self.repository, self.tag)
    }

    /// As Docker shows it.
    fn short(&self) -> String {
        let full = self.full();
        let short = full.strip_prefix("docker.io/").unwrap_or(&full);
        short.strip_prefix("library/").unwrap_or(short).to_owned()
    }

    fn tag(&self) -> &str {
        &self.tag
    }
}

#[cfg(test)]
mod tests;
