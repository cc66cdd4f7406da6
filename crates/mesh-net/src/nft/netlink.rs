//! Sending a batch to the kernel and reading what it says of each message.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    setsockopt, socket, sockopt,
};

use super::Family;
use super::encode::{Attributes, GETTABLE, Message, family_number};

const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NLMSG_ERROR: u16 = 2;
pub(crate) const REQUEST: u16 = 1;
pub(crate) const ACK: u16 = 4;

/// Why the kernel did not take a batch.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// No netlink socket could be opened.
    #[error("opening a netlink socket for nftables: {0}; the kernel needs nf_tables")]
    Open(nix::Error),
    /// The socket failed.
    #[error("talking to nftables: {0}")]
    Socket(nix::Error),
    /// The kernel refused a part; nothing of the batch was applied.
    #[error("nftables, {what}: {errno}{}; nothing was changed", hint(*errno))]
    Refused {
        /// The part that was refused.
        what: String,
        /// Why.
        errno: nix::Error,
    },
}

impl NftError {
    /// Whether the kernel was asked for something that it does not have, built in or as a module that it could load.
    pub fn lacks_kernel_part(&self) -> bool {
        match self {
            Self::Open(errno) => *errno == Errno::EPROTONOSUPPORT,
            Self::Socket(_) => false,
            Self::Refused { errno, .. } => {
                [Errno::ENOENT, Errno::EOPNOTSUPP, Errno::EAFNOSUPPORT].contains(errno)
            }
        }
    }
}

fn hint(errno: Errno) -> &'static str {
    match errno {
        Errno::EPERM | Errno::EACCES => " (CAP_NET_ADMIN in this network namespace is needed)",
        Errno::EOPNOTSUPP | Errno::ENOENT => {
            " (the kernel lacks a part of nf_tables, or there is no chain of that name)"
        }
        _ => "",
    }
}

/// Sends the messages as one transaction.
pub(super) fn commit(messages: &[Message]) -> Result<(), NftError> {
    let socket = open()?;
    let mut bytes = Vec::new();
    let last = u32::try_from(messages.len()).unwrap_or(u32::MAX) + 1;
    header(&mut bytes, BATCH_BEGIN, REQUEST, 0, (0, SUBSYSTEM), &[]);
    for (sequence, message) in (1..).zip(messages) {
        let kind = (SUBSYSTEM << 8) | message.kind;
        // Errors come without being asked for; an acknowledgement of every message would overflow the receive buffer.
        let ack = if sequence + 1 == last { ACK } else { 0 };
        let flags = REQUEST | ack | message.flags;
        header(
            &mut bytes,
            kind,
            flags,
            sequence,
            (message.family, 0),
            &message.payload,
        );
    }
    header(&mut bytes, BATCH_END, REQUEST, last, (0, SUBSYSTEM), &[]);
    // A batch must be sent whole; the default buffer holds about 200 KiB. What can't be had is told by the send.
    let _ = setsockopt(&socket, sockopt::SndBuf, &(bytes.len() * 2));
    send(socket.as_raw_fd(), &bytes, MsgFlags::empty()).map_err(NftError::Socket)?;
    answers(&socket, messages)
}

/// Whether a table exists in the calling thread's network namespace.
///
/// # Errors
/// When the kernel can't be asked.
pub fn table_exists(family: Family, name: &str) -> Result<bool, NftError> {
    let socket = open()?;
    let attributes = Attributes::default().text(1, name);
    let mut bytes = Vec::new();
    let kind = (SUBSYSTEM << 8) | GETTABLE;
    header(
        &mut bytes,
        kind,
        REQUEST | ACK,
        1,
        (family_number(family), 0),
        &attributes.0,
    );
    send(socket.as_raw_fd(), &bytes, MsgFlags::empty()).map_err(NftError::Socket)?;
    match acknowledged(&socket, &format!("looking for the table {name}")) {
        Ok(()) => Ok(true),
        Err(NftError::Refused {
            errno: Errno::ENOENT,
            ..
        }) => Ok(false),
        Err(other) => Err(other),
    }
}

/// A netlink socket to netfilter.
pub(crate) fn open() -> Result<OwnedFd, NftError> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )
    .map_err(NftError::Open)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0)).map_err(NftError::Open)?;
    Ok(socket)
}

/// nlmsghdr (netlink(7)), then nfgenmsg: family, version, resource id in network order.
pub(crate) fn header(
    out: &mut Vec<u8>,
    kind: u16,
    flags: u16,
    sequence: u32,
    (family, resource): (u8, u16),
    payload: &[u8],
) {
    let length = u32::try_from(16 + 4 + payload.len()).unwrap_or(u32::MAX);
    out.extend_from_slice(&length.to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(&flags.to_ne_bytes());
    out.extend_from_slice(&sequence.to_ne_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&[family, 0]);
    out.extend_from_slice(&resource.to_be_bytes());
    out.extend_from_slice(payload);
}

/// Reads the answer to the only message that was sent; `what` it was for goes into the error.
pub(crate) fn acknowledged(socket: &OwnedFd, what: &str) -> Result<(), NftError> {
    let message = Message {
        kind: 0,
        flags: 0,
        family: 0,
        payload: Vec::new(),
        what: what.to_owned(),
    };
    answers(socket, &[message])
}

/// Reads until the last message has its acknowledgement; the first refusal is the answer.
fn answers(socket: &OwnedFd, messages: &[Message]) -> Result<(), NftError> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length =
            recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()).map_err(NftError::Socket)?;
        let mut at = 0;
        while let Some(answer) = buffer.get(at..length).and_then(Answer::read) {
            at += answer.length;
            match answer.errno {
                // What was asked for, before its acknowledgement.
                None => {}
                Some(0) => return Ok(()),
                Some(errno) => {
                    let index = (answer.sequence as usize).saturating_sub(1);
                    let what = messages.get(index).map_or_else(
                        || "starting a transaction".to_owned(),
                        |message| message.what.clone(),
                    );
                    return Err(NftError::Refused {
                        what,
                        errno: Errno::from_raw(errno),
                    });
                }
            }
        }
    }
}

struct Answer {
    length: usize,
    sequence: u32,
    /// For NLMSG_ERROR, the error (0 = acknowledged).
    errno: Option<i32>,
}

impl Answer {
    fn read(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let length = (word(0)? as usize).next_multiple_of(4).max(16);
        let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
        let errno = if kind == NLMSG_ERROR {
            Some((word(16)? as i32).wrapping_neg())
        } else {
            None
        };
        Some(Self {
            length,
            sequence: word(8)?,
            errno,
        })
    }
}
