//! Host names of rules: short names, wildcards, and which of two names covers the other.

/// Makes a short name absolute: `reviews` in namespace `default` is `reviews.default.svc.<domain>`. Names with a dot and wildcards stay, as
/// Istio does (VirtualService reference: only names without dots are short). Lower case, since host names have none.
pub fn absolute(host: &str, namespace: &str, domain: &str) -> String {
    let host = host.to_ascii_lowercase();
    if host.is_empty() || host.contains('.') || host.contains('*') {
        host
    } else {
        service_fqdn(&host, namespace, domain)
    }
}

/// The full name of a Kubernetes service.
pub fn service_fqdn(name: &str, namespace: &str, domain: &str) -> String {
    format!("{name}.{namespace}.svc.{domain}")
}

/// True for `*` and names whose first label is `*`.
pub fn is_wildcard(host: &str) -> bool {
    host.starts_with('*')
}

/// True for names with no wildcard but a whole first label, and without characters that no name has.
pub fn is_valid(host: &str) -> bool {
    let rest = if host == "*" {
        "x"
    } else {
        host.strip_prefix("*.").unwrap_or(host)
    };
    !rest.is_empty()
        && rest.len() <= 255
        && rest
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b".-_:[]".contains(&byte))
}

/// True if every name that `specific` stands for is also one of `general`.
pub fn covers(general: &str, specific: &str) -> bool {
    match general.strip_prefix('*') {
        None => general == specific,
        Some(suffix) => {
            specific
                .strip_prefix('*')
                .unwrap_or(specific)
                .ends_with(suffix)
                && specific.len() >= general.len()
        }
    }
}

/// The names that two hosts have in common: the more specific of them, or nothing.
pub fn intersection<'a>(a: &'a str, b: &'a str) -> Option<&'a str> {
    if covers(a, b) {
        Some(b)
    } else if covers(b, a) {
        Some(a)
    } else {
        None
    }
}

/// Order in which hosts are tried: exact names first, then longer wildcards before shorter ones, then by name.
pub fn specificity(host: &str) -> (bool, std::cmp::Reverse<usize>, &str) {
    (is_wildcard(host), std::cmp::Reverse(host.len()), host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_become_absolute() {
        for (host, expected) in [
            ("reviews", "reviews.default.svc.cluster.local"),
            ("Reviews", "reviews.default.svc.cluster.local"),
            ("reviews.prod", "reviews.prod"),
            ("bookinfo.com", "bookinfo.com"),
            ("*", "*"),
            ("*.bookinfo.com", "*.bookinfo.com"),
            ("", ""),
        ] {
            assert_eq!(
                absolute(host, "default", "cluster.local"),
                expected,
                "{host}"
            );
        }
    }

    #[test]
    fn wildcards_cover_names_and_narrower_wildcards() {
        for (general, specific, expected) in [
            ("*", "a.b", true),
            ("*", "*", true),
            ("*.b", "a.b", true),
            ("*.b", "b", false),
            ("*.b", "*.a.b", true),
            ("*.a.b", "*.b", false),
            ("a.b", "a.b", true),
            ("a.b", "*.b", false),
            ("*.b", "a.c", false),
        ] {
            assert_eq!(
                covers(general, specific),
                expected,
                "{general} covers {specific}"
            );
        }
        assert_eq!(intersection("*.b", "a.b"), Some("a.b"));
        assert_eq!(intersection("a.b", "*"), Some("a.b"));
        assert_eq!(intersection("a.b", "a.c"), None);
    }

    #[test]
    fn wildcards_are_whole_first_labels() {
        for (host, expected) in [
            ("*", true),
            ("*.b", true),
            ("a.b", true),
            ("a*b", false),
            ("*.*", false),
            ("", false),
            ("*.", false),
            ("a b", false),
        ] {
            assert_eq!(is_valid(host), expected, "{host}");
        }
    }

    #[test]
    fn exact_names_come_before_wildcards() {
        let mut hosts = ["*", "b.c", "*.c", "*.b.c", "a.c"];
        hosts.sort_by_key(|host| specificity(host));
        assert_eq!(hosts, ["a.c", "b.c", "*.b.c", "*.c", "*"]);
    }
}
