//! Who may do what: policies on requests and connections, tried out first, and left to a service of one's own.

use anyhow::{Context, ensure};
use serde_json::json;

use super::pods::wait_running;
use super::reviews::live;
use super::samples::with;
use crate::e2e::cluster::Cluster;
use crate::e2e::http::{self, Client};

/// Refuses everything in Bookinfo's namespace.
const NOTHING: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow-nothing, namespace: default}
spec: {}
";

/// Lets somebody read from an application of Bookinfo: everybody, or one service account.
fn viewer(app: &str, account: Option<&str>) -> String {
    let from = account.map_or_else(String::new, |account| {
        format!("from: [{{source: {{principals: [cluster.local/ns/default/sa/{account}]}}}}], ")
    });
    format!(
        "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {app}-viewer, namespace: default}}
spec:
  selector: {{matchLabels: {{app: {app}}}}}
  action: ALLOW
  rules: [{{{from}to: [{{operation: {{methods: [GET]}}}}]}}]
"
    )
}

const NO_DETAILS: &str = "Sorry, product details are currently unavailable for this book.";
const NO_REVIEWS: &str = "Sorry, product reviews are currently unavailable for this book.";
const NO_RATINGS: &str = "Ratings service is currently unavailable";

/// One page has this status, and these texts but not those.
fn looked(cluster: &Cluster, status: u16, texts: &[&str], without: &[&str]) -> anyhow::Result<()> {
    let client = Client::new(&cluster.gateway);
    let page = http::runtime()?.block_on(client.get("/productpage", &[]))?;
    let fits = page.status == status
        && texts.iter().all(|text| page.body.contains(text))
        && !without.iter().any(|text| page.body.contains(text));
    ensure!(fits, "the page has status {}: {}", page.status, page.body);
    Ok(())
}

/// Waits until a page is like that; one page must have it all.
fn page(
    cluster: &Cluster,
    what: &str,
    status: u16,
    texts: &[&str],
    without: &[&str],
) -> anyhow::Result<()> {
    cluster.wait(what, || looked(cluster, status, texts, without).map(Some))
}

/// The field's task with Bookinfo: nothing is allowed, then one reader after the other until the page is whole.
pub(super) fn bookinfo(cluster: &mut Cluster) -> anyhow::Result<()> {
    let viewers = [
        viewer("productpage", None),
        viewer("details", Some("bookinfo-productpage")),
        viewer("reviews", Some("bookinfo-productpage")),
        viewer("ratings", Some("bookinfo-reviews")),
    ];
    with(cluster, &[NOTHING], |cluster| {
        let denied = "RBAC: access denied";
        page(cluster, "the page to be refused", 403, &[denied], &[])?;
        cluster.apply(&viewers[0])?;
        let texts = [NO_DETAILS, NO_REVIEWS];
        page(cluster, "a page alone", 200, &texts, &[denied])?;
        cluster.apply(&viewers[1])?;
        let what = "a page with details";
        page(cluster, what, 200, &[NO_REVIEWS], &[NO_DETAILS])?;
        cluster.apply(&viewers[2])?;
        let without = [NO_DETAILS, NO_REVIEWS];
        page(cluster, "no ratings", 200, &[NO_RATINGS], &without)?;
        cluster.apply(&viewers[3])?;
        live(cluster, "all versions", |counts| counts.len() == 3)?;
        for _ in 0..12 {
            let all = [NO_DETAILS, NO_REVIEWS, NO_RATINGS];
            looked(cluster, 200, &[], &all)?;
        }
        refused_to_curl(cluster)?;
        for viewer in &viewers {
            cluster.delete_all(viewer)?;
        }
        page(cluster, "nothing again", 403, &[denied], &[])
    })?;
    let all = [NO_DETAILS, NO_REVIEWS, NO_RATINGS];
    page(cluster, "the page as before", 200, &[], &all)
}

/// What the page may read, another account of the mesh may not, and nobody may write.
fn refused_to_curl(cluster: &Cluster) -> anyhow::Result<()> {
    let pods = cluster.pods("app=curl")?;
    let who = (pods.first().context("no pod of curl")?.as_str(), "default");
    for (args, status) in [
        ("http://reviews:9080/reviews/0", 403),
        ("http://ratings:9080/ratings/0", 403),
        ("http://productpage:9080/productpage", 200),
        ("-X POST http://productpage:9080/login", 403),
    ] {
        expect(cluster, who, args, status)?;
    }
    Ok(())
}

/// Apart, so that it is deleted after what is in it.
pub(super) fn namespace(name: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Namespace
metadata: {{name: {name}, labels: {{istio-injection: enabled}}}}
"
    )
}

/// A pod that requests are sent from, with a service account of its own; without a proxy where `inject` is false.
pub(super) fn client(namespace: &str, name: &str, inject: bool) -> String {
    format!(
        "
apiVersion: v1
kind: ServiceAccount
metadata: {{name: {name}, namespace: {namespace}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {{sidecar.istio.io/inject: '{inject}'}}}}
spec:
  serviceAccountName: {name}
  terminationGracePeriodSeconds: 1
  containers: [{{name: curl, image: 'curlimages/curl:8.16.0', command: [sleep, infinity]}}]
"
    )
}

/// A server of requests: pod and service `httpbin`.
pub(super) fn httpbin(namespace: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Service
metadata: {{name: httpbin, namespace: {namespace}}}
spec:
  selector: {{app: httpbin}}
  ports: [{{name: http, port: 8000, targetPort: 8080}}]
---
apiVersion: v1
kind: Pod
metadata: {{name: httpbin, namespace: {namespace}, labels: {{app: httpbin}}}}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{{name: httpbin, image: 'mccutchen/go-httpbin:v2.15.0', ports: [{{containerPort: 8080}}]}}]
"
    )
}

/// A policy on one application of the namespace `policies`; `spec` in the flow style of YAML.
fn policy(name: &str, app: &str, dry_run: bool, spec: &str) -> String {
    let annotations = match dry_run {
        true => ", annotations: {istio.io/dry-run: 'true'}",
        false => "",
    };
    format!(
        "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {name}, namespace: policies{annotations}}}
spec: {{selector: {{matchLabels: {{app: {app}}}}}, {spec}}}
"
    )
}

/// Sends one request from a pod, `(pod, namespace)`, and gives the status and the body.
pub(super) fn ask(
    cluster: &Cluster,
    (pod, namespace): (&str, &str),
    args: &str,
) -> anyhow::Result<(String, String)> {
    let script = format!("curl -sS --max-time 8 -w '\\n%{{http_code}}' {args}");
    let printed = cluster.exec_in(namespace, pod, "curl", &["sh", "-c", &script])?;
    let (body, status) = printed
        .trim_end()
        .rsplit_once('\n')
        .unwrap_or(("", printed.trim()));
    Ok((status.to_owned(), body.to_owned()))
}

/// One request has this status; a refusal is the mesh's.
fn expect(cluster: &Cluster, who: (&str, &str), args: &str, wanted: u16) -> anyhow::Result<()> {
    let (status, body) = ask(cluster, who, args)?;
    ensure!(
        status == wanted.to_string(),
        "{} of {} calls {args} and gets {status}, not {wanted}: {body}",
        who.0,
        who.1
    );
    ensure!(
        wanted != 403 || body == "RBAC: access denied",
        "{} of {} calls {args} and is refused with {body:?}",
        who.0,
        who.1
    );
    Ok(())
}

/// Who asks for what, and the status that they get.
type Row<'a> = ((&'a str, &'a str), &'a str, u16);

/// Waits until all rows hold, and looks at all of them once more.
fn rows(cluster: &Cluster, what: &str, rows: &[Row<'_>]) -> anyhow::Result<()> {
    let all = || {
        rows.iter()
            .try_for_each(|(who, args, status)| expect(cluster, *who, args, *status))
    };
    cluster.wait(what, || all().map(Some))?;
    all().with_context(|| format!("after {what}"))
}

const ALICE: (&str, &str) = ("alice", "policies");
const BOB: (&str, &str) = ("bob", "policies");
/// Has no proxy.
const PLAIN: (&str, &str) = ("plain", "policies");

/// A namespace with clients and a server, for the time of a scenario.
fn in_namespace(
    cluster: &Cluster,
    server: &str,
    app: &str,
    scenario: impl FnOnce(&Cluster) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let texts = [
        namespace("policies"),
        client("policies", "alice", true),
        client("policies", "bob", true),
        client("policies", "plain", false),
        server.to_owned(),
    ];
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    with(cluster, &texts, |cluster| {
        for pod in ["alice", "bob", "plain", app] {
            wait_running(cluster, "policies", pod)?;
        }
        scenario(cluster)
    })
}

/// Requests: nothing, then by identity, method, path, namespace and address; DENY wins, whatever the path is written like.
pub(super) fn requests(cluster: &mut Cluster) -> anyhow::Result<()> {
    in_namespace(cluster, &httpbin("policies"), "httpbin", |cluster| {
        let pods = cluster.pods("app=curl")?;
        let curl = (pods.first().context("no pod of curl")?.as_str(), "default");
        let url = "http://httpbin.policies:8000";
        let get = format!("{url}/get");
        let open: Vec<Row<'_>> = [ALICE, BOB, PLAIN, curl]
            .map(|who| (who, get.as_str(), 200))
            .into();
        rows(cluster, "everybody to be let in", &open)?;
        let nothing = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nothing, namespace: policies}
spec: {}
";
        cluster.apply(nothing)?;
        let shut: Vec<Row<'_>> = open.iter().map(|row| (row.0, row.1, 403)).collect();
        rows(cluster, "everybody to be refused", &shut)?;
        by_identity(cluster, curl, url)?;
        denied(cluster, curl, url)?;
        by_address(cluster, url)?;
        for name in ["identity", "namespaces", "denied", "address", "nothing"] {
            cluster.call(&["delete", "authorizationpolicy", name, "-n", "policies"])?;
        }
        rows(cluster, "everybody to be let in again", &open)
    })
}

fn by_identity(cluster: &Cluster, curl: (&str, &str), url: &str) -> anyhow::Result<()> {
    cluster.apply(&policy(
        "identity",
        "httpbin",
        false,
        "action: ALLOW, rules: [{from: [{source: {principals: [cluster.local/ns/policies/sa/alice]}}], \
         to: [{operation: {methods: [GET], paths: [/get, /anything/*, '*/deep']}}]}]",
    ))?;
    let claimed = format!(
        "-H 'x-forwarded-client-cert: By=spiffe://cluster.local/ns/policies/sa/default;URI=spiffe://cluster.local/ns/policies/sa/alice' {url}/get"
    );
    let at = |path: &str| format!("{url}{path}");
    let with_query = format!("'{url}/get?a=/headers'");
    rows(
        cluster,
        "alice alone to be let in",
        &[
            (ALICE, &at("/get"), 200),
            (ALICE, &with_query, 200),
            (ALICE, &at("/anything/x"), 200),
            (ALICE, &at("/anything"), 403),
            (ALICE, &at("/headers"), 403),
            (ALICE, &at("/getter"), 403),
            (ALICE, &format!("-X POST {url}/anything/x"), 403),
            (BOB, &at("/get"), 403),
            (curl, &at("/get"), 403),
            (PLAIN, &at("/get"), 403),
            (PLAIN, &claimed, 403),
        ],
    )?;
    cluster.apply(&policy(
        "namespaces",
        "httpbin",
        false,
        "action: ALLOW, rules: [{from: [{source: {namespaces: [default]}}]}]",
    ))?;
    rows(
        cluster,
        "the other namespace to be let in",
        &[
            (curl, &at("/get"), 200),
            (curl, &format!("-X POST {url}/post"), 200),
            (ALICE, &at("/headers"), 403),
            (BOB, &at("/get"), 403),
            (PLAIN, &at("/get"), 403),
        ],
    )
}

/// DENY beats ALLOW; a path is judged as it is forwarded.
fn denied(cluster: &Cluster, curl: (&str, &str), url: &str) -> anyhow::Result<()> {
    cluster.apply(&policy(
        "denied",
        "httpbin",
        false,
        "action: DENY, rules: [{to: [{operation: {paths: [/anything/secret*]}}]}, {when: [{key: 'request.headers[x-blocked]', values: ['*']}]}]",
    ))?;
    let at = |path: &str| format!("--path-as-is '{url}{path}'");
    rows(
        cluster,
        "the secret to be refused",
        &[
            (ALICE, &at("/anything/secret"), 403),
            (ALICE, &at("/anything/secret?x"), 403),
            (ALICE, &at("/anything/./secret/a"), 403),
            (ALICE, &at("/anything/x/../secret"), 403),
            (ALICE, &at("/anything/x\\..\\secret"), 403),
            (ALICE, &at("/anything/secre"), 200),
            (ALICE, &at("/anything/Secret"), 200),
            (curl, &at("/get"), 200),
            (curl, &format!("-H 'X-Blocked: 1' {url}/get"), 403),
            (curl, &format!("-H 'X-Allowed: 1' {url}/get"), 200),
        ],
    )
}

fn by_address(cluster: &Cluster, url: &str) -> anyhow::Result<()> {
    let pod = cluster.get(&["pod", "plain", "-n", "policies"])?;
    let address = pod["status"]["podIP"].as_str().context("no address")?;
    let spec = format!(
        "action: ALLOW, rules: [{{from: [{{source: {{ipBlocks: ['{address}/32']}}}}], to: [{{operation: {{notPaths: [/headers]}}}}]}}]"
    );
    cluster.apply(&policy("address", "httpbin", false, &spec))?;
    let get = format!("{url}/get");
    rows(
        cluster,
        "an address to be let in",
        &[
            (PLAIN, &get, 200),
            (PLAIN, &format!("{url}/headers"), 403),
            (PLAIN, &format!("-H 'X-Blocked: 1' {get}"), 403),
            (PLAIN, &format!("-H 'X-Forwarded-For: 10.9.9.9' {get}"), 200),
            (BOB, &format!("-H 'X-Forwarded-For: {address}' {get}"), 403),
        ],
    )
}

/// The sum of the counters of the server's proxy whose name has all of these parts.
fn counted(cluster: &Cluster, parts: &[&str]) -> anyhow::Result<u64> {
    let stats = "http://127.0.0.1:15000/stats?filter=rbac";
    let printed = cluster.exec_in(
        "policies",
        "httpbin",
        "istio-proxy",
        &["curl", "-sS", stats],
    )?;
    let named = printed.lines().filter_map(|line| line.split_once(": "));
    Ok(named
        .filter(|(name, _)| parts.iter().all(|part| name.contains(part)))
        .filter_map(|(_, value)| value.trim().parse::<u64>().ok())
        .sum())
}

/// What a policy would refuse is counted, and not refused until it is no trial any more.
pub(super) fn dry_run(cluster: &mut Cluster) -> anyhow::Result<()> {
    in_namespace(cluster, &httpbin("policies"), "httpbin", |cluster| {
        let url = "http://httpbin:8000/get";
        let open: [Row<'_>; 2] = [(ALICE, url, 200), (BOB, url, 200)];
        rows(cluster, "everybody to be let in", &open)?;
        let spec = "action: DENY, rules: [{from: [{source: {principals: [cluster.local/ns/policies/sa/bob]}}]}]";
        let shadow = ["istio_dry_run_deny_", "shadow_denied"];
        cluster.apply(&policy("trial", "httpbin", true, spec))?;
        cluster.wait("the trial to count", || {
            expect(cluster, BOB, url, 200)?;
            Ok((counted(cluster, &shadow)? > 0).then_some(()))
        })?;
        let before = counted(cluster, &shadow)?;
        for _ in 0..5 {
            rows(cluster, "a trial refuses nothing", &open)?;
        }
        // Each look at the rows is two looks.
        let grown = counted(cluster, &shadow)? - before;
        ensure!(grown == 10, "ten requests of bob were counted as {grown}");
        let denied = counted(cluster, &[".rbac.denied"])?;
        ensure!(denied == 0, "{denied} requests count as refused");
        cluster.apply(&policy("trial", "httpbin", false, spec))?;
        let earnest = [(ALICE, url, 200), (BOB, url, 403)];
        rows(cluster, "the policy to be in earnest", &earnest)?;
        let denied = counted(cluster, &[".rbac.denied"])?;
        ensure!(denied > 0, "no refusal is counted");
        cluster.call(&["delete", "authorizationpolicy", "trial", "-n", "policies"])?;
        rows(cluster, "everybody to be let in again", &open)?;
        audited(cluster, &open)
    })
}

/// AUDIT decides nothing: who it is about is let in and who it is not about too; Envoy's filter counts both as allowed.
fn audited(cluster: &Cluster, open: &[Row<'_>]) -> anyhow::Result<()> {
    let spec = "action: AUDIT, rules: [{from: [{source: {principals: [cluster.local/ns/policies/sa/bob]}}]}]";
    let allowed = |cluster: &Cluster| counted(cluster, &[".rbac.allowed"]);
    let before = allowed(cluster)?;
    cluster.apply(&policy("audit", "httpbin", false, spec))?;
    cluster.wait("the audit to count", || {
        open.iter()
            .try_for_each(|(who, args, status)| expect(cluster, *who, args, *status))?;
        Ok((allowed(cluster)? > before).then_some(()))
    })?;
    let (before, denied) = (allowed(cluster)?, counted(cluster, &[".rbac.denied"])?);
    rows(cluster, "an audit refuses nothing", open)?;
    // Each look at the rows is two looks, at alice's and at bob's request.
    let grown = allowed(cluster)? - before;
    ensure!(grown == 4, "four requests were counted as {grown} allowed");
    let more = counted(cluster, &[".rbac.denied"])? - denied;
    ensure!(more == 0, "{more} requests count as refused");
    cluster
        .call(&["delete", "authorizationpolicy", "audit", "-n", "policies"])
        .map(drop)
}

const ECHO: &str = "
apiVersion: v1
kind: Service
metadata: {name: echo, namespace: policies}
spec:
  selector: {app: echo}
  ports: [{name: tcp, port: 9000}, {name: tcp-other, port: 9001}]
---
apiVersion: v1
kind: Pod
metadata: {name: echo, namespace: policies, labels: {app: echo}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: tcp-echo
    image: istio/tcp-echo-server:1.3
    args: ['9000,9001,9002', hello]
    ports: [{containerPort: 9000}, {containerPort: 9001}]
";

/// Waits until these connections are answered and those are not, and looks once more.
fn echoes(
    cluster: &Cluster,
    what: &str,
    wanted: &[((&str, &str), &str, bool)],
) -> anyhow::Result<()> {
    let all = || {
        for ((pod, namespace), place, wanted) in wanted {
            let script = format!(
                "exec 3<>/dev/tcp/{place} && echo world >&3 && read -r -t 5 line <&3; echo \"got $line\"; exec 3>&-"
            );
            let printed = cluster.exec_in(namespace, pod, "curl", &["bash", "-c", &script])?;
            let answered = printed.contains("got hello world");
            ensure!(
                answered == *wanted,
                "{pod} at {place} is answered {printed:?}"
            );
        }
        Ok(Some(()))
    };
    cluster.wait(what, all)?;
    all().map(drop).with_context(|| format!("after {what}"))
}

/// Connections: ports and identities; what speaks of requests lets none pass under ALLOW, and refuses the port under DENY.
pub(super) fn connections(cluster: &mut Cluster) -> anyhow::Result<()> {
    in_namespace(cluster, ECHO, "echo", |cluster| {
        let pod = cluster.get(&["pod", "echo", "-n", "policies"])?;
        let address = pod["status"]["podIP"].as_str().context("no address")?;
        let hidden = format!("{address}/9002");
        let (first, second, hidden) = ("echo/9000", "echo/9001", hidden.as_str());
        let expect = |what: &str, answered: [bool; 3]| {
            let places = [first, second, hidden];
            let rows: Vec<_> = std::iter::zip(places, answered)
                .map(|(place, answered)| (ALICE, place, answered))
                .collect();
            echoes(cluster, what, &rows)
        };
        expect("all ports", [true; 3])?;
        let apply = |spec: &str| cluster.apply(&policy("tcp", "echo", false, spec));
        apply("action: ALLOW, rules: [{to: [{operation: {ports: ['9000', '9001']}}]}]")?;
        expect("two ports", [true, true, false])?;
        apply("action: ALLOW, rules: [{to: [{operation: {methods: [GET], ports: ['9000']}}]}]")?;
        expect("a method on a connection", [false; 3])?;
        apply("action: DENY, rules: [{to: [{operation: {methods: [GET], ports: ['9000']}}]}]")?;
        expect("a method denied on a port", [false, true, true])?;
        apply("action: ALLOW, rules: [{from: [{source: {principals: ['*/sa/alice']}}]}]")?;
        let named = [
            (ALICE, first, true),
            (BOB, first, false),
            (PLAIN, first, false),
        ];
        echoes(cluster, "alice alone", &named)?;
        cluster.call(&["delete", "authorizationpolicy", "tcp", "-n", "policies"])?;
        let all = [
            (ALICE, hidden, true),
            (BOB, first, true),
            (PLAIN, first, true),
        ];
        echoes(cluster, "everybody again", &all)
    })
}

const AUTHORIZER: &str = "
apiVersion: v1
kind: Service
metadata: {name: ext-authz, namespace: policies}
spec:
  selector: {app: ext-authz}
  ports: [{name: http, port: 8000}, {name: grpc, port: 9000}]
---
apiVersion: v1
kind: Pod
metadata: {name: ext-authz, namespace: policies, labels: {app: ext-authz}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: ext-authz, image: 'istio/ext-authz:0.5', ports: [{containerPort: 8000}, {containerPort: 9000}]}
";

const PROVIDERS: &str = "
extensionProviders:
- name: walk-grpc
  envoyExtAuthzGrpc: {service: ext-authz.policies.svc.cluster.local, port: 9000, timeout: 2s}
- name: walk-http
  envoyExtAuthzHttp:
    service: ext-authz.policies.svc.cluster.local
    port: 8000
    timeout: 2s
    includeRequestHeadersInCheck: [x-ext-authz]
    headersToUpstreamOnAllow: [x-ext-authz-check-result]
- name: walk-open
  envoyExtAuthzGrpc: {service: ext-authz.policies.svc.cluster.local, port: 9000, timeout: 2s, failOpen: true}
";

/// A service of one's own decides, over both of its protocols; while it is away nothing passes, but where failing open was asked for.
pub(super) fn custom(cluster: &mut Cluster) -> anyhow::Result<()> {
    let map = cluster.get(&["configmap", "istio", "-n", "istio-system"])?;
    let mesh = map["data"]["mesh"].as_str().unwrap_or_default();
    ensure!(
        !mesh.contains("extensionProviders"),
        "the mesh configuration has providers already: {mesh}"
    );
    let changed = |mesh: &str| {
        json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "istio", "namespace": "istio-system"},
            "data": {"mesh": mesh},
        })
        .to_string()
    };
    let server = format!("{}---{AUTHORIZER}", httpbin("policies"));
    cluster.apply(&changed(&format!("{}\n{PROVIDERS}", mesh.trim_end())))?;
    in_namespace(cluster, &server, "httpbin", |cluster| {
        wait_running(cluster, "policies", "ext-authz")?;
        for provider in ["walk-http", "walk-grpc"] {
            judged(cluster, provider)?;
        }
        away(cluster)
    })?;
    cluster.apply(&changed(mesh)).map(drop)
}

/// A CUSTOM policy for `/headers` alone.
fn custom_policy(provider: &str) -> String {
    let spec = format!(
        "action: CUSTOM, provider: {{name: {provider}}}, rules: [{{to: [{{operation: {{paths: [/headers]}}}}]}}]"
    );
    policy("custom", "httpbin", false, &spec)
}

fn judged(cluster: &Cluster, provider: &str) -> anyhow::Result<()> {
    let url = "http://httpbin:8000";
    cluster.apply(&custom_policy(provider))?;
    let look = || {
        for value in ["deny", "allow"] {
            let args = format!("-H 'x-ext-authz: {value}' {url}/headers");
            let (status, body) = ask(cluster, ALICE, &args)?;
            let fits = match value {
                "allow" => {
                    status == "200"
                        && body.to_lowercase().contains("x-ext-authz-check-result")
                        && body.contains("allowed")
                }
                _ => {
                    status == "403" && body.starts_with("denied by ext_authz for not found header")
                }
            };
            ensure!(fits, "{provider}: {value} brings {status}: {body}");
        }
        expect(
            cluster,
            ALICE,
            &format!("-H 'x-ext-authz: deny' {url}/get"),
            200,
        )?;
        Ok(Some(()))
    };
    cluster.wait(&format!("{provider} to decide"), look)?;
    look().map(drop)?;
    // What the service allows, a policy can still refuse.
    let deny = "action: DENY, rules: [{to: [{operation: {paths: [/headers]}}]}]";
    cluster.apply(&policy("deny", "httpbin", false, deny))?;
    let allowed = format!("-H 'x-ext-authz: allow' {url}/headers");
    rows(cluster, "DENY behind CUSTOM", &[(ALICE, &allowed, 403)])?;
    cluster.call(&["delete", "authorizationpolicy", "deny", "-n", "policies"])?;
    cluster.wait("DENY to be gone", || {
        Ok((ask(cluster, ALICE, &allowed)?.0 == "200").then_some(()))
    })
}

fn away(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.call(&["delete", "pod", "ext-authz", "-n", "policies"])?;
    let allowed = "-H 'x-ext-authz: allow' http://httpbin:8000/headers";
    for (provider, wanted) in [
        ("walk-http", "403"),
        ("walk-open", "200"),
        ("walk-grpc", "403"),
    ] {
        cluster.apply(&custom_policy(provider))?;
        cluster.wait(&format!("{wanted} by {provider} without a service"), || {
            let (status, body) = ask(cluster, ALICE, allowed)?;
            ensure!(status == wanted, "{provider}: {status}: {body}");
            Ok(Some(()))
        })?;
    }
    cluster
        .call(&["delete", "authorizationpolicy", "custom", "-n", "policies"])
        .map(drop)
}
