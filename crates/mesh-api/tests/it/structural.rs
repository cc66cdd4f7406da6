//! The CRDs against the rules that a Kubernetes API has for structural schemas.

use serde_json::Value;

/// Collects what a Kubernetes API would refuse in a schema.
fn check(schema: &Value, path: &str, problems: &mut Vec<String>) {
    let Some(map) = schema.as_object() else {
        problems.push(format!("{path}: not an object"));
        return;
    };
    const KNOWN: &[&str] = &[
        "type",
        "description",
        "properties",
        "items",
        "additionalProperties",
        "required",
        "enum",
        "format",
        "minimum",
        "maximum",
        "oneOf",
        "maxProperties",
        "x-kubernetes-preserve-unknown-fields",
        "x-kubernetes-int-or-string",
        "x-kubernetes-validations",
    ];
    for key in map.keys().filter(|key| !KNOWN.contains(&key.as_str())) {
        problems.push(format!("{path}: unexpected {key}"));
    }
    let kind = map.get("type").and_then(Value::as_str).unwrap_or_default();
    if !matches!(
        kind,
        "object" | "array" | "string" | "integer" | "number" | "boolean"
    ) {
        problems.push(format!("{path}: type {:?}", map.get("type")));
    }
    if map.contains_key("properties") && map.contains_key("additionalProperties") {
        problems.push(format!("{path}: properties and additionalProperties"));
    }
    if (kind == "array") != map.contains_key("items") {
        problems.push(format!("{path}: items and type {kind}"));
    }
    let open = map.get("x-kubernetes-preserve-unknown-fields") == Some(&Value::Bool(true));
    if kind == "object"
        && !open
        && !map.contains_key("properties")
        && !map.contains_key("additionalProperties")
    {
        problems.push(format!(
            "{path}: an object without fields would lose everything by pruning"
        ));
    }
    let properties = map.get("properties").and_then(Value::as_object);
    for name in map
        .get("required")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
    {
        if !properties.is_some_and(|properties| properties.contains_key(name)) {
            problems.push(format!("{path}: required {name} is no property"));
        }
    }
    for condition in map
        .get("oneOf")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
    {
        if condition
            .as_object()
            .is_none_or(|condition| condition.keys().any(|key| key != "required"))
        {
            problems.push(format!("{path}: oneOf with more than conditions"));
        }
    }
    let rules = map
        .get("x-kubernetes-validations")
        .and_then(Value::as_array);
    for rule in rules.into_iter().flatten() {
        check_rule(
            schema,
            rule["rule"].as_str().unwrap_or_default(),
            path,
            problems,
        );
    }
    for (name, below) in properties.into_iter().flatten() {
        check(below, &format!("{path}.{name}"), problems);
    }
    for below in ["items", "additionalProperties"] {
        if let Some(inner) = map.get(below) {
            check(inner, &format!("{path}.{below}"), problems);
        }
    }
}

/// A rule in CEL names fields that are there, else no API server compiles it, and goes through nothing whose length has no limit, else the estimate of
/// its cost is too high for one.
fn check_rule(schema: &Value, rule: &str, path: &str, problems: &mut Vec<String>) {
    for costly in [
        ".all(",
        ".exists",
        ".map(",
        ".filter(",
        "matches(",
        "contains(",
        "With(",
    ] {
        if rule.contains(costly) {
            problems.push(format!("{path}: {rule}: {costly} has no bound"));
        }
    }
    for reference in rule.split("self.").skip(1) {
        let end = |c: char| !c.is_ascii_alphanumeric() && c != '.';
        let fields = reference.split(end).next().unwrap_or_default();
        let mut place = schema;
        for field in fields.split('.') {
            place = &place["properties"][field];
        }
        if place.is_null() || fields.is_empty() {
            problems.push(format!("{path}: {rule}: there is no {fields}"));
        }
    }
}

#[test]
fn crds_are_structural() {
    let mut problems = Vec::new();
    for crd in mesh_api::crds() {
        let name = crd["metadata"]["name"].as_str().expect("name").to_owned();
        for version in crd["spec"]["versions"].as_array().expect("versions") {
            check(&version["schema"]["openAPIV3Schema"], &name, &mut problems);
        }
    }
    assert!(problems.is_empty(), "{problems:#?}");
}

#[test]
fn the_checker_finds_what_kubernetes_refuses() {
    for bad in [
        serde_json::json!({ "properties": {} }),
        serde_json::json!({ "type": "array" }),
        serde_json::json!({ "type": ["string", "null"] }),
        serde_json::json!({ "$ref": "#/a" }),
        serde_json::json!({ "type": "object", "properties": { "a": { "type": "string" } }, "additionalProperties": false }),
        serde_json::json!({ "type": "object", "properties": { "a": { "type": "object" } } }),
        serde_json::json!({ "type": "object", "properties": { "a": { "type": "string" } }, "x-kubernetes-validations": [{ "rule": "has(self.b)" }] }),
        serde_json::json!({ "type": "object", "properties": { "a": { "type": "string" } }, "x-kubernetes-validations": [{ "rule": "self.a.contains('b')" }] }),
    ] {
        let mut problems = Vec::new();
        check(&bad, "x", &mut problems);
        assert!(!problems.is_empty(), "{bad}");
    }
}

#[test]
fn crds_name_what_istio_names() {
    let crds = mesh_api::crds();
    assert_eq!(crds.len(), 15);
    let find = |name: &str| {
        crds.iter()
            .find(|crd| crd["metadata"]["name"] == name)
            .unwrap_or_else(|| panic!("{name}"))
    };
    let service = find("virtualservices.networking.istio.io");
    assert_eq!(
        service["spec"]["names"]["shortNames"],
        serde_json::json!(["vs"])
    );
    let versions = service["spec"]["versions"].as_array().expect("versions");
    assert_eq!(versions.len(), 3);
    assert_eq!(
        versions
            .iter()
            .filter(|version| version["storage"] == true)
            .count(),
        1
    );
    assert_eq!(
        versions[0]["additionalPrinterColumns"][1]["jsonPath"],
        ".spec.hosts"
    );
    let route = &versions[0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["http"]
        ["items"]["properties"];
    assert_eq!(
        route["match"]["items"]["properties"]["uri"]["properties"]["exact"]["type"],
        "string"
    );
    assert_eq!(route["timeout"]["type"], "string");
    assert_eq!(
        route["route"]["items"]["required"],
        serde_json::json!(["destination"])
    );
    assert_eq!(
        route["directResponse"]["properties"]["body"]["oneOf"],
        serde_json::json!([{ "required": ["string"] }, { "required": ["bytes"] }])
    );
    let rule = &find("destinationrules.networking.istio.io")["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        ["properties"]["spec"];
    let outlier =
        &rule["properties"]["trafficPolicy"]["properties"]["outlierDetection"]["properties"];
    assert_eq!(outlier["consecutive5xxErrors"]["maximum"], u32::MAX);
    assert_eq!(
        rule["properties"]["trafficPolicy"]["properties"]["tls"]["properties"]["mode"]["enum"][3],
        "ISTIO_MUTUAL"
    );
    assert_eq!(
        find("telemetries.telemetry.istio.io")["spec"]["versions"][1]["storage"],
        true
    );
}
