//! The second backend: iptables-restore text for IPv4, put in by the program of that name.

use std::io::Write;
use std::process::{Command, Stdio};

use super::plan::{OUTPUT, PREROUTING};
use super::{CaptureError, Plan};
use crate::nft::{Action, Match, Rule, Transport};

/// `ISTIO_INBOUND` for `istio-inbound`; the kernel's own chains are in capitals too.
fn chain_name(name: &str) -> String {
    name.to_uppercase().replace('-', "_")
}

/// The rules of the nat table, in the form of iptables-restore(8), for `--noflush`.
pub(super) fn restore_text(plan: &Plan) -> String {
    let mut text = String::from("* nat\n");
    for (name, _) in own_chains(plan) {
        // Declaring a chain empties it.
        text.push_str(&format!(":{} - [0:0]\n", chain_name(name)));
    }
    for (name, rules) in &plan.chains {
        for rule in rules {
            if let Some(words) = words(rule) {
                text.push_str(&format!("-A {}{words}\n", chain_name(name)));
            }
        }
    }
    text.push_str("COMMIT\n");
    text
}

fn own_chains(plan: &Plan) -> impl Iterator<Item = &(&'static str, Vec<Rule>)> {
    plan.chains
        .iter()
        .filter(|(name, _)| *name != PREROUTING && *name != OUTPUT)
}

pub(super) fn apply(plan: &Plan) -> Result<(), CaptureError> {
    unhook(plan);
    let mut child = Command::new("iptables-restore")
        .args(["--noflush", "--wait"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed("iptables-restore", &error.to_string()))?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(restore_text(plan).as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if output.status.success() {
        Ok(())
    } else {
        Err(failed(
            "iptables-restore",
            &String::from_utf8_lossy(&output.stderr),
        ))
    }
}

pub(super) fn cleanup(plan: &Plan) -> Result<(), CaptureError> {
    unhook(plan);
    for flag in ["-F", "-X"] {
        for (name, _) in own_chains(plan) {
            run(&["-t", "nat", flag, &chain_name(name)]);
        }
    }
    Ok(())
}

/// Takes the rules out of the kernel's own chains, as often as they stand there.
fn unhook(plan: &Plan) {
    for (name, rules) in plan
        .chains
        .iter()
        .filter(|(name, _)| *name == PREROUTING || *name == OUTPUT)
    {
        for words in rules.iter().filter_map(words) {
            let chain = chain_name(name);
            let delete: Vec<&str> = ["-t", "nat", "-D", &chain]
                .into_iter()
                .chain(words.split_whitespace())
                .collect();
            while run(&delete) {}
        }
    }
}

/// True when iptables did it; that a rule was not there to be deleted is no error.
fn run(args: &[&str]) -> bool {
    let done = Command::new("iptables")
        .arg("--wait")
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    done.is_ok_and(|status| status.success())
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
        text.push_str(&match_words(condition, "")?);
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

fn match_words(condition: &Match, not: &str) -> Option<String> {
    Some(match condition {
        Match::Not(inner) => return match_words(inner, " !"),
        Match::Ipv4 => String::new(),
        Match::Ipv6 | Match::Source6(_) | Match::Destination6(_) => return None,
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
