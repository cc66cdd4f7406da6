//! TPROXY: inbound connections reach the proxy with both of their addresses as they were.
//!
//! A packet with the mark is delivered locally, whatever its destination, by a routing rule (`routes.rs`). The proxy marks its own connections to
//! the application likewise, so that the answers, which go to the client's address, come back to it.

use super::{
    Action, Config, INBOUND, Kind, Match, OUTPUT, PASSTHROUGH, PASSTHROUGH6, PREROUTING, Plan,
    Rule, Which, jump, loopback, not, not_loopback, port, rule, tcp,
};
use crate::capture::Exemption;

const DIVERT: &str = "istio-divert";
const TPROXY: &str = "istio-tproxy";

impl Config {
    pub(super) fn tproxy_inbound(&self, plan: &mut Plan) {
        if self.inbound == Which::Only(Vec::new()) {
            return;
        }
        let mark = Action::SetMark(self.tproxy_mark);
        plan.add(Kind::Mangle, DIVERT, [], mark.clone());
        plan.add(Kind::Mangle, DIVERT, [], Action::Accept);
        for outside in not_loopback() {
            // Nothing that follows may see the packet: it would remember the mark for the whole connection.
            let actions = vec![
                Action::Counter,
                Action::TransparentProxy {
                    v6: outside.contains(&Match::Ipv6),
                    port: self.inbound_port,
                },
                mark.clone(),
                Action::Accept,
            ];
            let matches = outside.into_iter().chain([tcp()]).collect();
            plan.push(Kind::Mangle, TPROXY, Rule { matches, actions });
        }
        plan.add(Kind::Mangle, PREROUTING, [tcp()], jump(INBOUND));
        match &self.inbound {
            Which::All => {
                for p in &self.inbound_exclude {
                    plan.add(Kind::Mangle, INBOUND, [tcp(), port(*p)], Action::Return);
                }
                divert_or_capture(plan, vec![tcp()]);
            }
            Which::Only(ports) => {
                for p in ports {
                    divert_or_capture(plan, vec![tcp(), port(*p)]);
                }
            }
        }
    }

    pub(super) fn tproxy_marks(&self, plan: &mut Plan) {
        let mark = self.tproxy_mark;
        // The proxy's calls to its own pod by the pod's address get another one, by which they are told from the application's.
        let own = mark.wrapping_add(1);
        let marked = [tcp(), Match::Mark(mark)];
        plan.add(Kind::Mangle, PREROUTING, marked, Action::SaveMark);
        let marked = [tcp(), loopback(), Match::Mark(mark)];
        plan.add(Kind::Mangle, OUTPUT, marked, Action::Return);
        for proxy in self.proxies() {
            for outside in not_loopback() {
                let matches = outside
                    .into_iter()
                    .chain([tcp(), loopback(), proxy.clone()]);
                plan.add(Kind::Mangle, OUTPUT, matches, Action::SetMark(own));
            }
        }
        let remembered = [tcp(), Match::ConnectionMark(mark)];
        plan.add(Kind::Mangle, OUTPUT, remembered, Action::RestoreMark);
        let by_lo = || Match::InInterface("lo".to_owned());
        let source = Match::Source(PASSTHROUGH, 32);
        let source6 = Match::Source6(PASSTHROUGH6, 128);
        for (at, matches) in [
            ((0, 0), vec![tcp(), Match::Mark(mark)]),
            ((1, 1), vec![tcp(), Match::Ipv4, source, by_lo()]),
            ((1, 2), vec![tcp(), Match::Ipv6, source6, by_lo()]),
            ((2, 3), vec![tcp(), by_lo(), not(Match::Mark(own))]),
        ] {
            let rule = rule(matches, Action::Return);
            plan.insert(Kind::Mangle, INBOUND, at, rule);
        }
    }

    /// Who is the proxy, one match each.
    pub(super) fn proxies(&self) -> Vec<Match> {
        match &self.exemption {
            Exemption::Owner { uids, gids } => {
                let users = uids.iter().map(|uid| Match::SocketUid(*uid));
                let groups = gids.iter().map(|gid| Match::SocketGid(*gid));
                users.chain(groups).collect()
            }
            Exemption::Mark(mark) => vec![Match::Mark(*mark)],
        }
    }
}

/// What belongs to a socket goes to it; what is new goes to the proxy.
fn divert_or_capture(plan: &mut Plan, matches: Vec<Match>) {
    let known = matches.iter().cloned().chain([Match::KnownConnection]);
    plan.add(Kind::Mangle, INBOUND, known, jump(DIVERT));
    plan.add(Kind::Mangle, INBOUND, matches, jump(TPROXY));
}
