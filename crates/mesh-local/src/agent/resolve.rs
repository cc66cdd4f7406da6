//! Which program a container runs and as whom. Pure but for the question whether a program exists on the host.

use std::collections::BTreeMap;
use std::path::Path;

use k8s_openapi::api::core::v1::{Container, Pod};
use mesh_samples::images::{self, Image};
use serde::{Deserialize, Serialize};

use super::env::expand;

/// The user of containers that name none, where uids are mapped.
const DEFAULT_UID: u32 = 1000;
/// The search path of containers that set none.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The reason of a container whose program could not be executed. As with containerd below the kubelet this is an end with exit code 128,
/// which the restart policy follows, and not a container that waits.
pub const START_ERROR: &str = "StartError";

/// Why a container can't be run.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ResolveError {
    /// The image is not in the table and the container names no command.
    #[error(
        "image \"{image}\" is not one of the built-in images and the container has no command of its own; this cluster pulls nothing. \
         Use one of: {known}; or set `command` to a program of this machine"
    )]
    UnknownImage {
        /// The reference.
        image: String,
        /// The names that can be used.
        known: String,
    },
    /// `command` names a program that the machine does not have.
    #[error("exec: \"{program}\": {what}")]
    NoProgram {
        /// The program as written.
        program: String,
        /// `executable file not found in $PATH` or `no such file or directory`.
        what: &'static str,
    },
    /// An image of the table that has neither entrypoint nor command, and the container names none.
    #[error("no command specified: image \"{0}\" has none, set `command` or `args`")]
    NoCommand(String),
    /// `runAsNonRoot` with uid 0.
    #[error(
        "container has runAsNonRoot and image will run as root: set runAsUser to another uid than 0"
    )]
    Root,
    /// A capability that does not exist.
    #[error("capability \"{0}\" is unknown")]
    Capability(String),
}

impl ResolveError {
    /// The word for the container's state.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::UnknownImage { .. } => "ErrImagePull",
            Self::NoProgram { .. } => START_ERROR,
            Self::NoCommand(_) => "CreateContainerError",
            Self::Root | Self::Capability(_) => "CreateContainerConfigError",
        }
    }
}

/// A program with its arguments, as it is started in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// The image's table entry, when it has one.
    pub image: Option<&'static Image>,
    /// Where it starts.
    pub cwd: String,
}

/// The program of `container` under the environment `env`.
pub fn program(container: &Container, env: &[(String, String)]) -> Result<Program, ResolveError> {
    let reference = container.image.as_deref().unwrap_or_default();
    let image = images::lookup(reference);
    let values: BTreeMap<String, String> = env.iter().cloned().collect();
    let given = |list: &Option<Vec<String>>| list.as_ref().filter(|l| !l.is_empty()).cloned();
    let (command, args) = (given(&container.command), given(&container.args));
    if image.is_none() && command.is_none() {
        let known = images::known()
            .map(|image| image.name)
            .collect::<Vec<_>>()
            .join(", ");
        return Err(ResolveError::UnknownImage {
            image: reference.to_owned(),
            known,
        });
    }
    let owned = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
    let mut argv: Vec<String> = match (&command, image) {
        (Some(command), _) => command.iter().map(|s| expand(s, &values)).collect(),
        (None, Some(image)) => owned(image.entrypoint),
        (None, None) => Vec::new(),
    };
    match (args, &command, image) {
        (Some(args), _, _) => argv.extend(args.iter().map(|s| expand(s, &values))),
        (None, None, Some(image)) => argv.extend(owned(image.cmd)),
        _ => {}
    }
    let first = argv
        .first()
        .ok_or_else(|| ResolveError::NoCommand(reference.to_owned()))?;
    let applets = image.map(|i| i.applets).unwrap_or_default();
    check_program(
        first,
        applets,
        values.get("PATH").map_or(DEFAULT_PATH, String::as_str),
    )?;
    let cwd = container.working_dir.clone().filter(|d| !d.is_empty());
    let cwd = cwd.unwrap_or_else(|| image.map_or("/", |i| i.workdir).to_owned());
    Ok(Program { argv, image, cwd })
}

/// Only the obvious case is refused here, with a message; what the container's own mounts bring in is found at exec.
fn check_program(program: &str, applets: &[&str], path: &str) -> Result<(), ResolveError> {
    if program.contains('/') {
        return Ok(());
    }
    let known = program == "mesh"
        || applets.contains(&program)
        || path
            .split(':')
            .any(|dir| Path::new(dir).join(program).is_file());
    known.then_some(()).ok_or_else(|| ResolveError::NoProgram {
        program: program.to_owned(),
        what: "executable file not found in $PATH",
    })
}

/// Who a container runs as and what it may do.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Privileges {
    /// The user; `None`: the only one there is (uids are not mapped).
    pub uid: Option<u32>,
    /// The group.
    pub gid: Option<u32>,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// The bounding set as a bit mask; what a process of uid 0 gets.
    pub bounding: u64,
    /// Held by the process whatever its uid.
    pub ambient: u64,
    /// Programs gain nothing from set-user-id bits or file capabilities.
    pub no_new_privs: bool,
    /// The root file system can't be written.
    pub read_only_root: bool,
}

/// capability(7), in the order of their numbers.
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The container runtimes' default set, less NET_RAW.
const DEFAULT_CAPABILITIES: [&str; 13] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// The proxy's uid; where uids can't be mapped it marks its sockets instead, for which it needs NET_ADMIN.
const PROXY_UID: i64 = 1337;

fn bit(name: &str) -> Result<u64, ResolveError> {
    let upper = name.to_uppercase();
    let plain = upper.strip_prefix("CAP_").unwrap_or(&upper);
    let number = CAPABILITIES.iter().position(|c| *c == plain);
    number
        .map(|n| 1 << n)
        .ok_or_else(|| ResolveError::Capability(name.to_owned()))
}

/// Who `container` of `pod` runs as. `uids_mapped`: whether the node has more than one uid.
pub fn privileges(
    pod: &Pod,
    container: &Container,
    image: Option<&Image>,
    uids_mapped: bool,
) -> Result<Privileges, ResolveError> {
    let pod_context = pod.spec.as_ref().and_then(|s| s.security_context.as_ref());
    let own = container.security_context.as_ref();
    let user = own
        .and_then(|c| c.run_as_user)
        .or(pod_context.and_then(|c| c.run_as_user));
    let group = own
        .and_then(|c| c.run_as_group)
        .or(pod_context.and_then(|c| c.run_as_group));
    let non_root = own
        .and_then(|c| c.run_as_non_root)
        .or(pod_context.and_then(|c| c.run_as_non_root))
        .unwrap_or(false);
    let privileged = own.and_then(|c| c.privileged).unwrap_or(false);
    let uid = user
        .or(image.and_then(|i| i.user).map(i64::from))
        .unwrap_or(if privileged { 0 } else { DEFAULT_UID.into() });
    if non_root && uid == 0 {
        return Err(ResolveError::Root);
    }
    let (bounding, ambient) = capabilities(container, privileged, uid, uids_mapped)?;
    let mut groups: Vec<u32> = pod_context
        .and_then(|c| c.supplemental_groups.as_ref())
        .into_iter()
        .flatten()
        .map(|g| narrow(*g))
        .collect();
    groups.extend(pod_context.and_then(|c| c.fs_group).map(narrow));
    Ok(Privileges {
        uid: uids_mapped.then(|| narrow(uid)),
        gid: uids_mapped.then(|| narrow(group.unwrap_or(if user.is_some() { 0 } else { uid }))),
        groups: if uids_mapped { groups } else { Vec::new() },
        bounding,
        ambient,
        no_new_privs: !privileged && own.and_then(|c| c.allow_privilege_escalation) != Some(true),
        read_only_root: own
            .and_then(|c| c.read_only_root_filesystem)
            .unwrap_or(false),
    })
}

fn narrow(id: i64) -> u32 {
    u32::try_from(id).unwrap_or(u32::MAX - 1)
}

fn capabilities(
    container: &Container,
    privileged: bool,
    uid: i64,
    uids_mapped: bool,
) -> Result<(u64, u64), ResolveError> {
    let all = (1u64 << CAPABILITIES.len()) - 1;
    let mut set = if privileged {
        all
    } else {
        DEFAULT_CAPABILITIES
            .iter()
            .map(|c| bit(c))
            .try_fold(0, |a, b| b.map(|b| a | b))?
    };
    let mut added = 0;
    if let Some(wanted) = container
        .security_context
        .as_ref()
        .and_then(|c| c.capabilities.as_ref())
    {
        // Drops come first and ALL is a word of its own, as with container runtimes.
        for name in wanted.drop.iter().flatten() {
            set &= if name.eq_ignore_ascii_case("ALL") {
                0
            } else {
                !bit(name)?
            };
        }
        for name in wanted.add.iter().flatten() {
            added |= if name.eq_ignore_ascii_case("ALL") {
                all
            } else {
                bit(name)?
            };
        }
    }
    set |= added;
    let net_admin = bit("NET_ADMIN")?;
    if !uids_mapped {
        // One uid for all: who is who is decided by the capability, so only the proxy (and the container that sets the capture rules,
        // which asks for it) may set marks.
        if uid == PROXY_UID {
            set |= net_admin;
            added |= net_admin;
        } else if added & net_admin == 0 {
            set &= !net_admin;
        }
        return Ok((set, added & set));
    }
    // Kubernetes gives added capabilities to non-root users only through the bounding set; file capabilities do the rest there. Files
    // here carry none, so what was asked for is made ambient.
    Ok((set, if uid == 0 { 0 } else { added & set }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn container(value: serde_json::Value) -> Container {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn command_and_args_replace_the_image() {
        let image = "docker.io/istio/examples-bookinfo-reviews-v2:1.20.3";
        let plain = program(&container(json!({"name": "c", "image": image})), &[]).unwrap();
        assert_eq!(plain.argv[1..], ["sample", "reviews"]);
        let args = program(
            &container(json!({"name": "c", "image": image, "args": ["--x", "$(A)"]})),
            &[("A".into(), "b".into())],
        )
        .unwrap();
        assert_eq!(args.argv[3..], ["--x", "b"]);
        let own = program(
            &container(
                json!({"name": "c", "image": "whatever", "command": ["/bin/sh", "-c"], "args": ["exit 3"]}),
            ),
            &[],
        );
        assert_eq!(own.unwrap().argv, ["/bin/sh", "-c", "exit 3"]);
    }

    #[test]
    fn what_can_not_run_says_so() {
        let unknown =
            program(&container(json!({"name": "c", "image": "redis:7"})), &[]).unwrap_err();
        assert_eq!(unknown.reason(), "ErrImagePull");
        assert!(unknown.to_string().contains("go-httpbin"), "{unknown}");
        let missing = program(
            &container(json!({"name": "c", "image": "x", "command": ["no-such-program"]})),
            &[],
        )
        .unwrap_err();
        assert_eq!(
            missing.to_string(),
            "exec: \"no-such-program\": executable file not found in $PATH"
        );
    }

    #[test]
    fn privileges_follow_the_security_context() {
        let pod: Pod = serde_json::from_value(
            json!({"spec": {"containers": [], "securityContext": {"fsGroup": 5, "runAsUser": 7}}}),
        )
        .unwrap();
        let plain = privileges(&pod, &container(json!({"name": "c"})), None, true).unwrap();
        assert_eq!(
            (
                plain.uid,
                plain.gid,
                plain.groups.clone(),
                plain.no_new_privs
            ),
            (Some(7), Some(0), vec![5], true)
        );
        assert_eq!(plain.bounding & bit("NET_RAW").unwrap(), 0);
        let init = container(
            json!({"name": "c", "securityContext": {"runAsUser": 0, "capabilities": {"add": ["NET_ADMIN"], "drop": ["ALL"]}}}),
        );
        assert_eq!(
            privileges(&pod, &init, None, true).unwrap().bounding,
            bit("NET_ADMIN").unwrap()
        );
        let root = container(
            json!({"name": "c", "securityContext": {"runAsUser": 0, "runAsNonRoot": true}}),
        );
        assert_eq!(
            privileges(&pod, &root, None, true).unwrap_err(),
            ResolveError::Root
        );
    }

    #[test]
    fn with_one_uid_only_the_proxy_may_mark() {
        let pod: Pod = serde_json::from_value(json!({"spec": {"containers": []}})).unwrap();
        let net_admin = bit("NET_ADMIN").unwrap();
        let proxy = container(
            json!({"name": "p", "securityContext": {"runAsUser": 1337, "capabilities": {"drop": ["ALL"]}}}),
        );
        let proxy = privileges(&pod, &proxy, None, false).unwrap();
        assert_eq!((proxy.uid, proxy.ambient), (None, net_admin));
        let app = privileges(&pod, &container(json!({"name": "a"})), None, false).unwrap();
        assert_eq!((app.ambient, app.bounding & net_admin), (0, 0));
    }
}
