//! A container's root file system: a small tmpfs with the host's programs bound read-only, an own /etc, /proc, /dev, and the volumes.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::{chdir, pivot_root};
use serde::{Deserialize, Serialize};

use super::launch::below;
use crate::stage::mount_proc;

/// What a container's root file system is made of.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RootSpec {
    /// An empty directory of the node on which the root is mounted, in the container's own mount namespace.
    pub dir: PathBuf,
    /// The running binary.
    pub binary: PathBuf,
    /// Names beside `mesh` under which the binary appears in /usr/local/bin.
    pub applets: Vec<String>,
    /// Files of /etc with their content.
    pub etc: Vec<(String, String)>,
    /// Volumes, in the order of their mounting.
    pub mounts: Vec<VolumeMount>,
}

/// One volume in the container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VolumeMount {
    /// A file or directory of the node.
    pub source: PathBuf,
    /// A path below `source` that the user chose (`subPath`); looked up without leaving `source`, made when it does not exist.
    pub sub_path: Option<String>,
    /// Where it appears.
    pub target: String,
    /// It can't be written.
    pub read_only: bool,
}

/// How often a path is looked up again while mounts change elsewhere, and the pause between: five seconds in all.
const MOST_RACES: u32 = 5000;
const RACE_PAUSE: Duration = Duration::from_millis(1);

/// The host's directories that containers see, read-only.
const HOST_DIRS: [&str; 9] = [
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/opt", "/nix",
];
/// The host's files of /etc that programs of the host need to run.
const HOST_ETC: [&str; 16] = [
    "alternatives",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "ssl",
    "pki",
    "ca-certificates",
    "ca-certificates.conf",
    "localtime",
    "mime.types",
    "protocols",
    "services",
    "terminfo",
    "nginx",
    "apache2",
    "static",
];

/// Makes the root and changes to it. Called by PID 1 of the container in its own mount namespace.
pub(crate) fn make_root(spec: &RootSpec, read_only: bool, cwd: &str) -> anyhow::Result<()> {
    let root = &spec.dir;
    tmpfs(root, "mode=0755,size=64m")?;
    for dir in HOST_DIRS {
        host_dir(root, dir)?;
    }
    own_dirs(root)?;
    make_etc(root, &spec.etc)?;
    local_bin(root, spec)?;
    make_dev(root)?;
    fs::create_dir_all(root.join("proc"))?;
    mount_proc(&root.join("proc"))?;
    let sys = root.join("sys");
    fs::create_dir_all(&sys)?;
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
    // Best effort: nothing of ours reads it, and a container without it runs all the same.
    let _ = mount(Some("sysfs"), &sys, Some("sysfs"), quiet, None::<&str>);
    for volume in &spec.mounts {
        mount_volume(root, volume)
            .with_context(|| format!("mounting a volume at {}", volume.target))?;
    }
    // As container runtimes do, the working directory is made when it does not exist; below a read-only mount that fails at chdir.
    let _ = fs::create_dir_all(below(root, cwd));
    if read_only {
        remount_read_only(root)?;
    }
    enter(root)
}

fn tmpfs(target: &Path, options: &str) -> anyhow::Result<()> {
    mount(
        Some("mesh"),
        target,
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some(options),
    )
    .with_context(|| format!("mounting a tmpfs at {}", target.display()))
}

fn host_dir(root: &Path, dir: &str) -> anyhow::Result<()> {
    let host = Path::new(dir);
    let Ok(meta) = fs::symlink_metadata(host) else {
        return Ok(());
    };
    let target = below(root, dir);
    if meta.is_symlink() {
        symlink(fs::read_link(host)?, &target)?;
        return Ok(());
    }
    fs::create_dir_all(&target)?;
    bind(host, &target, true)
}

fn bind(source: &Path, target: &Path, read_only: bool) -> anyhow::Result<()> {
    mount(
        Some(source),
        target,
        None::<&str>,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        None::<&str>,
    )
    .with_context(|| format!("binding {} to {}", source.display(), target.display()))?;
    if read_only {
        remount_read_only(target)
    } else {
        Ok(())
    }
}

/// Makes the mount at `target` read-only. In a user namespace the flags that the mount has must be repeated, or the kernel refuses.
fn remount_read_only(target: &Path) -> anyhow::Result<()> {
    let mut flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    let has = statvfs(target)?.flags();
    let pairs = [
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ];
    for (held, flag) in pairs {
        if has.contains(held) {
            flags |= flag;
        }
    }
    mount(None::<&str>, target, None::<&str>, flags, None::<&str>)
        .with_context(|| format!("making {} read-only", target.display()))
}

fn own_dirs(root: &Path) -> anyhow::Result<()> {
    for dir in [
        "tmp",
        "run",
        "var/tmp",
        "var/log",
        "var/lib",
        "var/cache",
        "home",
        "srv",
        "mnt",
    ] {
        let path = root.join(dir);
        fs::create_dir_all(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o1777))?;
    }
    fs::create_dir_all(root.join("root"))?;
    symlink("../run", root.join("var/run"))?;
    Ok(())
}

fn make_etc(root: &Path, files: &[(String, String)]) -> anyhow::Result<()> {
    let etc = root.join("etc");
    fs::create_dir_all(&etc)?;
    for name in HOST_ETC {
        let host = Path::new("/etc").join(name);
        let Ok(meta) = fs::metadata(&host) else {
            continue;
        };
        let target = etc.join(name);
        if meta.is_dir() {
            fs::create_dir_all(&target)?;
        } else {
            fs::write(&target, [])?;
        }
        bind(&host.canonicalize()?, &target, true)?;
    }
    for (name, content) in files {
        fs::write(etc.join(name), content)?;
    }
    Ok(())
}

/// /usr/local/bin with our binary and its applets first; what the host has there stays reachable through links.
fn local_bin(root: &Path, spec: &RootSpec) -> anyhow::Result<()> {
    let local = root.join("usr/local/bin");
    let host = root.join(".host-local-bin");
    let names = match fs::read_dir("/usr/local/bin") {
        Ok(entries) => entries.flatten().map(|e| e.file_name()).collect(),
        Err(_) => Vec::new(),
    };
    if local.is_dir() {
        if !names.is_empty() {
            fs::create_dir(&host)?;
            bind(Path::new("/usr/local/bin"), &host, true)?;
        }
        tmpfs(&local, "mode=0755,size=1m")?;
    } else {
        tmpfs(&root.join("usr/local"), "mode=0755,size=1m")
            .context("this machine has neither /usr/local/bin nor /usr/local: make one of them")?;
        fs::create_dir(&local)?;
    }
    let binary = local.join("mesh");
    fs::write(&binary, [])?;
    bind(&spec.binary, &binary, false)?;
    for applet in &spec.applets {
        symlink("mesh", local.join(applet))?;
    }
    for name in names {
        let link = local.join(&name);
        if fs::symlink_metadata(&link).is_err() {
            symlink(Path::new("/.host-local-bin").join(&name), link)?;
        }
    }
    Ok(())
}

fn make_dev(root: &Path) -> anyhow::Result<()> {
    let dev = root.join("dev");
    fs::create_dir_all(&dev)?;
    mount(
        Some("mesh"),
        &dev,
        Some("tmpfs"),
        MsFlags::MS_NOSUID,
        Some("mode=0755,size=64k"),
    )
    .context("mounting /dev")?;
    for name in ["null", "zero", "full", "random", "urandom", "tty"] {
        let target = dev.join(name);
        fs::write(&target, [])?;
        bind(&Path::new("/dev").join(name), &target, false)?;
    }
    for (dir, kind, options) in [
        ("pts", "devpts", "newinstance,ptmxmode=0666,mode=0620"),
        ("shm", "tmpfs", "mode=1777,size=64m"),
    ] {
        let target = dev.join(dir);
        fs::create_dir(&target)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        mount(Some(kind), &target, Some(kind), flags, Some(options))
            .with_context(|| format!("mounting /dev/{dir}"))?;
    }
    for (link, to) in [
        ("ptmx", "pts/ptmx"),
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        symlink(to, dev.join(link))?;
    }
    Ok(())
}

/// Binds a volume. Both ends are looked up with RESOLVE_IN_ROOT, since an earlier container may have left symbolic links in a volume that
/// point out of it.
fn mount_volume(root: &Path, volume: &VolumeMount) -> anyhow::Result<()> {
    let source = match &volume.sub_path {
        Some(sub) => {
            let fd = open_or_make(&volume.source, sub, true)?;
            PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd())).read_link()?
        }
        None => volume.source.clone(),
    };
    let is_dir = fs::metadata(&source)
        .with_context(|| format!("looking at {}", source.display()))?
        .is_dir();
    let target = open_or_make(root, &volume.target, is_dir)?;
    let target = PathBuf::from(format!("/proc/self/fd/{}", target.as_raw_fd()));
    mount(
        Some(&source),
        &target,
        None::<&str>,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        None::<&str>,
    )?;
    if volume.read_only {
        let mounted = open_or_make(root, &volume.target, is_dir)?;
        remount_read_only(&PathBuf::from(format!(
            "/proc/self/fd/{}",
            mounted.as_raw_fd()
        )))?;
    }
    Ok(())
}

/// Opens `path` as if `root` were the root. A mount or rename anywhere on the machine at the same moment makes the kernel answer EAGAIN
/// where the path goes through a link with `..` in it (openat2(2)): it is asked again.
fn open_in(root: &OwnedFd, path: &str) -> nix::Result<OwnedFd> {
    let path = path.trim_matches('/');
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT);
    let path = if path.is_empty() { "." } else { path };
    for _ in 0..MOST_RACES {
        match openat2(root, path, how) {
            Err(Errno::EAGAIN) => std::thread::sleep(RACE_PAUSE),
            done => return done,
        }
    }
    openat2(root, path, how)
}

/// Opens `path` below `root`, making what is missing: directories, and the last part as a directory or an empty file.
fn open_or_make(root: &Path, path: &str, is_dir: bool) -> anyhow::Result<OwnedFd> {
    let root = nix::fcntl::open(
        root,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    let parts: Vec<&str> = path
        .split('/')
        .filter(|p| !p.is_empty() && *p != ".")
        .collect();
    let mut at = String::new();
    let mut parent = open_in(&root, "")?;
    for (index, part) in parts.iter().enumerate() {
        let last = index + 1 == parts.len();
        at = format!("{at}/{part}");
        let fd = match open_in(&root, &at) {
            Err(Errno::ENOENT) => {
                if last && !is_dir {
                    nix::fcntl::openat(
                        &parent,
                        *part,
                        OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW,
                        Mode::from_bits_truncate(0o644),
                    )
                    .map(drop)
                } else {
                    nix::sys::stat::mkdirat(&parent, *part, Mode::from_bits_truncate(0o755))
                }
                .with_context(|| format!("making {at}"))?;
                open_in(&root, &at)?
            }
            other => other.with_context(|| format!("opening {at}"))?,
        };
        parent = fd;
    }
    Ok(parent)
}

fn enter(root: &Path) -> anyhow::Result<()> {
    chdir(root)?;
    // "." over ".": the old root ends up mounted over the new one and is detached (pivot_root(2), NOTES).
    pivot_root(".", ".").context("changing the root")?;
    umount2(".", MntFlags::MNT_DETACH).context("detaching the host's file system")?;
    chdir("/").context("changing to /")
}
