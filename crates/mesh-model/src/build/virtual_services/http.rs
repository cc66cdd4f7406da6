//! HTTP rules of a VirtualService.

mod filters;
mod sanitize;

use std::collections::BTreeMap;

use mesh_api::StringMatch;
use mesh_api::networking::virtual_service::{HttpMatchRequest, HttpRoute};
use mesh_api::validate::{claim_of_token, is_about_claims};

use super::destinations::{self, Context};
use super::gateway_names;
use crate::Severity;
use crate::problem::Reporter;

/// Longest regular expression, as in Istio's validation.
const REGEX_LENGTH_LIMIT: usize = 1024;
/// Longest program that a regular expression may compile to, as in the proxy.
const REGEX_SIZE_LIMIT: usize = 1 << 20;
/// Status codes that Envoy's redirect action knows.
const REDIRECT_CODES: [u32; 6] = [0, 301, 302, 303, 307, 308];

/// A rule with the place where it stands in its object.
pub(super) struct Rule {
    /// For instance `spec.http[0]`.
    pub(super) field: String,
    /// The rule; where it delegates it has no action of its own.
    pub(super) route: HttpRoute,
}

/// Makes the rules of a VirtualService absolute. A rule that can't be applied is left out and reported.
pub(super) fn rules(
    rules: &[HttpRoute],
    context: &Context<'_>,
    report: &mut Reporter<'_>,
) -> Vec<Rule> {
    let numbered = rules.iter().enumerate();
    numbered
        .filter_map(|(index, rule)| {
            let field = format!("spec.http[{index}]");
            let route = context.rule(rule, &field, report)?;
            Some(Rule { field, route })
        })
        .collect()
}

impl Context<'_> {
    fn rule(&self, rule: &HttpRoute, field: &str, report: &mut Reporter<'_>) -> Option<HttpRoute> {
        let mut rule = rule.clone();
        sanitize::rule(&mut rule, field, report);
        filters::rule(&mut rule, field, report);
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
        if let Err((part, message)) = self.check_action(&rule) {
            let field = match part {
                "" => field.to_owned(),
                part => format!("{field}.{part}"),
            };
            report.report(
                Severity::Error,
                Some("IST0106"),
                field,
                format!("{message}; this rule has no effect"),
            );
            return None;
        }
        self.destinations(&mut rule, field, report);
        Some(rule)
    }

    fn destinations(&self, rule: &mut HttpRoute, field: &str, report: &mut Reporter<'_>) {
        for (index, route) in rule.route.iter_mut().enumerate() {
            self.destination(
                &mut route.destination,
                &format!("{field}.route[{index}].destination"),
                report,
            );
        }
        if let Some(mirror) = &mut rule.mirror {
            self.destination(mirror, &format!("{field}.mirror"), report);
        }
        for (index, mirror) in rule.mirrors.iter_mut().enumerate() {
            self.destination(
                &mut mirror.destination,
                &format!("{field}.mirrors[{index}].destination"),
                report,
            );
        }
    }

    /// Field and message for a rule that Envoy would refuse, which would take the whole route table with it, or that says nothing.
    fn check_action(&self, rule: &HttpRoute) -> Result<(), (&'static str, String)> {
        let actions = usize::from(!rule.route.is_empty())
            + usize::from(rule.redirect.is_some())
            + usize::from(rule.direct_response.is_some());
        match (&rule.delegate, actions) {
            (Some(_), _) if self.delegate => {
                return Err(("delegate", "a delegate can't delegate further".to_owned()));
            }
            (Some(_), 0) | (None, 1) => {}
            (Some(_), _) => {
                let message = "delegate excludes route, redirect and directResponse";
                return Err(("delegate", message.to_owned()));
            }
            (None, _) => {
                let message = format!(
                    "a rule needs exactly one of route, redirect, directResponse and delegate, this one has {actions}"
                );
                return Err(("", message));
            }
        }
        check_answer(rule)?;
        if let Some(rewrite) = rule
            .rewrite
            .as_ref()
            .and_then(|rewrite| rewrite.uri_regex_rewrite.as_ref())
        {
            let groups = compile(&rewrite.pattern)
                .map_err(|error| ("rewrite.uriRegexRewrite.match", error))?;
            check_substitution(&rewrite.rewrite, groups)
                .map_err(|error| ("rewrite.uriRegexRewrite.rewrite", error))?;
        }
        destinations::weights(rule.route.iter().map(|route| route.weight))
            .map_err(|message| ("route", message))?;
        sanitize::texts(rule)
    }

    /// `None` if the condition can't be applied; leaving only a part of it out would match more than was meant.
    fn condition(
        &self,
        mut item: HttpMatchRequest,
        field: &str,
        report: &mut Reporter<'_>,
    ) -> Option<HttpMatchRequest> {
        if !item.stat_prefix.is_empty() {
            let message = "is sent to the proxies; stock Envoys count by it, mesh's own proxy keeps no counters of single routes";
            report.report(Severity::Info, None, format!("{field}.statPrefix"), message);
        }
        let names = [
            ("headers", &item.headers),
            ("withoutHeaders", &item.without_headers),
        ];
        for (part, name) in names
            .into_iter()
            .flat_map(|(part, map)| map.keys().map(move |name| (part, name)))
        {
            let known = if is_about_claims(name) {
                claim_of_token(name).is_some()
            } else {
                sanitize::is_header_name(name)
            };
            if !known {
                let message = format!(
                    "{name:?} is neither a header name nor a claim (@request.auth.claims.NAME); this condition never holds"
                );
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
        if item.query_params.contains_key("") {
            let message = "a query parameter has a name; this condition never holds";
            let field = format!("{field}.queryParams");
            report.report(Severity::Error, Some("IST0106"), field, message);
            return None;
        }
        for (name, value) in single.chain(mapped) {
            check_regex(value, &format!("{field}.{name}"), report)?;
        }
        item.gateways = gateway_names(&item.gateways, self.namespace);
        item.headers = lower_case(item.headers);
        item.without_headers = lower_case(item.without_headers);
        Some(item)
    }
}

/// Names of headers are compared in lower case; those of claims as they are.
fn lower_case(conditions: BTreeMap<String, StringMatch>) -> BTreeMap<String, StringMatch> {
    let name = |name: String| match is_about_claims(&name) {
        true => name,
        false => name.to_ascii_lowercase(),
    };
    conditions
        .into_iter()
        .map(|(given, value)| (name(given), value))
        .collect()
}

/// Redirects and fixed responses.
fn check_answer(rule: &HttpRoute) -> Result<(), (&'static str, String)> {
    if let Some(redirect) = &rule.redirect {
        if !REDIRECT_CODES.contains(&redirect.redirect_code) {
            let message = format!(
                "{} is none of 301, 302, 303, 307 and 308",
                redirect.redirect_code
            );
            return Err(("redirect.redirectCode", message));
        }
        if redirect
            .port
            .is_some_and(|port| !(1..=65535).contains(&port))
        {
            let message = "a port is a number from 1 to 65535";
            return Err(("redirect.port", message.to_owned()));
        }
    }
    match &rule.direct_response {
        Some(response) if !(200..600).contains(&response.status) => Err((
            "directResponse.status",
            format!("{} is not a status from 200 to 599", response.status),
        )),
        _ => Ok(()),
    }
}

/// What replaces a match: `\1` is a group of the pattern, `\\` the character (RE2's rules).
fn check_substitution(text: &str, groups: usize) -> Result<(), String> {
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        if character != '\\' {
            continue;
        }
        match characters.next() {
            Some('\\') => {}
            Some(digit) if digit.is_ascii_digit() => {
                let group = digit.to_digit(10).map_or(0, |digit| digit as usize);
                if group > groups {
                    return Err(format!(
                        "{text:?} names group {group}, and the expression has {groups}"
                    ));
                }
            }
            _ => {
                return Err(format!(
                    "behind a backslash {text:?} needs the number of a group, or another backslash"
                ));
            }
        }
    }
    if sanitize::is_header_value(text) {
        Ok(())
    } else {
        Err(format!("{text:?} has characters that no path may have"))
    }
}

fn check_regex(value: &StringMatch, field: &str, report: &mut Reporter<'_>) -> Option<()> {
    // `*` alone is Istio's way to write presence; an empty pattern says nothing either.
    let StringMatch::Regex(pattern) = value else {
        return Some(());
    };
    if matches!(pattern.as_str(), "*" | "") {
        return Some(());
    }
    compile(pattern)
        .map(drop)
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

/// Whether the proxy can use a pattern; the number of its groups.
fn compile(pattern: &str) -> Result<usize, String> {
    if pattern.is_empty() {
        return Err("an empty regular expression is none".to_owned());
    }
    if pattern.len() > REGEX_LENGTH_LIMIT {
        return Err(format!(
            "the regular expression has {} characters, more than {REGEX_LENGTH_LIMIT}",
            pattern.len()
        ));
    }
    let compiled = regex::RegexBuilder::new(pattern)
        .size_limit(REGEX_SIZE_LIMIT)
        .build();
    let groups = compiled.map(|regex| regex.captures_len() - 1);
    groups.map_err(|error| {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn substitutions_name_groups_that_there_are() {
        for (text, expected) in [
            ("/x", true),
            (r"/\1/\0", true),
            (r"\\", true),
            (r"\2", false),
            (r"\x", false),
            ("\\", false),
            ("a\nb", false),
        ] {
            assert_eq!(check_substitution(text, 1).is_ok(), expected, "{text}");
        }
        assert_eq!(compile("(a)(?:b)(c)"), Ok(2));
        assert!(compile("").is_err());
    }
}
