//! The same rules in the kernel. Every test leaves for user and network namespaces of its own, in a process of its own: it re-executes
//! this test binary for one test, so that the process has a single thread when it unshares.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;

use mesh_net::capture::run_init;
use mesh_net::nft::{
    self, Action, Base, Chain, ChainType, Family, Hook, Match, Rule, Table, Transport,
};
use mesh_net::sockets;
use nix::sched::{CloneFlags, unshare};

const INSIDE: &str = "MESH_NET_TEST_INSIDE";

/// Runs `test` of this binary again under `unshare --user --net`, as root of that namespace; true where this is the inner run.
fn inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let output = Command::new("/proc/self/exe")
        .args(["--exact", test, "--test-threads=1", "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        output.status.success(),
        "the test inside the namespaces failed:\n{text}"
    );
    assert!(
        text.contains("1 passed"),
        "the test did not run inside the namespaces:\n{text}"
    );
    false
}

/// Leaves for a network namespace (the test harness runs a test in a thread of its own, which may do that where it is root).
fn leave() {
    if nix::unistd::geteuid().is_root() {
        unshare(CloneFlags::CLONE_NEWNET).expect("unshare the network namespace");
    } else {
        panic!("these tests run as root, or under `unshare --user --map-root-user`");
    }
    up();
}

fn up() {
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Inet,
        nix::sys::socket::SockType::Datagram,
        nix::sys::socket::SockFlag::empty(),
        None,
    )
    .unwrap();
    drop(socket);
    let status = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status()
        .expect("the program ip (iproute2) is needed");
    assert!(status.success());
}

fn echo(address: SocketAddr, name: &'static str) {
    let listener = TcpListener::bind(address).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            stream.write_all(name.as_bytes()).unwrap();
        }
    });
}

fn call(address: SocketAddr) -> String {
    let mut text = String::new();
    TcpStream::connect(address)
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    text
}

fn local(last: u8, port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, 1, last)), port)
}

#[test]
fn connections_go_to_the_endpoints_strictly_in_turn() {
    if !inside("kernel::connections_go_to_the_endpoints_strictly_in_turn") {
        return;
    }
    leave();
    for (last, name) in [(1, "a"), (2, "b"), (3, "c")] {
        echo(local(last, 8080), name);
    }
    let endpoint = |last: u8| Chain {
        name: format!("endpoint-{last}"),
        base: None,
        rules: vec![Rule {
            matches: vec![Match::Transport(Transport::Tcp)],
            actions: vec![Action::DestinationNat(Ipv4Addr::new(127, 0, 1, last), 8080)],
        }],
    };
    let balance = Rule {
        matches: vec![
            Match::Destination(Ipv4Addr::new(127, 9, 9, 9), 32),
            Match::Transport(Transport::Tcp),
            Match::DestinationPort(80),
        ],
        actions: vec![
            Action::Counter,
            Action::InTurn((1..=3).map(|n| format!("endpoint-{n}")).collect()),
        ],
    };
    let base = Base {
        kind: ChainType::Nat,
        hook: Hook::Output,
        priority: -100,
    };
    let output = Chain {
        name: "output".into(),
        base: Some(base),
        rules: vec![balance],
    };
    let table = Table {
        family: Family::Ip,
        name: "test".into(),
        chains: vec![output, endpoint(1), endpoint(2), endpoint(3)],
    };
    assert!(!nft::table_exists(Family::Ip, "test").unwrap());
    table.replace().unwrap();
    table.replace().unwrap();
    assert!(nft::table_exists(Family::Ip, "test").unwrap());
    let service = SocketAddr::from(([127, 9, 9, 9], 80));
    let order: String = (0..9).map(|_| call(service)).collect();
    assert_eq!(order, "abcabcabc");
    nft::delete_table(Family::Ip, "test").unwrap();
    assert!(!nft::table_exists(Family::Ip, "test").unwrap());
    assert!(TcpStream::connect(service).is_err());
}

#[test]
fn thousands_of_endpoints_and_chains_fit_one_transaction() {
    if !inside("kernel::thousands_of_endpoints_and_chains_fit_one_transaction") {
        return;
    }
    leave();
    let name = |n: usize| format!("to-tcp-10.244.{}.{}-9080", n / 256, n % 256);
    let endpoint = |n: usize| Chain {
        name: name(n),
        base: None,
        rules: Vec::new(),
    };
    let all: Vec<String> = (0..3000).map(name).collect();
    let balance = Rule {
        matches: vec![Match::Transport(Transport::Tcp)],
        actions: vec![Action::InTurn(all)],
    };
    let base = Base {
        kind: ChainType::Nat,
        hook: Hook::Output,
        priority: -100,
    };
    let mut chains = vec![Chain {
        name: "output".into(),
        base: Some(base),
        rules: vec![balance],
    }];
    chains.extend((0..3000).map(endpoint));
    let table = Table {
        family: Family::Ip,
        name: "large".into(),
        chains,
    };
    table.replace().unwrap();
    assert!(nft::table_exists(Family::Ip, "large").unwrap());
    // A rule that the kernel can't take is named, and nothing of the transaction stays.
    let wrong = Rule {
        matches: Vec::new(),
        actions: vec![Action::Jump("nowhere".into())],
    };
    let chain = Chain {
        name: "output".into(),
        base: Some(base),
        rules: vec![wrong],
    };
    let table = Table {
        family: Family::Ip,
        name: "wrong".into(),
        chains: vec![chain],
    };
    let error = table.replace().unwrap_err().to_string();
    assert!(error.contains("jump nowhere"), "{error}");
    assert!(!nft::table_exists(Family::Ip, "wrong").unwrap());
}

#[test]
fn a_captured_connection_keeps_its_destination_and_a_marked_one_is_left_alone() {
    if !inside("kernel::a_captured_connection_keeps_its_destination_and_a_marked_one_is_left_alone")
    {
        return;
    }
    leave();
    let add = Command::new("ip")
        .args(["address", "add", "10.7.7.7/32", "dev", "lo"])
        .status()
        .unwrap();
    assert!(add.success());
    let args = [
        "-p", "15001", "-z", "15006", "-i", "*", "-b", "*", "-u", "4242",
    ]
    .map(str::to_owned);
    let mut report = Vec::new();
    run_init(&args, &mut report).unwrap();
    // Twice is once.
    run_init(&args, &mut report).unwrap();
    assert!(String::from_utf8_lossy(&report).contains("capture: outbound everything"));
    // Through another interface than lo a call would be captured on its way out; here the routing table has none, so the call fails
    // unless it is redirected: that it connects is the capture.
    let route = Command::new("ip")
        .args(["route", "add", "local", "192.0.2.0/24", "dev", "lo"])
        .status()
        .unwrap();
    assert!(route.success());
    let mut removed = Vec::new();
    run_init(&["--cleanup-only".to_owned()], &mut removed).unwrap();
    assert!(!nft::table_exists(Family::Inet, mesh_net::capture::TABLE).unwrap());
    let table = Table {
        family: Family::Inet,
        name: "redirected".into(),
        chains: vec![Chain {
            name: "output".into(),
            base: Some(Base {
                kind: ChainType::Nat,
                hook: Hook::Output,
                priority: -100,
            }),
            rules: vec![
                Rule::counted([Match::Mark(sockets::EXEMPT_MARK)], Action::Return),
                Rule::counted(
                    [
                        Match::Ipv4,
                        Match::Destination(Ipv4Addr::new(192, 0, 2, 0), 24),
                        Match::Transport(Transport::Tcp),
                    ],
                    Action::Redirect(15001),
                ),
            ],
        }],
    };
    table.replace().unwrap();
    let listener = TcpListener::bind("127.0.0.1:15001").unwrap();
    let _client = TcpStream::connect("192.0.2.5:80").unwrap();
    let (accepted, _) = listener.accept().unwrap();
    assert_eq!(
        sockets::original_destination(&accepted),
        Some("192.0.2.5:80".parse().unwrap())
    );
    let direct = TcpStream::connect("127.0.0.1:15001").unwrap();
    let (accepted, _) = listener.accept().unwrap();
    assert_eq!(sockets::original_destination(&accepted), None);
    drop(direct);
    assert!(sockets::may_mark());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let options = sockets::ConnectOptions {
        mark: Some(sockets::EXEMPT_MARK),
        ..Default::default()
    };
    let marked = runtime.block_on(sockets::connect("192.0.2.5:80".parse().unwrap(), options));
    assert_eq!(
        marked.unwrap_err().kind(),
        std::io::ErrorKind::ConnectionRefused
    );
}

#[test]
fn splice_carries_both_ways_and_keeps_half_closed_connections() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let pair = async || {
            let (client, accepted) =
                tokio::join!(tokio::net::TcpStream::connect(address), listener.accept());
            (client.unwrap(), accepted.unwrap().0)
        };
        let (mut downstream, mut near) = pair().await;
        let (mut far, mut upstream) = pair().await;
        let counters = mesh_net::splice::Counters::default();
        let copy = mesh_net::splice::bidirectional(&mut near, &mut far, b"pre", None, &counters);
        let big = vec![7u8; 3_000_000];
        let talk = async {
            let send = async {
                downstream.write_all(&big).await.unwrap();
                downstream.shutdown().await.unwrap();
                let mut answer = Vec::new();
                downstream.read_to_end(&mut answer).await.unwrap();
                answer
            };
            let answer = async {
                let mut all = Vec::new();
                upstream.read_to_end(&mut all).await.unwrap();
                // The other direction still works after the first has ended.
                upstream.write_all(b"done").await.unwrap();
                drop(upstream);
                all
            };
            tokio::join!(send, answer)
        };
        let (end, (answer, received)) = tokio::join!(copy, talk);
        assert!(matches!(end, mesh_net::splice::End::Closed), "{end:?}");
        assert_eq!(answer, b"done");
        assert_eq!((received.len(), &received[..3]), (3_000_003, &b"pre"[..]));
        assert_eq!(counters.forward.into_inner(), 3_000_003);
    });
}
