//! What the authorization service answers, and what that does to the request and to the answer for the client.

use std::collections::HashMap;

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3::HeaderValueOption;
use envoy_types::pb::envoy::config::core::v3::header_value_option::HeaderAppendAction;
use envoy_types::pb::envoy::service::auth::v3::CheckResponse;
use envoy_types::pb::envoy::service::auth::v3::check_response::HttpResponse;
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{Struct, Value};
use http::header::{CONNECTION, CONTENT_LENGTH, HOST, TRANSFER_ENCODING};
use http::{HeaderName, HeaderValue, StatusCode, request, response};
use mesh_routing::filter::ext_authz::HeadersOut;

use crate::filter::jwt::{decoded, without_parameter};
use crate::filter::{LocalReply, Pass, passed};
use crate::message;
use crate::report::Flag;

/// By this header an HTTP service says which headers the endpoint is not to get.
const REMOVE: HeaderName = HeaderName::from_static("x-envoy-auth-headers-to-remove");

/// The service's answer.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    pub(super) allowed: bool,
    /// For later filters.
    pub(super) metadata: Option<Struct>,
    request: Vec<Change>,
    remove: Vec<HeaderName>,
    response: Vec<Change>,
    set_parameters: Vec<(String, String)>,
    remove_parameters: Vec<String>,
    status: Option<StatusCode>,
    body: Bytes,
}

#[derive(Debug)]
struct Change {
    how: How,
    name: HeaderName,
    value: HeaderValue,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// In the place of what is there.
    Set,
    /// To what is there, in one line.
    AppendIfPresent,
    /// As a line of its own.
    Add,
    AddIfAbsent,
    SetIfPresent,
}

impl Verdict {
    /// The request's own parts cannot be put to the service.
    pub(super) fn unaskable() -> Self {
        Self {
            status: Some(StatusCode::BAD_REQUEST),
            ..Self::default()
        }
    }

    pub(super) fn of_grpc(answer: CheckResponse) -> Self {
        let allowed = answer.status.is_none_or(|status| status.code == 0);
        let mut verdict = Self {
            allowed,
            metadata: answer.dynamic_metadata,
            ..Self::default()
        };
        match answer.http_response {
            Some(HttpResponse::OkResponse(ok)) if allowed => {
                verdict.request = changes(&ok.headers, How::AppendIfPresent);
                verdict.response = changes(&ok.response_headers_to_add, How::Add);
                let names = ok.headers_to_remove.iter();
                verdict.remove = names.filter_map(|name| name.parse().ok()).collect();
                let set = ok.query_parameters_to_set.into_iter();
                verdict.set_parameters = set.map(|p| (p.key, p.value)).collect();
                verdict.remove_parameters = ok.query_parameters_to_remove;
            }
            Some(HttpResponse::DeniedResponse(denied) | HttpResponse::ErrorResponse(denied))
                if !allowed =>
            {
                let status = denied.status.map(|status| status.code);
                verdict.status = status
                    .and_then(|code| StatusCode::from_u16(u16::try_from(code).ok()?).ok())
                    .filter(|status| status.as_u16() >= 200);
                verdict.response = changes(&denied.headers, How::Add);
                verdict.body = denied.body.into();
            }
            _ => {}
        }
        verdict
    }

    /// An error of the service (5xx) is no answer.
    pub(super) fn of_http(
        out: &HeadersOut,
        head: &response::Parts,
        body: Bytes,
    ) -> Result<Self, String> {
        if head.status.is_server_error() {
            return Err(format!("HTTP status {}", head.status));
        }
        let allowed = head.status == StatusCode::OK;
        let mut verdict = Self {
            allowed,
            status: Some(head.status),
            ..Self::default()
        };
        let mut found = HashMap::new();
        for (name, value) in &head.headers {
            if [CONTENT_LENGTH, CONNECTION, TRANSFER_ENCODING].contains(name) {
                continue;
            }
            let text = name.as_str();
            let change = |how| Change {
                how,
                name: name.clone(),
                value: value.clone(),
            };
            if out.to_metadata(text) {
                let text = String::from_utf8_lossy(value.as_bytes()).into_owned();
                let kind = Some(Kind::StringValue(text));
                found.insert(name.as_str().to_owned(), Value { kind });
            }
            if !allowed {
                if out.to_refused(text) {
                    verdict.response.push(change(How::Add));
                }
                continue;
            }
            if out.to_upstream(text) {
                verdict.request.push(change(How::Set));
            }
            if out.append_upstream(text) {
                verdict.request.push(change(How::Add));
            }
            if out.to_client(text) {
                verdict.response.push(change(How::Add));
            }
        }
        verdict.metadata = (!found.is_empty()).then_some(Struct { fields: found });
        if allowed {
            let names = head.headers.get_all(REMOVE).into_iter();
            let names = names.filter_map(|line| line.to_str().ok());
            let names = names.flat_map(|line| line.split(','));
            verdict.remove = names.filter_map(|name| name.trim().parse().ok()).collect();
        } else {
            verdict.body = body;
        }
        Ok(verdict)
    }

    /// The answer to a refused client.
    pub(super) fn refusal<'a>(self, longest: Option<usize>) -> LocalReply<'a> {
        let status = self.status.unwrap_or(StatusCode::FORBIDDEN);
        let mut reply = LocalReply::new(status, Some(Flag::Unauthorized));
        reply.body = self.body;
        if let Some(longest) = longest {
            reply.body.truncate(longest);
        }
        for change in self.response {
            reply.headers.append(change.name, change.value);
        }
        reply
    }

    /// Changes the request, and what its response will get. True if the request is another one now.
    pub(super) fn change(self, parts: &mut request::Parts, pass: &mut Option<Box<Pass>>) -> bool {
        let changed = !self.request.is_empty()
            || !self.remove.is_empty()
            || !self.set_parameters.is_empty()
            || !self.remove_parameters.is_empty();
        for Change { how, name, value } in self.request {
            // Host is not a header like others: it says where the request goes.
            if name == HOST {
                continue;
            }
            let there = parts.headers.contains_key(&name);
            match how {
                How::Set => _ = parts.headers.insert(name, value),
                How::AppendIfPresent if there => {
                    message::append_to_list(&mut parts.headers, &name, &value);
                }
                How::Add => _ = parts.headers.append(name, value),
                How::AddIfAbsent if !there => _ = parts.headers.insert(name, value),
                How::SetIfPresent if there => _ = parts.headers.insert(name, value),
                _ => {}
            }
        }
        for name in self.remove.into_iter().filter(|name| *name != HOST) {
            parts.headers.remove(name);
        }
        for Change { how, name, value } in self.response {
            let pass = passed(pass);
            match how {
                How::Set => _ = pass.set.insert(name, value),
                How::Add | How::AppendIfPresent => _ = pass.add.append(name, value),
                How::AddIfAbsent => _ = pass.add_if_absent.insert(name, value),
                How::SetIfPresent => _ = pass.set_if_present.insert(name, value),
            }
        }
        if !self.set_parameters.is_empty() || !self.remove_parameters.is_empty() {
            let path = parts.uri.path_and_query().map_or("/", |p| p.as_str());
            let path = with_parameters(path, &self.set_parameters, &self.remove_parameters);
            if let Some(uri) = message::with_path(&parts.uri, &path) {
                parts.uri = uri;
            }
        }
        changed
    }
}

/// `append` is the older field and counts where it is set; without both a header is set.
#[expect(deprecated, reason = "control planes still send it, and Envoy obeys")]
fn changes(list: &[HeaderValueOption], append: How) -> Vec<Change> {
    let change = |option: &HeaderValueOption| {
        let header = option.header.as_ref()?;
        let how = match option.append.as_ref().map(|append| append.value) {
            Some(true) => append,
            Some(false) => How::Set,
            None => match HeaderAppendAction::try_from(option.append_action) {
                Ok(HeaderAppendAction::AddIfAbsent) => How::AddIfAbsent,
                Ok(HeaderAppendAction::OverwriteIfExists) => How::SetIfPresent,
                _ => How::Set,
            },
        };
        let value = match header.raw_value.is_empty() {
            true => HeaderValue::from_str(&header.value),
            false => HeaderValue::from_bytes(&header.raw_value),
        };
        Some(Change {
            how,
            // What is no header is left out.
            name: header.key.parse().ok()?,
            value: value.ok()?,
        })
    };
    list.iter().filter_map(change).collect()
}

/// A path with some parameters of its query set and others removed.
fn with_parameters(path: &str, set: &[(String, String)], remove: &[String]) -> String {
    let mut path = path.to_owned();
    for (name, value) in set {
        let (before, query) = path.split_once('?').unwrap_or((&path, ""));
        let is_it = |pair: &str| decoded(pair.split('=').next().unwrap_or("")) == *name;
        let mut pairs: Vec<String> = Vec::new();
        let mut done = false;
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            match (is_it(pair), done) {
                (false, _) => pairs.push(pair.to_owned()),
                (true, false) => {
                    pairs.push(format!("{name}={value}"));
                    done = true;
                }
                (true, true) => {}
            }
        }
        if !done {
            pairs.push(format!("{name}={value}"));
        }
        path = format!("{before}?{}", pairs.join("&"));
    }
    for name in remove {
        path = without_parameter(&path, name);
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_set_and_removed() {
        let set = [
            ("a".to_owned(), "9".to_owned()),
            ("n".to_owned(), "1".to_owned()),
        ];
        let path = with_parameters("/p?a=1&b=2&a=3", &set, &["b".to_owned()]);
        assert_eq!(path, "/p?a=9&n=1");
        assert_eq!(with_parameters("/p", &set[..1], &[]), "/p?a=9");
    }
}
