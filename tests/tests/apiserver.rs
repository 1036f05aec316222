//! The API server that tests are tried on, tried itself: with the client that agents use, and by hand.
#![expect(clippy::unwrap_used, reason = "this is test code: it fails by panicking")]

use std::{
    collections::BTreeMap,
    fmt::Debug,
    io::{Read as _, Write as _},
    net::TcpStream,
    sync::{Arc, Mutex, MutexGuard},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use futures::{StreamExt as _, pin_mut};
use k8s_openapi::api::{
    core::v1::{Node, ObjectReference, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client, Config, Error, Resource, ResourceExt as _,
    api::ListParams,
    config::{KubeConfigOptions, Kubeconfig},
    runtime::{
        events::{self, Recorder, Reporter},
        watcher,
    },
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tests::{
    SOON,
    apiserver::{
        ApiServer,
        objects::{self, Draft, node, service, slice},
    },
    eventually,
    netns::NetNs,
    number,
};
use tokio::runtime::{self, Runtime};
use tokio_util::sync::CancellationToken;

/// Soon enough for a test to wait for it.
const MOMENT: Duration = Duration::from_millis(50);

/// A service with a character of two bytes, which a slow connection cuts.
fn web(name: &str) -> Draft<objects::Service> {
    service("default", name).cluster_ips(["10.96.0.7"]).port("http", 80).annotation("note", "für alle")
}

fn runtime() -> Runtime {
    runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// The client of a server, as its kubeconfig file says.
async fn client(server: &ApiServer, token: Option<&str>) -> Client {
    let directory = tempfile::tempdir().unwrap();
    let file = match token {
        Some(token) => server.kubeconfig_with_token(directory.path(), token),
        None => server.kubeconfig(directory.path()),
    };
    let file = Kubeconfig::read_from(file).unwrap();
    let mut config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.unwrap();
    config.default_retry = false;
    config.read_timeout = Some(Duration::from_secs(1));
    Client::try_from(config).unwrap()
}

/// What a client believes that there is, and how it came to it.
#[derive(Debug, Default)]
struct View {
    objects: BTreeMap<String, Value>,
    events: Vec<String>,
    errors: Vec<String>,
}

/// A client on a thread of its own that follows a server; it ends when this is dropped.
struct Mirror {
    view: Arc<Mutex<View>>,
    end: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Mirror {
    fn of<K>(server: &ApiServer, config: watcher::Config) -> Self
    where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + serde::Serialize + Send + 'static,
    {
        let (view, end) = (Arc::new(Mutex::new(View::default())), CancellationToken::new());
        let (views, ends, runtime) = (Arc::clone(&view), end.clone(), runtime());
        let client = runtime.block_on(async { client(server, None).await });
        let follow = async move {
            let stream = watcher(Api::<K>::all(client), config);
            pin_mut!(stream);
            while let Some(event) = stream.next().await {
                let failed = event.is_err();
                views.lock().unwrap().see(event);
                if failed {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        };
        let thread = thread::spawn(move || {
            runtime.block_on(ends.run_until_cancelled(follow));
        });
        Self { view, end, thread: Some(thread) }
    }

    fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap()
    }

    fn names(&self) -> Vec<String> {
        self.view().objects.keys().cloned().collect()
    }

    fn lists(&self) -> usize {
        self.view().events.iter().filter(|event| *event == "init-done").count()
    }

    #[track_caller]
    fn comes_to(&self, names: &[&str]) {
        eventually("the client has what the server has", || self.lists() > 0 && self.names() == names);
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.end.cancel();
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl View {
    fn see<K: kube::ResourceExt + serde::Serialize>(&mut self, event: watcher::Result<watcher::Event<K>>) {
        let mut keep = |object: K| self.objects.insert(object.name_any(), serde_json::to_value(object).unwrap());
        let event = match event {
            Ok(watcher::Event::Init) => {
                self.objects.clear();
                "init".to_owned()
            }
            Ok(watcher::Event::InitApply(object)) => {
                keep(object);
                return;
            }
            Ok(watcher::Event::InitDone) => "init-done".to_owned(),
            Ok(watcher::Event::Apply(object)) => {
                let name = object.name_any();
                keep(object);
                format!("apply {name}")
            }
            Ok(watcher::Event::Delete(object)) => {
                self.objects.remove(&object.name_any());
                format!("delete {}", object.name_any())
            }
            Err(error) => {
                self.errors.push(error.to_string());
                return;
            }
        };
        self.events.push(event);
    }
}

/// A request by hand; what is answered until the connection ends.
fn ask(server: &ApiServer, path: &str) -> String {
    let mut stream = open(server, path);
    let mut answer = Vec::new();
    // A connection that is cut may end with an error.
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn open(server: &ApiServer, path: &str) -> TcpStream {
    let address = server.url();
    let mut stream = TcpStream::connect(address.trim_start_matches("http://")).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").unwrap();
    stream
}

/// The lines of a watch that a request by hand has brought.
fn lines(answer: &str) -> Vec<Value> {
    answer.lines().filter_map(|line| serde_json::from_str(line).ok()).filter(Value::is_object).collect()
}

#[test]
fn a_list_comes_in_pages_of_one_version() {
    let server = ApiServer::start();
    server.apply_all((0..25).map(|number| web(&format!("s{number:02}"))));
    let version = server.version().to_string();
    runtime().block_on(async {
        let services = Api::<Service>::all(client(&server, None).await);
        let mut parameters = ListParams::default().limit(10);
        let mut names = Vec::new();
        for rest in [Some(15), Some(5), None] {
            let page = services.list(&parameters).await.unwrap();
            assert_eq!(page.metadata.remaining_item_count, rest);
            assert_eq!(page.metadata.resource_version.as_ref(), Some(&version));
            names.extend(page.items.iter().map(kube::ResourceExt::name_any));
            parameters.continue_token = page.metadata.continue_;
            // What comes between the pages is in none of them.
            server.apply(web(&format!("s{:02}-late", names.len())));
        }
        assert_eq!(names, (0..25).map(|number| format!("s{number:02}")).collect::<Vec<_>>());
        let page = services.list(&ListParams::default().limit(10)).await.unwrap();
        server.compact();
        let token = page.metadata.continue_.unwrap();
        let gone = services.list(&ListParams::default().limit(10).continue_token(&token)).await;
        assert!(
            matches!(&gone, Err(Error::Api(status)) if status.code == 410 && status.reason == "Expired"),
            "{gone:?}"
        );
    });
    // What any version will do for comes all at once, as from a real server's cache.
    assert_eq!(ask(&server, "/api/v1/services?limit=5&resourceVersion=0").matches("uid").count(), 28);
    assert!(ask(&server, "/api/v1/services?resourceVersion=99999999").contains("Too large resource version"));
    assert_eq!(ask(&server, "/api/v1/namespaces/other/services").matches("uid").count(), 0);
    assert!(ask(&server, "/api/v1/namespaces/default/services/s07").contains(r#""kind":"Service""#));
    assert!(ask(&server, "/api/v1/namespaces/default/services/none").contains(r#""reason":"NotFound""#));
}

#[test]
fn a_watcher_sees_what_comes_changes_and_goes() {
    for config in [watcher::Config::default(), watcher::Config::default().streaming_lists()] {
        let server = ApiServer::start();
        server.apply_all([web("a"), web("b")]);
        let mirror = Mirror::of::<Service>(&server, config);
        mirror.comes_to(&["a", "b"]);
        server.apply(web("c"));
        server.apply(web("c"));
        server.apply(web("b").set("spec.externalIPs", json!(["203.0.113.1"])));
        server.delete("Service", "default", "a");
        mirror.comes_to(&["b", "c"]);
        assert_eq!(mirror.view().objects["b"]["spec"]["externalIPs"], json!(["203.0.113.1"]));
        assert_eq!(mirror.view().events, ["init", "init-done", "apply c", "apply b", "delete a"]);
        eventually("it watches", || server.watchers() == 1);
        drop(mirror);
        eventually("a watch ends with its client", || server.watchers() == 0);
    }
}

#[test]
fn an_object_that_is_no_longer_selected_is_deleted_to_that_watch() {
    let server = ApiServer::start();
    let mirror = Mirror::of::<Service>(&server, watcher::Config::default().labels("!hidden,app in (a,b)"));
    mirror.comes_to(&[]);
    server.apply_all([web("a"), web("b"), web("c")]);
    mirror.comes_to(&["a", "b"]);
    server.apply(web("a").label("hidden", ""));
    mirror.comes_to(&["b"]);
    server.apply(web("a").label("hidden", "").set("spec.externalIPs", json!(["203.0.113.1"])));
    server.apply(web("a"));
    mirror.comes_to(&["a", "b"]);
    let events = mirror.view().events[2..].to_vec();
    assert_eq!(events, ["apply a", "apply b", "delete a", "apply a"]);
    let watch = "/api/v1/services?watch=1&timeoutSeconds=1&fieldSelector=metadata.name%3Dc";
    let names: Vec<_> = lines(&ask(&server, watch)).iter().map(|it| it["object"]["metadata"]["name"].clone()).collect();
    assert_eq!(names, ["c"]);
}

#[test]
fn whoever_comes_back_after_a_compaction_lists_again() {
    let server = ApiServer::start();
    server.apply(web("a"));
    let mirror = Mirror::of::<Service>(&server, watcher::Config::default());
    mirror.comes_to(&["a"]);
    eventually("it watches", || server.watchers() == 1);
    server.stop();
    server.delete("Service", "default", "a");
    server.apply(web("b"));
    server.compact();
    server.start_again();
    mirror.comes_to(&["b"]);
    assert_eq!(mirror.lists(), 2);
}

#[test]
fn a_bookmark_keeps_an_idle_watch_from_becoming_too_old() {
    let server = ApiServer::start();
    server.bookmark_every(MOMENT);
    server.apply(node("node-a"));
    let mirror = Mirror::of::<Node>(&server, watcher::Config::default());
    mirror.comes_to(&["node-a"]);
    eventually("it watches", || server.watchers() == 1);
    server.apply(web("a"));
    server.compact();
    let watches = || {
        let requests = server.requests();
        requests
            .iter()
            .filter(|it| it.parameter("watch").is_some())
            .filter_map(|it| it.parameter("resourceVersion"))
            .collect::<Vec<_>>()
    };
    for _ in 0..3 {
        let before = watches().len();
        thread::sleep(10 * MOMENT);
        server.close_streams();
        eventually("it comes back", || watches().len() > before && server.watchers() == 1);
    }
    assert_eq!(watches().last(), Some(&server.version().to_string()));
    assert_eq!(mirror.view().events, ["init", "init-done"]);
}

#[test]
fn a_client_survives_all_trouble() {
    let server = ApiServer::start();
    let mirror = Mirror::of::<Service>(&server, watcher::Config::default());
    mirror.comes_to(&[]);
    let mut all = Vec::new();
    let trouble: [(&str, &dyn Fn()); 9] = [
        ("broken", &|| server.break_streams()),
        ("closed", &|| server.close_streams()),
        ("compacted", &|| {
            server.compact();
            server.break_streams();
        }),
        ("stalled", &|| {
            server.stall();
            server.apply(web("while-stalled"));
            thread::sleep(MOMENT);
            assert!(!mirror.names().contains(&"while-stalled".to_owned()));
            server.delete("Service", "default", "while-stalled");
            server.resume();
        }),
        ("stalled-for-long", &|| {
            server.stall();
            thread::sleep(Duration::from_millis(1500));
            server.resume();
        }),
        ("restarted", &|| {
            server.stop();
            thread::sleep(MOMENT);
            server.start_again();
        }),
        ("refused", &|| {
            server.refuse_connections();
            server.break_streams();
            thread::sleep(MOMENT);
            server.start_again();
        }),
        ("failed", &|| {
            server.fail(3, 500);
            server.close_streams();
        }),
        ("slow", &|| {
            server.slow(Duration::from_millis(1));
            server.close_streams();
        }),
    ];
    for (name, cause) in trouble {
        cause();
        server.apply(web(name));
        all.push(name);
        all.sort_unstable();
        mirror.comes_to(&all);
        let (theirs, ours) = (mirror.view().objects[name].clone(), server.get("Service", "default", name).unwrap());
        assert_eq!(theirs["metadata"]["annotations"], ours["metadata"]["annotations"]);
        eventually("it watches", || server.watchers() == 1);
    }
    let errors = mirror.view().errors.join("\n");
    assert!(errors.contains("watch stream failed") && errors.contains("too old resource version"), "{errors}");
}

#[test]
fn who_is_not_known_or_not_permitted_is_told_so() {
    let server = ApiServer::start();
    server.apply(web("a"));
    server.demand_token("secret");
    runtime().block_on(async {
        let list = async |token| {
            let services = Api::<Service>::all(client(&server, token).await);
            services.list(&ListParams::default()).await.map(|list| list.items.len()).map_err(|error| match error {
                Error::Api(status) => (status.code, status.reason),
                other => panic!("{other}"),
            })
        };
        assert_eq!(list(None).await, Err((401, "Unauthorized".to_owned())));
        assert_eq!(list(Some("wrong")).await, Err((401, "Unauthorized".to_owned())));
        assert_eq!(list(Some("secret")).await, Ok(1));
        server.forbid("list", "services");
        assert_eq!(list(Some("secret")).await, Err((403, "Forbidden".to_owned())));
        server.permit_all();
        assert_eq!(list(Some("secret")).await, Ok(1));
        let version = client(&server, Some("secret")).await.apiserver_version().await.unwrap();
        assert_eq!(version.minor, "36");
    });
    assert!(ask(&server, "/readyz").ends_with("ok"));
}

#[test]
fn watches_end_fail_and_break_as_on_real_servers() {
    let server = ApiServer::start();
    server.apply(web("a"));
    let whole = "/api/v1/services?watch=true&allowWatchBookmarks=true&timeoutSeconds=1";
    let answer = ask(&server, whole);
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\n\r\n0\r\n\r\n"), "{answer}");
    let events = lines(&answer);
    assert!(events[0]["type"] == "ADDED" && events[0]["object"]["kind"] == "Service", "{answer}");
    let metadata = json!({ "resourceVersion": server.version().to_string() });
    let bookmark = json!({ "kind": "Service", "apiVersion": "v1", "metadata": metadata });
    assert_eq!(events[1..], [json!({ "type": "BOOKMARK", "object": bookmark })]);

    let streamed = format!("{whole}&sendInitialEvents=true&resourceVersionMatch=NotOlderThan");
    let end = &lines(&ask(&server, &streamed))[1];
    assert_eq!(end["object"]["metadata"]["annotations"], json!({ "k8s.io/initial-events-end": "true" }));

    server.compact();
    let old = ask(&server, "/api/v1/services?watch=1&resourceVersion=1");
    assert!(old.starts_with("HTTP/1.1 200 OK\r\n"), "{old}");
    assert!(lines(&old)[0]["type"] == "ERROR" && lines(&old)[0]["object"]["code"] == 410, "{old}");
    server.refuse_old_versions_plainly();
    assert!(ask(&server, "/api/v1/services?watch=1&resourceVersion=1").starts_with("HTTP/1.1 410 Gone\r\n"));

    let mut broken = open(&server, &whole.replace("=1", "=60"));
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"}\n\r\n") {
        let mut byte = [0];
        broken.read_exact(&mut byte).unwrap();
        bytes.extend(byte);
    }
    server.break_streams();
    broken.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.last(), Some(&0xC3), "it ends within a character: {}", String::from_utf8_lossy(&bytes));

    server.fail(1, 429);
    let busy = ask(&server, "/api/v1/services");
    assert!(busy.starts_with("HTTP/1.1 429 ") && busy.contains("retry-after: 1\r\n"), "{busy}");
    assert!(ask(&server, "/api/v1/services").starts_with("HTTP/1.1 200 OK\r\n"));
    server.refuse_streaming_lists();
    assert!(ask(&server, &streamed).starts_with("HTTP/1.1 422 "));
}

#[test]
fn what_is_written_is_what_clients_of_all_fields_read() {
    let server = ApiServer::start();
    let balanced =
        web("a").target("http").node_port(30080).port("dns", 53).protocol("UDP").load_balancer(["203.0.113.7"]);
    server.apply(balanced);
    let endpoints = slice("default", "a-x").of("a").port("http", 8080).endpoint("fd00::5").on("node-a").zone("z");
    server.apply(endpoints.for_zones(["z"]).endpoint("fd00::6").terminating(true));
    server.apply(node("node-a").address("192.0.2.1").pod_cidrs(["10.244.1.0/24"]).zone("z").not_ready());
    server.apply_yaml("kind: Service\nmetadata: { name: b }\n---\nkind: Node\nmetadata: { name: node-b }\n");
    runtime().block_on(async {
        let client = client(&server, None).await;
        let services = Api::<Service>::all(client.clone()).list(&ListParams::default()).await.unwrap().items;
        let spec = services[0].spec.as_ref().unwrap();
        let (kind, policy) = (spec.type_.as_deref(), spec.external_traffic_policy.as_deref());
        assert_eq!((kind, policy), (Some("LoadBalancer"), Some("Cluster")));
        assert_eq!(services[1].namespace().as_deref(), Some("default"));
        let slices = Api::<EndpointSlice>::all(client.clone()).list(&ListParams::default()).await.unwrap().items;
        let (slice, endpoints) = (&slices[0], slices[0].endpoints.as_deref().unwrap());
        assert_eq!((slice.address_type.as_str(), slice.metadata.generation), ("IPv6", Some(1)));
        assert_eq!(endpoints[0].hints.as_ref().unwrap().for_zones.as_ref().unwrap()[0].name, "z");
        assert_eq!(endpoints[1].conditions.as_ref().unwrap().terminating, Some(true));
        let nodes = Api::<Node>::all(client.clone()).list(&ListParams::default()).await.unwrap().items;
        assert_eq!(nodes[0].spec.as_ref().unwrap().taints.as_ref().unwrap().len(), 1);

        let recorder = Recorder::new(client, Reporter::from("wharf"));
        let event = events::Event {
            type_: events::EventType::Warning,
            reason: "Unsupported".to_owned(),
            note: None,
            action: "Balance".to_owned(),
            secondary: None,
        };
        let about =
            ObjectReference { name: Some("a".to_owned()), namespace: Some("default".to_owned()), ..Default::default() };
        for _ in 0..2 {
            recorder.publish(&event, &about).await.unwrap();
        }
    });
    let events = server.all("Event");
    assert!(events.len() == 1 && events[0]["series"]["count"] == 2, "{events:?}");
    let list = ask(&server, "/api/v1/services");
    assert!(list.contains(r#""kind":"ServiceList""#) && !list.contains(r#""kind":"Service""#), "{list}");
}

#[test]
fn a_server_is_in_the_namespace_of_who_starts_it() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root may make network namespaces");
        return;
    }
    let namespace = NetNs::new("api");
    let server = namespace.run(ApiServer::start);
    server.stop();
    server.start_again();
    let address = server.url().trim_start_matches("http://").to_owned();
    assert!(namespace.run(|| TcpStream::connect(&address)).is_ok());
    assert!(TcpStream::connect(&address).is_err());
}

/// A tenth of what is large, or `$WHARF_SERVICES`: 45000 take more than ten seconds, unoptimized.
#[test]
fn a_large_cluster_is_held_and_listed_fast() {
    let all = number("WHARF_SERVICES").unwrap_or(4500) as usize;
    let server = ApiServer::start();
    let start = Instant::now();
    let services: Vec<Value> = (0..all).map(|number| web(&format!("s{number}")).build()).collect();
    // Five or six endpoints each: 250,000 of 45,000 services.
    let slices = (0..all).map(|number| {
        let slice = slice("default", &format!("s{number}-x")).of(&format!("s{number}")).port("http", 8080);
        (0..5 + usize::from(number % 9 < 5)).fold(slice, |slice, pod| {
            slice.endpoint(format!("10.{pod}.{}.{}", number / 256, number % 256)).on("node-a").zone("a")
        })
    });
    let slices: Vec<Value> = slices.map(Draft::build).collect();
    let written = start.elapsed();
    server.apply_all(services);
    server.apply_all(slices);
    let held = start.elapsed();
    let start = Instant::now();
    let services = ask(&server, "/api/v1/services?resourceVersion=0");
    let slices = ask(&server, "/apis/discovery.k8s.io/v1/endpointslices?resourceVersion=0");
    let listed = start.elapsed();
    let counts = (services.matches(r#""clusterIP":"#).count(), slices.matches(r#""addresses":"#).count());
    assert_eq!(counts, (all, all * 50 / 9));
    let streamed = "resourceVersionMatch=NotOlderThan&sendInitialEvents=true&watch=1&timeoutSeconds=2";
    let streamed = ask(&server, &format!("/api/v1/services?{streamed}"));
    assert_eq!(streamed.matches(r#""type":"ADDED""#).count(), all);
    let bytes = services.len() + slices.len();
    println!("written after {written:.1?}, held after {held:.1?}, {bytes} bytes listed in {listed:.1?}");
    assert!(listed < SOON, "{listed:?}");
}
