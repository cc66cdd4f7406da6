//! The one writer for what people and programs read.

use std::fmt;
use std::io::{ErrorKind, Write};
use std::sync::{Arc, Mutex, PoisonError};

/// Where a command's results go: standard output, or a buffer. Notes and errors go to standard error instead.
#[derive(Clone)]
pub struct Out(Arc<Mutex<Box<dyn Write + Send>>>);

impl Out {
    /// Writes to anything, for instance a buffer that a test reads.
    pub fn new(writer: impl Write + Send + 'static) -> Self {
        Self(Arc::new(Mutex::new(Box::new(writer))))
    }

    /// Writes a text as it is, and passes it on at once.
    pub(crate) fn print(&self, text: &str) -> anyhow::Result<()> {
        self.bytes(text.as_bytes())
    }

    /// Writes a text and a line break.
    pub(crate) fn line(&self, text: impl fmt::Display) -> anyhow::Result<()> {
        self.print(&format!("{text}\n"))
    }

    /// Writes bytes as they are.
    pub(crate) fn bytes(&self, bytes: &[u8]) -> anyhow::Result<()> {
        let mut writer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match writer.write_all(bytes).and_then(|()| writer.flush()) {
            // The reader has seen enough (`mesh get pods | head -1`): end like a program that the signal ends.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(141),
            result => Ok(result?),
        }
    }
}

impl Default for Out {
    fn default() -> Self {
        Self::new(std::io::stdout())
    }
}

impl fmt::Debug for Out {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Out")
    }
}
