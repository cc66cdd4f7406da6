//! nftables over netlink, with an encoder of our own: users' machines and our image may have no `nft` program.
//!
//! A [`Table`] goes to the kernel in one transaction: it takes all of it or none. The same table can be shown in the syntax of nft(8).
//! Message and attribute numbers are those of the kernel's `linux/netfilter/nf_tables.h`.

mod encode;
pub(crate) mod netlink;
mod text;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

pub use netlink::{NftError, table_exists};

/// The address family of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4 and IPv6.
    Inet,
    /// IPv4.
    Ip,
}

/// Where a base chain hooks in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// Before routing.
    Prerouting,
    /// To this host.
    Input,
    /// Through this host.
    Forward,
    /// From this host.
    Output,
    /// After routing.
    Postrouting,
}

/// What a base chain does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChainType {
    /// Address translation; sees the first packet of a connection.
    Nat,
    /// Accepts and drops.
    Filter,
    /// As `Filter`, and a packet whose mark was changed is routed again; hooks in at the output only.
    Route,
}

/// A chain that the kernel calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Base {
    /// What it does.
    pub kind: ChainType,
    /// Where it hooks in.
    pub hook: Hook,
    /// Lower comes first; -100 is destination translation.
    pub priority: i32,
}

/// A transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// What is compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Match {
    /// The packet is IPv4; needed before addresses in an `inet` table.
    Ipv4,
    /// The packet is IPv6.
    Ipv6,
    /// The transport protocol.
    Transport(Transport),
    /// The interface that the packet came in by; names have at most 15 bytes.
    InInterface(String),
    /// The interface that the packet goes out by.
    OutInterface(String),
    /// The source address lies in a network.
    Source(Ipv4Addr, u8),
    /// The destination address lies in a network.
    Destination(Ipv4Addr, u8),
    /// The source address lies in a network of IPv6.
    Source6(Ipv6Addr, u8),
    /// The destination address lies in a network of IPv6.
    Destination6(Ipv6Addr, u8),
    /// The source port, of the transport protocol matched before.
    SourcePort(u16),
    /// The destination port, of the transport protocol matched before.
    DestinationPort(u16),
    /// The uid that owns the socket.
    SocketUid(u32),
    /// The gid that owns the socket.
    SocketGid(u32),
    /// The packet's mark.
    Mark(u32),
    /// The mark that the packet's connection remembers.
    ConnectionMark(u32),
    /// The packet belongs to a connection that is known, or to one that came of it.
    KnownConnection,
    /// The packet belongs to no connection and can't begin one.
    Invalid,
    /// The source address is in this set of the table.
    SourceIn(String),
    /// The opposite.
    Not(Box<Match>),
}

/// What happens to a packet that matched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Counts packets and bytes.
    Counter,
    /// Back to the calling chain.
    Return,
    /// Calls a chain.
    Jump(String),
    /// Goes on in a chain and does not come back.
    Goto(String),
    /// Puts the source address into a set of the table, or begins its time there anew.
    RememberSource(String),
    /// Sends the connection to a local port.
    Redirect(u16),
    /// Sends the connection to another address and port.
    DestinationNat(Ipv4Addr, u16),
    /// Each connection goes to the next of these chains, strictly in turn; at least one.
    InTurn(Vec<String>),
    /// Sets the packet's mark.
    SetMark(u32),
    /// Sets the connection's mark to the packet's.
    SaveMark,
    /// Sets the packet's mark to the connection's.
    RestoreMark,
    /// Gives the packet to the socket that listens transparently on a local port.
    TransparentProxy {
        /// Packets of IPv6, else of IPv4.
        v6: bool,
        /// The port.
        port: u16,
    },
    /// Keeps the packet's connection in a table of its own, by number.
    ConnectionZone(u16),
    /// No further rule of this hook sees the packet.
    Accept,
    /// Gives the packet this host's address as its source.
    Masquerade,
    /// Answers with a TCP reset.
    RejectTcp,
    /// Answers with ICMP port unreachable.
    RejectUnreachable,
    /// Takes the packet away; the kernel keeps no memory of its connection.
    Drop,
}

/// A rule: all matches must hold, then the actions happen in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rule {
    /// All must hold.
    pub matches: Vec<Match>,
    /// Done in order.
    pub actions: Vec<Action>,
}

impl Rule {
    /// A rule that counts what it matches.
    pub fn counted(matches: impl IntoIterator<Item = Match>, action: Action) -> Self {
        Self {
            matches: matches.into_iter().collect(),
            actions: vec![Action::Counter, action],
        }
    }
}

/// A chain with its rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// The name, unique in its table.
    pub name: String,
    /// For chains that the kernel calls.
    pub base: Option<Base>,
    /// In order.
    pub rules: Vec<Rule>,
}

/// A set of IPv4 addresses that rules fill; each stays for a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    /// The name, unique in its table.
    pub name: String,
    /// How long an address stays after it was last put in; whole milliseconds.
    pub timeout: Duration,
}

/// A table with everything in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// The address family.
    pub family: Family,
    /// The name.
    pub name: String,
    /// The sets that rules fill.
    pub sets: Vec<Set>,
    /// The chains; a chain may refer to any other.
    pub chains: Vec<Chain>,
}

impl Table {
    /// The table in the syntax of nft(8).
    pub fn to_text(&self) -> String {
        text::table(self)
    }

    /// Puts the table into the kernel in one transaction; what it held before is replaced. The calling thread's namespace counts.
    ///
    /// # Errors
    /// When the kernel refuses a part; nothing was changed then.
    pub fn replace(&self) -> Result<(), NftError> {
        netlink::commit(&encode::replace(self))
    }

    /// As [`Table::replace`], where `before` is what the kernel holds: sets that stay keep the addresses in them.
    ///
    /// # Errors
    /// When the kernel refuses a part, for instance because it does not hold `before` any more; nothing was changed then.
    pub fn update(&self, before: &Self) -> Result<(), NftError> {
        netlink::commit(&encode::update(before, self))
    }
}

/// Puts several tables into the kernel in one transaction, and takes those named `absent` away; each table replaces what it held before.
///
/// # Errors
/// When the kernel refuses a part; nothing was changed then.
pub fn replace_all(tables: &[Table], absent: &[(Family, &str)]) -> Result<(), NftError> {
    let gone = absent
        .iter()
        .flat_map(|(family, name)| encode::delete(*family, name));
    let messages: Vec<_> = gone
        .chain(tables.iter().flat_map(encode::replace))
        .collect();
    netlink::commit(&messages)
}

/// Deletes a table; one that does not exist is no error.
///
/// # Errors
/// When the kernel refuses.
pub fn delete_table(family: Family, name: &str) -> Result<(), NftError> {
    netlink::commit(&encode::delete(family, name))
}
