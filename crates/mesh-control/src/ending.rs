//! How a control plane ends, in three steps: it says that it is not ready, and serves on for a moment those who have not heard of it (its Service
//! leads new connections here until every node has learned that it ends); then it takes no new connections; then it finishes what is under way.

use tokio::sync::watch;

/// How far the end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Serving,
    Leaving,
    Closing,
}

/// Where the end is announced.
pub(crate) struct Ending(watch::Sender<Step>);

/// Where it is heard of. Clones hear the same.
#[derive(Clone)]
pub(crate) struct Announced(watch::Receiver<Step>);

/// Nothing has ended yet.
pub(crate) fn new() -> (Ending, Announced) {
    let (sender, receiver) = watch::channel(Step::Serving);
    (Ending(sender), Announced(receiver))
}

impl Ending {
    /// From now on it is not ready.
    pub(crate) fn leave(&self) {
        self.0.send_replace(Step::Leaving);
    }

    /// From now on no new connection is taken.
    pub(crate) fn close(&self) {
        self.0.send_replace(Step::Closing);
    }
}

impl Announced {
    /// Whether the end has begun.
    pub(crate) fn has_begun(&self) -> bool {
        *self.0.borrow() >= Step::Leaving
    }

    /// Done once no new connection is to be taken.
    pub(crate) async fn closing(mut self) {
        // An error says that the sender is gone, which is an end too.
        let _ = self.0.wait_for(|step| *step >= Step::Closing).await;
    }
}
