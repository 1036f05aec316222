//! Follows an API server.
//!
//! Nothing is said before all first lists are complete. From then on each change is said as soon as the agent takes it, and
//! changes that come meanwhile are said together. While the server can't be reached, what was said last stays.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, iter, mem,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{StreamExt as _, TryStreamExt as _, future::ready};
use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client, Config, Resource,
    config::{KubeConfigOptions, Kubeconfig},
    runtime::{
        WatchStreamExt as _,
        watcher::{self, DefaultBackoff, Event, watcher},
    },
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::mpsc,
    task::spawn_blocking,
    time::{sleep, sleep_until},
};
use tracing::{info, warn};

use super::{
    cluster::Cluster,
    convert::{HEADLESS, ObjectName, PROXY_NAME, object_name},
};
use crate::{
    describe,
    source::{Loaded, Update},
};

/// How to reach the API server, and which node this is.
#[derive(Clone, Debug)]
pub struct Connection {
    /// A kubeconfig; where there is none, what a pod finds in its own file system and environment.
    pub kubeconfig: Option<PathBuf>,
    /// The server's URL, in place of the one that is found there.
    pub master: Option<String>,
    /// How this node is called.
    pub node_name: Option<Arc<str>>,
    /// How often everything is made anew of what the server has said.
    pub sync_period: Duration,
}

/// What a service account is known by; read again, as it is replaced now and then.
const TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

impl Connection {
    /// The files that it may read again.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let Some(kubeconfig) = &self.kubeconfig else { return vec![TOKEN.into()] };
        let Kubeconfig { auth_infos, clusters, .. } = Kubeconfig::read_from(kubeconfig).unwrap_or_default();
        let users = auth_infos.into_iter().filter_map(|it| it.auth_info);
        let of_users = users.flat_map(|it| [it.token_file, it.client_certificate, it.client_key]);
        let of_servers = clusters.into_iter().filter_map(|it| it.cluster).map(|it| it.certificate_authority);
        let named = of_users.chain(of_servers).flatten().map(PathBuf::from);
        iter::once(kubeconfig.clone()).chain(named).collect()
    }
}

/// Why nothing can be said.
#[derive(Debug, thiserror::Error)]
pub enum KubernetesError {
    /// There is no telling where the server is.
    #[error(
        "how to reach the API server is not known: {0}; in a pod, that takes its service account, elsewhere --kubeconfig"
    )]
    Config(String),
    /// The kubeconfig names a proxy, at this host.
    #[error(
        "the kubeconfig reaches the API server by a proxy ({0}), which wharf can't; without `proxy-url` there it is \
         reached as it is, and --master names another address"
    )]
    Proxy(String),
    /// Not everything can be listed and followed now.
    #[error("{0}")]
    Follow(String),
}

/// What of a cluster can't be followed now.
#[derive(Debug, Default)]
struct Troubles(BTreeMap<&'static str, Trouble>);

#[derive(Debug)]
struct Trouble {
    why: String,
    /// When it was last so.
    last: Instant,
}

/// For how long no error has to come until a resource is taken to be well again of which nothing comes: longer than it may take until
/// the next one. A watcher waits for twice the 30 s of [`DefaultBackoff`] at the most, then for a connection, then for an answer.
const CALM: Duration = Duration::from_secs(60 + CONNECTING.as_secs() + SILENCE.as_secs() + 10);

/// How long a server may take to accept a connection.
const CONNECTING: Duration = Duration::from_secs(10);

/// How long to wait until a configuration that can't be read is read again.
const PAUSE: Duration = Duration::from_secs(5);

/// How long a server may say nothing to who follows something: it sends a bookmark every minute (`defaultBookmarkFrequency` in the
/// API server's `storage/cacher`). One that went away without a word would else be listened to for five minutes.
const SILENCE: Duration = Duration::from_secs(90);

/// What a task that follows one resource says.
#[expect(clippy::large_enum_variant, reason = "nearly all of them are objects, which are large")]
enum Item {
    Service(Event<Service>),
    Slice(Event<EndpointSlice>),
    Node(Event<Node>),
    Error(&'static str, watcher::Error),
}

const SERVICES: &str = "Services";
const SLICES: &str = "EndpointSlices";
const NODE: &str = "Node";

/// Says what is wanted whenever that changes, until nobody listens.
pub async fn watch(connection: Connection, updates: mpsc::Sender<Update>) {
    let client = loop {
        match client(&connection).await {
            Ok((client, url)) => {
                info!("following the API server at {url}");
                break client;
            }
            Err(error) => {
                if updates.send(Err(error.into())).await.is_err() {
                    return;
                }
            }
        }
        sleep(PAUSE).await;
    };
    let (sender, items) = mpsc::channel(1024);
    let by = (connection.clone(), client);
    // Of those that either label takes out of our hands the server tells nothing.
    let labels = watcher::Config::default().labels(&format!("!{HEADLESS},!{PROXY_NAME}"));
    tokio::spawn(follow(SERVICES, by.clone(), labels.clone(), Item::Service, sender.clone()));
    tokio::spawn(follow(SLICES, by.clone(), labels, Item::Slice, sender.clone()));
    if let Some(name) = &connection.node_name {
        let this = watcher::Config::default().fields(&format!("metadata.name={name}"));
        tokio::spawn(follow(NODE, by, this, Item::Node, sender));
    }
    Follower::new(connection.node_name, connection.sync_period, items).run(&updates).await;
}

/// A client, and the server's URL.
async fn client(connection: &Connection) -> Result<(Client, String), KubernetesError> {
    let wrong = |error: &dyn fmt::Display| KubernetesError::Config(error.to_string());
    let mut config = match &connection.kubeconfig {
        Some(path) => {
            let kubeconfig = Kubeconfig::read_from(path).map_err(|error| wrong(&error))?;
            let (options, names_proxy) = (KubeConfigOptions::default(), names_proxy(&kubeconfig));
            let mut config =
                Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(|error| wrong(&error))?;
            // What is left is of the environment, and is taken in without a look at `NO_PROXY`.
            config.proxy_url = config.proxy_url.filter(|_| names_proxy);
            config
        }
        None => Config::incluster().map_err(|error| wrong(&error))?,
    };
    if let Some(proxy) = &config.proxy_url {
        return Err(KubernetesError::Proxy(proxy.host().unwrap_or_default().to_owned()));
    }
    if let Some(master) = &connection.master {
        config.cluster_url = master.parse().map_err(|error| wrong(&error))?;
    }
    let url = config.cluster_url.to_string();
    // A program that a kubeconfig names for credentials is waited for.
    let client = spawn_blocking(|| with_limit(config, SILENCE)).await.map_err(|error| wrong(&error))?;
    Ok((client.map_err(|error| wrong(&error))?, url))
}

/// Whether a kubeconfig itself says by which proxy its cluster is reached.
fn names_proxy(kubeconfig: &Kubeconfig) -> bool {
    let context = kubeconfig.contexts.iter().find(|it| Some(&it.name) == kubeconfig.current_context.as_ref());
    let name = context.and_then(|it| it.context.as_ref()).map(|it| &it.cluster);
    let cluster = kubeconfig.clusters.iter().find(|it| Some(&it.name) == name);
    cluster.and_then(|it| it.cluster.as_ref()?.proxy_url.as_ref()).is_some_and(|url| !url.is_empty())
}

/// A client that takes a server for gone which says nothing for so long, though it was asked.
fn with_limit(mut config: Config, silence: Duration) -> kube::Result<Client> {
    config.connect_timeout = Some(CONNECTING);
    // It would try again by itself for minutes, and nobody would hear of it.
    config.default_retry = false;
    config.read_timeout = Some(silence);
    // What counts is the time since the last question, and not since the last answer.
    config.reset_reader_on_write = true;
    Client::try_from(config)
}

/// Follows one resource until nobody listens.
async fn follow<K>(
    kind: &'static str,
    (connection, mut client): (Connection, Client),
    config: watcher::Config,
    item: fn(Event<K>) -> Item,
    items: mpsc::Sender<Item>,
) where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + fmt::Debug + Send + 'static,
{
    let mut pauses = DefaultBackoff::default();
    loop {
        let api = Api::<K>::all(client.clone());
        // That a list is to begin is said before the server is asked: it is no success, after which the next pause would be the shortest.
        let events = watcher(api, config.clone()).try_filter(|it| ready(!matches!(it, Event::Init)));
        let mut events = events.backoff(DefaultBackoff::default()).boxed();
        while let Some(event) = events.next().await {
            let error = event.as_ref().err();
            let (is_unknown, is_stuck) = (error.is_some_and(is_unknown), error.is_some_and(is_stuck));
            let said = match event {
                Ok(event) => {
                    pauses = DefaultBackoff::default();
                    item(event)
                }
                Err(error) => Item::Error(kind, error),
            };
            if items.send(said).await.is_err() {
                return;
            }
            if is_unknown {
                sleep(pauses.next().unwrap_or(PAUSE)).await;
                match self::client(&connection).await {
                    Ok((new, _)) => client = new,
                    Err(error) => warn!("{error}"),
                }
            }
            if is_unknown || is_stuck {
                break;
            }
        }
    }
}

/// Whether the server does not know us by what we have shown. Certificates and kubeconfigs are replaced before they expire.
fn is_unknown(error: &watcher::Error) -> bool {
    use watcher::Error::{InitialListFailed, WatchFailed, WatchStartFailed};
    matches!(
        error,
        InitialListFailed(kube::Error::Api(status)) | WatchStartFailed(kube::Error::Api(status)) | WatchFailed(kube::Error::Api(status))
        if status.code == 401
    )
}

/// Whether a watcher would go on asking for a version that the server has forgotten. (It lists anew only where the server
/// says so in a stream that has begun.)
fn is_stuck(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::WatchStartFailed(kube::Error::Api(status)) if status.code == 410)
}

/// Puts together what the tasks say.
struct Follower {
    items: mpsc::Receiver<Item>,
    cluster: Cluster,
    services: Listing,
    slices: Listing,
    node: Listing,
    /// Whether there is something to say.
    has_news: bool,
    troubles: Troubles,
    sync_period: Duration,
    /// When to make everything anew.
    sync_at: Instant,
}

/// The names in a list that is being received.
#[derive(Default)]
struct Listing {
    names: BTreeSet<ObjectName>,
    /// Whether a list was complete once.
    is_synced: bool,
}

impl Follower {
    fn new(node_name: Option<Arc<str>>, sync_period: Duration, items: mpsc::Receiver<Item>) -> Self {
        let node = Listing { is_synced: node_name.is_none(), ..Listing::default() };
        Self {
            items,
            cluster: Cluster::new(node_name),
            services: Listing::default(),
            slices: Listing::default(),
            node,
            has_news: false,
            troubles: Troubles::default(),
            sync_period,
            sync_at: Instant::now() + sync_period,
        }
    }

    async fn run(mut self, updates: &mpsc::Sender<Update>) {
        loop {
            let is_synced = self.services.is_synced && self.slices.is_synced && self.node.is_synced;
            let calm = self.troubles.calm();
            tokio::select! {
                // All that is there is taken in before anything is said.
                biased;
                item = self.items.recv() => match item {
                    Some(item) => self.take(item),
                    None => return,
                },
                permit = updates.reserve(), if self.has_news && (is_synced || !self.troubles.0.is_empty()) => {
                    let Ok(permit) = permit else { return };
                    self.has_news = false;
                    let troubles = (!self.troubles.0.is_empty()).then(|| self.troubles.to_string());
                    permit.send(match troubles {
                        Some(troubles) if !is_synced => Err(KubernetesError::Follow(troubles).into()),
                        troubles => Ok(Loaded { troubles, ..self.cluster.loaded() }),
                    });
                }
                () = sleep_until(calm.unwrap_or_else(Instant::now).into()), if calm.is_some() => {
                    self.troubles.0.retain(|_, trouble| trouble.last + CALM > Instant::now());
                    self.has_news = true;
                }
                () = sleep_until(self.sync_at.into()), if is_synced => {
                    self.has_news |= self.cluster.refresh();
                    self.sync_at = Instant::now() + self.sync_period;
                }
            }
        }
    }

    fn take(&mut self, item: Item) {
        let Self { cluster, services, slices, node, troubles, .. } = self;
        match item {
            Item::Service(event) => {
                troubles.0.remove(SERVICES);
                services.take(event, cluster, Cluster::set_service, Cluster::remove_service, Cluster::keep_services);
            }
            Item::Slice(event) => {
                troubles.0.remove(SLICES);
                slices.take(event, cluster, Cluster::set_slice, Cluster::remove_slice, Cluster::keep_slices);
            }
            Item::Node(event) => {
                troubles.0.remove(NODE);
                node.take(event, cluster, Cluster::set_node, Cluster::remove_node, Cluster::keep_nodes);
            }
            Item::Error(kind, error) => {
                // What was received of a list is received once more.
                match kind {
                    SERVICES => services.names.clear(),
                    SLICES => slices.names.clear(),
                    _ => node.names.clear(),
                }
                self.has_news |= troubles.add(kind, describe(&error));
                return;
            }
        }
        self.has_news = true;
    }
}

impl Troubles {
    /// Another error of a resource; whether that is news.
    fn add(&mut self, kind: &'static str, why: String) -> bool {
        let last = Instant::now();
        let before = self.0.get(kind).is_some_and(|trouble| trouble.why == why);
        self.0.insert(kind, Trouble { why, last });
        !before
    }

    /// When the first of them will be taken to be over.
    fn calm(&self) -> Option<Instant> {
        self.0.values().map(|trouble| trouble.last + CALM).min()
    }
}

impl fmt::Display for Troubles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut kinds = BTreeMap::<_, Vec<_>>::new();
        for (kind, trouble) in &self.0 {
            kinds.entry(&trouble.why).or_default().push(*kind);
        }
        for (i, (why, kinds)) in kinds.into_iter().enumerate() {
            let (separator, kinds) = (if i == 0 { "" } else { "; " }, kinds.join(" and "));
            write!(f, "{separator}the cluster's {kinds} can't be followed, and stay as they were: {why}")?;
        }
        Ok(())
    }
}

impl Listing {
    /// Has the cluster know what is said of a resource, of which it sets objects, removes them, and keeps those of a list.
    fn take<K: Resource>(
        &mut self,
        event: Event<K>,
        cluster: &mut Cluster,
        set: fn(&mut Cluster, &K),
        remove: fn(&mut Cluster, &K),
        keep: fn(&mut Cluster, &BTreeSet<ObjectName>),
    ) {
        match event {
            Event::Apply(object) => set(cluster, &object),
            Event::Delete(object) => remove(cluster, &object),
            // Nobody is told of that.
            Event::Init => {}
            Event::InitApply(object) => {
                self.names.insert(object_name(object.meta()));
                set(cluster, &object);
            }
            Event::InitDone => {
                self.is_synced = true;
                keep(cluster, &mem::take(&mut self.names));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use kube::api::WatchParams;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
        time::timeout,
    };

    use super::*;

    #[tokio::test]
    async fn a_proxy_in_the_kubeconfig_is_told() {
        let kubeconfig = tempfile::NamedTempFile::new().unwrap();
        let connection = connection(&kubeconfig);
        let said = async |line: &str| {
            let cluster = format!("{{ name: c, cluster: {{ server: 'http://192.0.2.1:6443'{line} }} }}");
            let contexts = "contexts: [{ name: x, context: { cluster: c, user: u } }]\ncurrent-context: x";
            std::fs::write(kubeconfig.path(), format!("clusters: [{cluster}]\n{contexts}\nusers: []\n")).unwrap();
            client(&connection).await.map(drop).map_err(|error| error.to_string())
        };
        assert_eq!(said("").await, Ok(()));
        let error = said(", proxy-url: 'http://me:secret@proxy.example:3128'").await.unwrap_err();
        assert!(error.contains("proxy (proxy.example)") && error.contains("proxy-url"), "{error}");
    }

    /// Else each try would be taken for good news, and followed by the shortest pause.
    #[tokio::test]
    async fn that_a_list_is_tried_is_no_news() {
        // It is closed again at once.
        let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let mut items = services(&kubeconfig(&format!("http://{address}"), "any")).await;
        for _ in 0..2 {
            assert!(matches!(next(&mut items).await, Item::Error(SERVICES, _)));
        }
    }

    #[tokio::test]
    async fn what_the_server_does_not_know_us_by_any_more_is_read_again() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            let list = r#"{"kind":"ServiceList","apiVersion":"v1","metadata":{"resourceVersion":"1"},"items":[]}"#;
            let refusal = r#"{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","reason":"Unauthorized","code":401}"#;
            loop {
                let (mut connection, _) = listener.accept().await.unwrap();
                let mut request = [0; 4096];
                let length = connection.read(&mut request).await.unwrap();
                let is_known = String::from_utf8_lossy(&request[..length]).contains("Bearer new\r\n");
                let (status, body) = if is_known { ("200 OK", list) } else { ("401 Unauthorized", refusal) };
                let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
                connection.write_all((head + body).as_bytes()).await.unwrap();
            }
        });
        let file = kubeconfig(&url, "old");
        let mut items = services(&file).await;
        assert!(matches!(next(&mut items).await, Item::Error(SERVICES, error) if is_unknown(&error)));
        std::fs::copy(kubeconfig(&url, "new").path(), file.path()).unwrap();
        assert!(matches!(next(&mut items).await, Item::Service(Event::InitDone)));
    }

    /// A kubeconfig for a server, with a token.
    fn kubeconfig(url: &str, token: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = format!(
            "clusters: [{{ name: c, cluster: {{ server: '{url}' }} }}]\ncontexts: [{{ name: x, context: {{ cluster: c, user: u }} }}]\n\
             current-context: x\nusers: [{{ name: u, user: {{ token: {token} }} }}]\n"
        );
        std::fs::write(file.path(), text).unwrap();
        file
    }

    fn connection(kubeconfig: &tempfile::NamedTempFile) -> Connection {
        let kubeconfig = Some(kubeconfig.path().to_owned());
        Connection { kubeconfig, master: None, node_name: None, sync_period: Duration::from_secs(900) }
    }

    /// What is said of the Services of a server.
    async fn services(kubeconfig: &tempfile::NamedTempFile) -> mpsc::Receiver<Item> {
        let connection = connection(kubeconfig);
        let (client, _) = client(&connection).await.unwrap();
        let (sender, items) = mpsc::channel(8);
        tokio::spawn(follow(SERVICES, (connection, client), watcher::Config::default(), Item::Service, sender));
        items
    }

    async fn next(items: &mut mpsc::Receiver<Item>) -> Item {
        timeout(Duration::from_secs(30), items.recv()).await.expect("something is said").expect("it is followed")
    }

    /// The other end of a connection that a firewall forgets, or whose machine loses its power, never says so.
    #[tokio::test]
    async fn a_server_that_says_nothing_any_more_is_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let client = with_limit(Config::new(url.parse().unwrap()), Duration::from_millis(200)).unwrap();
        let server = tokio::spawn(async move {
            let (mut connection, _) = listener.accept().await.unwrap();
            assert!(connection.read(&mut [0; 4096]).await.unwrap() > 0, "the request is there");
            connection.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await.unwrap();
            connection
        });
        let services = Api::<Service>::all(client);
        let mut events = services.watch(&WatchParams::default(), "1").await.unwrap().boxed();
        let _connection = server.await.unwrap();
        let said = timeout(Duration::from_secs(30), events.next()).await.expect("it is listened to no more");
        assert!(matches!(said, Some(Err(_))), "{said:?}");
    }
}
