//! What a request is answered with.

use std::{
    convert::Infallible,
    sync::{Arc, atomic::AtomicUsize},
};

use futures::{Stream, StreamExt as _, stream};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    Method, Response,
    body::{Body, Bytes, Frame, Incoming},
    header,
};
use serde_json::{Value, json};

use super::{
    list::list,
    query::Query,
    resource::Place,
    state::{Request, State},
    status::Refusal,
    watch,
};

type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

/// A request whose body has not been read.
type Asked = hyper::Request<Incoming>;

/// Where anyone may ask how the server is.
const HEALTH: [&str; 3] = ["/readyz", "/livez", "/healthz"];

pub(super) async fn answer(state: &Arc<State>, connection: &Arc<AtomicUsize>, request: Asked) -> Answer {
    remember(state, &request);
    let answer = match admit(state, &request) {
        Ok(()) => answer_admitted(state, connection, request).await,
        Err(refusal) => Err(refusal),
    };
    answer.unwrap_or_else(|refusal| refuse(&refusal))
}

fn remember(state: &State, request: &Asked) {
    let (path, query) = (request.uri().path().to_owned(), request.uri().query().unwrap_or_default().to_owned());
    state.requests().push(Request { method: request.method().to_string(), path, query });
}

/// Whether the server is well, and knows who asks.
fn admit(state: &State, request: &Asked) -> Result<(), Refusal> {
    let mut manner = state.manner();
    if manner.failures.0 > 0 {
        manner.failures.0 -= 1;
        return Err(Refusal::trouble(manner.failures.1));
    }
    let given =
        request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    let open = HEALTH.contains(&request.uri().path());
    if open || manner.token.is_none() || given == manner.token.as_deref() {
        Ok(())
    } else {
        Err(Refusal::unauthorized())
    }
}

async fn answer_admitted(state: &Arc<State>, connection: &Arc<AtomicUsize>, request: Asked) -> Result<Answer, Refusal> {
    let path = request.uri().path();
    if HEALTH.contains(&path) {
        return Ok(respond(200, "text/plain; charset=utf-8", Full::from("ok")));
    }
    if path == "/version" {
        return Ok(object(200, &version()));
    }
    let place = Place::of(path).ok_or_else(Refusal::no_such_path)?;
    let query = Query::parse(request.uri().query().unwrap_or_default());
    let method = request.method().clone();
    let verb = verb(&method, &place, &query)?;
    permit(state, verb, &place)?;
    match verb {
        "get" => get(state, &place),
        "watch" => watch(state, connection, &place, &query),
        "list" => {
            let pieces = list(&state.store(), &place, &query.list()?)?;
            Ok(stream_of(stream::iter(pieces)))
        }
        "create" => create(state, &place, read(request).await?),
        _ => patch(state, &place, &read(request).await?),
    }
}

/// What permissions call it.
fn verb(method: &Method, place: &Place, query: &Query) -> Result<&'static str, Refusal> {
    match (method.as_str(), place.name.is_some()) {
        ("GET", _) if query.is_watch() => Ok("watch"),
        ("GET", true) => Ok("get"),
        ("GET", false) => Ok("list"),
        ("POST", false) => Ok("create"),
        ("PATCH", true) => Ok("patch"),
        _ => Err(Refusal::method_not_allowed()),
    }
}

fn permit(state: &State, verb: &str, place: &Place) -> Result<(), Refusal> {
    let resource = place.resource();
    let forbidden = state.manner().forbidden.iter().any(|(v, plural)| v == verb && plural == resource.plural);
    if forbidden { Err(Refusal::forbidden(verb, resource.plural, resource.group())) } else { Ok(()) }
}

fn get(state: &State, place: &Place) -> Result<Answer, Refusal> {
    let store = state.store();
    let found = store.objects(place.resource).get(&place.key());
    let found = found.ok_or_else(|| Refusal::no_such_object(place.resource().plural, &place.key().1))?;
    Ok(object(200, &place.resource().value(&found.body)))
}

fn watch(state: &Arc<State>, connection: &Arc<AtomicUsize>, place: &Place, query: &Query) -> Result<Answer, Refusal> {
    let (streaming_lists, plain_gone) = {
        let manner = state.manner();
        (manner.streaming_lists, manner.plain_gone)
    };
    let lines = query.watch(streaming_lists).and_then(|query| watch::watch(state, connection, place, query));
    match lines {
        Ok(lines) => Ok(stream_of(lines)),
        Err(refusal) if refusal.code == 410 && !plain_gone => Ok(stream_of(stream::iter([watch::error(&refusal)]))),
        Err(refusal) => Err(refusal),
    }
}

fn create(state: &State, place: &Place, mut object: Value) -> Result<Answer, Refusal> {
    let resource = place.resource();
    if let Some(namespace) = &place.namespace {
        metadata(&mut object)?.insert("namespace".to_owned(), namespace.as_str().into());
    }
    let name = metadata(&mut object)?.get("name").and_then(Value::as_str).map(str::to_owned);
    let generated = metadata(&mut object)?.get("generateName").is_some_and(Value::is_string);
    let mut store = state.store();
    match &name {
        Some(name) if store.objects(place.resource).contains_key(&place.key_of(name)) => {
            return Err(Refusal::already_exists(resource.plural, name));
        }
        None if !generated => return Err(Refusal::invalid("name or generateName is required")),
        _ => {}
    }
    let new = store.put(place.resource, object);
    state.changed.send_replace(());
    Ok(self::object(201, &resource.value(&new.body)))
}

fn patch(state: &State, place: &Place, patch: &Value) -> Result<Answer, Refusal> {
    let resource = place.resource();
    let mut store = state.store();
    let old = store.objects(place.resource).get(&place.key());
    let old = old.ok_or_else(|| Refusal::no_such_object(resource.plural, &place.key().1))?;
    let mut object = resource.value(&old.body);
    merge(&mut object, patch);
    metadata(&mut object)?.insert("name".to_owned(), place.key().1.into());
    let new = store.put(place.resource, object);
    state.changed.send_replace(());
    Ok(self::object(200, &resource.value(&new.body)))
}

/// Merges a patch into an object, as RFC 7386 has it.
fn merge(object: &mut Value, patch: &Value) {
    let Value::Object(fields) = patch else {
        *object = patch.clone();
        return;
    };
    if !object.is_object() {
        *object = json!({});
    }
    for (field, value) in fields {
        if value.is_null() {
            object.as_object_mut().and_then(|object| object.remove(field));
        } else {
            merge(&mut object[field], value);
        }
    }
}

fn metadata(object: &mut Value) -> Result<&mut serde_json::Map<String, Value>, Refusal> {
    let metadata = object.get_mut("metadata").and_then(Value::as_object_mut);
    metadata.ok_or_else(|| Refusal::bad_request("the object provided has no metadata"))
}

async fn read(request: Asked) -> Result<Value, Refusal> {
    let body = request.into_body().collect().await.map_err(|error| Refusal::bad_request(error.to_string()))?;
    serde_json::from_slice(&body.to_bytes()).map_err(|error| Refusal::bad_request(error.to_string()))
}

fn version() -> Value {
    json!({
        "major": "1", "minor": "36", "gitVersion": "v1.36.0", "gitCommit": "0000000000000000000000000000000000000000",
        "gitTreeState": "clean", "buildDate": "2026-04-22T00:00:00Z", "goVersion": "go1.26.0", "compiler": "gc",
        "platform": "linux/amd64",
    })
}

fn refuse(refusal: &Refusal) -> Answer {
    let mut answer = object(refusal.code, &refusal.status());
    if refusal.code == 429 {
        answer.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
    }
    answer
}

fn object(code: u16, object: &Value) -> Answer {
    respond(code, "application/json", Full::from(object.to_string()))
}

fn stream_of(pieces: impl Stream<Item = Bytes> + Send + 'static) -> Answer {
    respond(200, "application/json", StreamBody::new(pieces.map(|piece| Ok(Frame::data(piece)))))
}

fn respond(
    code: u16,
    content: &'static str,
    body: impl Body<Data = Bytes, Error = Infallible> + Send + 'static,
) -> Answer {
    let answer = Response::builder().status(code).header(header::CONTENT_TYPE, content);
    answer.header(header::CACHE_CONTROL, "no-cache, private").body(body.boxed_unsync()).expect("these are headers")
}
