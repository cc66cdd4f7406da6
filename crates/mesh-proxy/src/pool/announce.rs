//! The header of the PROXY protocol (HAProxy's "The PROXY protocol", versions 1 and 2), by which an endpoint is told whose bytes follow.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};

use mesh_routing::cluster::ProxyHeader;

/// What every header of version 2 begins with.
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, and that the connection is on nobody's behalf.
const LOCAL: u8 = 0x20;
/// Version 2, and that the connection is on behalf of another.
const PROXY: u8 = 0x21;
/// Family and protocol: none, TCP over IPv4, TCP over IPv6.
const UNSPECIFIED: u8 = 0x00;
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;

/// Both ends of a client's connection to this proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    /// The client.
    pub client: SocketAddr,
    /// Where it was going.
    pub destination: SocketAddr,
}

/// The header for what a client sends; for what nobody sent (`None`) version 2 says so, and version 1, which cannot, has the ends of the
/// connection itself, `own` (as in Envoy's upstream_proxy_protocol transport socket).
pub(super) fn header(version: ProxyHeader, ends: Option<&Ends>, own: Ends) -> Vec<u8> {
    match (version, ends) {
        (ProxyHeader::V1, ends) => text(*ends.unwrap_or(&own)),
        (ProxyHeader::V2, Some(ends)) => binary(*ends),
        (ProxyHeader::V2, None) => {
            let mut header = SIGNATURE.to_vec();
            header.extend([LOCAL, UNSPECIFIED, 0, 0]);
            header
        }
    }
}

fn text(ends: Ends) -> Vec<u8> {
    let (client, destination) = same_family(ends);
    let family = if client.is_ipv4() { 4 } else { 6 };
    let mut header = Vec::with_capacity(107);
    // Writing to memory cannot fail.
    let _ = write!(
        header,
        "PROXY TCP{family} {client} {destination} {} {}\r\n",
        ends.client.port(),
        ends.destination.port()
    );
    header
}

fn binary(ends: Ends) -> Vec<u8> {
    let mut header = Vec::with_capacity(52);
    header.extend(SIGNATURE);
    header.push(PROXY);
    match same_family(ends) {
        (IpAddr::V4(client), IpAddr::V4(destination)) => {
            header.extend([TCP4, 0, 12]);
            header.extend(client.octets());
            header.extend(destination.octets());
        }
        (client, destination) => {
            header.extend([TCP6, 0, 36]);
            header.extend(six(client));
            header.extend(six(destination));
        }
    }
    header.extend(ends.client.port().to_be_bytes());
    header.extend(ends.destination.port().to_be_bytes());
    header
}

/// A header has addresses of one family: of two, both are written as IPv6.
fn same_family(ends: Ends) -> (IpAddr, IpAddr) {
    let client = ends.client.ip().to_canonical();
    let destination = ends.destination.ip().to_canonical();
    match client.is_ipv4() == destination.is_ipv4() {
        true => (client, destination),
        false => (six(client).into(), six(destination).into()),
    }
}

fn six(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(client: &str, destination: &str) -> Ends {
        Ends {
            client: client.parse().unwrap(),
            destination: destination.parse().unwrap(),
        }
    }

    fn written(version: ProxyHeader, of: Option<&Ends>) -> Vec<u8> {
        header(version, of, ends("127.0.0.1:1", "127.0.0.2:2"))
    }

    #[test]
    fn text_of_both_families() {
        let line =
            |of: Option<Ends>| String::from_utf8(written(ProxyHeader::V1, of.as_ref())).unwrap();
        for (client, destination, expected) in [
            (
                "10.0.0.1:4000",
                "10.0.0.2:80",
                "PROXY TCP4 10.0.0.1 10.0.0.2 4000 80\r\n",
            ),
            (
                "[fd00::1]:4000",
                "[fd00::2]:80",
                "PROXY TCP6 fd00::1 fd00::2 4000 80\r\n",
            ),
            (
                "[::ffff:10.0.0.1]:4000",
                "10.0.0.2:80",
                "PROXY TCP4 10.0.0.1 10.0.0.2 4000 80\r\n",
            ),
            (
                "10.0.0.1:4000",
                "[fd00::2]:80",
                "PROXY TCP6 ::ffff:10.0.0.1 fd00::2 4000 80\r\n",
            ),
        ] {
            assert_eq!(line(Some(ends(client, destination))), expected);
        }
        assert_eq!(line(None), "PROXY TCP4 127.0.0.1 127.0.0.2 1 2\r\n");
    }

    #[test]
    fn binary_of_both_families() {
        let four = written(
            ProxyHeader::V2,
            Some(&ends("127.0.0.1:54918", "127.0.0.1:10007")),
        );
        // As Envoy 1.40 wrote it for these ends.
        assert_eq!(
            four,
            b"\r\n\r\n\x00\r\nQUIT\n!\x11\x00\x0c\x7f\x00\x00\x01\x7f\x00\x00\x01\xd6\x86'\x17"
        );
        let six = written(ProxyHeader::V2, Some(&ends("[fd00::1]:1", "[fd00::2]:2")));
        assert_eq!(six.len(), 16 + 36);
        assert_eq!(six.get(12..16), Some(&[0x21, 0x21, 0, 36][..]));
        assert_eq!(six.get(48..), Some(&[0, 1, 0, 2][..]));
        let mixed = written(ProxyHeader::V2, Some(&ends("10.0.0.1:1", "[fd00::2]:2")));
        assert_eq!(mixed.get(26..32), Some(&[0xff, 0xff, 10, 0, 0, 1][..]));
    }

    #[test]
    fn what_is_nobodys_says_so() {
        assert_eq!(
            written(ProxyHeader::V2, None),
            b"\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"
        );
    }
}
