//! Service addresses: nftables rules in the node's namespace that send each new connection to the next ready endpoint.
//!
//! Pods have /32 addresses and reach everything through the node, so the rules there see all of their connections, and replies come back
//! the same way. A client in the mesh never meets them: its sidecar connects to endpoints. [`plan`] is pure, [`run`] applies it.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use mesh_net::conntrack;
use mesh_net::nft::{
    Action, Base, Chain, ChainType, Family, Hook, Match, NftError, Rule, Set, Table as NftTable,
    Transport as NftTransport,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::agent::NODE_IP;
use crate::services::{Port, Table, Transport};

/// The network of the Services' addresses.
const SERVICES: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 0);

/// The nftables table.
pub const TABLE: &str = "mesh-services";

/// Marks a pod's connection to itself through a Service: its source must become the node's, or the pod would drop its own packet.
const HAIRPIN_MARK: u32 = 0x4000;

/// Keeps the rules in step with the Services until `shutdown`.
pub async fn run(mut tables: watch::Receiver<Arc<Table>>, shutdown: CancellationToken) {
    let mut held = None;
    let mut flows = UdpPorts::new();
    loop {
        let table = tables.borrow_and_update().clone();
        let (rules, before) = (plan(&table), held.take());
        let ports = udp_ports(&table);
        let flows_change = std::mem::replace(&mut flows, ports.clone()) != ports;
        // Netlink blocks, for less than a millisecond a hundred rules.
        let applied = tokio::task::spawn_blocking(move || {
            let rules = apply(before, rules)?;
            if flows_change {
                forget_flows(&ports);
            }
            Ok::<_, NftError>(rules)
        });
        match applied.await {
            Ok(Ok(rules)) => held = Some(rules),
            Ok(Err(error)) => tracing::error!(%error, "the service network is not up to date"),
            Err(error) => tracing::error!(%error, "the service network is not up to date"),
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            changed = tables.changed() => if changed.is_err() {
                return;
            },
        }
    }
}

/// Puts the rules into the kernel; what it remembers of clients stays, unless somebody else has changed the rules.
fn apply(before: Option<NftTable>, rules: NftTable) -> Result<NftTable, NftError> {
    let updated = before.map(|before| rules.update(&before));
    if let Some(Err(error)) = &updated {
        tracing::warn!(%error, "the service network is made anew");
    }
    if !matches!(updated, Some(Ok(()))) {
        rules.replace()?;
    }
    Ok(rules)
}

/// The ready endpoints by the address that UDP clients send to.
type UdpPorts = BTreeMap<(Ipv4Addr, u16), Vec<(Ipv4Addr, u16)>>;

fn udp_ports(table: &Table) -> UdpPorts {
    let mut found = UdpPorts::new();
    for entry in table.values() {
        for port in entry.ports.iter().filter(|p| p.transport == Transport::Udp) {
            let cluster = entry.address.map(|address| (address, port.port));
            let node = port.node_port.map(|number| (NODE_IP, number));
            for address in [cluster, node].into_iter().flatten() {
                found.insert(address, port.endpoints.clone());
            }
        }
    }
    found
}

/// Makes the kernel forget UDP flows to endpoints that are no more: it would go on translating to them as long as the client sends.
fn forget_flows(ports: &UdpPorts) {
    let of = |address: SocketAddrV4| (*address.ip(), address.port());
    let forgotten = conntrack::forget_udp(|to, endpoint| match ports.get(&of(to)) {
        Some(endpoints) => !endpoints.contains(&of(endpoint)),
        None => to.ip().octets()[..2] == SERVICES.octets()[..2] && *to.ip() != crate::dns::ADDRESS,
    });
    if let Err(error) = forgotten {
        tracing::warn!(%error, "UDP clients of endpoints that have gone may have to open a new socket");
    }
}

/// The rules for these Services.
pub fn plan(table: &Table) -> NftTable {
    let mut planner = Planner::default();
    for ((namespace, service), entry) in table {
        for port in &entry.ports {
            if let Some(address) = entry.address {
                planner.service(
                    &format!("{namespace}-{service}"),
                    address,
                    port.port,
                    port,
                    entry.affinity,
                );
            }
            if let Some(node_port) = port.node_port {
                planner.service(
                    &format!("{namespace}-{service}"),
                    NODE_IP,
                    node_port,
                    port,
                    entry.affinity,
                );
            }
        }
        if let Some(address) = entry.address.filter(|a| *a != crate::dns::ADDRESS) {
            planner.no_such_port(address);
        }
    }
    planner.table()
}

#[derive(Default)]
struct Planner {
    sets: Vec<Set>,
    dispatch: Vec<Rule>,
    refuse: Vec<Rule>,
    endpoints: Vec<Chain>,
}

impl Planner {
    fn service(
        &mut self,
        name: &str,
        address: Ipv4Addr,
        number: u16,
        port: &Port,
        affinity: Option<Duration>,
    ) {
        let transport = match port.transport {
            Transport::Tcp => NftTransport::Tcp,
            Transport::Udp => NftTransport::Udp,
        };
        let matches = vec![
            Match::Destination(address, 32),
            Match::Transport(transport),
            Match::DestinationPort(number),
        ];
        if port.endpoints.is_empty() {
            // As kube-proxy does: refused at once, in place of a timeout.
            let answer = if port.transport == Transport::Tcp {
                Action::RejectTcp
            } else {
                Action::RejectUnreachable
            };
            self.refuse.push(Rule::counted(matches, answer));
            return;
        }
        let mut chains = Vec::new();
        for endpoint in &port.endpoints {
            let to = self.endpoint(*endpoint, transport);
            let Some(timeout) = affinity else {
                chains.push(to);
                continue;
            };
            // One memory for all addresses of the port, as kube-proxy has it.
            let keep = format!("{name}-{}-{to}", port.port);
            let known = Match::SourceIn(keep.clone());
            self.dispatch.push(Rule::counted(
                matches.iter().cloned().chain([known]),
                Action::Goto(keep.clone()),
            ));
            self.remember(&keep, to, timeout);
            chains.push(keep);
        }
        self.dispatch
            .push(Rule::counted(matches, Action::InTurn(chains)));
    }

    /// The set of an endpoint's clients, and the chain that puts them there on the way to it.
    fn remember(&mut self, name: &str, to: String, timeout: Duration) {
        if self.sets.iter().any(|set| set.name == name) {
            return;
        }
        self.sets.push(Set {
            name: name.to_owned(),
            timeout,
        });
        let remember = Rule {
            matches: Vec::new(),
            actions: vec![Action::RememberSource(name.to_owned()), Action::Goto(to)],
        };
        self.endpoints.push(Chain {
            name: name.to_owned(),
            base: None,
            rules: vec![remember],
        });
    }

    /// A Service's address refuses what it has no port for, as kube-proxy has it.
    fn no_such_port(&mut self, address: Ipv4Addr) {
        let service = Match::Destination(address, 32);
        let tcp = Match::Transport(NftTransport::Tcp);
        self.refuse
            .push(Rule::counted([service.clone(), tcp], Action::RejectTcp));
        self.refuse
            .push(Rule::counted([service], Action::RejectUnreachable));
    }

    /// The chain that sends a connection to one endpoint.
    fn endpoint(&mut self, (address, port): (Ipv4Addr, u16), transport: NftTransport) -> String {
        let protocol = if transport == NftTransport::Tcp {
            "tcp"
        } else {
            "udp"
        };
        let name = format!("to-{protocol}-{address}-{port}");
        if !self.endpoints.iter().any(|chain| chain.name == name) {
            let hairpin = Rule {
                matches: vec![Match::Source(address, 32)],
                actions: vec![Action::SetMark(HAIRPIN_MARK)],
            };
            let send = Rule {
                matches: vec![Match::Transport(transport)],
                actions: vec![Action::DestinationNat(address, port)],
            };
            self.endpoints.push(Chain {
                name: name.clone(),
                base: None,
                rules: vec![hairpin, send],
            });
        }
        name
    }

    fn table(mut self) -> NftTable {
        // No Service has the address, or the rules for it are not there yet. Without this the packet would go nowhere all the same, but the
        // kernel would remember that its connection has no translation, and the sender's next tries would go nowhere too.
        self.refuse.push(Rule::counted(
            [
                Match::Destination(SERVICES, 16),
                Match::Not(Box::new(Match::Destination(crate::dns::ADDRESS, 32))),
            ],
            Action::Drop,
        ));
        let base = |kind, hook, priority| {
            Some(Base {
                kind,
                hook,
                priority,
            })
        };
        let chain = |name: &str, base, rules: Vec<Rule>| Chain {
            name: name.to_owned(),
            base,
            rules,
        };
        let jump = |name: &str| {
            vec![Rule {
                matches: Vec::new(),
                actions: vec![Action::Jump(name.to_owned())],
            }]
        };
        let hairpin = vec![Rule::counted(
            [Match::Mark(HAIRPIN_MARK)],
            Action::Masquerade,
        )];
        let mut chains = vec![
            chain("services", None, self.dispatch),
            chain("no-endpoints", None, self.refuse),
            chain(
                "prerouting",
                base(ChainType::Nat, Hook::Prerouting, -100),
                jump("services"),
            ),
            chain(
                "output",
                base(ChainType::Nat, Hook::Output, -100),
                jump("services"),
            ),
            chain(
                "postrouting",
                base(ChainType::Nat, Hook::Postrouting, 100),
                hairpin,
            ),
            chain(
                "forward-refuse",
                base(ChainType::Filter, Hook::Forward, 0),
                jump("no-endpoints"),
            ),
            chain(
                "input-refuse",
                base(ChainType::Filter, Hook::Input, 0),
                jump("no-endpoints"),
            ),
            chain(
                "output-refuse",
                base(ChainType::Filter, Hook::Output, 0),
                jump("no-endpoints"),
            ),
        ];
        chains.extend(self.endpoints);
        NftTable {
            family: Family::Ip,
            name: TABLE.to_owned(),
            sets: self.sets,
            chains,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::{Entry, Kind};

    #[test]
    fn ready_endpoints_are_taken_in_turn_and_none_is_a_refusal() {
        let endpoint = |last| (Ipv4Addr::new(10, 244, 0, last), 9080);
        let port = |number, endpoints| Port {
            name: String::new(),
            port: number,
            transport: Transport::Tcp,
            node_port: None,
            endpoints,
        };
        let entry = Entry {
            kind: Kind::Cluster,
            address: Some(Ipv4Addr::new(10, 96, 3, 4)),
            external_name: None,
            ports: vec![port(9080, vec![endpoint(5), endpoint(6)]), port(81, vec![])],
            hosts: vec![],
            affinity: None,
        };
        let sticky = Entry {
            address: Some(Ipv4Addr::new(10, 96, 3, 5)),
            ports: vec![port(80, vec![endpoint(5), endpoint(6)])],
            affinity: Some(Duration::from_secs(60)),
            ..entry.clone()
        };
        let name = |service: &str| ("default".to_owned(), service.to_owned());
        let table = [(name("reviews"), entry), (name("sticky"), sticky)].into();
        let text = plan(&table).to_text();
        for line in [
            "ip daddr 10.96.3.4 tcp dport 9080 counter numgen inc mod 2 vmap { 0 : goto to-tcp-10.244.0.5-9080, 1 : goto to-tcp-10.244.0.6-9080 }",
            "ip daddr 10.96.3.4 tcp dport 81 counter reject with tcp reset",
            "ip saddr 10.244.0.5 meta mark set 0x4000",
            "meta l4proto tcp dnat ip to 10.244.0.5:9080",
            "ip daddr 10.96.3.4 meta l4proto tcp counter reject with tcp reset",
            "ip daddr 10.96.3.5 tcp dport 80 ip saddr @default-sticky-80-to-tcp-10.244.0.6-9080 counter goto default-sticky-80-to-tcp-10.244.0.6-9080",
            "update @default-sticky-80-to-tcp-10.244.0.6-9080 { ip saddr } goto to-tcp-10.244.0.6-9080",
            "type ipv4_addr; flags dynamic,timeout; timeout 60000ms;",
            "ip daddr 10.96.0.0/16 ip daddr != 10.96.0.10 counter drop",
        ] {
            assert!(text.contains(line), "{line}\nis not in\n{text}");
        }
        assert!(plan(&Table::new()).chains.len() == 8);
    }
}
