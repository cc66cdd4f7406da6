//! Ways that other scenarios don't go: by delegated rules, by server name in TLS, and to a single pod of a StatefulSet.

use anyhow::{Context, ensure};

use super::samples::with;
use crate::e2e::cluster::Cluster;
use crate::e2e::http::{self, Client};

/// Apart, so that it is deleted after what is in it.
const TEAM: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: team}
";

/// The owner of a host gives one path away.
const ROOT: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: root, namespace: default}
spec:
  hosts: [delegates.example.com]
  gateways: [bookinfo-gateway]
  http:
  - match: [{uri: {prefix: /details}}]
    headers: {response: {set: {x-root: 'yes'}}}
    delegate: {name: part, namespace: team}
  - directResponse: {status: 404, body: {string: root}}
";

/// What the other team makes of it; a path outside of its part is not its to give.
const PART: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: part, namespace: team}
spec:
  http:
  - match: [{uri: {prefix: /details/0}}]
    route: [{destination: {host: details.default.svc.cluster.local, port: {number: 9080}}}]
  - match: [{uri: {prefix: /stolen}}]
    directResponse: {status: 200, body: {string: stolen}}
  - directResponse: {status: 503, body: {string: part}}
";

const PART_CHANGED: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: part, namespace: team}
spec: {http: [{directResponse: {status: 200, body: {string: changed}}}]}
";

/// Waits until paths at a host are answered so: status, and a text in the body.
fn answered(
    cluster: &Cluster,
    what: &str,
    host: &str,
    rows: &[(&str, u16, &str)],
) -> anyhow::Result<()> {
    let client = Client::new(&cluster.gateway);
    let runtime = http::runtime()?;
    cluster.wait(what, || {
        for (path, status, text) in rows {
            let answer = runtime.block_on(client.get(path, &[("host", host)]))?;
            ensure!(
                answer.status == *status && answer.body.contains(text),
                "{path}: {status} with {text:?} was expected, {} came: {}",
                answer.status,
                answer.body
            );
        }
        Ok(Some(()))
    })
}

/// A part of a host's rules is another team's, which changes it by itself.
pub(super) fn delegated(cluster: &mut Cluster) -> anyhow::Result<()> {
    const HOST: &str = "delegates.example.com";
    with(cluster, &[TEAM, PART, ROOT], |cluster| {
        let rows = [
            ("/details/0", 200, "William Shakespeare"),
            ("/details/x", 503, "part"),
            ("/stolen", 404, "root"),
            ("/", 404, "root"),
        ];
        answered(cluster, "the part of the other team", HOST, &rows)?;
        let client = Client::new(&cluster.gateway);
        let asked = client.get("/details/0", &[("host", HOST)]);
        let answer = http::runtime()?.block_on(asked)?;
        let root = answer.headers.get("x-root").map(String::as_str);
        ensure!(
            root == Some("yes"),
            "the root's headers are not on an answer of its delegate: {:?}",
            answer.headers
        );
        cluster.apply(PART_CHANGED)?;
        let rows = [("/details/0", 200, "changed"), ("/stolen", 404, "root")];
        answered(cluster, "the changed part", HOST, &rows)?;
        cluster.delete_all(PART)?;
        let rows = [("/details/0", 404, "root")];
        answered(cluster, "the root without its delegate", HOST, &rows)
    })
}

/// TLS that is passed on by the name that clients ask for: the control plane's webhooks and the API have servers of it.
const NAMES: &str = "
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: names, namespace: default}
spec:
  selector: {istio: ingressgateway}
  servers:
  - port: {number: 443, name: tls, protocol: TLS}
    hosts: ['*.names.example.com']
    tls: {mode: PASSTHROUGH}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: names, namespace: default}
spec:
  hosts: ['*.names.example.com']
  gateways: [names]
  tls:
  - match: [{port: 443, sniHosts: [api.names.example.com]}]
    route: [{destination: {host: kubernetes.default.svc.cluster.local, port: {number: 443}}}]
  - match: [{port: 443, sniHosts: ['*.istiod.names.example.com', istiod.names.example.com]}]
    route: [{destination: {host: istiod.istio-system.svc.cluster.local, port: {number: 443}}}]
";

/// The same in sidecars: who asks for one server gets to the other.
const DIVERTED: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: diverted, namespace: default}
spec:
  hosts: [istiod.istio-system.svc.cluster.local]
  exportTo: [.]
  tls:
  - match: [{port: 443, sniHosts: [istiod.istio-system.svc.cluster.local]}]
    route: [{destination: {host: kubernetes.default.svc.cluster.local, port: {number: 443}}}]
";

/// The status that the webhooks have for this path, behind an empty body.
const WEBHOOKS: &str = "404";
const CLOSED: &str = "closed";

/// What the API says, and nobody else: the local one to who asked for another name; a Kubernetes does not mind the name.
fn api(cluster: &Cluster) -> &'static str {
    match cluster.is_local() {
        true => "is not this server",
        false => "gitVersion",
    }
}

/// Waits until these names are answered by these servers.
fn led(cluster: &Cluster, what: &str, rows: &[(&str, &str)]) -> anyhow::Result<()> {
    let pods = cluster.pods("app=curl")?;
    let pod = pods.first().context("no pod of curl")?;
    cluster.wait(what, || {
        for (args, wanted) in rows {
            let mut command = vec!["curl", "-ksS", "--max-time", "5", "-w", " %{http_code}"];
            command.extend(args.split(' '));
            let printed = match cluster.exec(pod, "curl", &command) {
                Err(error) if format!("{error:#}").contains("exit code") => CLOSED.to_owned(),
                printed => printed?,
            };
            ensure!(printed.contains(wanted), "{args} brings {printed:?}");
        }
        Ok(Some(()))
    })
}

/// Connections go by the name in the TLS handshake, at the gateway and in sidecars; nobody ends them on the way.
pub(super) fn by_server_name(cluster: &mut Cluster) -> anyhow::Result<()> {
    let gateways = cluster.get(&[
        "pods",
        "-n",
        "istio-system",
        "-l",
        "app=istio-ingressgateway",
    ])?;
    let address = gateways["items"][0]["status"]["podIP"]
        .as_str()
        .context("the gateway has no address")?;
    let at = |name: &str| {
        format!(
            "--resolve {name}.names.example.com:8443:{address} https://{name}.names.example.com:8443/version"
        )
    };
    with(cluster, &[NAMES], |cluster| {
        let (at_api, istiod) = (at("api"), at("istiod"));
        let (deeper, nobody) = (at("a.istiod"), at("nobody"));
        let rows = [
            (at_api.as_str(), api(cluster)),
            (istiod.as_str(), WEBHOOKS),
            (deeper.as_str(), WEBHOOKS),
            (nobody.as_str(), CLOSED),
        ];
        led(cluster, "the gateway to go by server names", &rows)
    })?;
    let inside = "https://istiod.istio-system.svc.cluster.local/version";
    led(cluster, "istiod itself", &[(inside, WEBHOOKS)])?;
    with(cluster, &[DIVERTED], |cluster| {
        led(cluster, "the sidecar to divert", &[(inside, api(cluster))])
    })?;
    led(cluster, "istiod itself again", &[(inside, WEBHOOKS)])
}

const STATEFUL: &str = "
apiVersion: v1
kind: Service
metadata: {name: hello}
spec:
  clusterIP: None
  selector: {app: hello}
  ports: [{name: http, port: 5000}]
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: hello}
spec:
  serviceName: hello
  replicas: 2
  podManagementPolicy: Parallel
  selector: {matchLabels: {app: hello}}
  template:
    metadata: {labels: {app: hello}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: helloworld, image: 'istio/examples-helloworld-v1:1.0', ports: [{containerPort: 5000}]}]
";

/// Each pod of a StatefulSet has a name, and who calls it by that gets it and no other.
pub(super) fn by_pod(cluster: &mut Cluster) -> anyhow::Result<()> {
    with(cluster, &[STATEFUL], |cluster| {
        let rows = [
            ("http://hello-0.hello:5000/hello", "instance: hello-0"),
            ("http://hello-1.hello:5000/hello", "instance: hello-1"),
            (
                "http://hello-1.hello.default.svc.cluster.local:5000/hello",
                "instance: hello-1",
            ),
            ("http://hello:5000/hello", "instance: hello-"),
        ];
        led(cluster, "each pod by its name", &rows)?;
        for _ in 0..3 {
            led(cluster, "each pod by its name, again", &rows)?;
        }
        Ok(())
    })
}
