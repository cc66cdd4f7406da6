//! SPDY/3.1 frames (draft-mbelshe-httpbis-spdy-00, section 2): sans-IO, both ways.

use std::collections::HashMap;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// Largest frame that is taken; a client's largest are its data frames, 32 KiB.
const MAX_FRAME: usize = 1024 * 1024;
/// Largest header block after decompression.
const MAX_HEADERS: usize = 64 * 1024;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const FLAG_FIN: u8 = 1;

/// A frame that matters to us; SETTINGS, HEADERS and WINDOW_UPDATE are read and passed over: kubectl's side has no flow control.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    Open {
        stream: u32,
        headers: HashMap<String, String>,
        end: bool,
    },
    Data {
        stream: u32,
        data: Bytes,
        end: bool,
    },
    Reset {
        stream: u32,
    },
    Ping {
        id: u32,
    },
    Goaway,
}

/// What is wrong with the bytes; the connection can't go on after it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum FrameError {
    #[error("a frame of {0} bytes is larger than {MAX_FRAME}")]
    TooLarge(usize),
    #[error("SPDY version {0} is not 3")]
    Version(u16),
    #[error("a header block can't be read: {0}")]
    Headers(&'static str),
    #[error("a frame is too short")]
    Short,
}

/// Reads frames. The header blocks of a connection are one zlib stream, so there is one reader a connection.
pub(super) struct Reader {
    inflate: Decompress,
}

impl Reader {
    pub(super) fn new() -> Self {
        Self {
            inflate: Decompress::new(true),
        }
    }

    /// The next frame in `buffer`, which loses its bytes; `None` when more bytes are needed.
    pub(super) fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
        loop {
            let Some(head) = buffer.first_chunk::<8>().copied() else {
                return Ok(None);
            };
            let length =
                (usize::from(head[5]) << 16) | (usize::from(head[6]) << 8) | usize::from(head[7]);
            if length > MAX_FRAME {
                return Err(FrameError::TooLarge(length));
            }
            if buffer.len() < 8 + length {
                buffer.reserve(8 + length - buffer.len());
                return Ok(None);
            }
            buffer.advance(8);
            let payload = buffer.split_to(length).freeze();
            let end = head[4] & FLAG_FIN != 0;
            let first = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
            if first & 0x8000_0000 == 0 {
                return Ok(Some(Frame::Data {
                    stream: first,
                    data: payload,
                    end,
                }));
            }
            let version = ((first >> 16) & 0x7fff) as u16;
            if version != 3 {
                return Err(FrameError::Version(version));
            }
            if let Some(frame) = self.control(first as u16, payload, end)? {
                return Ok(Some(frame));
            }
        }
    }

    fn control(
        &mut self,
        kind: u16,
        mut payload: Bytes,
        end: bool,
    ) -> Result<Option<Frame>, FrameError> {
        let number = |payload: &mut Bytes| payload.try_get_u32().map_err(|_| FrameError::Short);
        match kind {
            SYN_STREAM => {
                let stream = number(&mut payload)? & 0x7fff_ffff;
                if payload.len() < 6 {
                    return Err(FrameError::Short);
                }
                // The associated stream, priority and slot say nothing here.
                payload.advance(6);
                let headers = self.headers(&payload)?;
                Ok(Some(Frame::Open {
                    stream,
                    headers,
                    end,
                }))
            }
            RST_STREAM => Ok(Some(Frame::Reset {
                stream: number(&mut payload)? & 0x7fff_ffff,
            })),
            PING => Ok(Some(Frame::Ping {
                id: number(&mut payload)?,
            })),
            GOAWAY => Ok(Some(Frame::Goaway)),
            // Their header blocks belong to the one zlib stream too.
            SYN_REPLY | 8 => {
                number(&mut payload)?;
                self.headers(&payload)?;
                Ok(None)
            }
            _ => Ok(None),
        }
    }

    /// Section 2.6.10: a count, then names and values, each with its length; zlib with a dictionary.
    fn headers(&mut self, block: &[u8]) -> Result<HashMap<String, String>, FrameError> {
        let text = self.inflate(block)?;
        let mut rest = &text[..];
        let mut headers = HashMap::new();
        let count = rest
            .try_get_u32()
            .map_err(|_| FrameError::Headers("no count"))?;
        for _ in 0..count {
            let name = take(&mut rest)?;
            let value = take(&mut rest)?;
            headers.insert(name.to_ascii_lowercase(), value);
        }
        Ok(headers)
    }

    fn inflate(&mut self, block: &[u8]) -> Result<Vec<u8>, FrameError> {
        let mut out = vec![0; MAX_HEADERS];
        let (mut read, mut written) = (0, 0);
        while read < block.len() {
            let (before_in, before_out) = (self.inflate.total_in(), self.inflate.total_out());
            let result =
                self.inflate
                    .decompress(&block[read..], &mut out[written..], FlushDecompress::Sync);
            read += (self.inflate.total_in() - before_in) as usize;
            let produced = (self.inflate.total_out() - before_out) as usize;
            written += produced;
            match result {
                Ok(Status::StreamEnd) => break,
                Ok(_) if read < block.len() && produced == 0 => {
                    return Err(FrameError::Headers("larger than 64 KiB or damaged"));
                }
                Ok(_) => {}
                Err(error) if error.needs_dictionary().is_some() => {
                    self.inflate
                        .set_dictionary(&dictionary())
                        .map_err(|_| FrameError::Headers("another dictionary"))?;
                }
                Err(_) => return Err(FrameError::Headers("not zlib")),
            }
        }
        out.truncate(written);
        Ok(out)
    }
}

fn take(rest: &mut &[u8]) -> Result<String, FrameError> {
    let length = rest
        .try_get_u32()
        .map_err(|_| FrameError::Headers("cut off"))? as usize;
    let (text, after) = rest
        .split_at_checked(length)
        .ok_or(FrameError::Headers("cut off"))?;
    *rest = after;
    Ok(String::from_utf8_lossy(text).into_owned())
}

/// Writes frames.
pub(super) struct Writer {
    deflate: Compress,
}

impl Writer {
    pub(super) fn new() -> Self {
        let mut deflate = Compress::new(Compression::fast(), true);
        // It fails only when data was compressed before.
        let _ = deflate.set_dictionary(&dictionary());
        Self { deflate }
    }

    /// SYN_REPLY without headers.
    pub(super) fn reply(&mut self, stream: u32, out: &mut BytesMut) {
        let mut block = Vec::with_capacity(64);
        // 64 bytes hold a zlib header, four bytes and a sync marker many times over.
        let _ = self
            .deflate
            .compress_vec(&0u32.to_be_bytes(), &mut block, FlushCompress::Sync);
        control(out, SYN_REPLY, 4 + block.len());
        out.put_u32(stream);
        out.put_slice(&block);
    }

    pub(super) fn data(stream: u32, data: &[u8], end: bool, out: &mut BytesMut) {
        out.put_u32(stream & 0x7fff_ffff);
        out.put_u8(if end { FLAG_FIN } else { 0 });
        out.put_uint(data.len() as u64, 3);
        out.put_slice(data);
    }

    /// RST_STREAM with REFUSED_STREAM.
    pub(super) fn reset(stream: u32, out: &mut BytesMut) {
        control(out, RST_STREAM, 8);
        out.put_u32(stream);
        out.put_u32(3);
    }

    pub(super) fn ping(id: u32, out: &mut BytesMut) {
        control(out, PING, 4);
        out.put_u32(id);
    }

    /// GOAWAY, status OK.
    pub(super) fn goaway(last: u32, out: &mut BytesMut) {
        control(out, GOAWAY, 8);
        out.put_u32(last);
        out.put_u32(0);
    }
}

fn control(out: &mut BytesMut, kind: u16, length: usize) {
    out.put_u16(0x8003);
    out.put_u16(kind);
    out.put_u8(0);
    out.put_uint(length as u64, 3);
}

/// Words that the dictionary of section 2.6.10.1 holds with a four-byte length before each.
const WORDS: &str = "options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age allow \
authorization cache-control connection content-base content-encoding content-language content-length content-location content-md5 \
content-range content-type date etag expect expires from host if-match if-modified-since if-none-match if-range if-unmodified-since \
last-modified location max-forwards pragma proxy-authenticate proxy-authorization range referer retry-after server te trailer \
transfer-encoding upgrade user-agent vary via warning www-authenticate method get status 200_OK version HTTP/1.1 url public set-cookie \
keep-alive origin";

/// The dictionary's rest, without lengths.
const TAIL: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505\
203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden404 Not Found\
500 Internal Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 \
Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,\
text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

fn dictionary() -> Vec<u8> {
    let mut bytes = Vec::with_capacity(1423);
    for word in WORDS.split(' ') {
        let word = word.replace('_', " ");
        bytes.put_u32(word.len() as u32);
        bytes.put_slice(word.as_bytes());
    }
    bytes.put_slice(TAIL.as_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 1950 section 9.
    fn adler32(data: &[u8]) -> u32 {
        let (mut a, mut b) = (1u32, 0u32);
        for &byte in data {
            a = (a + u32::from(byte)) % 65521;
            b = (b + a) % 65521;
        }
        (b << 16) | a
    }

    #[test]
    fn the_dictionary_is_the_one_that_clients_name() {
        let dictionary = dictionary();
        assert_eq!(dictionary.len(), 1423);
        assert_eq!(adler32(&dictionary), 0xe3c6_a7c2);
    }

    fn open(stream: u32, deflate: &mut Compress, headers: &[(&str, &str)]) -> BytesMut {
        let mut text = BytesMut::new();
        text.put_u32(headers.len() as u32);
        for (name, value) in headers {
            for part in [name, value] {
                text.put_u32(part.len() as u32);
                text.put_slice(part.as_bytes());
            }
        }
        let mut block = Vec::with_capacity(4096);
        deflate
            .compress_vec(&text, &mut block, FlushCompress::Sync)
            .unwrap();
        let mut out = BytesMut::new();
        control(&mut out, SYN_STREAM, 10 + block.len());
        out.put_u32(stream);
        out.put_slice(&[0; 6]);
        out.put_slice(&block);
        out
    }

    #[test]
    fn two_streams_share_one_compression() {
        let mut deflate = Compress::new(Compression::best(), true);
        deflate.set_dictionary(&dictionary()).unwrap();
        let mut wire = open(1, &mut deflate, &[("Streamtype", "error")]);
        wire.unsplit(open(
            3,
            &mut deflate,
            &[("streamtype", "stdin"), ("port", "80")],
        ));
        let mut reader = Reader::new();
        let mut first = wire.split_to(10);
        assert_eq!(reader.next(&mut first), Ok(None));
        first.unsplit(wire);
        let Ok(Some(Frame::Open {
            stream: 1,
            headers,
            end: false,
        })) = reader.next(&mut first)
        else {
            panic!("no first stream");
        };
        assert_eq!(headers["streamtype"], "error");
        let Ok(Some(Frame::Open {
            stream: 3, headers, ..
        })) = reader.next(&mut first)
        else {
            panic!("no second stream");
        };
        assert_eq!(headers["port"], "80");
        assert_eq!(reader.next(&mut first), Ok(None));
    }

    #[test]
    fn what_is_written_reads_back() {
        let mut wire = BytesMut::new();
        let mut writer = Writer::new();
        writer.reply(1, &mut wire);
        Writer::data(1, b"hello", true, &mut wire);
        Writer::ping(7, &mut wire);
        Writer::reset(5, &mut wire);
        Writer::goaway(5, &mut wire);
        let mut reader = Reader::new();
        let data = Frame::Data {
            stream: 1,
            data: Bytes::from_static(b"hello"),
            end: true,
        };
        for expected in [
            data,
            Frame::Ping { id: 7 },
            Frame::Reset { stream: 5 },
            Frame::Goaway,
        ] {
            assert_eq!(reader.next(&mut wire), Ok(Some(expected)));
        }
        assert!(wire.is_empty());
    }

    #[test]
    fn nonsense_is_an_error_and_not_a_panic() {
        for bytes in [
            &[0x80, 9, 0, 1, 0, 0, 0, 0][..],
            &[0, 0, 0, 1, 0, 0xff, 0xff, 0xff],
            &[0x80, 3, 0, 1, 0, 0, 0, 2, 1, 2],
        ] {
            assert!(
                Reader::new().next(&mut BytesMut::from(bytes)).is_err(),
                "{bytes:?}"
            );
        }
        let mut bomb = BytesMut::new();
        control(&mut bomb, SYN_STREAM, 20);
        bomb.put_slice(&[0; 10]);
        bomb.put_slice(&[0x78; 10]);
        assert!(Reader::new().next(&mut bomb).is_err());
    }
}
