//! An API server on a free port, a node agent that answers, and a command line in front of them.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::IntoResponse as _;
use bytes::Bytes;
use clap::{Args as _, FromArgMatches as _};
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use mesh_apiserver::node::{
    Duplex, ExecRequest, ExecSession, ExitStatus, LogRequest, NodeBackend, NodeError, NodeErrorKind,
};
use mesh_apiserver::{ApiServer, Auth, Identity, Options};
use mesh_cli::Global;
use mesh_cli::out::Out;

use super::webhooks::Webhooks;

/// Echoes what it is asked for.
struct EchoNode;

impl NodeBackend for EchoNode {
    fn logs(
        &self,
        request: LogRequest,
    ) -> BoxFuture<'static, Result<BoxStream<'static, Bytes>, NodeError>> {
        Box::pin(async move {
            let text = format!(
                "{} {} tail {:?} previous {}\n",
                request.pod, request.container, request.tail_lines, request.previous
            );
            let stream: BoxStream<'static, Bytes> = Box::pin(futures::stream::iter([
                Bytes::from(text),
                Bytes::from("second\n"),
            ]));
            Ok(stream)
        })
    }

    fn exec(&self, request: ExecRequest) -> BoxFuture<'static, Result<ExecSession, NodeError>> {
        Box::pin(async move {
            if request.command[0] == "nope" {
                return Err(NodeError::new(
                    NodeErrorKind::BadRequest,
                    "no such program \"nope\"",
                ));
            }
            let text = format!("{} {:?}\n", request.container, request.command);
            let code = request
                .command
                .last()
                .and_then(|word| word.parse().ok())
                .unwrap_or(0);
            Ok(ExecSession {
                stdin: None,
                stdout: Some(Box::pin(std::io::Cursor::new(text.into_bytes()))),
                stderr: Some(Box::pin(tokio::io::empty())),
                resize: tokio::sync::mpsc::channel(1).0,
                exit: Box::pin(async move { ExitStatus::Code(code) }),
            })
        })
    }

    fn port_forward(
        &self,
        _: String,
        _: String,
        port: u16,
    ) -> BoxFuture<'static, Result<Box<dyn Duplex>, NodeError>> {
        Box::pin(async move {
            let (near, far) = tokio::io::duplex(1 << 16);
            match port {
                15000 => tokio::spawn(admin(far)),
                8080 => tokio::spawn(debug(far)),
                _ => return Err(NodeError::new(NodeErrorKind::BadRequest, "not here")),
            };
            let stream: Box<dyn Duplex> = Box::new(near);
            Ok(stream)
        })
    }
}

/// A proxy's admin interface: it has a certificate and a root, and answers one request.
async fn admin(stream: tokio::io::DuplexStream) {
    use base64::Engine as _;
    // One for all proxies of this test.
    static CERTIFICATES: std::sync::OnceLock<(String, String)> = std::sync::OnceLock::new();
    let (leaf, root) = CERTIFICATES.get_or_init(|| {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .expect("later than 1970")
            .as_secs();
        let root = mesh_identity::ca::Authority::generate("cluster.local", "Root CA", now, 86_400)
            .expect("a root");
        let leaf = root
            .issue_server(&["a.example"], &[], now, 3600)
            .expect("a leaf");
        (leaf.chain_pem, root.certificate_pem().to_owned())
    });
    let inline = |pem: &str| {
        let bytes = base64::engine::general_purpose::STANDARD.encode(pem);
        serde_json::json!({ "inline_bytes": bytes })
    };
    let dump = serde_json::json!({ "configs": [
        { "@type": "type.googleapis.com/envoy.admin.v3.ClustersConfigDump", "dynamic_active_clusters": [
            { "cluster": { "@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster", "name": "c", "connect_timeout": "10s" } },
        ] },
        { "@type": "type.googleapis.com/envoy.admin.v3.SecretsConfigDump", "dynamic_active_secrets": [
            { "name": "default", "secret": { "tls_certificate": { "certificate_chain": inline(leaf) } } },
            { "name": "ROOTCA", "secret": { "validation_context": { "trusted_ca": inline(root) } } },
        ] },
    ] })
    .to_string();
    answer(stream, |path| {
        assert!(["/config_dump", "/config_dump?include_eds"].contains(&path));
        (200, dump)
    })
    .await;
}

/// A control plane's debug pages: of two proxies, of which the second has another cluster than it was sent.
async fn debug(stream: tokio::io::DuplexStream) {
    let watches = serde_json::json!({ "CDS": { "status": "SYNCED" }, "LDS": { "status": "NACK" } });
    let pages = |path: &str| {
        let timeout = match path {
            "/debug/syncz" => {
                return Some(serde_json::json!([
                    { "proxy": "two.default", "cluster_id": "Kubernetes", "istio_version": "1.2.3" },
                    { "proxy": "one.default", "cluster_id": "Kubernetes", "istio_version": "1.2.3" },
                ]));
            }
            "/debug/adsz" => {
                return Some(serde_json::json!({ "totalClients": 2, "clients": [
                    { "connectionId": "sidecar~10.0.0.1~one.default~default.svc.cluster.local", "watches": watches },
                ] }));
            }
            "/debug/config_dump?proxyID=one.default" => "10s",
            "/debug/config_dump?proxyID=two.default" => "20s",
            _ => return None,
        };
        let cluster = serde_json::json!({ "name": "c", "connect_timeout": timeout });
        Some(
            serde_json::json!({ "configs": [{ "name": "c", "type": "CDS", "resource": cluster }] }),
        )
    };
    answer(stream, |path| match pages(path) {
        Some(page) => (200, page.to_string()),
        None => (404, "{}".to_owned()),
    })
    .await;
}

/// Answers one request.
async fn answer(mut stream: tokio::io::DuplexStream, page: impl FnOnce(&str) -> (u16, String)) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => request.push(byte),
            Err(_) => return,
        }
    }
    let request = String::from_utf8(request).expect("text");
    let mut words = request.split(' ');
    assert_eq!(words.next(), Some("GET"));
    let (code, body) = page(words.next().expect("a path"));
    let head = format!(
        "HTTP/1.1 {code} OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    // Who asked may have gone.
    let _ = stream.write_all(format!("{head}{body}").as_bytes()).await;
    let _ = stream.flush().await;
    // The end belongs to who asked.
    let _ = stream.read_u8().await;
}

/// A buffer that can be read while something else writes to it.
#[derive(Clone, Default)]
struct Buffer(Arc<Mutex<Vec<u8>>>);

impl Buffer {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().expect("buffer").clone()).expect("text")
    }
}

impl Write for Buffer {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("buffer").write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The cluster of one test.
pub struct World {
    directory: tempfile::TempDir,
    /// What stands behind the Services of control planes.
    pub webhooks: Webhooks,
    /// So many requests are answered that the server is busy.
    pub busy: Arc<AtomicUsize>,
    /// Kept for its lifetime.
    _server: ApiServer,
}

/// Says that the server is busy as long as it should; discovery is left alone.
async fn when_free(
    State(busy): State<Arc<AtomicUsize>>,
    request: axum::extract::Request,
    next: axum::middleware::Next,
) -> axum::response::Response {
    let one = |left: usize| left.checked_sub(1);
    let discovery = request.uri().path().split('/').count() <= 4;
    let order = Ordering::Relaxed;
    if !discovery && let Ok(left) = busy.fetch_update(order, order, one) {
        let (code, reason) = match left % 2 {
            0 => (StatusCode::TOO_MANY_REQUESTS, "TooManyRequests"),
            _ => (StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable"),
        };
        let status = serde_json::json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": "busy", "reason": reason, "code": code.as_u16(),
        });
        return (code, axum::Json(status)).into_response();
    }
    next.run(request).await
}

/// What a command did.
pub struct Ran {
    /// What it wrote.
    pub out: String,
    /// How it ended.
    pub result: anyhow::Result<ExitCode>,
}

impl Ran {
    /// What it wrote; it must have succeeded.
    pub fn ok(self) -> String {
        let code = self.result.unwrap_or_else(|error| panic!("{error:#}"));
        assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::SUCCESS));
        self.out
    }

    /// The error as the program shows it.
    pub fn error(self) -> String {
        format!("{:#}", self.result.expect_err("an error"))
    }
}

impl World {
    pub async fn start() -> Self {
        let (store, _) = mesh_store::Store::open(None).expect("store in memory");
        let tokens = mesh_identity::token::TokenKeys::generate(
            "https://kubernetes.default.svc.cluster.local",
        )
        .expect("keys");
        let auth = Auth {
            admin_tokens: Vec::new(),
            tokens: Arc::new(tokens),
        };
        let webhooks = Webhooks::start().await;
        let mut options = Options::new(store, auth, Arc::new(EchoNode));
        let behind = webhooks.clone();
        options.service_dialer = Arc::new(move |_| Box::pin(behind.clone().dial()));
        let server = ApiServer::open(options).expect("API server");
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a free port");
        let address = listener.local_addr().expect("address");
        let busy = Arc::new(AtomicUsize::new(0));
        let router =
            server
                .router_as(Identity::admin())
                .layer(axum::middleware::from_fn_with_state(
                    Arc::clone(&busy),
                    when_free,
                ));
        tokio::spawn(async move { axum::serve(listener, router).await });
        let directory = tempfile::tempdir().expect("temporary directory");
        let kubeconfig = format!(
            "apiVersion: v1\nkind: Config\nclusters:\n- {{name: t, cluster: {{server: \"http://{address}\"}}}}\nusers:\n- {{name: t, user: {{}}}}\n\
             contexts:\n- {{name: t, context: {{cluster: t, user: t}}}}\ncurrent-context: t\n"
        );
        std::fs::write(directory.path().join("kubeconfig"), kubeconfig).expect("kubeconfig");
        Self {
            directory,
            webhooks,
            busy,
            _server: server,
        }
    }

    /// Writes a file for a command to read.
    pub fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        std::fs::write(&path, text).expect("temporary file");
        path
    }

    /// The kubeconfig of the cluster, as its administrator.
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.path().join("kubeconfig")
    }

    /// Runs a command line as a user who may do nothing.
    pub async fn nobody(&self, line: &str) -> Ran {
        let admin = std::fs::read_to_string(self.kubeconfig()).expect("kubeconfig");
        let kubeconfig = self.file("nobody", &admin.replace("user: {}", "user: {as: nobody}"));
        let buffer = Buffer::default();
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let result = run(&words, kubeconfig, Out::new(buffer.clone())).await;
        Ran {
            out: buffer.text(),
            result,
        }
    }

    /// Runs a command line; `@name` stands for the path of a file.
    pub async fn mesh(&self, line: &str) -> Ran {
        let buffer = Buffer::default();
        let result = self.run(line, &buffer).await;
        Ran {
            out: buffer.text(),
            result,
        }
    }

    /// Runs a command line that does not end by itself, until it has written something that `done` takes; what it wrote comes back.
    pub async fn mesh_until(&self, line: &str, done: impl Fn(&str) -> bool) -> String {
        let buffer = Buffer::default();
        let enough = async {
            while !done(&buffer.text()) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            result = self.run(line, &buffer) => panic!("ended: {result:?}"),
            () = enough => buffer.text(),
            () = tokio::time::sleep(Duration::from_secs(60)) => panic!("too late: {}", buffer.text()),
        }
    }

    async fn run(&self, line: &str, buffer: &Buffer) -> anyhow::Result<ExitCode> {
        let words: Vec<String> = line
            .split_whitespace()
            .map(|word| match word.strip_prefix('@') {
                Some(name) => self.directory.path().join(name).display().to_string(),
                None => word.to_owned(),
            })
            .collect();
        let kubeconfig = self.directory.path().join("kubeconfig");
        run(&words, kubeconfig, Out::new(buffer.clone())).await
    }
}

/// The part of the command tree that is tested here.
async fn run(words: &[String], kubeconfig: PathBuf, out: Out) -> anyhow::Result<ExitCode> {
    let command = mesh_cli::Global::augment_args(clap::Command::new("mesh")).subcommands([
        mesh_cli::apply::Args::augment_args(clap::Command::new("apply")),
        mesh_cli::get::Args::augment_args(clap::Command::new("get")),
        mesh_cli::delete::Args::augment_args(clap::Command::new("delete")),
        mesh_cli::logs::Args::augment_args(clap::Command::new("logs")),
        mesh_cli::exec::Args::augment_args(clap::Command::new("exec")),
        mesh_cli::version::Args::augment_args(clap::Command::new("version")),
        mesh_cli::ca::Args::augment_args(clap::Command::new("ca")),
        mesh_cli::proxy_config::Args::augment_args(clap::Command::new("proxy-config")),
        mesh_cli::proxy_status::Args::augment_args(clap::Command::new("proxy-status")),
        mesh_cli::manifest::Args::augment_args(clap::Command::new("manifest")),
        mesh_cli::installer::Args::augment_args(clap::Command::new("install")),
        mesh_cli::upgrade::Args::augment_args(clap::Command::new("upgrade")),
        mesh_cli::uninstall::Args::augment_args(clap::Command::new("uninstall")),
        mesh_cli::verify_install::Args::augment_args(clap::Command::new("verify-install")),
        mesh_cli::profile::Args::augment_args(clap::Command::new("profile")),
        mesh_cli::tag::Args::augment_args(clap::Command::new("tag")),
    ]);
    let matches = command
        .try_get_matches_from(std::iter::once("mesh".to_owned()).chain(words.iter().cloned()))?;
    let mut global = Global::from_arg_matches(&matches)?;
    global.kubeconfig = Some(kubeconfig);
    global.out = out;
    let (name, arguments) = matches.subcommand().expect("a command");
    match name {
        "apply" => {
            mesh_cli::apply::run(mesh_cli::apply::Args::from_arg_matches(arguments)?, &global).await
        }
        "get" => {
            mesh_cli::get::run(mesh_cli::get::Args::from_arg_matches(arguments)?, &global).await
        }
        "delete" => {
            mesh_cli::delete::run(
                mesh_cli::delete::Args::from_arg_matches(arguments)?,
                &global,
            )
            .await
        }
        "logs" => {
            mesh_cli::logs::run(mesh_cli::logs::Args::from_arg_matches(arguments)?, &global).await
        }
        "exec" => {
            mesh_cli::exec::run(mesh_cli::exec::Args::from_arg_matches(arguments)?, &global).await
        }
        "version" => {
            mesh_cli::version::run(
                mesh_cli::version::Args::from_arg_matches(arguments)?,
                &global,
            )
            .await
        }
        "ca" => mesh_cli::ca::run(mesh_cli::ca::Args::from_arg_matches(arguments)?, &global).await,
        "install" => {
            mesh_cli::installer::run(
                mesh_cli::installer::Args::from_arg_matches(arguments)?,
                &global,
            )
            .await
        }
        "upgrade" => {
            mesh_cli::upgrade::run(
                mesh_cli::upgrade::Args::from_arg_matches(arguments)?,
                &global,
            )
            .await
        }
        "uninstall" => {
            mesh_cli::uninstall::run(
                mesh_cli::uninstall::Args::from_arg_matches(arguments)?,
                &global,
            )
            .await
        }
        "verify-install" => {
            mesh_cli::verify_install::run(
                mesh_cli::verify_install::Args::from_arg_matches(arguments)?,
                &global,
            )
            .await
        }
        "tag" => {
            mesh_cli::tag::run(mesh_cli::tag::Args::from_arg_matches(arguments)?, &global).await
        }
        "manifest" => mesh_cli::manifest::run(
            mesh_cli::manifest::Args::from_arg_matches(arguments)?,
            &global,
        ),
        "profile" => mesh_cli::profile::run(
            mesh_cli::profile::Args::from_arg_matches(arguments)?,
            &global,
        ),
        "proxy-config" => {
            mesh_cli::proxy_config::run(
                mesh_cli::proxy_config::Args::from_arg_matches(arguments)?,
                &global,
            )
            .await
        }
        "proxy-status" => {
            mesh_cli::proxy_status::run(
                mesh_cli::proxy_status::Args::from_arg_matches(arguments)?,
                &global,
            )
            .await
        }
        other => panic!("{other}"),
    }
}
