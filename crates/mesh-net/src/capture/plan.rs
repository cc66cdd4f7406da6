//! The rules, in the order of Istio's `istio-iptables`: each is written down once, and the two forms (nftables and iptables-restore) are made of it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{Config, Exemption, Interception, Network, TABLES, Which};
use crate::nft::{Action, Base, Chain, ChainType, Family, Hook, Match, Rule, Table, Transport};

mod dns;
mod tproxy;

pub(super) const PREROUTING: &str = "prerouting";
pub(super) const OUTPUT: &str = "output";
const INBOUND: &str = "istio-inbound";
const REDIRECT: &str = "istio-redirect";
const IN_REDIRECT: &str = "istio-in-redirect";
const ISTIO_OUTPUT: &str = "istio-output";
const DROP: &str = "istio-drop";

/// The source address of the proxy's connections to its application.
const PASSTHROUGH: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 6);
const PASSTHROUGH6: Ipv6Addr = Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6);

/// The tables, in the order in which they are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Nat,
    Mangle,
    Raw,
}

impl Kind {
    pub(super) const ALL: [Self; 3] = [Self::Nat, Self::Mangle, Self::Raw];

    /// Its name in iptables.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Nat => "nat",
            Self::Mangle => "mangle",
            Self::Raw => "raw",
        }
    }

    fn base(self, chain: &str) -> Option<Base> {
        let hook = match chain {
            PREROUTING => Hook::Prerouting,
            OUTPUT => Hook::Output,
            _ => return None,
        };
        // Priorities are those of iptables' tables (linux/netfilter_ipv4.h). A changed mark counts for the routing of what goes out.
        let (kind, priority) = match (self, hook) {
            (Self::Nat, _) => (ChainType::Nat, -100),
            (Self::Mangle, Hook::Output) => (ChainType::Route, -150),
            (Self::Mangle, _) => (ChainType::Filter, -150),
            (Self::Raw, _) => (ChainType::Filter, -300),
        };
        Some(Base {
            kind,
            hook,
            priority,
        })
    }
}

/// One rule and where it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) table: Kind,
    pub(super) chain: &'static str,
    /// Where it is put in, counted from 0: in a chain of one address family (iptables), and in one of both (nftables). `None` is at the end.
    pub(super) at: Option<(usize, usize)>,
    pub(super) rule: Rule,
}

/// The rules in the order in which they are added.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    pub(super) entries: Vec<Entry>,
}

impl Config {
    /// The rules that capture what this configuration says.
    pub fn plan(&self) -> Plan {
        let mut plan = Plan::default();
        self.excluded_interfaces(&mut plan);
        for name in &self.reroute_interfaces {
            // The later comes before the earlier, as in Istio.
            let rule = rule([Match::InInterface(name.clone())], Action::Return);
            plan.insert(Kind::Nat, PREROUTING, (0, 0), rule);
        }
        if self.drop_invalid {
            plan.add(Kind::Mangle, PREROUTING, [Match::Invalid], jump(DROP));
            plan.add(Kind::Mangle, DROP, [], Action::Drop);
        }
        let tunnel = [tcp(), port(self.tunnel_port)];
        plan.add(Kind::Nat, INBOUND, tunnel, Action::Return);
        let outbound = Action::Redirect(self.outbound_port);
        plan.add(Kind::Nat, REDIRECT, [tcp()], outbound);
        let inbound = Action::Redirect(self.inbound_port);
        plan.add(Kind::Nat, IN_REDIRECT, [tcp()], inbound);
        match self.interception {
            Interception::Redirect => self.inbound_rules(&mut plan),
            Interception::Tproxy => self.tproxy_inbound(&mut plan),
        }
        plan.add(Kind::Nat, OUTPUT, [], jump(ISTIO_OUTPUT));
        self.output_rules(&mut plan);
        if self.interception == Interception::Tproxy {
            self.tproxy_marks(&mut plan);
        }
        plan
    }

    fn excluded_interfaces(&self, plan: &mut Plan) {
        for name in &self.exclude_interfaces {
            let tables = match self.interception {
                Interception::Redirect => &[Kind::Nat][..],
                Interception::Tproxy => &[Kind::Nat, Kind::Mangle],
            };
            for table in tables {
                let (by_in, by_out) = (name.clone(), name.clone());
                plan.add(
                    *table,
                    PREROUTING,
                    [Match::InInterface(by_in)],
                    Action::Return,
                );
                plan.add(
                    *table,
                    OUTPUT,
                    [Match::OutInterface(by_out)],
                    Action::Return,
                );
            }
        }
    }

    fn inbound_rules(&self, plan: &mut Plan) {
        if self.inbound == Which::Only(Vec::new()) {
            return;
        }
        plan.add(Kind::Nat, PREROUTING, [tcp()], jump(INBOUND));
        match &self.inbound {
            Which::All => {
                for p in &self.inbound_exclude {
                    plan.add(Kind::Nat, INBOUND, [tcp(), port(*p)], Action::Return);
                }
                plan.add(Kind::Nat, INBOUND, [tcp()], jump(IN_REDIRECT));
            }
            Which::Only(ports) => {
                for p in ports {
                    plan.add(Kind::Nat, INBOUND, [tcp(), port(*p)], jump(IN_REDIRECT));
                }
            }
        }
    }

    fn output_rules(&self, plan: &mut Plan) {
        let out = |plan: &mut Plan, matches: Vec<Match>, action| {
            plan.add(Kind::Nat, ISTIO_OUTPUT, matches, action);
        };
        // Before the loopback rules, so that an excluded port is excluded for the proxy's calls to itself too.
        for p in &self.outbound_ports_exclude {
            out(plan, vec![tcp(), port(*p)], Action::Return);
            out(plan, vec![udp(), port(*p)], Action::Return);
        }
        let from = [
            vec![loopback(), Match::Ipv4, Match::Source(PASSTHROUGH, 32)],
            vec![loopback(), Match::Ipv6, Match::Source6(PASSTHROUGH6, 128)],
        ];
        for matches in from {
            out(plan, matches, Action::Return);
        }
        match &self.exemption {
            Exemption::Owner { uids, gids } => {
                for uid in uids {
                    self.exempt(plan, &Match::SocketUid(*uid), true);
                }
                for gid in gids {
                    self.exempt(plan, &Match::SocketGid(*gid), false);
                }
            }
            Exemption::Mark(mark) => self.exempt(plan, &Match::Mark(*mark), true),
        }
        self.owner_groups(plan);
        if self.dns.redirect {
            self.dns_rules(plan);
        }
        let (address, prefix) = self.loopback;
        out(
            plan,
            vec![Match::Ipv4, Match::Destination(address, prefix)],
            Action::Return,
        );
        out(
            plan,
            vec![Match::Ipv6, Match::Destination6(Ipv6Addr::LOCALHOST, 128)],
            Action::Return,
        );
        for network in &self.outbound_exclude {
            out(plan, to(network), Action::Return);
        }
        for p in &self.outbound_ports {
            out(plan, vec![tcp(), port(*p)], jump(REDIRECT));
        }
        self.outbound_networks(plan);
    }

    fn outbound_networks(&self, plan: &mut Plan) {
        let networks: Vec<Vec<Match>> = match &self.outbound {
            Which::All => vec![Vec::new()],
            Which::Only(networks) => networks.iter().map(to).collect(),
        };
        for destination in networks {
            // What comes in by the interface of a virtual machine is what that one sends out.
            for name in &self.reroute_interfaces {
                let matches = [Match::InInterface(name.clone())]
                    .into_iter()
                    .chain(destination.clone());
                let rule = rule(matches, jump(REDIRECT));
                plan.insert(Kind::Nat, PREROUTING, (0, 0), rule);
            }
            plan.add(Kind::Nat, ISTIO_OUTPUT, destination, jump(REDIRECT));
        }
    }

    /// The proxy calling its own pod by the pod's address comes in again like everybody; an application calling itself is left alone;
    /// everything else of the proxy's is its own business. With DNS capture queries to a server on this host are captured, too; Istio's
    /// rule for groups (`with_dns` false) does not let the proxy's own out of the first of the three.
    fn exempt(&self, plan: &mut Plan, proxy: &Match, with_dns: bool) {
        for outside in not_loopback() {
            let mut matches = vec![loopback()];
            matches.extend(outside);
            matches.push(tcp());
            if self.dns.redirect && with_dns {
                matches.push(not(port(dns::PORT)));
            }
            matches.extend([not(port(self.tunnel_port)), proxy.clone()]);
            plan.add(Kind::Nat, ISTIO_OUTPUT, matches, jump(IN_REDIRECT));
        }
        // Who lists loopback addresses among the destinations to capture means an application's calls to itself.
        if !self.captures_loopback() {
            let mut matches = vec![loopback()];
            if self.dns.redirect {
                matches.extend([tcp(), not(port(dns::PORT))]);
            }
            matches.push(not(proxy.clone()));
            plan.add(Kind::Nat, ISTIO_OUTPUT, matches, Action::Return);
        }
        plan.add(Kind::Nat, ISTIO_OUTPUT, [proxy.clone()], Action::Return);
    }

    fn captures_loopback(&self) -> bool {
        match &self.outbound {
            Which::All => false,
            Which::Only(networks) => networks.iter().any(|(address, _)| address.is_loopback()),
        }
    }

    /// Only sockets of these groups are captured, or all but those of these.
    fn owner_groups(&self, plan: &mut Plan) {
        match &self.owner_groups {
            Which::All => {
                for group in &self.owner_groups_exclude {
                    let owner = [Match::SocketGid(*group)];
                    plan.add(Kind::Nat, ISTIO_OUTPUT, owner, Action::Return);
                }
            }
            Which::Only(groups) => {
                let none_of = groups.iter().map(|group| not(Match::SocketGid(*group)));
                plan.add(Kind::Nat, ISTIO_OUTPUT, none_of, Action::Return);
            }
        }
    }
}

impl Plan {
    fn add(
        &mut self,
        table: Kind,
        chain: &'static str,
        matches: impl IntoIterator<Item = Match>,
        action: Action,
    ) {
        self.push(table, chain, rule(matches, action));
    }

    fn push(&mut self, table: Kind, chain: &'static str, rule: Rule) {
        self.entries.push(Entry {
            table,
            chain,
            at: None,
            rule,
        });
    }

    fn insert(&mut self, table: Kind, chain: &'static str, at: (usize, usize), rule: Rule) {
        self.entries.push(Entry {
            table,
            chain,
            at: Some(at),
            rule,
        });
    }

    /// The rules as nftables tables; a table without rules is not among them.
    pub fn tables(&self) -> Vec<Table> {
        Kind::ALL
            .iter()
            .zip(TABLES)
            .filter_map(|(kind, name)| {
                let chains = self.chains(*kind);
                (!chains.is_empty()).then(|| Table {
                    family: Family::Inet,
                    name: name.to_owned(),
                    sets: Vec::new(),
                    chains,
                })
            })
            .collect()
    }

    /// The chains of a table, those that the kernel calls first, each with its rules in their final order.
    fn chains(&self, table: Kind) -> Vec<Chain> {
        let mut chains: Vec<Chain> = Vec::new();
        let of_table = || self.entries.iter().filter(|entry| entry.table == table);
        for name in [PREROUTING, OUTPUT]
            .into_iter()
            .chain(of_table().map(|entry| entry.chain))
        {
            if !chains.iter().any(|chain| chain.name == name) {
                chains.push(Chain {
                    name: name.to_owned(),
                    base: table.base(name),
                    rules: Vec::new(),
                });
            }
        }
        for entry in of_table() {
            let Some(chain) = chains.iter_mut().find(|chain| chain.name == entry.chain) else {
                continue;
            };
            let end = chain.rules.len();
            let at = entry.at.map_or(end, |(_, both)| both.min(end));
            chain.rules.insert(at, entry.rule.clone());
        }
        chains.retain(|chain| !chain.rules.is_empty());
        chains
    }

    /// How many rules there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no rules at all.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

fn rule(matches: impl IntoIterator<Item = Match>, action: Action) -> Rule {
    Rule::counted(matches, action)
}

fn jump(chain: &str) -> Action {
    Action::Jump(chain.to_owned())
}

fn tcp() -> Match {
    Match::Transport(Transport::Tcp)
}

fn udp() -> Match {
    Match::Transport(Transport::Udp)
}

fn port(port: u16) -> Match {
    Match::DestinationPort(port)
}

fn loopback() -> Match {
    Match::OutInterface("lo".to_owned())
}

fn not(inner: Match) -> Match {
    Match::Not(Box::new(inner))
}

fn to(network: &Network) -> Vec<Match> {
    match *network {
        (IpAddr::V4(address), prefix) => vec![Match::Ipv4, Match::Destination(address, prefix)],
        (IpAddr::V6(address), prefix) => vec![Match::Ipv6, Match::Destination6(address, prefix)],
    }
}

/// Not to this host's own addresses of loopback, for each family.
fn not_loopback() -> [Vec<Match>; 2] {
    let v4 = not(Match::Destination(Ipv4Addr::LOCALHOST, 32));
    let v6 = not(Match::Destination6(Ipv6Addr::LOCALHOST, 128));
    [vec![Match::Ipv4, v4], vec![Match::Ipv6, v6]]
}
