//! HTTP rules of a VirtualService.

mod sanitize;

use mesh_api::StringMatch;
use mesh_api::networking::virtual_service::{
    Destination, HttpMatchRequest, HttpRetry, HttpRoute, PortSelector,
};

use super::gateway_names;
use crate::problem::Reporter;
use crate::{Mesh, Severity, hostname};

/// Longest program that a regular expression may compile to, as in the proxy.
const REGEX_SIZE_LIMIT: usize = 1 << 20;
/// Status codes that Envoy's redirect action knows.
const REDIRECT_CODES: [u32; 6] = [0, 301, 302, 303, 307, 308];

/// Makes the rules of a VirtualService in `namespace` absolute. A rule that can't be applied is left out and reported.
pub(super) fn rules(
    rules: &[HttpRoute],
    namespace: &str,
    mesh: &Mesh,
    report: &mut Reporter<'_>,
) -> Vec<HttpRoute> {
    let context = Context { namespace, mesh };
    let numbered = rules.iter().enumerate();
    numbered
        .filter_map(|(index, rule)| context.rule(rule, &format!("spec.http[{index}]"), report))
        .collect()
}

struct Context<'a> {
    namespace: &'a str,
    mesh: &'a Mesh,
}

impl Context<'_> {
    fn rule(&self, rule: &HttpRoute, field: &str, report: &mut Reporter<'_>) -> Option<HttpRoute> {
        let mut rule = rule.clone();
        if rule.delegate.is_some() {
            let message =
                "delegates are not applied yet by this version of mesh; this rule has no effect";
            report.report(
                Severity::Warning,
                None,
                format!("{field}.delegate"),
                message,
            );
            return None;
        }
        take_out_not_applied(&mut rule, field, report);
        sanitize::rule(&mut rule, field, report);
        if !rule.matches.is_empty() {
            let matches = std::mem::take(&mut rule.matches);
            let numbered = matches.into_iter().enumerate();
            rule.matches = numbered
                .filter_map(|(index, item)| {
                    self.condition(item, &format!("{field}.match[{index}]"), report)
                })
                .collect();
            // Without its conditions the rule would match everything.
            if rule.matches.is_empty() {
                return None;
            }
        }
        check_action(&rule, field, report)?;
        for (index, route) in rule.route.iter_mut().enumerate() {
            self.destination(
                &mut route.destination,
                &format!("{field}.route[{index}].destination"),
                report,
            );
        }
        Some(rule)
    }

    /// `None` if the condition can't be applied; leaving only a part of it out would match more than was meant.
    fn condition(
        &self,
        mut item: HttpMatchRequest,
        field: &str,
        report: &mut Reporter<'_>,
    ) -> Option<HttpMatchRequest> {
        if !item.stat_prefix.is_empty() {
            report.not_applied(format!("{field}.statPrefix"));
        }
        let claims = item
            .headers
            .keys()
            .chain(item.without_headers.keys())
            .find(|name| name.starts_with("@request.auth.claims"));
        if let Some(name) = claims {
            let message = format!(
                "{name} is not applied yet by this version of mesh; this condition never holds"
            );
            report.report(Severity::Warning, None, format!("{field}.headers"), message);
            return None;
        }
        let names = [
            ("headers", &item.headers),
            ("withoutHeaders", &item.without_headers),
        ];
        for (part, name) in names
            .into_iter()
            .flat_map(|(part, map)| map.keys().map(move |name| (part, name)))
        {
            if !sanitize::is_header_name(name) {
                let message = format!("{name:?} is not a header name; this condition never holds");
                report.report(
                    Severity::Error,
                    Some("IST0106"),
                    format!("{field}.{part}"),
                    message,
                );
                return None;
            }
        }
        let single = [
            ("uri", &item.uri),
            ("scheme", &item.scheme),
            ("method", &item.method),
            ("authority", &item.authority),
        ];
        let single = single
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), value.as_ref()?)));
        let maps = [
            ("headers", &item.headers),
            ("withoutHeaders", &item.without_headers),
            ("queryParams", &item.query_params),
        ];
        let mapped = maps.into_iter().flat_map(|(name, map)| {
            map.iter()
                .map(move |(key, value)| (format!("{name}[{key}]"), value))
        });
        for (name, value) in single.chain(mapped) {
            check_regex(value, &format!("{field}.{name}"), report)?;
        }
        item.gateways = gateway_names(&item.gateways, self.namespace);
        item.headers = item
            .headers
            .into_iter()
            .map(|(name, value)| (name.to_ascii_lowercase(), value))
            .collect();
        item.without_headers = item
            .without_headers
            .into_iter()
            .map(|(name, value)| (name.to_ascii_lowercase(), value))
            .collect();
        Some(item)
    }

    /// Makes the host absolute, fills in the port where there is only one, and checks that all of it exists.
    fn destination(&self, destination: &mut Destination, field: &str, report: &mut Reporter<'_>) {
        destination.host = hostname::absolute(&destination.host, self.namespace, &self.mesh.domain);
        let Some(service) = self.mesh.service(&destination.host) else {
            let message = format!(
                "there is no service {}; requests sent there get 503",
                destination.host
            );
            report.not_found(format!("{field}.host"), message);
            return;
        };
        match &destination.port {
            None if service.ports.len() == 1 => {
                destination.port = Some(PortSelector {
                    number: u32::from(service.ports[0].number),
                })
            }
            None if service.ports.len() > 1 => {
                let message = format!(
                    "{} has several ports; name one, or the port that the client asked for is used",
                    destination.host
                );
                report.report(
                    Severity::Error,
                    Some("IST0112"),
                    format!("{field}.port"),
                    message,
                );
            }
            Some(port)
                if !u16::try_from(port.number)
                    .is_ok_and(|number| service.port(number).is_some()) =>
            {
                let message = format!(
                    "{} has no port {}; requests sent there get 503",
                    destination.host, port.number
                );
                report.not_found(format!("{field}.port.number"), message);
            }
            _ => {}
        }
        self.check_subset(destination, field, report);
    }

    fn check_subset(&self, destination: &Destination, field: &str, report: &mut Reporter<'_>) {
        if destination.subset.is_empty() {
            return;
        }
        let rule = self
            .mesh
            .destination_rule(&destination.host, self.namespace);
        if !rule.is_some_and(|rule| rule.subsets.contains_key(&destination.subset)) {
            let message = format!(
                "no DestinationRule defines subset {} of {}; requests sent there get 503. Add it to the rule's subsets",
                destination.subset, destination.host
            );
            report.not_found(format!("{field}.subset"), message);
        }
    }
}

fn take_out_not_applied(rule: &mut HttpRoute, field: &str, report: &mut Reporter<'_>) {
    for (name, given) in [
        ("fault", rule.fault.take().is_some()),
        ("mirror", rule.mirror.take().is_some()),
        ("mirrorPercentage", rule.mirror_percentage.take().is_some()),
        ("mirrorPercent", rule.mirror_percent.take().is_some()),
        ("mirrors", !std::mem::take(&mut rule.mirrors).is_empty()),
        ("corsPolicy", rule.cors_policy.take().is_some()),
        (
            "retries.retryRemoteLocalities",
            rule.retries
                .as_mut()
                .and_then(|retries: &mut HttpRetry| retries.retry_remote_localities.take())
                .is_some(),
        ),
    ] {
        if given {
            report.not_applied(format!("{field}.{name}"));
        }
    }
}

/// `None` for a rule that Envoy would refuse, which would take the whole route table with it.
fn check_action(rule: &HttpRoute, field: &str, report: &mut Reporter<'_>) -> Option<()> {
    let mut refuse = |field: String, message: String| {
        report.report(
            Severity::Error,
            Some("IST0106"),
            field,
            format!("{message}; this rule has no effect"),
        );
        None
    };
    let actions = usize::from(!rule.route.is_empty())
        + usize::from(rule.redirect.is_some())
        + usize::from(rule.direct_response.is_some());
    if actions != 1 {
        return refuse(
            field.to_owned(),
            format!(
                "a rule needs exactly one of route, redirect and directResponse, this one has {actions}"
            ),
        );
    }
    if let Some(redirect) = &rule.redirect {
        if !REDIRECT_CODES.contains(&redirect.redirect_code) {
            return refuse(
                format!("{field}.redirect.redirectCode"),
                format!(
                    "{} is none of 301, 302, 303, 307 and 308",
                    redirect.redirect_code
                ),
            );
        }
        if redirect
            .port
            .is_some_and(|port| !(1..=65535).contains(&port))
        {
            return refuse(
                format!("{field}.redirect.port"),
                "a port is a number from 1 to 65535".to_owned(),
            );
        }
    }
    if let Some(response) = &rule.direct_response
        && !(200..600).contains(&response.status)
    {
        return refuse(
            format!("{field}.directResponse.status"),
            format!("{} is not a status from 200 to 599", response.status),
        );
    }
    if let Some(rewrite) = rule
        .rewrite
        .as_ref()
        .and_then(|rewrite| rewrite.uri_regex_rewrite.as_ref())
        && let Err(error) = compile(&rewrite.pattern)
    {
        return refuse(format!("{field}.rewrite.uriRegexRewrite.match"), error);
    }
    if rule.route.iter().any(|route| route.weight < 0)
        || (rule.route.len() > 1 && rule.route.iter().all(|route| route.weight == 0))
    {
        return refuse(
            format!("{field}.route"),
            "weights may not be negative, and several destinations need a sum above 0".to_owned(),
        );
    }
    let total: i64 = rule.route.iter().map(|route| i64::from(route.weight)).sum();
    if total > i64::from(u32::MAX) {
        return refuse(
            format!("{field}.route"),
            format!("the sum of the weights, {total}, is more than 4294967295"),
        );
    }
    if let Err((part, message)) = sanitize::texts(rule) {
        return refuse(format!("{field}.{part}"), message);
    }
    Some(())
}

fn check_regex(value: &StringMatch, field: &str, report: &mut Reporter<'_>) -> Option<()> {
    // `*` alone is Istio's way to write presence.
    let StringMatch::Regex(pattern) = value else {
        return Some(());
    };
    if pattern == "*" {
        return Some(());
    }
    compile(pattern)
        .map_err(|error| {
            report.report(
                Severity::Error,
                Some("IST0106"),
                format!("{field}.regex"),
                format!("{error}; this condition never holds"),
            )
        })
        .ok()
}

fn compile(pattern: &str) -> Result<(), String> {
    let compiled = regex::RegexBuilder::new(pattern)
        .size_limit(REGEX_SIZE_LIMIT)
        .build();
    compiled.map(drop).map_err(|error| {
        let text = error.to_string();
        let reason = text
            .lines()
            .last()
            .unwrap_or_default()
            .trim_start_matches("error: ")
            .to_owned();
        format!("{pattern:?} is not a regular expression of RE2's syntax: {reason}")
    })
}
