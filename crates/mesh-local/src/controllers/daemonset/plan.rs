//! What a DaemonSet does next, by its nodes and pods alone (Kubernetes' rules: `daemon_controller.go`, `update.go`).

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::DaemonSetSpec;
use k8s_openapi::api::core::v1::Pod;

use super::super::control::resolve;
use super::super::pod;

/// What the set wants of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    /// A pod runs there.
    Run,
    /// No new pod, but one that is there may stay.
    Stay,
    /// No pod.
    Never,
}

/// A pod on a node.
#[derive(Debug, Clone)]
pub(super) struct Resident {
    pub(super) pod: Arc<Pod>,
    /// Made of the present template.
    pub(super) is_new: bool,
    /// Zero when it is available, the time until then while it only has to stay ready, none while it is not ready.
    pub(super) available_in: Option<Duration>,
}

impl Resident {
    pub(super) fn is_available(&self) -> bool {
        self.available_in == Some(Duration::ZERO)
    }

    fn is_ending(&self) -> bool {
        self.pod.metadata.deletion_timestamp.is_some()
    }
}

/// A node with the set's pods.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) node: String,
    pub(super) wish: Wish,
    pub(super) pods: Vec<Resident>,
}

/// How far a rollout may stray.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limits {
    /// False with `OnDelete`.
    pub(super) rolls: bool,
    /// Nodes that may have two pods.
    pub(super) surge: i32,
    /// Nodes that may have none.
    pub(super) unavailable: i32,
}

impl Limits {
    pub(super) fn of(spec: &DaemonSetSpec, places: &[Place]) -> Self {
        let nodes = places
            .iter()
            .filter(|place| place.wish == Wish::Run)
            .count();
        let nodes = i32::try_from(nodes).unwrap_or(i32::MAX);
        let strategy = spec.update_strategy.as_ref();
        let rolling = strategy.and_then(|strategy| strategy.rolling_update.as_ref());
        let surge = rolling
            .and_then(|rolling| rolling.max_surge.as_ref())
            .map_or(0, |surge| resolve(surge, nodes, true));
        let unavailable = rolling
            .and_then(|rolling| rolling.max_unavailable.as_ref())
            .map_or(1, |unavailable| resolve(unavailable, nodes, true));
        Self {
            rolls: strategy.and_then(|strategy| strategy.type_.as_deref()) != Some("OnDelete"),
            surge,
            // With neither allowed nothing could ever move.
            unavailable: unavailable.max(i32::from(surge == 0)),
        }
    }
}

/// The changes to make now.
#[derive(Debug, Default)]
pub(super) struct Steps {
    /// Nodes that get a pod.
    pub(super) create: Vec<String>,
    pub(super) delete: Vec<Arc<Pod>>,
}

/// Decides.
pub(super) fn steps(places: &[Place], limits: &Limits) -> Steps {
    let mut steps = Steps::default();
    for place in places {
        settle(place, limits, &mut steps);
    }
    if limits.rolls {
        if limits.surge > 0 {
            replace_with_surge(places, limits, &mut steps);
        } else {
            replace(places, limits, &mut steps);
        }
    }
    steps
}

/// One pod where one is wanted, none elsewhere, none that has ended.
fn settle(place: &Place, limits: &Limits, steps: &mut Steps) {
    let going = |resident: &&Resident| !resident.is_ending();
    let (ended, alive): (Vec<&Resident>, Vec<&Resident>) = place
        .pods
        .iter()
        .filter(going)
        .partition(|resident| pod::is_finished(&resident.pod));
    steps
        .delete
        .extend(ended.iter().map(|resident| resident.pod.clone()));
    match place.wish {
        Wish::Never => steps
            .delete
            .extend(alive.iter().map(|resident| resident.pod.clone())),
        Wish::Run if place.pods.is_empty() => steps.create.push(place.node.clone()),
        Wish::Stay | Wish::Run => {
            // Two of a kind: the older one stays. An old and a new one side by side are a rollout with surge.
            let mut kept = [false; 2];
            let mut by_age = alive.clone();
            by_age.sort_by_key(|resident| {
                let meta = &resident.pod.metadata;
                (
                    meta.creation_timestamp.as_ref().map(|time| time.0),
                    meta.name.clone(),
                )
            });
            for resident in by_age {
                let kind = if limits.surge > 0 && limits.rolls {
                    usize::from(resident.is_new)
                } else {
                    0
                };
                if std::mem::replace(&mut kept[kind], true) {
                    steps.delete.push(resident.pod.clone());
                }
            }
        }
    }
}

/// The pod of the older and of the present template on a node, those that end not counted.
fn pair(place: &Place) -> (Option<&Resident>, Option<&Resident>) {
    let find = |is_new: bool| {
        place.pods.iter().find(|resident| {
            resident.is_new == is_new && !resident.is_ending() && !pod::is_finished(&resident.pod)
        })
    };
    (find(false), find(true))
}

fn wanted(places: &[Place]) -> impl Iterator<Item = &Place> {
    places.iter().filter(|place| place.wish == Wish::Run)
}

/// Ends old pods, so many at a time as may be missing; those that serve nobody first.
fn replace(places: &[Place], limits: &Limits, steps: &mut Steps) {
    let (mut missing, mut serving) = (0, Vec::new());
    for place in wanted(places) {
        match pair(place) {
            (Some(old), None) if old.is_available() => serving.push(old.pod.clone()),
            (Some(old), None) => {
                missing += 1;
                steps.delete.push(old.pod.clone());
            }
            (_, Some(new)) if new.is_available() => {}
            _ => missing += 1,
        }
    }
    let left = usize::try_from(limits.unavailable - missing).unwrap_or(0);
    steps.delete.extend(serving.into_iter().take(left));
}

/// Makes new pods beside old ones, and ends an old one when its successor serves.
fn replace_with_surge(places: &[Place], limits: &Limits, steps: &mut Steps) {
    let (mut beside, mut waiting) = (0, Vec::new());
    for place in wanted(places) {
        match pair(place) {
            (Some(old), Some(new)) if new.is_available() => steps.delete.push(old.pod.clone()),
            (Some(_), Some(_)) => beside += 1,
            (Some(old), None) if old.is_available() => waiting.push(place.node.clone()),
            // An old pod that serves nobody needs no successor beside it counted.
            (Some(_), None) => steps.create.push(place.node.clone()),
            (None, _) => {}
        }
    }
    let left = usize::try_from(limits.surge - beside).unwrap_or(0);
    steps.create.extend(waiting.into_iter().take(left));
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// `old-1 ready`, `new-2 ending` …
    fn resident(text: &str) -> Resident {
        let (name, state) = text.split_once(' ').unwrap();
        let ends = (state == "ending").then_some("2026-01-01T00:00:00Z");
        let phase = if state == "failed" {
            "Failed"
        } else {
            "Running"
        };
        let pod = json!({ "metadata": { "name": name, "deletionTimestamp": ends }, "status": { "phase": phase } });
        Resident {
            pod: Arc::new(serde_json::from_value(pod).unwrap()),
            is_new: name.starts_with("new"),
            available_in: (state == "ready").then_some(Duration::ZERO),
        }
    }

    fn place(node: &str, wish: Wish, pods: &[&str]) -> Place {
        Place {
            node: node.into(),
            wish,
            pods: pods.iter().map(|text| resident(text)).collect(),
        }
    }

    fn decide(places: &[Place], surge: i32, unavailable: i32) -> (Vec<String>, Vec<String>) {
        let limits = Limits {
            rolls: true,
            surge,
            unavailable,
        };
        let steps = steps(places, &limits);
        let names = steps
            .delete
            .iter()
            .map(|pod| pod.metadata.name.clone().unwrap());
        (steps.create, names.collect())
    }

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn every_node_that_suits_has_one_pod() {
        let places = [
            place("a", Wish::Run, &[]),
            place("b", Wish::Run, &["new-b ready"]),
            place("c", Wish::Run, &["new-c ending"]),
            place("d", Wish::Run, &["new-d failed"]),
            place("e", Wish::Never, &["new-e ready"]),
            place("f", Wish::Stay, &["new-f ready"]),
            place("g", Wish::Stay, &[]),
            place("h", Wish::Run, &["new-h1 ready", "new-h2 ready"]),
        ];
        assert_eq!(
            decide(&places, 0, 1),
            (strings(&["a"]), strings(&["new-d", "new-e", "new-h2"]))
        );
    }

    #[test]
    fn old_pods_go_as_the_limit_allows() {
        let places = [
            place("a", Wish::Run, &["old-a ready"]),
            place("b", Wish::Run, &["old-b ready"]),
            place("c", Wish::Run, &["new-c ready"]),
        ];
        assert_eq!(decide(&places, 0, 1).1, strings(&["old-a"]));
        assert_eq!(decide(&places, 0, 2).1, strings(&["old-a", "old-b"]));
        let busy = [
            place("a", Wish::Run, &["old-a ready"]),
            place("b", Wish::Run, &["new-b unready"]),
        ];
        assert_eq!(decide(&busy, 0, 1).1, strings(&[]));
        let broken = [place("a", Wish::Run, &["old-a unready"]), busy[1].clone()];
        assert_eq!(decide(&broken, 0, 1).1, strings(&["old-a"]));
    }

    #[test]
    fn with_surge_the_successor_comes_first() {
        let places = [
            place("a", Wish::Run, &["old-a ready"]),
            place("b", Wish::Run, &["old-b ready"]),
        ];
        assert_eq!(decide(&places, 1, 0), (strings(&["a"]), strings(&[])));
        let half = [
            place("a", Wish::Run, &["old-a ready", "new-a unready"]),
            places[1].clone(),
        ];
        assert_eq!(decide(&half, 1, 0), (strings(&[]), strings(&[])));
        let done = [
            place("a", Wish::Run, &["old-a ready", "new-a ready"]),
            places[1].clone(),
        ];
        assert_eq!(decide(&done, 1, 0), (strings(&["b"]), strings(&["old-a"])));
    }
}
