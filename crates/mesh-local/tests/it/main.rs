//! Pods in real namespaces: as root, and as an ordinary user with a user namespace.
//!
//! The binary is re-executed as the agent's stages, so it has a main of its own: without arguments it runs every case once in each mode.

// A test fails by panicking; the harness of its own hides from clippy that this is one.
#![allow(clippy::unwrap_used)]

mod api;
mod lifecycle;
mod pods;
mod server;
mod streams;

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid, getegid, geteuid, setgroups, setresgid, setresuid};

fn main() -> ExitCode {
    let args: Vec<std::ffi::OsString> = std::env::args_os().collect();
    if let Some(code) = mesh_local::stage_main(&args) {
        return code;
    }
    match args.get(1).and_then(|a| a.to_str()) {
        Some("outer") => outer(args.get(2).is_some_and(|mode| mode == "user")),
        Some("inner") => inner(),
        Some("probed") => server::main(),
        Some("cluster") => cluster(args.get(2).is_some_and(|mode| mode == "user"), true),
        Some("running") => cluster(args.get(2).is_some_and(|mode| mode == "user"), false),
        Some("stop") => stop(
            args.get(2)
                .and_then(|mode| mode.to_str())
                .unwrap_or_default(),
        ),
        _ => every_mode(),
    }
}

fn every_mode() -> ExitCode {
    let modes: &[&str] = if geteuid().is_root() {
        &["root", "user"]
    } else {
        &["user"]
    };
    for mode in modes {
        for case in ["outer", "cluster", "stop"] {
            println!("{case} as {mode}");
            // As from a script's background job: signals that are ignored here must not be in containers.
            let status = Command::new("/bin/sh")
                .args(["-c", "trap '' HUP INT QUIT; exec \"$0\" \"$@\""])
                .arg(std::env::current_exe().expect("the path of the tests"))
                .args([case, mode])
                .status()
                .expect("starting the test in its mode");
            if !status.success() {
                eprintln!("test {case} failed in mode {mode}: {status}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

fn become_nobody() {
    let nobody = 65534;
    setgroups(&[]).expect("dropping groups");
    setresgid(
        Gid::from_raw(nobody),
        Gid::from_raw(nobody),
        Gid::from_raw(nobody),
    )
    .expect("changing the group");
    setresuid(
        Uid::from_raw(nobody),
        Uid::from_raw(nobody),
        Uid::from_raw(nobody),
    )
    .expect("changing the user");
    // Changing the user took the right to write our own /proc files away.
    nix::sys::prctl::set_dumpable(true).expect("becoming dumpable");
}

/// Leaves the machine's namespaces as the cluster does and runs the cases as PID 1.
fn outer(user: bool) -> ExitCode {
    if user && geteuid().is_root() {
        become_nobody();
    }
    let (uid, gid) = (geteuid(), getegid());
    if user {
        unshare(CloneFlags::CLONE_NEWUSER).expect("unprivileged user namespaces are needed (kernel.unprivileged_userns_clone, user.max_user_namespaces)");
        std::fs::write("/proc/self/setgroups", "deny").expect("writing setgroups");
        std::fs::write("/proc/self/uid_map", format!("0 {uid} 1")).expect("writing uid_map");
        std::fs::write("/proc/self/gid_map", format!("0 {gid} 1")).expect("writing gid_map");
    }
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID)
        .expect("making namespaces");
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .expect("private mounts");
    let status = Command::new("/proc/self/exe")
        .arg0("it")
        .arg("inner")
        .status()
        .expect("starting PID 1");
    if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn inner() -> ExitCode {
    mount(
        Some("proc"),
        "/proc",
        Some("proc"),
        MsFlags::empty(),
        None::<&str>,
    )
    .expect("mounting /proc");
    let run = Path::new("/tmp");
    mount(
        Some("mesh"),
        run,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=0755"),
    )
    .expect("mounting the runtime folder");
    std::fs::copy("/proc/self/exe", run.join("mesh")).expect("copying the binary");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("starting the runtime");
    runtime.block_on(pods::all(run));
    ExitCode::SUCCESS
}

/// A cluster of its own, in memory: parent, stages and node process come up, a Deployment becomes available, and all goes away again.
fn cluster(user: bool, exit_when_ready: bool) -> ExitCode {
    if user && geteuid().is_root() {
        become_nobody();
    }
    let template = serde_json::json!({
        "metadata": {"labels": {"app": "web"}},
        "spec": {"containers": [{
            "name": "web", "image": "none", "command": ["/bin/sh", "-c"],
            // The account's token and the API's certificate are there, and DNS is asked through the pod's resolv.conf.
            "args": ["test -s /var/run/secrets/kubernetes.io/serviceaccount/token -a -s /var/run/secrets/kubernetes.io/serviceaccount/ca.crt || exit 1; touch /tmp/up; sleep 1000"],
            "readinessProbe": {"exec": {"command": ["/bin/test", "-e", "/tmp/up"]}},
        }]},
    });
    let deployment = serde_json::json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "web"}}, "template": template},
    });
    let namespace =
        serde_json::json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}});
    let options = mesh_local::ClusterOptions {
        state_dir: mesh_local::StateDir::Memory,
        api_address: ([127, 0, 0, 1], 0).into(),
        boot: vec![mesh_local::BootWave {
            title: "shop".to_owned(),
            documents: vec![namespace, deployment],
            wait: vec![mesh_local::WaitFor {
                namespace: "shop".to_owned(),
                deployment: "web".to_owned(),
            }],
        }],
        boot_timeout_seconds: 30,
        exit_when_ready,
        ..mesh_local::ClusterOptions::default()
    };
    match mesh_local::all_in_one(options) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// SIGTERM ends the cluster and leaves nothing behind; SIGKILL of the parent leaves at most its state directory.
fn stop(mode: &str) -> ExitCode {
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let mut parent = Command::new("/proc/self/exe")
            .arg0("it")
            .args(["running", mode])
            .stdout(Stdio::piped())
            .spawn()
            .expect("starting the cluster");
        let lines = BufReader::new(parent.stdout.take().unwrap()).lines();
        let config = lines
            .map_while(Result::ok)
            .find_map(|line| line.strip_prefix("export KUBECONFIG=").map(str::to_owned));
        let config = config.expect("the cluster says where its kubeconfig is");
        let state = Path::new(&config).parent().unwrap().to_owned();
        let stages = of_cluster(&state);
        assert!(stages >= 3, "{stages} stages run");
        kill(Pid::from_raw(parent.id() as i32), signal).expect("sending the signal");
        let status = parent.wait().expect("waiting for the cluster");
        assert_eq!(status.success(), signal == Signal::SIGTERM, "{status}");
        for _ in 0..500 {
            if of_cluster(&state) == 0 {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert_eq!(
            of_cluster(&state),
            0,
            "processes outlive the cluster after {signal}"
        );
        assert_eq!(state.exists(), signal == Signal::SIGKILL);
        let _ = std::fs::remove_dir_all(&state);
    }
    ExitCode::SUCCESS
}

/// How many processes have the state directory on their command line.
fn of_cluster(state: &Path) -> usize {
    let state = state.to_string_lossy().into_owned();
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes
        .filter(|p| {
            std::fs::read_to_string(p.path().join("cmdline"))
                .is_ok_and(|line| line.contains(&state))
        })
        .count()
}
