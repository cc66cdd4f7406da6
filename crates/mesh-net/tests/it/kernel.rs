//! The same rules in the kernel, each test in a network namespace of its own.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{
    IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket,
};
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use mesh_net::capture::{TABLE, run_init};
use mesh_net::nft::{
    self, Action, Base, Chain, ChainType, Family, Hook, Match, Rule, Set, Table, Transport,
};
use mesh_net::{conntrack, ns, sockets};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Uid, geteuid, setfsuid};

use crate::namespace::on_links;

pub fn echo(address: SocketAddr, name: &'static str) {
    let listener = TcpListener::bind(address).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            stream.write_all(name.as_bytes()).unwrap();
        }
    });
}

pub fn call(address: SocketAddr) -> String {
    read(TcpStream::connect(address).unwrap())
}

pub fn read(mut stream: TcpStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

fn local(last: u8, port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, 1, last)), port)
}

pub fn connections_go_to_the_endpoints_strictly_in_turn() {
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
        sets: Vec::new(),
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

pub fn a_set_keeps_what_it_holds_while_the_rules_around_it_change() {
    for (last, name) in [(1, "a"), (2, "b")] {
        echo(local(last, 8080), name);
    }
    // Connections go to `first`, unless their source was remembered: then to the other one.
    let table = |first: u8, timeout| {
        let send = |last| Action::DestinationNat(Ipv4Addr::new(127, 0, 1, last), 8080);
        let rule = |known: bool| {
            let source = Match::SourceIn("known".into());
            let last = if known { 3 - first } else { first };
            Rule {
                matches: vec![
                    Match::Destination(Ipv4Addr::new(127, 9, 9, 9), 32),
                    Match::Transport(Transport::Tcp),
                    if known {
                        source
                    } else {
                        Match::Not(Box::new(source))
                    },
                ],
                actions: vec![Action::RememberSource("known".into()), send(last)],
            }
        };
        let chain = |name: &str, base, rules| Chain {
            name: name.into(),
            base,
            rules,
        };
        let base = Base {
            kind: ChainType::Nat,
            hook: Hook::Output,
            priority: -100,
        };
        let jump = Rule {
            matches: Vec::new(),
            actions: vec![Action::Goto(format!("to-{first}"))],
        };
        Table {
            family: Family::Ip,
            name: "sticky".into(),
            sets: vec![Set {
                name: "known".into(),
                timeout,
            }],
            chains: vec![
                chain("output", Some(base), vec![jump]),
                chain(&format!("to-{first}"), None, vec![rule(true), rule(false)]),
            ],
        }
    };
    let long = Duration::from_secs(3600);
    let service = SocketAddr::from(([127, 9, 9, 9], 80));
    let (first, second) = (table(1, long), table(2, long));
    first.replace().unwrap();
    assert_eq!((call(service), call(service)), ("a".into(), "b".into()));
    second.update(&first).unwrap();
    assert_eq!(call(service), "a", "the source was still known");
    // A set with another time is another set.
    let short = table(1, Duration::from_millis(1500));
    short.update(&second).unwrap();
    assert_eq!((call(service), call(service)), ("a".into(), "b".into()));
    std::thread::sleep(Duration::from_millis(2000));
    assert_eq!(call(service), "a", "the source was forgotten in time");
    // What the kernel does not hold can't be updated, and nothing is changed then.
    let error = first.update(&second).unwrap_err().to_string();
    assert!(error.contains("to-2"), "{error}");
    assert_eq!(call(service), "b");
}

pub fn a_udp_flow_follows_its_service_once_it_is_forgotten() {
    let server = |last: u8| std::net::UdpSocket::bind(local(last, 8080)).unwrap();
    let (first, second) = (server(1), server(2));
    let service = SocketAddrV4::new(Ipv4Addr::new(127, 9, 9, 9), 53);
    let table = |last: u8| Table {
        family: Family::Ip,
        name: "udp".into(),
        sets: Vec::new(),
        chains: vec![Chain {
            name: "output".into(),
            base: Some(Base {
                kind: ChainType::Nat,
                hook: Hook::Output,
                priority: -100,
            }),
            rules: vec![Rule {
                matches: vec![
                    Match::Destination(*service.ip(), 32),
                    Match::Transport(Transport::Udp),
                ],
                actions: vec![Action::DestinationNat(Ipv4Addr::new(127, 0, 1, last), 8080)],
            }],
        }],
    };
    let client = std::net::UdpSocket::bind(local(7, 0)).unwrap();
    let arrives = |at: &std::net::UdpSocket| {
        client.send_to(b"x", service).unwrap();
        at.recv_from(&mut [0; 8]).unwrap();
    };
    let limit = Some(Duration::from_secs(10));
    first.set_read_timeout(limit).unwrap();
    second.set_read_timeout(limit).unwrap();
    table(1).replace().unwrap();
    arrives(&first);
    table(2).update(&table(1)).unwrap();
    // The kernel remembers the flow.
    arrives(&first);
    let old = SocketAddrV4::new(Ipv4Addr::new(127, 0, 1, 1), 8080);
    let mut seen = Vec::new();
    let forgotten = conntrack::forget_udp(|to, by| {
        seen.push((to, by));
        (to, by) == (service, old)
    });
    assert_eq!(forgotten.unwrap(), 1, "{seen:?}");
    arrives(&second);
}

pub fn thousands_of_endpoints_and_chains_fit_one_transaction() {
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
        sets: Vec::new(),
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
        sets: Vec::new(),
        chains: vec![chain],
    };
    let error = table.replace().unwrap_err().to_string();
    assert!(error.contains("jump nowhere"), "{error}");
    assert!(!nft::table_exists(Family::Ip, "wrong").unwrap());
}

pub const POD: Ipv4Addr = Ipv4Addr::new(10, 7, 7, 1);
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 7, 7, 2);
/// Addresses beyond the client's end of the link.
pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 5);
const EXCLUDED: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 5);
pub const POD6: Ipv6Addr = Ipv6Addr::new(0xfd00, 7, 7, 7, 0, 0, 0, 1);
pub const CLIENT6: Ipv6Addr = Ipv6Addr::new(0xfd00, 7, 7, 7, 0, 0, 0, 2);
pub const OUTSIDE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 5);
/// A user that the rules exempt; an ordinary user's namespace does not map it, and the rules take the mark instead.
pub const PROXY: u32 = 4242;

/// A second network namespace at the other end of the pod's link, with a thread in it that makes calls.
pub struct Neighbour {
    calls: Sender<(SocketAddr, Sender<String>)>,
}

impl Neighbour {
    /// Gives this namespace the link, and starts the neighbour with its servers.
    pub fn start() -> Self {
        let pod = File::open("/proc/thread-self/ns/net").unwrap();
        let (ready, wait) = channel();
        let (calls, incoming) = channel::<(SocketAddr, Sender<String>)>();
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            on_links(async |links| {
                links.veth("eth1", "eth0", &pod).await?;
                links.up("lo").await?;
                links.address("lo", OUTSIDE, 32).await?;
                links.address("lo", EXCLUDED, 32).await?;
                links.address("lo", OUTSIDE6, 128).await?;
                links.address("eth1", CLIENT, 24).await?;
                links.address("eth1", CLIENT6, 64).await?;
                links.up("eth1").await?;
                links.default_route(POD).await
            });
            // Its own address is not ready for a second.
            echo((Ipv6Addr::UNSPECIFIED, 81).into(), "outside");
            name_server((OUTSIDE, 53).into(), "server");
            for (ip, port) in [(OUTSIDE, 80), (OUTSIDE, 25), (EXCLUDED, 80)] {
                echo((ip, port).into(), "outside");
            }
            ready.send(()).unwrap();
            for (address, answer) in incoming {
                answer.send(call(address)).unwrap();
            }
        });
        wait.recv().unwrap();
        on_links(async |links| {
            links.address("eth0", POD, 24).await?;
            links.address("eth0", POD6, 64).await?;
            links.up("eth0").await?;
            links.default_route(CLIENT).await?;
            links.default_route6(CLIENT6).await
        });
        Self { calls }
    }

    pub fn call(&self, ip: impl Into<IpAddr>, port: u16) -> String {
        let (answer, wait) = channel();
        let to = SocketAddr::new(ip.into(), port);
        self.calls.send((to, answer)).unwrap();
        wait.recv().unwrap()
    }
}

/// Answers every datagram with its name.
pub fn name_server(address: SocketAddr, name: &'static str) {
    serve(UdpSocket::bind(address).unwrap(), name);
}

/// Answers every datagram with a name.
pub fn serve(socket: UdpSocket, name: &'static str) {
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        loop {
            let (_, from) = socket.recv_from(&mut buffer).unwrap();
            socket.send_to(name.as_bytes(), from).unwrap();
        }
    });
}

/// Answers with its name and where the connection was going.
pub fn sidecar(port: u16, name: &'static str) {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            match sockets::original_destination(&stream) {
                Some(to) => write!(stream, "{name} {to}").unwrap(),
                None => write!(stream, "{name} itself").unwrap(),
            }
        }
    });
}

pub fn app(ip: impl Into<IpAddr>, port: u16) -> String {
    call(SocketAddr::new(ip.into(), port))
}

/// What the proxy does: by its user, or with a mark where that user does not exist.
pub fn as_proxy<T>(work: impl FnOnce(Option<u32>) -> T) -> T {
    let by_user = ns::is_mapped(PROXY).unwrap();
    // A socket belongs to the file system uid of the thread that made it.
    let user = |uid| {
        if by_user {
            setfsuid(uid);
        }
    };
    user(Uid::from_raw(PROXY));
    let done = work((!by_user).then_some(sockets::EXEMPT_MARK));
    user(geteuid());
    done
}

/// A call as the proxy makes it.
pub fn proxy(ip: impl Into<IpAddr>, port: u16) -> String {
    let address = SocketAddr::new(ip.into(), port);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let stream = as_proxy(|mark| {
        let options = sockets::ConnectOptions {
            mark,
            ..Default::default()
        };
        runtime.block_on(sockets::connect(address, options))
    });
    let stream = stream.unwrap().into_std().unwrap();
    stream.set_nonblocking(false).unwrap();
    read(stream)
}

pub fn init(args: &[&str]) -> String {
    let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
    let mut report = Vec::new();
    run_init(&args, &mut report).unwrap();
    String::from_utf8(report).unwrap()
}

pub fn a_sidecar_gets_what_is_captured_and_nothing_else() {
    let neighbour = Neighbour::start();
    sidecar(15001, "outbound");
    sidecar(15006, "inbound");
    echo((Ipv4Addr::UNSPECIFIED, 8080).into(), "app");
    echo((Ipv4Addr::UNSPECIFIED, 15090).into(), "metrics");
    assert_eq!(app(OUTSIDE, 80), "outside", "before there are rules");

    let args = [
        "-i",
        "*",
        "-x",
        "198.51.100.0/24",
        "-o",
        "25",
        "-b",
        "*",
        "-d",
        "15090",
        "-u",
        "4242",
    ];
    // Twice is once.
    init(&args);
    let report = init(&args);
    assert!(
        report.contains("capture: outbound everything to port 15001"),
        "{report}"
    );

    assert_eq!(app(OUTSIDE, 80), "outbound 192.0.2.5:80");
    assert_eq!(app(OUTSIDE, 25), "outside", "an excluded port");
    assert_eq!(app(EXCLUDED, 80), "outside", "an excluded network");
    assert_eq!(app(POD, 8080), "app", "the application calling itself");
    assert_eq!(app(Ipv4Addr::LOCALHOST, 15001), "outbound itself");
    assert_eq!(proxy(OUTSIDE, 80), "outside");
    assert_eq!(proxy(Ipv4Addr::LOCALHOST, 8080), "app");
    assert_eq!(
        proxy(POD, 8080),
        "inbound 10.7.7.1:8080",
        "the proxy calling its own pod"
    );
    assert_eq!(neighbour.call(POD, 8080), "inbound 10.7.7.1:8080");
    assert_eq!(neighbour.call(POD, 15090), "metrics");

    // Other flags, and nothing of the first ones stays.
    init(&["-i", "198.51.100.0/24", "-b", "15090", "-u", "4242"]);
    assert_eq!(app(OUTSIDE, 80), "outside");
    assert_eq!(app(EXCLUDED, 80), "outbound 198.51.100.5:80");
    assert_eq!(neighbour.call(POD, 8080), "app");
    assert_eq!(neighbour.call(POD, 15090), "inbound 10.7.7.1:15090");

    // An interface that is left alone.
    init(&["-i", "*", "-b", "*", "-c", "eth0", "-u", "4242"]);
    assert_eq!(app(OUTSIDE, 80), "outside");
    assert_eq!(neighbour.call(POD, 8080), "app");

    init(&["--cleanup-only"]);
    // There is nothing left to remove, which is no error.
    init(&["--cleanup-only"]);
    assert!(!nft::table_exists(Family::Inet, TABLE).unwrap());
    assert_eq!(app(EXCLUDED, 80), "outside");
    assert_eq!(neighbour.call(POD, 8080), "app");
}

pub fn a_marked_connection_is_left_alone() {
    assert!(sockets::may_mark());
    let redirect = |port| Rule::counted([Match::Transport(Transport::Tcp)], Action::Redirect(port));
    let table = Table {
        family: Family::Inet,
        name: "redirected".into(),
        sets: Vec::new(),
        chains: vec![Chain {
            name: "output".into(),
            base: Some(Base {
                kind: ChainType::Nat,
                hook: Hook::Output,
                priority: -100,
            }),
            rules: vec![
                Rule::counted([Match::Mark(sockets::EXEMPT_MARK)], Action::Return),
                redirect(15001),
            ],
        }],
    };
    table.replace().unwrap();
    echo(local(1, 80), "direct");
    sidecar(15001, "captured");
    assert_eq!(call(local(1, 80)), "captured 127.0.1.1:80");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let options = sockets::ConnectOptions {
        mark: Some(sockets::EXEMPT_MARK),
        ..Default::default()
    };
    let marked = runtime.block_on(sockets::connect(local(1, 80), options));
    let stream = marked.unwrap().into_std().unwrap();
    stream.set_nonblocking(false).unwrap();
    assert_eq!(read(stream), "direct");
}

pub fn splice_carries_both_ways_and_keeps_half_closed_connections() {
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

pub fn as_many_files_as_allowed_can_be_opened() {
    let kind = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (_, hard) = nix::sys::resource::getrlimit(kind).unwrap();
    nix::sys::resource::setrlimit(kind, 64, hard).unwrap();
    assert_eq!(sockets::raise_open_files().unwrap(), hard);
    assert_eq!(nix::sys::resource::getrlimit(kind).unwrap(), (hard, hard));
}
