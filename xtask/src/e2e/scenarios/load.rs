//! Requests at a fixed rate beside a scenario.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::reviews::REVIEWS;
use crate::e2e::http::{self, Client};

/// Requests at a fixed rate on keep-alive connections, in a thread of their own.
pub(super) struct Load {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<anyhow::Result<(u64, Vec<String>)>>,
}

impl Load {
    pub(super) fn start(gateway: &str, connections: u32, rate: u32) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (gateway, flag) = (gateway.to_owned(), stop.clone());
        let thread = std::thread::Builder::new()
            .name("load".into())
            .spawn(move || {
                http::runtime()?.block_on(async {
                    let sent = AtomicU64::new(0);
                    let pause = Duration::from_secs(1) * connections / rate;
                    let workers = (0..connections).map(|_| async {
                        let client = Client::new(&gateway);
                        let mut failures = Vec::new();
                        while !flag.load(Ordering::Relaxed) {
                            match client.get(REVIEWS, &[]).await {
                                Ok(answer) if (200..300).contains(&answer.status) => {}
                                Ok(answer) => failures
                                    .push(format!("status {}: {}", answer.status, answer.body)),
                                Err(error) => failures.push(format!("{error:#}")),
                            }
                            sent.fetch_add(1, Ordering::Relaxed);
                            tokio::time::sleep(pause).await;
                        }
                        failures
                    });
                    let failures = futures::future::join_all(workers).await.concat();
                    Ok((sent.into_inner(), failures))
                })
            })?;
        Ok(Self { stop, thread })
    }

    pub(super) fn stop(self) -> anyhow::Result<(u64, Vec<String>)> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_| anyhow::anyhow!("the load generator panicked"))?
    }
}
