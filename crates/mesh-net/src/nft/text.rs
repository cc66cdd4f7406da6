//! Tables in the syntax of nft(8).

use super::{Action, Chain, ChainType, Family, Hook, Match, Rule, Set, Table, Transport};

pub(super) fn table(table: &Table) -> String {
    let family = match table.family {
        Family::Inet => "inet",
        Family::Ip => "ip",
    };
    let mut out = format!("table {family} {} {{\n", table.name);
    for s in &table.sets {
        set(&mut out, s);
    }
    for (i, c) in table.chains.iter().enumerate() {
        if i > 0 || !table.sets.is_empty() {
            out.push('\n');
        }
        chain(&mut out, c);
    }
    out.push_str("}\n");
    out
}

fn set(out: &mut String, set: &Set) {
    out.push_str(&format!(
        "\tset {} {{\n\t\ttype ipv4_addr; flags dynamic,timeout; timeout {}ms;\n\t}}\n",
        set.name,
        set.timeout.as_millis()
    ));
}

fn chain(out: &mut String, chain: &Chain) {
    out.push_str(&format!("\tchain {} {{\n", chain.name));
    if let Some(base) = chain.base {
        let kind = match base.kind {
            ChainType::Nat => "nat",
            ChainType::Filter => "filter",
            ChainType::Route => "route",
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
            other => words.push(condition_text(other, transport, false)),
        }
    }
    words.extend(rule.actions.iter().map(action_text));
    words.join(" ")
}

fn is_port(condition: &Match) -> bool {
    match condition {
        Match::Not(inner) => is_port(inner),
        other => matches!(other, Match::DestinationPort(_) | Match::SourcePort(_)),
    }
}

fn is_address(condition: &Match) -> bool {
    match condition {
        Match::Not(inner) => is_address(inner),
        other => matches!(
            other,
            Match::Source(..)
                | Match::Destination(..)
                | Match::Source6(..)
                | Match::Destination6(..)
                | Match::SourceIn(_)
        ),
    }
}

fn transport_name(transport: Transport) -> &'static str {
    match transport {
        Transport::Tcp => "tcp",
        Transport::Udp => "udp",
    }
}

fn condition_text(condition: &Match, transport: &str, negated: bool) -> String {
    let not = if negated { "!= " } else { "" };
    match condition {
        Match::Not(inner) => condition_text(inner, transport, !negated),
        Match::Ipv4 => format!("meta nfproto {not}ipv4"),
        Match::Ipv6 => format!("meta nfproto {not}ipv6"),
        Match::Transport(t) => format!("meta l4proto {not}{}", transport_name(*t)),
        Match::InInterface(name) => format!("iifname {not}\"{name}\""),
        Match::OutInterface(name) => format!("oifname {not}\"{name}\""),
        Match::Source(address, prefix) => format!("ip saddr {not}{}", network(*address, *prefix)),
        Match::Destination(address, prefix) => {
            format!("ip daddr {not}{}", network(*address, *prefix))
        }
        Match::Source6(address, prefix) => {
            format!("ip6 saddr {not}{}", network6(*address, *prefix))
        }
        Match::Destination6(address, prefix) => {
            format!("ip6 daddr {not}{}", network6(*address, *prefix))
        }
        Match::SourcePort(port) => format!("{transport} sport {not}{port}"),
        Match::DestinationPort(port) => format!("{transport} dport {not}{port}"),
        Match::SocketUid(uid) => format!("meta skuid {not}{uid}"),
        Match::SocketGid(gid) => format!("meta skgid {not}{gid}"),
        Match::Mark(mark) => format!("meta mark {not}{mark:#x}"),
        Match::ConnectionMark(mark) => format!("ct mark {not}{mark:#x}"),
        Match::KnownConnection => format!("ct state {not}established,related"),
        Match::Invalid => format!("ct state {not}invalid"),
        Match::SourceIn(set) => format!("ip saddr {not}@{set}"),
    }
}

fn network(address: std::net::Ipv4Addr, prefix: u8) -> String {
    if prefix >= 32 {
        address.to_string()
    } else {
        format!("{address}/{prefix}")
    }
}

fn network6(address: std::net::Ipv6Addr, prefix: u8) -> String {
    if prefix >= 128 {
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
        Action::Goto(chain) => format!("goto {chain}"),
        Action::RememberSource(set) => format!("update @{set} {{ ip saddr }}"),
        Action::Drop => "drop".to_owned(),
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
        Action::SaveMark => "ct mark set mark".to_owned(),
        Action::RestoreMark => "meta mark set ct mark".to_owned(),
        Action::TransparentProxy { v6, port } => {
            format!("tproxy {} to :{port}", if *v6 { "ip6" } else { "ip" })
        }
        Action::ConnectionZone(zone) => format!("ct zone set {zone}"),
        Action::Accept => "accept".to_owned(),
        Action::Masquerade => "masquerade".to_owned(),
        Action::RejectTcp => "reject with tcp reset".to_owned(),
        Action::RejectUnreachable => "reject with icmp port-unreachable".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn text(matches: Vec<Match>, action: Action) -> String {
        let actions = vec![action];
        rule(&Rule { matches, actions })
    }

    #[test]
    fn every_action_has_the_words_of_nft() {
        let address = Ipv4Addr::new(10, 1, 2, 3);
        for (action, words) in [
            (Action::Counter, "counter"),
            (Action::Return, "return"),
            (Action::Jump("a".into()), "jump a"),
            (Action::Goto("a".into()), "goto a"),
            (Action::RememberSource("s".into()), "update @s { ip saddr }"),
            (Action::Drop, "drop"),
            (Action::Redirect(15001), "redirect to :15001"),
            (
                Action::DestinationNat(address, 80),
                "dnat ip to 10.1.2.3:80",
            ),
            (
                Action::InTurn(vec!["a".into(), "b".into()]),
                "numgen inc mod 2 vmap { 0 : goto a, 1 : goto b }",
            ),
            (Action::SetMark(0x4000), "meta mark set 0x4000"),
            (Action::SaveMark, "ct mark set mark"),
            (Action::RestoreMark, "meta mark set ct mark"),
            (
                Action::TransparentProxy {
                    v6: true,
                    port: 15006,
                },
                "tproxy ip6 to :15006",
            ),
            (Action::ConnectionZone(1), "ct zone set 1"),
            (Action::Accept, "accept"),
            (Action::Masquerade, "masquerade"),
            (Action::RejectTcp, "reject with tcp reset"),
            (
                Action::RejectUnreachable,
                "reject with icmp port-unreachable",
            ),
        ] {
            assert_eq!(text(Vec::new(), action), words);
        }
    }

    #[test]
    fn what_another_word_implies_is_not_said_twice() {
        let tcp = || Match::Transport(Transport::Tcp);
        let net = || Match::Destination(Ipv4Addr::new(10, 0, 0, 0), 8);
        let matches = vec![Match::Ipv4, net(), tcp(), Match::DestinationPort(80)];
        let expected = "ip daddr 10.0.0.0/8 tcp dport 80 return";
        assert_eq!(text(matches, Action::Return), expected);
        let expected = "meta nfproto ipv4 meta l4proto tcp return";
        assert_eq!(text(vec![Match::Ipv4, tcp()], Action::Return), expected);
    }

    #[test]
    fn not_twice_is_not_at_all() {
        let not = |inner| Match::Not(Box::new(inner));
        let once = not(Match::Mark(1));
        assert_eq!(
            text(vec![once.clone()], Action::Return),
            "meta mark != 0x1 return"
        );
        assert_eq!(
            text(vec![not(once)], Action::Return),
            "meta mark 0x1 return"
        );
    }
}
