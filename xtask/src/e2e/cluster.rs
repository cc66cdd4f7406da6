//! A cluster under test, with the mesh and the samples in it: talked to by the command line, and looked after for leftovers.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::http::{self, Client};
use crate::run;

/// What the walk needs running beside Bookinfo.
const SAMPLES: &[&str] = &["bookinfo", "httpbin", "helloworld", "curl"];

/// Where all-in-one finds the files of [`SAMPLES`]; a Kubernetes gets them applied.
const MANIFESTS: &[&str] = &[
    "bookinfo/platform/kube/bookinfo.yaml",
    "bookinfo/networking/bookinfo-gateway.yaml",
    "httpbin/httpbin.yaml",
    "httpbin/httpbin-gateway.yaml",
    "helloworld/helloworld.yaml",
    "helloworld/helloworld-gateway.yaml",
    "curl/curl.yaml",
];

/// What the mesh is installed with. Small requests: a node of two processors has room for all. And round robin is strictly in turn with one
/// worker.
pub const SETTINGS: &[&str] = &[
    "--set",
    "profile=demo",
    "--set",
    "meshConfig.defaultConfig.concurrency=1",
];

/// Where a local cluster says which ports of a Service are open on the host: `PORT=ADDRESS:PORT`, comma-separated.
const HOST_PORTS: &str = "mesh.local/host-ports";

const NO_PROCESS: &str = "only a local cluster has a main process";

/// A running cluster.
pub struct Cluster {
    binary: PathBuf,
    kubectl: Option<PathBuf>,
    place: tempfile::TempDir,
    home: Home,
    /// The ingress gateway, `http://ADDRESS:PORT`.
    pub gateway: String,
    /// From the start of the process, or from the first sample, to the first 200 of the product page.
    pub first_page: Duration,
}

enum Home {
    /// The main process of a local cluster.
    Local(Child, Start),
    /// Some Kubernetes.
    Remote(Remote),
}

/// What a local cluster starts with.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Start {
    /// The mesh and the samples.
    Whole,
    /// Nothing: the mesh is installed as on a Kubernetes.
    Empty,
}

/// A Kubernetes that others run.
pub struct Remote {
    /// How to reach it.
    pub kubeconfig: PathBuf,
    /// Where in the kubeconfig; its current context if none.
    pub context: Option<String>,
    /// The samples run from the mesh's image: nothing is pulled.
    pub own_images: bool,
}

impl Cluster {
    /// Starts a cluster on free ports with a state directory of its own, the mesh and the samples.
    pub fn start(binary: &Path, kubectl: Option<&Path>) -> anyhow::Result<Self> {
        let began = Instant::now();
        let mut cluster = Self::launch(binary, kubectl, Start::Whole)?;
        cluster.await_first_page(began)?;
        Ok(cluster)
    }

    /// Starts a cluster with nothing in it, for [`Self::deploy`] to fill.
    pub fn empty(binary: &Path, kubectl: Option<&Path>) -> anyhow::Result<Self> {
        let cluster = Self::launch(binary, kubectl, Start::Empty)?;
        let ready = cluster.wait("the API to answer", || {
            let nodes = cluster.get(&["nodes"])?;
            Ok((!nodes["items"].as_array().is_none_or(Vec::is_empty)).then_some(()))
        });
        ready.with_context(|| cluster.printed())?;
        Ok(cluster)
    }

    fn launch(binary: &Path, kubectl: Option<&Path>, start: Start) -> anyhow::Result<Self> {
        // A build leaves gigabytes to be written; the cluster's own small flushes would queue behind them.
        nix::unistd::sync();
        let place = tempfile::Builder::new().prefix("mesh-cluster-").tempdir()?;
        Ok(Self {
            binary: binary.to_owned(),
            kubectl: kubectl.map(Path::to_owned),
            home: Home::Local(launch(binary, place.path(), start)?, start),
            place,
            gateway: String::new(),
            first_page: Duration::ZERO,
        })
    }

    /// A Kubernetes without the mesh as yet.
    pub fn remote(binary: &Path, kubectl: Option<&Path>, remote: Remote) -> anyhow::Result<Self> {
        Ok(Self {
            binary: binary.to_owned(),
            kubectl: kubectl.map(Path::to_owned),
            place: tempfile::Builder::new().prefix("mesh-cluster-").tempdir()?,
            home: Home::Remote(remote),
            gateway: String::new(),
            first_page: Duration::ZERO,
        })
    }

    /// Is it a local cluster of ours?
    pub fn is_local(&self) -> bool {
        matches!(self.home, Home::Local(..))
    }

    /// Installs the mesh and applies the samples where [`Self::start`] has not done so, and waits for the first page.
    pub fn deploy(&mut self) -> anyhow::Result<()> {
        if matches!(self.home, Home::Local(_, Start::Whole)) {
            return Ok(());
        }
        let install = [&["install", "-y"], SETTINGS].concat();
        print!("{}", self.mesh(&install)?);
        let began = Instant::now();
        self.apply(
            "{apiVersion: v1, kind: Namespace, metadata: {name: default, labels: {istio-injection: enabled}}}",
        )?;
        for file in MANIFESTS {
            self.apply(&std::fs::read_to_string(
                run::root().join("samples").join(file),
            )?)?;
        }
        if !self.is_local() {
            self.gateway = self.gateway_address()?;
        }
        // Images may have to be pulled.
        self.first_page_within(began, Duration::from_secs(300))
    }

    /// The host's port on a local cluster, else the load balancer's address, else the first node's with the gateway's node port.
    fn gateway_address(&self) -> anyhow::Result<String> {
        let service = self.get(&["service", "istio-ingressgateway", "-n", "istio-system"])?;
        if self.is_local() {
            let ports = service["metadata"]["annotations"][HOST_PORTS].as_str();
            let mut ports = ports.unwrap_or_default().split(',');
            let address = ports.find_map(|port| port.strip_prefix("80="));
            let address = address.context("the gateway's port 80 is not open on the host")?;
            return Ok(format!("http://{address}"));
        }
        let balancer = &service["status"]["loadBalancer"]["ingress"][0];
        if let Some(address) = balancer["ip"].as_str().or(balancer["hostname"].as_str()) {
            return Ok(format!("http://{address}"));
        }
        let ports = service["spec"]["ports"].as_array();
        let port = ports.into_iter().flatten().find(|port| port["port"] == 80);
        let port = port.and_then(|port| port["nodePort"].as_u64());
        let port =
            port.context("the ingress gateway has neither a load balancer nor a node port")?;
        let nodes = self.get(&["nodes"])?;
        let addresses = nodes["items"][0]["status"]["addresses"].as_array();
        let address = addresses
            .into_iter()
            .flatten()
            .find(|address| address["type"] == "InternalIP")
            .and_then(|address| address["address"].as_str())
            .context("the first node has no address")?;
        Ok(format!("http://{address}:{port}"))
    }

    fn main_process(&mut self) -> anyhow::Result<&mut Child> {
        match &mut self.home {
            Home::Local(child, _) => Ok(child),
            Home::Remote(_) => bail!(NO_PROCESS),
        }
    }

    /// Sends SIGKILL to the main process and starts another one on the same state directory.
    pub fn kill_and_restart(&mut self) -> anyhow::Result<()> {
        let Home::Local(child, start) = &mut self.home else {
            bail!(NO_PROCESS);
        };
        child.kill()?;
        child.wait()?;
        let began = Instant::now();
        *child = launch(&self.binary, self.place.path(), *start)?;
        self.await_first_page(began)
    }

    /// Loads so many product pages, one after the other.
    pub fn pages(&self, count: usize) -> anyhow::Result<()> {
        let client = Client::new(&self.gateway);
        http::runtime()?.block_on(async {
            for _ in 0..count {
                client.get("/productpage", &[]).await?;
            }
            Ok(())
        })
    }

    /// The process id of a local cluster's main process.
    pub fn pid(&self) -> anyhow::Result<u32> {
        match &self.home {
            Home::Local(child, _) => Ok(child.id()),
            Home::Remote(_) => bail!(NO_PROCESS),
        }
    }

    fn await_first_page(&mut self, began: Instant) -> anyhow::Result<()> {
        let outcome = self.first_page_within(began, Duration::from_secs(120));
        if outcome.is_err() {
            self.show_state();
        }
        outcome
    }

    fn first_page_within(&mut self, began: Instant, limit: Duration) -> anyhow::Result<()> {
        let runtime = http::runtime()?;
        let mut last = String::from("no address was printed");
        while began.elapsed() < limit {
            if let Home::Local(child, start) = &mut self.home {
                if let Some(status) = child.try_wait()? {
                    bail!("mesh all-in-one ended with {status}:\n{}", self.printed());
                }
                self.gateway = match start {
                    Start::Whole => self.printed_url("/productpage"),
                    // Not there until it is written; anything else shows in the end.
                    Start::Empty => self.gateway_address().ok(),
                }
                .unwrap_or_default();
            }
            if !self.gateway.is_empty() {
                let client = Client::new(&self.gateway);
                match runtime.block_on(client.get("/productpage", &[])) {
                    Ok(answer) if answer.status == 200 => {
                        self.first_page = began.elapsed();
                        return Ok(());
                    }
                    Ok(answer) => last = format!("status {}", answer.status),
                    Err(error) => last = format!("{error:#}"),
                }
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        bail!("no product page after {} s: {last}", limit.as_secs())
    }

    /// What the main process printed.
    pub fn printed(&self) -> String {
        std::fs::read_to_string(self.place.path().join("output")).unwrap_or_default()
    }

    fn printed_url(&self, path: &str) -> Option<String> {
        let printed = self.printed();
        let word = printed
            .split_whitespace()
            .find(|w| w.starts_with("http://") && w.ends_with(path))?;
        Some(word.strip_suffix(path)?.to_owned())
    }

    fn kubeconfig(&self) -> PathBuf {
        match &self.home {
            Home::Local(..) => self.place.path().join("state/kubeconfig"),
            Home::Remote(remote) => remote.kubeconfig.clone(),
        }
    }

    /// A program that talks to this cluster.
    fn program(&self, program: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.env("KUBECONFIG", self.kubeconfig());
        match &self.home {
            Home::Local(..) => {
                command.env("HOME", self.place.path());
            }
            // Programs that a kubeconfig names look for their credentials at home.
            Home::Remote(remote) => {
                if let Some(context) = &remote.context {
                    command.args(["--context", context]);
                }
            }
        }
        command.args(args);
        command
    }

    /// Another program that talks to this cluster by its kubeconfig.
    pub fn with_kubeconfig(&self, program: &Path) -> Command {
        self.program(program, &[])
    }

    /// A command of the tool under test (`mesh`, or `kubectl` where it was asked for).
    pub fn tool(&self, args: &[&str]) -> Command {
        self.program(self.kubectl.as_ref().unwrap_or(&self.binary), args)
    }

    /// Runs the binary under test to its end, which a command that is to fail must reach by itself.
    pub fn second(&self, args: &[&str]) -> anyhow::Result<std::process::Output> {
        let mut command = Command::new(&self.binary);
        command
            .env("HOME", self.place.path())
            .env_remove("KUBECONFIG")
            .args(args);
        command
            .stdin(Stdio::null())
            .output()
            .context("starting the binary under test")
    }

    /// Runs a command of the tool and gives what it printed.
    pub fn call(&self, args: &[&str]) -> anyhow::Result<String> {
        run::output(&mut self.tool(args))
    }

    /// Runs one of our own commands, whatever the tool is, and gives what it printed.
    pub fn mesh(&self, args: &[&str]) -> anyhow::Result<String> {
        run::output(&mut self.program(&self.binary, args))
    }

    /// Applies YAML text.
    pub fn apply(&self, yaml: &str) -> anyhow::Result<String> {
        let file = self.place.path().join("apply.yaml");
        std::fs::write(&file, yaml)?;
        let own_images = matches!(&self.home, Home::Remote(remote) if remote.own_images);
        if own_images && yaml.contains("image:") {
            let mut offline = Command::new(&self.binary);
            let offline = offline.args(["offline", "-f"]).arg(&file);
            std::fs::write(&file, run::output(offline)?)?;
        }
        self.call(&["apply", "-f", &file.to_string_lossy()])
    }

    /// Deletes an object and waits until it is gone; one that does not exist is no error.
    pub fn delete(&self, kind: &str, name: &str) -> anyhow::Result<()> {
        self.call(&["delete", kind, name, "--ignore-not-found"])
            .map(drop)
    }

    /// Deletes everything in a YAML text; what is gone already is no error.
    pub fn delete_all(&self, yaml: &str) -> anyhow::Result<()> {
        let file = self.place.path().join("delete.yaml");
        std::fs::write(&file, yaml)?;
        let file = file.to_string_lossy();
        self.call(&["delete", "--ignore-not-found", "-f", &file])
            .map(drop)
    }

    /// `get -o json`.
    pub fn get(&self, args: &[&str]) -> anyhow::Result<Value> {
        let mut all = vec!["get", "-o", "json"];
        all.extend_from_slice(args);
        let text = self.call(&all)?;
        serde_json::from_str(&text).with_context(|| format!("reading the output of {all:?}"))
    }

    /// The names of the running pods with a label, in the default namespace.
    pub fn pods(&self, selector: &str) -> anyhow::Result<Vec<String>> {
        let list = self.get(&["pods", "-l", selector])?;
        let items = list["items"].as_array().cloned().unwrap_or_default();
        Ok(items
            .iter()
            .filter(|p| p["metadata"]["deletionTimestamp"].is_null())
            .filter_map(|p| p["metadata"]["name"].as_str().map(str::to_owned))
            .collect())
    }

    /// Runs a command in a container of the default namespace and gives its standard output.
    pub fn exec(&self, pod: &str, container: &str, command: &[&str]) -> anyhow::Result<String> {
        self.exec_in("default", pod, container, command)
    }

    /// Runs a command in a container of a namespace and gives its standard output.
    pub fn exec_in(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
        command: &[&str],
    ) -> anyhow::Result<String> {
        let mut args = vec!["exec", pod, "-n", namespace, "-c", container, "--"];
        args.extend_from_slice(command);
        self.call(&args)
    }

    /// Calls a URL from inside a pod of the default namespace with its curl.
    pub fn curl(&self, pod: &str, container: &str, args: &[&str]) -> anyhow::Result<String> {
        let mut all = vec!["curl", "-sS", "--max-time", "10"];
        all.extend_from_slice(args);
        self.exec(pod, container, &all)
    }

    /// Waits until `done` says so, 20 s at most (180 s on a Kubernetes); `what` is for the error.
    pub fn wait<T>(
        &self,
        what: &str,
        mut done: impl FnMut() -> anyhow::Result<Option<T>>,
    ) -> anyhow::Result<T> {
        let (limit, pause) = match &self.home {
            Home::Local(..) => (Duration::from_secs(20), Duration::from_millis(5)),
            Home::Remote(_) => (Duration::from_secs(180), Duration::from_millis(500)),
        };
        let began = Instant::now();
        let mut last = None;
        while began.elapsed() < limit {
            match done() {
                Ok(Some(found)) => return Ok(found),
                Ok(None) => {}
                Err(error) => last = Some(error),
            }
            std::thread::sleep(pause);
        }
        let waited = format!("waited {} s for {what}", limit.as_secs());
        match last {
            Some(error) => Err(error.context(waited)),
            None => bail!(waited),
        }
    }

    /// Shows what there is to find a failure by.
    pub fn show_state(&self) {
        eprintln!("--- printed by mesh all-in-one\n{}", self.printed());
        for args in [
            &["get", "pods", "-A", "-o", "wide"][..],
            &["get", "services", "-A"],
            &["get", "events", "-A"],
            &[
                "logs",
                "-n",
                "istio-system",
                "deployment/istiod",
                "--tail",
                "60",
            ],
            &[
                "logs",
                "-n",
                "istio-system",
                "deployment/istio-ingressgateway",
                "--tail",
                "40",
            ],
            &[
                "logs",
                "deployment/productpage-v1",
                "-c",
                "istio-proxy",
                "--tail",
                "40",
            ],
        ] {
            let out = self.tool(args).stdin(Stdio::null()).output();
            if let Ok(out) = out {
                let (text, errors) = (
                    String::from_utf8_lossy(&out.stdout),
                    String::from_utf8_lossy(&out.stderr),
                );
                eprintln!("--- {}\n{text}{errors}", args.join(" "));
            }
        }
    }

    /// Stops a local cluster by SIGTERM and looks for what it left behind; takes the samples and the mesh out of another one.
    pub fn stop(mut self) -> anyhow::Result<()> {
        let Ok(child) = self.main_process() else {
            return self.remove();
        };
        let pid = child.id();
        let family = family(pid);
        kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGTERM)?;
        let began = Instant::now();
        while child.try_wait()?.is_none() {
            if began.elapsed() > Duration::from_secs(60) {
                bail!(
                    "mesh all-in-one did not end 60 s after SIGTERM:\n{}",
                    self.printed()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        gone(&family)?;
        let mounts = std::fs::read_to_string("/proc/self/mounts")?;
        let place = self.place.path().to_string_lossy().into_owned();
        if let Some(line) = mounts.lines().find(|l| l.contains(&place)) {
            bail!("a mount was left behind: {line}");
        }
        let links = std::fs::read_to_string("/proc/net/dev")?;
        if links.contains("cni0") {
            bail!("the bridge cni0 was left in the host's network namespace");
        }
        Ok(())
    }

    /// Leaves everything running, and says where.
    pub fn keep(self) {
        println!("kept; export KUBECONFIG={}", self.kubeconfig().display());
        let mut kept = std::mem::ManuallyDrop::new(self);
        kept.place.disable_cleanup(true);
    }

    /// Takes out what [`Self::deploy`] has brought.
    pub fn remove(&self) -> anyhow::Result<()> {
        for file in MANIFESTS {
            self.delete_all(&std::fs::read_to_string(
                run::root().join("samples").join(file),
            )?)?;
        }
        // What was applied before and is no longer said goes away.
        self.apply("{apiVersion: v1, kind: Namespace, metadata: {name: default}}")?;
        print!("{}", self.mesh(&["uninstall", "--purge", "-y"])?);
        Ok(())
    }
}

impl Drop for Cluster {
    /// A scenario that failed leaves no local cluster behind either.
    fn drop(&mut self) {
        let running = |child: &mut Child| matches!(child.try_wait(), Ok(None));
        let Home::Local(child, _) = &mut self.home else {
            return;
        };
        if !running(child) {
            return;
        }
        if let Ok(pid) = i32::try_from(child.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let began = Instant::now();
        while running(child) && began.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(20));
        }
        // Nothing where it has ended; else its own children end with it.
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// Fails when one of these processes still runs after five seconds.
pub fn gone(family: &[u32]) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        let left: Vec<String> = family.iter().filter_map(|&pid| alive(pid)).collect();
        if left.is_empty() {
            return Ok(());
        }
        if began.elapsed() > Duration::from_secs(5) {
            bail!("processes were left behind: {}", left.join("; "));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The command line of a process that is no zombie.
fn alive(pid: u32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let state = stat.rsplit(')').next()?.trim_start().chars().next()?;
    if state == 'Z' || state == 'X' {
        return None;
    }
    let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
    Some(format!("{pid} {}", command.replace('\0', " ")))
}

/// A process and everything that descends from it.
pub fn family(pid: u32) -> Vec<u32> {
    let mut found = vec![pid];
    let mut at = 0;
    while at < found.len() {
        let children = format!("/proc/{0}/task/{0}/children", found[at]);
        let text = std::fs::read_to_string(children).unwrap_or_default();
        found.extend(
            text.split_whitespace()
                .filter_map(|p| p.parse::<u32>().ok()),
        );
        at += 1;
    }
    found
}

fn launch(binary: &Path, place: &Path, start: Start) -> anyhow::Result<Child> {
    let output = File::create(place.join("output"))?;
    let mut command = Command::new(binary);
    command
        .args(["all-in-one", "--state-dir"])
        .arg(place.join("state"));
    command.args(["--api-port", "0", "--http-port", "0", "--https-port", "0"]);
    match start {
        Start::Empty => {
            command.args(["--profile", "empty"]);
        }
        Start::Whole => {
            for sample in SAMPLES {
                command.args(["--sample", sample]);
            }
        }
    }
    command
        .env("HOME", place)
        .env_remove("KUBECONFIG")
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .with_context(|| format!("starting {}", binary.display()))
}
