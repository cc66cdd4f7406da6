//! Tables in the syntax of nft(8).

use super::{Action, Chain, ChainType, Family, Hook, Match, Rule, Table, Transport};

pub(super) fn table(table: &Table) -> String {
    let family = match table.family {
        Family::Inet => "inet",
        Family::Ip => "ip",
    };
    let mut out = format!("table {family} {} {{\n", table.name);
    for (i, c) in table.chains.iter().enumerate() {
        if i > 0 {
            out.push('\n');
        }
        chain(&mut out, c);
    }
    out.push_str("}\n");
    out
}

fn chain(out: &mut String, chain: &Chain) {
    out.push_str(&format!("\tchain {} {{\n", chain.name));
    if let Some(base) = chain.base {
        let kind = match base.kind {
            ChainType::Nat => "nat",
            ChainType::Filter => "filter",
        };
        let hook = match base.hook {
            Hook::Prerouting => "prerouting",
            Hook::Input => "input",
            Hook::Forward => "forward",
            Hook::Output => "output",
            Hook::Postrouting => "postrouting",
        };
        out.push_str(&format!(
            "\t\ttype {kind} hook {hook} priority {}; policy accept;\n",
            base.priority
        ));
    }
    for r in &chain.rules {
        out.push_str(&format!("\t\t{}\n", rule(r)));
    }
    out.push_str("\t}\n");
}

pub(super) fn rule(rule: &Rule) -> String {
    let mut words: Vec<String> = Vec::new();
    let mut transport = "th";
    for (i, condition) in rule.matches.iter().enumerate() {
        match condition {
            // `tcp dport` says the protocol too.
            Match::Transport(t) => {
                transport = transport_name(*t);
                let port_follows = rule.matches[i + 1..].iter().any(is_port);
                if !port_follows {
                    words.push(format!("meta l4proto {transport}"));
                }
            }
            // `ip daddr` says the family too.
            Match::Ipv4 | Match::Ipv6 if rule.matches[i + 1..].iter().any(is_address) => {}
            other => words.push(condition_text(other, transport, "")),
        }
    }
    words.extend(rule.actions.iter().map(action_text));
    words.join(" ")
}

fn is_port(condition: &Match) -> bool {
    match condition {
        Match::Not(inner) => is_port(inner),
        other => matches!(other, Match::DestinationPort(_)),
    }
}

fn is_address(condition: &Match) -> bool {
    match condition {
        Match::Not(inner) => is_address(inner),
        other => matches!(
            other,
            Match::Source(..) | Match::Destination(..) | Match::Source6(_) | Match::Destination6(_)
        ),
    }
}

fn transport_name(transport: Transport) -> &'static str {
    match transport {
        Transport::Tcp => "tcp",
        Transport::Udp => "udp",
    }
}

fn condition_text(condition: &Match, transport: &str, not: &str) -> String {
    match condition {
        Match::Not(inner) => condition_text(inner, transport, "!= "),
        Match::Ipv4 => format!("meta nfproto {not}ipv4"),
        Match::Ipv6 => format!("meta nfproto {not}ipv6"),
        Match::Transport(t) => format!("meta l4proto {not}{}", transport_name(*t)),
        Match::InInterface(name) => format!("iifname {not}\"{name}\""),
        Match::OutInterface(name) => format!("oifname {not}\"{name}\""),
        Match::Source(address, prefix) => format!("ip saddr {not}{}", network(*address, *prefix)),
        Match::Destination(address, prefix) => {
            format!("ip daddr {not}{}", network(*address, *prefix))
        }
        Match::Source6(address) => format!("ip6 saddr {not}{address}"),
        Match::Destination6(address) => format!("ip6 daddr {not}{address}"),
        Match::DestinationPort(port) => format!("{transport} dport {not}{port}"),
        Match::SocketUid(uid) => format!("meta skuid {not}{uid}"),
        Match::SocketGid(gid) => format!("meta skgid {not}{gid}"),
        Match::Mark(mark) => format!("meta mark {not}{mark:#x}"),
    }
}

fn network(address: std::net::Ipv4Addr, prefix: u8) -> String {
    if prefix >= 32 {
        address.to_string()
    } else {
        format!("{address}/{prefix}")
    }
}

fn action_text(action: &Action) -> String {
    match action {
        Action::Counter => "counter".to_owned(),
        Action::Return => "return".to_owned(),
        Action::Jump(chain) => format!("jump {chain}"),
        Action::Redirect(port) => format!("redirect to :{port}"),
        Action::DestinationNat(address, port) => format!("dnat ip to {address}:{port}"),
        Action::InTurn(chains) => {
            let map: Vec<String> = chains
                .iter()
                .enumerate()
                .map(|(i, c)| format!("{i} : goto {c}"))
                .collect();
            format!(
                "numgen inc mod {} vmap {{ {} }}",
                chains.len(),
                map.join(", ")
            )
        }
        Action::SetMark(mark) => format!("meta mark set {mark:#x}"),
        Action::Masquerade => "masquerade".to_owned(),
        Action::RejectTcp => "reject with tcp reset".to_owned(),
        Action::RejectUnreachable => "reject with icmp port-unreachable".to_owned(),
    }
}
