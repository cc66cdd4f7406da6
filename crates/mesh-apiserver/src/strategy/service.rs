//! Services: cluster addresses, node ports, defaults that hang on the type.

use std::collections::HashSet;
use std::net::Ipv4Addr;

use serde_json::{Value, json};

use crate::ApiServer;
use crate::errors::{ApiError, FieldError, FieldErrorKind};
use crate::registry::Resource;
use crate::strategy::items_mut;

const NODE_PORTS: std::ops::RangeInclusive<u64> = 30000..=32767;
/// Addresses at the start of the network left for well-known services (`kubernetes`, DNS); given only when asked for.
const RESERVED: u32 = 16;

fn has_node_ports(spec: &Value) -> bool {
    let balanced = spec["type"] == "LoadBalancer"
        && spec["allocateLoadBalancerNodePorts"] != Value::Bool(false);
    spec["type"] == "NodePort" || balanced
}

/// Target ports, traffic policies.
pub fn defaults(spec: &mut Value) {
    if !spec.is_object() {
        *spec = json!({ "type": "ClusterIP", "sessionAffinity": "None" });
    }
    for port in items_mut(spec, "ports") {
        let unset = port
            .get("targetPort")
            .is_none_or(|t| *t == json!(0) || *t == json!(""));
        if unset {
            port["targetPort"] = port["port"].clone();
        }
    }
    let kind = spec["type"].as_str().unwrap_or_default().to_owned();
    let mut default = |field: &str, value: Value| {
        if spec.get(field).is_none() {
            spec[field] = value;
        }
    };
    if kind != "ExternalName" {
        default("internalTrafficPolicy", "Cluster".into());
        default("ipFamilies", json!(["IPv4"]));
        default("ipFamilyPolicy", "SingleStack".into());
    }
    if matches!(kind.as_str(), "NodePort" | "LoadBalancer") {
        default("externalTrafficPolicy", "Cluster".into());
    }
    if kind == "LoadBalancer" {
        default("allocateLoadBalancerNodePorts", true.into());
    }
    if spec["sessionAffinity"] == "ClientIP"
        && spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"].is_null()
    {
        spec["sessionAffinityConfig"] = json!({ "clientIP": { "timeoutSeconds": 10800 } });
    }
}

/// Gives addresses and node ports that are missing, keeps those of `old`.
///
/// # Errors
/// 422 when what is asked for is taken or outside, or nothing is left.
pub fn allocate(
    api: &ApiServer,
    resource: &Resource,
    old: Option<&Value>,
    service: &mut Value,
) -> Result<(), ApiError> {
    let name = service["metadata"]["name"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let others = others(api, service);
    let refuse = |error: FieldError| ApiError::invalid(resource, &name, &[error]);
    if let Some(old) = old {
        keep_allocated(&old["spec"], &mut service["spec"]);
    }
    let spec = &mut service["spec"];
    if spec["type"] == "ExternalName" {
        return Ok(());
    }
    let kept = old
        .map(|o| o["spec"]["clusterIP"].clone())
        .unwrap_or_default();
    match spec["clusterIP"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
        .as_str()
    {
        "" => {
            let address = free_address(api, &others).ok_or_else(|| {
                refuse(FieldError::invalid(
                    "spec.clusterIPs",
                    "",
                    "failed to allocate a cluster IP: the range is full",
                ))
            })?;
            spec["clusterIP"] = address.to_string().into();
        }
        "None" => {}
        asked if kept == asked => {}
        asked => check_address(api, &others, asked).map_err(refuse)?,
    }
    spec["clusterIPs"] = json!([spec["clusterIP"]]);
    allocate_node_ports(spec, &others).map_err(refuse)
}

fn others(api: &ApiServer, service: &Value) -> Vec<Value> {
    let same = |other: &Value| {
        other["metadata"]["name"] == service["metadata"]["name"]
            && other["metadata"]["namespace"] == service["metadata"]["namespace"]
    };
    let all = api.storage().list("core/services", None).items;
    all.iter()
        .filter(|(_, s)| !same(&s.value))
        .map(|(_, s)| s.value["spec"].clone())
        .collect()
}

/// An update that leaves out what the server gave means to keep it.
fn keep_allocated(old: &Value, new: &mut Value) {
    if new["type"] == "ExternalName" {
        if let Some(map) = new.as_object_mut() {
            for field in [
                "clusterIP",
                "clusterIPs",
                "ipFamilies",
                "ipFamilyPolicy",
                "internalTrafficPolicy",
            ] {
                if map.get(field) == old.get(field) {
                    map.shift_remove(field);
                }
            }
        }
        return;
    }
    if new["clusterIP"].as_str().unwrap_or_default().is_empty() && old["type"] != "ExternalName" {
        new["clusterIP"] = old["clusterIP"].clone();
    }
    let old_ports = old["ports"].as_array().cloned().unwrap_or_default();
    let wants = has_node_ports(new);
    for port in items_mut(new, "ports") {
        let before = old_ports
            .iter()
            .find(|o| o["port"] == port["port"] && o["protocol"] == port["protocol"]);
        let before = before.map(|o| o["nodePort"].clone()).unwrap_or_default();
        let none = port["nodePort"].as_u64().unwrap_or_default() == 0;
        if wants && none && !before.is_null() {
            port["nodePort"] = before;
        } else if !wants
            && port
                .get("nodePort")
                .is_some_and(|p| *p == before || *p == json!(0))
            && let Some(map) = port.as_object_mut()
        {
            map.shift_remove("nodePort");
        }
    }
    if !wants
        && old.get("externalTrafficPolicy") == new.get("externalTrafficPolicy")
        && new["type"] == "ClusterIP"
        && let Some(map) = new.as_object_mut()
    {
        map.shift_remove("externalTrafficPolicy");
        map.shift_remove("allocateLoadBalancerNodePorts");
    }
}

fn free_address(api: &ApiServer, others: &[Value]) -> Option<Ipv4Addr> {
    let used: HashSet<&str> = others
        .iter()
        .filter_map(|s| s["clusterIP"].as_str())
        .collect();
    let (first, last) = api.service_range();
    (first + RESERVED..last)
        .chain(first..first + RESERVED)
        .map(Ipv4Addr::from)
        .find(|a| !used.contains(a.to_string().as_str()))
}

fn check_address(api: &ApiServer, others: &[Value], asked: &str) -> Result<(), FieldError> {
    let (first, last) = api.service_range();
    let field = "spec.clusterIPs";
    let shown = json!([asked]);
    match asked.parse::<Ipv4Addr>() {
        Err(_) => Err(FieldError::invalid(
            field,
            shown,
            "must be a valid IP address",
        )),
        Ok(address) if !(first..last).contains(&u32::from(address)) => {
            let detail = format!(
                "failed to allocate IP {asked}: the provided IP ({asked}) is not in the valid range. The range of valid IPs is {}",
                api.service_network()
            );
            Err(FieldError::invalid(field, shown, &detail))
        }
        Ok(_) if others.iter().any(|s| s["clusterIP"] == asked) => {
            let detail = format!("failed to allocate IP {asked}: provided IP is already allocated");
            Err(FieldError::invalid(field, shown, &detail))
        }
        Ok(_) => Ok(()),
    }
}

fn allocate_node_ports(spec: &mut Value, others: &[Value]) -> Result<(), FieldError> {
    if !has_node_ports(spec) {
        return Ok(());
    }
    let ports_of = |spec: &Value| -> Vec<u64> {
        spec["ports"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|p| p["nodePort"].as_u64())
            .collect()
    };
    let mut used: HashSet<u64> = others.iter().flat_map(ports_of).collect();
    for (index, port) in items_mut(spec, "ports").enumerate() {
        let field = format!("spec.ports[{index}].nodePort");
        match port["nodePort"].as_u64().unwrap_or_default() {
            0 => {
                let start = port["port"].as_u64().unwrap_or_default() % 2768;
                let mut candidates = NODE_PORTS.cycle_from(start);
                let free = candidates.find(|p| !used.contains(p));
                let free =
                    free.ok_or_else(|| FieldError::invalid(field, 0, "no node port is free"))?;
                port["nodePort"] = free.into();
                used.insert(free);
            }
            asked if !NODE_PORTS.contains(&asked) => {
                let detail = "provided port is not in the valid range. The range of valid ports is 30000-32767";
                return Err(FieldError::invalid(field, asked, detail));
            }
            asked if !used.insert(asked) => {
                return Err(FieldError::invalid(
                    field,
                    asked,
                    "provided port is already allocated",
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

trait CycleFrom {
    fn cycle_from(&self, start: u64) -> impl Iterator<Item = u64>;
}

impl CycleFrom for std::ops::RangeInclusive<u64> {
    fn cycle_from(&self, start: u64) -> impl Iterator<Item = u64> {
        let (first, last) = (*self.start(), *self.end());
        (first + start..=last).chain(first..first + start)
    }
}

/// Ports and names, what each type needs, what can't change.
pub fn validate(service: &Value, old: Option<&Value>, errors: &mut Vec<FieldError>) {
    let spec = &service["spec"];
    let ports = spec["ports"].as_array().cloned().unwrap_or_default();
    let external = spec["type"] == "ExternalName";
    if external && spec["externalName"].as_str().unwrap_or_default().is_empty() {
        errors.push(FieldError::required("spec.externalName", ""));
    }
    if ports.is_empty() && !external && spec["clusterIP"] != "None" {
        errors.push(FieldError::required("spec.ports", ""));
    }
    for (index, port) in ports.iter().enumerate() {
        validate_port(&ports, index, port, errors);
    }
    if let Some(old) = old {
        let (before, after) = (&old["spec"]["clusterIP"], &spec["clusterIP"]);
        if !external
            && old["spec"]["type"] != "ExternalName"
            && before.is_string()
            && before != after
        {
            errors.push(FieldError::invalid(
                "spec.clusterIPs[0]",
                json!([after]),
                "may not change once set",
            ));
        }
    }
}

fn validate_port(ports: &[Value], index: usize, port: &Value, errors: &mut Vec<FieldError>) {
    let at = |field: &str| format!("spec.ports[{index}].{field}");
    if !port["port"]
        .as_i64()
        .is_some_and(|p| (1..=65535).contains(&p))
    {
        errors.push(FieldError::invalid(
            at("port"),
            port["port"].clone(),
            "must be between 1 and 65535, inclusive",
        ));
    }
    let target = &port["targetPort"];
    if target.is_number() && !target.as_i64().is_some_and(|p| (1..=65535).contains(&p)) {
        errors.push(FieldError::invalid(
            at("targetPort"),
            target.clone(),
            "must be between 1 and 65535, inclusive",
        ));
    }
    let name = port["name"].as_str().unwrap_or_default();
    if ports.len() > 1 && name.is_empty() {
        errors.push(FieldError::required(at("name"), ""));
    }
    errors.extend(if name.is_empty() {
        None
    } else {
        crate::names::label_error(&at("name"), name)
    });
    let earlier = &ports[..index];
    if !name.is_empty() && earlier.iter().any(|p| p["name"] == name) {
        errors.push(FieldError::make(
            at("name"),
            FieldErrorKind::Duplicate,
            name.into(),
            "",
        ));
    }
    if earlier
        .iter()
        .any(|p| p["port"] == port["port"] && p["protocol"] == port["protocol"])
    {
        let shown = json!({ "port": port["port"], "protocol": port["protocol"] });
        errors.push(FieldError::make(
            format!("spec.ports[{index}]"),
            FieldErrorKind::Duplicate,
            shown,
            "",
        ));
    }
}
