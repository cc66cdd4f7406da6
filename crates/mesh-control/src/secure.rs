//! The secure port: connections in TLS, with the client's certificate where it has one.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;

use crate::serving::Certificate;

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes at a time; more wait in the kernel's queue.
const HANDSHAKES: usize = 256;

/// Connections whose handshake is done. Ends never; a listener that fails is tried again.
pub(crate) fn connections(
    listener: TcpListener,
    certificate: Certificate,
) -> impl Stream<Item = io::Result<TlsStream<TcpStream>>> {
    let (sender, receiver) = mpsc::channel(16);
    tokio::spawn(accept(listener, certificate, sender));
    ReceiverStream::new(receiver)
}

async fn accept(
    listener: TcpListener,
    certificate: Certificate,
    ready: mpsc::Sender<io::Result<TlsStream<TcpStream>>>,
) {
    let places = Arc::new(Semaphore::new(HANDSHAKES));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = ready.closed() => return,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Mostly too many open files: waiting is what helps.
                tracing::warn!(%error, "accepting a connection on the secure port");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        // Before there is a certificate nobody can be served; who comes so early comes again.
        let Some(config) = certificate.channel() else {
            continue;
        };
        let ready = ready.clone();
        tokio::spawn(async move {
            let _place = place;
            // A small push would wait for the acknowledgement of the one before. A socket that refuses is gone.
            let _ = stream.set_nodelay(true);
            let handshake = TlsAcceptor::from(config).accept(stream);
            match tokio::time::timeout(HANDSHAKE, handshake).await {
                Ok(Ok(stream)) => drop(ready.send(Ok(stream)).await),
                Ok(Err(error)) => {
                    tracing::info!(%peer, %error, "TLS handshake on the secure port");
                }
                Err(_) => tracing::info!(%peer, "TLS handshake on the secure port took too long"),
            }
        });
    }
}
