//! TLS and TCP rules of a VirtualService.

use std::net::IpAddr;

use mesh_api::networking::virtual_service::{
    L4MatchAttributes, RouteDestination, TcpRoute, TlsMatchAttributes, TlsRoute,
};

use super::destinations::{self, Context};
use super::gateway_names;
use crate::problem::Reporter;
use crate::{Severity, hostname};

/// Makes TLS rules absolute. A condition that can't be applied never holds; a rule without one is left out.
pub(super) fn tls_rules(
    rules: &[TlsRoute],
    hosts: &[String],
    context: &Context<'_>,
    report: &mut Reporter<'_>,
) -> Vec<TlsRoute> {
    let mut kept = Vec::new();
    for (index, rule) in rules.iter().enumerate() {
        let field = format!("spec.tls[{index}]");
        if rule.matches.is_empty() {
            let message = "a TLS rule needs match with sniHosts; it has no effect";
            report.report(
                Severity::Error,
                Some("IST0106"),
                format!("{field}.match"),
                message,
            );
            continue;
        }
        let mut matches = Vec::new();
        for (index, item) in rule.matches.iter().enumerate() {
            let field = format!("{field}.match[{index}]");
            matches.extend(tls_condition(item, hosts, context, &field, report));
        }
        let route = context.routes(&rule.route, &field, report);
        if let (false, Some(route)) = (matches.is_empty(), route) {
            kept.push(TlsRoute { matches, route });
        }
    }
    kept
}

/// Makes TCP rules absolute, in the same way.
pub(super) fn tcp_rules(
    rules: &[TcpRoute],
    context: &Context<'_>,
    report: &mut Reporter<'_>,
) -> Vec<TcpRoute> {
    let mut kept = Vec::new();
    for (index, rule) in rules.iter().enumerate() {
        let field = format!("spec.tcp[{index}]");
        let mut matches = Vec::new();
        for (index, item) in rule.matches.iter().enumerate() {
            let field = format!("{field}.match[{index}]");
            matches.extend(tcp_condition(item, context, &field, report));
        }
        let route = context.routes(&rule.route, &field, report);
        // Without its conditions the rule would match everything.
        if let (true, Some(route)) = (rule.matches.is_empty() || !matches.is_empty(), route) {
            kept.push(TcpRoute { matches, route });
        }
    }
    kept
}

fn tls_condition(
    item: &TlsMatchAttributes,
    hosts: &[String],
    context: &Context<'_>,
    field: &str,
    report: &mut Reporter<'_>,
) -> Option<TlsMatchAttributes> {
    check_subnets(&item.destination_subnets, field, report)?;
    let mut names = Vec::new();
    for (index, name) in item.sni_hosts.iter().enumerate() {
        let name = name.to_ascii_lowercase();
        let problem = if !hostname::is_valid(&name) {
            Some("is not a host; a wildcard is its whole first label")
        } else if !hosts.iter().any(|host| hostname::covers(host, &name)) {
            Some("is none of this object's hosts; add it to spec.hosts")
        } else {
            None
        };
        match problem {
            None => names.push(name),
            Some(problem) => report.report(
                Severity::Error,
                Some("IST0106"),
                format!("{field}.sniHosts[{index}]"),
                format!("{name:?} {problem}. The name is left out"),
            ),
        }
    }
    if names.is_empty() {
        let message = "no server name is left; this condition never holds";
        report.report(
            Severity::Error,
            Some("IST0106"),
            format!("{field}.sniHosts"),
            message,
        );
        return None;
    }
    Some(TlsMatchAttributes {
        sni_hosts: names,
        gateways: gateway_names(&item.gateways, context.namespace),
        ..item.clone()
    })
}

fn tcp_condition(
    item: &L4MatchAttributes,
    context: &Context<'_>,
    field: &str,
    report: &mut Reporter<'_>,
) -> Option<L4MatchAttributes> {
    check_subnets(&item.destination_subnets, field, report)?;
    if !item.source_subnet.is_empty() {
        let message = "is not applied (nor by Istio), and without it more would match than is meant; this condition never holds. Use sourceLabels";
        report.report(
            Severity::Error,
            None,
            format!("{field}.sourceSubnet"),
            message,
        );
        return None;
    }
    Some(L4MatchAttributes {
        gateways: gateway_names(&item.gateways, context.namespace),
        ..item.clone()
    })
}

fn check_subnets(subnets: &[String], field: &str, report: &mut Reporter<'_>) -> Option<()> {
    for (index, subnet) in subnets.iter().enumerate() {
        if !is_subnet(subnet) {
            let message = format!(
                "{subnet:?} is neither an address nor a range such as 10.1.0.0/16; this condition never holds"
            );
            report.report(
                Severity::Error,
                Some("IST0106"),
                format!("{field}.destinationSubnets[{index}]"),
                message,
            );
            return None;
        }
    }
    Some(())
}

fn is_subnet(text: &str) -> bool {
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address, length.parse::<u8>().ok()),
        None => (text, Some(0)),
    };
    match (address.parse::<IpAddr>(), length) {
        (Ok(IpAddr::V4(_)), Some(length)) => length <= 32,
        (Ok(IpAddr::V6(_)), Some(length)) => length <= 128,
        _ => false,
    }
}

impl Context<'_> {
    /// The destinations of a rule, or nothing if they can't be used.
    fn routes(
        &self,
        routes: &[RouteDestination],
        field: &str,
        report: &mut Reporter<'_>,
    ) -> Option<Vec<RouteDestination>> {
        let problem = if routes.is_empty() {
            Some("a rule needs a destination".to_owned())
        } else {
            destinations::weights(routes.iter().map(|route| route.weight)).err()
        };
        if let Some(problem) = problem {
            report.report(
                Severity::Error,
                Some("IST0106"),
                format!("{field}.route"),
                format!("{problem}; this rule has no effect"),
            );
            return None;
        }
        let mut routes = routes.to_vec();
        for (index, route) in routes.iter_mut().enumerate() {
            self.destination(
                &mut route.destination,
                &format!("{field}.route[{index}].destination"),
                report,
            );
        }
        Some(routes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnets_are_addresses_with_or_without_a_length() {
        for (text, expected) in [
            ("10.0.0.0/8", true),
            ("10.0.0.1", true),
            ("::/0", true),
            ("10.0.0.0/33", false),
            ("10.0.0/8", false),
            ("10.0.0.0/", false),
            ("", false),
        ] {
            assert_eq!(is_subnet(text), expected, "{text}");
        }
    }
}
