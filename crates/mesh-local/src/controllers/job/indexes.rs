//! Sets of a job's numbers as ranges: `0-2147483646` in a status takes no more room than `5`.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Numbers, kept as ranges that neither touch nor overlap: first to last.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Indexes(BTreeMap<i32, i32>);

impl Indexes {
    /// `0-2,5` as numbers, those of `within` only: a status is the client's to write. What is not a number is left out.
    pub(super) fn read(text: &str, within: Range<i32>) -> Self {
        let mut parts: Vec<(i32, i32)> = Vec::new();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            if let (Ok(first), Ok(last)) = (first.parse::<i32>(), last.parse::<i32>()) {
                parts.push((first.max(within.start), last.min(within.end - 1)));
            }
        }
        parts.retain(|(first, last)| first <= last);
        parts.sort_unstable();
        let mut ranges: Vec<(i32, i32)> = Vec::new();
        for (first, last) in parts {
            match ranges.last_mut() {
                Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
                _ => ranges.push((first, last)),
            }
        }
        Self(ranges.into_iter().collect())
    }

    /// Adds one number.
    pub(super) fn insert(&mut self, number: i32) {
        if self.contains(number) {
            return;
        }
        let last = number
            .checked_add(1)
            .and_then(|next| self.0.remove(&next))
            .unwrap_or(number);
        let before = self.0.range_mut(..number).next_back();
        match before {
            Some((_, end)) if end.checked_add(1) == Some(number) => *end = last,
            _ => drop(self.0.insert(number, last)),
        }
    }

    pub(super) fn contains(&self, number: i32) -> bool {
        let before = self.0.range(..=number).next_back();
        before.is_some_and(|(_, last)| *last >= number)
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        let sizes = self.0.iter().map(|(first, last)| {
            usize::try_from(i64::from(*last) - i64::from(*first) + 1).unwrap_or_default()
        });
        sizes.sum()
    }

    /// The first `wanted` numbers from 0 below `end` that are neither here nor in `busy`.
    pub(super) fn free(&self, end: i32, busy: &BTreeSet<i32>, wanted: usize) -> Vec<i32> {
        let (mut found, mut next) = (Vec::new(), 0);
        while next < end && found.len() < wanted {
            let taken = self.0.range(..=next).next_back();
            if let Some((_, last)) = taken.filter(|(_, last)| **last >= next) {
                match last.checked_add(1) {
                    Some(after) => next = after,
                    None => break,
                }
                continue;
            }
            if !busy.contains(&next) {
                found.push(next);
            }
            next += 1;
        }
        found
    }
}

impl std::fmt::Display for Indexes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (place, (first, last)) in self.0.iter().enumerate() {
            let comma = if place == 0 { "" } else { "," };
            // Two neighbours are written as a list, as Kubernetes does.
            match i64::from(*last) - i64::from(*first) {
                0 => write!(f, "{comma}{first}")?,
                1 => write!(f, "{comma}{first},{last}")?,
                _ => write!(f, "{comma}{first}-{last}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_grown_and_written() {
        let mut all = Indexes::read("5,0-2,2-1,x,9-8,6,9", 0..100);
        assert_eq!(all.to_string(), "0-2,5,6,9");
        for number in [7, 8, 8, 3] {
            all.insert(number);
        }
        assert_eq!((all.to_string().as_str(), all.len()), ("0-3,5-9", 9));
        assert_eq!(all.free(13, &BTreeSet::from([10]), 2), [4, 11]);
        assert!(all.contains(9) && !all.contains(4) && !all.contains(10));
    }

    #[test]
    fn a_status_can_not_make_it_large() {
        let all = Indexes::read("-5-3,0-2147483647", 0..i32::MAX);
        assert_eq!(all.to_string(), "0-2147483646");
        assert_eq!(all.len(), 2_147_483_647);
        assert_eq!(all.free(i32::MAX, &BTreeSet::new(), 5), [0; 0]);
        assert_eq!(Indexes::read("0-2147483647", 0..3).to_string(), "0-2");
        let mut last = Indexes::default();
        last.insert(i32::MAX);
        assert_eq!(last.free(i32::MAX, &BTreeSet::new(), 1), [0]);
    }
}
