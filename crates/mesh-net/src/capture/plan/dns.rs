//! DNS capture: queries of the application go to the agent.
//!
//! A query that is redirected and the agent's own query for it could have the same addresses and ports on the way back; each kind is therefore
//! tracked in a table of its own (a conntrack zone).

use std::net::IpAddr;

use super::{
    Action, Config, INBOUND, ISTIO_OUTPUT, Kind, Match, OUTPUT, PREROUTING, Plan, jump, port, to,
    udp,
};
use crate::nft::Transport;

/// Where servers of DNS listen.
pub(super) const PORT: u16 = 53;
/// Where the agent listens.
const AGENT: u16 = 15053;
const OUTPUT_DNS: &str = "istio-output-dns";
/// Conntrack zones: between agent and servers, and between application and agent.
const AGENTS: u16 = 1;
const APPLICATIONS: u16 = 2;

impl Config {
    pub(super) fn dns_rules(&self, plan: &mut Plan) {
        plan.add(Kind::Raw, OUTPUT, [], jump(OUTPUT_DNS));
        plan.add(Kind::Nat, ISTIO_OUTPUT, [], jump(OUTPUT_DNS));
        let servers = self.servers();
        for transport in [Transport::Tcp, Transport::Udp] {
            for server in &servers {
                let mut matches = vec![Match::Transport(transport), port(PORT)];
                matches.extend(server.iter().flat_map(|ip| to(&network(*ip))));
                plan.add(Kind::Nat, OUTPUT_DNS, matches, Action::Redirect(AGENT));
            }
        }
        let zone = |plan: &mut Plan, chain, matches: Vec<Match>, zone| {
            plan.add(Kind::Raw, chain, matches, Action::ConnectionZone(zone));
        };
        for proxy in self.proxies() {
            let query = vec![udp(), port(PORT), proxy.clone()];
            zone(plan, OUTPUT_DNS, query, AGENTS);
            let answer = vec![udp(), Match::SourcePort(AGENT), proxy];
            zone(plan, OUTPUT_DNS, answer, APPLICATIONS);
        }
        if !servers.is_empty() {
            plan.add(Kind::Raw, PREROUTING, [], jump(INBOUND));
        }
        for server in &servers {
            let mut query = vec![udp(), port(PORT)];
            query.extend(server.iter().flat_map(|ip| to(&network(*ip))));
            zone(plan, OUTPUT_DNS, query, APPLICATIONS);
            let mut answer = vec![udp(), Match::SourcePort(PORT)];
            answer.extend(server.iter().flat_map(|ip| from(*ip)));
            zone(plan, INBOUND, answer, AGENTS);
        }
    }

    /// The servers whose queries are captured; `None` stands for any.
    fn servers(&self) -> Vec<Option<IpAddr>> {
        match self.dns.all {
            true => vec![None],
            false => self.dns.servers.iter().copied().map(Some).collect(),
        }
    }
}

fn network(ip: IpAddr) -> (IpAddr, u8) {
    (ip, if ip.is_ipv4() { 32 } else { 128 })
}

fn from(ip: IpAddr) -> [Match; 2] {
    match ip {
        IpAddr::V4(ip) => [Match::Ipv4, Match::Source(ip, 32)],
        IpAddr::V6(ip) => [Match::Ipv6, Match::Source6(ip, 128)],
    }
}
