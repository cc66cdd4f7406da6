//! The second form: iptables-restore text for both address families, put in by the programs of that name (the table nat only).
//!
//! What an earlier run left, with whatever flags, is found in what iptables-save prints and taken out in the same transaction.

use std::io::Write;
use std::process::{Command, Stdio};

use super::plan::{Kind, OUTPUT, PREROUTING};
use super::{CaptureError, Plan, routes};
use crate::nft::{Action, Match, Rule, Transport};

/// What the names of our chains begin with.
const OURS: &str = "ISTIO_";

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// `ip6tables` for `iptables`.
    fn program(self, v4: &str, what: &str) -> String {
        let name = match self {
            Self::V4 => v4.to_owned(),
            Self::V6 => v4.replacen("ip", "ip6", 1),
        };
        format!("{name}-{what}")
    }
}

/// `ISTIO_INBOUND` for `istio-inbound`; the kernel's own chains are in capitals too.
fn chain_name(name: &str) -> String {
    name.to_uppercase().replace('-', "_")
}

/// The rules in the form of iptables-restore(8), for `--noflush`; comments say for which program.
pub(super) fn restore_text(plan: &Plan) -> String {
    let each = Family::ALL.map(|family| {
        let program = family.program("iptables", "restore");
        let tables: String = Kind::ALL
            .iter()
            .filter_map(|table| transaction(*table, &[], &[], plan, family))
            .collect();
        format!("# {program} --noflush\n{tables}")
    });
    each.concat()
}

/// The rules of a table in the order in which they are added: `-A CHAIN ...`, or `-I CHAIN POSITION ...`.
fn rules(table: Kind, plan: &Plan, family: Family) -> Vec<String> {
    let of_table = plan.entries.iter().filter(|entry| entry.table == table);
    let line = of_table.filter_map(|entry| {
        let words = words(&entry.rule, family)?;
        let chain = chain_name(entry.chain);
        Some(match entry.at {
            None => format!("-A {chain}{words}"),
            Some((at, _)) => format!("-I {chain} {}{words}", at + 1),
        })
    });
    line.collect()
}

pub(super) fn apply(program: &str, plan: &Plan) -> Result<(), CaptureError> {
    for family in present() {
        let saved = save(program, family)?;
        let (hooked, chains) = (hooked(&saved), own_chains(&saved));
        if let Some(text) = transaction(Kind::Nat, &hooked, &chains, plan, family) {
            restore(program, family, &text)?;
        }
    }
    Ok(())
}

pub(super) fn cleanup(program: &str) -> Result<(), CaptureError> {
    for family in present() {
        restore(program, family, &removal(&save(program, family)?))?;
    }
    Ok(())
}

/// The families that there are in this network namespace.
fn present() -> impl Iterator<Item = Family> {
    let v6 = routes::has_ipv6();
    Family::ALL
        .into_iter()
        .filter(move |family| *family == Family::V4 || v6)
}

/// A table's part of the text; `None` where it has no rules. First the lines of `hooked` are deleted, so that our rules stand in the kernel's
/// chains once, and the chains of `old` that are not used any more.
fn transaction(
    table: Kind,
    hooked: &[String],
    old: &[&str],
    plan: &Plan,
    family: Family,
) -> Option<String> {
    let rules = rules(table, plan, family);
    if rules.is_empty() && hooked.is_empty() && old.is_empty() {
        return None;
    }
    let mut own: Vec<String> = Vec::new();
    for entry in plan.entries.iter().filter(|entry| entry.table == table) {
        let name = chain_name(entry.chain);
        if ![PREROUTING, OUTPUT].contains(&entry.chain) && !own.contains(&name) {
            own.push(name);
        }
    }
    let unused: Vec<&&str> = old
        .iter()
        .filter(|name| !own.iter().any(|own| own == *name))
        .collect();
    let flushed = unused.iter().map(|name| format!("-F {name}"));
    let deleted = unused.iter().map(|name| format!("-X {name}"));
    // Declaring a chain empties it.
    let declared = own.iter().map(|name| format!(":{name} - [0:0]"));
    let lines = declared
        .chain(hooked.iter().cloned())
        .chain(flushed)
        .chain(deleted)
        .chain(rules);
    Some(text(table, lines))
}

/// Chains of ours in what iptables-save printed.
fn own_chains(saved: &str) -> Vec<&str> {
    saved
        .lines()
        .filter_map(|line| line.strip_prefix(':')?.split(' ').next())
        .filter(|name| name.starts_with(OURS))
        .collect()
}

/// Takes out all that is ours.
fn removal(saved: &str) -> String {
    let chains = own_chains(saved);
    let each = |flag: &'static str| chains.iter().map(move |name| format!("{flag} {name}"));
    let lines = hooked(saved)
        .into_iter()
        .chain(each("-F"))
        .chain(each("-X"));
    text(Kind::Nat, lines)
}

fn text(table: Kind, lines: impl Iterator<Item = String>) -> String {
    let lines: String = lines.map(|line| line + "\n").collect();
    format!("* {}\n{lines}COMMIT\n", table.name())
}

/// Lines that delete our rules from the kernel's own chains: each jump to a chain of ours, and the excluded interfaces just before it.
fn hooked(saved: &str) -> Vec<String> {
    let mut found = Vec::new();
    for chain in [PREROUTING, OUTPUT].map(chain_name) {
        let mut excluded = Vec::new();
        for rule in saved
            .lines()
            .filter_map(|line| line.strip_prefix("-A ")?.strip_prefix(&chain))
        {
            let delete = format!("-D {chain}{rule}");
            match rule.split_whitespace().collect::<Vec<_>>()[..] {
                ["-i" | "-o", _, "-j", "RETURN"] => excluded.push(delete),
                [.., "-j", target] if target.starts_with(OURS) => {
                    found.append(&mut excluded);
                    found.push(delete);
                }
                _ => excluded.clear(),
            }
        }
    }
    found
}

fn save(program: &str, family: Family) -> Result<String, CaptureError> {
    let program = family.program(program, "save");
    let output = Command::new(&program)
        .args(["-t", "nat"])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(&program, &error.to_string()))?;
    if !output.status.success() {
        return Err(failed(&program, &String::from_utf8_lossy(&output.stderr)));
    }
    String::from_utf8(output.stdout).map_err(|_| failed(&program, "it printed what is not UTF-8"))
}

fn restore(program: &str, family: Family, text: &str) -> Result<(), CaptureError> {
    let program = family.program(program, "restore");
    let mut child = Command::new(&program)
        .args(["--noflush", "--wait"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(&program, &error.to_string()))?;
    // A program that ends before it has read all says why on its own.
    let written = child
        .stdin
        .take()
        .map_or(Ok(()), |mut input| input.write_all(text.as_bytes()));
    let output = child
        .wait_with_output()
        .map_err(|error| failed(&program, &error.to_string()))?;
    if !output.status.success() {
        return Err(failed(&program, &String::from_utf8_lossy(&output.stderr)));
    }
    written.map_err(|error| failed(&program, &error.to_string()))
}

fn failed(program: &str, reason: &str) -> CaptureError {
    CaptureError::Program {
        program: program.to_owned(),
        reason: reason.trim().to_owned(),
    }
}

/// A rule's matches and target with a space before each; `None` for rules of the other family.
fn words(rule: &Rule, family: Family) -> Option<String> {
    let mut text = String::new();
    let excluded: Vec<u16> = rule.matches.iter().filter_map(excluded_port).collect();
    let mut listed = false;
    for condition in &rule.matches {
        match condition {
            // One match can say that a port is none of several, two of them can't stand in one rule.
            condition if excluded.len() > 1 && excluded_port(condition).is_some() => {
                if !std::mem::replace(&mut listed, true) {
                    let ports: Vec<String> = excluded.iter().map(u16::to_string).collect();
                    text.push_str(&format!(" -m multiport ! --dports {}", ports.join(",")));
                }
            }
            condition => text.push_str(&match_words(condition, family, false)?),
        }
    }
    text.push_str(&target(rule));
    Some(text)
}

fn excluded_port(condition: &Match) -> Option<u16> {
    match condition {
        Match::Not(inner) => match **inner {
            Match::DestinationPort(port) => Some(port),
            _ => None,
        },
        _ => None,
    }
}

/// What happens; iptables counts by itself, and its TPROXY sets the mark and accepts.
fn target(rule: &Rule) -> String {
    let udp = rule.matches.contains(&Match::Transport(Transport::Udp));
    // Istio's rules have both spellings of the flag, which mean the same.
    let flag = if udp { "--to-port" } else { "--to-ports" };
    let actions: Vec<&Action> = rule
        .actions
        .iter()
        .filter(|action| **action != Action::Counter)
        .collect();
    match actions[..] {
        [Action::Return] => " -j RETURN".to_owned(),
        [Action::Drop] => " -j DROP".to_owned(),
        [Action::Accept] => " -j ACCEPT".to_owned(),
        [Action::Jump(chain)] => format!(" -j {}", chain_name(chain)),
        [Action::Redirect(port)] => format!(" -j REDIRECT {flag} {port}"),
        [Action::SetMark(mark)] => format!(" -j MARK --set-mark {mark}"),
        [Action::SaveMark] => " -j CONNMARK --save-mark".to_owned(),
        [Action::RestoreMark] => " -j CONNMARK --restore-mark".to_owned(),
        [Action::ConnectionZone(zone)] => format!(" -j CT --zone {zone}"),
        [
            Action::TransparentProxy { port, .. },
            Action::SetMark(mark),
            Action::Accept,
        ] => {
            format!(" -j TPROXY --tproxy-mark {mark}/0xffffffff --on-port {port}")
        }
        // The plan has no other actions.
        _ => String::new(),
    }
}

fn match_words(condition: &Match, family: Family, negated: bool) -> Option<String> {
    let not = if negated { " !" } else { "" };
    let v4 = family == Family::V4;
    Some(match condition {
        Match::Not(inner) => return match_words(inner, family, !negated),
        Match::Ipv4 if v4 => String::new(),
        Match::Ipv6 if !v4 => String::new(),
        Match::Transport(Transport::Tcp) => format!("{not} -p tcp"),
        Match::Transport(Transport::Udp) => format!("{not} -p udp"),
        Match::InInterface(name) => format!("{not} -i {name}"),
        Match::OutInterface(name) => format!("{not} -o {name}"),
        Match::Source(address, prefix) if v4 => format!("{not} -s {address}/{prefix}"),
        Match::Destination(address, prefix) if v4 => format!("{not} -d {address}/{prefix}"),
        Match::Source6(address, prefix) if !v4 => format!("{not} -s {address}/{prefix}"),
        Match::Destination6(address, prefix) if !v4 => format!("{not} -d {address}/{prefix}"),
        Match::SourcePort(port) => format!("{not} --sport {port}"),
        Match::DestinationPort(port) => format!("{not} --dport {port}"),
        Match::SocketUid(uid) => format!(" -m owner{not} --uid-owner {uid}"),
        Match::SocketGid(gid) => format!(" -m owner{not} --gid-owner {gid}"),
        Match::Mark(mark) => format!(" -m mark{not} --mark {mark}"),
        Match::ConnectionMark(mark) => format!(" -m connmark{not} --mark {mark}"),
        Match::KnownConnection => format!(" -m conntrack{not} --ctstate RELATED,ESTABLISHED"),
        Match::Invalid => format!(" -m conntrack{not} --ctstate INVALID"),
        // The other family's; and the plan has no sets.
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::Config;

    /// What iptables-save(8) prints after a run with `-c net1 -b *`, with rules of others around ours.
    const SAVED: &str = "\
# Generated by iptables-save
*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:ISTIO_INBOUND - [0:0]
:ISTIO_OUTPUT - [0:0]
:OTHERS - [0:0]
-A PREROUTING -i other0 -j RETURN
-A PREROUTING -p udp -j OTHERS
-A PREROUTING -i net1 -j RETURN
-A PREROUTING -p tcp -j ISTIO_INBOUND
-A OUTPUT -o net1 -j RETURN
-A OUTPUT -j ISTIO_OUTPUT
-A OUTPUT -o other0 -j RETURN
-A ISTIO_INBOUND -p tcp -m tcp --dport 15008 -j RETURN
COMMIT
";

    const OURS_DELETED: &str = "\
-D PREROUTING -i net1 -j RETURN
-D PREROUTING -p tcp -j ISTIO_INBOUND
-D OUTPUT -o net1 -j RETURN
-D OUTPUT -j ISTIO_OUTPUT
";

    #[test]
    fn cleaning_up_takes_what_is_ours_whatever_the_flags_were() {
        let expected = format!(
            "* nat\n{OURS_DELETED}-F ISTIO_INBOUND\n-F ISTIO_OUTPUT\n-X ISTIO_INBOUND\n-X ISTIO_OUTPUT\nCOMMIT\n"
        );
        assert_eq!(removal(SAVED), expected);
        assert_eq!(removal(""), "* nat\nCOMMIT\n");
    }

    #[test]
    fn applying_replaces_what_is_there() {
        let plan = Config::default().plan();
        let (hooked, chains) = (hooked(SAVED), own_chains(SAVED));
        let text = transaction(Kind::Nat, &hooked, &chains, &plan, Family::V4).unwrap();
        let (before, after) = text.split_once(OURS_DELETED).unwrap();
        assert!(before.contains(":ISTIO_OUTPUT - [0:0]") && !before.contains("-A "));
        // Chains that have no rules any more go.
        let text = transaction(Kind::Nat, &[], &["ISTIO_OLD"], &plan, Family::V4).unwrap();
        assert!(
            text.contains("-F ISTIO_OLD\n-X ISTIO_OLD\n-A ISTIO_INBOUND"),
            "{text}"
        );
        assert!(after.starts_with("-A ISTIO_INBOUND"), "{after}");
    }
}
