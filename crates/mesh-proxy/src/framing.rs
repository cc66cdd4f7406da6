//! Finds requests that give their length twice (`Content-Length` and `Transfer-Encoding`) in the bytes as they come: the codec settles the
//! contradiction by itself and does not tell, but such a request is an attempt at smuggling more often than not
//! (RFC 9112 section 6.1) and is refused.

/// Longest name that is looked for, with its colon.
const LONGEST: usize = b"transfer-encoding:".len();

/// Watches the lines of one HTTP/1 connection. A request without a body costs one search for each line, nothing is copied.
#[derive(Debug, Default)]
pub struct HeadScan {
    /// The beginning of a line that is not there whole.
    begun: [u8; LONGEST],
    len: usize,
    lengths: u8,
    codings: u8,
    /// The head of an exchange that has begun has ended: what follows may be a body.
    past_head: bool,
}

/// What was found.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// A block of lines up to an empty one has both headers. Bodies look like heads here, so this only means something for a request that
    /// the codec found to have a transfer coding.
    pub both: bool,
    /// The first head of an exchange has several lengths, equal or not.
    pub repeated: bool,
}

impl HeadScan {
    /// Looks at the next bytes.
    pub fn read(&mut self, mut bytes: &[u8]) -> Found {
        let mut found = Found::default();
        while let Some(end) = memchr::memchr(b'\n', bytes) {
            let (line, rest) = bytes.split_at(end);
            if self.len == 0 {
                self.take_line(line);
            } else {
                self.begin_line(line);
                let (begun, len) = (self.begun, self.len);
                self.take_line(begun.get(..len).unwrap_or_default());
            }
            self.len = 0;
            found.both |= self.lengths > 0 && self.codings > 0;
            found.repeated |= self.lengths > 1 && !self.past_head;
            bytes = rest.get(1..).unwrap_or_default();
        }
        self.begin_line(bytes);
        found
    }

    /// Another exchange begins. Where the last one had a body, what looked like a header may have been a line of it.
    pub fn begin(&mut self, after_body: bool) {
        self.past_head = false;
        if after_body {
            self.forget();
        }
    }

    fn forget(&mut self) {
        (self.lengths, self.codings) = (0, 0);
    }

    fn begin_line(&mut self, bytes: &[u8]) {
        let room = LONGEST - self.len;
        let part = bytes.get(..bytes.len().min(room)).unwrap_or_default();
        if let Some(place) = self.begun.get_mut(self.len..self.len + part.len()) {
            place.copy_from_slice(part);
            self.len += part.len();
        }
    }

    fn take_line(&mut self, line: &[u8]) {
        match line.first().map(|first| first | 0x20) {
            Some(b'c') if is_named(line, b"content-length:") => {
                self.lengths = self.lengths.saturating_add(1);
            }
            Some(b't') if is_named(line, b"transfer-encoding:") => self.codings = 1,
            Some(_) if line != b"\r" => {}
            // Nothing, or a carriage return alone: the end of the head.
            _ => {
                self.forget();
                self.past_head = true;
            }
        }
    }
}

fn is_named(line: &[u8], name: &[u8]) -> bool {
    line.get(..name.len())
        .is_some_and(|start| start.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str, piece: usize) -> bool {
        let mut scan = HeadScan::default();
        text.as_bytes()
            .chunks(piece)
            .any(|bytes| scan.read(bytes).both)
    }

    #[test]
    fn lengths_are_counted_in_the_head_only() {
        let head = "POST / HTTP/1.1\r\nContent-Length: 40\r\n";
        let repeated = |text: &str| HeadScan::default().read(text.as_bytes()).repeated;
        assert!(repeated(&format!("{head}Content-Length: 40\r\n\r\n")));
        assert!(!repeated(&format!(
            "{head}\r\nContent-Length: 1\r\nContent-Length: 1\r\n"
        )));
    }

    #[test]
    fn both_lengths_are_found_in_any_order_and_in_any_pieces() {
        let cases = [
            (
                "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
                true,
            ),
            (
                "POST / HTTP/1.1\r\ncontent-LENGTH:5\r\nA: b\r\ntransfer-encoding:chunked\r\n\r\n",
                true,
            ),
            (
                "POST / HTTP/1.1\nTransfer-Encoding: chunked\nContent-Length: 5\n\n",
                true,
            ),
            (
                "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTe: trailers\r\n\r\n",
                false,
            ),
            (
                "POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhelloPOST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
                false,
            ),
            (
                "POST / HTTP/1.1\r\nX-Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
                false,
            ),
            (
                "GET /?transfer-encoding: HTTP/1.1\r\nContent-Type: a\r\nContent-Length: 1\r\n\r\n",
                false,
            ),
        ];
        for (text, expected) in cases {
            for piece in [1, 2, 7, 16, 17, 18, 19, 40, 1000] {
                assert_eq!(
                    found(text, piece),
                    expected,
                    "{text:?} in pieces of {piece}"
                );
            }
        }
    }
}
