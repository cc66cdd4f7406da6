//! The init container that sets the capture rules.

use serde_json::{Value, json};

use super::{HEALTH_PORT, METRICS_PORT};
use crate::annotations::Settings;
use crate::{INIT_CONTAINER, InjectContext};

/// Settings of the proxy that the capture tool reads from the environment.
const VARIABLES: &[&str] = &[
    "INVALID_DROP",
    "ISTIO_DUAL_STACK",
    "ISTIO_META_DNS_CAPTURE",
    "ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR",
    "ISTIO_OUTBOUND_OWNER_GROUPS",
    "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE",
];

/// Makes the container; `user` is who the proxy runs as.
pub(super) fn container(settings: &Settings<'_>, context: &InjectContext<'_>, user: i64) -> Value {
    let config = context.config;
    let capabilities = match config.privileged {
        true => json!({ "add": ["NET_ADMIN", "NET_RAW"] }),
        false => json!({ "add": ["NET_ADMIN", "NET_RAW"], "drop": ["ALL"] }),
    };
    let mut init = json!({
        "name": INIT_CONTAINER,
        "image": settings.image,
        "args": args(settings, context, user),
        "resources": config.init_resources.as_ref().unwrap_or(&settings.resources),
        "securityContext": {
            "allowPrivilegeEscalation": config.privileged,
            "capabilities": capabilities,
            "privileged": config.privileged,
            // Its rules go to the kernel by netlink: there is nothing to write.
            "readOnlyRootFilesystem": true,
            "runAsGroup": 0,
            "runAsNonRoot": false,
            "runAsUser": 0,
        },
    });
    let metadata = settings.proxy.proxy_metadata.iter();
    let env: Vec<Value> = metadata
        .filter(|(name, _)| VARIABLES.contains(&name.as_str()))
        .map(|(name, value)| json!({ "name": name, "value": value }))
        .collect();
    if !env.is_empty() {
        init["env"] = env.into();
    }
    super::common(&mut init, context);
    init
}

fn args(settings: &Settings<'_>, context: &InjectContext<'_>, user: i64) -> Vec<String> {
    let capture = &settings.capture;
    let mut excluded = vec![METRICS_PORT.to_string(), HEALTH_PORT.to_string()];
    if settings.proxy.status_port != 0 {
        excluded.push(settings.proxy.status_port.to_string());
    }
    excluded.extend(Some(capture.exclude_inbound_ports.clone()).filter(|ports| !ports.is_empty()));
    let mut args = vec!["istio-iptables".to_owned()];
    let mut flag = |flag: &str, value: &str| args.extend([flag.to_owned(), value.to_owned()]);
    flag("-p", &context.mesh.proxy_listen_port.to_string());
    flag("-z", &context.mesh.proxy_inbound_listen_port.to_string());
    flag("-u", &user.to_string());
    flag("-m", super::mode_name(settings.interception));
    flag("-i", &capture.include_ranges);
    flag("-x", &capture.exclude_ranges);
    flag("-b", &capture.include_inbound_ports);
    flag("-d", &excluded.join(","));
    for (name, value) in [
        ("-q", &capture.include_outbound_ports),
        ("-o", &capture.exclude_outbound_ports),
        ("-k", &settings.reroute_interfaces),
        ("-c", &settings.exclude_interfaces),
    ] {
        if !value.is_empty() {
            flag(name, value);
        }
    }
    args.push(format!("--log_output_level={}", settings.agent_log_level));
    args
}
