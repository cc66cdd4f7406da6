//! Who is waited for while the root changes. What proxies say of themselves is only taken from pods that exist and were found to be the ones
//! that speak, so that nobody can speak for another; who can't be told is waited for, and never counts for a pod.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use kube::Api;
use kube::api::ListParams;
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use mesh_identity::spiffe::SpiffeId;
use serde_json::Value;

use super::Phase;
use crate::Options;
use crate::ca::Held;
use crate::ca::secret::SecretError;

/// Injection and gateways label pods with it, so the server can leave out the others.
const MESHED: &str = "service.istio.io/canonical-name";
/// Injection leaves it on pods with a proxy.
const STATUS: &str = "sidecar.istio.io/status";
/// Characters of a pod's uid that tell it from others.
const MARK: usize = 12;

/// A pod as the cluster has it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pod {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) account: String,
    pub(crate) addresses: Vec<IpAddr>,
    /// It runs, and has a proxy with an identity.
    pub(crate) meshed: bool,
}

impl Pod {
    fn read(object: &DynamicObject) -> Self {
        let metadata = &object.metadata;
        let (spec, status) = (&object.data["spec"], &object.data["status"]);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let listed = status["podIPs"].as_array().into_iter().flatten();
        let addresses = listed
            .map(|address| &address["ip"])
            .chain([&status["podIP"]])
            .filter_map(|address| address.as_str()?.parse().ok())
            .collect();
        let annotated = metadata.annotations.as_ref();
        Self {
            namespace: metadata.namespace.clone().unwrap_or_default(),
            name: metadata.name.clone().unwrap_or_default(),
            uid: metadata.uid.clone().unwrap_or_default(),
            account: match text(&spec["serviceAccountName"]) {
                empty if empty.is_empty() => "default".to_owned(),
                account => account,
            },
            addresses,
            meshed: status["phase"] == "Running"
                && metadata.deletion_timestamp.is_none()
                && annotated.is_some_and(|all| all.contains_key(STATUS)),
        }
    }

    /// What tells it from others, short enough that a report has room for thousands.
    pub(crate) fn mark(&self) -> String {
        match self.uid.is_empty() {
            true => self.shown(),
            false => self.uid.chars().filter(|c| *c != '-').take(MARK).collect(),
        }
    }

    /// `name.namespace`.
    pub(crate) fn shown(&self) -> String {
        format!("{}.{}", self.name, self.namespace)
    }

    /// Whether this pod is who speaks: by the token that is bound to it, or by a certificate of its account from its own address.
    fn speaks(&self, said: &Said) -> bool {
        let runs_as = self.namespace == said.identity.namespace
            && self.account == said.identity.service_account;
        let itself = match &said.bound {
            Some((name, uid)) => {
                *name == self.name && (uid.is_empty() || self.uid.is_empty() || *uid == self.uid)
            }
            None => {
                self.name == said.claims
                    && said
                        .address
                        .is_some_and(|peer| self.addresses.contains(&peer))
            }
        };
        runs_as && itself
    }
}

/// Pods that may have a proxy.
pub(crate) async fn pods(options: &Options) -> Result<Vec<Pod>, SecretError> {
    let gvk = GroupVersionKind::gvk("", "v1", "Pod");
    let resource = ApiResource::from_gvk_with_plural(&gvk, "pods");
    let api: Api<DynamicObject> = Api::all_with(options.client.clone(), &resource);
    let list = api.list(&ListParams::default().labels(MESHED)).await?;
    Ok(list.items.iter().map(Pod::read).collect())
}

/// What a proxy says on an authenticated stream.
#[derive(Debug, Clone)]
pub(crate) struct Said {
    pub(crate) identity: SpiffeId,
    /// Name of the pod that it says it is.
    pub(crate) claims: String,
    /// Name and uid of the pod that its token is bound to.
    pub(crate) bound: Option<(String, String)>,
    /// Where it calls from.
    pub(crate) address: Option<IpAddr>,
    /// It says that it is so far.
    pub(crate) done: bool,
}

/// What was made of what all said.
#[derive(Debug, Default)]
pub(crate) struct Judged {
    /// Pods that spoke, by their marks: the name, and whether they are so far.
    pub(crate) pods: BTreeMap<String, (String, bool)>,
    /// Who is none of the pods, and is not so far.
    pub(crate) strangers: BTreeSet<String>,
}

impl Judged {
    /// Names of those who are not so far.
    pub(crate) fn waiting(&self) -> BTreeSet<String> {
        let pods = self.pods.values().filter(|(_, done)| !done);
        let names = pods.map(|(name, _)| name.clone());
        names.chain(self.strangers.iter().cloned()).collect()
    }
}

/// Takes what all said, the oldest first: a proxy that connected anew may still stand there with its stream of before.
pub(crate) fn judge(pods: &[Pod], all: &[Said]) -> Judged {
    let mut by_name: BTreeMap<(&str, &str), &Pod> = BTreeMap::new();
    for pod in pods {
        by_name.insert((&pod.namespace, &pod.name), pod);
    }
    let mut judged = Judged::default();
    for said in all {
        let name = said.bound.as_ref().map_or(&said.claims, |(name, _)| name);
        let pod = by_name.get(&(said.identity.namespace.as_str(), name.as_str()));
        match pod.filter(|pod| pod.speaks(said)) {
            Some(pod) => {
                judged.pods.insert(pod.mark(), (pod.shown(), said.done));
            }
            // Named by its identity: the name that it gives itself could be a new one each time.
            None if !said.done => {
                let stranger = format!("{} (not known as a pod)", said.identity);
                judged.strangers.insert(stranger);
            }
            None => {}
        }
    }
    judged
}

/// What a node says of itself, against what it should be.
pub(crate) fn is_done(phase: Phase, said: &Value, held: &Held) -> bool {
    let roots: Vec<&str> = said["roots"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    match phase {
        Phase::Renew => said["root"] == held.root.as_str(),
        _ => held
            .trusted
            .fingerprints()
            .iter()
            .all(|root| roots.contains(&root.as_str())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str) -> Pod {
        Pod {
            namespace: "a".to_owned(),
            name: name.to_owned(),
            uid: format!("{name}-0000-1111-2222"),
            account: "sa".to_owned(),
            addresses: vec![[10, 0, 0, 1].into()],
            meshed: true,
        }
    }

    fn said(account: &str, claims: &str, bound: Option<&str>, done: bool) -> Said {
        let identity = format!("spiffe://cluster.local/ns/a/sa/{account}");
        Said {
            identity: identity.parse().expect("an identity"),
            claims: claims.to_owned(),
            bound: bound.map(|name| (name.to_owned(), format!("{name}-0000-1111-2222"))),
            address: Some([10, 0, 0, 1].into()),
            done,
        }
    }

    #[test]
    fn a_pod_is_who_its_credentials_say_and_nobody_speaks_for_another() {
        let pods = [pod("one"), pod("two")];
        let done = |all: &[Said]| {
            let judged = judge(&pods, all);
            let done = judged.pods.values().filter(|(_, done)| *done);
            let names: Vec<String> = done.map(|(name, _)| name.clone()).collect();
            (names, judged.waiting().into_iter().collect::<Vec<_>>())
        };
        let stranger = |account: &str| {
            vec![format!(
                "spiffe://cluster.local/ns/a/sa/{account} (not known as a pod)"
            )]
        };
        let one = || vec!["one.a".to_owned()];
        // By the token; what the node claims does not matter then.
        assert_eq!(
            done(&[said("sa", "one", Some("one"), true)]),
            (one(), vec![])
        );
        assert_eq!(
            done(&[said("sa", "two", Some("one"), true)]),
            (one(), vec![])
        );
        // By the certificate, from its own address.
        assert_eq!(done(&[said("sa", "one", None, true)]), (one(), vec![]));
        let mut elsewhere = said("sa", "one", None, true);
        elsewhere.address = Some([10, 0, 0, 9].into());
        assert_eq!(done(&[elsewhere.clone()]), (vec![], vec![]));
        elsewhere.done = false;
        assert_eq!(done(&[elsewhere]), (vec![], stranger("sa")));
        // Another account, a pod that is not there, an earlier pod of the name.
        assert_eq!(done(&[said("other", "one", None, true)]), (vec![], vec![]));
        assert_eq!(done(&[said("sa", "three", None, true)]), (vec![], vec![]));
        let mut before = said("sa", "one", Some("one"), true);
        before.bound = Some(("one".to_owned(), "another".to_owned()));
        assert_eq!(done(&[before]), (vec![], vec![]));
        // The newer stream counts, and nobody takes it back for another.
        let renewed = [
            said("sa", "one", Some("one"), false),
            said("sa", "one", None, true),
        ];
        assert_eq!(done(&renewed), (one(), vec![]));
        let hostile = [
            said("sa", "one", Some("one"), true),
            said("other", "one", None, false),
            said("other", "three", None, false),
        ];
        assert_eq!(done(&hostile), (one(), stranger("other")));
    }
}
