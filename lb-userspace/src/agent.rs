//! The agent: one task that owns the state, driven by events.

mod answers;
mod beside;
mod interfaces;
mod services;
mod sockets;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use lb_common::net::IfIndex;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc::{self, error::TrySendError},
    task::{JoinHandle, JoinSet},
    time::MissedTickBehavior,
};
use tracing::{error, info, warn};

pub use self::sockets::SocketOptions;
use self::{services::Waiting, sockets::Sockets};
use crate::{
    admin::{
        report::AuditReport,
        server::{BindError, Query, Server},
    },
    cleanup::{self, CleanupError},
    dataplane::{
        DataplaneError, SizeOptions, Sizes,
        collect::{Collector, Progress},
        kernel::{self, ANYWHERE, Addresses, DEFAULT_PINS, Kernel, Pins, PinsError, Settings, XdpMode},
        tables::{Drift, Tables, Wait},
    },
    describe, doctor,
    network::{Change, Network, NetworkError, PodDevice, PodInterfaces, Roles, canonical_name, name_of},
    observe::{
        http::{self, HealthChecks, Listen, ListenError},
        metrics::Metrics,
    },
    policy::{Decision, Node},
    privileges::{self, Places, PrivilegesError},
    source::{NodeObject, Source, SourceError, Update, file, kubernetes},
    supervisor,
    sysctl::{self, Sysctls},
};

/// What the agent is to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// The interfaces to attach to, and what else there is to say about this node.
    pub roles: Roles,
    /// How what comes in by an uplink is met.
    pub xdp: XdpMode,
    /// Where the services come from.
    pub source: Source,
    /// Where the admin socket is.
    pub admin: PathBuf,
    /// Below which directory everything is pinned that outlives the agent.
    pub bpffs: PathBuf,
    /// Whether traffic goes on when the agent stops.
    pub keep: bool,
    /// How much the tables hold.
    pub sizes: SizeOptions,
    /// What the programs are told.
    pub settings: Settings,
    /// Whose sockets are balanced, and where.
    pub sockets: SocketOptions,
    /// Whether kernel settings are left as they are.
    pub keep_sysctls: bool,
    /// Where metrics are told over HTTP.
    pub metrics: Listen,
    /// Where it is told over HTTP whether the agent is well.
    pub health: Listen,
    /// Whether the agent ends if it can't listen there at once.
    pub must_listen: bool,
}

/// Why the agent could not start, or go on.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// It has not the privileges that it needs, or can't drop those that it does not need.
    #[error(transparent)]
    Privileges(#[from] PrivilegesError),
    /// The services file makes no sense, and there is no last good state.
    #[error(transparent)]
    Services(#[from] SourceError),
    /// The kernel refused.
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    /// The network could not be read.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The admin socket could not be opened.
    #[error(transparent)]
    Admin(#[from] BindError),
    /// A place for HTTP could not be had.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The services file is not followed any more.
    #[error("the services file is not followed any more; this is a bug in wharf")]
    SourceEnded,
    /// What outlives the agent could not be taken over, or removed.
    #[error(transparent)]
    Pins(#[from] PinsError),
    /// Something is left of it.
    #[error(transparent)]
    Cleanup(#[from] CleanupError),
    /// Signals can't be received.
    #[error("signal handlers could not be set up")]
    Signals(#[source] std::io::Error),
}

/// What makes the agent act.
enum Event {
    /// The services file changed.
    Services(Update),
    /// The network changed.
    Network(Change),
    /// No packet holds any more what was taken out of use.
    Reclaimed(Reclaimed),
    /// It is time to look at the network again.
    Look,
    /// Control groups whose sockets are left alone may have come or gone.
    ControlGroups,
    /// It is time to go on attaching to pod-facing devices.
    AttachPods,
    /// It is time to look after neighbours.
    Tick,
    /// It is time to go on with the garbage collection.
    Collect,
    /// It is time to compare the maps with what they should say.
    Audit,
    /// Other processes are kube-proxy than before.
    KubeProxies(Vec<u32>),
    /// Somebody asks.
    Query(Query),
    /// The services file is to be read again.
    Reload,
    /// The agent is to stop.
    Shutdown,
}

/// Balances until SIGTERM or SIGINT. What is pinned goes on then, or is removed without a trace, as the options say.
pub async fn run(options: Options) -> Result<(), AgentError> {
    privileges::check()?;
    let mut signals = Signals::new().map_err(AgentError::Signals)?;
    let (reload, reload_receiver) = mpsc::channel(1);
    let (update_sender, mut updates) = mpsc::channel(1);
    let (query_sender, mut queries) = mpsc::channel(16);
    // First, so that a second agent ends before it touches anything.
    let server = Server::bind(&options.admin).await?;
    if options.must_listen {
        http::expect_free([(http::METRICS_FLAG, options.metrics), (http::HEALTH_FLAG, options.health)]).await?;
    }
    cleanup::expect_pins(&options.bpffs, &options.admin, Some(Path::new(DEFAULT_PINS)))?;
    let is_there = follow_source(&options, reload_receiver, update_sender);
    let pins = take_pins(&options.bpffs, &mut signals).await?;
    let Some(pins) = pins else { return Ok(()) };
    let are_new = pins.are_new();
    let places = options.places(&pins);
    let first = if is_there { Some(updates.recv().await.ok_or(AgentError::SourceEnded)?) } else { None };
    let (bpffs, admin) = (options.bpffs.clone(), options.admin.clone());
    let mut agent = match Agent::start(options, pins, first).await {
        Err(error) if are_new => {
            if let Err(left) = cleanup::clean_up(&bpffs, &admin).await {
                warn!(error = describe(&left), "not all of what was begun is taken back");
            }
            return Err(error);
        }
        started => started?,
    };
    privileges::settle(&places)?;
    let (metrics, health) = (agent.options.metrics, agent.options.health);
    let mut servers = JoinSet::new();
    servers.spawn(http::serve_metrics(metrics, query_sender.clone()));
    servers.spawn(http::serve_health(health, query_sender.clone()));
    let mut health_checks = HealthChecks::new(query_sender.clone());
    let (found, mut kube_proxies) = mpsc::channel(1);
    if matches!(agent.options.source, Source::Kubernetes(_)) {
        servers.spawn(beside::watch(found));
    }
    servers.spawn(server.serve(query_sender));
    supervisor::ready(&agent.summary());
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let event = tokio::select! {
            update = updates.recv() => Event::Services(update.ok_or(AgentError::SourceEnded)?),
            change = agent.network.change() => Event::Network(change),
            Some(query) = queries.recv() => Event::Query(query),
            Some(ids) = kube_proxies.recv() => Event::KubeProxies(ids),
            event = signals.next() => event,
            reclaimed = over(&mut agent.reclaiming) => Event::Reclaimed(reclaimed),
            () = Sockets::exempt_change(agent.sockets.as_mut()) => Event::ControlGroups,
            () = sleep_until(agent.look_at) => Event::Look,
            () = sleep_until(agent.attach_at) => Event::AttachPods,
            _ = ticks.tick() => Event::Tick,
            () = sleep_until(Some(agent.collect_at)) => Event::Collect,
            () = sleep_until(Some(agent.audit_at)) => Event::Audit,
        };
        if matches!(event, Event::Shutdown) {
            break;
        }
        agent.handle(event, &reload).await;
        if let Some(desired) = agent.desired() {
            health_checks.follow(desired.health_checks());
        }
    }
    supervisor::stopping();
    let keep = agent.options.keep;
    // With it goes the hold on what is pinned.
    drop(agent);
    let result = if keep {
        info!("stopping; traffic goes on as it is until an agent starts again, or `wharf cleanup` ends it");
        Ok(())
    } else {
        info!("stopping, and detaching from everything");
        cleanup::clean_up(&bpffs, &admin).await.map(drop)
    };
    // The admin socket is removed when its server is dropped with its task.
    servers.shutdown().await;
    Ok(result?)
}

/// Begins to follow the source; whether that is there, and is to be waited for.
fn follow_source(options: &Options, reload: mpsc::Receiver<()>, updates: mpsc::Sender<Update>) -> bool {
    match &options.source {
        Source::File(path) => {
            let node = options.roles.node_name.clone();
            tokio::spawn(file::watch(path.clone(), node, reload, updates));
            true
        }
        // It may be out of reach for hours, in which what a former agent left is as good as it was.
        Source::Kubernetes(connection) => {
            tokio::spawn(kubernetes::watch(connection.clone(), updates));
            false
        }
    }
}

impl Options {
    /// What is read and written for as long as the agent runs.
    fn places(&self, pins: &Pins) -> Places {
        // With the socket in it, and the record of what was changed on the host.
        let admin = self.admin.parent().filter(|it| !it.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Places { read: self.source.files(), written: vec![admin.to_owned(), pins.directory().to_owned()] }
    }
}

/// Takes the pins as soon as that is possible; `None` if the agent is to stop before.
async fn take_pins(bpffs: &Path, signals: &mut Signals) -> Result<Option<Pins>, PinsError> {
    let mut said = None;
    loop {
        match Pins::take(bpffs) {
            Err(error) if error.may_pass() => {
                let text = describe(&error);
                if said.as_ref() != Some(&text) {
                    error!("waiting: {text}");
                    said = Some(text);
                }
            }
            taken => return taken.map(Some),
        }
        tokio::select! {
            () = tokio::time::sleep(PINS_PAUSE) => {}
            Event::Shutdown = signals.next() => return Ok(None),
            else => {}
        }
    }
}

/// How long the agent waits before it tries again to take pins that it can't take now.
const PINS_PAUSE: Duration = Duration::from_secs(2);

/// How often neighbours are looked after. The kernel takes one for stale some 15 to 45 s after it was heard of last.
const TICK: Duration = Duration::from_secs(15);

/// How often a garbage collection begins.
const COLLECTION: Duration = Duration::from_secs(30);
/// How often the maps are compared with what they should say: a tenth of a second's work for 50,000 services.
const AUDIT: Duration = Duration::from_secs(300);
/// How long a step of one may take, and how long the next one waits: a pass takes a tenth of one CPU at the most.
const COLLECTION_STEP: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(50));
/// How long the agent waits from one look at the network to the next: where many pods start at once, it looks once for all.
const LOOK_PAUSE: Duration = Duration::from_millis(250);

/// The state.
struct Agent {
    options: Options,
    tables: Tables<Kernel>,
    network: Network,
    /// The services that are in force, and what was decided of them for this node. Until the source has said what there is to
    /// be, all that a former agent left stays as it is.
    in_force: Option<Decision>,
    /// How much the tables hold.
    sizes: Sizes,
    /// What the services are decided by.
    node: Arc<Node>,
    /// What the source knows of it.
    node_object: NodeObject,
    collector: Collector,
    collect_at: Instant,
    audit: AuditReport,
    audit_at: Instant,
    /// When the network is to be looked at again, if it has changed since.
    look_at: Option<Instant>,
    looked: Instant,
    /// When to go on attaching to pod-facing devices, if there are more.
    attach_at: Option<Instant>,
    started: Instant,
    applied: SystemTime,
    /// How many times services were applied.
    revision: u64,
    /// Since when the kernel refuses changes, for other reasons than that there is no room.
    stuck: Option<Instant>,
    metrics: Metrics,
    /// Why the services file as it is now makes no sense.
    refused: Option<String>,
    /// What is wanted and the tables did not take, and why: it is tried again, as room may return.
    waiting: Option<Waiting>,
    /// Why services are in force on the node as it was, and not as it is now.
    outgrown: Option<String>,
    /// The wait for packets that may hold what was taken out of use.
    reclaiming: Option<JoinHandle<Reclaimed>>,
    /// Uplinks that are not attached to now, and why those can't be that are there.
    lost: HashMap<String, Option<String>>,
    /// Whether it was said that not everything is pinned.
    is_unpinned: bool,
    /// Pod-facing devices that can't be attached to, by number.
    refused_pods: HashSet<u32>,
    /// How many of those were tried again.
    retried_pods: usize,
    /// Socket-level balancing, once it was begun.
    sockets: Option<Sockets>,
    sysctls: Sysctls,
    /// The interfaces that were made to forward, as far as they are still there.
    prepared: BTreeSet<u32>,
    /// The processes that are kube-proxy, where that would serve the same services.
    kube_proxies: Vec<u32>,
}

impl Agent {
    /// Loads, fills the tables, then attaches: the first packet finds all services. Where a former agent left its tables, what
    /// they say stays as it is until the source makes sense.
    async fn start(options: Options, pins: Pins, first: Option<Update>) -> Result<Self, AgentError> {
        let begin = Instant::now();
        let has_former = !pins.are_new();
        let roles = Roles { uplinks: canonical(&options.roles.uplinks, has_former)?, ..options.roles };
        let meets_pods = roles.pod_interfaces != PodInterfaces::None;
        let settings = Settings { sockets: options.sockets.settings(meets_pods), ..options.settings };
        let options = Options { roles, settings, ..options };
        let network = Network::follow(options.roles.clone()).await?;
        network.check_uplinks()?;
        let (first, refused) = match first {
            None => (None, None),
            Some(Err(error)) if has_former => (None, Some(error)),
            Some(loaded) => (Some(loaded?), None),
        };
        let sizes = options.sizes.settle(kernel::pinned_sizes(&pins)?);
        let mut kernel = Kernel::load_pinned(&sizes, &options.settings, pins)?;
        let mut addresses = network.addresses(kernel.addresses(), |address| {
            first.as_ref().is_some_and(|first| first.desired.is_frontend(address))
        });
        let mut sysctls = Sysctls::open(&cleanup::record(&options.admin)?);
        sysctls.note_pins(Some(options.bpffs.as_path()).filter(|it| *it != Path::new(DEFAULT_PINS)));
        sysctl::warn_of_shared_ports(&options.settings.snat_ports);
        let prepared = network.takes_in_by();
        if !options.keep_sysctls {
            let names = prepared.iter().copied().filter_map(name_of).collect::<Vec<_>>();
            sysctls.prepare(&names);
            sysctls.reserve(&options.settings.snat_ports);
        }
        // Until ours are attached they may send by what a former agent's could.
        for (interface, known) in &mut addresses {
            known.is_attached &= kernel.addresses().get(interface).map_or(!has_former, |former| former.is_attached);
        }
        // Where a former agent's programs meet packets is known anew when ours are attached; until then theirs go on.
        let former = kernel.addresses().keys().map(|&interface| (interface, Addresses::default())).collect::<Vec<_>>();
        kernel.set_addresses(&former.into_iter().chain(addresses.clone()).collect())?;
        let mut agent = Self {
            node: Arc::new(network.node(kernel.default_addresses())),
            tables: Tables::open(kernel, sizes)?,
            sizes,
            network,
            in_force: None,
            node_object: NodeObject::default(),
            collector: Collector::new(options.settings.timeouts),
            collect_at: begin + COLLECTION,
            audit: AuditReport::default(),
            audit_at: begin + AUDIT,
            look_at: None,
            looked: begin,
            attach_at: None,
            started: begin,
            applied: SystemTime::now(),
            metrics: Metrics::default(),
            stuck: None,
            revision: u64::from(first.is_some()),
            refused: first.is_none().then(|| "the source has not told all services yet".to_owned()),
            waiting: None,
            outgrown: None,
            reclaiming: None,
            lost: HashMap::new(),
            refused_pods: HashSet::new(),
            retried_pods: 0,
            is_unpinned: false,
            sockets: None,
            sysctls,
            prepared,
            kube_proxies: Vec::new(),
            options,
        };
        if let Some(error) = refused {
            agent.refuse(describe(&error));
        }
        let changes = match &first {
            Some(first) => {
                agent.tell_lacking(&first.desired);
                agent.know_node(&first.node);
                agent.enforce_first(&first.desired, has_former)?
            }
            None => 0,
        };
        first.iter().flat_map(|first| &first.warnings).for_each(|warning| warn!("{warning}"));
        agent.attach(has_former).inspect_err(|_| agent.leave_addresses())?;
        agent.choose_addresses();
        agent.reclaim();
        if addresses.values().all(|known| known.v4.is_none() && known.v6.is_none()) {
            warn!("no interface has an address yet that packets to backends could leave with");
        }
        if agent.in_force.is_some() {
            agent.note_applied(begin);
        }
        info!(services = agent.services().count(), changes, milliseconds = begin.elapsed().as_millis(), "balancing");
        Ok(agent)
    }

    /// Does what an event asks for. `reload` has the source read again.
    async fn handle(&mut self, event: Event, reload: &mpsc::Sender<()>) {
        match event {
            Event::Services(update) => {
                match update {
                    Ok(loaded) => self.apply(&loaded),
                    Err(error) => self.refuse(describe(&error)),
                }
                supervisor::ready(&self.summary());
            }
            Event::Network(change) => self.follow(change).await,
            Event::Reclaimed(reclaimed) => self.reclaimed(reclaimed),
            Event::Look => self.look().await,
            Event::ControlGroups => self.exempt_sockets(),
            Event::AttachPods => {
                self.attach_pods();
                self.choose_addresses();
            }
            Event::Tick => {
                self.repair_links();
                self.confirm_neighbours().await;
                self.attach_lost().await;
                self.pin_again();
                self.apply_waiting();
                self.exempt_sockets();
            }
            Event::Collect => self.collect(),
            Event::Audit => self.audit(),
            Event::KubeProxies(ids) => self.note_kube_proxies(ids),
            // Whoever asked may have gone; that is theirs.
            Event::Query(query) => drop(query.reply.send(self.answer(query.request))),
            Event::Reload => {
                supervisor::reloading();
                if let Err(TrySendError::Closed(())) = reload.try_send(()) {
                    // There is nothing to read again: changes come by themselves.
                    supervisor::ready(&self.summary());
                }
            }
            // Whoever receives events ends then.
            Event::Shutdown => {}
        }
    }

    async fn follow(&mut self, change: Change) {
        if change == Change::Everything
            && let Err(error) = self.network.list_neighbours().await
        {
            error!(error = describe(&error), "the neighbours are not known");
        }
        if change >= Change::Addresses {
            if self.looked.elapsed() >= LOOK_PAUSE {
                self.look().await;
            } else {
                self.look_at = Some(self.looked + LOOK_PAUSE);
            }
        }
        self.tables.dataplane_mut().begin_epoch();
    }

    /// Looks at the network, and does what follows from what is there now.
    async fn look(&mut self) {
        self.look_at = None;
        if let Err(error) = self.network.look().await {
            error!(error = describe(&error), "the interfaces and addresses are not known");
        }
        self.looked = Instant::now();
        self.prepare_new();
        self.attach_again();
        self.attach_pods();
        self.choose_addresses();
        let of_network = self.network.node(self.tables.dataplane().default_addresses());
        let node = Node { zone: self.node_object.zone.clone(), ..of_network };
        if node != *self.node {
            self.settle(node);
        }
    }

    /// Sets the addresses that packets leave with, and by which interfaces, as those and the services are now.
    fn choose_addresses(&mut self) {
        let before = self.tables.dataplane().addresses();
        let mut addresses = self
            .network
            .addresses(before, |address| self.desired().is_some_and(|desired| desired.is_frontend(address)));
        let kernel = self.tables.dataplane_mut();
        for (&interface, known) in &mut addresses {
            known.is_attached &= kernel.sends_by(interface);
        }
        // Routes name the bridge, where the programs are on its ports.
        let is_former = |device: &PodDevice| kernel.addresses().contains_key(&device.index);
        let former = self.network.pod_devices().into_iter().filter(is_former).map(|device| device.index);
        let uplinks = addresses.keys().copied().filter(|&interface| interface != ANYWHERE);
        let met: Vec<_> = uplinks.chain(kernel.met_inside()).chain(former).collect();
        for interface in met.iter().copied().chain(met.iter().filter_map(|&port| self.network.bridge_of(port))) {
            addresses.entry(interface).or_default();
        }
        if addresses == *kernel.addresses() {
            return;
        }
        if let Err(error) = kernel.set_addresses(&addresses) {
            error!(error = describe(&error), "the interfaces' addresses could not be set");
        }
        // Flows that have their next hops already have them by ways that may be no good any more.
        kernel.begin_epoch();
    }

    /// What goes on without this agent sends by no uplink that has lost its XDP; all else is as the former agent left it.
    fn leave_addresses(&mut self) {
        let kernel = self.tables.dataplane_mut();
        let mut addresses = kernel.addresses().clone();
        for uplink in
            self.options.roles.uplinks.iter().filter_map(|name| nix::net::if_::if_nametoindex(name.as_str()).ok())
        {
            if let Some(known) = addresses.get_mut(&uplink) {
                known.is_attached &= kernel.still_sends_by(uplink);
            }
        }
        if addresses == *kernel.addresses() {
            return;
        }
        if let Err(error) = kernel.set_addresses(&addresses) {
            error!(error = describe(&error), "the interfaces' addresses could not be set");
        }
        kernel.begin_epoch();
    }

    /// Has neighbours confirmed that our programs send to: by uplinks, and where they balance what the node itself sends, by all
    /// interfaces that they meet packets at.
    async fn confirm_neighbours(&self) {
        let addresses = self.tables.dataplane().addresses();
        let sends_by_all = addresses.contains_key(&IfIndex::LOOPBACK.0);
        let sends_by = |it: &Addresses| sends_by_all || *it != Addresses::default();
        self.network.confirm_neighbours(|interface| addresses.get(&interface).is_some_and(sends_by)).await;
    }

    fn note_kube_proxies(&mut self, ids: Vec<u32>) {
        if ids.is_empty() {
            info!("kube-proxy does not run here any more");
        } else {
            let (found, remedy) = doctor::where_kube_proxy_runs(&ids);
            warn!("{found}; {remedy}");
        }
        self.kube_proxies = ids;
    }

    /// Goes on with the garbage collection.
    fn collect(&mut self) {
        let (budget, pause) = COLLECTION_STEP;
        self.collect_at = match self.tables.dataplane_mut().collect(&mut self.collector, budget) {
            Ok(Progress::Underway) => Instant::now() + pause,
            Ok(Progress::Done) => Instant::now() + COLLECTION,
            Err(error) => {
                error!(error = describe(&error), "flows that are over stay in the tables for now");
                Instant::now() + COLLECTION
            }
        };
    }

    /// Looks for drift in all that the agent writes to maps, and puts it right if that is asked for.
    fn audit_maps(&mut self, repair: bool) -> Result<Vec<Drift>, DataplaneError> {
        let mut drift = self.tables.audit(repair)?;
        drift.extend(self.tables.dataplane_mut().audit(repair)?);
        Ok(drift)
    }

    /// Looks for programs that somebody else has detached, and attaches them again if that is asked for.
    fn audit_links(&mut self, repair: bool) -> Vec<Drift> {
        let drift = self.tables.dataplane_mut().audit_links(repair);
        if repair && !drift.is_empty() {
            self.attach_detached();
        }
        drift
    }

    /// Looks now and then whether somebody else has written to the maps, and puts it right.
    fn audit(&mut self) {
        self.audit_at = Instant::now() + AUDIT;
        match self.audit_maps(true) {
            Ok(drift) => {
                self.note_repaired(&drift);
                self.audit.audits += 1;
            }
            Err(error) => error!(error = describe(&error), "the maps could not be compared with what they should say"),
        }
    }

    /// The same for programs: without them there is no balancing at all.
    fn repair_links(&mut self) {
        let drift = self.audit_links(true);
        self.note_repaired(&drift);
    }

    fn note_repaired(&mut self, drift: &[Drift]) {
        for Drift { map, entry, expected, found } in drift {
            warn!("somebody else has changed {map}: {entry} was {found}, and is to be {expected} again");
        }
        self.audit.repaired += drift.len() as u64;
    }
}

/// The names by which the kernel tells of interfaces, each once. One that
/// is not there is an error, unless it may be missing.
fn canonical(interfaces: &[String], may_be_missing: bool) -> Result<Vec<String>, DataplaneError> {
    let mut names = Vec::new();
    for interface in interfaces {
        let name = canonical_name(interface).or_else(|| may_be_missing.then(|| interface.clone()));
        let name = name.ok_or_else(|| DataplaneError::NoInterface { interface: interface.clone() })?;
        if !names.contains(&name) {
            names.push(name);
        }
    }
    Ok(names)
}

/// Waits until a time; for ever where there is none.
async fn sleep_until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}

/// What a wait was for, and how it ended.
type Reclaimed = (Wait, std::io::Result<()>);

/// Waits for a task to end; for ever where there is none.
async fn over<T>(task: &mut Option<JoinHandle<T>>) -> T {
    match task {
        Some(running) => {
            let ended = running.await;
            *task = None;
            match ended {
                Ok(ended) => ended,
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            }
        }
        None => std::future::pending().await,
    }
}

/// The signals that mean something.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> Event {
        tokio::select! {
            _ = self.terminate.recv() => Event::Shutdown,
            _ = self.interrupt.recv() => Event::Shutdown,
            _ = self.hangup.recv() => Event::Reload,
        }
    }
}
