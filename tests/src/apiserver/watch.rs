//! Watches: what has changed, line by line, for as long as somebody listens.

use std::{
    collections::VecDeque,
    future::pending,
    mem,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{Stream, stream};
use hyper::body::Bytes;
use serde_json::{Value, json};
use tokio::{
    sync::watch::Receiver,
    time::{Instant, sleep_until},
};

use super::{
    query::{Start, WatchQuery},
    resource::{Place, RESOURCES, Resource},
    selector::Selector,
    state::State,
    status::Refusal,
    store::{Change, Object},
};

/// How many bytes are sent at a time, or a line more.
const PIECE: usize = 1 << 16;

/// Real servers choose something between this and twice of it.
const TIMEOUT: Duration = Duration::from_secs(30 * 60);

/// A watch that goes on.
struct Watch {
    state: Arc<State>,
    resource: usize,
    namespace: Option<String>,
    selector: Selector,
    /// What came until this version has been told.
    told: u64,
    /// What there was at the beginning, as far as it has not been told.
    initial: VecDeque<Arc<Object>>,
    /// Whether the end of that is to be told.
    announces: bool,
    bookmark_at: Option<Instant>,
    deadline: Instant,
    changed: Receiver<()>,
    ended: Receiver<()>,
    over: bool,
    _presence: Presence,
}

/// Counts a watch for as long as it goes on.
struct Presence {
    state: Arc<State>,
    connection: Arc<AtomicUsize>,
}

/// What a watch waited for.
enum Event {
    Changed,
    Bookmark,
    Timeout,
    Ended,
}

/// The lines of a watch, in pieces; `connection` counts those of a connection.
pub(super) fn watch(
    state: &Arc<State>,
    connection: &Arc<AtomicUsize>,
    place: &Place,
    query: WatchQuery,
) -> Result<impl Stream<Item = Bytes> + use<>, Refusal> {
    let presence = Presence::new(Arc::clone(state), Arc::clone(connection));
    let watch = Watch::start(state, presence, place, query)?;
    Ok(stream::unfold(watch, |mut watch| async { watch.next().await.map(|piece| (piece, watch)) }))
}

/// The only line of a watch that can't begin.
pub(super) fn error(refusal: &Refusal) -> Bytes {
    line("ERROR", &refusal.status())
}

impl Watch {
    fn start(state: &Arc<State>, presence: Presence, place: &Place, query: WatchQuery) -> Result<Self, Refusal> {
        let (changed, ended) = (state.changed.subscribe(), state.ended.subscribe());
        let now = Instant::now();
        let bookmark_at = query.bookmarks.then(|| now + state.manner().bookmark_every);
        let mut watch = Self {
            resource: place.resource,
            namespace: place.namespace.clone(),
            selector: query.selector.named(place.name.as_deref()),
            told: 0,
            initial: VecDeque::new(),
            announces: false,
            bookmark_at,
            deadline: now + query.timeout.filter(|timeout| !timeout.is_zero()).unwrap_or(TIMEOUT),
            changed,
            ended,
            over: false,
            _presence: presence,
            state: Arc::clone(state),
        };
        let store = state.store();
        match query.start {
            Start::After(version) => {
                store.check_remembered(watch.resource, version)?;
                watch.told = version;
            }
            Start::Everything { announced, not_older_than } => {
                let objects = store.objects_at(watch.resource, store.version().max(not_older_than))?;
                watch.initial = objects.values().filter(|object| watch.is_about(object)).cloned().collect();
                watch.told = store.version();
                watch.announces = announced && query.bookmarks;
            }
        }
        Ok(watch)
    }

    fn is_about(&self, object: &Object) -> bool {
        self.namespace.as_ref().is_none_or(|it| *it == object.namespace) && self.selector.takes(object)
    }

    /// The next lines; `None` at the end.
    async fn next(&mut self) -> Option<Bytes> {
        let initial = self.initial();
        if !initial.is_empty() {
            return Some(initial.into());
        }
        while !self.over {
            let changes = self.changes()?;
            if !changes.is_empty() {
                return Some(changes.into());
            }
            match self.wait().await {
                Event::Changed => {}
                Event::Ended => return None,
                Event::Timeout => {
                    self.over = true;
                    return if self.bookmark_at.is_some() { self.bookmark() } else { None };
                }
                Event::Bookmark => {
                    self.bookmark_at = Some(Instant::now() + self.state.manner().bookmark_every);
                    return self.bookmark();
                }
            }
        }
        None
    }

    async fn wait(&mut self) -> Event {
        let bookmark_at = self.bookmark_at;
        let bookmark = async {
            match bookmark_at {
                Some(at) => sleep_until(at).await,
                None => pending().await,
            }
        };
        tokio::select! {
            biased;
            _ = self.ended.changed() => Event::Ended,
            () = sleep_until(self.deadline) => Event::Timeout,
            () = bookmark => Event::Bookmark,
            // Last, for it may always be so.
            _ = self.changed.changed() => Event::Changed,
        }
    }

    /// What there was at the beginning: the next piece of it.
    fn initial(&mut self) -> Vec<u8> {
        let resource = &RESOURCES[self.resource];
        let mut piece = Vec::new();
        while piece.len() < PIECE
            && let Some(object) = self.initial.pop_front()
        {
            write_object(&mut piece, "ADDED", resource, &object.body);
        }
        if self.initial.is_empty() && mem::take(&mut self.announces) {
            let annotations = json!({ "k8s.io/initial-events-end": "true" });
            piece.extend(self.bookmark_line(&annotations));
        }
        piece
    }

    /// What has changed: the next piece of it; `None` if there is too much.
    fn changes(&mut self) -> Option<Vec<u8>> {
        let state = Arc::clone(&self.state);
        let store = state.store();
        let mut piece = Vec::new();
        for change in store.changes_after(self.resource, self.told)? {
            if let Some((event, body)) = self.seen(change) {
                write_object(&mut piece, event, &RESOURCES[self.resource], body);
            }
            self.told = change.version;
            if piece.len() >= PIECE {
                return Some(piece);
            }
        }
        self.told = self.told.max(store.version());
        Some(piece)
    }

    /// How a change looks to whom objects exist only while they are selected.
    fn seen<'a>(&self, change: &'a Change) -> Option<(&'static str, &'a Bytes)> {
        let is_about = |object: &&Arc<Object>| self.is_about(object);
        match (change.old.as_ref().filter(is_about), change.new.as_ref().filter(is_about)) {
            (None, Some(new)) => Some(("ADDED", &new.body)),
            (Some(_), Some(new)) => Some(("MODIFIED", &new.body)),
            (Some(_), None) => Some(("DELETED", change.last())),
            (None, None) => None,
        }
    }

    /// That there is nothing new but the version, after what there is new.
    fn bookmark(&mut self) -> Option<Bytes> {
        let mut piece = Vec::new();
        loop {
            let changes = self.changes()?;
            if changes.is_empty() {
                break;
            }
            piece.extend(changes);
        }
        piece.extend(self.bookmark_line(&Value::Null));
        Some(piece.into())
    }

    fn bookmark_line(&self, annotations: &Value) -> Bytes {
        let resource = &RESOURCES[self.resource];
        let mut metadata = json!({ "resourceVersion": self.told.to_string() });
        if !annotations.is_null() {
            metadata["annotations"] = annotations.clone();
        }
        let object = json!({ "kind": resource.kind, "apiVersion": resource.api_version, "metadata": metadata });
        line("BOOKMARK", &object)
    }
}

impl Presence {
    fn new(state: Arc<State>, connection: Arc<AtomicUsize>) -> Self {
        state.watchers.fetch_add(1, Ordering::Relaxed);
        connection.fetch_add(1, Ordering::Relaxed);
        Self { state, connection }
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.state.watchers.fetch_sub(1, Ordering::Relaxed);
        self.connection.fetch_sub(1, Ordering::Relaxed);
    }
}

fn line(event: &str, object: &Value) -> Bytes {
    format!("{}\n", json!({ "type": event, "object": object })).into()
}

/// Writes the line of an object whose JSON there is.
fn write_object(piece: &mut Vec<u8>, event: &str, resource: &Resource, body: &Bytes) {
    piece.extend_from_slice(format!(r#"{{"type":"{event}","object":"#).as_bytes());
    resource.write(piece, body);
    piece.extend_from_slice(b"}\n");
}
