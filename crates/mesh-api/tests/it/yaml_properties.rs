//! Whatever comes in, YAML gives a value or an error; and what we write we read back.

use mesh_api::yaml;
use proptest::prelude::*;
use serde_json::Value;

fn value() -> impl Strategy<Value = Value> {
    let text = prop_oneof![
        "\\PC{0,12}",
        "[ -~\\n\\t]{0,20}",
        "(yes|no|on|off|~|null|0x1|0644|1e3|\\.5|<<|---|- a|a: b|#|'|\")"
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        text.clone().prop_map(Value::from)
    ];
    leaf.prop_recursive(4, 40, 5, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::btree_map(text.clone(), inner, 0..5)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// A `List` object stands for its items, so it does not come back as it was.
fn is_list(value: &Value) -> bool {
    value
        .get("kind")
        .and_then(Value::as_str)
        .is_some_and(|kind| kind.ends_with("List"))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_panics(text in "[-a-c0-9:{}\\[\\],&*<!|>'\"#%@`~?\\\\ \\n\\t.]{0,80}|\\PC{0,60}") {
        let _ = yaml::documents(&text, "x");
    }

    #[test]
    fn what_is_written_is_read_back(value in value()) {
        prop_assume!(!value.is_null() && !is_list(&value));
        let text = yaml::to_string(&value);
        let back = yaml::documents(&text, "x").map_err(|error| TestCaseError::fail(format!("{error}\n{text}")))?;
        prop_assert_eq!(back, vec![value], "{}", text);
    }
}
