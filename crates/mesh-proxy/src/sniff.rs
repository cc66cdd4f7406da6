//! What the first bytes of a connection are, with the meaning of Envoy's TLS and HTTP inspectors.

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Protocol {
    /// A TLS ClientHello with its server name and ALPN names.
    Tls {
        /// SNI, lower case.
        server_name: Option<String>,
        /// ALPN.
        applications: Vec<String>,
    },
    /// HTTP/1.0.
    Http10,
    /// HTTP/1.1.
    Http11,
    /// The HTTP/2 preface.
    Http2,
    /// Something else.
    Other,
}

/// The preface of HTTP/2 (RFC 9113 section 3.4).
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Request lines longer than this are not HTTP that we would accept anyway.
pub const LONGEST: usize = 64 * 1024;

/// Judges the bytes so far; `None` asks for more.
pub fn judge(bytes: &[u8]) -> Option<Protocol> {
    let first = *bytes.first()?;
    if first == 0x16 {
        return judge_tls(bytes);
    }
    if bytes.starts_with(PREFACE) {
        return Some(Protocol::Http2);
    }
    if PREFACE.starts_with(bytes) {
        return None;
    }
    judge_http1(bytes)
}

/// A request line: method, target, version.
fn judge_http1(bytes: &[u8]) -> Option<Protocol> {
    let token = |b: &u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(b);
    let method = bytes.iter().take_while(|b| token(b)).count();
    if method == 0 || method > 32 {
        return Some(Protocol::Other);
    }
    match bytes.get(method) {
        None => return None,
        Some(b' ') => {}
        Some(_) => return Some(Protocol::Other),
    }
    let Some(end) = bytes.iter().position(|b| *b == b'\n') else {
        return if bytes.len() > LONGEST {
            Some(Protocol::Other)
        } else {
            None
        };
    };
    let line = bytes.get(..end).unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    Some(match () {
        () if line.ends_with(b" HTTP/1.1") => Protocol::Http11,
        () if line.ends_with(b" HTTP/1.0") => Protocol::Http10,
        () => Protocol::Other,
    })
}

/// A ClientHello (RFC 8446 section 4.1.2) that may be spread over several records.
fn judge_tls(bytes: &[u8]) -> Option<Protocol> {
    let mut hello = Vec::new();
    let mut rest = bytes;
    loop {
        let Some((header, tail)) = rest.split_first_chunk::<5>() else {
            return more_or_other(bytes);
        };
        let [kind, major, _, high, low] = *header;
        if kind != 0x16 || major != 3 {
            return Some(Protocol::Other);
        }
        let len = usize::from(u16::from_be_bytes([high, low]));
        let Some((record, tail)) = tail.split_at_checked(len) else {
            return more_or_other(bytes);
        };
        hello.extend_from_slice(record);
        rest = tail;
        match hello.as_slice() {
            [1, a, b, c, body @ ..] => {
                let wanted = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
                if wanted > LONGEST {
                    return Some(Protocol::Other);
                }
                if let Some(body) = body.get(..wanted) {
                    return Some(parse_hello(body).unwrap_or(Protocol::Other));
                }
            }
            [1, ..] | [] => {}
            _ => return Some(Protocol::Other),
        }
    }
}

fn more_or_other(bytes: &[u8]) -> Option<Protocol> {
    (bytes.len() > LONGEST).then_some(Protocol::Other)
}

/// A reader of length-prefixed fields.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(taken)
    }

    fn number(&mut self, bytes: usize) -> Option<usize> {
        Some(
            self.take(bytes)?
                .iter()
                .fold(0, |n, b| n << 8 | usize::from(*b)),
        )
    }

    fn block(&mut self, length_bytes: usize) -> Option<Reader<'a>> {
        let len = self.number(length_bytes)?;
        self.take(len).map(Reader)
    }
}

fn parse_hello(body: &[u8]) -> Option<Protocol> {
    let mut hello = Reader(body);
    hello.take(2 + 32)?;
    hello.block(1)?;
    hello.block(2)?;
    hello.block(1)?;
    let (mut server_name, mut applications) = (None, Vec::new());
    let mut extensions = hello.block(2).unwrap_or(Reader(&[]));
    while let Some(kind) = extensions.number(2) {
        let mut content = extensions.block(2)?;
        match kind {
            0 => server_name = parse_server_name(&mut content),
            16 => {
                let mut names = content.block(2)?;
                while let Some(name) = names.block(1) {
                    applications.push(String::from_utf8_lossy(name.0).into_owned());
                }
            }
            _ => {}
        }
    }
    Some(Protocol::Tls {
        server_name,
        applications,
    })
}

fn parse_server_name(content: &mut Reader<'_>) -> Option<String> {
    let mut list = content.block(2)?;
    let kind = list.number(1)?;
    let name = list.block(2)?;
    (kind == 0).then(|| String::from_utf8_lossy(name.0).to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_http_versions_apart() {
        assert_eq!(judge(b""), None);
        assert_eq!(judge(b"GE"), None);
        assert_eq!(judge(b"GET /x HTTP/1.1\r\n"), Some(Protocol::Http11));
        assert_eq!(judge(b"GET /x HTTP/1.0\n"), Some(Protocol::Http10));
        assert_eq!(judge(b"PRI * HTTP/2.0\r\n"), None);
        assert_eq!(judge(PREFACE), Some(Protocol::Http2));
        assert_eq!(judge(b"\x00\x01binary"), Some(Protocol::Other));
        assert_eq!(judge(b"HELLO world\r\n"), Some(Protocol::Other));
        assert_eq!(judge(b"no-space:"), Some(Protocol::Other));
    }

    /// A ClientHello with SNI and ALPN, written out field by field.
    fn client_hello(name: &str, alpn: &str) -> Vec<u8> {
        let prefixed = |bytes: usize, content: &[u8]| {
            let len = (content.len() as u32).to_be_bytes();
            [&len[4 - bytes..], content].concat()
        };
        let sni = prefixed(2, &[&[0][..], &prefixed(2, name.as_bytes())].concat());
        let alpn = prefixed(2, &prefixed(1, alpn.as_bytes()));
        let extensions = [
            &[0, 0][..],
            &prefixed(2, &sni),
            &[0, 16],
            &prefixed(2, &alpn),
        ]
        .concat();
        let body = [
            &[3, 3][..],
            &[7; 32],
            &[0],
            &prefixed(2, &[0x13, 1]),
            &prefixed(1, &[0]),
            &prefixed(2, &extensions),
        ]
        .concat();
        let handshake = [&[1][..], &prefixed(3, &body)].concat();
        [&[0x16, 3, 1][..], &prefixed(2, &handshake)].concat()
    }

    #[test]
    fn reads_a_client_hello_byte_by_byte() {
        let hello = client_hello("Reviews.Example.com", "h2");
        for n in 0..hello.len() {
            assert_eq!(judge(&hello[..n]), None, "after {n} bytes");
        }
        let expected = Protocol::Tls {
            server_name: Some("reviews.example.com".to_owned()),
            applications: vec!["h2".to_owned()],
        };
        assert_eq!(judge(&hello), Some(expected));
    }

    #[test]
    fn broken_hellos_are_something_else() {
        let mut hello = client_hello("a", "h2");
        let last = hello.len() - 1;
        hello[44] = 0xff;
        assert_ne!(judge(&hello[..=last]), Some(Protocol::Http11));
        assert_eq!(judge(&[0x16, 9, 9, 0, 1, 1]), Some(Protocol::Other));
    }
}
