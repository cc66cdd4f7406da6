//! HTTP/2 clients that mean harm: each ends its own connection, or nothing, and never another one's.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::config::{action, cluster, http_listener, prefix, route_to, state, table};
use crate::stage::{App, Client, Proxy, free_port};

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const CALM: u32 = 11;
/// No flood sends more than so many frames.
const MOST: u32 = 50_000;

/// `GET http://a/` in HPACK, all from the static table but the authority.
const GET: &[u8] = &[0x82, 0x86, 0x84, 0x41, 1, b'a'];
/// The same as a POST.
const POST: &[u8] = &[0x83, 0x86, 0x84, 0x41, 1, b'a'];

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let len = (payload.len() as u32).to_be_bytes();
    [&len[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

struct Attacker(TcpStream);

/// How a connection ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// A GOAWAY with an error.
    Away(u32),
    /// A stream was reset with an error.
    Reset(u32),
    /// Headers of a response, as they came.
    Answer(Vec<u8>),
    Closed,
}

impl Attacker {
    fn connect(at: SocketAddr) -> Self {
        let mut stream = TcpStream::connect(at).expect("a connection");
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .expect("a timeout");
        stream
            .set_write_timeout(Some(Duration::from_secs(2)))
            .expect("a timeout");
        stream
            .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            .expect("written");
        stream
            .write_all(&frame(SETTINGS, 0, 0, &[]))
            .expect("written");
        Self(stream)
    }

    /// Sends frames until the other side no longer takes them, many in one write. True if it took all of them.
    fn flood(&mut self, mut make: impl FnMut(u32) -> Vec<u8>) -> bool {
        let mut n = 0;
        while n < MOST {
            let mut batch = Vec::new();
            for _ in 0..500 {
                batch.extend(make(n));
                n += 1;
            }
            if self.0.write_all(&batch).is_err() {
                return false;
            }
        }
        true
    }

    /// The end of the connection or of a stream. Settings, pings and window updates are passed over.
    fn end(&mut self) -> End {
        loop {
            let mut head = [0; 9];
            if self.0.read_exact(&mut head).is_err() {
                return End::Closed;
            }
            let len = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; len as usize];
            if self.0.read_exact(&mut payload).is_err() {
                return End::Closed;
            }
            let code =
                |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().expect("four"));
            match head[3] {
                GOAWAY if code(4) != 0 => return End::Away(code(4)),
                RST_STREAM if code(0) != 0 => return End::Reset(code(0)),
                HEADERS => return End::Answer(payload),
                _ => {}
            }
        }
    }

    /// The same, but only the end of the whole connection.
    fn end_of_connection(&mut self) -> End {
        loop {
            match self.end() {
                End::Reset(_) | End::Answer(_) => {}
                end => return end,
            }
        }
    }
}

struct Scene {
    at: SocketAddr,
    app: App,
    _proxy: Proxy,
}

impl Scene {
    fn start() -> Self {
        let (at, app) = (free_port(), App::start("a"));
        let routes = table(vec![route_to(prefix("/"), action("a"))]);
        let proxy = Proxy::start(&state(
            vec![http_listener(at, |_| {})],
            routes,
            vec![cluster("a", &[app.address])],
        ));
        Self {
            at,
            app,
            _proxy: proxy,
        }
    }

    /// Somebody else is served as before.
    fn check_bystander(&self) {
        assert_eq!(Client::connect(self.at).get("/bystander", "").status, 200);
    }
}

fn is_calm(end: &End) -> bool {
    matches!(end, End::Away(CALM) | End::Closed)
}

#[test]
fn rapid_resets_are_counted() {
    let scene = Scene::start();
    let mut attacker = Attacker::connect(scene.at);
    attacker.flood(|n| {
        let stream = 2 * n + 1;
        let cancel = 8_u32.to_be_bytes();
        [
            frame(HEADERS, END_HEADERS | END_STREAM, stream, GET),
            frame(RST_STREAM, 0, stream, &cancel),
        ]
        .concat()
    });
    let end = attacker.end_of_connection();
    assert!(is_calm(&end), "{end:?}");
    scene.check_bystander();
}

#[test]
fn resets_that_a_client_makes_us_send_are_counted() {
    let scene = Scene::start();
    let mut attacker = Attacker::connect(scene.at);
    let head = [POST, &[0x0f, 0x0d, 1, b'2']].concat();
    attacker.flood(|n| {
        let stream = 2 * n + 1;
        // More than the announced length is an error of the stream (RFC 9113 section 8.1.1).
        [
            frame(HEADERS, END_HEADERS, stream, &head),
            frame(DATA, END_STREAM, stream, b"xyz"),
        ]
        .concat()
    });
    let end = attacker.end_of_connection();
    assert!(is_calm(&end), "{end:?}");
    scene.check_bystander();
}

#[test]
fn headers_without_end_end_the_connection() {
    let scene = Scene::start();
    let mut attacker = Attacker::connect(scene.at);
    let took_all = {
        let start = frame(HEADERS, 0, 1, GET);
        attacker.0.write_all(&start).expect("written");
        // A header that is not indexed: name `a`, value of 100 bytes.
        let header = [&[0, 1, b'a', 100][..], &[b'x'; 100]].concat();
        attacker.flood(|_| frame(CONTINUATION, 0, 1, &header))
    };
    assert!(!took_all, "all of them were taken");
    let end = attacker.end_of_connection();
    assert!(is_calm(&end) || matches!(end, End::Away(_)), "{end:?}");
    assert_eq!(scene.app.connections.load(Ordering::Relaxed), 0);
    scene.check_bystander();
}

#[test]
fn headers_that_unfold_are_counted_unfolded() {
    let scene = Scene::start();
    let mut attacker = Attacker::connect(scene.at);
    // One header of 3 KB goes into the table, then it is named 5,000 times: 15 MB out of 8 KB.
    let value = vec![b'x'; 3000];
    let mut block = GET.to_vec();
    block.extend([0x40, 1, b'b', 0x7f]);
    block.extend([0xb9, 0x16]);
    block.extend(&value);
    block.extend(vec![0xbe; 5000]);
    attacker
        .0
        .write_all(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &block))
        .expect("written");
    let end = attacker.end();
    // 431 is not in the static table: index of `:status` with a literal value.
    let too_large = |payload: &[u8]| !payload.starts_with(&[0x88]);
    assert!(
        match &end {
            End::Answer(payload) => too_large(payload),
            _ => true,
        },
        "{end:?}"
    );
    assert_eq!(scene.app.connections.load(Ordering::Relaxed), 0);
    scene.check_bystander();
}

#[test]
fn empty_frames_end_the_connection_or_change_nothing() {
    let scene = Scene::start();
    let mut attacker = Attacker::connect(scene.at);
    let start = frame(HEADERS, END_HEADERS, 1, POST);
    attacker.0.write_all(&start).expect("written");
    attacker.flood(|_| frame(DATA, 0, 1, &[]));
    scene.check_bystander();
}

#[test]
fn floods_of_control_frames_end_the_connection() {
    for make in [
        frame(PING, 0, 0, &[7; 8]),
        frame(SETTINGS, 0, 0, &[]),
        frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]),
        // PRIORITY of a stream that does not exist.
        frame(2, 0, 1, &[0, 0, 0, 3, 1]),
    ] {
        let scene = Scene::start();
        let mut attacker = Attacker::connect(scene.at);
        attacker.flood(|_| make.clone());
        let end = attacker.end_of_connection();
        assert!(matches!(end, End::Closed | End::Away(_)), "{end:?}");
        scene.check_bystander();
    }
}

#[test]
fn what_http1_could_not_say_is_an_error_of_the_stream() {
    let scene = Scene::start();
    let literal = |name: &str, value: &str| {
        let mut out = vec![0, name.len() as u8];
        out.extend(name.as_bytes());
        out.push(value.len() as u8);
        out.extend(value.as_bytes());
        out
    };
    let with = |name: &str, value: &str| [GET, &literal(name, value)].concat();
    let heads = [
        with("x-a", "b\r\nx-c: d"),
        with("x-a", "b\0c"),
        with("connection", "close"),
        with("transfer-encoding", "chunked"),
        with("te", "gzip"),
        with("X-Upper", "a"),
        with("host", "other"),
        // `:path` with a space.
        [&[0x82, 0x86, 0x04, 4][..], b"/a b", &[0x41, 1, b'a']].concat(),
        // No path at all.
        [0x82, 0x86, 0x41, 1, b'a'].to_vec(),
        // A length without a body.
        with("content-length", "5"),
    ];
    for head in heads {
        let mut attacker = Attacker::connect(scene.at);
        let request = frame(HEADERS, END_HEADERS | END_STREAM, 1, &head);
        attacker.0.write_all(&request).expect("written");
        let end = attacker.end();
        // 400 is in the static table.
        let refused = match &end {
            End::Answer(payload) => payload.first() == Some(&0x8c),
            _ => true,
        };
        assert!(refused, "{end:?} for {head:?}");
    }
    assert_eq!(
        scene.app.connections.load(Ordering::Relaxed),
        0,
        "something was forwarded"
    );
    scene.check_bystander();
}

#[test]
fn a_body_of_another_length_than_announced_is_an_error() {
    let scene = Scene::start();
    let head = [POST, &[0x0f, 0x0d, 1, b'2']].concat();
    for data in [&b"x"[..], b"xyz"] {
        let mut attacker = Attacker::connect(scene.at);
        let request = [
            frame(HEADERS, END_HEADERS, 1, &head),
            frame(DATA, END_STREAM, 1, data),
        ]
        .concat();
        attacker.0.write_all(&request).expect("written");
        let end = attacker.end();
        assert!(
            matches!(end, End::Reset(1) | End::Away(1)),
            "{end:?} for {data:?}"
        );
    }
    scene.check_bystander();
}

#[test]
fn more_streams_than_allowed_are_refused() {
    let scene = Scene::start();
    let mut attacker = Attacker::connect(scene.at);
    // 101 requests that never end.
    for n in 0..101_u32 {
        let request = frame(HEADERS, END_HEADERS, 2 * n + 1, POST);
        attacker.0.write_all(&request).expect("written");
    }
    let end = attacker.end();
    assert!(matches!(end, End::Reset(7) | End::Away(_)), "{end:?}");
    scene.check_bystander();
}
