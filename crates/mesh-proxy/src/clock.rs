//! A clock of one-second steps for each worker: cheap enough to be asked for every read of a connection.

use std::cell::Cell;

thread_local! {
    static SECONDS: Cell<u32> = const { Cell::new(1) };
}

/// Seconds since the worker started, from one up.
pub fn now() -> u32 {
    SECONDS.get()
}

/// One second more; called by the worker's sweep.
pub fn step() {
    SECONDS.set(SECONDS.get().saturating_add(1));
}
