//! exportTo: which namespaces see an object.

use std::collections::BTreeSet;

/// The namespaces that see an object.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Visibility {
    /// All of them.
    #[default]
    All,
    /// These.
    Namespaces(BTreeSet<String>),
}

impl Visibility {
    /// Reads an exportTo list of an object in `namespace`; an empty one takes `default` (which is read in the same way), and where that is empty
    /// too the object is seen everywhere. `.` is the object's own namespace, `*` all, `~` none.
    pub fn parse<'a>(
        list: impl IntoIterator<Item = &'a str>,
        default: &[String],
        namespace: &str,
    ) -> Self {
        let list: Vec<&str> = list
            .into_iter()
            .map(str::trim)
            .filter(|entry| !entry.is_empty())
            .collect();
        let list = if list.is_empty() {
            default.iter().map(String::as_str).collect()
        } else {
            list
        };
        if list.is_empty() || list.contains(&"*") {
            return Self::All;
        }
        let named = list
            .into_iter()
            .filter(|entry| *entry != "~")
            .map(|entry| if entry == "." { namespace } else { entry });
        Self::Namespaces(named.map(str::to_owned).collect())
    }

    /// True if a client in `namespace` sees the object.
    pub fn includes(&self, namespace: &str) -> bool {
        match self {
            Self::All => true,
            Self::Namespaces(names) => names.contains(namespace),
        }
    }

    /// True if nobody but `namespace` sees the object.
    pub(crate) fn is_only(&self, namespace: &str) -> bool {
        match self {
            Self::All => false,
            Self::Namespaces(names) => names.iter().all(|name| name == namespace),
        }
    }

    /// True if everyone who sees an object of visibility `other` sees this one too.
    pub(crate) fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::All, _) => true,
            (Self::Namespaces(_), Self::All) => false,
            (Self::Namespaces(own), Self::Namespaces(other)) => own.is_superset(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_all_forms() {
        let all = ["*".to_owned()];
        let parse = |list: &[&str], default: &[String]| {
            Visibility::parse(list.iter().copied(), default, "own")
        };
        assert_eq!(parse(&[], &[]), Visibility::All);
        assert_eq!(
            parse(&[], &[".".to_owned()]),
            Visibility::Namespaces(["own".to_owned()].into())
        );
        assert_eq!(
            parse(&["."], &all),
            Visibility::Namespaces(["own".to_owned()].into())
        );
        assert!(parse(&["a", "b"], &all).includes("a"));
        assert!(!parse(&["a", "b"], &all).includes("own"));
        assert!(!parse(&["~"], &all).includes("own"));
    }
}
