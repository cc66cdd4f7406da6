//! Fields that a JSON body has twice. Readers take the last one; what the first one said is lost, so the client is told.

use std::cell::RefCell;
use std::collections::HashSet;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

/// Duplicates that are told of.
const MOST: usize = 100;

/// Paths of fields that are there more than once, such as `spec.replicas`; nothing for a body that is not JSON.
pub fn find(body: &[u8]) -> Vec<String> {
    let found = RefCell::new(Vec::new());
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let whole = Node {
        path: String::new(),
        found: &found,
    };
    // What does not parse is refused elsewhere.
    let _ = whole.deserialize(&mut deserializer);
    found.into_inner()
}

/// One value at its place.
struct Node<'a> {
    path: String,
    found: &'a RefCell<Vec<String>>,
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        for index in 0.. {
            let item = Node {
                path: format!("{}[{index}]", self.path),
                found: self.found,
            };
            if items.next_element_seed(item)?.is_none() {
                break;
            }
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<(), A::Error> {
        let mut seen = HashSet::new();
        while let Some(key) = fields.next_key::<String>()? {
            let path = match self.path.as_str() {
                "" => key.clone(),
                above => format!("{above}.{key}"),
            };
            if !seen.insert(key) && self.found.borrow().len() < MOST {
                self.found.borrow_mut().push(path.clone());
            }
            fields.next_value_seed(Node {
                path,
                found: self.found,
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_named() {
        let body =
            br#"{"a": 1, "b": [{"c": null, "c": "x", "d": {"e": 1.5, "e": true}}], "a": -1}"#;
        assert_eq!(find(body), ["b[0].c", "b[0].d.e", "a"]);
        assert!(find(b"{\"a\": {\"b\": 1}, \"c\": {\"b\": 1}}").is_empty());
        assert!(find(b"a: 1").is_empty());
    }
}
