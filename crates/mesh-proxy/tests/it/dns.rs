//! The application's DNS queries: what the mesh answers, what goes on to the pod's resolvers, and before the table of names is there.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::str::FromStr as _;
use std::thread::JoinHandle;
use std::time::Duration;

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use mesh_proxy::dns::DnsOptions;
use mesh_proxy::{Ports, RunError, run};
use mesh_routing::compile::{CLUSTER, LISTENER};
use mesh_xds::json::{NAME_TABLE, NameInfo, NameTable};
use prost::Message as _;

use crate::config::{cluster, tcp_listener};
use crate::process::{LOCAL, ask, keep, options};
use crate::stage::{App, free_port, wait};

/// What the resolver says to everything.
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

fn query(name: &str) -> Message {
    let mut query = Message::query();
    let name = Name::from_str(name).expect("a name");
    query.queries.push(Query::query(name, RecordType::A));
    query
}

fn by_datagram(to: SocketAddr, query: &Message) -> Message {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let limit = Some(Duration::from_secs(20));
    socket.set_read_timeout(limit).expect("a limit");
    let bytes = query.to_vec().expect("bytes");
    socket.send_to(&bytes, to).expect("sent");
    let mut answer = [0; 4096];
    let length = socket.recv(&mut answer).expect("an answer");
    let answer = Message::from_vec(&answer[..length]).expect("a message");
    assert_eq!(answer.metadata.id, query.metadata.id);
    answer
}

/// Reads and writes a message with its length before it.
fn exchange(stream: &mut TcpStream, query: &Message) -> Message {
    send(stream, query);
    receive(stream)
}

fn send(stream: &mut TcpStream, message: &Message) {
    let bytes = message.to_vec().expect("bytes");
    let length = u16::try_from(bytes.len()).expect("a length").to_be_bytes();
    stream
        .write_all(&[&length, &bytes[..]].concat())
        .expect("sent");
}

fn receive(stream: &mut TcpStream) -> Message {
    let mut length = [0; 2];
    stream.read_exact(&mut length).expect("a length");
    let mut bytes = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut bytes).expect("a message");
    Message::from_vec(&bytes).expect("a message")
}

fn addresses(answer: &Message) -> Vec<String> {
    answer
        .answers
        .iter()
        .map(|record| record.data.to_string())
        .collect()
}

/// A resolver on both transports, which knows every name.
fn resolver() -> SocketAddr {
    fn reply(query: &Message) -> Message {
        let mut answer = Message::response(query.metadata.id, query.metadata.op_code);
        answer.queries = query.queries.clone();
        let name = query.queries[0].name().clone();
        answer
            .answers
            .push(Record::from_rdata(name, 60, RData::A(A(ELSEWHERE))));
        answer
    }
    // The same port of both transports.
    let pair = || {
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).ok()?;
        let address = tcp.local_addr().ok()?;
        Some((tcp, UdpSocket::bind(address).ok()?, address))
    };
    let (tcp, udp, address) = (0..20).find_map(|_| pair()).expect("a port of both");
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        loop {
            let (length, peer) = udp.recv_from(&mut bytes).expect("a query");
            let query = Message::from_vec(&bytes[..length]).expect("a message");
            let mut forged = reply(&query);
            forged.metadata.id = query.metadata.id.wrapping_add(1);
            for answer in [forged, reply(&query)] {
                let bytes = answer.to_vec().expect("bytes");
                udp.send_to(&bytes, peer).expect("sent");
            }
        }
    });
    std::thread::spawn(move || {
        for stream in tcp.incoming() {
            let mut stream = stream.expect("a connection");
            let query = receive(&mut stream);
            send(&mut stream, &reply(&query));
        }
    });
    address
}

struct Proxy {
    dns: SocketAddr,
    agent: u16,
    health: u16,
    process: JoinHandle<Result<(), RunError>>,
    _dir: tempfile::TempDir,
}

impl Proxy {
    /// A proxy that is configured, with this table of names.
    async fn start(table: Option<NameTable>, resolvers: Vec<SocketAddr>) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let listener = tcp_listener(free_port(), "app");
        let app = cluster("app", &[App::start("app").address]);
        let mut resources = vec![
            (CLUSTER, "app".to_owned(), app.encode_to_vec()),
            (LISTENER, listener.name.clone(), listener.encode_to_vec()),
        ];
        resources.extend(table.map(|table| (NAME_TABLE, "all".to_owned(), table.encode_to_vec())));
        keep(dir.path(), resources).await;
        let mut options = options(dir.path());
        let [dns, agent, health] = [(); 3].map(|()| free_port());
        options.dns = Some(DnsOptions {
            listen: vec![dns],
            resolvers,
            search: vec!["default.svc.cluster.local".to_owned()],
        });
        options.ports = Ports {
            admin: 0,
            agent: agent.port(),
            health: health.port(),
            metrics: 0,
        };
        let process = std::thread::spawn(move || run(options));
        wait(|| TcpStream::connect(agent).is_ok() && TcpStream::connect(health).is_ok());
        wait(|| TcpStream::connect(dns).is_ok());
        Self {
            dns,
            agent: agent.port(),
            health: health.port(),
            process,
            _dir: dir,
        }
    }

    fn metric(&self, name: &str) -> String {
        let text = ask(self.agent, "GET", "/metrics", LOCAL).body;
        let name = format!("istio_agent_dns_{name}_total ");
        let line = text.lines().find_map(|line| line.strip_prefix(&name));
        line.unwrap_or_else(|| panic!("no {name}in {text}"))
            .to_owned()
    }

    fn end(self) {
        assert_eq!(ask(self.agent, "POST", "/quitquitquit", LOCAL).status, 200);
        self.process.join().expect("no panic").expect("a clean end");
    }
}

fn table(entries: &[(&str, Vec<String>)]) -> NameTable {
    let entry = |(host, ips): &(&str, Vec<String>)| {
        let info = NameInfo {
            ips: ips.clone(),
            registry: "External".to_owned(),
            ..NameInfo::default()
        };
        ((*host).to_owned(), info)
    };
    NameTable {
        table: entries.iter().map(entry).collect::<BTreeMap<_, _>>(),
    }
}

#[tokio::test]
async fn the_mesh_answers_what_it_knows_and_the_resolvers_the_rest() {
    let many: Vec<String> = (1..=100).map(|i| format!("10.0.0.{i}")).collect();
    let names = table(&[
        ("a.test", vec!["240.240.0.1".to_owned()]),
        ("many.test", many.clone()),
    ]);
    // Nobody is at the first resolver.
    let gone = free_port();
    let proxy = Proxy::start(Some(names), vec![gone, resolver()]).await;
    wait(|| ask(proxy.health, "GET", "/healthz/ready", LOCAL).status == 200);

    let answer = by_datagram(proxy.dns, &query("A.test."));
    assert!(answer.metadata.authoritative);
    assert_eq!(addresses(&answer), ["240.240.0.1"]);
    let answer = by_datagram(proxy.dns, &query("a.test.default.svc.cluster.local."));
    assert_eq!(addresses(&answer), ["a.test.", "240.240.0.1"]);
    // More than fits a datagram: the client asks again by TCP, for both on one connection.
    let answer = by_datagram(proxy.dns, &query("many.test."));
    assert!(answer.metadata.truncation);
    let shown = addresses(&answer);
    assert!(
        shown.len() > 10 && shown.iter().all(|ip| many.contains(ip)),
        "{shown:?}"
    );
    let mut stream = TcpStream::connect(proxy.dns).expect("a connection");
    let answer = exchange(&mut stream, &query("many.test."));
    let mut found = addresses(&answer);
    assert_ne!(found, many, "in another order each time");
    found.sort();
    let mut expected = many;
    expected.sort();
    assert_eq!(found, expected);
    assert_eq!(proxy.metric("upstream_requests"), "0");

    let other = query("elsewhere.test.");
    assert_eq!(
        addresses(&exchange(&mut stream, &other)),
        [ELSEWHERE.to_string()]
    );
    let answer = by_datagram(proxy.dns, &other);
    assert_eq!(addresses(&answer), [ELSEWHERE.to_string()]);
    assert_eq!(proxy.metric("requests"), "6");
    assert_eq!(proxy.metric("upstream_requests"), "2");
    assert_eq!(proxy.metric("upstream_failures"), "0");
    let shown = ask(proxy.agent, "GET", "/debug/ndsz", LOCAL).body;
    let shown: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
    assert_eq!(shown["table"]["a.test"]["ips"][0], "240.240.0.1");
    proxy.end();
}

#[tokio::test]
async fn without_a_table_nothing_is_answered_and_the_proxy_is_not_ready() {
    let proxy = Proxy::start(None, vec![resolver()]).await;
    wait(|| {
        let reply = ask(proxy.health, "GET", "/healthz/ready", LOCAL);
        reply.status == 503 && reply.body.contains("table of names")
    });
    let answer = by_datagram(proxy.dns, &query("a.test."));
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(ask(proxy.agent, "GET", "/debug/ndsz", LOCAL).status, 404);
    assert_eq!(proxy.metric("requests"), "1");
    assert_eq!(proxy.metric("upstream_failures"), "0");
    proxy.end();
}

#[tokio::test]
async fn where_no_resolver_answers_the_query_fails() {
    let proxy = Proxy::start(Some(table(&[])), vec![free_port()]).await;
    wait(|| ask(proxy.health, "GET", "/healthz/ready", LOCAL).status == 200);
    let answer = by_datagram(proxy.dns, &query("a.test."));
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    proxy.end();
}

#[test]
fn a_port_in_use_is_named() {
    let dir = tempfile::tempdir().expect("a folder");
    let taken = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let address = taken.local_addr().expect("its address");
    let mut options = options(Path::new(dir.path()));
    options.ports = Ports {
        admin: 0,
        agent: 0,
        health: 0,
        metrics: 0,
    };
    options.dns = Some(DnsOptions {
        listen: vec![address],
        resolvers: Vec::new(),
        search: Vec::new(),
    });
    let error = run(options).expect_err("the port is taken").to_string();
    assert!(
        error.contains("DNS") && error.contains(&address.to_string()),
        "{error}"
    );
}
