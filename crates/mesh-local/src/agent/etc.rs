//! The files of a container's /etc. Pure.

use std::net::Ipv4Addr;

use k8s_openapi::api::core::v1::Pod;

/// The cluster's DNS server.
const DNS: &str = "10.96.0.10";
/// The cluster's domain.
const DOMAIN: &str = "cluster.local";

/// The pod's host name: `spec.hostname`, else its name, at most 63 characters.
pub fn hostname(pod: &Pod) -> String {
    let given = pod
        .spec
        .as_ref()
        .and_then(|s| s.hostname.clone())
        .or_else(|| pod.metadata.name.clone());
    given
        .unwrap_or_default()
        .chars()
        .take(63)
        .collect::<String>()
        .trim_end_matches(['-', '.'])
        .to_owned()
}

/// Name and content.
pub fn files(pod: &Pod, ip: Ipv4Addr, uid: u32, gid: u32) -> Vec<(String, String)> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let host = hostname(pod);
    let mut passwd =
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\nistio-proxy:x:1337:1337:istio-proxy:/:/bin/sh\n".to_owned();
    let mut group = "root:x:0:\nnogroup:x:65534:\nistio-proxy:x:1337:\n".to_owned();
    if ![0, 1337, 65534].contains(&uid) {
        passwd.push_str(&format!("app:x:{uid}:{gid}:app:/:/bin/sh\n"));
    }
    if ![0, 1337, 65534].contains(&gid) {
        group.push_str(&format!("app:x:{gid}:\n"));
    }
    let mut hosts =
        format!("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n{ip}\t{host}\n");
    for alias in pod
        .spec
        .iter()
        .flat_map(|s| s.host_aliases.iter().flatten())
    {
        hosts.push_str(&format!(
            "{}\t{}\n",
            alias.ip,
            alias.hostnames.as_deref().unwrap_or_default().join("\t")
        ));
    }
    let resolv = format!(
        "search {namespace}.svc.{DOMAIN} svc.{DOMAIN} {DOMAIN}\nnameserver {DNS}\noptions ndots:5\n"
    );
    [
        ("passwd", passwd),
        ("group", group),
        ("hosts", hosts),
        ("hostname", format!("{host}\n")),
        ("resolv.conf", resolv),
        (
            "nsswitch.conf",
            "passwd: files\ngroup: files\nhosts: files dns\n".to_owned(),
        ),
    ]
    .map(|(name, content)| (name.to_owned(), content))
    .into()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_and_search_path() {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "web-1", "namespace": "shop"},
            "spec": {"containers": [], "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["a", "b"]}]}}))
        .unwrap();
        let files: std::collections::BTreeMap<_, _> =
            files(&pod, Ipv4Addr::new(10, 244, 0, 9), 1000, 1000)
                .into_iter()
                .collect();
        assert!(files["resolv.conf"].starts_with(
            "search shop.svc.cluster.local svc.cluster.local cluster.local\nnameserver 10.96.0.10\n"
        ));
        assert!(files["hosts"].ends_with("10.244.0.9\tweb-1\n10.0.0.1\ta\tb\n"));
        assert!(
            files["passwd"].contains("istio-proxy:x:1337")
                && files["passwd"].contains("app:x:1000:1000")
        );
    }
}
