//! From tables to netlink messages. Integers of netlink are in host order, those of nftables attributes in network order.

use super::{Action, Base, Chain, ChainType, Family, Hook, Match, Rule, Set, Table, Transport};

/// One message of a batch and what it is for, in words.
pub(super) struct Message {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) family: u8,
    pub(super) payload: Vec<u8>,
    pub(super) what: String,
}

pub(super) const NEWTABLE: u16 = 0;
pub(super) const GETTABLE: u16 = 1;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const DELCHAIN: u16 = 5;
const NEWRULE: u16 = 6;
const DELRULE: u16 = 8;
const NEWSET: u16 = 9;
const DELSET: u16 = 11;
const NEWSETELEM: u16 = 12;

const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;

/// An attribute holds less than 64 KiB; a list of elements that is longer than this goes on in another message.
const ELEMENTS_BYTES: usize = 60_000;

const REG_VERDICT: u32 = 0;
const REG_1: u32 = 1;
const REG_2: u32 = 2;

const NFPROTO_IPV4: u32 = 2;
const NFPROTO_IPV6: u32 = 10;

const META_MARK: u32 = 3;
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_SKUID: u32 = 10;
const META_SKGID: u32 = 11;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;

const CT_STATE: u32 = 0;
const CT_MARK: u32 = 3;
const CT_ZONE: u32 = 17;
/// Bits of a connection's state (enum ip_conntrack_info, nf_conntrack_common.h).
const STATE_INVALID: u32 = 1;
const STATE_ESTABLISHED: u32 = 2;
const STATE_RELATED: u32 = 4;

const BASE_NETWORK: u32 = 1;
const BASE_TRANSPORT: u32 = 2;

const VERDICT_DROP: i32 = 0;
const VERDICT_ACCEPT: i32 = 1;
const VERDICT_JUMP: i32 = -3;
const VERDICT_GOTO: i32 = -4;
const VERDICT_RETURN: i32 = -5;

/// Attributes one after the other.
#[derive(Default)]
pub(super) struct Attributes(pub(super) Vec<u8>);

impl Attributes {
    fn raw(mut self, kind: u16, value: &[u8]) -> Self {
        // Longer than 64 KiB can't be said in netlink. Lists of elements are cut before, and nothing else of ours comes near it.
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    pub(super) fn text(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.raw(kind, &bytes)
    }

    fn number(self, kind: u16, value: u32) -> Self {
        self.raw(kind, &value.to_be_bytes())
    }

    fn nested(self, kind: u16, value: Attributes) -> Self {
        const NESTED: u16 = 0x8000;
        self.raw(kind | NESTED, &value.0)
    }
}

pub(super) fn family_number(family: Family) -> u8 {
    match family {
        Family::Inet => 1,
        Family::Ip => 2,
    }
}

/// Adds the table (so that deleting it can't fail), deletes it and adds it again with its content.
pub(super) fn replace(table: &Table) -> Vec<Message> {
    let mut encoder = Encoder {
        table,
        messages: delete(table.family, &table.name),
        sets: 0,
    };
    encoder.messages.push(new_table(table.family, &table.name));
    for set in &table.sets {
        encoder.set(set);
    }
    for chain in &table.chains {
        encoder.chain(chain);
    }
    encoder.rules();
    encoder.messages
}

/// Takes all rules away, then what is no longer wanted, and adds the rest: sets and chains that stay are not touched.
pub(super) fn update(before: &Table, table: &Table) -> Vec<Message> {
    let mut encoder = Encoder {
        table,
        messages: Vec::new(),
        sets: 0,
    };
    let name = &table.name;
    let all_rules = Attributes::default().text(1, name);
    encoder.push(
        DELRULE,
        0,
        all_rules,
        format!("delete the rules of table {name}"),
    );
    // A base chain can't change where it hooks in, nor a set its time.
    let is_chain = |list: &[Chain], one: &Chain| {
        list.iter()
            .any(|c| c.name == one.name && c.base == one.base)
    };
    for chain in before.chains.iter().filter(|c| !is_chain(&table.chains, c)) {
        let attributes = Attributes::default().text(1, name).text(3, &chain.name);
        let what = format!("delete the chain {} of table {name}", chain.name);
        encoder.push(DELCHAIN, 0, attributes, what);
    }
    for set in before.sets.iter().filter(|s| !table.sets.contains(s)) {
        let attributes = Attributes::default().text(1, name).text(2, &set.name);
        let what = format!("delete the set {} of table {name}", set.name);
        encoder.push(DELSET, 0, attributes, what);
    }
    for set in table.sets.iter().filter(|s| !before.sets.contains(s)) {
        encoder.set(set);
    }
    for chain in table.chains.iter().filter(|c| !is_chain(&before.chains, c)) {
        encoder.chain(chain);
    }
    encoder.rules();
    encoder.messages
}

pub(super) fn delete(family: Family, name: &str) -> Vec<Message> {
    let attributes = Attributes::default().text(1, name);
    let message = Message {
        kind: DELTABLE,
        flags: 0,
        family: family_number(family),
        payload: attributes.0,
        what: format!("delete the table {name}"),
    };
    vec![new_table(family, name), message]
}

fn new_table(family: Family, name: &str) -> Message {
    Message {
        kind: NEWTABLE,
        flags: CREATE,
        family: family_number(family),
        payload: Attributes::default().text(1, name).number(2, 0).0,
        what: format!("add the table {name}"),
    }
}

struct Encoder<'a> {
    table: &'a Table,
    messages: Vec<Message>,
    sets: u32,
}

impl Encoder<'_> {
    fn push(&mut self, kind: u16, flags: u16, attributes: Attributes, what: String) {
        let family = family_number(self.table.family);
        self.messages.push(Message {
            kind,
            flags,
            family,
            payload: attributes.0,
            what,
        });
    }

    fn chain(&mut self, chain: &Chain) {
        let mut attributes = Attributes::default()
            .text(1, &self.table.name)
            .text(3, &chain.name);
        if let Some(base) = chain.base {
            attributes = attributes
                .nested(4, hook(base))
                .number(5, VERDICT_ACCEPT as u32)
                .text(7, chain_type(base.kind));
        }
        let what = format!("add the chain {} of table {}", chain.name, self.table.name);
        self.push(NEWCHAIN, CREATE, attributes, what);
    }

    /// A set that rules fill (EVAL) and whose elements end (TIMEOUT).
    fn set(&mut self, set: &Set) {
        const TIMEOUT_EVAL: u32 = 0x10 | 0x20;
        const TYPE_IPV4_ADDRESS: u32 = 7;
        self.sets += 1;
        let milliseconds = u64::try_from(set.timeout.as_millis()).unwrap_or(u64::MAX);
        let attributes = Attributes::default()
            .text(1, &self.table.name)
            .text(2, &set.name)
            .number(3, TIMEOUT_EVAL)
            .number(4, TYPE_IPV4_ADDRESS)
            .number(5, 4)
            .number(10, self.sets)
            .raw(11, &milliseconds.to_be_bytes());
        let what = format!("add the set {} to table {}", set.name, self.table.name);
        self.push(NEWSET, CREATE, attributes, what);
    }

    fn rules(&mut self) {
        for chain in &self.table.chains {
            for rule in &chain.rules {
                self.rule(chain, rule);
            }
        }
    }

    fn rule(&mut self, chain: &Chain, rule: &Rule) {
        let mut expressions = Attributes::default();
        for condition in &rule.matches {
            expressions = compare(expressions, condition, false);
        }
        for action in &rule.actions {
            expressions = match action {
                Action::InTurn(chains) => self.in_turn(expressions, chains),
                other => act(expressions, other),
            };
        }
        let attributes = Attributes::default()
            .text(1, &self.table.name)
            .text(2, &chain.name)
            .nested(4, expressions);
        let what = format!(
            "add the rule {:?} to chain {} of table {}",
            super::text::rule(rule),
            chain.name,
            self.table.name
        );
        self.push(NEWRULE, CREATE | APPEND, attributes, what);
    }

    /// An anonymous map from 0, 1, … to "go to that chain", and a lookup in it with a counter that the kernel increments.
    fn in_turn(&mut self, expressions: Attributes, chains: &[String]) -> Attributes {
        const ANONYMOUS_CONSTANT_MAP: u32 = 1 | 2 | 8;
        const TYPE_INTEGER: u32 = 4;
        const TYPE_VERDICT: u32 = 0xffff_ff00;
        self.sets += 1;
        let (id, name) = (self.sets, "__map%d");
        let set = Attributes::default()
            .text(1, &self.table.name)
            .text(2, name)
            .number(3, ANONYMOUS_CONSTANT_MAP)
            .number(4, TYPE_INTEGER)
            .number(5, 4)
            .number(6, TYPE_VERDICT)
            .number(7, 0)
            .number(10, id);
        self.push(
            NEWSET,
            CREATE,
            set,
            format!(
                "add a map of {} chains to table {}",
                chains.len(),
                self.table.name
            ),
        );
        let mut elements = Attributes::default();
        for (i, chain) in (0u32..).zip(chains) {
            if elements.0.len() > ELEMENTS_BYTES {
                self.elements(id, name, std::mem::take(&mut elements));
            }
            // numgen gives its number in host order.
            let key = value(&i.to_ne_bytes());
            let goto = verdict(VERDICT_GOTO, Some(chain));
            elements = elements.nested(1, Attributes::default().nested(1, key).nested(2, goto));
        }
        self.elements(id, name, elements);
        let modulus = u32::try_from(chains.len()).unwrap_or(u32::MAX);
        let numgen = Attributes::default()
            .number(1, REG_1)
            .number(2, modulus)
            .number(3, 0);
        let lookup = Attributes::default()
            .text(1, name)
            .number(2, REG_1)
            .number(3, REG_VERDICT)
            .number(4, id);
        let expressions = expression(expressions, "numgen", numgen);
        expression(expressions, "lookup", lookup)
    }

    fn elements(&mut self, set: u32, name: &str, elements: Attributes) {
        let list = Attributes::default()
            .text(1, &self.table.name)
            .text(2, name)
            .nested(3, elements)
            .number(4, set);
        let what = format!("fill a map of table {}", self.table.name);
        self.push(NEWSETELEM, CREATE, list, what);
    }
}

fn hook(base: Base) -> Attributes {
    let number = match base.hook {
        Hook::Prerouting => 0,
        Hook::Input => 1,
        Hook::Forward => 2,
        Hook::Output => 3,
        Hook::Postrouting => 4,
    };
    Attributes::default()
        .number(1, number)
        .raw(2, &base.priority.to_be_bytes())
}

fn chain_type(kind: ChainType) -> &'static str {
    match kind {
        ChainType::Nat => "nat",
        ChainType::Filter => "filter",
        ChainType::Route => "route",
    }
}

fn expression(list: Attributes, name: &str, data: Attributes) -> Attributes {
    list.nested(1, Attributes::default().text(1, name).nested(2, data))
}

fn load_meta(list: Attributes, key: u32) -> Attributes {
    expression(
        list,
        "meta",
        Attributes::default().number(1, REG_1).number(2, key),
    )
}

fn load_payload(list: Attributes, base: u32, offset: u32, length: u32) -> Attributes {
    let data = Attributes::default()
        .number(1, REG_1)
        .number(2, base)
        .number(3, offset)
        .number(4, length);
    expression(list, "payload", data)
}

fn equals(list: Attributes, bytes: &[u8], not: bool) -> Attributes {
    let data = Attributes::default()
        .number(1, REG_1)
        .number(2, u32::from(not))
        .nested(3, value(bytes));
    expression(list, "cmp", data)
}

fn masked<const N: usize>(list: Attributes, mask: [u8; N]) -> Attributes {
    let length = u32::try_from(N).unwrap_or(u32::MAX);
    let data = Attributes::default()
        .number(1, REG_1)
        .number(2, REG_1)
        .number(3, length)
        .nested(4, value(&mask))
        .nested(5, value(&[0; N]));
    expression(list, "bitwise", data)
}

fn load_connection(list: Attributes, key: u32) -> Attributes {
    let data = Attributes::default().number(1, REG_1).number(2, key);
    expression(list, "ct", data)
}

/// Compares the state of the packet's connection with a set of states.
fn state(list: Attributes, states: u32, not: bool) -> Attributes {
    // What is left under the mask is nothing, or it is not.
    let list = masked(load_connection(list, CT_STATE), states.to_ne_bytes());
    equals(list, &[0; 4], !not)
}

fn compare(list: Attributes, condition: &Match, not: bool) -> Attributes {
    match condition {
        Match::Not(inner) => compare(list, inner, !not),
        Match::Ipv4 => equals(load_meta(list, META_NFPROTO), &[NFPROTO_IPV4 as u8], not),
        Match::Ipv6 => equals(load_meta(list, META_NFPROTO), &[NFPROTO_IPV6 as u8], not),
        Match::Transport(transport) => equals(
            load_meta(list, META_L4PROTO),
            &[transport_number(*transport)],
            not,
        ),
        Match::InInterface(name) => equals(load_meta(list, META_IIFNAME), &interface(name), not),
        Match::OutInterface(name) => equals(load_meta(list, META_OIFNAME), &interface(name), not),
        Match::Source(address, prefix) => network(
            load_payload(list, BASE_NETWORK, 12, 4),
            *address,
            *prefix,
            not,
        ),
        Match::Destination(address, prefix) => network(
            load_payload(list, BASE_NETWORK, 16, 4),
            *address,
            *prefix,
            not,
        ),
        Match::Source6(address, prefix) => network6(
            load_payload(list, BASE_NETWORK, 8, 16),
            *address,
            *prefix,
            not,
        ),
        Match::Destination6(address, prefix) => network6(
            load_payload(list, BASE_NETWORK, 24, 16),
            *address,
            *prefix,
            not,
        ),
        Match::SourcePort(port) => equals(
            load_payload(list, BASE_TRANSPORT, 0, 2),
            &port.to_be_bytes(),
            not,
        ),
        Match::DestinationPort(port) => equals(
            load_payload(list, BASE_TRANSPORT, 2, 2),
            &port.to_be_bytes(),
            not,
        ),
        Match::SocketUid(uid) => equals(load_meta(list, META_SKUID), &uid.to_ne_bytes(), not),
        Match::SocketGid(gid) => equals(load_meta(list, META_SKGID), &gid.to_ne_bytes(), not),
        Match::Mark(mark) => equals(load_meta(list, META_MARK), &mark.to_ne_bytes(), not),
        Match::ConnectionMark(mark) => {
            equals(load_connection(list, CT_MARK), &mark.to_ne_bytes(), not)
        }
        Match::KnownConnection => state(list, STATE_ESTABLISHED | STATE_RELATED, not),
        Match::Invalid => state(list, STATE_INVALID, not),
        Match::SourceIn(set) => {
            const INVERTED: u32 = 1;
            let list = load_payload(list, BASE_NETWORK, 12, 4);
            let mut data = Attributes::default().text(1, set).number(2, REG_1);
            if not {
                data = data.number(5, INVERTED);
            }
            expression(list, "lookup", data)
        }
    }
}

fn network(list: Attributes, address: std::net::Ipv4Addr, prefix: u8, not: bool) -> Attributes {
    let mask = u32::MAX
        .checked_shl(32 - u32::from(prefix.min(32)))
        .unwrap_or(0);
    let value = (u32::from(address) & mask).to_be_bytes();
    let list = if prefix >= 32 {
        list
    } else {
        masked(list, mask.to_be_bytes())
    };
    equals(list, &value, not)
}

fn network6(list: Attributes, address: std::net::Ipv6Addr, prefix: u8, not: bool) -> Attributes {
    let mask = u128::MAX
        .checked_shl(128 - u32::from(prefix.min(128)))
        .unwrap_or(0);
    let value = (u128::from(address) & mask).to_be_bytes();
    let list = if prefix >= 128 {
        list
    } else {
        masked(list, mask.to_be_bytes())
    };
    equals(list, &value, not)
}

/// IFNAMSIZ bytes, filled with zeros.
fn interface(name: &str) -> [u8; 16] {
    let mut bytes = [0; 16];
    for (to, from) in bytes.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    bytes
}

fn transport_number(transport: Transport) -> u8 {
    match transport {
        Transport::Tcp => 6,
        Transport::Udp => 17,
    }
}

fn verdict(code: i32, chain: Option<&str>) -> Attributes {
    let mut attributes = Attributes::default().raw(1, &code.to_be_bytes());
    if let Some(chain) = chain {
        attributes = attributes.text(2, chain);
    }
    Attributes::default().nested(2, attributes)
}

fn immediate(list: Attributes, register: u32, data: Attributes) -> Attributes {
    expression(
        list,
        "immediate",
        Attributes::default().number(1, register).nested(2, data),
    )
}

fn value(bytes: &[u8]) -> Attributes {
    Attributes::default().raw(1, bytes)
}

/// Sets the packet's mark to what is in the register.
fn set_mark(list: Attributes) -> Attributes {
    let data = Attributes::default().number(2, META_MARK).number(3, REG_1);
    expression(list, "meta", data)
}

/// Sets something of the packet's connection to what is in the register.
fn set_connection(list: Attributes, key: u32) -> Attributes {
    let data = Attributes::default().number(2, key).number(4, REG_1);
    expression(list, "ct", data)
}

fn act(list: Attributes, action: &Action) -> Attributes {
    match action {
        Action::Counter => expression(list, "counter", Attributes::default()),
        Action::Return => immediate(list, REG_VERDICT, verdict(VERDICT_RETURN, None)),
        Action::Jump(chain) => immediate(list, REG_VERDICT, verdict(VERDICT_JUMP, Some(chain))),
        Action::Goto(chain) => immediate(list, REG_VERDICT, verdict(VERDICT_GOTO, Some(chain))),
        Action::Drop => immediate(list, REG_VERDICT, verdict(VERDICT_DROP, None)),
        Action::RememberSource(set) => {
            const UPDATE: u32 = 1;
            let list = load_payload(list, BASE_NETWORK, 12, 4);
            let data = Attributes::default()
                .text(1, set)
                .number(3, UPDATE)
                .number(4, REG_1);
            expression(list, "dynset", data)
        }
        Action::Redirect(port) => {
            let list = immediate(list, REG_1, value(&port.to_be_bytes()));
            expression(list, "redir", Attributes::default().number(1, REG_1))
        }
        Action::DestinationNat(address, port) => {
            let list = immediate(list, REG_1, value(&address.octets()));
            let list = immediate(list, REG_2, value(&port.to_be_bytes()));
            let data = Attributes::default()
                .number(1, 1)
                .number(2, NFPROTO_IPV4)
                .number(3, REG_1)
                .number(5, REG_2);
            expression(list, "nat", data)
        }
        // The encoder makes the map that this needs.
        Action::InTurn(_) => list,
        Action::SetMark(mark) => set_mark(immediate(list, REG_1, value(&mark.to_ne_bytes()))),
        Action::SaveMark => set_connection(load_meta(list, META_MARK), CT_MARK),
        Action::RestoreMark => set_mark(load_connection(list, CT_MARK)),
        Action::ConnectionZone(zone) => {
            let list = immediate(list, REG_1, value(&zone.to_ne_bytes()));
            set_connection(list, CT_ZONE)
        }
        Action::TransparentProxy { v6, port } => {
            let list = immediate(list, REG_1, value(&port.to_be_bytes()));
            let family = if *v6 { NFPROTO_IPV6 } else { NFPROTO_IPV4 };
            // Without an address: whatever the packet's is.
            let data = Attributes::default().number(1, family).number(3, REG_1);
            expression(list, "tproxy", data)
        }
        Action::Accept => immediate(list, REG_VERDICT, verdict(VERDICT_ACCEPT, None)),
        Action::Masquerade => expression(list, "masq", Attributes::default()),
        Action::RejectTcp => expression(
            list,
            "reject",
            Attributes::default().number(1, 1).raw(2, &[0]),
        ),
        // ICMP type 3 (unreachable), code 3: port.
        Action::RejectUnreachable => expression(
            list,
            "reject",
            Attributes::default().number(1, 0).raw(2, &[3]),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_turn(chains: Vec<String>) -> Vec<Message> {
        let rule = Rule {
            matches: Vec::new(),
            actions: vec![Action::InTurn(chains)],
        };
        let chain = Chain {
            name: "c".into(),
            base: None,
            rules: vec![rule],
        };
        replace(&Table {
            family: Family::Ip,
            name: "t".into(),
            sets: Vec::new(),
            chains: vec![chain],
        })
    }

    #[test]
    fn an_attribute_has_its_length_without_the_padding() {
        let bytes = Attributes::default().text(1, "ab").0;
        assert_eq!(bytes[..2], 7u16.to_ne_bytes());
        assert_eq!(bytes[2..4], 1u16.to_ne_bytes());
        assert_eq!(bytes[4..], *b"ab\0\0");
    }

    #[test]
    fn a_table_is_deleted_and_made_again_with_maps_before_the_rules_that_use_them() {
        let kinds: Vec<u16> = in_turn(vec!["a".into()]).iter().map(|m| m.kind).collect();
        let expected = [
            NEWTABLE, DELTABLE, NEWTABLE, NEWCHAIN, NEWSET, NEWSETELEM, NEWRULE,
        ];
        assert_eq!(kinds, expected);
    }

    #[test]
    fn no_list_of_elements_outgrows_its_attribute() {
        // The longest name that a chain may have.
        let messages = in_turn((0..1000).map(|n| format!("{n:0>255}")).collect());
        let parts: Vec<&Message> = messages.iter().filter(|m| m.kind == NEWSETELEM).collect();
        assert!(parts.len() > 1);
        for part in parts {
            assert!(part.payload.len() < usize::from(u16::MAX));
        }
    }

    #[test]
    fn a_network_is_masked_and_one_address_is_not() {
        let bytes = |prefix| {
            let address = std::net::Ipv4Addr::new(10, 1, 2, 3);
            let list = Attributes::default();
            compare(list, &Match::Destination(address, prefix), false).0
        };
        let has = |bytes: &[u8], what: &[u8]| bytes.windows(what.len()).any(|part| part == what);
        assert!(has(&bytes(8), b"bitwise\0") && has(&bytes(8), &[10, 0, 0, 0]));
        assert!(!has(&bytes(32), b"bitwise\0") && has(&bytes(32), &[10, 1, 2, 3]));
        assert!(has(&bytes(0), b"bitwise\0") && !has(&bytes(0), &[10, 1, 2, 3]));
    }

    #[test]
    fn not_turns_the_comparison_round() {
        let mark = || Match::Mark(7);
        let bytes = |condition| compare(Attributes::default(), &condition, false).0;
        let not = |inner| Match::Not(Box::new(inner));
        assert_ne!(bytes(mark()), bytes(not(mark())));
        assert_eq!(bytes(mark()), bytes(not(not(mark()))));
    }
}
