//! Ranges of addresses.

use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

/// A range of addresses, such as `10.0.0.0/8`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    address: IpAddr,
    length: u8,
}

/// Why a text is not a range of addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a range of addresses, such as 10.0.0.0/8")]
pub struct RangeError(String);

impl FromStr for Range {
    type Err = RangeError;

    fn from_str(text: &str) -> Result<Self, RangeError> {
        let wrong = || RangeError(text.to_owned());
        let (address, length) = text.trim().split_once('/').ok_or_else(wrong)?;
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let length: u8 = length.parse().map_err(|_| wrong())?;
        let whole = if address.is_ipv4() { 32 } else { 128 };
        if length > whole {
            return Err(wrong());
        }
        Ok(Self { address, length })
    }
}

impl Range {
    /// True if an address is in the range; an IPv4 address in IPv6's form counts as itself, one behind NAT64 as both.
    pub(super) fn contains(self, address: IpAddr) -> bool {
        self.holds(address) || behind_nat64(address).is_some_and(|inner| self.holds(inner.into()))
    }

    fn holds(self, address: IpAddr) -> bool {
        let shifted = |bits: u128, whole: u8| {
            bits.checked_shr(u32::from(whole - self.length))
                .unwrap_or_default()
        };
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(own), IpAddr::V4(other)) => {
                let bits = |address: Ipv4Addr| u128::from(u32::from(address));
                shifted(bits(own), 32) == shifted(bits(other), 32)
            }
            (IpAddr::V6(own), IpAddr::V6(other)) => {
                shifted(u128::from(own), 128) == shifted(u128::from(other), 128)
            }
            _ => false,
        }
    }
}

/// The IPv4 address that a translator reaches under an IPv6 address of the well-known prefix 64:ff9b::/96 (RFC 6052 section 2.1).
pub(super) fn behind_nat64(address: IpAddr) -> Option<Ipv4Addr> {
    let IpAddr::V6(address) = address else {
        return None;
    };
    match address.octets() {
        [0, 0x64, 0xff, 0x9b, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d] => {
            Some(Ipv4Addr::new(a, b, c, d))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_contain_what_their_length_says() {
        let contains = |range: &str, address: &str| {
            let range: Range = range.parse().expect("a range");
            range.contains(address.parse().expect("an address"))
        };
        assert!(contains("10.0.0.0/8", "10.1.2.3") && !contains("10.0.0.0/8", "11.0.0.0"));
        assert!(contains("10.0.0.0/8", "::ffff:10.1.2.3"));
        assert!(contains("0.0.0.0/0", "1.2.3.4") && !contains("0.0.0.0/0", "::1"));
        assert!(contains("::/0", "fd00::1") && contains("fd00::1/128", "fd00::1"));
        assert!(contains("10.0.0.0/8", "64:ff9b::10.1.2.3"));
        assert!(!contains("10.0.0.0/8", "64:ff9b::11.1.2.3"));
        assert!(!contains("10.0.0.0/8", "64:ff9b:1::10.1.2.3"));
        assert!(contains("64:ff9b::/96", "64:ff9b::10.1.2.3"));
        for wrong in ["", "10.0.0.0", "10.0.0.0/33", "x/8", "::/129"] {
            assert!(wrong.parse::<Range>().is_err(), "{wrong}");
        }
    }
}
