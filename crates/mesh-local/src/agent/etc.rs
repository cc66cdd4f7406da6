//! The files of a container's /etc. Pure.

use std::net::Ipv4Addr;

use k8s_openapi::api::core::v1::Pod;

/// The cluster's DNS server.
const DNS: &str = "10.96.0.10";
/// The cluster's domain.
const DOMAIN: &str = "cluster.local";

/// The pod's host name: `spec.hostname`, else its name, at most 63 characters; the node's in the node's network.
pub fn hostname(pod: &Pod) -> String {
    if pod.spec.as_ref().and_then(|s| s.host_network) == Some(true) {
        return super::NODE_NAME.to_owned();
    }
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

/// The name below the Service that `spec.subdomain` names (Kubernetes, "Pod's hostname and subdomain fields").
fn full_name(pod: &Pod) -> Option<String> {
    let subdomain = pod.spec.as_ref()?.subdomain.as_deref()?;
    let subdomain = Some(subdomain).filter(|s| !s.is_empty())?;
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    Some(format!(
        "{}.{subdomain}.{namespace}.svc.{DOMAIN}",
        hostname(pod)
    ))
}

/// The name that the kernel tells the pod's programs: with `setHostnameAsFQDN` the full one, where there is one.
pub fn kernel_hostname(pod: &Pod) -> String {
    let full = pod.spec.as_ref().and_then(|s| s.set_hostname_as_fqdn) == Some(true);
    let full = full.then(|| full_name(pod)).flatten();
    // What the kernel has room for.
    full.filter(|name| name.len() <= 64)
        .unwrap_or_else(|| hostname(pod))
}

/// `dnsPolicy` and `dnsConfig`: the cluster's names and server, or nothing, and what the pod adds.
fn resolv_conf(pod: &Pod) -> String {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let spec = pod.spec.as_ref();
    let mut servers = vec![DNS.to_owned()];
    let mut searches: Vec<String> = [
        format!("{namespace}.svc.{DOMAIN}"),
        format!("svc.{DOMAIN}"),
        DOMAIN.to_owned(),
    ]
    .into();
    let mut options = vec![("ndots".to_owned(), Some("5".to_owned()))];
    if spec.and_then(|s| s.dns_policy.as_deref()) == Some("None") {
        (servers, searches, options) = Default::default();
    }
    if let Some(config) = spec.and_then(|s| s.dns_config.as_ref()) {
        let add = |list: &mut Vec<String>, more: &Option<Vec<String>>| {
            for one in more.iter().flatten() {
                if !list.contains(one) {
                    list.push(one.clone());
                }
            }
        };
        add(&mut servers, &config.nameservers);
        add(&mut searches, &config.searches);
        for option in config.options.iter().flatten() {
            let name = option.name.clone().unwrap_or_default();
            options.retain(|(known, _)| *known != name);
            options.push((name, option.value.clone()));
        }
    }
    let mut text = String::new();
    if !searches.is_empty() {
        text.push_str(&format!("search {}\n", searches.join(" ")));
    }
    for server in servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    let options: Vec<String> = options
        .into_iter()
        .map(|(name, value)| value.map_or(name.clone(), |value| format!("{name}:{value}")))
        .collect();
    if !options.is_empty() {
        text.push_str(&format!("options {}\n", options.join(" ")));
    }
    text
}

/// Name and content.
pub fn files(pod: &Pod, ip: Ipv4Addr, uid: u32, gid: u32) -> Vec<(String, String)> {
    let host = hostname(pod);
    let names = full_name(pod).map_or(host.clone(), |full| format!("{full}\t{host}"));
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
        format!("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n{ip}\t{names}\n");
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
    [
        ("passwd", passwd),
        ("group", group),
        ("hosts", hosts),
        ("hostname", format!("{host}\n")),
        ("resolv.conf", resolv_conf(pod)),
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
        assert!(files["resolv.conf"].ends_with("options ndots:5\n"));
        assert!(
            files["passwd"].contains("istio-proxy:x:1337")
                && files["passwd"].contains("app:x:1000:1000")
        );
    }

    fn pod(spec: serde_json::Value) -> Pod {
        let pod = json!({"metadata": {"name": "db-0", "namespace": "shop"}, "spec": spec});
        serde_json::from_value(pod).unwrap()
    }

    #[test]
    fn a_pod_below_a_service_knows_its_full_name() {
        let pod = pod(
            json!({"containers": [], "hostname": "db-0", "subdomain": "db", "setHostnameAsFQDN": true}),
        );
        let files = files(&pod, Ipv4Addr::new(10, 244, 0, 9), 0, 0);
        let hosts = &files.iter().find(|(name, _)| name == "hosts").unwrap().1;
        assert!(
            hosts.ends_with("10.244.0.9\tdb-0.db.shop.svc.cluster.local\tdb-0\n"),
            "{hosts}"
        );
        assert_eq!(kernel_hostname(&pod), "db-0.db.shop.svc.cluster.local");
    }

    #[test]
    fn what_the_pod_says_of_dns_is_added_or_all_there_is() {
        let config = json!({"nameservers": ["10.0.0.53"], "searches": ["example.org"],
            "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}]});
        let added = pod(json!({"containers": [], "dnsConfig": config}));
        assert_eq!(
            resolv_conf(&added),
            "search shop.svc.cluster.local svc.cluster.local cluster.local example.org\n\
             nameserver 10.96.0.10\nnameserver 10.0.0.53\noptions ndots:2 edns0\n"
        );
        let alone = pod(json!({"containers": [], "dnsPolicy": "None", "dnsConfig": config}));
        assert_eq!(
            resolv_conf(&alone),
            "search example.org\nnameserver 10.0.0.53\noptions ndots:2 edns0\n"
        );
    }
}
