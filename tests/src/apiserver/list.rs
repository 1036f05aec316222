//! Lists: what there is, whole or page by page.

use std::{
    borrow::Cow,
    iter, mem,
    ops::Bound::{Excluded, Unbounded},
    sync::Arc,
};

use hyper::body::Bytes;
use serde_json::json;

use super::{
    query::{From, ListQuery, token},
    resource::{Place, RESOURCES},
    status::Refusal,
    store::{Key, Object, Objects, Store},
};

/// How many bytes are sent at a time, or an object more.
const PIECE: usize = 1 << 16;

/// A page of a list, or all of it.
struct Page {
    version: u64,
    items: Vec<Arc<Object>>,
    /// How many come after these.
    rest: usize,
}

/// The JSON of a list, in pieces.
pub(super) fn list(
    store: &Store,
    place: &Place,
    query: &ListQuery,
) -> Result<impl Iterator<Item = Bytes> + Send + use<>, Refusal> {
    let page = page(store, place, query)?;
    let resource = &RESOURCES[place.resource];
    let mut metadata = json!({ "resourceVersion": page.version.to_string() });
    if let (1.., Some(last)) = (page.rest, page.items.last()) {
        metadata["continue"] = token(page.version, &last.key()).into();
        if query.selector.is_empty() {
            metadata["remainingItemCount"] = page.rest.into();
        }
    }
    let (kind, version) = (resource.kind, resource.api_version);
    let head = format!(r#"{{"kind":"{kind}List","apiVersion":"{version}","metadata":{metadata},"items":["#);
    Ok(pieces(head, page.items))
}

fn page(store: &Store, place: &Place, query: &ListQuery) -> Result<Page, Refusal> {
    let (version, objects, after) = source(store, place.resource, &query.from)?;
    let matches = |object: &&Arc<Object>| {
        place.namespace.as_ref().is_none_or(|it| *it == object.namespace) && query.selector.takes(object)
    };
    let from = after.map_or(Unbounded, Excluded);
    let mut matching = objects.range((from, Unbounded)).map(|(_, object)| object).filter(matches);
    let items = matching.by_ref().take(query.limit.unwrap_or(usize::MAX)).cloned().collect();
    Ok(Page { version, items, rest: matching.count() })
}

/// The objects that a list is taken from, their version, and the object after which it goes on.
fn source<'a>(store: &'a Store, resource: usize, from: &From) -> Result<(u64, Cow<'a, Objects>, Option<Key>), Refusal> {
    let (version, after) = match from {
        From::NotOlderThan(version) => ((*version).max(store.version()), None),
        From::Exactly(version) => (*version, None),
        From::Continued(version, after) => (*version, Some(after.clone())),
    };
    let objects = store.objects_at(resource, version);
    let too_old = |refusal: Refusal| if after.is_some() { Refusal::continue_too_old() } else { refusal };
    Ok((version, objects.map_err(too_old)?, after))
}

fn pieces(head: String, items: Vec<Arc<Object>>) -> impl Iterator<Item = Bytes> + Send {
    let mut piece = head.into_bytes();
    let mut items = items.into_iter();
    let mut separator = "";
    let mut done = false;
    iter::from_fn(move || {
        while !done && piece.len() < PIECE {
            if let Some(object) = items.next() {
                piece.extend_from_slice(separator.as_bytes());
                piece.extend_from_slice(&object.body);
                separator = ",";
            } else {
                piece.extend_from_slice(b"]}\n");
                done = true;
            }
        }
        (!piece.is_empty()).then(|| mem::take(&mut piece).into())
    })
}
