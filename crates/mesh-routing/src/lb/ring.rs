//! Consistent hashing tables: Envoy's ring (ketama) and Maglev. Same configuration and same hash give the endpoint that stock Envoy picks.

use std::borrow::Cow;

use crate::xxhash::xx_hash64;

/// An endpoint that takes part, with its share of the whole.
#[derive(Debug, Clone)]
pub(crate) struct Share<'a> {
    pub(crate) index: u32,
    /// What is hashed: `address:port`, or the host name.
    pub(crate) key: Cow<'a, str>,
    /// Above zero; all together are one.
    pub(crate) weight: f64,
}

/// Hash function of a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HashFunction {
    /// xxHash64 with seed 0 (Envoy's default).
    Xx,
    /// MurmurHash2 (64 bit, as of libstdc++).
    Murmur2,
}

/// The points of a ring, sorted.
#[derive(Debug)]
pub(crate) struct Ring(Vec<(u64, u32)>);

impl Ring {
    /// `smallest` and `largest`: number of points (Envoy's `minimum_ring_size`, `maximum_ring_size`).
    pub(crate) fn build(
        shares: &[Share<'_>],
        smallest: u64,
        largest: u64,
        function: HashFunction,
    ) -> Self {
        let least = shares
            .iter()
            .map(|s| s.weight)
            .fold(f64::INFINITY, f64::min);
        if shares.is_empty() {
            return Self(Vec::new());
        }
        // The endpoint of least weight gets a whole number of points, unless that made the ring too large.
        let scale = ((least * smallest as f64).ceil() / least).min(largest as f64);
        let mut points = Vec::with_capacity(scale.ceil() as usize);
        let (mut placed, mut target) = (0.0_f64, 0.0_f64);
        let mut text = String::new();
        for share in shares {
            target += scale * share.weight;
            let mut i = 0_u64;
            while placed < target {
                use std::fmt::Write as _;
                text.clear();
                // Writing to a String cannot fail.
                let _ = write!(text, "{}_{i}", share.key);
                let hash = match function {
                    HashFunction::Xx => xx_hash64(text.as_bytes(), 0),
                    HashFunction::Murmur2 => murmur2(text.as_bytes()),
                };
                points.push((hash, share.index));
                i += 1;
                placed += 1.0;
            }
        }
        points.sort_by_key(|(hash, _)| *hash);
        Self(points)
    }

    /// The first point at or after the hash; `attempt` points further for another try.
    pub(crate) fn pick(&self, hash: u64, attempt: u32) -> Option<u32> {
        let found = self.0.partition_point(|(point, _)| *point < hash);
        let size = self.0.len();
        let at = (found % size.max(1) + attempt as usize) % size.max(1);
        self.0.get(at).map(|(_, index)| *index)
    }
}

const MURMUR_SEED: u64 = 0xc70f_6907;
const MURMUR: u64 = 0xc6a4_a793_5bd1_e995;

/// MurmurHash2 for 64 bits with the seed of `std::hash`.
fn murmur2(bytes: &[u8]) -> u64 {
    let mix = |v: u64| (v ^ (v >> 47)).wrapping_mul(MURMUR);
    let mut hash = MURMUR_SEED ^ (bytes.len() as u64).wrapping_mul(MURMUR);
    let mut words = bytes.chunks_exact(8);
    for word in &mut words {
        let value = little_endian(word).wrapping_mul(MURMUR);
        hash = (hash ^ mix(value)).wrapping_mul(MURMUR);
    }
    let rest = words.remainder();
    if !rest.is_empty() {
        hash = (hash ^ little_endian(rest)).wrapping_mul(MURMUR);
    }
    hash = mix(hash);
    hash ^ (hash >> 47)
}

fn little_endian(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// A Maglev table.
#[derive(Debug)]
pub(crate) enum Maglev {
    /// Up to 256 endpoints: a byte for each slot.
    Small(Box<[u8]>, Vec<u32>),
    /// More.
    Large(Box<[u32]>),
}

struct Builder {
    index: u32,
    offset: u64,
    skip: u64,
    weight: f64,
    target: f64,
    next: u64,
}

const FREE: u32 = u32::MAX;

impl Maglev {
    /// `size` is a prime.
    pub(crate) fn build(shares: &[Share<'_>], size: u64) -> Self {
        let mut sorted: Vec<&Share<'_>> = shares.iter().collect();
        sorted.sort_by(|a, b| a.key.cmp(&b.key));
        let builder = |share: &&Share<'_>| Builder {
            index: share.index,
            offset: xx_hash64(share.key.as_bytes(), 0) % size,
            skip: xx_hash64(share.key.as_bytes(), 1) % (size - 1) + 1,
            weight: share.weight,
            target: 0.0,
            next: 0,
        };
        let mut builders: Vec<Builder> = sorted.iter().map(builder).collect();
        let table = fill(&mut builders, size);
        if shares.len() > 256 {
            return Self::Large(table.into());
        }
        let indexes: Vec<u32> = builders.iter().map(|b| b.index).collect();
        // Less than 256 by the check above.
        let slot = |index: &u32| indexes.iter().position(|i| i == index).unwrap_or(0) as u8;
        Self::Small(table.iter().map(slot).collect(), indexes)
    }

    /// The endpoint of the hash; other slots for other tries.
    pub(crate) fn pick(&self, mut hash: u64, attempt: u32) -> Option<u32> {
        if attempt > 0 {
            hash ^= (u64::MAX - u64::from(attempt)).wrapping_add(1);
        }
        match self {
            Self::Small(slots, indexes) => {
                let slot = slots.get((hash % slots.len().max(1) as u64) as usize)?;
                indexes.get(usize::from(*slot)).copied()
            }
            Self::Large(slots) => slots
                .get((hash % slots.len().max(1) as u64) as usize)
                .copied(),
        }
    }
}

/// Listing 1 of the Maglev paper, with Envoy's weights: the heaviest endpoint takes a slot in every round, one of a third of its weight in
/// every third round.
fn fill(builders: &mut [Builder], size: u64) -> Vec<u32> {
    if builders.is_empty() {
        return Vec::new();
    }
    let most = builders.iter().map(|b| b.weight).fold(0.0, f64::max);
    let mut table = vec![FREE; size as usize];
    let (mut filled, mut round) = (0, 0.0_f64);
    loop {
        round += 1.0;
        for builder in &mut *builders {
            if filled == size {
                return table;
            }
            if round * builder.weight < builder.target {
                continue;
            }
            builder.target += most;
            // As there is a free slot and the skip and the size have no common divisor, one is found.
            loop {
                let at = (builder.offset + builder.skip * builder.next) % size;
                builder.next += 1;
                if let Some(slot) = table.get_mut(at as usize)
                    && *slot == FREE
                {
                    *slot = builder.index;
                    break;
                }
            }
            filled += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::murmur2;

    /// The values of Envoy's own test (`hash_test.cc`).
    #[test]
    fn murmur_as_envoy_has_it() {
        let known: [(&str, u64); 5] = [
            ("foo", 9_631_199_822_919_835_226),
            ("bar", 11_474_628_671_133_349_555),
            ("foo\nbar", 16_306_510_975_912_980_159),
            ("lyft", 12_847_078_931_730_529_320),
            ("", 6_142_509_188_972_423_790),
        ];
        for (text, hash) in known {
            assert_eq!(murmur2(text.as_bytes()), hash, "{text:?}");
        }
    }
}
