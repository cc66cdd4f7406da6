//! Names, labels and the rest of metadata: what is allowed, and names made by the server.

use rand::Rng;
use serde_json::Value;

use crate::errors::FieldError;
use crate::registry::Resource;
use crate::{rbac, strategy};

/// Characters of generated names: no vowels, so no words.
const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
const MAX_ANNOTATIONS: usize = 256 * 1024;

/// `prefix` with five random characters (Kubernetes' `generateName`).
pub fn generate(prefix: &str) -> String {
    let mut rng = rand::rng();
    let cut: String = prefix.chars().take(58).collect();
    let tail = (0..5).map(|_| char::from(ALPHABET[rng.random_range(0..ALPHABET.len())]));
    cut.chars().chain(tail).collect()
}

/// Lower case letters, digits and `-`, at most 63 bytes.
pub fn is_dns_label(text: &str) -> bool {
    let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    !text.is_empty()
        && text.len() <= 63
        && text.bytes().all(good)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// DNS labels with dots between, at most 253 bytes. Labels themselves may be longer than 63 (as Kubernetes' pattern has it).
pub fn is_dns_subdomain(text: &str) -> bool {
    let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let part =
        |p: &str| !p.is_empty() && p.bytes().all(good) && !p.starts_with('-') && !p.ends_with('-');
    text.len() <= 253 && text.split('.').all(part)
}

const LABEL_WORDS: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with \
     an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const SUBDOMAIN_WORDS: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end \
     with an alphanumeric character (e.g. 'example.com', regex used for validation is \
     '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const LABEL_1035_WORDS: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end \
     with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')";
const LABEL_VALUE_WORDS: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with \
     an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is \
     '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";
const KEY_WORDS: &str = "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric \
     character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is \
     '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";

/// Says what is wrong with a DNS label, if anything.
pub fn label_error(field: &str, text: &str) -> Option<FieldError> {
    (!is_dns_label(text)).then(|| FieldError::invalid(field, text, LABEL_WORDS))
}

/// Checks name, labels, annotations, finalizers and owner references.
pub fn validate_metadata(resource: &Resource, metadata: &Value, errors: &mut Vec<FieldError>) {
    match metadata["name"].as_str().unwrap_or_default() {
        "" => errors.push(FieldError::required(
            "metadata.name",
            "name or generateName is required",
        )),
        name => validate_name(resource, name, errors),
    }
    validate_labels(&metadata["labels"], "metadata.labels", errors);
    if let Some(annotations) = metadata["annotations"].as_object() {
        let mut size = 0;
        for (key, value) in annotations {
            size += key.len() + value.as_str().map_or(0, str::len);
            if !is_label_key(&key.to_ascii_lowercase()) {
                errors.push(FieldError::invalid(
                    "metadata.annotations",
                    key.as_str(),
                    KEY_WORDS,
                ));
            }
        }
        if size > MAX_ANNOTATIONS {
            let detail = format!("may not be more than {MAX_ANNOTATIONS} bytes");
            errors.push(FieldError::invalid(
                "metadata.annotations",
                "",
                &format!("Too long: {detail}"),
            ));
        }
    }
    for (index, reference) in metadata["ownerReferences"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        for field in ["apiVersion", "kind", "name", "uid"] {
            if reference[field].as_str().unwrap_or_default().is_empty() {
                let path = format!("metadata.ownerReferences[{index}].{field}");
                errors.push(FieldError::invalid(
                    path,
                    "",
                    &format!("{field} must not be empty"),
                ));
            }
        }
    }
}

fn validate_name(resource: &Resource, name: &str, errors: &mut Vec<FieldError>) {
    let (good, words) = match resource.storage.as_str() {
        "core/namespaces" => (is_dns_label(name), LABEL_WORDS),
        "core/services" => {
            let starts = name.starts_with(|c: char| c.is_ascii_lowercase());
            (is_dns_label(name) && starts, LABEL_1035_WORDS)
        }
        _ if resource.group == rbac::GROUP => {
            let wrong = strategy::rbac::name_error(name);
            (wrong.is_none(), wrong.unwrap_or_default())
        }
        _ => (is_dns_subdomain(name), SUBDOMAIN_WORDS),
    };
    if !good {
        errors.push(FieldError::invalid("metadata.name", name, words));
    }
}

/// Checks the keys and values of a map of labels.
pub fn validate_labels(labels: &Value, field: &str, errors: &mut Vec<FieldError>) {
    for (key, value) in labels.as_object().into_iter().flatten() {
        if !is_label_key(key) {
            errors.push(FieldError::invalid(field, key.as_str(), KEY_WORDS));
        }
        let value = value.as_str().unwrap_or_default();
        if value.len() > 63 {
            errors.push(FieldError::invalid(
                field,
                value,
                "must be no more than 63 characters",
            ));
        } else if !value.is_empty() && !is_label_word(value) {
            errors.push(FieldError::invalid(field, value, LABEL_VALUE_WORDS));
        }
    }
}

fn is_label_key(key: &str) -> bool {
    match key.split_once('/') {
        None => is_label_word(key),
        Some((prefix, name)) => is_dns_subdomain(prefix) && is_label_word(name),
    }
}

fn is_label_word(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    text.len() <= 63 && bytes.iter().all(|b| inner(*b)) && edge(bytes.first()) && edge(bytes.last())
}
