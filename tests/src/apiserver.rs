//! A Kubernetes API server that is none: it has services, endpoint slices, nodes and events, and all the trouble that one can ask of it.
//!
//! It speaks what clients of the real one rely on: lists in pages, watches with bookmarks, lists as watches, selectors,
//! versions that are forgotten. Objects are what a test says, and nothing comes of them: there are no controllers.
//!
//! ```
//! use tests::apiserver::{ApiServer, objects::service};
//!
//! let server = ApiServer::start();
//! server.apply(service("default", "web").cluster_ips(["10.96.0.7"]).port("http", 80));
//! // … a client lists and watches `server.url()` …
//! server.compact(); // Whoever comes back with a version that it knows is told that it is too old,
//! server.break_streams(); // and all who watch have to come back.
//! ```

mod answer;
mod list;
pub mod objects;
mod query;
mod resource;
mod selector;
mod state;
mod status;
mod store;
mod watch;
mod wire;

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    thread::{self, JoinHandle},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{net::TcpSocket, runtime};
use tokio_util::sync::CancellationToken;

pub use self::state::Request;
use self::{
    resource::{RESOURCES, index_of},
    state::{Cut, Pace, State},
    wire::listen,
};
use crate::eventually;

/// A server; it ends, with all its connections, when this is dropped.
#[derive(Debug)]
#[must_use = "the server ends when this is dropped"]
pub struct ApiServer {
    state: Arc<State>,
    address: SocketAddr,
    end: CancellationToken,
    thread: Option<JoinHandle<()>>,
    /// Keeps the port from others while nothing listens there.
    _port: TcpSocket,
}

impl ApiServer {
    /// Serves on a port of 127.0.0.1 in the network namespace that the calling thread is in.
    pub fn start() -> Self {
        let port = TcpSocket::new_v4().expect("there are descriptors left");
        port.set_reuseaddr(true).expect("sockets know this");
        port.bind((Ipv4Addr::LOCALHOST, 0).into()).expect("there are ports left");
        let address = port.local_addr().expect("it is bound");
        let (state, end) = (Arc::new(State::new()), CancellationToken::new());
        let (states, ends) = (Arc::clone(&state), end.clone());
        // A thread is born into the namespace of the one that starts it.
        let thread = thread::spawn(move || {
            let runtime =
                runtime::Builder::new_current_thread().enable_all().build().expect("there are descriptors left");
            runtime.block_on(ends.run_until_cancelled(listen(states, address)));
        });
        let server = Self { state, address, end, thread: Some(thread), _port: port };
        server.start_again();
        server
    }

    /// Where it is: `http://127.0.0.1:<port>`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A kubeconfig file in this directory, of a client that does not say who it is.
    pub fn kubeconfig(&self, directory: &Path) -> PathBuf {
        self.write_kubeconfig(directory, &json!({}))
    }

    /// A kubeconfig file in this directory, of a client with this token.
    pub fn kubeconfig_with_token(&self, directory: &Path, token: &str) -> PathBuf {
        self.write_kubeconfig(directory, &json!({ "token": token }))
    }

    fn write_kubeconfig(&self, directory: &Path, user: &Value) -> PathBuf {
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "double",
            "clusters": [{ "name": "double", "cluster": { "server": self.url() } }],
            "contexts": [{ "name": "double", "context": { "cluster": "double", "user": "double" } }],
            "users": [{ "name": "double", "user": user }],
        });
        let path = directory.join("kubeconfig");
        fs::write(&path, format!("{config:#}")).expect("the directory is ours");
        path
    }
}

/// What there is.
impl ApiServer {
    /// Creates an object, or puts it in place of the one of its kind, namespace and name.
    #[track_caller]
    pub fn apply(&self, object: impl Into<Value>) {
        self.apply_all([object]);
    }

    /// [`ApiServer::apply`] for many objects, as one to those who watch.
    #[track_caller]
    pub fn apply_all(&self, objects: impl IntoIterator<Item = impl Into<Value>>) {
        let objects: Vec<Value> = objects.into_iter().map(Into::into).collect();
        let mut store = self.state.store();
        for object in objects {
            store.put(index_of(object["kind"].as_str().unwrap_or("object without a kind")), object);
        }
        drop(store);
        self.state.changed.send_replace(());
    }

    /// [`ApiServer::apply`] for the documents of a manifest.
    #[track_caller]
    pub fn apply_yaml(&self, text: &str) {
        self.apply_all(serde_saphyr::from_multiple::<Value>(text).expect("the test has written YAML"));
    }

    /// Deletes an object, of which there has to be one. Nodes are in no namespace: `""`.
    #[track_caller]
    pub fn delete(&self, kind: &str, namespace: &str, name: &str) {
        let key = (namespace.to_owned(), name.to_owned());
        let was_there = self.state.store().delete(index_of(kind), &key);
        assert!(was_there, "there is no {kind} {namespace}/{name}");
        self.state.changed.send_replace(());
    }

    /// An object.
    #[track_caller]
    pub fn get(&self, kind: &str, namespace: &str, name: &str) -> Option<Value> {
        let resource = index_of(kind);
        let store = self.state.store();
        let object = store.objects(resource).get(&(namespace.to_owned(), name.to_owned()))?;
        Some(RESOURCES[resource].value(&object.body))
    }

    /// All objects of a kind, such as the events that clients have sent.
    #[track_caller]
    pub fn all(&self, kind: &str) -> Vec<Value> {
        let resource = index_of(kind);
        self.state.store().objects(resource).values().map(|object| RESOURCES[resource].value(&object.body)).collect()
    }

    /// The version of what there is now.
    pub fn version(&self) -> u64 {
        self.state.store().version()
    }
}

/// What clients do.
impl ApiServer {
    /// What was asked for, from the beginning.
    pub fn requests(&self) -> Vec<Request> {
        self.state.requests().clone()
    }

    /// How many watches go on.
    pub fn watchers(&self) -> usize {
        self.state.watchers.load(Ordering::Relaxed)
    }
}

/// How it behaves. Watches that go on are as they were when they began.
impl ApiServer {
    /// Answers 401 to all requests without this token.
    pub fn demand_token(&self, token: &str) {
        self.state.manner().token = Some(token.to_owned());
    }

    /// Answers 403 to requests that would do this (`get`, `list`, `watch`, `create`, `patch`) with a resource (`services`).
    pub fn forbid(&self, verb: &str, plural: &str) {
        self.state.manner().forbidden.push((verb.to_owned(), plural.to_owned()));
    }

    /// Forbids nothing any more.
    pub fn permit_all(&self) {
        self.state.manner().forbidden.clear();
    }

    /// Sends bookmarks this often; at first, each minute.
    pub fn bookmark_every(&self, interval: Duration) {
        self.state.manner().bookmark_every = interval;
    }

    /// Remembers this many changes of a kind, at first 102,400. A watch that has more of them before it is ended.
    pub fn remember(&self, changes: usize) {
        self.state.store().remember(changes);
    }

    /// Knows nothing of lists as watches, as servers before v1.34.
    pub fn refuse_streaming_lists(&self) {
        self.state.manner().streaming_lists = false;
    }

    /// Says that a version is too old by the answer's status, as proxies and old servers do, and not by an event, as it does
    /// at first. The watcher of kube 5.0 then asks for the same again, for ever.
    pub fn refuse_old_versions_plainly(&self) {
        self.state.manner().plain_gone = true;
    }
}

/// Trouble.
impl ApiServer {
    /// Forgets how things came to be. Who watches may go on, but who comes back with a version from before is told that it
    /// is too old.
    pub fn compact(&self) {
        self.state.store().compact();
    }

    /// Cuts the connections of those who watch, in the middle of a line. To cut a list, [`ApiServer::slow`] it and
    /// [`ApiServer::stop`].
    pub fn break_streams(&self) {
        self.state.cut.send_replace(Cut::Watches);
    }

    /// Ends all watches in good order.
    pub fn close_streams(&self) {
        self.state.ended.send_replace(());
    }

    /// Answers this many requests with this status: 429 with `Retry-After`, 500, 503, …
    pub fn fail(&self, requests: usize, code: u16) {
        self.state.manner().failures = (requests, code);
    }

    /// Sends no more bytes, but takes connections and requests, and keeps them.
    pub fn stall(&self) {
        self.state.pace.send_replace(Pace::Stalled);
    }

    /// Sends bytes in small pieces with this pause between them.
    pub fn slow(&self, pause: Duration) {
        self.state.pace.send_replace(Pace::Slow(pause));
    }

    /// Sends as fast as it can again, beginning with what it has kept.
    pub fn resume(&self) {
        self.state.pace.send_replace(Pace::Free);
    }

    /// Takes no more connections; those that there are go on.
    pub fn refuse_connections(&self) {
        self.listen(false);
    }

    /// Stops: cuts all connections, and takes no more. What there is stays.
    pub fn stop(&self) {
        self.listen(false);
        self.state.cut.send_replace(Cut::All);
    }

    /// Takes connections again, on the same port.
    pub fn start_again(&self) {
        self.listen(true);
    }

    fn listen(&self, wanted: bool) {
        self.state.listen.send_replace(wanted);
        eventually("the server listens as it is told", || *self.state.listens.borrow() == wanted);
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.end.cancel();
        // If the thread panicked it has said so; a second panic here could only hide the first.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
