//! Kubernetes objects in place of a services file: YAML of one document or many, or JSON, as kubectl prints them.

use super::{
    remarks::{Position, Remarks},
    wire,
};
use crate::source::{kubernetes::Object, text::shown};

/// The objects in a file; `None` if it is not one of objects.
pub(super) fn decode(text: &str) -> Option<Result<Vec<Object>, Remarks>> {
    if text.trim_start().starts_with('{') {
        // No field of a services file is called so.
        let mut kinds = text.match_indices("\"kind\"").filter_map(|(at, kind)| text.get(at + kind.len()..));
        return kinds.any(|rest| rest.trim_start().starts_with(':')).then(|| from_json(text).and_then(expect_some));
    }
    let is_of_objects = |line: &str| line.starts_with("kind:") || line.starts_with("apiVersion:");
    text.lines().any(is_of_objects).then(|| from_yaml(text).and_then(expect_some))
}

/// Not the same as none: objects of other kinds must not remove every service.
fn expect_some(objects: Vec<Object>) -> Result<Vec<Object>, Remarks> {
    if objects.iter().all(|object| matches!(object, Object::Other)) {
        let remark = "no Service, EndpointSlice or List of them is here; an empty List says that there are none";
        return Err(Remarks::one(Position::START, remark.to_owned()));
    }
    Ok(objects)
}

fn from_json(text: &str) -> Result<Vec<Object>, Remarks> {
    serde_json::from_str(text).map(|object| vec![object]).map_err(|error| {
        let at = Position { line: error.line() as u64, column: error.column() as u64 };
        // The place stands before it already.
        let text = error.to_string();
        Remarks::one(at, shown(text.rsplit_once(" at line ").map_or(&*text, |(text, _)| text)))
    })
}

fn from_yaml(text: &str) -> Result<Vec<Object>, Remarks> {
    serde_saphyr::from_multiple_with_options(text, wire::options()).map_err(|error| {
        let at = error.location().map_or(Position::START, Position::from);
        Remarks::one(at, wire::explain(&error))
    })
}
