//! Bounds the frames of HTTP/2 that cost their sender nothing: PING, SETTINGS, PRIORITY, WINDOW_UPDATE, RST_STREAM and empty DATA
//! (CVE-2019-9511 to 9518). The codec answers or drops each of them and keeps no count.
//!
//! Envoy has a limit for each kind, in proportion to streams and to DATA frames; here all of them draw from one purse, which streams, data
//! both ways and time fill: pings that measure the bandwidth and windows that follow the data never empty it.

use crate::clock;

const FRAME_HEAD: usize = 9;
const PREFACE: usize = crate::sniff::PREFACE.len();
/// Frames that any connection may send.
const FREE: u64 = 2000;
/// More of them for each stream,
const PER_STREAM: u64 = 100;
/// for each second,
const PER_SECOND: u64 = 100;
/// and one more for so many bytes of data, in either direction.
const BYTES: u64 = 16;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
/// `END_STREAM` of DATA, `ACK` of SETTINGS and PING.
const FLAG: u8 = 1;

/// Follows the frames that a client sends.
pub(super) struct FrameScan {
    head: [u8; FRAME_HEAD],
    have: usize,
    /// Bytes until the next frame.
    skip: usize,
    born: u32,
    spent: u64,
    earned: u64,
    received: u64,
    written: u64,
    /// Bytes of the answers to SETTINGS and PING, which are no data.
    answers: u64,
}

impl FrameScan {
    /// For a connection that begins with the preface.
    pub(super) fn new() -> Self {
        Self {
            head: [0; FRAME_HEAD],
            have: 0,
            skip: PREFACE,
            born: clock::now(),
            spent: 0,
            earned: 0,
            received: 0,
            written: 0,
            answers: 0,
        }
    }

    /// So many bytes went to the client.
    pub(super) fn note_written(&mut self, bytes: usize) {
        self.written += bytes as u64;
    }

    /// Looks at the next bytes. True if the client has sent more control frames than it may.
    pub(super) fn read(&mut self, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            let passed = self.skip.min(bytes.len());
            self.skip -= passed;
            bytes = bytes.get(passed..).unwrap_or_default();
            let part = bytes.len().min(FRAME_HEAD - self.have);
            let (head, rest) = bytes.split_at(part);
            if let Some(place) = self.head.get_mut(self.have..self.have + part) {
                place.copy_from_slice(head);
            }
            self.have += part;
            bytes = rest;
            if self.have == FRAME_HEAD {
                self.have = 0;
                self.take_frame();
            }
        }
        self.is_flood()
    }

    fn take_frame(&mut self) {
        let [a, b, c, kind, flags, ..] = self.head;
        let len = u32::from_be_bytes([0, a, b, c]);
        self.skip = len as usize;
        let marked = flags & FLAG != 0;
        match kind {
            DATA if len > 0 || marked => self.received += u64::from(len),
            HEADERS => self.earned += PER_STREAM,
            _ => {
                self.spent += 1;
                // Of an answer the head, and what came.
                if matches!(kind, SETTINGS | PING) && !marked {
                    let back = if kind == PING { u64::from(len) } else { 0 };
                    self.answers += FRAME_HEAD as u64 + back;
                }
            }
        }
    }

    fn is_flood(&self) -> bool {
        // Most connections never get further than this.
        if self.spent <= FREE {
            return false;
        }
        let data = self.received + self.written.saturating_sub(self.answers);
        let seconds = u64::from(clock::now().saturating_sub(self.born));
        self.spent > FREE + self.earned + data / BYTES + seconds * PER_SECOND
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, len: usize) -> Vec<u8> {
        let size = (len as u32).to_be_bytes();
        let head = [&size[1..], &[kind, flags], &[0; 4]].concat();
        [head, vec![0; len]].concat()
    }

    /// How many frames are taken, in pieces of some size, with so many bytes written for each.
    fn taken(frames: &[Vec<u8>], written: usize, piece: usize) -> Option<usize> {
        let mut scan = FrameScan::new();
        assert!(!scan.read(&[0; PREFACE]));
        (0..10_000).position(|_| {
            scan.note_written(written);
            frames.concat().chunks(piece).any(|piece| scan.read(piece))
        })
    }

    #[test]
    fn floods_end_and_the_rest_does_not() {
        for piece in [1, 7, 9, 100] {
            let ping = frame(PING, 0, 8);
            let answer = ping.len();
            for (frames, written) in [
                (vec![ping.clone()], answer),
                (vec![frame(SETTINGS, 0, 0)], FRAME_HEAD),
                (vec![frame(2, 0, 5)], 0),
                (vec![frame(8, 0, 4)], 0),
                (vec![frame(3, 0, 4)], 0),
                (vec![frame(DATA, 0, 0)], 0),
            ] {
                let most = taken(&frames, written, piece);
                assert_eq!(most, Some(FREE as usize), "{frames:?}");
            }
            // A ping for every small message, and for every request.
            let pings = std::slice::from_ref(&ping);
            assert_eq!(taken(pings, answer + 24, piece), None);
            assert_eq!(
                taken(&[frame(DATA, 0, 24), ping.clone()], answer, piece),
                None
            );
            assert_eq!(taken(&[frame(HEADERS, 4, 10), ping], answer, piece), None);
        }
    }
}
