//! The shape of a services file. Each scalar stays text with its place, so that `validate` can judge it in its own
//! words and go on to the next.

use std::{fmt, str};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor, value::MapAccessDeserializer},
};
use serde_path_to_error::{Path, Segment, Track};
use serde_saphyr::{Error, MessageFormatter as _, Options, Spanned, UserMessageFormatter};

use super::{
    MAX_BYTES,
    remarks::{Position, Remarks},
};
use crate::source::text::shown;

/// A value and where it stands.
pub(super) struct At<T> {
    pub(super) value: T,
    pub(super) at: Position,
}

/// A scalar as it is written.
pub(super) type Text = Option<At<String>>;

/// A list of them.
pub(super) type Texts = Option<Vec<At<String>>>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    services: Option<Vec<At<Service>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Service {
    pub(super) name: Text,
    #[serde(rename = "type")]
    pub(super) kind: Text,
    pub(super) addresses: Texts,
    #[serde(rename = "externalIPs")]
    pub(super) external_ips: Texts,
    #[serde(rename = "loadBalancerIPs")]
    pub(super) load_balancer_ips: Texts,
    pub(super) ports: Option<Vec<At<Port>>>,
    pub(super) external_traffic_policy: Text,
    pub(super) internal_traffic_policy: Text,
    pub(super) load_balancer_source_ranges: Texts,
    pub(super) session_affinity: Text,
    pub(super) session_affinity_config: Option<At<SessionAffinityConfig>>,
    pub(super) affinity: Text,
    pub(super) algorithm: Text,
    pub(super) backends: Option<Vec<At<Backend>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SessionAffinityConfig {
    #[serde(rename = "clientIP")]
    pub(super) client_ip: Option<ClientIpConfig>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct ClientIpConfig {
    pub(super) timeout_seconds: Text,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[expect(clippy::struct_field_names, reason = "the file's own names")]
pub(super) struct Port {
    pub(super) name: Text,
    pub(super) port: Text,
    pub(super) target_port: Text,
    pub(super) node_port: Text,
    pub(super) protocol: Text,
}

/// A backend is its address, or a map when there is more to say.
pub(super) enum Backend {
    Address(String),
    Described(Box<DescribedBackend>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct DescribedBackend {
    pub(super) address: Text,
    pub(super) weight: Text,
    pub(super) node_name: Text,
    pub(super) conditions: Option<Conditions>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Conditions {
    pub(super) ready: Text,
    pub(super) serving: Text,
    pub(super) terminating: Text,
}

/// The text of a file.
pub(super) fn text(bytes: &[u8]) -> Result<&str, Remarks> {
    str::from_utf8(bytes).map_err(|error| {
        let good = String::from_utf8_lossy(bytes.get(..error.valid_up_to()).unwrap_or_default());
        let (lines, last) = (good.matches('\n').count(), good.rsplit('\n').next().unwrap_or_default());
        let at = Position { line: lines as u64 + 1, column: last.chars().count() as u64 + 1 };
        Remarks::one(at, "not UTF-8 text".to_owned())
    })
}

/// Takes a file apart; stops at the first thing that has the wrong shape.
pub(super) fn decode(text: &str) -> Result<Vec<At<Service>>, Remarks> {
    let file: File = serde_saphyr::from_str_with_options(text, options()).map_err(|error| {
        let at = error.location().map_or(Position::START, Position::from);
        let path = path_of_error(text);
        let colon = if path.is_empty() { "" } else { ": " };
        Remarks::one(at, format!("{path}{colon}{}", explain(&error)))
    })?;
    // Not the same as none: a file that was cut short must not remove every service.
    let missing = "services: missing; a file without services says `services: []`";
    file.services.ok_or_else(|| Remarks::one(Position::START, missing.to_owned()))
}

/// How many nodes a file may have: a large cluster's have some 26 bytes each, as kubectl prints them.
const MAX_NODES: usize = MAX_BYTES as usize / 32;

/// Room for the largest clusters, in one document or in one for each object. What bounds hostile input stays: nesting 64 deep, a million
/// nodes out of aliases; the number of nodes bounds the memory, at some 150 bytes each.
pub(super) fn options() -> Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_nodes: MAX_NODES,
            max_events: 3 * MAX_NODES,
            max_documents: MAX_BYTES as usize / 1024,
            max_total_scalar_bytes: MAX_BYTES as usize,
            // One list of backends, shared by all services, is no bomb.
            enforce_alias_anchor_ratio: false,
        },
        with_snippet: false,
    }
}

/// The fields that lead to the first error, found by a second, slower reading.
fn path_of_error(text: &str) -> String {
    let mut track = Track::new();
    let again = serde_saphyr::with_deserializer_from_str_with_options(text, options(), |yaml| {
        File::deserialize(serde_path_to_error::Deserializer::new(yaml, &mut track))
    });
    if again.is_ok() { String::new() } else { spell(&track.path()) }
}

fn spell(path: &Path) -> String {
    let spelled = path.iter().map(|segment| match segment {
        Segment::Seq { index } => format!("[{index}]"),
        // `Spanned` has its value in a field of this name; none of ours has it.
        Segment::Map { key } if key == "value" => String::new(),
        Segment::Map { key } => format!(".{}", shown(key)),
        Segment::Enum { .. } | Segment::Unknown => String::new(),
    });
    spelled.collect::<String>().trim_start_matches('.').to_owned()
}

/// The parser's message, or a better one.
pub(super) fn explain(error: &Error) -> String {
    match error {
        Error::SerdeUnknownField { field, expected, .. } => match field.as_str() {
            "clusterIP" | "clusterIPs" => "the list of cluster IPs is called `addresses` here".to_owned(),
            field => format!("`{}` is no field; the fields here are {}", shown(field), expected.join(", ")),
        },
        Error::Unexpected { expected: "sequence start", .. } => "a list is expected here".to_owned(),
        Error::Unexpected { expected: "mapping start", .. } => "a map of fields is expected here".to_owned(),
        Error::Unexpected { expected: "string scalar", .. } => "a single value is expected here".to_owned(),
        Error::MultipleDocuments { .. } => "a second document begins here; a file holds one".to_owned(),
        error => shown(&UserMessageFormatter.format_message(error)),
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for At<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // What is shared by `*name` stands where it is used: that is what a mistake is about.
        let Spanned { value, referenced, .. } = Spanned::deserialize(deserializer)?;
        Ok(Self { value, at: referenced.into() })
    }
}

impl<'de> Deserialize<'de> for Backend {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(BackendVisitor)
    }
}

struct BackendVisitor;

impl<'de> Visitor<'de> for BackendVisitor {
    type Value = Backend;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an IP address, or a map with address, weight and more")
    }

    fn visit_str<E>(self, address: &str) -> Result<Backend, E> {
        Ok(Backend::Address(address.to_owned()))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Backend, A::Error> {
        DescribedBackend::deserialize(MapAccessDeserializer::new(map))
            .map(|backend| Backend::Described(Box::new(backend)))
    }
}
