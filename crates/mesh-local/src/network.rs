//! Service addresses: nftables rules in the node's namespace that send each new connection to the next ready endpoint.
//!
//! Pods have /32 addresses and reach everything through the node, so the rules there see all of their connections, and replies come back
//! the same way. A client in the mesh never meets them: its sidecar connects to endpoints. [`plan`] is pure, [`run`] applies it.

use std::net::Ipv4Addr;
use std::sync::Arc;

use mesh_net::nft::{
    Action, Base, Chain, ChainType, Family, Hook, Match, Rule, Table as NftTable,
    Transport as NftTransport,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::services::{Port, Table, Transport};

/// The nftables table.
pub const TABLE: &str = "mesh-services";

/// Marks a pod's connection to itself through a Service: its source must become the node's, or the pod would drop its own packet.
const HAIRPIN_MARK: u32 = 0x4000;

/// Keeps the rules in step with the Services until `shutdown`.
pub async fn run(mut tables: watch::Receiver<Arc<Table>>, shutdown: CancellationToken) {
    loop {
        let rules = plan(&tables.borrow_and_update());
        // Netlink blocks, for less than a millisecond a hundred rules.
        let applied = tokio::task::spawn_blocking(move || rules.replace()).await;
        match applied {
            Ok(Ok(())) => {}
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

/// The rules for these Services.
pub fn plan(table: &Table) -> NftTable {
    let mut planner = Planner::default();
    for ((namespace, service), entry) in table {
        if entry.affinity {
            tracing::warn!(%service, %namespace, "sessionAffinity ClientIP is not applied by this version: connections go to all endpoints in turn");
        }
        for port in &entry.ports {
            if let Some(address) = entry.address {
                planner.service(&[Match::Destination(address, 32)], port.port, port);
            }
            if let Some(node_port) = port.node_port {
                planner.service(
                    &[Match::Destination(Ipv4Addr::new(10, 244, 0, 1), 32)],
                    node_port,
                    port,
                );
            }
        }
    }
    planner.table()
}

#[derive(Default)]
struct Planner {
    dispatch: Vec<Rule>,
    refuse: Vec<Rule>,
    endpoints: Vec<Chain>,
}

impl Planner {
    fn service(&mut self, destination: &[Match], number: u16, port: &Port) {
        let transport = match port.transport {
            Transport::Tcp => NftTransport::Tcp,
            Transport::Udp => NftTransport::Udp,
        };
        let mut matches = destination.to_vec();
        matches.extend([Match::Transport(transport), Match::DestinationPort(number)]);
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
        let chains = port
            .endpoints
            .iter()
            .map(|endpoint| self.endpoint(*endpoint, transport))
            .collect();
        self.dispatch
            .push(Rule::counted(matches, Action::InTurn(chains)));
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

    fn table(self) -> NftTable {
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
            affinity: false,
        };
        let table = [(("default".to_owned(), "reviews".to_owned()), entry)].into();
        let text = plan(&table).to_text();
        for line in [
            "ip daddr 10.96.3.4 tcp dport 9080 counter numgen inc mod 2 vmap { 0 : goto to-tcp-10.244.0.5-9080, 1 : goto to-tcp-10.244.0.6-9080 }",
            "ip daddr 10.96.3.4 tcp dport 81 counter reject with tcp reset",
            "ip saddr 10.244.0.5 meta mark set 0x4000",
            "meta l4proto tcp dnat ip to 10.244.0.5:9080",
        ] {
            assert!(text.contains(line), "{line}\nis not in\n{text}");
        }
        assert!(plan(&Table::new()).chains.len() == 8);
    }
}
