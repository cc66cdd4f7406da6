//! The descriptors of all messages, in memory only as long as somebody needs them.

use std::fmt;
use std::io::Read;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use prost_reflect::{DescriptorPool, MessageDescriptor};

/// Made when the crate is built (`build.rs`).
static PACKED: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin.gz"));

/// What is in memory at the moment.
static CURRENT: Mutex<Weak<DescriptorPool>> = Mutex::new(Weak::new());

/// Keeps the descriptors in memory: about 15 MiB, which take some ten milliseconds to be read. Every function of this crate reads them for
/// itself where nobody holds them; who calls several holds them meanwhile. On a thread that ends afterwards the memory goes back to the
/// system, since it lies in that thread's part of the heap.
#[derive(Clone)]
pub struct Descriptors(Arc<DescriptorPool>);

impl Descriptors {
    /// Reads the descriptors unless they are in memory.
    #[must_use]
    pub fn hold() -> Self {
        // Whoever panicked while reading left nothing behind.
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pool) = current.upgrade() {
            return Self(pool);
        }
        let pool = Arc::new(read());
        *current = Arc::downgrade(&pool);
        Self(pool)
    }

    /// Keeps the descriptors until the process ends: for tools and tests, to which speed matters more than memory.
    pub fn keep() {
        static KEPT: OnceLock<Descriptors> = OnceLock::new();
        KEPT.get_or_init(Self::hold);
    }

    pub(crate) fn find(&self, type_url: &str) -> Option<MessageDescriptor> {
        self.0.get_message_by_name(type_url.rsplit('/').next()?)
    }
}

/// All are the same.
impl PartialEq for Descriptors {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl fmt::Debug for Descriptors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Descriptors")
    }
}

fn read() -> DescriptorPool {
    let mut bytes = Vec::new();
    let read = flate2::read::GzDecoder::new(PACKED).read_to_end(&mut bytes);
    match read.map(|_| DescriptorPool::decode(bytes.as_slice())) {
        Ok(Ok(pool)) => pool,
        // Built into the program and tested: it can't differ at run time.
        other => unreachable!("the built-in descriptors can't be read: {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn held_once_however_often() {
        let first = Descriptors::hold();
        let second = Descriptors::hold();
        assert!(Arc::ptr_eq(&first.0, &second.0));
        assert!(first.find("envoy.config.cluster.v3.Cluster").is_some());
        assert!(first.find("foo.Bar").is_none());
    }
}
