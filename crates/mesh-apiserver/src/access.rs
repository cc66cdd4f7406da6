//! What a request wants to do, as authorization sees it, and the answer to those who may not.
//!
//! The reading of URLs is that of Kubernetes' `RequestInfo`; it does not ask whether the resource exists, so that nobody can find out
//! what is served beyond what they may see.

use std::borrow::Cow;
use std::collections::HashMap;
use std::time::{Duration, Instant};

use http::Method;
use serde_json::json;

use crate::ApiServer;
use crate::auth::Identity;
use crate::errors::ApiError;
use crate::request::{Query, decode};
use crate::selector;

/// One thing that somebody wants to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Action<'a> {
    /// `get`, `list`, `create`, ..., `impersonate`, `bind`; for a path the method in lower case.
    pub verb: Cow<'a, str>,
    /// What with.
    pub on: On<'a>,
}

/// The thing in question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum On<'a> {
    /// A resource of the API.
    Resource(Object<'a>),
    /// Any other path.
    Path(Cow<'a, str>),
}

/// An object or a collection; empty texts where something does not apply.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Object<'a> {
    /// API group.
    pub group: Cow<'a, str>,
    /// Plural name.
    pub resource: Cow<'a, str>,
    /// Subresource.
    pub subresource: Cow<'a, str>,
    /// Namespace; for a Namespace itself its own name.
    pub namespace: Cow<'a, str>,
    /// Name of the object.
    pub name: Cow<'a, str>,
}

impl<'a> Action<'a> {
    /// An action on an object.
    pub fn on_object(verb: &'a str, object: Object<'a>) -> Action<'a> {
        Action {
            verb: verb.into(),
            on: On::Resource(object),
        }
    }

    /// The action of a request.
    pub fn of(method: &Method, path: &'a str, query: &str) -> Action<'a> {
        let plain = || Action {
            verb: method.as_str().to_ascii_lowercase().into(),
            on: On::Path(path.into()),
        };
        let mut segments = path.trim_matches('/').split('/');
        // Read as the request's target is: what is served by these names is judged by them.
        let group = match segments.next().map(segment).as_deref() {
            Some("api") => Some(Cow::Borrowed("")),
            Some("apis") => segments.next().map(segment),
            _ => None,
        };
        let (Some(group), Some(_version)) = (group, segments.next()) else {
            return plain();
        };
        let mut rest: Vec<Cow<'a, str>> = segments.map(segment).collect();
        if rest.is_empty() {
            return plain();
        }
        let mut namespace = Cow::Borrowed("");
        if rest[0] == "namespaces" && rest.len() > 1 {
            namespace = rest[1].clone();
            // A Namespace has two subresources; everything else behind its name is a resource in it.
            if rest.len() > 2 && !matches!(&*rest[2], "status" | "finalize") {
                rest.drain(..2);
            }
        }
        let mut rest = rest.into_iter();
        let mut object = Object {
            group,
            namespace,
            resource: rest.next().unwrap_or_default(),
            name: rest.next().unwrap_or_default(),
            subresource: rest.next().unwrap_or_default(),
        };
        let verb = match *method {
            Method::POST => "create",
            Method::PUT => "update",
            Method::PATCH => "patch",
            Method::DELETE if object.name.is_empty() => "deletecollection",
            Method::DELETE => "delete",
            Method::GET | Method::HEAD => read_verb(&mut object, query),
            // No rule names it, so that only `*` allows it; nothing is served by it either.
            _ => "",
        };
        Action::on_object(verb, object)
    }
}

/// `get`, or for a collection `list` or `watch`; a selection of one name is a request for that name.
fn read_verb(object: &mut Object<'_>, query: &str) -> &'static str {
    if query.is_empty() {
        return if object.name.is_empty() {
            "list"
        } else {
            "get"
        };
    }
    let query = Query::parse(query);
    let watch = query.flag("watch");
    if object.name.is_empty()
        && let Some(selector) = query.get("fieldSelector")
        && let Some(name) = selector::required_name(selector)
    {
        object.name = name.to_owned().into();
        return if watch { "watch" } else { "list" };
    }
    match (watch, object.name.is_empty()) {
        (true, _) => "watch",
        (false, true) => "list",
        (false, false) => "get",
    }
}

fn segment(raw: &str) -> Cow<'_, str> {
    if raw.contains('%') {
        decode(raw, false).into()
    } else {
        raw.into()
    }
}

impl ApiServer {
    /// Lets `identity` do this, or not.
    ///
    /// # Errors
    /// 403 in Kubernetes' words.
    pub(crate) fn authorize(
        &self,
        identity: &Identity,
        action: &Action<'_>,
    ) -> Result<(), ApiError> {
        if identity.is_master() {
            return Ok(());
        }
        let policy = self.policy();
        if policy.allows(identity, action).is_some() {
            return Ok(());
        }
        let error = forbidden(identity, action, &policy.broken(identity, action));
        // A program that lacks a permission may not be able to say so to anybody else.
        let program = identity.username.starts_with("system:serviceaccount:");
        if program && self.refusals().is_news(&error.message, Instant::now()) {
            tracing::warn!("{}", error.message);
        } else {
            tracing::debug!("{}", error.message);
        }
        Err(error)
    }
}

/// Refusals that were logged a short time ago: who tries again and again is not told of each time.
#[derive(Debug, Default)]
pub struct Refusals(HashMap<String, Instant>);

impl Refusals {
    /// Time after which the same refusal is logged again.
    const AGAIN: Duration = Duration::from_secs(60);
    /// Different ones in that time; more are not logged.
    const MOST: usize = 256;

    fn is_news(&mut self, message: &str, now: Instant) -> bool {
        let recent = |then: &Instant| now.duration_since(*then) < Refusals::AGAIN;
        if self.0.get(message).is_some_and(recent) {
            return false;
        }
        if self.0.len() >= Refusals::MOST {
            self.0.retain(|_, then| recent(then));
        }
        let room = self.0.len() < Refusals::MOST;
        if room {
            self.0.insert(message.to_owned(), now);
        }
        room
    }
}

/// The refusal of an action; `reason` may be empty.
pub fn forbidden(identity: &Identity, action: &Action<'_>, reason: &str) -> ApiError {
    let (user, verb) = (&identity.username, &action.verb);
    let mut why = match &action.on {
        On::Path(path) => format!("User {user:?} cannot {verb} path {path:?}"),
        On::Resource(r) => {
            let slash = if r.subresource.is_empty() { "" } else { "/" };
            let place = if r.namespace.is_empty() {
                "at the cluster scope".to_owned()
            } else {
                format!("in the namespace {:?}", r.namespace)
            };
            format!(
                "User {user:?} cannot {verb} resource \"{}{slash}{}\" in API group {:?} {place}",
                r.resource, r.subresource, r.group
            )
        }
    };
    if !reason.is_empty() {
        why.push_str(&format!(": {reason}"));
    }
    let On::Resource(r) = &action.on else {
        let mut error = ApiError::new(403, "Forbidden", format!("forbidden: {why}"));
        error.details = Some(json!({}));
        return error;
    };
    let dot = if r.group.is_empty() { "" } else { "." };
    let name = if r.name.is_empty() {
        String::new()
    } else {
        format!(" {:?}", r.name)
    };
    let message = format!("{}{dot}{}{name} is forbidden: {why}", r.resource, r.group);
    let mut error = ApiError::new(403, "Forbidden", message);
    let mut details = json!({});
    for (field, value) in [
        ("name", &r.name),
        ("group", &r.group),
        ("kind", &r.resource),
    ] {
        if !value.is_empty() {
            details[field] = value.as_ref().into();
        }
    }
    error.details = Some(details);
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(method: &str, url: &str) -> String {
        let (path, query) = url.split_once('?').unwrap_or((url, ""));
        let action = Action::of(&method.parse().unwrap(), path, query);
        match &action.on {
            On::Path(path) => format!("{} {path}", action.verb),
            On::Resource(r) => format!(
                "{} group={} {}/{} sub={} ns={}",
                action.verb, r.group, r.resource, r.name, r.subresource, r.namespace
            ),
        }
    }

    #[test]
    fn refusals_are_logged_once_a_minute() {
        let (mut refusals, start) = (Refusals::default(), Instant::now());
        let second = Duration::from_secs(1);
        assert!(refusals.is_news("a", start));
        assert!(refusals.is_news("b", start));
        assert!(!refusals.is_news("a", start + second * 59));
        assert!(refusals.is_news("a", start + second * 60));
        for n in 0..1000 {
            refusals.is_news(&n.to_string(), start + second * 61);
        }
        assert!(refusals.0.len() <= Refusals::MOST);
        assert!(!refusals.is_news("c", start + second * 61));
        assert!(refusals.is_news("c", start + second * 200));
    }

    #[test]
    fn urls_are_actions() {
        for (method, url, expected) in [
            ("GET", "/", "get /"),
            ("GET", "/api", "get /api"),
            ("GET", "/api/v1", "get /api/v1"),
            ("GET", "/apis/apps/v1", "get /apis/apps/v1"),
            ("POST", "/healthz", "post /healthz"),
            ("GET", "/api/v1/pods", "list group= pods/ sub= ns="),
            ("GET", "/api/v1/pods?watch=1", "watch group= pods/ sub= ns="),
            (
                "HEAD",
                "/api/v1/namespaces/a/pods/p",
                "get group= pods/p sub= ns=a",
            ),
            (
                "GET",
                "/api/v1/namespaces/a/pods?fieldSelector=metadata.name%3Dp&watch=true",
                "watch group= pods/p sub= ns=a",
            ),
            (
                "GET",
                "/api/v1/namespaces/a/pods?fieldSelector=metadata.name!%3Dp",
                "list group= pods/ sub= ns=a",
            ),
            (
                "GET",
                "/api/v1/namespaces",
                "list group= namespaces/ sub= ns=",
            ),
            (
                "GET",
                "/api/v1/namespaces/a",
                "get group= namespaces/a sub= ns=a",
            ),
            (
                "PUT",
                "/api/v1/namespaces/a/finalize",
                "update group= namespaces/a sub=finalize ns=a",
            ),
            (
                "POST",
                "/api/v1/namespaces/a/pods/p/exec",
                "create group= pods/p sub=exec ns=a",
            ),
            (
                "GET",
                "/api/v1/namespaces/a/services/s:80/proxy/x/y",
                "get group= services/s:80 sub=proxy ns=a",
            ),
            (
                "DELETE",
                "/apis/apps/v1/namespaces/a/deployments",
                "deletecollection group=apps deployments/ sub= ns=a",
            ),
            (
                "PATCH",
                "/apis/apps/v1/namespaces/a%62/deployments/d/status/",
                "patch group=apps deployments/d sub=status ns=ab",
            ),
        ] {
            assert_eq!(shown(method, url), expected, "{method} {url}");
        }
    }
}
