//! The routing that TPROXY needs: packets with its mark are delivered to this host, whatever their destination.
//!
//! Messages and attributes are those of rtnetlink(7), linux/fib_rules.h and linux/rtnetlink.h; integers are in host order.

use std::fmt;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    socket,
};

use super::{CaptureError, Config, Interception};

const NEW_ROUTE: u16 = 24;
const DEL_ROUTE: u16 = 25;
const NEW_RULE: u16 = 32;
const DEL_RULE: u16 = 33;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const REPLACE: u16 = 0x100;
const EXCLUSIVE: u16 = 0x200;
const CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;

/// `lo` is the first interface of every network namespace.
const LOOPBACK: u32 = 1;
/// Answers that mean "there is none", when something is taken away.
const ABSENT: [Errno; 4] = [
    Errno::ENOENT,
    Errno::ESRCH,
    Errno::EAFNOSUPPORT,
    Errno::EOPNOTSUPP,
];

/// One part of the routing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    v6: bool,
    kind: Kind,
    table: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Packets with this mark look into the table.
    Rule(u32),
    /// Everything in the table is local.
    Route,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.v6 { "inet6" } else { "inet" };
        match self.kind {
            Kind::Rule(mark) => write!(
                f,
                "ip -f {family} rule add fwmark {mark} lookup {}",
                self.table
            ),
            Kind::Route => write!(
                f,
                "ip -f {family} route add local default dev lo table {}",
                self.table
            ),
        }
    }
}

/// What a configuration needs: nothing, but for TPROXY.
pub(super) fn of(config: &Config) -> Vec<Part> {
    match config.interception {
        Interception::Redirect => Vec::new(),
        Interception::Tproxy => parts(config),
    }
}

fn parts(config: &Config) -> Vec<Part> {
    let kinds = [Kind::Rule(config.tproxy_mark), Kind::Route];
    [false, true]
        .into_iter()
        .flat_map(|v6| {
            kinds.map(|kind| Part {
                v6,
                kind,
                table: config.tproxy_table,
            })
        })
        .collect()
}

/// Puts in what is needed, and takes away what another configuration needed.
pub(super) fn apply(config: &Config) -> Result<(), CaptureError> {
    let wanted = of(config);
    if wanted.is_empty() {
        return remove(config);
    }
    for part in wanted.iter().filter(|part| !part.v6 || has_ipv6()) {
        match part.change(true) {
            // The rule is there already; a route takes the place of the one before.
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(failed(part, errno)),
        }
    }
    Ok(())
}

/// Takes away what TPROXY needed.
pub(super) fn remove(config: &Config) -> Result<(), CaptureError> {
    for part in parts(config) {
        match part.change(false) {
            Ok(()) => {}
            Err(errno) if ABSENT.contains(&errno) => {}
            Err(errno) => return Err(failed(&part, errno)),
        }
    }
    Ok(())
}

fn failed(part: &Part, errno: Errno) -> CaptureError {
    CaptureError::Route {
        what: part.to_string(),
        errno,
    }
}

/// Whether this network namespace has IPv6 (switched off or not in the kernel: it has not).
pub(super) fn has_ipv6() -> bool {
    let switch = std::fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6");
    switch.is_ok_and(|text| text.trim() == "0")
}

impl Part {
    fn change(&self, add: bool) -> Result<(), Errno> {
        let kind = match (self.kind, add) {
            (Kind::Rule(_), true) => NEW_RULE,
            (Kind::Rule(_), false) => DEL_RULE,
            (Kind::Route, true) => NEW_ROUTE,
            (Kind::Route, false) => DEL_ROUTE,
        };
        let flags = match (self.kind, add) {
            (_, false) => 0,
            (Kind::Rule(_), true) => CREATE | EXCLUSIVE,
            (Kind::Route, true) => CREATE | REPLACE,
        };
        ask(kind, REQUEST | ACK | flags, &self.payload())
    }

    fn payload(&self) -> Vec<u8> {
        const AF_INET: u8 = 2;
        const AF_INET6: u8 = 10;
        const TO_TABLE: u8 = 1;
        const BY_ADMINISTRATOR: u8 = 4;
        const SCOPE_HOST: u8 = 254;
        const LOCAL: u8 = 2;
        let family = if self.v6 { AF_INET6 } else { AF_INET };
        // The header's table is one byte; an attribute says it in full.
        let short = u8::try_from(self.table).unwrap_or(0);
        let attribute = |kind: u16, value: u32| {
            let mut bytes = 8u16.to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(value.to_ne_bytes());
            bytes
        };
        let (header, attributes) = match self.kind {
            // fib_rule_hdr: family, lengths, service, table, two reserved, action, flags; FRA_FWMARK, FRA_TABLE.
            Kind::Rule(mark) => (
                [family, 0, 0, 0, short, 0, 0, TO_TABLE, 0, 0, 0, 0],
                [attribute(10, mark), attribute(15, self.table)],
            ),
            // rtmsg: family, lengths, service, table, protocol, scope, type, flags; RTA_OIF, RTA_TABLE.
            Kind::Route => (
                [
                    family,
                    0,
                    0,
                    0,
                    short,
                    BY_ADMINISTRATOR,
                    SCOPE_HOST,
                    LOCAL,
                    0,
                    0,
                    0,
                    0,
                ],
                [attribute(4, LOOPBACK), attribute(15, self.table)],
            ),
        };
        [header.to_vec(), attributes.concat()].concat()
    }
}

/// Sends one message and reads what the kernel says of it.
fn ask(kind: u16, flags: u16, payload: &[u8]) -> Result<(), Errno> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    // nlmsghdr: length, type, flags, sequence, sender.
    let length = u32::try_from(16 + payload.len()).map_err(|_| Errno::EMSGSIZE)?;
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([1u32, 0].map(u32::to_ne_bytes).concat());
    message.extend(payload);
    send(socket.as_raw_fd(), &message, MsgFlags::empty())?;
    let mut answer = [0; 4096];
    let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    let answer = &answer[..length];
    let bytes = |at: usize, n: usize| answer.get(at..at + n);
    let is_error = bytes(4, 2) == Some(&NLMSG_ERROR.to_ne_bytes()[..]);
    let number = bytes(16, 4).and_then(|bytes| bytes.try_into().ok());
    match number.map(i32::from_ne_bytes) {
        Some(0) if is_error => Ok(()),
        Some(number) if is_error => Err(Errno::from_raw(number.wrapping_neg())),
        _ => Err(Errno::EBADMSG),
    }
}
