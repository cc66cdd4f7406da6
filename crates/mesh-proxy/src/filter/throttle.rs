//! Slowing down the body of a response, as fault injection asks for it.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::Frame;
use tokio::time::{Instant, Sleep};

use super::bucket::ActiveFault;

/// Slices per second (Envoy's `StreamRateLimiter`).
const SLICES: u32 = 16;

/// Passes data on in slices, no faster than a rate.
#[derive(Debug)]
pub struct Throttle {
    slice: usize,
    /// When the next slice may go.
    next: Instant,
    timer: Pin<Box<Sleep>>,
    held: Option<Bytes>,
    _fault: ActiveFault,
}

impl Throttle {
    /// For a rate in KiB per second. The fault is under way as long as the body is.
    pub fn new(kib_per_second: u64, fault: ActiveFault) -> Self {
        let bytes = kib_per_second.saturating_mul(1024) / u64::from(SLICES);
        let now = Instant::now();
        Self {
            slice: usize::try_from(bytes).unwrap_or(usize::MAX).max(1),
            next: now,
            timer: Box::pin(tokio::time::sleep_until(now)),
            held: None,
            _fault: fault,
        }
    }

    /// Is there data that waits for its turn?
    pub fn holds(&self) -> bool {
        self.held.is_some()
    }

    /// Waits until the next slice may go.
    pub fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.next {
            return Poll::Ready(());
        }
        self.timer.as_mut().reset(self.next);
        self.timer.as_mut().poll(cx)
    }

    /// What is left of the data before.
    pub fn held(&mut self) -> Option<Frame<Bytes>> {
        let data = self.held.take()?;
        Some(self.cut(data))
    }

    /// The part of a frame that may go now; the rest is held. Trailers pass.
    pub fn slice(&mut self, frame: Frame<Bytes>) -> Frame<Bytes> {
        match frame.into_data() {
            Ok(data) => self.cut(data),
            Err(other) => other,
        }
    }

    fn cut(&mut self, mut data: Bytes) -> Frame<Bytes> {
        let now = if data.len() > self.slice {
            data.split_to(self.slice)
        } else {
            std::mem::take(&mut data)
        };
        self.held = Some(data).filter(|rest| !rest.is_empty());
        let share = now.len() as f64 / self.slice as f64;
        let wait = Duration::from_secs(1) / SLICES;
        self.next = self.next.max(Instant::now()) + wait.mul_f64(share);
        Frame::data(now)
    }
}
