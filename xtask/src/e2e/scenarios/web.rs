//! Two web servers behind one service, steered by weight and by content, and who is steered: the client's own proxy decides.

use std::collections::BTreeMap;

use anyhow::{Context, bail, ensure};

use super::counted::rolled_out;
use super::pods::wait_running;
use super::samples::{sample, with};
use crate::e2e::cluster::Cluster;

const WEB: &str = sample!("web/web.yaml");
const WEIGHTS: &str = sample!("web/virtual-service-80-20.yaml");

/// Apart, so that they are deleted after what is in them.
const NAMESPACES: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: web-outside}
---
apiVersion: v1
kind: Namespace
metadata: {name: web-inside, labels: {istio-injection: enabled}}
";

/// A client outside the mesh, and one in another namespace inside it.
const CLIENTS: &str = "
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: web-outside}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: curl, image: 'curlimages/curl:8.16.0', command: [sleep, infinity]}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: web-inside}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: curl, image: 'curlimages/curl:8.16.0', command: [sleep, infinity]}
";

/// Who asks: a pod and its namespace.
type Client<'a> = (&'a str, &'a str);

/// Which server answered, over so many calls from one pod; one exec for all of them.
fn asked(
    cluster: &Cluster,
    (pod, namespace): Client<'_>,
    calls: usize,
    args: &str,
) -> anyhow::Result<BTreeMap<String, usize>> {
    // One process a call would take most of the time: the shell loops.
    let script = format!("for i in $(seq {calls}); do curl -sS --max-time 10 {args}; echo; done");
    let printed = cluster.exec_in(namespace, pod, "curl", &["sh", "-c", &script])?;
    let mut counts = BTreeMap::new();
    for server in ["httpd", "tomcat"] {
        let count = printed.lines().filter(|line| names(line, server)).count();
        if count > 0 {
            counts.insert(server.to_owned(), count);
        }
    }
    let total: usize = counts.values().sum();
    ensure!(
        total == calls,
        "{calls} calls of {args} brought {total} pages: {printed}"
    );
    Ok(counts)
}

fn names(line: &str, server: &str) -> bool {
    line.contains(&format!("This page comes from {server}."))
}

fn share(counts: &BTreeMap<String, usize>, server: &str) -> f64 {
    let total: usize = counts.values().sum();
    counts.get(server).copied().unwrap_or(0) as f64 * 100.0 / total as f64
}

fn routes(http: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: web-svc-vs}}\nspec:\n  hosts: [web-svc]\n  http:\n{http}"
    )
}

/// Waits until a change is seen by calls from a pod.
fn seen(
    cluster: &Cluster,
    client: Client<'_>,
    what: &str,
    args: &str,
    server: &str,
) -> anyhow::Result<()> {
    cluster.wait(what, || {
        let counts = asked(cluster, client, 5, args)?;
        Ok((counts.get(server) == Some(&5)).then_some(()))
    })
}

/// Traffic by weight: by every name of the service, but only for clients inside the mesh.
pub(super) fn by_weight(cluster: &mut Cluster) -> anyhow::Result<()> {
    with(cluster, &[NAMESPACES, WEB, CLIENTS, WEIGHTS], |cluster| {
        rolled_out(cluster, "httpd")?;
        rolled_out(cluster, "tomcat")?;
        for namespace in ["web-outside", "web-inside"] {
            wait_running(cluster, namespace, "client")?;
        }
        let pods = cluster.pods("app=curl")?;
        let inside = (pods.first().context("no pod of curl")?.as_str(), "default");
        cluster.wait("the weights to hold", || {
            let counts = asked(cluster, inside, 40, "http://web-svc:8080")?;
            Ok((share(&counts, "httpd") > 60.0).then_some(()))
        })?;
        let service = cluster.get(&["service", "web-svc"])?;
        let address = service["spec"]["clusterIP"]
            .as_str()
            .context("no cluster IP")?
            .to_owned();
        for host in [
            "web-svc",
            "web-svc.default.svc.cluster.local",
            address.as_str(),
        ] {
            let counts = asked(cluster, inside, 300, &format!("http://{host}:8080"))?;
            let httpd = share(&counts, "httpd");
            // Four and a half standard deviations of 300 draws.
            ensure!(
                (69.0..=91.0).contains(&httpd),
                "httpd got {httpd:.1} % as {host}: {counts:?}"
            );
        }
        let outside = asked(
            cluster,
            ("client", "web-outside"),
            20,
            "http://web-svc.default:8080",
        )?;
        ensure!(
            share(&outside, "httpd") == 50.0,
            "a client outside the mesh is not served in turn: {outside:?}"
        );
        let other = asked(
            cluster,
            ("client", "web-inside"),
            200,
            "http://web-svc.default:8080",
        )?;
        ensure!(
            share(&other, "httpd") > 65.0,
            "the rule does not hold from another namespace: {other:?}"
        );
        let short = cluster.exec_in(
            "web-inside",
            "client",
            "curl",
            &["curl", "-sS", "--max-time", "5", "http://web-svc:8080"],
        );
        ensure!(
            short.is_err(),
            "the short name of another namespace's service must not resolve, but: {short:?}"
        );
        Ok(())
    })
}

/// Traffic by content: header, URI, both and either; then from a canary to the whole.
pub(super) fn by_content(cluster: &mut Cluster) -> anyhow::Result<()> {
    let by_header = routes(
        "  - match: [{headers: {end-user: {exact: jiuxi}}}]\n    route: [{destination: {host: tomcat-svc}}]\n  - route: [{destination: {host: httpd-svc}}]\n",
    );
    with(cluster, &[WEB, &by_header], |cluster| {
        rolled_out(cluster, "httpd")?;
        rolled_out(cluster, "tomcat")?;
        let pods = cluster.pods("app=curl")?;
        let inside = (pods.first().context("no pod of curl")?.as_str(), "default");
        let expect =
            |what: &str, args: &str, server: &str| seen(cluster, inside, what, args, server);
        let url = "http://web-svc:8080";
        let jiuxi = format!("-H 'end-user: jiuxi' {url}");
        expect("everybody to reach httpd", url, "httpd")?;
        expect("jiuxi to reach tomcat", &jiuxi, "tomcat")?;
        cluster.apply(&routes(
            "  - match: [{headers: {end-user: {exact: jiuxi}}, uri: {prefix: /test}, ignoreUriCase: true}]\n    route: [{destination: {host: tomcat-svc}}]\n    rewrite: {uri: /}\n  - route: [{destination: {host: httpd-svc}}]\n    rewrite: {uri: /}\n",
        ))?;
        expect("jiuxi to need the path as well", &jiuxi, "httpd")?;
        expect(
            "header and path together",
            &format!("-H 'end-user: jiuxi' {url}/TEST"),
            "tomcat",
        )?;
        expect("the path alone", &format!("{url}/test"), "httpd")?;
        cluster.apply(&routes(
            "  - match: [{headers: {end-user: {exact: jiuxi}}}, {uri: {prefix: /test}}]\n    route: [{destination: {host: tomcat-svc}}]\n    rewrite: {uri: /}\n  - route: [{destination: {host: httpd-svc}}]\n    rewrite: {uri: /}\n",
        ))?;
        expect("the header alone", &jiuxi, "tomcat")?;
        expect("the path alone", &format!("{url}/test"), "tomcat")?;
        expect("neither", url, "httpd")?;
        shifted(cluster, inside)
    })
}

/// From half and half to five and ninety-five, then the rest by header.
fn shifted(cluster: &Cluster, inside: Client<'_>) -> anyhow::Result<()> {
    for (httpd, low, high) in [(50, 35.0, 65.0), (5, 0.0, 13.0)] {
        cluster.apply(&routes(&format!(
            "  - match: [{{headers: {{user: {{exact: qxh}}}}}}]\n    route: [{{destination: {{host: httpd-svc}}}}]\n  - route: [{{destination: {{host: httpd-svc}}, weight: {httpd}}}, {{destination: {{host: tomcat-svc}}, weight: {}}}]\n",
            100 - httpd
        )))?;
        cluster.wait(&format!("{httpd} % to httpd"), || {
            let counts = asked(cluster, inside, 200, "http://web-svc:8080")?;
            Ok((low..=high)
                .contains(&share(&counts, "httpd"))
                .then_some(()))
        })?;
    }
    let Some(5) = asked(cluster, inside, 5, "-H 'user: qxh' http://web-svc:8080")?
        .get("httpd")
        .copied()
    else {
        bail!("the user qxh does not stay on httpd");
    };
    Ok(())
}
