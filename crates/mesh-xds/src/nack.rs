//! Saying, and reading, which resources of a response were refused.
//!
//! The protocol gives a NACK one text for a whole response (`error_detail`). Our client adds a `google.rpc.BadRequest` in the
//! details, with one violation per resource; Envoy names the resources in its text only.

use envoy_types::pb::google::protobuf::Any;
use envoy_types::pb::google::rpc::Status;
use prost::Message;

const BAD_REQUEST: &str = "type.googleapis.com/google.rpc.BadRequest";
/// `google.rpc.Code.INVALID_ARGUMENT`.
const INVALID_ARGUMENT: i32 = 3;

/// One resource that a client could not use, and why.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rejection {
    /// The resource's name.
    pub name: String,
    /// What is wrong with it, for a person.
    pub message: String,
}

/// `google.rpc.BadRequest` (error_details.proto), which the crate of Envoy's types lacks.
#[derive(Clone, PartialEq, Message)]
struct BadRequest {
    #[prost(message, repeated, tag = "1")]
    field_violations: Vec<FieldViolation>,
}

#[derive(Clone, PartialEq, Message)]
struct FieldViolation {
    #[prost(string, tag = "1")]
    field: String,
    #[prost(string, tag = "2")]
    description: String,
}

/// The `error_detail` of a NACK for these resources.
#[must_use]
pub fn to_status(rejections: &[Rejection]) -> Status {
    let text: Vec<String> = rejections
        .iter()
        .map(|rejection| format!("{}: {}", rejection.name, rejection.message))
        .collect();
    let details = BadRequest {
        field_violations: rejections
            .iter()
            .map(|rejection| FieldViolation {
                field: rejection.name.clone(),
                description: rejection.message.clone(),
            })
            .collect(),
    };
    Status {
        code: INVALID_ARGUMENT,
        message: text.join("; "),
        details: vec![Any {
            type_url: BAD_REQUEST.to_owned(),
            value: details.encode_to_vec(),
        }],
    }
}

/// The refused resources of a NACK. `sent` are the names in the response that it refers to: for a client that gives only a
/// text, the resources are those of them that the text mentions, or all where it mentions none.
#[must_use]
pub fn from_status<'a>(
    status: &Status,
    sent: impl Iterator<Item = &'a str> + Clone,
) -> Vec<Rejection> {
    let details = status
        .details
        .iter()
        .find(|any| any.type_url == BAD_REQUEST)
        .and_then(|any| BadRequest::decode(any.value.as_slice()).ok());
    if let Some(details) = details.filter(|details| !details.field_violations.is_empty()) {
        return details
            .field_violations
            .into_iter()
            .map(|violation| Rejection {
                name: violation.field,
                message: violation.description,
            })
            .collect();
    }
    let reject = |name: &str| Rejection {
        name: name.to_owned(),
        message: status.message.clone(),
    };
    let named: Vec<Rejection> = sent
        .clone()
        .filter(|name| mentions(&status.message, name))
        .map(reject)
        .collect();
    if named.is_empty() {
        sent.map(reject).collect()
    } else {
        named
    }
}

/// Whether `text` holds `name` as a whole word (a resource named `80` must not be found in `http.8080`).
fn mentions(text: &str, name: &str) -> bool {
    let part_of_name = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | '|');
    !name.is_empty()
        && text.match_indices(name).any(|(at, _)| {
            let before = text[..at].chars().next_back();
            let mut after = text[at + name.len()..].chars();
            // A full stop ends a sentence as well as it divides a name: look one further.
            let follows = match after.next() {
                Some('.') => after.next(),
                other => other,
            };
            !before.is_some_and(part_of_name) && !follows.is_some_and(part_of_name)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_form_survives_the_way() {
        let rejections = vec![Rejection {
            name: "80".to_owned(),
            message: "virtual_hosts[0].routes[1]: bad regex".to_owned(),
        }];
        let status = to_status(&rejections);
        assert_eq!(status.message, "80: virtual_hosts[0].routes[1]: bad regex");
        assert_eq!(from_status(&status, ["80", "9080"].into_iter()), rejections);
    }

    #[test]
    fn envoys_text_names_resources() {
        let status = Status {
            code: 13,
            message: "Error adding/updating cluster(s) outbound|80||a.b: port missing".to_owned(),
            details: Vec::new(),
        };
        let sent = ["outbound|80||a", "outbound|80||a.b", "80"];
        let names: Vec<_> = from_status(&status, sent.into_iter())
            .into_iter()
            .map(|rejection| rejection.name)
            .collect();
        assert_eq!(names, ["outbound|80||a.b"]);
    }

    #[test]
    fn a_text_without_names_blames_all() {
        let status = Status {
            code: 13,
            message: "no".to_owned(),
            details: Vec::new(),
        };
        assert_eq!(from_status(&status, ["a", "b"].into_iter()).len(), 2);
    }
}
