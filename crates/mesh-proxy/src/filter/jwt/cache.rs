//! Tokens that were verified before, each worker's own.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{ListValue, Struct, Value};
use http::{HeaderName, HeaderValue};
use mesh_identity::jwt::Jwt;
use mesh_routing::dynamic::find;
use mesh_routing::filter::jwt_authn::Provider;
use serde_json::{Map, Value as Json};

/// Tokens in one of the two halves; the older half goes when the younger one is full.
const MOST: usize = 512;
/// Longer tokens are verified each time (Envoy's default for its cache).
const LONGEST: usize = 4096;

/// A token that is good, and what it does to a request.
#[derive(Debug)]
pub(super) struct Verified {
    pub(super) jwt: Jwt,
    /// For the filter's metadata; `None` where the provider wants none.
    pub(super) metadata: Option<Arc<Struct>>,
    /// To be added to the request.
    pub(super) headers: Vec<(HeaderName, HeaderValue)>,
}

#[derive(Default)]
struct Cache {
    young: Half,
    old: Half,
}

/// For each token the verdicts by provider and set of keys.
type Half = HashMap<Box<str>, Vec<(u64, u64, Rc<Verified>)>, foldhash::fast::RandomState>;

thread_local! {
    static CACHE: RefCell<Cache> = RefCell::default();
}

/// The verdict of this provider with these keys, if it was good.
pub(super) fn get(token: &str, provider: u64, keys: u64) -> Option<Rc<Verified>> {
    let of = |half: &Half| {
        let all = half.get(token)?.iter();
        let mut all = all.filter(|(p, k, _)| *p == provider && *k == keys);
        all.next().map(|(_, _, verified)| verified.clone())
    };
    CACHE.with_borrow_mut(|cache| {
        if let Some(found) = of(&cache.young) {
            return Some(found);
        }
        let found = of(&cache.old)?;
        cache.put(token, provider, keys, &found);
        Some(found)
    })
}

/// Remembers a good verdict.
pub(super) fn put(token: &str, provider: u64, keys: u64, verified: &Rc<Verified>) {
    if token.len() <= LONGEST {
        CACHE.with_borrow_mut(|cache| cache.put(token, provider, keys, verified));
    }
}

impl Cache {
    fn put(&mut self, token: &str, provider: u64, keys: u64, verified: &Rc<Verified>) {
        if self.young.len() >= MOST {
            self.old = std::mem::take(&mut self.young);
        }
        let verdicts = self.young.entry(token.into()).or_default();
        // Of older keys nothing is wanted any more.
        verdicts.retain(|(p, _, _)| *p != provider);
        verdicts.push((provider, keys, verified.clone()));
    }
}

impl Verified {
    /// Works out what a good token does to requests.
    pub(super) fn new(provider: &Provider, jwt: Jwt) -> Self {
        let payload = to_struct(jwt.payload());
        let mut headers = Vec::new();
        if let Some(name) = &provider.payload_header {
            let mut text = jwt.payload_base64().to_owned();
            while provider.padded && !text.len().is_multiple_of(4) {
                text.push('=');
            }
            headers.extend(HeaderValue::try_from(text).ok().map(|v| (name.clone(), v)));
        }
        for claim in &provider.claim_headers {
            let value = find(&payload, &claim.claim).and_then(|value| value.kind.as_ref());
            let value = value.and_then(|kind| claim_text(kind, &jwt, &claim.claim));
            let value = value.and_then(|text| HeaderValue::try_from(text).ok());
            headers.extend(value.map(|value| (claim.name.clone(), value)));
        }
        Self {
            metadata: metadata(provider, payload, &jwt),
            headers,
            jwt,
        }
    }
}

fn metadata(provider: &Provider, mut payload: Struct, jwt: &Jwt) -> Option<Arc<Struct>> {
    let mut section = Struct::default();
    let mut put = |name: &str, fields: Struct| {
        let kind = Some(Kind::StructValue(fields));
        section.fields.insert(name.to_owned(), Value { kind });
    };
    if let Some(name) = &provider.header_metadata {
        put(name, to_struct(jwt.header()));
    }
    if let Some(name) = &provider.payload_metadata {
        for claim in &provider.word_lists {
            if let Some(Some(Kind::StringValue(words))) =
                payload.fields.get(&**claim).map(|value| value.kind.clone())
            {
                let values = words.split(' ').filter(|word| !word.is_empty());
                let values = values.map(|word| Value {
                    kind: Some(Kind::StringValue(word.to_owned())),
                });
                let list = ListValue {
                    values: values.collect(),
                };
                let kind = Some(Kind::ListValue(list));
                payload.fields.insert(claim.to_string(), Value { kind });
            }
        }
        put(name, payload);
    }
    (!section.fields.is_empty()).then(|| Arc::new(section))
}

/// Texts, numbers and booleans as they are, objects and lists as base64 of their JSON. Empty ones make no header.
fn claim_text(kind: &Kind, jwt: &Jwt, path: &[Box<str>]) -> Option<String> {
    let text = match kind {
        Kind::StringValue(text) => text.clone(),
        Kind::BoolValue(value) => value.to_string(),
        Kind::NumberValue(number) => number_text(*number),
        Kind::StructValue(_) | Kind::ListValue(_) => STANDARD.encode(claim(jwt, path)?.to_string()),
        Kind::NullValue(_) => return None,
    };
    (!text.is_empty()).then_some(text)
}

fn claim<'j>(jwt: &'j Jwt, path: &[Box<str>]) -> Option<&'j Json> {
    let (first, rest) = path.split_first()?;
    let mut value = jwt.payload().get(&**first)?;
    for name in rest {
        value = value.get(&**name)?;
    }
    Some(value)
}

/// Whole numbers without a point, others with six places (C++ `std::to_string`).
fn number_text(number: f64) -> String {
    match number.fract() == 0.0 && (0.0..18_446_744_073_709_551_616.0).contains(&number) {
        true => format!("{number:.0}"),
        false => format!("{number:.6}"),
    }
}

fn to_struct(map: &Map<String, Json>) -> Struct {
    let fields = map
        .iter()
        .map(|(name, value)| (name.clone(), to_value(value)));
    Struct {
        fields: fields.collect(),
    }
}

/// Numbers become doubles, as in Envoy.
fn to_value(value: &Json) -> Value {
    let kind = match value {
        Json::Null => Kind::NullValue(0),
        Json::Bool(value) => Kind::BoolValue(*value),
        Json::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or(f64::NAN)),
        Json::String(text) => Kind::StringValue(text.clone()),
        Json::Array(list) => Kind::ListValue(ListValue {
            values: list.iter().map(to_value).collect(),
        }),
        Json::Object(map) => Kind::StructValue(to_struct(map)),
    };
    Value { kind: Some(kind) }
}
