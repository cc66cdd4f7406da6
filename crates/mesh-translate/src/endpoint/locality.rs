//! Priorities and weights of localities, as Istio's pilot computes them (pilot/pkg/networking/core/loadbalancer): shares as given, or a priority
//! by how much of the node's own locality or labels an endpoint shares.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use mesh_api::networking::destination_rule::{Distribute, Failover, LocalityLbSetting};
use mesh_model::{Endpoint, Mesh, Node};

/// Priorities that a locality can have by itself, 0 (the node's own) to 4.
const BY_LOCALITY: u32 = 5;

/// Endpoints of one locality and priority.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Group<'a> {
    /// `region/zone/subzone`, shorter or empty where unknown.
    pub(super) locality: &'a str,
    pub(super) endpoints: Vec<&'a Endpoint>,
    /// 0 is the first choice.
    pub(super) priority: u32,
    /// Share among the localities of a priority.
    pub(super) weight: u32,
}

impl<'a> Group<'a> {
    pub(super) fn new(locality: &'a str, endpoints: Vec<&'a Endpoint>) -> Self {
        Self {
            locality,
            weight: u32::try_from(endpoints.len()).unwrap_or(u32::MAX),
            endpoints,
            priority: 0,
        }
    }
}

/// Region, zone and subzone; empty where unknown.
pub(super) fn parts(locality: &str) -> [&str; 3] {
    let mut parts = locality.splitn(3, '/');
    [(); 3].map(|()| parts.next().unwrap_or_default())
}

/// Sets weights or priorities. `fails_over` says whether failing endpoints are noticed at all, without which lower priorities would never be used.
pub(super) fn apply(
    groups: &mut Vec<Group<'_>>,
    setting: &LocalityLbSetting,
    fails_over: bool,
    mesh: &Mesh,
    node: &Node,
) {
    let own = mesh.locality_of(node);
    if !setting.distribute.is_empty() {
        distribute(groups, &setting.distribute, own);
        return;
    }
    if !fails_over {
        return;
    }
    let by_label = &setting.failover_priority;
    if !by_label.is_empty() {
        let labels = mesh.placed_labels_of(node);
        *groups = split_by_labels(groups, by_label, &labels, node.cluster_id());
    }
    if by_label.is_empty() || !setting.failover.is_empty() {
        for group in groups.iter_mut() {
            let distance = distance(own, group.locality, &setting.failover);
            group.priority = group.priority * BY_LOCALITY + distance;
        }
    }
    close_gaps(groups);
}

/// Shares as the first entry for the node's locality gives them; a share that covers several localities is divided by their endpoints, and
/// localities without a share get nothing.
fn distribute(groups: &mut [Group<'_>], given: &[Distribute], own: &str) {
    let Some(shares) = given.iter().find(|entry| matches(own, &entry.from)) else {
        return;
    };
    let mut to: Vec<(&String, u32)> = shares.to.iter().map(|(to, share)| (to, *share)).collect();
    // Narrow patterns first, so that a wide one takes what they leave.
    to.sort_by_key(|(pattern, _)| (pattern.ends_with('*'), Reverse(pattern.len())));
    let mut left: BTreeSet<usize> = (0..groups.len()).collect();
    for (pattern, share) in to {
        let covered: Vec<usize> = left
            .iter()
            .copied()
            .filter(|index| matches(groups[*index].locality, pattern))
            .collect();
        let total: u64 = covered
            .iter()
            .map(|index| u64::from(groups[*index].weight))
            .sum();
        for index in covered {
            left.remove(&index);
            let weight = u64::from(groups[index].weight) * u64::from(share);
            match u32::try_from(weight.div_ceil(total.max(1))).unwrap_or(u32::MAX) {
                // Envoy knows no weight of 0.
                0 => groups[index].endpoints.clear(),
                weight => groups[index].weight = weight,
            }
        }
    }
    for index in left {
        groups[index].endpoints.clear();
    }
}

/// True if a locality is covered by a pattern `region/zone/subzone` with `*` for the rest.
fn matches(locality: &str, pattern: &str) -> bool {
    let locality = parts(locality);
    let mut given = pattern.splitn(3, '/');
    for own in locality {
        match given.next() {
            // What a pattern leaves out it leaves open, as does a wildcard.
            None | Some("" | "*") => return true,
            Some(part) if part != own => return false,
            Some(_) => {}
        }
    }
    true
}

/// 0 for the same subzone, 1 for the same zone, 2 for the same region, 3 for another region, 4 for one that the node's region does not fail over to.
fn distance(own: &str, other: &str, failover: &[Failover]) -> u32 {
    let [region, zone, sub_zone] = parts(own);
    let [other_region, other_zone, other_sub_zone] = parts(other);
    if region != other_region {
        let rule = failover.iter().find(|rule| rule.from == region);
        return if rule.is_some_and(|rule| rule.to != other_region) {
            4
        } else {
            3
        };
    }
    match (zone == other_zone, sub_zone == other_sub_zone) {
        (true, true) => 0,
        (true, false) => 1,
        _ => 2,
    }
}

/// Divides each locality by how many of the labels in order an endpoint shares with the node: all of them is priority 0.
fn split_by_labels<'a>(
    groups: &[Group<'a>],
    order: &[String],
    own: &BTreeMap<String, String>,
    cluster: &str,
) -> Vec<Group<'a>> {
    let mut split = Vec::new();
    for group in groups {
        let mut by_priority: BTreeMap<u32, Vec<&Endpoint>> = BTreeMap::new();
        for endpoint in &group.endpoints {
            let workload = endpoint.workload.as_ref();
            let labels = workload
                .map(|workload| workload.placed_labels(cluster))
                .unwrap_or_default();
            let first_difference = order.iter().position(|entry| {
                // `key=value` compares with the value instead of the node's own.
                let (key, wanted) = match entry.split_once('=') {
                    Some((key, value)) => (key, Some(value)),
                    None => (entry.as_str(), own.get(entry).map(String::as_str)),
                };
                wanted.unwrap_or_default() != labels.get(key).map_or("", String::as_str)
            });
            let priority = first_difference.map_or(0, |index| order.len() - index);
            by_priority
                .entry(u32::try_from(priority).unwrap_or(u32::MAX))
                .or_default()
                .push(endpoint);
        }
        for (priority, endpoints) in by_priority {
            split.push(Group {
                priority,
                ..Group::new(group.locality, endpoints)
            });
        }
    }
    split
}

/// Envoy wants priorities without gaps, from 0.
fn close_gaps(groups: &mut [Group<'_>]) {
    let used: BTreeSet<u32> = groups.iter().map(|group| group.priority).collect();
    for group in groups {
        group.priority =
            u32::try_from(used.range(..group.priority).count()).unwrap_or(group.priority);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failover(from: &str, to: &str) -> Vec<Failover> {
        vec![Failover {
            from: from.to_owned(),
            to: to.to_owned(),
        }]
    }

    #[test]
    fn distance_grows_with_what_differs() {
        for (other, expected) in [
            ("r1/z1/s1", 0),
            ("r1/z1/s2", 1),
            ("r1/z2/s1", 2),
            ("r2/z1/s1", 3),
            ("", 3),
        ] {
            assert_eq!(distance("r1/z1/s1", other, &[]), expected, "{other}");
        }
        let to_r3 = failover("r1", "r3");
        assert_eq!(distance("r1/z1", "r2/z1", &to_r3), 4);
        assert_eq!(distance("r1/z1", "r3/z1", &to_r3), 3);
        assert_eq!(distance("r4/z1", "r2/z1", &to_r3), 3);
    }

    #[test]
    fn patterns_cover_what_they_leave_open() {
        for (locality, pattern, expected) in [
            ("r1/z1/s1", "*", true),
            ("r1/z1/s1", "r1/*", true),
            ("r1/z1/s1", "r1", true),
            ("r1/z1/s1", "r1/z1/*", true),
            ("r1/z1/s1", "r1/z2/*", false),
            ("r1/z1/s1", "r1/z1/s1", true),
            ("r1/z1/s1", "r1/z1/s2", false),
            ("", "r1/*", false),
        ] {
            assert_eq!(matches(locality, pattern), expected, "{locality} {pattern}");
        }
    }

    #[test]
    fn priorities_have_no_gaps() {
        let mut groups: Vec<Group<'_>> = [4, 0, 2, 4]
            .map(|priority| Group {
                priority,
                ..Group::new("", Vec::new())
            })
            .into();
        close_gaps(&mut groups);
        assert_eq!(
            groups
                .iter()
                .map(|group| group.priority)
                .collect::<Vec<_>>(),
            [2, 0, 1, 2]
        );
        let mut groups = vec![Group {
            priority: 3,
            ..Group::new("", Vec::new())
        }];
        close_gaps(&mut groups);
        assert_eq!(groups[0].priority, 0);
    }

    #[test]
    fn shares_are_divided_by_endpoints_and_the_rest_gets_nothing() {
        let group = |locality, weight| Group {
            weight,
            ..Group::new(locality, Vec::new())
        };
        let mut groups = vec![group("r1/z1", 1), group("r1/z2", 3), group("r2/z1", 5)];
        let given = [Distribute {
            from: "r1/z1/*".to_owned(),
            to: [("r1/z1/*".to_owned(), 80), ("r1/*".to_owned(), 20)].into(),
        }];
        distribute(&mut groups, &given, "r1/z1/s1");
        assert_eq!((groups[0].weight, groups[1].weight), (80, 20));
        let untouched = groups.clone();
        distribute(&mut groups, &given, "r9/z1");
        assert_eq!(groups, untouched, "no entry for the node's locality");
    }
}
