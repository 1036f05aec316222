//! Objects as they are written in a file.
//!
//! Each field is read as what it is in an object of this kind as soon as that is known, which it is before any large field in
//! what kubectl prints: nothing is kept to be read again, and a mistake has its place.

use std::{collections::BTreeMap, fmt, mem};

use k8s_openapi::{
    api::{
        core::v1::{Node, Service},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, Error, IgnoredAny, MapAccess, Visitor},
};
use serde_json::Value;

/// An object of a file; what `kubectl get -o yaml` prints.
#[derive(Debug)]
pub enum Object {
    /// A Service.
    Service(Box<Service>),
    /// A part of a Service's endpoints.
    EndpointSlice(Box<EndpointSlice>),
    /// A node.
    Node(Box<Node>),
    /// Several objects.
    List(Vec<Object>),
    /// Something that is of no concern here.
    Other,
}

/// The fields of an object's metadata that are of concern; others, such as `managedFields`, are larger than all the rest.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Metadata {
    name: Option<String>,
    namespace: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    creation_timestamp: Option<Time>,
    deletion_timestamp: Option<Time>,
}

impl From<Metadata> for ObjectMeta {
    fn from(metadata: Metadata) -> Self {
        let Metadata { name, namespace, labels, creation_timestamp, deletion_timestamp } = metadata;
        Self { name, namespace, labels, creation_timestamp, deletion_timestamp, ..Self::default() }
    }
}

impl Object {
    /// One without fields, if it is known by now what it is. Of another group, a Service is something else.
    fn new(kind: Option<&str>, version: Option<&str>) -> Option<Self> {
        let group = version.map(|version| version.rsplit_once('/').map_or("", |(group, _)| group));
        Some(match (kind, group) {
            (Some("Service"), None | Some("")) => Self::Service(Box::default()),
            (Some("Node"), None | Some("")) => Self::Node(Box::default()),
            (Some("EndpointSlice"), None) | (None | Some("EndpointSlice"), Some("discovery.k8s.io")) => {
                Self::EndpointSlice(Box::default())
            }
            (Some("List" | "ServiceList" | "EndpointSliceList" | "NodeList"), _) => Self::List(Vec::new()),
            (Some(_), _) => Self::Other,
            (None, _) => return None,
        })
    }
}

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ObjectVisitor)
    }
}

struct ObjectVisitor;

impl<'de> Visitor<'de> for ObjectVisitor {
    type Value = Object;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a Kubernetes object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
        let (mut kind, mut version) = (None::<String>, None::<String>);
        let (mut object, mut metadata, mut objects) = (None, Metadata::default(), Vec::new());
        // What comes before the kind.
        let mut early = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            match (&*name, &mut object) {
                ("kind" | "apiVersion", known) => {
                    *(if name == "kind" { &mut kind } else { &mut version }) = map.next_value()?;
                    let now = Object::new(kind.as_deref(), version.as_deref());
                    if known.as_ref().map(mem::discriminant) != now.as_ref().map(mem::discriminant) {
                        *known = now;
                    }
                }
                ("metadata", _) => metadata = map.next_value::<Option<_>>()?.unwrap_or_default(),
                ("items", _) => objects = map.next_value::<Option<_>>()?.unwrap_or_default(),
                (_, Some(object)) => map.next_value_seed(Field { object, name: &name })?,
                ("addressType" | "endpoints" | "ports" | "spec" | "status", None) => {
                    early.push((name, map.next_value::<Value>()?));
                }
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        let (Some(mut object), Some(_)) = (object, kind) else { return Err(A::Error::missing_field("kind")) };
        for (name, value) in early {
            let field = Field { object: &mut object, name: &name };
            field.deserialize(value).map_err(|error| A::Error::custom(format_args!("{name}: {error}")))?;
        }
        match &mut object {
            Object::Service(service) => service.metadata = metadata.into(),
            Object::EndpointSlice(slice) => slice.metadata = metadata.into(),
            Object::Node(node) => node.metadata = metadata.into(),
            Object::List(of) => *of = objects,
            Object::Other => {}
        }
        Ok(object)
    }
}

/// A field of an object, which is to be put there.
struct Field<'a> {
    object: &'a mut Object,
    name: &'a str,
}

impl<'de> DeserializeSeed<'de> for Field<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, value: D) -> Result<(), D::Error> {
        match (self.object, self.name) {
            (Object::Service(service), "spec") => service.spec = Deserialize::deserialize(value)?,
            (Object::Service(service), "status") => service.status = Deserialize::deserialize(value)?,
            (Object::EndpointSlice(slice), "addressType") => {
                slice.address_type = Option::deserialize(value)?.unwrap_or_default();
            }
            (Object::EndpointSlice(slice), "endpoints") => slice.endpoints = Deserialize::deserialize(value)?,
            (Object::EndpointSlice(slice), "ports") => slice.ports = Deserialize::deserialize(value)?,
            // Its status is long, and of no concern.
            (Object::Node(node), "spec") => node.spec = Deserialize::deserialize(value)?,
            _ => drop(IgnoredAny::deserialize(value)?),
        }
        Ok(())
    }
}
