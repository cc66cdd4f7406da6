//! Cluster DNS: names of Services and pods below `cluster.local`, everything else asked of the host's resolvers.
//!
//! The records are those of the Kubernetes specification "DNS-Based Service Discovery" 1.1.0. [`answer`] is pure; [`run`] serves it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, CNAME, PTR, SOA, SRV};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use crate::services::{Entry, Table, Transport};

/// The address of the DNS service.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// Seconds that an answer may be kept (CoreDNS' default for Kubernetes).
const TTL: u32 = 5;
/// How long one of the host's resolvers may take.
const FORWARD_TIMEOUT: Duration = Duration::from_millis(1500);
/// Questions that are forwarded at once; more are refused.
const MAX_FORWARDS: usize = 256;
/// Records in one answer: more would not fit a message.
const MAX_RECORDS: usize = 1000;

/// Aliases of aliases that are followed; more is a circle.
const MAX_ALIASES: usize = 8;

/// Why DNS can't be served.
#[derive(Debug, thiserror::Error)]
#[error("serving cluster DNS on {address}: {source}")]
pub struct DnsError {
    address: SocketAddr,
    source: std::io::Error,
}

/// Serves UDP and TCP on `address` until `shutdown`. `resolvers` are asked for names outside the cluster.
///
/// # Errors
/// When the sockets can't be had.
pub async fn run(
    address: SocketAddr,
    tables: watch::Receiver<Arc<Table>>,
    resolvers: Vec<IpAddr>,
    shutdown: CancellationToken,
) -> Result<(), DnsError> {
    let error = |source| DnsError { address, source };
    let udp = Arc::new(UdpSocket::bind(address).await.map_err(error)?);
    let tcp = TcpListener::bind(address).await.map_err(error)?;
    let server = Arc::new(Server {
        tables,
        resolvers,
        forwards: Semaphore::new(MAX_FORWARDS),
    });
    let serve = async {
        tokio::join!(datagrams(&udp, &server), streams(&tcp, &server));
    };
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = serve => {}
    }
    Ok(())
}

struct Server {
    tables: watch::Receiver<Arc<Table>>,
    resolvers: Vec<IpAddr>,
    forwards: Semaphore,
}

impl Server {
    /// The answer to a message as it goes on the wire; `None` for what deserves none.
    async fn respond(&self, bytes: &[u8]) -> Option<(Message, u16)> {
        let request = Message::from_vec(bytes).ok()?;
        if request.metadata.message_type != MessageType::Query {
            return None;
        }
        let size = request.max_payload();
        let table = self.tables.borrow().clone();
        match answer(&table, &request) {
            Some(response) => Some((response, size)),
            None => Some((self.forward(&request, bytes).await, size)),
        }
    }

    /// Asks the host's resolvers in turn. Without any, or when none answers in time, the name can't be resolved: SERVFAIL.
    async fn forward(&self, request: &Message, bytes: &[u8]) -> Message {
        if let Ok(_permit) = self.forwards.try_acquire() {
            for resolver in &self.resolvers {
                let asked = tokio::time::timeout(
                    FORWARD_TIMEOUT,
                    ask(SocketAddr::new(*resolver, 53), bytes),
                )
                .await;
                if let Ok(Ok(response)) = asked
                    && response.metadata.id == request.metadata.id
                {
                    return response;
                }
            }
        }
        failure(request, ResponseCode::ServFail)
    }
}

async fn ask(resolver: SocketAddr, bytes: &[u8]) -> std::io::Result<Message> {
    let any: SocketAddr = if resolver.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (std::net::Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(resolver).await?;
    socket.send(bytes).await?;
    let mut buffer = vec![0; 4096];
    let length = socket.recv(&mut buffer).await?;
    Message::from_vec(&buffer[..length]).map_err(std::io::Error::other)
}

async fn datagrams(socket: &Arc<UdpSocket>, server: &Arc<Server>) {
    let mut buffer = vec![0; 4096];
    loop {
        let Ok((length, peer)) = socket.recv_from(&mut buffer).await else {
            // An ICMP error for an earlier answer.
            continue;
        };
        let (request, socket, server) = (buffer[..length].to_vec(), socket.clone(), server.clone());
        tokio::spawn(async move {
            if let Some((response, size)) = server.respond(&request).await
                && let Some(bytes) = encode(&response, usize::from(size))
            {
                // A client that has gone needs no answer.
                let _ = socket.send_to(&bytes, peer).await;
            }
        });
    }
}

/// RFC 1035 section 4.2.1: what does not fit is cut off, and the client asks again over TCP.
fn encode(response: &Message, size: usize) -> Option<Vec<u8>> {
    let bytes = response.to_vec().ok()?;
    if bytes.len() <= size {
        Some(bytes)
    } else {
        response.truncate().to_vec().ok()
    }
}

async fn streams(listener: &TcpListener, server: &Arc<Server>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(stream_of_messages(stream, server.clone()));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// RFC 1035 section 4.2.2: each message has its length before it. A silent client is closed after ten seconds.
async fn stream_of_messages(mut stream: TcpStream, server: Arc<Server>) {
    let exchange = async |stream: &mut TcpStream| -> std::io::Result<()> {
        let length = stream.read_u16().await?;
        let mut request = vec![0; usize::from(length)];
        stream.read_exact(&mut request).await?;
        let response = server
            .respond(&request)
            .await
            .and_then(|(response, _)| encode(&response, usize::from(u16::MAX)));
        let Some(response) = response else {
            return Err(std::io::ErrorKind::InvalidData.into());
        };
        stream.write_u16(response.len() as u16).await?;
        stream.write_all(&response).await
    };
    while let Ok(Ok(())) =
        tokio::time::timeout(Duration::from_secs(10), exchange(&mut stream)).await
    {}
}

/// The answer from the table; `None` when the name is not the cluster's.
pub fn answer(table: &Table, request: &Message) -> Option<Message> {
    if request.metadata.op_code != OpCode::Query {
        return Some(failure(request, ResponseCode::NotImp));
    }
    let [query] = &request.queries[..] else {
        return Some(failure(request, ResponseCode::FormErr));
    };
    let mut found = lookup(table, query)?;
    if let Some(records) = &mut found {
        follow_aliases(table, query, records);
    }
    let mut response = reply(request);
    response.metadata.authoritative = true;
    match found {
        Some(records) => {
            response
                .answers
                .extend(records.into_iter().take(MAX_RECORDS));
        }
        None => response.metadata.response_code = ResponseCode::NXDomain,
    }
    if response.answers.is_empty()
        && let Some(soa) = authority()
    {
        // RFC 2308 section 3: the negative answer's time to live.
        response.authorities.push(soa);
    }
    Some(response)
}

/// `None`: the name is not the cluster's; `Some(None)`: it does not exist.
fn lookup(table: &Table, query: &Query) -> Option<Option<Vec<Record>>> {
    let name = query.name().to_ascii().to_ascii_lowercase();
    let name = name.trim_end_matches('.');
    match name
        .strip_suffix("cluster.local")
        .map(|rest| rest.trim_end_matches('.'))
    {
        Some(rest) if name == "cluster.local" || name.ends_with(".cluster.local") => {
            Some(inside(table, rest, query))
        }
        _ if name.ends_with(".in-addr.arpa") => reverse(table, name, query),
        _ => None,
    }
}

/// RFC 1034 section 3.6.2: an alias is answered with what it stands for, as far as that is known here. Clients don't ask again.
fn follow_aliases(table: &Table, query: &Query, records: &mut Vec<Record>) {
    if query.query_type == RecordType::CNAME {
        return;
    }
    for _ in 0..MAX_ALIASES {
        let Some(RData::CNAME(alias)) = records.last().map(|record| &record.data) else {
            return;
        };
        let next = Query::query(alias.0.clone(), query.query_type);
        let Some(Some(more)) = lookup(table, &next) else {
            return;
        };
        if more.is_empty() {
            return;
        }
        records.extend(more);
    }
}

/// What is below `cluster.local`: `None` = the name does not exist, no records = it exists, but not of this type.
fn inside(table: &Table, rest: &str, query: &Query) -> Option<Vec<Record>> {
    let labels: Vec<&str> = rest.split('.').collect();
    match labels[..] {
        ["" | "svc" | "pod"] => Some(Vec::new()),
        [namespace, "svc"] => table.keys().any(|(n, _)| n == namespace).then(Vec::new),
        [service, namespace, "svc"] => {
            let entry = table.get(&(namespace.to_owned(), service.to_owned()))?;
            Some(service_records(entry, service, namespace, query))
        }
        [host, service, namespace, "svc"] => {
            let entry = table.get(&(namespace.to_owned(), service.to_owned()))?;
            let host = entry
                .hosts
                .iter()
                .find(|h| h.hostname.as_deref() == Some(host) || dashed(h.address) == *host)?;
            Some(a(query, host.address).into_iter().collect())
        }
        [port, protocol, service, namespace, "svc"] => {
            let entry = table.get(&(namespace.to_owned(), service.to_owned()))?;
            srv(entry, port, protocol, service, namespace, query)
        }
        [address, _, "pod"] => {
            let address = address.replace('-', ".").parse().ok()?;
            Some(a(query, address).into_iter().collect())
        }
        _ => None,
    }
}

fn dashed(address: Ipv4Addr) -> String {
    address.to_string().replace('.', "-")
}

fn record(query: &Query, data: RData) -> Record {
    Record::from_rdata(query.name().clone(), TTL, data)
}

fn a(query: &Query, address: Ipv4Addr) -> Option<Record> {
    matches!(query.query_type, RecordType::A | RecordType::ANY)
        .then(|| record(query, RData::A(A(address))))
}

fn service_records(entry: &Entry, service: &str, namespace: &str, query: &Query) -> Vec<Record> {
    if let Some(external) = &entry.external_name {
        let alias = Name::from_str(&format!("{}.", external.trim_end_matches('.'))).ok();
        return alias
            .map(|name| record(query, RData::CNAME(CNAME(name))))
            .into_iter()
            .collect();
    }
    if query.query_type == RecordType::SRV {
        let all = entry.ports.iter().filter_map(|port| {
            srv_of(
                port.port,
                &format!("{service}.{namespace}.svc.cluster.local."),
                query,
            )
        });
        return all.collect();
    }
    match entry.address {
        Some(address) => a(query, address).into_iter().collect(),
        None => entry
            .hosts
            .iter()
            .filter_map(|host| a(query, host.address))
            .collect(),
    }
}

fn srv(
    entry: &Entry,
    port: &str,
    protocol: &str,
    service: &str,
    namespace: &str,
    query: &Query,
) -> Option<Vec<Record>> {
    let transport = match protocol {
        "_tcp" => Transport::Tcp,
        "_udp" => Transport::Udp,
        _ => return None,
    };
    let wanted = port.strip_prefix('_')?;
    let port = entry
        .ports
        .iter()
        .find(|p| p.name == wanted && p.transport == transport)?;
    if !matches!(query.query_type, RecordType::SRV | RecordType::ANY) {
        return Some(Vec::new());
    }
    let below = format!("{service}.{namespace}.svc.cluster.local.");
    if entry.address.is_some() {
        return Some(srv_of(port.port, &below, query).into_iter().collect());
    }
    let all = port.endpoints.iter().filter_map(|(address, target)| {
        let host = entry
            .hosts
            .iter()
            .find(|h| h.address == *address)
            .and_then(|h| h.hostname.clone());
        srv_of(
            *target,
            &format!("{}.{below}", host.unwrap_or_else(|| dashed(*address))),
            query,
        )
    });
    Some(all.collect())
}

fn srv_of(port: u16, target: &str, query: &Query) -> Option<Record> {
    let target = Name::from_str(target).ok()?;
    Some(record(query, RData::SRV(SRV::new(0, 100, port, target))))
}

/// `Some(None)` = one of our addresses without a name, `None` = not our address.
fn reverse(table: &Table, name: &str, query: &Query) -> Option<Option<Vec<Record>>> {
    let mut octets: Vec<&str> = name.strip_suffix(".in-addr.arpa")?.split('.').collect();
    octets.reverse();
    let address: Ipv4Addr = octets.join(".").parse().ok()?;
    let ours = matches!(address.octets(), [10, 96 | 244, ..]);
    if !ours {
        return None;
    }
    let owner = table.iter().find_map(|((namespace, service), entry)| {
        let below = format!("{service}.{namespace}.svc.cluster.local.");
        if entry.address == Some(address) {
            return Some(below);
        }
        let headless = entry.address.is_none();
        let host = entry
            .hosts
            .iter()
            .find(|h| headless && h.address == address)?;
        Some(format!(
            "{}.{below}",
            host.hostname.clone().unwrap_or_else(|| dashed(address))
        ))
    });
    let pointer = owner
        .and_then(|owner| Name::from_str(&owner).ok())
        .map(|name| vec![record(query, RData::PTR(PTR(name)))]);
    Some(pointer)
}

fn authority() -> Option<Record> {
    let name = |text| Name::from_str(text).ok();
    let soa = SOA::new(
        name("ns.dns.cluster.local.")?,
        name("hostmaster.cluster.local.")?,
        1,
        7200,
        1800,
        86400,
        TTL,
    );
    Some(Record::from_rdata(
        name("cluster.local.")?,
        TTL,
        RData::SOA(soa),
    ))
}

fn reply(request: &Message) -> Message {
    let mut response = Message::response(request.metadata.id, request.metadata.op_code);
    response.metadata = Metadata::response_from_request(&request.metadata);
    response.metadata.recursion_available = true;
    response.queries = request.queries.clone();
    response
}

fn failure(request: &Message, code: ResponseCode) -> Message {
    let mut response = reply(request);
    response.metadata.response_code = code;
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::{Host, Kind, Port};

    fn table() -> Table {
        let port = |endpoints: Vec<(Ipv4Addr, u16)>| Port {
            name: "http".into(),
            port: 80,
            transport: Transport::Tcp,
            node_port: None,
            endpoints,
        };
        let base = Entry {
            kind: Kind::Cluster,
            address: None,
            external_name: None,
            ports: vec![],
            hosts: vec![],
            affinity: None,
        };
        let pod = Ipv4Addr::new(10, 244, 0, 5);
        let cluster = Entry {
            address: Some(Ipv4Addr::new(10, 96, 3, 4)),
            ports: vec![port(vec![])],
            ..base.clone()
        };
        let hosts = vec![Host {
            address: pod,
            hostname: Some("db-0".into()),
        }];
        let headless = Entry {
            ports: vec![port(vec![(pod, 8080)])],
            hosts,
            ..base.clone()
        };
        let external = Entry {
            external_name: Some("example.org".into()),
            ..base.clone()
        };
        let alias = |of: &str| Entry {
            external_name: Some(format!("{of}.default.svc.cluster.local")),
            ..base.clone()
        };
        let name = |n: &str| ("default".to_owned(), n.to_owned());
        [
            (name("reviews"), cluster),
            (name("db"), headless),
            (name("out"), external),
            (name("alias"), alias("reviews")),
            (name("circle"), alias("circle")),
        ]
        .into()
    }

    fn ask(name: &str, kind: RecordType) -> Option<(ResponseCode, Vec<String>)> {
        let mut request = Message::query();
        request.add_query(Query::query(Name::from_str(name).unwrap(), kind));
        let response = answer(&table(), &request)?;
        let data = response
            .answers
            .iter()
            .map(|r| r.data.to_string())
            .collect();
        Some((response.metadata.response_code, data))
    }

    #[test]
    fn services_answer_by_their_kind() {
        let ok = |records: &[&str]| {
            Some((
                ResponseCode::NoError,
                records.iter().map(|r| (*r).to_owned()).collect::<Vec<_>>(),
            ))
        };
        assert_eq!(
            ask("Reviews.default.svc.cluster.local.", RecordType::A),
            ok(&["10.96.3.4"])
        );
        assert_eq!(
            ask("reviews.default.svc.cluster.local.", RecordType::AAAA),
            ok(&[])
        );
        assert_eq!(
            ask("db.default.svc.cluster.local.", RecordType::A),
            ok(&["10.244.0.5"])
        );
        assert_eq!(
            ask("db-0.db.default.svc.cluster.local.", RecordType::A),
            ok(&["10.244.0.5"])
        );
        assert_eq!(
            ask("out.default.svc.cluster.local.", RecordType::A),
            ok(&["example.org."])
        );
        assert_eq!(
            ask("alias.default.svc.cluster.local.", RecordType::A),
            ok(&["reviews.default.svc.cluster.local.", "10.96.3.4"])
        );
        assert_eq!(
            ask("circle.default.svc.cluster.local.", RecordType::A)
                .unwrap()
                .1
                .len(),
            1 + MAX_ALIASES
        );
        assert_eq!(
            ask("_http._tcp.db.default.svc.cluster.local.", RecordType::SRV),
            ok(&["0 100 8080 db-0.db.default.svc.cluster.local."])
        );
        assert_eq!(
            ask("10-244-0-9.default.pod.cluster.local.", RecordType::A),
            ok(&["10.244.0.9"])
        );
        assert_eq!(
            ask("4.3.96.10.in-addr.arpa.", RecordType::PTR),
            ok(&["reviews.default.svc.cluster.local."])
        );
    }

    #[test]
    fn what_does_not_exist_is_said_so_and_the_rest_is_forwarded() {
        for name in [
            "nope.default.svc.cluster.local.",
            "a.b.c.d.e.f.svc.cluster.local.",
            "reviews.default.svc.cluster.local.cluster.local.",
        ] {
            assert_eq!(
                ask(name, RecordType::A).unwrap().0,
                ResponseCode::NXDomain,
                "{name}"
            );
        }
        assert_eq!(ask("example.org.", RecordType::A), None);
        assert_eq!(ask("notcluster.local.", RecordType::A), None);
        assert_eq!(ask("1.0.0.127.in-addr.arpa.", RecordType::PTR), None);
    }
}
