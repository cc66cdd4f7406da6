//! Connections to the application that come from its client's address (`original_src`), as under TPROXY. In a network namespace of its own,
//! since the kernel grants it only to who may configure the network.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt as _;
use std::process::Command;

use envoy_types::pb::envoy::config::listener::v3::listener_filter::ConfigType;
use envoy_types::pb::envoy::config::listener::v3::{Listener, ListenerFilter};
use envoy_types::pb::envoy::extensions::filters::listener::original_src::v3::OriginalSrc;
use socket2::{Domain, Socket, Type};

use crate::config::{
    action, any, cluster, http_listener, prefix, route_to, state, table, tcp_listener, yes,
};
use crate::stage::{Client, Proxy, free_port};

/// Set for the process inside the namespace.
const INSIDE: &str = "MESH_PROXY_TRANSPARENT_TEST";
/// What stands before the address in the application's answers.
const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n";

#[test]
fn the_application_sees_its_clients_own_address() {
    if std::env::var_os(INSIDE).is_some() {
        return inside();
    }
    let name = "transparent::the_application_sees_its_clients_own_address";
    let mut command = Command::new("unshare");
    command.arg("--net");
    // Root needs no other user namespace, which may be forbidden.
    if std::fs::metadata("/proc/self").expect("proc").uid() != 0 {
        command.arg("--map-root-user");
    }
    let output = command
        .arg(std::env::current_exe().expect("this program"))
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .expect("unshare (util-linux) is needed");
    let (out, err) = (&output.stdout, &output.stderr);
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(out),
        String::from_utf8_lossy(err)
    );
}

/// Says to each request who sent it; the addresses of this test are nine characters long.
fn app() -> SocketAddr {
    let socket = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let address = socket.local_addr().expect("its address");
    std::thread::spawn(move || {
        for stream in socket.incoming() {
            let mut stream = stream.expect("a connection");
            std::thread::spawn(move || {
                let peer = stream.peer_addr().expect("its address").ip();
                let mut request = Vec::new();
                let mut buffer = [0; 4096];
                while let Ok(length @ 1..) = stream.read(&mut buffer) {
                    request.extend_from_slice(&buffer[..length]);
                    if request.ends_with(b"\r\n\r\n") {
                        request.clear();
                        write!(stream, "{HEAD}{peer}").expect("sent");
                    }
                }
            });
        }
    });
    address
}

fn transparent(mut listener: Listener) -> Listener {
    let original_src = OriginalSrc {
        mark: 1337,
        ..OriginalSrc::default()
    };
    listener.transparent = yes();
    listener.listener_filters.push(ListenerFilter {
        name: "envoy.filters.listener.original_src".to_owned(),
        config_type: Some(ConfigType::TypedConfig(any(&original_src))),
        ..ListenerFilter::default()
    });
    listener
}

fn connect_from(client: [u8; 4], to: SocketAddr) -> Client {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    let source = SocketAddr::from((client, 0));
    socket.bind(&source.into()).expect("its address");
    socket.connect(&to.into()).expect("a connection");
    Client(TcpStream::from(socket))
}

fn bring_loopback_up() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().expect("netlink");
        tokio::spawn(connection);
        let up = rtnetlink::LinkUnspec::new_with_name("lo").up().build();
        handle.link().set(up).execute().await.expect("lo is up");
    });
}

fn inside() {
    bring_loopback_up();
    let (http, tcp, plain) = (free_port(), free_port(), free_port());
    let mut unmarked = http_listener(plain, |_| {});
    "plain".clone_into(&mut unmarked.name);
    let listeners = vec![
        transparent(http_listener(http, |_| {})),
        transparent(tcp_listener(tcp, "app")),
        unmarked,
    ];
    let routes = table(vec![route_to(prefix("/"), action("app"))]);
    let _proxy = Proxy::start(&state(listeners, routes, vec![cluster("app", &[app()])]));
    let mut clients = [5, 6].map(|last| {
        let ip = [127, 0, 0, last];
        let seen = Ipv4Addr::from(ip).to_string();
        (connect_from(ip, http), connect_from(ip, plain), ip, seen)
    });
    // In turn, so that each finds the other's connection to the application unused.
    for _ in 0..3 {
        for (client, other, ip, seen) in &mut clients {
            assert_eq!(client.get("/", "").body, *seen);
            assert_eq!(
                other.get("/", "").body,
                "127.0.0.1",
                "where nobody asks for it"
            );
            let mut bytes = connect_from(*ip, tcp);
            assert_eq!(bytes.get("/", "").body, *seen);
        }
    }
}
