//! A stub resolver (RFC 1034 section 5.3.1): asks the name servers of `resolv.conf(5)`, after `/etc/hosts`. Unlike the C library's it tells how
//! long an answer holds, and needs no thread.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use mesh_routing::cluster::Families;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

/// Largest answer over UDP that is read; longer ones come cut, and are asked for over TCP.
const LARGEST_DATAGRAM: usize = 4096;
/// Addresses of one name that are used.
const MOST_ADDRESSES: usize = 256;
/// Name servers and search domains that are used (as in the C library).
const MOST_SERVERS: usize = 3;
const MOST_DOMAINS: usize = 6;

/// Why a name has no addresses.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResolveError {
    /// It cannot be a name.
    #[error("is not a name: {0}")]
    Name(String),
    /// Nobody knows it.
    #[error("no such name, or it has no address of the wanted family")]
    NotFound,
    /// A server did not help.
    #[error("name server {server}: {reason}")]
    Server {
        /// Which.
        server: SocketAddr,
        /// What it did.
        reason: String,
    },
}

/// The addresses of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    /// Sorted, so that another order is no change.
    pub(crate) addresses: Vec<IpAddr>,
    /// How long they hold; `None` where that is not said.
    pub(crate) ttl: Option<Duration>,
}

/// What the system's files say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Resolver {
    servers: Vec<SocketAddr>,
    search: Vec<String>,
    /// A name of so many dots is tried as it is before the search domains.
    dots: usize,
    timeout: Duration,
    attempts: u32,
    hosts: HashMap<String, Vec<IpAddr>>,
}

impl Resolver {
    /// From the files as they are now. Files that cannot be read are as good as empty.
    pub(crate) fn of_system() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        Self::parse(&read("/etc/resolv.conf"), &read("/etc/hosts"))
    }

    fn parse(config: &str, hosts: &str) -> Self {
        let mut resolver = Self {
            servers: Vec::new(),
            search: Vec::new(),
            dots: 1,
            timeout: Duration::from_secs(5),
            attempts: 2,
            hosts: HashMap::new(),
        };
        for line in config.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => {
                    let server = words.next().and_then(|ip| ip.parse().ok());
                    resolver
                        .servers
                        .extend(server.map(|ip| SocketAddr::new(ip, 53)));
                }
                Some("search" | "domain") => {
                    resolver.search = words.take(MOST_DOMAINS).map(str::to_owned).collect();
                }
                Some("options") => words.for_each(|option| resolver.option(option)),
                _ => {}
            }
        }
        resolver.servers.truncate(MOST_SERVERS);
        if resolver.servers.is_empty() {
            resolver
                .servers
                .push(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 53));
        }
        for line in hosts.lines() {
            let mut words = line.split('#').next().unwrap_or("").split_whitespace();
            if let Some(ip) = words.next().and_then(|ip| ip.parse::<IpAddr>().ok()) {
                for name in words {
                    let known = resolver.hosts.entry(name.to_ascii_lowercase());
                    known.or_default().push(ip);
                }
            }
        }
        resolver
    }

    fn option(&mut self, option: &str) {
        let Some((name, value)) = option.split_once(':') else {
            return;
        };
        // Limits of the C library.
        match (name, value.parse::<u32>()) {
            ("ndots", Ok(value)) => self.dots = value.min(15) as usize,
            ("timeout", Ok(value)) => self.timeout = Duration::from_secs(value.clamp(1, 30).into()),
            ("attempts", Ok(value)) => self.attempts = value.clamp(1, 5),
            _ => {}
        }
    }

    /// Looks a name up.
    pub(crate) async fn look_up(
        &self,
        name: &str,
        families: Families,
    ) -> Result<Answer, ResolveError> {
        let plain = name.trim_end_matches('.').to_ascii_lowercase();
        if let Some(found) = self.known(&plain, families) {
            return Ok(found);
        }
        let mut missing = ResolveError::NotFound;
        for candidate in self.candidates(name) {
            let candidate = Name::from_str(&candidate)
                .map_err(|error| ResolveError::Name(format!("{candidate}: {error}")))?;
            match self.ask_all(&candidate, families).await {
                Ok(answer) => return Ok(answer),
                Err(error) => missing = error,
            }
        }
        Err(missing)
    }

    /// From the hosts file; `localhost` is this machine in any case (RFC 6761 section 6.3).
    fn known(&self, name: &str, families: Families) -> Option<Answer> {
        let local = [
            IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(Ipv6Addr::LOCALHOST),
        ];
        let found = match self.hosts.get(name) {
            Some(found) => found.as_slice(),
            None if name == "localhost" => &local,
            None => return None,
        };
        choose(found.to_vec(), families, None)
    }

    /// The absolute names that a name may stand for, in order.
    fn candidates(&self, name: &str) -> Vec<String> {
        if name.ends_with('.') {
            return vec![name.to_owned()];
        }
        let domains = self.search.iter();
        let mut all: Vec<String> = domains
            .map(|domain| format!("{name}.{}.", domain.trim_matches('.')))
            .collect();
        let at = match name.matches('.').count() >= self.dots {
            true => 0,
            false => all.len(),
        };
        all.insert(at, format!("{name}."));
        all
    }

    async fn ask_all(&self, name: &Name, families: Families) -> Result<Answer, ResolveError> {
        let kinds: &[RecordType] = match families {
            Families::V4 => &[RecordType::A],
            Families::V6 => &[RecordType::AAAA],
            Families::PreferV4 => &[RecordType::A, RecordType::AAAA],
            Families::PreferV6 | Families::All => &[RecordType::AAAA, RecordType::A],
        };
        let (mut addresses, mut ttl, mut failed) = (Vec::new(), None, None);
        for kind in kinds {
            match self.ask(name, *kind).await {
                Ok((found, life)) => {
                    ttl = match (ttl, life) {
                        (Some(a), Some(b)) => Some(std::cmp::min::<Duration>(a, b)),
                        (a, b) => a.or(b),
                    };
                    addresses.extend(found);
                }
                Err(error) => failed = Some(error),
            }
            let enough = matches!(families, Families::PreferV4 | Families::PreferV6);
            if enough && !addresses.is_empty() {
                break;
            }
        }
        // One family's answer is good enough where the other one's failed.
        match (choose(addresses, families, ttl), failed) {
            (Some(answer), _) => Ok(answer),
            (None, failed) => Err(failed.unwrap_or(ResolveError::NotFound)),
        }
    }

    /// One question to one server after the other. An answer without addresses is an answer.
    async fn ask(
        &self,
        name: &Name,
        kind: RecordType,
    ) -> Result<(Vec<IpAddr>, Option<Duration>), ResolveError> {
        let mut failed = ResolveError::NotFound;
        for _ in 0..self.attempts {
            for server in &self.servers {
                let asking = tokio::time::timeout(self.timeout, exchange(*server, name, kind));
                let reason = match asking.await {
                    Ok(Ok(message)) => match message.metadata.response_code {
                        ResponseCode::NoError | ResponseCode::NXDomain => {
                            return Ok(addresses(&message));
                        }
                        code => code.to_string(),
                    },
                    Ok(Err(error)) => error.to_string(),
                    Err(_) => "no answer in time".to_owned(),
                };
                failed = ResolveError::Server {
                    server: *server,
                    reason,
                };
            }
        }
        Err(failed)
    }
}

/// The addresses of the wanted families, sorted; `None` where there are none.
fn choose(mut found: Vec<IpAddr>, families: Families, ttl: Option<Duration>) -> Option<Answer> {
    let has = |v4: bool| found.iter().any(|ip| ip.is_ipv4() == v4);
    let v4 = match families {
        Families::V4 => Some(true),
        Families::V6 => Some(false),
        Families::PreferV4 => Some(has(true)),
        Families::PreferV6 => Some(!has(false)),
        Families::All => None,
    };
    found.retain(|ip| v4.is_none_or(|v4| ip.is_ipv4() == v4));
    found.sort_unstable();
    found.dedup();
    found.truncate(MOST_ADDRESSES);
    (!found.is_empty()).then_some(Answer {
        addresses: found,
        ttl,
    })
}

/// All addresses of an answer, whatever aliases lead to them, and the shortest time to live.
fn addresses(message: &Message) -> (Vec<IpAddr>, Option<Duration>) {
    let address = |data: &RData| match data {
        RData::A(a) => Some(IpAddr::V4(a.0)),
        RData::AAAA(aaaa) => Some(IpAddr::V6(aaaa.0)),
        _ => None,
    };
    let answers = message.answers.iter();
    let found: Vec<IpAddr> = answers.filter_map(|record| address(&record.data)).collect();
    let ttl = message.answers.iter().map(|record| record.ttl).min();
    (found, ttl.map(|ttl| Duration::from_secs(ttl.into())))
}

/// Over UDP; over TCP where the answer is cut (RFC 7766 section 5).
async fn exchange(server: SocketAddr, name: &Name, kind: RecordType) -> std::io::Result<Message> {
    let mut question = Message::query();
    question.metadata.id = rand::random();
    question.metadata.recursion_desired = true;
    question.add_query(Query::query(name.clone(), kind));
    let bytes = question.to_vec().map_err(std::io::Error::other)?;
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    // Connected: nobody else's datagrams are received.
    socket.connect(server).await?;
    socket.send(&bytes).await?;
    let mut buffer = vec![0; LARGEST_DATAGRAM];
    loop {
        let length = socket.recv(&mut buffer).await?;
        match Message::from_vec(buffer.get(..length).unwrap_or_default()) {
            Ok(answer) if fits(&question, &answer) && answer.metadata.truncation => {
                return exchange_tcp(server, &question, &bytes).await;
            }
            Ok(answer) if fits(&question, &answer) => return Ok(answer),
            // Late or forged: the right one may still come.
            _ => {}
        }
    }
}

fn fits(question: &Message, answer: &Message) -> bool {
    answer.metadata.id == question.metadata.id && answer.queries == question.queries
}

async fn exchange_tcp(
    server: SocketAddr,
    question: &Message,
    bytes: &[u8],
) -> std::io::Result<Message> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(bytes.len()).map_err(std::io::Error::other)?;
    stream
        .write_all(&[&length.to_be_bytes(), bytes].concat())
        .await?;
    let length = stream.read_u16().await?;
    let mut buffer = vec![0; length.into()];
    stream.read_exact(&mut buffer).await?;
    let answer = Message::from_vec(&buffer).map_err(std::io::Error::other)?;
    match fits(question, &answer) {
        true => Ok(answer),
        false => Err(std::io::Error::other("the answer is to another question")),
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::rr::Record;
    use hickory_proto::rr::rdata::{A, AAAA, CNAME};
    use tokio::net::TcpListener;

    use super::*;

    /// A name server for `a.test.` (two addresses, behind an alias), `six.test.` (IPv6 only) and `long.test.` (cut over UDP).
    async fn server() -> SocketAddr {
        let (udp, tcp, address) = loop {
            let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let address = udp.local_addr().unwrap();
            // The same port may be taken for TCP.
            if let Ok(tcp) = TcpListener::bind(address).await {
                break (udp, tcp, address);
            }
        };
        tokio::spawn(async move {
            let mut buffer = vec![0; 512];
            loop {
                let (length, from) = udp.recv_from(&mut buffer).await.unwrap();
                // Garbage and an answer to another question come first.
                udp.send_to(&[0; 5], from).await.unwrap();
                let mut wrong = answer(&buffer[..length], true);
                wrong.metadata.id ^= 1;
                udp.send_to(&wrong.to_vec().unwrap(), from).await.unwrap();
                let right = answer(&buffer[..length], true).to_vec().unwrap();
                udp.send_to(&right, from).await.unwrap();
            }
        });
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = tcp.accept().await.unwrap();
                let mut bytes = vec![0; stream.read_u16().await.unwrap().into()];
                stream.read_exact(&mut bytes).await.unwrap();
                let bytes = answer(&bytes, false).to_vec().unwrap();
                stream.write_u16(bytes.len() as u16).await.unwrap();
                stream.write_all(&bytes).await.unwrap();
            }
        });
        address
    }

    fn answer(question: &[u8], udp: bool) -> Message {
        let question = Message::from_vec(question).unwrap();
        let mut answer = Message::response(question.metadata.id, question.metadata.op_code);
        let query = question.queries[0].clone();
        let mut put = |ttl, data| {
            answer.add_answer(Record::from_rdata(query.name().clone(), ttl, data));
        };
        let v4 = |last| RData::A(A(Ipv4Addr::new(10, 0, 0, last)));
        match (query.name().to_string().as_str(), query.query_type()) {
            ("a.test.", RecordType::A) => {
                put(300, RData::CNAME(CNAME(Name::from_str("b.test.").unwrap())));
                put(30, v4(2));
                put(60, v4(1));
            }
            ("six.test.", RecordType::AAAA) => put(5, RData::AAAA(AAAA(Ipv6Addr::LOCALHOST))),
            ("long.test.", RecordType::A) if udp => answer.metadata.truncation = true,
            ("long.test.", RecordType::A) => (1..=200).for_each(|i| put(7, v4(i))),
            ("a.test." | "six.test." | "long.test.", _) => {}
            ("bad.test.", _) => answer.metadata.response_code = ResponseCode::ServFail,
            _ => answer.metadata.response_code = ResponseCode::NXDomain,
        }
        answer.add_query(query);
        answer
    }

    #[tokio::test]
    async fn names_are_looked_up_with_their_time_to_live() {
        let mut resolver = Resolver::parse("search x.test test\n", "10.9.9.9 fixed Fixed2 # c\n");
        resolver.servers = vec![server().await];
        let look_up = async |name: &str, families| {
            let answer = resolver.look_up(name, families).await;
            answer.map(|a| {
                let ips: Vec<_> = a.addresses.iter().map(IpAddr::to_string).collect();
                (ips.join(" "), a.ttl.map(|ttl| ttl.as_secs()))
            })
        };
        let two = ("10.0.0.1 10.0.0.2".to_owned(), Some(30));
        for name in ["a.test", "a.test.", "a", "A.Test"] {
            assert_eq!(
                look_up(name, Families::V4).await.ok(),
                Some(two.clone()),
                "{name}"
            );
        }
        for families in [Families::PreferV4, Families::PreferV6, Families::All] {
            assert_eq!(look_up("a.test", families).await.ok(), Some(two.clone()));
            let six = ("::1".to_owned(), Some(5));
            assert_eq!(look_up("six.test", families).await.ok(), Some(six));
        }
        let (many, _) = look_up("long.test", Families::V4).await.expect("over TCP");
        assert_eq!(many.split(' ').count(), 200);
        for name in ["fixed", "fixed2"] {
            let fixed = ("10.9.9.9".to_owned(), None);
            assert_eq!(look_up(name, Families::V4).await.ok(), Some(fixed));
        }
        assert!(look_up("localhost", Families::V4).await.is_ok());
        for (name, families) in [("none.test", Families::All), ("six.test", Families::V4)] {
            let error = look_up(name, families).await.expect_err("nothing");
            assert!(matches!(error, ResolveError::NotFound), "{error}");
        }
        let error = look_up("bad.test.", Families::V4)
            .await
            .expect_err("a failure");
        assert!(
            error.to_string().contains("name server 127.0.0.1"),
            "{error}"
        );
        assert!(look_up("a..b", Families::V4).await.is_err());
    }

    #[test]
    fn the_files_of_the_system() {
        let text = "# a comment\nnameserver 10.96.0.10\nnameserver fd00::1\nsearch ns.svc.cluster.local svc.cluster.local\n\
                    options ndots:5 timeout:2 attempts:3 edns0\n";
        let resolver = Resolver::parse(text, "");
        let servers: Vec<SocketAddr> = ["10.96.0.10:53", "[fd00::1]:53"]
            .map(|s| s.parse().unwrap())
            .into();
        assert_eq!(resolver.servers, servers);
        assert_eq!(
            (resolver.timeout, resolver.attempts),
            (Duration::from_secs(2), 3)
        );
        let expected = [
            "a.b.ns.svc.cluster.local.",
            "a.b.svc.cluster.local.",
            "a.b.",
        ];
        assert_eq!(resolver.candidates("a.b"), expected);
        assert_eq!(resolver.candidates("a.b.c.d.e.f")[0], "a.b.c.d.e.f.");
        assert_eq!(resolver.candidates("a."), ["a."]);
        assert_eq!(
            Resolver::parse("", "").servers,
            ["127.0.0.1:53".parse().unwrap()]
        );
    }
}
