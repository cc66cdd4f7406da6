//! The rules, in the order of Istio's `istio-iptables` (traffic capture, REDIRECT mode).

use std::net::{Ipv4Addr, Ipv6Addr};

use super::{Config, Exemption, TABLE, Which};
use crate::nft::{Action, Base, Chain, ChainType, Family, Hook, Match, Rule, Table, Transport};

pub(super) const PREROUTING: &str = "prerouting";
pub(super) const OUTPUT: &str = "output";
const INBOUND: &str = "istio-inbound";
const REDIRECT: &str = "istio-redirect";
const IN_REDIRECT: &str = "istio-in-redirect";
const ISTIO_OUTPUT: &str = "istio-output";

/// The source address of the proxy's connections to its application.
const PASSTHROUGH: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 6);
const PASSTHROUGH6: Ipv6Addr = Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6);

/// The chains with their rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub(super) chains: Vec<(&'static str, Vec<Rule>)>,
}

impl Config {
    /// The rules that capture what this configuration says.
    pub fn plan(&self) -> Plan {
        let chains = vec![
            (PREROUTING, self.prerouting()),
            (OUTPUT, self.output()),
            (INBOUND, self.inbound_rules()),
            (
                REDIRECT,
                vec![rule([tcp()], Action::Redirect(self.outbound_port))],
            ),
            (
                IN_REDIRECT,
                vec![rule([tcp()], Action::Redirect(self.inbound_port))],
            ),
            (ISTIO_OUTPUT, self.istio_output()),
        ];
        Plan { chains }
    }

    fn prerouting(&self) -> Vec<Rule> {
        if self.inbound == Which::Only(Vec::new()) {
            return Vec::new();
        }
        let excluded = self
            .exclude_interfaces
            .iter()
            .map(|name| rule([Match::InInterface(name.clone())], Action::Return));
        excluded.chain([rule([tcp()], jump(INBOUND))]).collect()
    }

    fn output(&self) -> Vec<Rule> {
        let excluded = self
            .exclude_interfaces
            .iter()
            .map(|name| rule([Match::OutInterface(name.clone())], Action::Return));
        excluded.chain([rule([], jump(ISTIO_OUTPUT))]).collect()
    }

    fn inbound_rules(&self) -> Vec<Rule> {
        let mut rules = vec![rule([tcp(), port(self.tunnel_port)], Action::Return)];
        match &self.inbound {
            Which::All => {
                rules.extend(
                    self.inbound_exclude
                        .iter()
                        .map(|p| rule([tcp(), port(*p)], Action::Return)),
                );
                rules.push(rule([tcp()], jump(IN_REDIRECT)));
            }
            Which::Only(ports) => rules.extend(
                ports
                    .iter()
                    .map(|p| rule([tcp(), port(*p)], jump(IN_REDIRECT))),
            ),
        }
        rules
    }

    fn istio_output(&self) -> Vec<Rule> {
        let mut rules = Vec::new();
        // Before the loopback rules, so that an excluded port is excluded for the proxy's calls to itself too.
        for p in &self.outbound_ports_exclude {
            rules.push(rule([tcp(), port(*p)], Action::Return));
            rules.push(rule(
                [Match::Transport(Transport::Udp), port(*p)],
                Action::Return,
            ));
        }
        rules.push(rule(
            [loopback(), Match::Ipv4, Match::Source(PASSTHROUGH, 32)],
            Action::Return,
        ));
        rules.push(rule(
            [loopback(), Match::Ipv6, Match::Source6(PASSTHROUGH6)],
            Action::Return,
        ));
        match &self.exemption {
            Exemption::Owner { uids, gids } => {
                uids.iter()
                    .for_each(|uid| self.exempt(&Match::SocketUid(*uid), &mut rules));
                gids.iter()
                    .for_each(|gid| self.exempt(&Match::SocketGid(*gid), &mut rules));
            }
            Exemption::Mark(mark) => self.exempt(&Match::Mark(*mark), &mut rules),
        }
        rules.push(rule(
            [Match::Ipv4, Match::Destination(Ipv4Addr::LOCALHOST, 32)],
            Action::Return,
        ));
        rules.push(rule(
            [Match::Ipv6, Match::Destination6(Ipv6Addr::LOCALHOST)],
            Action::Return,
        ));
        let to = |(address, prefix): &(Ipv4Addr, u8)| {
            [Match::Ipv4, Match::Destination(*address, *prefix)]
        };
        rules.extend(
            self.outbound_exclude
                .iter()
                .map(|network| rule(to(network), Action::Return)),
        );
        rules.extend(
            self.outbound_ports
                .iter()
                .map(|p| rule([tcp(), port(*p)], jump(REDIRECT))),
        );
        match &self.outbound {
            Which::All => rules.push(rule([], jump(REDIRECT))),
            Which::Only(networks) => rules.extend(
                networks
                    .iter()
                    .map(|network| rule(to(network), jump(REDIRECT))),
            ),
        }
        rules
    }

    /// The proxy calling its own pod by the pod's address comes in again like everybody; an application calling itself is left alone;
    /// everything else of the proxy's is its own business.
    fn exempt(&self, proxy: &Match, rules: &mut Vec<Rule>) {
        let not_loopback4 = [
            Match::Ipv4,
            not(Match::Destination(Ipv4Addr::LOCALHOST, 32)),
        ];
        let not_loopback6 = [Match::Ipv6, not(Match::Destination6(Ipv6Addr::LOCALHOST))];
        for outside in [not_loopback4, not_loopback6] {
            let matches = [loopback()].into_iter().chain(outside).chain([
                tcp(),
                not(port(self.tunnel_port)),
                proxy.clone(),
            ]);
            rules.push(rule(matches, jump(IN_REDIRECT)));
        }
        rules.push(rule([loopback(), not(proxy.clone())], Action::Return));
        rules.push(rule([proxy.clone()], Action::Return));
    }
}

impl Plan {
    /// The rules as an nftables table.
    pub fn table(&self) -> Table {
        let base = |name: &str| {
            let hook = match name {
                PREROUTING => Hook::Prerouting,
                OUTPUT => Hook::Output,
                _ => return None,
            };
            Some(Base {
                kind: ChainType::Nat,
                hook,
                priority: -100,
            })
        };
        let chains = self.chains.iter().map(|(name, rules)| Chain {
            name: (*name).to_owned(),
            base: base(name),
            rules: rules.clone(),
        });
        Table {
            family: Family::Inet,
            name: TABLE.to_owned(),
            sets: Vec::new(),
            chains: chains.collect(),
        }
    }

    /// How many rules there are.
    pub fn len(&self) -> usize {
        self.chains.iter().map(|(_, rules)| rules.len()).sum()
    }

    /// Whether there are no rules at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
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

fn port(port: u16) -> Match {
    Match::DestinationPort(port)
}

fn loopback() -> Match {
    Match::OutInterface("lo".to_owned())
}

fn not(inner: Match) -> Match {
    Match::Not(Box::new(inner))
}
