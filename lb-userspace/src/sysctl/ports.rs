//! Sets of ports, as the kernel's settings write them.

use std::{collections::BTreeSet, fmt, num::ParseIntError, ops::RangeInclusive, str::FromStr};

use serde::{Deserialize, Serialize};

/// Some ports: in text, numbers and ranges with commas between them, as `80,1024-2047`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Ports(BTreeSet<u16>);

impl Ports {
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The ports of either.
    pub(crate) fn with(&self, other: &Self) -> Self {
        Self(&self.0 | &other.0)
    }

    /// The ports that the other has not.
    pub(crate) fn without(&self, other: &Self) -> Self {
        Self(&self.0 - &other.0)
    }

    /// The ports of both.
    pub(crate) fn common(&self, other: &Self) -> Self {
        Self(&self.0 & &other.0)
    }
}

impl From<RangeInclusive<u16>> for Ports {
    fn from(range: RangeInclusive<u16>) -> Self {
        Self(range.collect())
    }
}

impl FromStr for Ports {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut ports = BTreeSet::new();
        for part in text.trim().split(',').filter(|part| !part.is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            ports.extend(first.trim().parse::<u16>()?..=last.trim().parse::<u16>()?);
        }
        Ok(Self(ports))
    }
}

impl TryFrom<String> for Ports {
    type Error = ParseIntError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Ports> for String {
    fn from(ports: Ports) -> Self {
        ports.to_string()
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut ranges: Vec<(u16, u16)> = Vec::new();
        for &port in &self.0 {
            match ranges.last_mut() {
                Some((_, last)) if port == *last + 1 => *last = port,
                _ => ranges.push((port, port)),
            }
        }
        let ranges = ranges.into_iter().map(
            |(first, last)| {
                if first == last { first.to_string() } else { format!("{first}-{last}") }
            },
        );
        f.write_str(&ranges.collect::<Vec<_>>().join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(text: &str) -> Ports {
        text.parse().expect("ports")
    }

    #[test]
    fn text_is_read_and_written_as_the_kernel_does() {
        for text in ["", "80", "80,443", "1024-32767", "8080,9148-9150,65535"] {
            assert_eq!(ports(text).to_string(), text);
        }
        assert_eq!(ports("5-7,6-9,10\n").to_string(), "5-10");
        assert!("80-".parse::<Ports>().is_err() && "a".parse::<Ports>().is_err() && "65536".parse::<Ports>().is_err());
    }

    #[test]
    fn what_was_added_goes_and_what_others_added_meanwhile_stays() {
        let before = ports("80,2000-2010");
        let ours = Ports::from(1024..=4095);
        assert_eq!(before.with(&ours).to_string(), "80,1024-4095");
        let added = ours.without(&before);
        assert_eq!(before.with(&ours).without(&added), before);
        assert_eq!(ports("80,1024-5000").without(&added).to_string(), "80,2000-2010,4096-5000");
        assert_eq!(ports("").without(&added), Ports::default());
        assert_eq!(before.common(&ours).len(), 11);
    }
}
