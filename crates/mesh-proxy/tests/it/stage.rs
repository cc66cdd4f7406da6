//! The proxy, the applications behind it and the clients before it.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use mesh_proxy::run::start_workers;
use mesh_proxy::shared::Shared;
use mesh_proxy::{ProxyOptions, Role};
use mesh_routing::XdsState;
use socket2::{Domain, Socket, Type};

use crate::servers;

/// A port of our own: it stays bound until the process ends, so that nobody else gets it, neither a server of another test nor a client's end.
/// SO_REUSEADDR lets a server listen there beside a socket that does not (socket(7)); until one does, connections are refused.
pub fn free_port() -> SocketAddr {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.set_reuse_address(true).expect("shared addresses");
    // On every address, since the port of a client on any other one is taken for servers that listen on all.
    let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    socket.bind(&any.into()).expect("a port");
    let address = socket.local_addr().ok().and_then(|a| a.as_socket());
    std::mem::forget(socket);
    (Ipv4Addr::LOCALHOST, address.expect("its address").port()).into()
}

/// A proxy with one worker.
pub struct Proxy {
    pub shared: Arc<Shared>,
}

impl Proxy {
    pub fn start(state: &XdsState) -> Self {
        Self::start_with(state, |_| {})
    }

    pub fn start_with(state: &XdsState, change: impl FnOnce(&mut ProxyOptions)) -> Self {
        let mut options =
            ProxyOptions::from_vars(Role::Sidecar, BTreeMap::new(), Path::new("/nowhere"))
                .expect("options");
        options.concurrency = 1;
        options.discovery.clear();
        options
            .metadata
            .insert("WORKLOAD_NAME".to_owned(), "client".into());
        change(&mut options);
        let shared = Shared::new(options);
        let refused = shared.publish(state);
        assert!(refused.is_empty(), "{refused:?}");
        start_workers(&shared).expect("workers");
        let proxy = Self { shared };
        proxy.wait_until_open();
        proxy
    }

    fn wait_until_open(&self) {
        for listener in self.shared.snapshot().listeners() {
            wait(|| TcpStream::connect(listener.address).is_ok());
        }
    }

    pub fn publish(&self, state: &XdsState) {
        let refused = self.shared.publish(state);
        assert!(refused.is_empty(), "{refused:?}");
    }

    /// Requests that ended with these response flags.
    pub fn flags(&self, flags: &str) -> f64 {
        let label = format!("response_flags=\"{flags}\"");
        self.metric("istio_requests_total", &[&label])
    }

    /// The sum of a metric's values over all label sets that contain every part.
    pub fn metric(&self, name: &str, parts: &[&str]) -> f64 {
        let text = mesh_telemetry::istio::expose(&self.shared.registry);
        let fits = |line: &&str| {
            line.starts_with(&format!("{name}{{")) && parts.iter().all(|part| line.contains(part))
        };
        text.lines()
            .filter(fits)
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }
}

/// Waits for up to forty seconds.
pub fn wait(condition: impl Fn() -> bool) {
    for _ in 0..4000 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("waited forty seconds for nothing");
}

/// An application that answers with its name, the request line, the headers and the body it got. Speaks HTTP/1.1 and HTTP/2.
pub struct App {
    pub address: SocketAddr,
    pub connections: Arc<AtomicUsize>,
}

impl App {
    pub fn start(name: &'static str) -> Self {
        let connections = Arc::new(AtomicUsize::new(0));
        let counter = connections.clone();
        let address = servers::with_tasks(move |stream| {
            counter.fetch_add(1, Ordering::Relaxed);
            async move {
                let service = hyper::service::service_fn(move |request| answer(name, request));
                let _ = auto::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            }
        });
        Self {
            address,
            connections,
        }
    }
}

async fn answer(
    name: &'static str,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let mut text = format!(
        "app: {name}\n{} {} {:?}\n",
        request.method(),
        request.uri(),
        request.version()
    );
    let mut headers: Vec<_> = request.headers().iter().collect();
    headers.sort_by_key(|(name, _)| name.as_str().to_owned());
    for (name, value) in headers {
        text.push_str(&format!("{name}: {}\n", value.to_str().unwrap_or("?")));
    }
    let path = request.uri().path().to_owned();
    let body = request
        .into_body()
        .collect()
        .await
        .map(|b| b.to_bytes())
        .unwrap_or_default();
    text.push_str(&format!("body: {}\n", String::from_utf8_lossy(&body)));
    let mut response = Response::new(Full::new(Bytes::from(text)));
    if let Some(status) = path.strip_prefix("/status/") {
        *response.status_mut() = status.parse().expect("a status");
    }
    response
        .headers_mut()
        .insert("x-app", name.parse().expect("a value"));
    Ok(response)
}

/// A client on one raw HTTP/1.1 connection.
pub struct Client(pub TcpStream);

/// A response as it came.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        let line = |line: &'static str| line;
        let _ = line;
        self.head.lines().skip(1).find_map(|l| {
            let (key, value) = l.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

impl Client {
    pub fn connect(to: SocketAddr) -> Self {
        let stream = TcpStream::connect(to).expect("a connection");
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .expect("a timeout");
        Self(stream)
    }

    pub fn send(&mut self, text: &str) {
        self.0.write_all(text.as_bytes()).expect("written");
    }

    pub fn get(&mut self, path: &str, headers: &str) -> Reply {
        self.send(&format!(
            "GET {path} HTTP/1.1\r\nHost: app.test\r\n{headers}\r\n"
        ));
        self.reply().expect("a reply")
    }

    /// The next response; `None` when the connection ends before one.
    pub fn reply(&mut self) -> Option<Reply> {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            match self.0.read(&mut byte) {
                Ok(1) => head.push(byte[0]),
                _ => return None,
            }
        }
        let head = String::from_utf8(head).expect("a head in ASCII");
        let status = head.split(' ').nth(1)?.parse().ok()?;
        let mut reply = Reply {
            status,
            head,
            body: String::new(),
        };
        let length = reply
            .header("content-length")
            .map_or(0, |l| l.parse().expect("a length"));
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).ok()?;
        reply.body = String::from_utf8(body).expect("a body in UTF-8");
        Some(reply)
    }

    /// Nothing more comes: the proxy closed the connection.
    pub fn is_closed(&mut self) -> bool {
        match self.0.read(&mut [0; 1024]) {
            Ok(n) => n == 0,
            // That is the time of this client, which is over with the connection still open.
            Err(error) => !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
        }
    }
}

/// Sends back what it gets.
pub fn echo() -> SocketAddr {
    servers::with_threads(|mut stream| {
        let mut reader = stream.try_clone().expect("a second handle");
        let _ = std::io::copy(&mut reader, &mut stream);
    })
}

/// Is what is said sent back?
pub fn say(stream: &mut TcpStream, text: &str) -> bool {
    let mut back = vec![0; text.len()];
    stream.write_all(text.as_bytes()).is_ok()
        && stream.read_exact(&mut back).is_ok()
        && back == text.as_bytes()
}
