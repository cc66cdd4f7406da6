//! Stock kubectl command by command: what an ordinary user of it does, with the outcome that such a user expects.

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rcgen::{CertificateParams, KeyPair};
use serde_json::json;

use crate::e2e::Cluster;

/// What is applied first; its namespace is not injected, so a pod has one container.
const MANIFEST: &str = r"
apiVersion: v1
kind: Namespace
metadata: {name: kubectl}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: settings, namespace: kubectl, labels: {kind: settings}}
data: {k: one}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: kubectl}
spec:
  replicas: 1
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - {name: web, image: curlimages/curl, command: [sh, -c, 'echo begun; exec sleep infinity']}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: kubectl}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
";

/// An Istio kind with a field that its definition does not have.
const UNKNOWN_FIELD: &str = r"
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: wrong, namespace: kubectl}
spec: {hosts: [web], http: [{rout: []}]}
";

/// Roles for `auth reconcile`: the writer may make roles and nothing else.
const ROLES: &str = r#"
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: writer, namespace: kubectl}
rules: [{verbs: [create], apiGroups: [rbac.authorization.k8s.io], resources: [roles]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: writer, namespace: kubectl}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: writer}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: writer}]
"#;

/// Commands, and a text that the output must hold; they follow each other. Nothing in them depends on the version of kubectl.
const STEPS: &[(&str, &str)] = &[
    ("apply -f MANIFEST", "deployment.apps/web created"),
    ("apply -f MANIFEST", "deployment.apps/web unchanged"),
    ("apply -f CHANGED", "configmap/settings configured"),
    (
        "apply --server-side -f CHANGED",
        "configmap/settings serverside-applied",
    ),
    (
        "rollout status deployment/web --timeout=20s",
        "successfully rolled out",
    ),
    (
        "wait --for=condition=Ready pod -l app=web --timeout=20s",
        "condition met",
    ),
    ("get pods -o wide", "mesh-node"),
    ("get pods -l app=web -o name", "pod/web-"),
    ("get all", "deployment.apps/web"),
    ("get configmap settings -o yaml", "k: two"),
    ("get configmap settings -o jsonpath={.data.k}", "two"),
    ("get configmap settings -o custom-columns=K:.data.k", "two"),
    ("get pods -A --chunk-size=2 --show-labels", "app=web"),
    ("get pods --field-selector status.phase=Running", "web-"),
    ("describe deployment web", "ScalingReplicaSet"),
    ("describe pod -l app=web", "Started container web"),
    ("describe service web", "10.96."),
    ("describe node mesh-node", "Allocated resources"),
    ("describe namespace kubectl", "Active"),
    (
        "create secret generic hidden --from-literal=a=b",
        "secret/hidden created",
    ),
    (
        "create configmap more --from-literal=a=b",
        "configmap/more created",
    ),
    ("label configmap settings x=y", "labeled"),
    ("annotate configmap settings x=y", "annotated"),
    (
        "patch configmap settings -p {\"data\":{\"a\":\"b\"}}",
        "patched",
    ),
    (
        "patch configmap settings --type=merge -p {\"data\":{\"a\":null}}",
        "patched",
    ),
    (
        "patch configmap settings --type=json -p [{\"op\":\"add\",\"path\":\"/data/c\",\"value\":\"d\"}]",
        "patched",
    ),
    ("edit configmap settings", "edited"),
    ("get configmap settings -o jsonpath={.data.k}", "three"),
    ("logs deployment/web --tail=1", "begun"),
    ("logs -l app=web --since=1h --timestamps", "begun"),
    ("exec deployment/web -- echo hello", "hello"),
    (
        "set image deployment/web web=curlimages/curl:8.16.0",
        "image updated",
    ),
    (
        "rollout status deployment/web --timeout=20s",
        "successfully rolled out",
    ),
    ("rollout history deployment/web", "REVISION"),
    ("rollout undo deployment/web", "rolled back"),
    ("rollout restart deployment/web", "restarted"),
    (
        "rollout status deployment/web --timeout=20s",
        "successfully rolled out",
    ),
    ("scale deployment/web --replicas=2", "scaled"),
    (
        "rollout status deployment/web --timeout=20s",
        "successfully rolled out",
    ),
    ("scale deployment/web --replicas=1", "scaled"),
    (
        "expose deployment web --port=80 --name=exposed",
        "service/exposed exposed",
    ),
    ("explain pods.spec.containers", "livenessProbe"),
    ("explain deployments", "KIND:"),
    ("explain virtualservices.spec.http", "retries"),
    ("api-resources", "virtualservices"),
    ("api-versions", "networking.istio.io/v1"),
    ("cluster-info", "running at"),
    ("auth can-i create pods", "yes"),
    ("auth can-i --list", "*.*"),
    ("create serviceaccount viewer", "serviceaccount/viewer"),
    (
        "create role reader --verb=get,list,watch --resource=pods,pods/log",
        "reader created",
    ),
    (
        "create rolebinding reader --role=reader --serviceaccount=kubectl:viewer",
        "reader created",
    ),
    (
        "create clusterrole nodes --verb=get --resource=nodes",
        "nodes created",
    ),
    (
        "create clusterrolebinding nodes --clusterrole=nodes --user=jane --group=ops",
        "nodes created",
    ),
    ("get rolebindings -o wide", "Role/reader"),
    ("describe clusterrole view", "pods/log"),
    ("auth reconcile -f ROLES", "reconciled"),
    (
        "auth can-i list pods --as=system:serviceaccount:kubectl:viewer",
        "yes",
    ),
    (
        "auth can-i get pods --subresource=log --as=system:serviceaccount:kubectl:viewer",
        "yes",
    ),
    (
        "auth can-i --list --as=system:serviceaccount:kubectl:viewer",
        "pods/log",
    ),
    ("get pods --as=system:serviceaccount:kubectl:viewer", "web-"),
    (
        "get node mesh-node --as=somebody --as-group=ops",
        "mesh-node",
    ),
    (
        "create -f REQUEST",
        "certificatesigningrequest.certificates.k8s.io/wanted created",
    ),
    ("get csr wanted", "Pending"),
    ("certificate approve wanted", "wanted approved"),
    ("get csr wanted", "Approved"),
    ("delete csr wanted", "deleted"),
    ("create -f REQUEST", "created"),
    ("certificate deny wanted", "wanted denied"),
    ("get csr wanted", "Denied"),
    ("delete csr wanted", "deleted"),
    ("delete clusterrole nodes", "deleted"),
    ("delete clusterrolebinding nodes", "deleted"),
    (
        "run brief --image=curlimages/curl --restart=Never --rm -i --command -- sh -c sleep${IFS}1;echo${IFS}done",
        "done",
    ),
    ("delete configmap -l kind=settings", "deleted"),
    ("delete service exposed", "deleted"),
];

/// Commands that must fail, and a text of the error.
const REFUSED: &[(&str, &str)] = &[
    ("apply -f UNKNOWN", "rout"),
    ("apply -f TYPO", "replicaz"),
    ("get pod nobody", "pods \"nobody\" not found"),
    ("get nonsense", "doesn't have a resource type"),
    ("create namespace kubectl", "already exists"),
    ("top pods", "etrics"),
    ("logs deployment/web --previous", "not found"),
    (
        "auth can-i delete pods --as=system:serviceaccount:kubectl:viewer",
        "no",
    ),
    (
        "get secrets --as=system:serviceaccount:kubectl:viewer",
        "secrets is forbidden: User \"system:serviceaccount:kubectl:viewer\" cannot list resource \"secrets\" in API group \"\" in the namespace \"kubectl\"",
    ),
    (
        "create role more --verb=get --resource=secrets --as=writer",
        "attempting to grant RBAC permissions not currently held",
    ),
];

/// A request for a certificate, of a signer that nobody is.
fn request() -> anyhow::Result<String> {
    let pem = CertificateParams::new(Vec::new())?
        .serialize_request(&KeyPair::generate()?)?
        .pem()?;
    let object = json!({
        "apiVersion": "certificates.k8s.io/v1",
        "kind": "CertificateSigningRequest",
        "metadata": { "name": "wanted" },
        "spec": { "request": STANDARD.encode(pem), "signerName": "example.com/nobody", "usages": ["client auth"] },
    });
    Ok(object.to_string())
}

/// Runs every command with a cluster that was started with this kubectl.
pub fn commands(kubectl: &Path, cluster: &Cluster) -> anyhow::Result<()> {
    let place = tempfile::tempdir()?;
    let file = |name: &str, text: &str| {
        let path = place.path().join(name);
        std::fs::write(&path, text)?;
        anyhow::Ok(path.to_string_lossy().into_owned())
    };
    let changed = MANIFEST.replace("k: one", "k: two");
    let files = [
        ("MANIFEST", file("manifest.yaml", MANIFEST)?),
        ("CHANGED", file("changed.yaml", &changed)?),
        ("UNKNOWN", file("unknown.yaml", UNKNOWN_FIELD)?),
        ("ROLES", file("roles.yaml", ROLES)?),
        ("REQUEST", file("request.json", &request()?)?),
        (
            "TYPO",
            file("typo.yaml", &MANIFEST.replace("replicas:", "replicaz:"))?,
        ),
    ];
    let with_files = |line: &str| -> Vec<String> {
        let word = |w: &str| {
            let found = files.iter().find(|(name, _)| *name == w);
            found.map_or_else(|| w.to_owned(), |(_, path)| path.clone())
        };
        line.split(' ').map(word).collect()
    };
    for (line, expected) in STEPS {
        let (worked, text) = outcome(cluster, &with_files(line))?;
        ensure!(
            worked && text.contains(expected),
            "kubectl {line}: expected {expected:?}, got\n{text}"
        );
    }
    for (line, expected) in REFUSED {
        let (worked, text) = outcome(cluster, &with_files(line))?;
        ensure!(
            !worked && text.contains(expected),
            "kubectl {line}: expected an error with {expected:?}, got\n{text}"
        );
    }
    streams(cluster, place.path())?;
    port_forward(cluster)?;
    let (_, text) = outcome(cluster, &with_files("delete namespace kubectl"))?;
    ensure!(text.contains("deleted"), "deleting the namespace: {text}");
    println!(
        "{}: {} commands, as expected",
        kubectl.display(),
        STEPS.len() + REFUSED.len()
    );
    Ok(())
}

/// Whether the command succeeded, and what it printed on both streams.
fn outcome(cluster: &Cluster, args: &[String]) -> anyhow::Result<(bool, String)> {
    let out = tool(cluster, args).output().context("starting kubectl")?;
    let text = [out.stdout, out.stderr].concat();
    Ok((
        out.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    ))
}

/// In the judge's namespace where the command does not say it; an argument after `--` is the container's.
fn tool(cluster: &Cluster, args: &[String]) -> Command {
    let mut all = vec!["--namespace", "kubectl"];
    all.extend(args.iter().map(String::as_str));
    let mut command = cluster.tool(&all);
    command
        .env("KUBE_EDITOR", "sed -i s/two/three/")
        .stdin(Stdio::null());
    command
}

fn words(line: &str) -> Vec<String> {
    line.split(' ').map(str::to_owned).collect()
}

/// Exit codes, standard input, a terminal, and copies in both directions.
fn streams(cluster: &Cluster, place: &Path) -> anyhow::Result<()> {
    let mut failing = words("exec deployment/web -- sh -c");
    failing.push("exit 7".to_owned());
    let code = tool(cluster, &failing).output()?.status.code();
    ensure!(
        code == Some(7),
        "exec gave the exit code {code:?} in place of 7"
    );

    let sent: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let mut cat = tool(cluster, &words("exec -i deployment/web -- sha256sum"));
    let mut child = cat.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    child
        .stdin
        .take()
        .context("no standard input")?
        .write_all(&sent)?;
    let there = String::from_utf8(child.wait_with_output()?.stdout)?;

    let pod = outcome(cluster, &words("get pods -l app=web --field-selector status.phase=Running -o jsonpath={.items[0].metadata.name}"))?.1;
    let (from, to) = (place.join("sent"), place.join("back"));
    std::fs::create_dir_all(&from)?;
    std::fs::write(from.join("numbers"), &sent)?;
    for (a, b) in [
        (from.display().to_string(), format!("{pod}:/tmp/sent")),
        (format!("{pod}:/tmp/sent"), to.display().to_string()),
    ] {
        let (worked, text) = outcome(cluster, &["cp".to_owned(), a, b])?;
        ensure!(worked, "cp: {text}");
    }
    ensure!(
        std::fs::read(to.join("numbers"))? == sent,
        "cp brought back something else"
    );
    let (_, copied) = outcome(
        cluster,
        &words("exec deployment/web -- sha256sum /tmp/sent/numbers"),
    )?;
    ensure!(
        there.get(..64) == copied.get(..64) && there.len() > 64,
        "standard input arrived as {there}, the copy as {copied}"
    );
    Ok(())
}

/// A port-forward that is ended when it goes out of scope.
struct Forward(Child);

impl Drop for Forward {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn port_forward(cluster: &Cluster) -> anyhow::Result<()> {
    let port = std::net::TcpListener::bind("127.0.0.1:0")?
        .local_addr()?
        .port();
    let args = [
        "port-forward".to_owned(),
        "service/httpbin".to_owned(),
        format!("{port}:8000"),
    ];
    let mut all = vec!["--namespace", "default"];
    all.extend(args.iter().map(String::as_str));
    let child = cluster
        .tool(&all)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()?;
    let _forward = Forward(child);
    cluster.wait("an answer through port-forward", || {
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(std::time::Duration::from_secs(5)))?;
        stream
            .write_all(b"GET /status/204 HTTP/1.1\r\nHost: httpbin\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        std::io::Read::read_to_string(&mut stream, &mut text)?;
        if !text.starts_with("HTTP/1.1 204") {
            bail!("the answer was {text:?}");
        }
        Ok(Some(()))
    })
}
