//! The shapes of maps: an agent takes over only maps that are what it would make itself.

use std::{collections::BTreeMap, fmt};

use aya::maps::{MapInfo, MapType};
use aya_obj::{Object, generated::bpf_map_type};
use tracing::warn;

use super::{OBJECT, map_error, pins::Pins};
use crate::dataplane::{DataplaneError, Sizes};

/// What a map is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The kernel's number of its type.
    kind: u32,
    /// Bytes of a key.
    key: u32,
    /// Bytes of a value.
    value: u32,
    /// How many entries it has room for.
    pub entries: u32,
    /// `BPF_F_MMAPABLE` and others, combined.
    flags: u32,
}

/// The maps that outlive the agent: what the operator can set the size of, by the flag for it, and the others.
pub(super) const LASTING: [(&str, Option<Room>); 24] = [
    ("SERVICES4", Some(SERVICES)),
    ("SERVICES6", Some(SERVICES)),
    ("VIPS4", Some(SERVICES)),
    ("VIPS6", Some(SERVICES)),
    ("SERVICE", Some(Room { flag: "--max-services", entries: |sizes| sizes.services })),
    ("SOURCES", Some(Room { flag: "--max-source-ranges", entries: |sizes| sizes.source_ranges })),
    ("TABLE", Some(Room { flag: "--max-slots", entries: |sizes| sizes.slots })),
    ("BACKENDS", Some(Room { flag: "--max-backends", entries: |sizes| sizes.backends })),
    ("FLOWS4", Some(FLOWS)),
    ("FLOWS6", Some(FLOWS)),
    ("PENDING4", Some(PENDING)),
    ("PENDING6", Some(PENDING)),
    ("AFFINITY", Some(Room { flag: "--max-affinity-clients", entries: |sizes| sizes.affinity_clients })),
    ("PEERS", Some(Room { flag: "--max-flows", entries: Sizes::peers })),
    ("CONNECTED", None),
    ("WATCHED", None),
    ("DATAGRAMS", None),
    ("EXEMPT", None),
    ("FRAGMENTS4", None),
    ("FRAGMENTS6", None),
    ("ADDRESS_BITS", None),
    ("ADDRESSES", None),
    ("EPOCH", None),
    ("COUNTERS", None),
];

/// How big a map is to be.
#[derive(Clone, Copy)]
pub(super) struct Room {
    /// The flag that sets it.
    flag: &'static str,
    /// How many entries that makes.
    pub(super) entries: fn(&Sizes) -> u32,
}

const SERVICES: Room = Room { flag: "--max-services", entries: Sizes::frontends };
const FLOWS: Room = Room { flag: "--max-flows", entries: Sizes::flow_entries };
const PENDING: Room = Room { flag: "--max-pending-flows", entries: Sizes::pending_entries };

/// Makes sure that each map that is pinned has the shape that it is to have with these sizes.
pub(super) fn check(pins: &Pins, sizes: &Sizes) -> Result<(), DataplaneError> {
    let ours = declared()?;
    let missing: Vec<_> = LASTING.iter().map(|(name, _)| *name).filter(|name| !pins.map(name).exists()).collect();
    if !missing.is_empty() && missing.len() < LASTING.len() {
        warn!("a former agent's tables are there but for {}: what these said is lost", missing.join(", "));
    }
    for (name, room) in LASTING {
        let Some(there) = pinned(pins, name)? else { continue };
        let declared = ours.get(name).ok_or(DataplaneError::Map { name, source: None })?;
        let entries = room.map_or(declared.entries, |room| (room.entries)(sizes));
        let wanted = Shape { entries, ..declared.clone() };
        if there != wanted {
            let is_size = Shape { entries, ..there.clone() } == wanted;
            let flag = room.map(|room| room.flag).filter(|_| is_size);
            return Err(DataplaneError::Shape { name, pinned: there, wanted, remedy: remedy(flag) });
        }
    }
    Ok(())
}

fn remedy(flag: Option<&str>) -> String {
    let all = "`wharf cleanup` removes what is pinned, and ends the connections";
    match flag {
        Some(flag) => format!("{flag} as before takes it over; {all}"),
        None => format!("this wharf can't take it over; the one that made it can; {all}"),
    }
}

/// The sizes of the tables that a former agent left; none if it left none.
pub fn pinned_sizes(pins: &Pins) -> Result<Option<Sizes>, DataplaneError> {
    let entries = |name| Ok::<_, DataplaneError>(pinned(pins, name)?.map(|shape| shape.entries));
    let [Some(services), Some(backends), Some(slots), Some(flows), Some(pending), Some(clients), Some(ranges)] = [
        entries("SERVICE")?,
        entries("BACKENDS")?,
        entries("TABLE")?,
        entries("FLOWS4")?,
        entries("PENDING4")?,
        entries("AFFINITY")?,
        entries("SOURCES")?,
    ] else {
        return Ok(None);
    };
    Ok(Some(Sizes {
        services,
        backends,
        slots,
        flows: flows / 2,
        pending_flows: pending / 2,
        affinity_clients: clients,
        source_ranges: ranges,
    }))
}

/// The shape of a pinned map; `None` if there is none.
fn pinned(pins: &Pins, name: &'static str) -> Result<Option<Shape>, DataplaneError> {
    let path = pins.map(name);
    if !path.exists() {
        return Ok(None);
    }
    let info = MapInfo::from_pin(path).map_err(map_error(name))?;
    let kind = info.map_type().map_err(map_error(name))?;
    Ok(Some(Shape {
        kind: kind as u32,
        key: info.key_size(),
        value: info.value_size(),
        entries: info.max_entries(),
        flags: info.map_flags(),
    }))
}

/// The shapes that the object gives its maps.
fn declared() -> Result<BTreeMap<String, Shape>, DataplaneError> {
    let object = Object::parse(OBJECT).map_err(|error| DataplaneError::Load(Box::new(error.into())))?;
    let shape = |map: &aya_obj::Map| Shape {
        kind: map.map_type(),
        key: map.key_size(),
        value: map.value_size(),
        entries: map.max_entries(),
        flags: map.map_flags(),
    };
    Ok(object.maps.iter().map(|(name, map)| (name.clone(), shape(map))).collect())
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, key, value, entries, flags } = self;
        let name = bpf_map_type::try_from(*kind).ok().and_then(|kind| MapType::try_from(kind).ok());
        match name {
            Some(name) => write!(f, "{name:?}")?,
            None => write!(f, "map type {kind}")?,
        }
        write!(f, " with {entries} entries, keys of {key} and values of {value} bytes, flags {flags:#x}")
    }
}
