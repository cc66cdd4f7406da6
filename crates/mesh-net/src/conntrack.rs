//! The kernel's memory of translated connections: what it has to forget when an endpoint goes.
//!
//! A TCP connection ends with its endpoint, but a UDP client that keeps sending would be translated to an address where nobody is for as long
//! as it sends. Message and attribute numbers are those of the kernel's `linux/netfilter/nfnetlink_conntrack.h`.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsRawFd;

use nix::sys::socket::{MsgFlags, recv, send};

use crate::nft::NftError;
use crate::nft::netlink::{ACK, REQUEST, acknowledged, header, open};

const SUBSYSTEM: u16 = 1;
const GET: u16 = 1;
const DELETE: u16 = 2;
const DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const AF_INET: u8 = 2;
const UDP: u8 = 17;
/// Bits of an attribute's kind that are not its number: nested, network order.
const KIND: u16 = 0x3fff;

/// Forgets the UDP flows for which `stale` holds, which gets the address that the client sends to and the one that answers. Gives their
/// number. The calling thread's namespace counts.
///
/// # Errors
/// When the kernel does not tell or refuses.
pub fn forget_udp(
    mut stale: impl FnMut(SocketAddrV4, SocketAddrV4) -> bool,
) -> Result<usize, NftError> {
    let mut forgotten = 0;
    for flow in udp_flows()? {
        if stale(flow.destination, flow.endpoint) && delete(&flow.original)? {
            forgotten += 1;
        }
    }
    Ok(forgotten)
}

struct Flow {
    /// The attribute that names the flow, as the kernel gave it.
    original: Vec<u8>,
    destination: SocketAddrV4,
    endpoint: SocketAddrV4,
}

fn udp_flows() -> Result<Vec<Flow>, NftError> {
    let socket = open()?;
    let mut request = Vec::new();
    let kind = (SUBSYSTEM << 8) | GET;
    header(&mut request, kind, REQUEST | DUMP, 1, (AF_INET, 0), &[]);
    send(socket.as_raw_fd(), &request, MsgFlags::empty()).map_err(NftError::Socket)?;
    let mut flows = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length =
            recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()).map_err(NftError::Socket)?;
        let mut rest = buffer.get(..length).unwrap_or_default();
        while let Some((kind, message, next)) = message(rest) {
            match kind {
                NLMSG_DONE => return Ok(flows),
                NLMSG_ERROR => {
                    let errno = number(message).map_or(0, |n| (n as i32).wrapping_neg());
                    return Err(NftError::Refused {
                        what: "listing connections".to_owned(),
                        errno: nix::errno::Errno::from_raw(errno),
                    });
                }
                // nfgenmsg stands before the attributes.
                _ => flows.extend(message.get(4..).and_then(flow)),
            }
            rest = next;
        }
    }
}

fn number(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

/// The kind and content of the first message, and what follows it.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = number(bytes)? as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let content = bytes.get(16..length)?;
    let next = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, content, next))
}

/// The first attribute of a kind: with its header, and its content.
fn attribute(mut bytes: &[u8], wanted: u16) -> Option<(&[u8], &[u8])> {
    loop {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & KIND;
        let content = bytes.get(4..length)?;
        if kind == wanted {
            return Some((bytes.get(..length)?, content));
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
}

fn flow(attributes: &[u8]) -> Option<Flow> {
    let (whole, original) = attribute(attributes, 1)?;
    let (_, reply) = attribute(attributes, 2)?;
    // The tuple's CTA_TUPLE_PROTO, CTA_PROTO_NUM.
    let protocol = *attribute(attribute(original, 2)?.1, 1)?.1.first()?;
    let mut named = whole.to_vec();
    named.resize(named.len().next_multiple_of(4), 0);
    (protocol == UDP).then_some(Flow {
        original: named,
        destination: end(original, 2, 3)?,
        endpoint: end(reply, 1, 2)?,
    })
}

/// One end of a tuple: the numbers of its address within CTA_TUPLE_IP and of its port within CTA_TUPLE_PROTO.
fn end(tuple: &[u8], address: u16, port: u16) -> Option<SocketAddrV4> {
    let address: [u8; 4] = attribute(attribute(tuple, 1)?.1, address)?
        .1
        .try_into()
        .ok()?;
    let port: [u8; 2] = attribute(attribute(tuple, 2)?.1, port)?.1.try_into().ok()?;
    Some(SocketAddrV4::new(
        Ipv4Addr::from(address),
        u16::from_be_bytes(port),
    ))
}

/// Whether the flow was still there.
fn delete(original: &[u8]) -> Result<bool, NftError> {
    let socket = open()?;
    let mut request = Vec::new();
    let kind = (SUBSYSTEM << 8) | DELETE;
    header(&mut request, kind, REQUEST | ACK, 1, (AF_INET, 0), original);
    send(socket.as_raw_fd(), &request, MsgFlags::empty()).map_err(NftError::Socket)?;
    match acknowledged(&socket, "forgetting a connection") {
        Ok(()) => Ok(true),
        Err(NftError::Refused {
            errno: nix::errno::Errno::ENOENT,
            ..
        }) => Ok(false),
        Err(error) => Err(error),
    }
}
