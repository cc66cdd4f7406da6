//! Faults, cross-origin rules and mirrors: what Envoy would refuse, or what has no meaning, is taken out.

use mesh_api::StringMatch;
use mesh_api::networking::virtual_service::{
    CorsPolicy, FaultAbort, FaultDelay, HttpRoute, Percent,
};

use super::compile;
use super::sanitize::is_header_value;
use crate::Severity;
use crate::problem::Reporter;

/// Takes out of a rule what could not be applied, each part on its own.
pub(super) fn rule(rule: &mut HttpRoute, field: &str, report: &mut Reporter<'_>) {
    let answers = rule.redirect.is_some() || rule.direct_response.is_some();
    if answers && rule.rewrite.take().is_some() {
        let message = "nothing is sent on, so there is nothing to rewrite";
        report.report(
            Severity::Error,
            Some("IST0106"),
            format!("{field}.rewrite"),
            message,
        );
    }
    faults(rule, &format!("{field}.fault"), report);
    if let Some(cors) = &mut rule.cors_policy
        && !origins(cors, &format!("{field}.corsPolicy"), report)
    {
        rule.cors_policy = None;
    }
    mirrors(rule, field, report);
}

fn faults(rule: &mut HttpRoute, field: &str, report: &mut Reporter<'_>) {
    let Some(fault) = &mut rule.fault else {
        return;
    };
    let mut refuse = |part: &str, message: String| {
        report.report(
            Severity::Error,
            Some("IST0106"),
            format!("{field}.{part}"),
            format!("{message}; this fault is not injected"),
        );
    };
    if let Some(Err((part, message))) = fault.delay.as_ref().map(check_delay) {
        refuse(&format!("delay.{part}"), message);
        fault.delay = None;
    }
    if let Some(Err((part, message))) = fault.abort.as_ref().map(check_abort) {
        refuse(&format!("abort.{part}"), message);
        fault.abort = None;
    }
    let never = [
        (
            "delay",
            fault
                .delay
                .as_ref()
                .is_some_and(|delay| delay.percentage.is_none() && delay.percent == 0),
        ),
        (
            "abort",
            fault
                .abort
                .as_ref()
                .is_some_and(|abort| abort.percentage.is_none()),
        ),
    ];
    for (part, _) in never.into_iter().filter(|(_, never)| *never) {
        let message = "no percentage is given, which means no request at all; write percentage.value, 100 for every request";
        report.report(Severity::Warning, None, format!("{field}.{part}"), message);
    }
    if fault.delay.is_none() && fault.abort.is_none() {
        rule.fault = None;
    }
}

type Check = Result<(), (&'static str, String)>;

fn check_delay(delay: &FaultDelay) -> Check {
    if delay.exponential_delay.is_some() {
        let message = "Istio never implemented it; use fixedDelay";
        return Err(("exponentialDelay", message.to_owned()));
    }
    if delay.fixed_delay.is_none_or(|delay| delay.is_zero()) {
        return Err(("fixedDelay", "a duration above 0 is needed".to_owned()));
    }
    if !(0..=100).contains(&delay.percent) {
        return Err(("percent", "a share is a number from 0 to 100".to_owned()));
    }
    check_share(delay.percentage.as_ref()).map_err(|message| ("percentage.value", message))
}

fn check_abort(abort: &FaultAbort) -> Check {
    if !abort.http2_error.is_empty() {
        let message = "Istio never implemented it; use httpStatus or grpcStatus";
        return Err(("http2Error", message.to_owned()));
    }
    match (abort.http_status, abort.grpc_status.as_str()) {
        (Some(status), "") if !(200..600).contains(&status) => {
            let message = format!("{status} is not a status from 200 to 599");
            return Err(("httpStatus", message));
        }
        (Some(_), "") => {}
        (None, status) if abort.grpc_code().is_none() => {
            let message = format!(
                "{status:?} is no status of gRPC; write a name such as UNAVAILABLE, or httpStatus instead"
            );
            return Err(("grpcStatus", message));
        }
        (None, _) => {}
        (Some(_), _) => {
            let message = "httpStatus and grpcStatus exclude each other";
            return Err(("grpcStatus", message.to_owned()));
        }
    }
    check_share(abort.percentage.as_ref()).map_err(|message| ("percentage.value", message))
}

fn check_share(share: Option<&Percent>) -> Result<(), String> {
    match share {
        Some(share) if !(0.0..=100.0).contains(&share.value) => {
            Err(format!("{} is not a number from 0 to 100", share.value))
        }
        _ => Ok(()),
    }
}

/// False for a policy that can't be applied; single origins that can't are left out.
fn origins(cors: &mut CorsPolicy, field: &str, report: &mut Reporter<'_>) -> bool {
    let mut refuse = |field: String, message: String| {
        report.report(Severity::Error, Some("IST0106"), field, message);
    };
    let mut index = 0;
    cors.allow_origins.retain(|origin| {
        let problem = match origin {
            StringMatch::Regex(pattern) => compile(pattern).err(),
            StringMatch::Prefix(prefix) if prefix.is_empty() => {
                Some("an empty prefix can't be compared; write \".*\" as regex for any".to_owned())
            }
            StringMatch::Present => Some("empty; write exact, prefix or regex".to_owned()),
            StringMatch::Prefix(_) | StringMatch::Exact(_) => None,
        };
        if let Some(problem) = &problem {
            refuse(
                format!("{field}.allowOrigins[{index}]"),
                format!("{problem}; this origin is not allowed"),
            );
        }
        index += 1;
        problem.is_none()
    });
    let texts = [
        ("allowMethods", &cors.allow_methods),
        ("allowHeaders", &cors.allow_headers),
        ("exposeHeaders", &cors.expose_headers),
    ];
    for (name, list) in texts {
        if let Some(text) = list.iter().find(|text| !is_header_value(text)) {
            refuse(
                format!("{field}.{name}"),
                format!("{text:?} is not a header value; the policy has no effect"),
            );
            return false;
        }
    }
    true
}

fn mirrors(rule: &mut HttpRoute, field: &str, report: &mut Reporter<'_>) {
    let mut refuse = |field: String, message: String| {
        report.report(
            Severity::Error,
            Some("IST0106"),
            field,
            format!("{message}; nothing is mirrored there"),
        );
    };
    if rule.mirror.is_some() {
        let problem = match check_share(rule.mirror_percentage.as_ref()) {
            Err(message) => Some(("mirrorPercentage.value", message)),
            Ok(()) if rule.mirror_percent.is_some_and(|percent| percent > 100) => {
                Some(("mirrorPercent", "a share is at most 100".to_owned()))
            }
            Ok(()) => None,
        };
        if let Some((part, message)) = problem {
            refuse(format!("{field}.{part}"), message);
            rule.mirror = None;
        }
    } else if rule.delegate.is_none()
        && (rule.mirror_percentage.is_some() || rule.mirror_percent.is_some())
        && rule.mirrors.is_empty()
    {
        refuse(
            format!("{field}.mirror"),
            "a share is given, but no destination".to_owned(),
        );
    }
    let mut index = 0;
    rule.mirrors.retain(|mirror| {
        let problem = check_share(mirror.percentage.as_ref()).err();
        if let Some(message) = &problem {
            refuse(
                format!("{field}.mirrors[{index}].percentage.value"),
                message.clone(),
            );
        }
        index += 1;
        problem.is_none()
    });
}
