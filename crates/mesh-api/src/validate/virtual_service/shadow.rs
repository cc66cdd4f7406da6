//! Rules that no request can reach, since an earlier one takes everything that they match.

use crate::StringMatch;
use crate::networking::virtual_service::{HttpMatchRequest, HttpRoute};

use super::super::Check;

/// Warns of rules and matches behind others that cover them.
pub(super) fn find(routes: &[HttpRoute], check: &mut Check) {
    for (index, route) in routes.iter().enumerate() {
        let earlier = &routes[..index];
        if let Some(by) = earlier.iter().position(catches_all) {
            check.warn_at(
                &format!("http[{index}]"),
                format!("never reached: http[{by}] matches every request before it"),
            );
            continue;
        }
        for (entry_index, entry) in route.matches.iter().enumerate() {
            let by = earlier
                .iter()
                .position(|route| route.matches.iter().any(|wide| covers(wide, entry)));
            if let Some(by) = by {
                check.warn_at(
                    &format!("http[{index}].match[{entry_index}]"),
                    format!("never reached: http[{by}] matches the same requests before it"),
                );
            }
        }
    }
}

fn catches_all(route: &HttpRoute) -> bool {
    route.matches.is_empty()
        || route
            .matches
            .iter()
            .any(|entry| plain(entry) == HttpMatchRequest::default())
}

/// The match without what does not decide.
fn plain(entry: &HttpMatchRequest) -> HttpMatchRequest {
    let mut plain = HttpMatchRequest {
        name: String::new(),
        stat_prefix: String::new(),
        ..entry.clone()
    };
    if matches!(&plain.uri, Some(StringMatch::Prefix(prefix)) if prefix == "/") {
        plain.uri = None;
    }
    plain
}

/// True if every request that `narrow` matches is matched by `wide` too: the same conditions, or a shorter prefix with fewer of them.
fn covers(wide: &HttpMatchRequest, narrow: &HttpMatchRequest) -> bool {
    let (wide, narrow) = (plain(wide), plain(narrow));
    let same_or_any =
        |wide: &Option<StringMatch>, narrow: &Option<StringMatch>| wide.is_none() || wide == narrow;
    let subset = |wide: &std::collections::BTreeMap<String, StringMatch>,
                  narrow: &std::collections::BTreeMap<String, StringMatch>| {
        wide.iter()
            .all(|(name, value)| narrow.get(name) == Some(value))
    };
    uri_covers(&wide, &narrow)
        && same_or_any(&wide.scheme, &narrow.scheme)
        && same_or_any(&wide.method, &narrow.method)
        && same_or_any(&wide.authority, &narrow.authority)
        && subset(&wide.headers, &narrow.headers)
        && subset(&wide.without_headers, &narrow.without_headers)
        && subset(&wide.query_params, &narrow.query_params)
        && (wide.port == 0 || wide.port == narrow.port)
        && wide
            .source_labels
            .iter()
            .all(|(key, value)| narrow.source_labels.get(key) == Some(value))
        && (wide.source_namespace.is_empty() || wide.source_namespace == narrow.source_namespace)
        && (wide.gateways.is_empty() || wide.gateways == narrow.gateways)
}

fn uri_covers(wide: &HttpMatchRequest, narrow: &HttpMatchRequest) -> bool {
    let case = |entry: &HttpMatchRequest, text: &str| {
        if entry.ignore_uri_case {
            text.to_ascii_lowercase()
        } else {
            text.to_owned()
        }
    };
    match (&wide.uri, &narrow.uri) {
        (None, _) => true,
        (
            Some(StringMatch::Prefix(short)),
            Some(StringMatch::Prefix(long) | StringMatch::Exact(long)),
        ) => {
            // A match that ignores case is only covered by one that does.
            (wide.ignore_uri_case || !narrow.ignore_uri_case)
                && case(wide, long).starts_with(&case(wide, short))
        }
        (wide_uri, narrow_uri) => {
            wide_uri == narrow_uri && wide.ignore_uri_case == narrow.ignore_uri_case
        }
    }
}
