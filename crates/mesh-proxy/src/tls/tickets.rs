//! Session tickets that are good for a limited time.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::crypto::aws_lc_rs::Ticketer;
use rustls::server::ProducesTickets;

/// Tickets whose content begins with the second in which they were made. The keys below roll every six hours in any case.
#[derive(Debug)]
pub(super) struct Limited {
    inner: Arc<dyn ProducesTickets>,
    seconds: u64,
}

impl Limited {
    /// Tickets with keys that nobody else has.
    pub(super) fn lasting(lifetime: Duration) -> Result<Arc<dyn ProducesTickets>, rustls::Error> {
        Ok(Arc::new(Self {
            inner: Ticketer::new()?,
            seconds: lifetime.as_secs().max(1),
        }))
    }
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

impl ProducesTickets for Limited {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        u32::try_from(self.seconds)
            .unwrap_or(u32::MAX)
            .min(self.inner.lifetime())
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.inner.encrypt(&[&now().to_be_bytes(), plain].concat())
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        let mut plain = self.inner.decrypt(cipher)?;
        let made = u64::from_be_bytes(*plain.first_chunk()?);
        if now().saturating_sub(made) >= self.seconds {
            return None;
        }
        plain.drain(..size_of::<u64>());
        Some(plain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_ends_with_its_time() {
        let tickets = Limited::lasting(Duration::from_secs(3600)).unwrap();
        let ticket = tickets.encrypt(b"session").unwrap();
        assert_eq!(tickets.decrypt(&ticket).unwrap(), b"session");
        let inner = Ticketer::new().unwrap();
        let old = Limited {
            inner: inner.clone(),
            seconds: 3600,
        };
        let made = (now() - 3600).to_be_bytes();
        let ticket = inner.encrypt(&[&made[..], b"session"].concat()).unwrap();
        assert!(old.decrypt(&ticket).is_none());
        assert!(tickets.decrypt(b"anything").is_none());
    }
}
