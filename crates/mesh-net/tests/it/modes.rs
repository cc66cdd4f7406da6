//! Capture in other ways than by redirection of IPv4: TPROXY, DNS, IPv6, virtual machines; and trying it out.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use mesh_net::capture::{CaptureError, TABLE, run_init};
use mesh_net::nft::{Family, table_exists};
use mesh_net::sockets::{self, ListenOptions};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::gettid;
use socket2::SockRef;

use crate::kernel::{
    CLIENT, Neighbour, OUTSIDE, OUTSIDE6, POD, POD6, app, as_proxy, echo, init, proxy, serve,
    sidecar,
};

/// The mangle table's name.
const MANGLE: &str = "istio-proxy-mangle";

/// Answers with both addresses of the connection, which need not be this host's.
fn transparent(port: u16) {
    let options = ListenOptions {
        transparent: true,
        ..ListenOptions::default()
    };
    for ip in [
        IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    ] {
        let listener: TcpListener = match sockets::listen(SocketAddr::new(ip, port), options) {
            Ok(listener) => listener,
            // The socket of IPv6 takes IPv4, too, where there is no other.
            Err(_) => continue,
        };
        listener.set_nonblocking(false).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let (to, from) = (stream.local_addr().unwrap(), stream.peer_addr().unwrap());
                write!(stream, "{} to {to}", from.ip()).unwrap();
            }
        });
    }
}

/// Asks until the answer is the wanted one: an address of IPv6 is of no use for the second in which the kernel looks for its like.
fn soon(want: &str, mut ask: impl FnMut() -> std::io::Result<String>) {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let answer = ask();
        match answer {
            Ok(answer) if answer == want => return,
            answer if Instant::now() > deadline => panic!("{answer:?} instead of {want:?}"),
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

pub fn transparent_connections_keep_both_of_their_addresses() {
    let neighbour = Neighbour::start();
    echo((Ipv4Addr::UNSPECIFIED, 8080).into(), "app");
    echo((Ipv4Addr::UNSPECIFIED, 15090).into(), "metrics");
    transparent(15006);
    // The user 0 is the proxy, so that this works in every user namespace.
    let flags = ["-m", "TPROXY", "-b", "*", "-d", "15090", "-u", "0"];
    init(&flags);
    // Twice is once.
    let report = init(&flags);
    assert!(report.contains("to port 15006 by TPROXY"), "{report}");
    let captured = format!("{CLIENT} to {POD}:8080");
    assert_eq!(neighbour.call(POD, 8080), captured);
    assert_eq!(neighbour.call(POD, 15090), "metrics");
    // The proxy calling its own pod is redirected before it could be marked, as by Istio's rules.
    assert_eq!(app(POD, 8080), format!("{POD} to 127.0.0.1:15006"));
    assert_eq!(app(Ipv4Addr::LOCALHOST, 8080), "app");

    init(&["-m", "TPROXY", "-b", "8081", "-u", "0"]);
    assert_eq!(neighbour.call(POD, 8080), "app", "not in the list");
    // Nothing of it stays: neither rules nor the routing, which would deliver the proxy's own marked packets here.
    init(&["-b", "8080", "-u", "0"]);
    assert!(!table_exists(Family::Inet, MANGLE).unwrap());
    let redirected = format!("{CLIENT} to {POD}:15006");
    assert_eq!(neighbour.call(POD, 8080), redirected);
    init(&flags);
    init(&["-m", "TPROXY", "--cleanup"]);
    assert!(!table_exists(Family::Inet, MANGLE).unwrap());
    assert!(!table_exists(Family::Inet, TABLE).unwrap());
    assert_eq!(neighbour.call(POD, 8080), "app");
    let marked = |mark| {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        SockRef::from(&socket).set_mark(mark).unwrap();
        socket.connect((OUTSIDE, 53)).unwrap();
        query(&socket)
    };
    assert_eq!(marked(1337), "server", "the mark leads nowhere any more");
}

/// The answer to a datagram.
fn query(socket: &UdpSocket) -> String {
    socket
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    socket.send(b"?").unwrap();
    let mut buffer = [0; 64];
    let length = socket.recv(&mut buffer).unwrap();
    String::from_utf8_lossy(&buffer[..length]).into_owned()
}

pub fn queries_of_the_application_go_to_the_agent() {
    let _neighbour = Neighbour::start();
    // By its owner the agent's answers are told from others; they must come from where the queries were sent to.
    let agent = as_proxy(|mark| {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 15053)).unwrap();
        if let Some(mark) = mark {
            SockRef::from(&socket).set_mark(mark).unwrap();
        }
        socket
    });
    serve(agent, "agent");
    echo((Ipv4Addr::UNSPECIFIED, 15053).into(), "agent");
    let ask = |mark: Option<u32>, port: u16| {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap();
        if let Some(mark) = mark {
            SockRef::from(&socket).set_mark(mark).unwrap();
        }
        socket.connect((OUTSIDE, 53)).unwrap();
        (query(&socket), socket.local_addr().unwrap().port())
    };
    assert_eq!(ask(None, 0).0, "server", "before there are rules");
    let flags = ["--redirect-dns", "--capture-all-dns", "-u", "4242"];
    init(&flags);
    let (answer, port) = ask(None, 0);
    assert_eq!(answer, "agent");
    assert_eq!(app(OUTSIDE, 53), "agent", "by TCP");
    assert_eq!(as_proxy(|mark| ask(mark, 0)).0, "server");
    // The same addresses and ports as the application's query that was redirected: another connection all the same.
    assert_eq!(as_proxy(|mark| ask(mark, port)).0, "server");
    assert_eq!(ask(None, port).0, "agent");
    assert_eq!(app(OUTSIDE, 80), "outside", "nothing else was asked for");
    init(&["--cleanup-only"]);
    assert_eq!(ask(None, 0).0, "server");
}

pub fn ipv6_is_captured_likewise() {
    let neighbour = Neighbour::start();
    for (port, name) in [(15001, "outbound"), (15006, "inbound")] {
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let to = sockets::original_destination(&stream);
                write!(stream, "{name} {to:?}").unwrap();
            }
        });
    }
    echo((Ipv6Addr::UNSPECIFIED, 8080).into(), "app");
    let outside = SocketAddr::from((OUTSIDE6, 81));
    let reach = |want: &str| {
        soon(want, || {
            std::net::TcpStream::connect_timeout(&outside, Duration::from_millis(200))
                .map(crate::kernel::read)
        });
    };
    reach("outside");
    init(&["-i", "*", "-b", "*", "-u", "4242"]);
    reach(&format!("outbound Some({outside})"));
    let inbound = format!("inbound Some([{POD6}]:8080)");
    assert_eq!(neighbour.call(POD6, 8080), inbound);
    assert_eq!(app(POD6, 8080), "app", "the application calling itself");
    assert_eq!(app(Ipv6Addr::LOCALHOST, 8080), "app");
    assert_eq!(proxy(OUTSIDE6, 81), "outside");
    assert_eq!(proxy(POD6, 8080), inbound, "the proxy calling its own pod");
    init(&["-i", "2001:db8::/32", "-x", "2001:db8::/112", "-u", "4242"]);
    reach("outside");
    init(&["-i", "2001:db8::/32,10.0.0.0/8", "-u", "4242"]);
    reach(&format!("outbound Some({outside})"));
}

pub fn a_virtual_machine_behind_an_interface_is_captured() {
    let neighbour = Neighbour::start();
    sidecar(15001, "outbound");
    sidecar(15006, "inbound");
    let beyond = Ipv4Addr::new(203, 0, 113, 9);
    init(&["-i", "203.0.113.0/24", "-b", "*", "-u", "0", "-k", "eth0"]);
    let captured = format!("outbound {beyond}:80");
    assert_eq!(neighbour.call(beyond, 80), captured);
    // What is for the pod itself is not inbound traffic of the mesh, but the machine's.
    echo((POD, 8080).into(), "app");
    assert_eq!(neighbour.call(POD, 8080), "app");
}

pub fn validation_tells_rules_that_work_from_none() {
    let _neighbour = Neighbour::start();
    let try_out = |extra: &[&str]| {
        let flags = ["--run-validation", "--probe-timeout", "1s", "-u", "4242"];
        let args: Vec<String> = flags
            .iter()
            .chain(extra)
            .map(|flag| (*flag).to_owned())
            .collect();
        let mut report = Vec::new();
        run_init(&args, &mut report).map(|()| String::from_utf8(report).unwrap())
    };
    let error = try_out(&["--skip-rule-apply"]).unwrap_err();
    assert!(matches!(error, CaptureError::Validation(_)), "{error}");
    assert_eq!(error.exit_code(), 126);
    assert!(!table_exists(Family::Inet, TABLE).unwrap());
    let report = try_out(&["-i", "*", "-b", "*"]).unwrap();
    assert!(report.contains("reached the proxy's port"), "{report}");
    try_out(&["--skip-rule-apply"]).unwrap();
}

pub fn another_network_namespace_can_be_named() {
    let (path, wait) = channel();
    let (_stay, stays) = channel::<()>();
    std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        path.send(format!("/proc/self/task/{}/ns/net", gettid()))
            .unwrap();
        let _ = stays.recv();
    });
    let path = wait.recv().unwrap();
    init(&["--network-namespace", &path, "-u", "0"]);
    assert!(table_exists(Family::Inet, TABLE).unwrap());
    let missing = ["--network-namespace".to_owned(), "/nowhere".to_owned()];
    let error = run_init(&missing, &mut Vec::new()).unwrap_err().to_string();
    assert!(error.contains("/nowhere"), "{error}");
}
