//! Servers for the proxy to connect to: each on a port of its own, until the process ends.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;

use tokio::runtime::Builder;

/// A server that gives every connection a thread.
pub fn with_threads(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let (socket, address) = listening();
    let serve = Arc::new(serve);
    std::thread::spawn(move || {
        for stream in socket.incoming() {
            let (stream, serve) = (stream.expect("a connection"), serve.clone());
            std::thread::spawn(move || serve(stream));
        }
    });
    address
}

/// A server that gives every connection a task.
pub fn with_tasks<F>(serve: impl Fn(tokio::net::TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let (socket, address) = listening();
    socket.set_nonblocking(true).expect("non-blocking");
    std::thread::spawn(move || {
        let runtime = { Builder::new_current_thread() }.enable_all().build();
        runtime.expect("a runtime").block_on(async move {
            let socket = tokio::net::TcpListener::from_std(socket).expect("the socket");
            loop {
                let (stream, _) = socket.accept().await.expect("a connection");
                tokio::spawn(serve(stream));
            }
        });
    });
    address
}

fn listening() -> (TcpListener, SocketAddr) {
    let socket = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let address = socket.local_addr().expect("its address");
    (socket, address)
}
