//! Trying the rules out: a connection that the proxy's user makes to its own pod must come out at the proxy's port.

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use nix::ifaddrs::getifaddrs;
use nix::unistd::{Uid, geteuid, setfsuid};

use super::{Config, Exemption, Interception};
use crate::sockets::{ConnectOptions, ListenOptions, connect, listen, original_destination};

/// What the server says to whom it knows.
const GREETING: &[u8] = b"captured";

/// Tries the rules of this network namespace; says what is wrong.
pub(super) fn run(config: &Config) -> Result<(), String> {
    if config.interception == Interception::Tproxy {
        // Marked packets only come from outside, so there is nothing that this pod could try by itself.
        return Ok(());
    }
    let ip = own_address().ok_or("the pod has no address but those of loopback")?;
    let target = SocketAddr::new(ip, config.validation.port);
    let any = match ip {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let address = SocketAddr::new(any, config.inbound_port);
    let server = listen(address, ListenOptions::default()).map_err(|error| error.to_string())?;
    let deadline = Instant::now() + config.validation.timeout;
    let served = std::thread::spawn(move || serve(&server, target, deadline));
    let asked = ask(config, target);
    let served = served.join().unwrap_or(false);
    match (asked, served) {
        (Ok(()), true) => Ok(()),
        (Err(reason), _) => Err(format!("a connection to {target}: {reason}")),
        (Ok(()), false) => Err(format!(
            "a connection to {target} did not come out at port {}",
            config.inbound_port
        )),
    }
}

/// An address of the pod.
fn own_address() -> Option<IpAddr> {
    let interfaces = getifaddrs().ok()?;
    let ips = interfaces.filter_map(|interface| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    });
    let usable = |ip: &IpAddr| match ip {
        IpAddr::V4(ip) => !ip.is_loopback(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
    };
    let mut ips: Vec<IpAddr> = ips.filter(usable).collect();
    ips.sort_by_key(IpAddr::is_ipv6);
    ips.into_iter().next()
}

/// Greets who wanted to go to the target, until the deadline.
fn serve(server: &TcpListener, target: SocketAddr, deadline: Instant) -> bool {
    while Instant::now() < deadline {
        match server.accept() {
            Ok((mut stream, _)) if original_destination(&stream) == Some(target) => {
                return std::io::Write::write_all(&mut stream, GREETING).is_ok();
            }
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(_) => return false,
        }
    }
    false
}

/// Connects as the proxy does and waits for the greeting.
fn ask(config: &Config, target: SocketAddr) -> Result<(), String> {
    let text = |error: std::io::Error| error.to_string();
    let timeout = config.validation.timeout;
    let mark = match &config.exemption {
        Exemption::Mark(mark) => Some(*mark),
        Exemption::Owner { .. } => None,
    };
    let options = ConnectOptions {
        mark,
        ..ConnectOptions::default()
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(text)?;
    // A socket belongs to the file system uid of the thread that makes it; who is that user already changes nothing.
    if let Exemption::Owner { uids, .. } = &config.exemption
        && let Some(uid) = uids.first()
    {
        setfsuid(Uid::from_raw(*uid));
    }
    let connected =
        runtime.block_on(async { tokio::time::timeout(timeout, connect(target, options)).await });
    setfsuid(geteuid());
    let stream = connected
        .map_err(|_| format!("no answer within {timeout:?}"))?
        .and_then(tokio::net::TcpStream::into_std)
        .map_err(text)?;
    greeted(stream, timeout).map_err(text)
}

fn greeted(mut stream: TcpStream, timeout: Duration) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(timeout))?;
    let mut greeting = [0; GREETING.len()];
    stream.read_exact(&mut greeting)?;
    Ok(())
}
