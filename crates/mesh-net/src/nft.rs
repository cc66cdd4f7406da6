//! nftables without the `nft` program: tables as values, applied over netlink in one transaction, or rendered as text.
//!
//! Only what the mesh's rules need is here: chains of type nat and filter, comparisons of addresses, ports, interfaces, owners and marks,
//! redirection, destination NAT in turn over endpoints, masquerading and rejecting.

mod encode;
mod text;

use std::io;
use std::net::Ipv4Addr;

use crate::netlink::{Message, Netlink, NetlinkError};

/// Address families of tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4 and IPv6.
    Inet,
    /// IPv4 only.
    Ip,
}

/// A table: the unit that is replaced or deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Address family.
    pub family: Family,
    /// Name, unique in its family and network namespace.
    pub name: String,
    /// Chains; jumps may go to any of them.
    pub chains: Vec<Chain>,
}

/// A chain of rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Name, unique in the table.
    pub name: String,
    /// Where packets enter; none: only by jumps.
    pub base: Option<Base>,
    /// Rules in order.
    pub rules: Vec<Rule>,
}

/// Where a base chain hooks into the kernel. The policy is always accept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Base {
    /// Type of the chain.
    pub kind: ChainType,
    /// Point in a packet's way.
    pub hook: Hook,
    /// Order among chains of the same hook; -100 is destination NAT, 0 filter, 100 source NAT.
    pub priority: i32,
}

/// Types of base chains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChainType {
    /// Sees the first packet of each connection and may translate its addresses.
    Nat,
    /// Sees every packet.
    Filter,
}

/// Points in a packet's way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// Arrived, not yet routed.
    Prerouting,
    /// For this machine.
    Input,
    /// For another machine.
    Forward,
    /// Made here.
    Output,
    /// About to leave.
    Postrouting,
}

/// A rule: when all matches hold, the actions happen in order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rule {
    /// Conditions. Addresses need [`Match::Ipv4`] before them in an inet table, ports a [`Match::Transport`].
    pub matches: Vec<Match>,
    /// What to do.
    pub actions: Vec<Action>,
}

/// One condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Match {
    /// The opposite.
    Not(Box<Match>),
    /// The packet is IPv4.
    Ipv4,
    /// The packet is IPv6.
    Ipv6,
    /// The protocol above IP.
    Transport(Transport),
    /// Came in by this interface.
    InInterface(String),
    /// Goes out by this interface.
    OutInterface(String),
    /// Source network: address and prefix length.
    Source(Ipv4Addr, u8),
    /// Destination network: address and prefix length.
    Destination(Ipv4Addr, u8),
    /// The destination is `::1`.
    DestinationLoopback6,
    /// Destination port.
    DestinationPort(u16),
    /// User id of the socket that sends.
    SocketUid(u32),
    /// Group id of the socket that sends.
    SocketGid(u32),
    /// The packet's mark, all 32 bits.
    Mark(u32),
}

impl Match {
    /// The opposite condition.
    #[must_use]
    pub fn negated(self) -> Self {
        match self {
            Self::Not(inner) => *inner,
            other => Self::Not(Box::new(other)),
        }
    }
}

/// Transport protocols.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// What a rule does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Counts packets and bytes.
    Counter,
    /// Back to the calling chain.
    Return,
    /// No more rules of this hook and table.
    Accept,
    /// Discards the packet.
    Drop,
    /// Continues in a chain and comes back.
    Jump(String),
    /// To a port of this machine.
    Redirect(u16),
    /// To another address and port.
    DestinationNat(Ipv4Addr, u16),
    /// To the chains in turn, strictly one after the other (`numgen inc`). The counter starts anew when the table is replaced.
    InTurn(Vec<String>),
    /// Marks the packet.
    SetMark(u32),
    /// Gives the packet the address of the interface that it leaves by.
    Masquerade,
    /// Answers with a TCP reset (connection refused). Only in filter chains of input, forward and output.
    RejectTcp,
    /// Answers with ICMP port unreachable. Only in filter chains of input, forward and output.
    RejectUnreachable,
}

/// Why the kernel did not take a change.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// The kernel refused a part; nothing was applied.
    #[error("nftables: {0}{hint}; nothing was changed", hint = hint(.0))]
    Refused(NetlinkError),
    /// Talking to the kernel failed; nothing was applied.
    #[error("nftables: {0}")]
    Socket(#[from] NetlinkError),
}

fn hint(error: &NetlinkError) -> &'static str {
    match error.source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => " (CAP_NET_ADMIN is needed in this network namespace)",
        Some(libc::EOPNOTSUPP | libc::ENOENT) => " (the kernel may lack a part of nf_tables that this needs)",
        Some(libc::EMSGSIZE) => " (the rules are larger than net.core.wmem_max lets one message be)",
        _ => "",
    }
}

impl Table {
    /// Makes the table in the calling thread's network namespace be exactly this one, in one transaction: at no moment is there less or
    /// anything between. Connections that are already translated stay as they are.
    pub fn apply(&self) -> Result<(), NftError> {
        commit(encode::replace(self))
    }

    /// The table in the syntax of nft(8), as `nft list table` prints it.
    pub fn to_text(&self) -> String {
        text::table(self)
    }
}

/// Deletes a table of the calling thread's network namespace; it is no error when there is none.
pub fn delete(family: Family, name: &str) -> Result<(), NftError> {
    commit(encode::delete(family, name))
}

const SUBSYSTEM: u16 = (libc::NFNL_SUBSYS_NFTABLES as u16) << 8;

/// The names of the tables of a family in the calling thread's network namespace.
pub fn tables(family: Family) -> Result<Vec<String>, NftError> {
    const NFTA_TABLE_NAME: u16 = 1;
    let request = Message::new(SUBSYSTEM | encode::GETTABLE, 0, &[encode::family_number(family), 0, 0, 0]);
    let answers = Netlink::open(libc::NETLINK_NETFILTER)?.dump("list the nftables tables", request)?;
    let name = |body: &[u8]| {
        let attributes = crate::netlink::attributes(body.get(4..)?);
        attributes.into_iter().find(|(kind, _)| *kind == NFTA_TABLE_NAME).map(|(_, value)| crate::netlink::text_of(value))
    };
    Ok(answers.iter().filter_map(|answer| name(&answer.body)).collect())
}

/// Sends messages as one transaction. The kernel has answered everything when `send` returns; only the last message asks for an
/// acknowledgement, since hundreds of them would not fit into the socket's receive buffer.
fn commit(messages: Vec<encode::Message>) -> Result<(), NftError> {
    let mut netlink = Netlink::open(libc::NETLINK_NETFILTER)?;
    let edge = [0, 0, 0, libc::NFNL_SUBSYS_NFTABLES as u8];
    let mut bytes = Message::new(libc::NFNL_MSG_BATCH_BEGIN as u16, libc::NLM_F_REQUEST, &edge).finish(netlink.next_sequence());
    let first = netlink.next_sequence();
    let mut sequence = first;
    let count = messages.len();
    let mut names = Vec::with_capacity(count);
    for (i, message) in messages.into_iter().enumerate() {
        let ack = if i + 1 == count { libc::NLM_F_ACK } else { 0 };
        let flags = libc::NLM_F_REQUEST | ack | i32::from(message.flags);
        let mut encoded = Message::new(SUBSYSTEM | message.kind, flags, &[message.family, 0, 0, 0]);
        encoded.raw(&message.payload);
        bytes.extend(encoded.finish(sequence));
        names.push(message.what);
        sequence = netlink.next_sequence();
    }
    bytes.extend(Message::new(libc::NFNL_MSG_BATCH_END as u16, libc::NLM_F_REQUEST, &edge).finish(sequence));
    netlink.reserve(bytes.len());
    let fail = |source| NetlinkError::io("send a transaction", source);
    netlink.send(&bytes).map_err(fail)?;
    answers(&netlink, first, &names)
}

fn answers(netlink: &Netlink, first: u32, names: &[String]) -> Result<(), NftError> {
    let fail = |source| NetlinkError::io("read the answers to a transaction", source);
    let mut acknowledged = false;
    loop {
        let received = netlink.receive(false).map_err(fail)?;
        if received.is_empty() {
            break;
        }
        for answer in received {
            match answer.outcome() {
                Some((0, _)) => acknowledged = true,
                Some((code, message)) => {
                    let index = answer.sequence.checked_sub(first).and_then(|i| names.get(i as usize));
                    let doing = index.cloned().unwrap_or_else(|| "commit a transaction".to_owned());
                    return Err(NftError::Refused(NetlinkError { doing, source: io::Error::from_raw_os_error(code), message }));
                }
                None => {}
            }
        }
    }
    if acknowledged {
        return Ok(());
    }
    Err(NftError::Socket(NetlinkError::io("commit a transaction", io::Error::other("the kernel did not acknowledge it"))))
}
