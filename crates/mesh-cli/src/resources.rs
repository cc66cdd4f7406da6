//! What kinds the cluster has, and what people call them.

use anyhow::Context as _;
use futures::future::try_join_all;
use serde::Deserialize;

use crate::cluster::Cluster;

/// A kind that the cluster serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Resource {
    /// Group; empty is the core group.
    pub(crate) group: String,
    /// Version.
    pub(crate) version: String,
    /// Kind.
    pub(crate) kind: String,
    /// Name in URLs.
    pub(crate) plural: String,
    singular: String,
    short_names: Vec<String>,
    categories: Vec<String>,
    /// True if its objects belong to namespaces.
    pub(crate) namespaced: bool,
}

impl Resource {
    /// Path of all objects of the kind; without a namespace, of all namespaces.
    pub(crate) fn path(&self, namespace: Option<&str>) -> String {
        let root = if self.group.is_empty() {
            format!("/api/{}", self.version)
        } else {
            format!("/apis/{}/{}", self.group, self.version)
        };
        match namespace {
            Some(namespace) if self.namespaced => {
                format!("{root}/namespaces/{namespace}/{}", self.plural)
            }
            _ => format!("{root}/{}", self.plural),
        }
    }

    /// Path of one object.
    pub(crate) fn object(&self, namespace: &str, name: &str) -> String {
        format!("{}/{name}", self.path(Some(namespace)))
    }

    /// An object as kubectl names it, `deployment.apps/x`.
    pub(crate) fn label(&self, name: &str) -> String {
        let singular = self.kind.to_ascii_lowercase();
        if self.group.is_empty() {
            format!("{singular}/{name}")
        } else {
            format!("{singular}.{}/{name}", self.group)
        }
    }

    /// The kind as kubectl names it, `deployment.apps`.
    pub(crate) fn singular_label(&self) -> String {
        let singular = self.kind.to_ascii_lowercase();
        if self.group.is_empty() {
            singular
        } else {
            format!("{singular}.{}", self.group)
        }
    }

    fn is_called(&self, name: &str) -> bool {
        let lower = name.to_ascii_lowercase();
        let (word, group) = lower
            .split_once('.')
            .map_or((lower.as_str(), None), |(word, group)| (word, Some(group)));
        let named = self.plural == word
            || self.singular == word
            || self.kind.eq_ignore_ascii_case(word)
            || self.short_names.iter().any(|short| short == word);
        // `virtualservices.networking.istio.io` or `virtualservices.v1.networking.istio.io`.
        named
            && group.is_none_or(|group| {
                group == self.group
                    || group.strip_prefix(&format!("{}.", self.version)) == Some(&self.group)
            })
    }
}

#[derive(Deserialize)]
struct Groups {
    groups: Vec<Group>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Group {
    name: String,
    versions: Vec<GroupVersion>,
    preferred_version: Option<GroupVersion>,
}

#[derive(Deserialize)]
struct GroupVersion {
    version: String,
}

#[derive(Deserialize)]
struct ResourceList {
    resources: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    name: String,
    #[serde(default)]
    singular_name: String,
    namespaced: bool,
    kind: String,
    #[serde(default)]
    short_names: Vec<String>,
    #[serde(default)]
    categories: Vec<String>,
}

/// All kinds of a cluster.
pub(crate) struct Resources {
    /// Preferred versions first within a group; the core group first of all.
    list: Vec<Resource>,
}

impl Resources {
    /// Asks the cluster for its kinds.
    pub(crate) async fn discover(cluster: &Cluster) -> anyhow::Result<Self> {
        let groups: Groups = serde_json::from_value(cluster.read("/apis").await?)
            .context("reading the list of API groups")?;
        let mut versions = vec![(String::new(), "v1".to_owned())];
        for mut group in groups.groups {
            if let Some(preferred) = &group.preferred_version {
                group
                    .versions
                    .sort_by_key(|entry| entry.version != preferred.version);
            }
            versions.extend(
                group
                    .versions
                    .into_iter()
                    .map(|entry| (group.name.clone(), entry.version)),
            );
        }
        let lists = try_join_all(
            versions
                .iter()
                .map(|(group, version)| one(cluster, group, version)),
        )
        .await?;
        Ok(Self {
            list: lists.into_iter().flatten().collect(),
        })
    }

    /// Kinds by what a person calls them: a name, a short name, a category, or a list of these.
    pub(crate) fn named(&self, names: &str) -> anyhow::Result<Vec<&Resource>> {
        let mut found: Vec<&Resource> = Vec::new();
        for name in names.split(',').filter(|name| !name.is_empty()) {
            let before = found.len();
            if let Some(resource) = self.list.iter().find(|resource| resource.is_called(name)) {
                found.push(resource);
            } else {
                for resource in self
                    .list
                    .iter()
                    .filter(|resource| resource.categories.iter().any(|category| category == name))
                {
                    // One version per kind.
                    if !found.iter().any(|other| {
                        other.group == resource.group && other.plural == resource.plural
                    }) {
                        found.push(resource);
                    }
                }
            }
            if found.len() == before {
                anyhow::bail!(
                    "the server has no resource type {name:?}; `mesh get crd` lists the types that were added to it"
                );
            }
        }
        Ok(found)
    }

    /// The kind of a manifest.
    pub(crate) fn of(&self, api_version: &str, kind: &str) -> Option<&Resource> {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        self.list.iter().find(|resource| {
            resource.group == group && resource.version == version && resource.kind == kind
        })
    }
}

async fn one(cluster: &Cluster, group: &str, version: &str) -> anyhow::Result<Vec<Resource>> {
    let path = if group.is_empty() {
        format!("/api/{version}")
    } else {
        format!("/apis/{group}/{version}")
    };
    let listed = match cluster.read(&path).await {
        // A group whose own server is away (metrics, say) is in nobody's way who does not need it.
        Err(error) if !group.is_empty() => {
            eprintln!("warning: the kinds of {group}/{version} can't be listed: {error:#}");
            return Ok(Vec::new());
        }
        listed => listed?,
    };
    let list: ResourceList = serde_json::from_value(listed)
        .with_context(|| format!("reading the list of kinds of {path}"))?;
    let resource = |entry: Entry| Resource {
        group: group.to_owned(),
        version: version.to_owned(),
        kind: entry.kind,
        plural: entry.name,
        singular: entry.singular_name,
        short_names: entry.short_names,
        categories: entry.categories,
        namespaced: entry.namespaced,
    };
    Ok(list
        .resources
        .into_iter()
        .filter(|entry| !entry.name.contains('/'))
        .map(resource)
        .collect())
}

/// Splits `TYPE NAME...` or `TYPE/NAME...` into types with names.
pub(crate) fn targets(arguments: &[String]) -> anyhow::Result<Vec<(String, Vec<String>)>> {
    let Some(first) = arguments.first() else {
        anyhow::bail!(
            "a resource type is missing, for instance `pods` or `virtualservice/reviews`"
        );
    };
    if !first.contains('/') {
        return Ok(vec![(first.clone(), arguments[1..].to_vec())]);
    }
    arguments
        .iter()
        .map(|argument| match argument.split_once('/') {
            Some((kind, name)) if !kind.is_empty() && !name.is_empty() => {
                Ok((kind.to_owned(), vec![name.to_owned()]))
            }
            _ => anyhow::bail!(
                "{argument:?} is not TYPE/NAME; all arguments have to be once the first one is"
            ),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resource() -> Resource {
        Resource {
            group: "networking.istio.io".into(),
            version: "v1".into(),
            kind: "VirtualService".into(),
            plural: "virtualservices".into(),
            singular: "virtualservice".into(),
            short_names: vec!["vs".into()],
            categories: vec!["istio-io".into()],
            namespaced: true,
        }
    }

    #[test]
    fn names_that_kubectl_takes() {
        for name in [
            "vs",
            "virtualservice",
            "VirtualServices",
            "virtualservices.networking.istio.io",
            "vs.v1.networking.istio.io",
        ] {
            assert!(resource().is_called(name), "{name}");
        }
        for name in [
            "v",
            "virtualservices.istio.io",
            "vs.v1beta1.networking.istio.io",
            "virtualservices.networking",
        ] {
            assert!(!resource().is_called(name), "{name}");
        }
    }

    #[test]
    fn paths_and_labels() {
        assert_eq!(
            resource().object("a", "b"),
            "/apis/networking.istio.io/v1/namespaces/a/virtualservices/b"
        );
        assert_eq!(
            resource().path(None),
            "/apis/networking.istio.io/v1/virtualservices"
        );
        assert_eq!(
            resource().label("b"),
            "virtualservice.networking.istio.io/b"
        );
    }

    #[test]
    fn targets_of_both_forms() {
        let text = |items: &[&str]| {
            items
                .iter()
                .map(|item| (*item).to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            targets(&text(&["pods", "a", "b"])).expect("type first"),
            [("pods".to_owned(), text(&["a", "b"]))]
        );
        assert_eq!(targets(&text(&["pod/a", "svc/b"])).expect("pairs").len(), 2);
        assert!(targets(&text(&["pod/a", "b"])).is_err());
        assert!(targets(&[]).is_err());
    }
}
