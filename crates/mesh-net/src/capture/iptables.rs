//! The second backend: iptables-restore text for IPv4, put in by the program of that name.
//!
//! What an earlier run left, with whatever flags, is found in what iptables-save prints and taken out in the same transaction.

use std::io::Write;
use std::process::{Command, Stdio};

use super::plan::{OUTPUT, PREROUTING};
use super::{CaptureError, Plan};
use crate::nft::{Action, Match, Rule, Transport};

const SAVE: &str = "iptables-save";
const RESTORE: &str = "iptables-restore";
/// What the names of our chains begin with.
const OURS: &str = "ISTIO_";

/// `ISTIO_INBOUND` for `istio-inbound`; the kernel's own chains are in capitals too.
fn chain_name(name: &str) -> String {
    name.to_uppercase().replace('-', "_")
}

/// The rules of the nat table, in the form of iptables-restore(8), for `--noflush`.
pub(super) fn restore_text(plan: &Plan) -> String {
    transaction(&[], plan)
}

/// The rules, one `-A` line each.
pub(super) fn rules(plan: &Plan) -> impl Iterator<Item = String> {
    plan.chains.iter().flat_map(|(name, rules)| {
        let words = rules.iter().filter_map(words);
        words.map(|words| format!("-A {}{words}", chain_name(name)))
    })
}

pub(super) fn apply(plan: &Plan) -> Result<(), CaptureError> {
    restore(&transaction(&hooked(&save()?), plan))
}

pub(super) fn cleanup() -> Result<(), CaptureError> {
    restore(&removal(&save()?))
}

/// First the lines of `hooked` are deleted, so that our rules stand in the kernel's chains once.
fn transaction(hooked: &[String], plan: &Plan) -> String {
    let own = plan
        .chains
        .iter()
        .filter(|(name, _)| ![PREROUTING, OUTPUT].contains(name));
    // Declaring a chain empties it.
    let declared = own.map(|(name, _)| format!(":{} - [0:0]", chain_name(name)));
    table(declared.chain(hooked.iter().cloned()).chain(rules(plan)))
}

/// Takes out all that is ours.
fn removal(saved: &str) -> String {
    let chains: Vec<&str> = saved
        .lines()
        .filter_map(|line| line.strip_prefix(':')?.split(' ').next())
        .filter(|name| name.starts_with(OURS))
        .collect();
    let each = |flag: &'static str| chains.iter().map(move |name| format!("{flag} {name}"));
    table(
        hooked(saved)
            .into_iter()
            .chain(each("-F"))
            .chain(each("-X")),
    )
}

fn table(lines: impl Iterator<Item = String>) -> String {
    let lines: String = lines.map(|line| line + "\n").collect();
    format!("* nat\n{lines}COMMIT\n")
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

fn save() -> Result<String, CaptureError> {
    let output = Command::new(SAVE)
        .args(["-t", "nat"])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(SAVE, &error.to_string()))?;
    if !output.status.success() {
        return Err(failed(SAVE, &String::from_utf8_lossy(&output.stderr)));
    }
    String::from_utf8(output.stdout).map_err(|_| failed(SAVE, "it printed what is not UTF-8"))
}

fn restore(text: &str) -> Result<(), CaptureError> {
    let mut child = Command::new(RESTORE)
        .args(["--noflush", "--wait"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(RESTORE, &error.to_string()))?;
    // A program that ends before it has read all says why on its own.
    let written = child
        .stdin
        .take()
        .map_or(Ok(()), |mut input| input.write_all(text.as_bytes()));
    let output = child
        .wait_with_output()
        .map_err(|error| failed(RESTORE, &error.to_string()))?;
    if !output.status.success() {
        return Err(failed(RESTORE, &String::from_utf8_lossy(&output.stderr)));
    }
    written.map_err(|error| failed(RESTORE, &error.to_string()))
}

fn failed(program: &str, reason: &str) -> CaptureError {
    CaptureError::Program {
        program: program.to_owned(),
        reason: reason.trim().to_owned(),
    }
}

/// A rule's matches and target with a space before each; `None` for rules of IPv6.
fn words(rule: &Rule) -> Option<String> {
    let mut text = String::new();
    for condition in &rule.matches {
        text.push_str(&match_words(condition, false)?);
    }
    for action in &rule.actions {
        match action {
            Action::Return => text.push_str(" -j RETURN"),
            Action::Jump(chain) => text.push_str(&format!(" -j {}", chain_name(chain))),
            Action::Redirect(port) => text.push_str(&format!(" -j REDIRECT --to-ports {port}")),
            // iptables counts by itself; the plan has no other actions.
            _ => {}
        }
    }
    Some(text)
}

fn match_words(condition: &Match, negated: bool) -> Option<String> {
    let not = if negated { " !" } else { "" };
    Some(match condition {
        Match::Not(inner) => return match_words(inner, !negated),
        Match::Ipv4 => String::new(),
        // The plan has no sets.
        Match::Ipv6 | Match::Source6(_) | Match::Destination6(_) | Match::SourceIn(_) => {
            return None;
        }
        Match::Transport(Transport::Tcp) => format!("{not} -p tcp"),
        Match::Transport(Transport::Udp) => format!("{not} -p udp"),
        Match::InInterface(name) => format!("{not} -i {name}"),
        Match::OutInterface(name) => format!("{not} -o {name}"),
        Match::Source(address, prefix) => format!("{not} -s {address}/{prefix}"),
        Match::Destination(address, prefix) => format!("{not} -d {address}/{prefix}"),
        Match::DestinationPort(port) => format!("{not} --dport {port}"),
        Match::SocketUid(uid) => format!(" -m owner{not} --uid-owner {uid}"),
        Match::SocketGid(gid) => format!(" -m owner{not} --gid-owner {gid}"),
        Match::Mark(mark) => format!(" -m mark{not} --mark {mark:#x}"),
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
        let text = transaction(&hooked(SAVED), &Config::default().plan());
        let (before, after) = text.split_once(OURS_DELETED).unwrap();
        assert!(before.contains(":ISTIO_OUTPUT - [0:0]") && !before.contains("-A "));
        assert!(after.starts_with("-A OUTPUT -j ISTIO_OUTPUT\n"), "{after}");
    }
}
