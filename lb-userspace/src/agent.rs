//! The agent: one task that owns the state, driven by events.

use std::{
    collections::{BTreeMap, HashSet},
    ops::RangeInclusive,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    time::MissedTickBehavior,
};
use tracing::{error, info, warn};

use crate::{
    admin::{
        report::{
            BackendReport, CounterReport, InterfaceReport, Request, Response, ServiceReport, StatusReport, TableReport,
        },
        server::{BindError, Query, Server},
    },
    dataplane::{
        DataplaneError, Sizes,
        kernel::{Kernel, XdpMode},
        tables::Tables,
    },
    network::{Change, Network, NetworkError},
    source::file::{self, FileError, Update},
    sysctl::Sysctls,
};

/// What the agent is to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// The interfaces to attach to.
    pub interfaces: Vec<String>,
    /// How.
    pub xdp: XdpMode,
    /// Where the services come from.
    pub services: PathBuf,
    /// Where the admin socket is.
    pub admin: PathBuf,
    /// How much the tables hold.
    pub sizes: Sizes,
    /// The source ports that a flow may take whose own is taken.
    pub snat_ports: RangeInclusive<u16>,
    /// Whether kernel settings are left as they are.
    pub keep_sysctls: bool,
}

/// Why the agent could not start, or go on.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The services file makes no sense, and there is no last good state.
    #[error(transparent)]
    Services(#[from] FileError),
    /// The kernel refused.
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    /// The network could not be read.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The admin socket could not be opened.
    #[error(transparent)]
    Admin(#[from] BindError),
    /// The services file is not followed any more.
    #[error("the services file is not followed any more; this is a bug in wharf")]
    SourceEnded,
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
    /// It is time to look after things.
    Tick,
    /// Somebody asks.
    Query(Query),
    /// The services file is to be read again.
    Reload,
    /// The agent is to stop.
    Shutdown,
}

/// Balances until SIGTERM or SIGINT, then detaches and leaves nothing behind.
pub async fn run(options: Options) -> Result<(), AgentError> {
    let mut signals = Signals::new().map_err(AgentError::Signals)?;
    let (reload, reload_receiver) = mpsc::channel(1);
    let (update_sender, mut updates) = mpsc::channel(1);
    let (query_sender, mut queries) = mpsc::channel(16);
    // First, so that a second agent ends before it touches anything.
    let server = Server::bind(&options.admin).await?;
    tokio::spawn(file::watch(options.services.clone(), reload_receiver, update_sender));
    let first = updates.recv().await.ok_or(AgentError::SourceEnded)??;
    let mut agent = Agent::start(options, first).await?;
    let server = tokio::spawn(server.serve(query_sender));
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let event = tokio::select! {
            update = updates.recv() => Event::Services(update.ok_or(AgentError::SourceEnded)?),
            change = agent.network.change() => Event::Network(change),
            Some(query) = queries.recv() => Event::Query(query),
            event = signals.next() => event,
            _ = ticks.tick() => Event::Tick,
        };
        match event {
            Event::Services(Ok(loaded)) => agent.apply(&loaded).await,
            Event::Services(Err(error)) => agent.refuse(&error),
            Event::Network(change) => agent.follow(change).await,
            // Whoever asked may have gone; that is theirs.
            Event::Tick => agent.confirm_neighbours().await,
            Event::Query(query) => drop(query.reply.send(agent.answer(query.request))),
            // A reload that waits already will do.
            Event::Reload => drop(reload.try_send(())),
            Event::Shutdown => break,
        }
    }
    info!("stopping: detaching from {}", agent.options.interfaces.join(", "));
    agent.tables.dataplane_mut().detach();
    // Dropped with its task, which removes the socket.
    server.abort();
    let _aborted = server.await;
    Ok(())
}

/// How often neighbours are looked after. The kernel takes one for stale some 15 to 45 s after it was heard of last.
const TICK: Duration = Duration::from_secs(15);

/// The state.
struct Agent {
    options: Options,
    tables: Tables<Kernel>,
    network: Network,
    started: Instant,
    applied: Instant,
    /// How many times services were applied.
    revision: u64,
    /// Why the services file as it is now is not in force.
    refused: Option<String>,
    /// Interfaces that are not there now.
    lost: HashSet<String>,
    /// Puts the settings back when the agent is dropped.
    sysctls: Sysctls,
}

impl Agent {
    /// Loads, fills the tables, then attaches: the first packet finds all services.
    async fn start(options: Options, first: file::Loaded) -> Result<Self, AgentError> {
        let begin = Instant::now();
        let options = Options { interfaces: canonical(&options.interfaces)?, ..options };
        let network = Network::follow().await?;
        let addresses = network.addresses(&options.interfaces, &BTreeMap::new(), &first.desired).await?;
        let mut kernel = Kernel::load(&options.sizes, &options.snat_ports)?;
        let mut sysctls = Sysctls::default();
        if !options.keep_sysctls {
            // VLAN devices on the named interfaces, too: the stack takes in what comes by them.
            let names = addresses.keys().filter_map(|&index| name_of(index)).collect::<Vec<_>>();
            sysctls.prepare(&names);
        }
        kernel.set_addresses(&addresses)?;
        let tables = Tables::new(kernel, options.sizes);
        let mut agent = Self {
            options,
            tables,
            network,
            started: begin,
            applied: begin,
            revision: 1,
            refused: None,
            lost: HashSet::new(),
            sysctls,
        };
        agent.tables.apply(&first.desired)?;
        first.warnings.iter().for_each(|warning| warn!("{warning}"));
        for interface in agent.options.interfaces.clone() {
            agent.tables.dataplane_mut().attach(&interface, agent.options.xdp)?;
            info!("attached to {interface} (XDP, {})", agent.options.xdp.name());
        }
        if addresses.values().all(|known| known.v4.is_none() && known.v6.is_none()) {
            warn!("no interface has an address yet that packets to backends could leave with");
        }
        agent.applied = Instant::now();
        info!(
            services = agent.tables.applied().services().len(),
            milliseconds = begin.elapsed().as_millis(),
            "balancing"
        );
        Ok(agent)
    }

    async fn apply(&mut self, loaded: &file::Loaded) {
        loaded.warnings.iter().for_each(|warning| warn!("{warning}"));
        let begin = Instant::now();
        match self.tables.apply(&loaded.desired) {
            Ok(changes) => {
                self.refused = None;
                self.applied = Instant::now();
                self.revision += 1;
                info!(changes, microseconds = begin.elapsed().as_micros(), "services applied");
            }
            Err(error) => self.refuse(&error),
        }
        // Blocks for some milliseconds, in which the next event can wait: the change is in force already.
        if let Err(error) = self.tables.reclaim() {
            error!(error = describe(&error), "table entries that are no longer used could not be freed");
        }
        self.choose_addresses().await;
    }

    /// Keeps the last good state, and says why.
    fn refuse(&mut self, error: &dyn std::error::Error) {
        let text = describe(error);
        error!("the services stay as they were: {text}");
        self.refused = Some(text);
    }

    async fn follow(&mut self, change: Change) {
        if change == Change::Everything
            && let Err(error) = self.network.list_neighbours().await
        {
            error!(error = describe(&error), "the neighbours are not known");
        }
        if change >= Change::Addresses {
            self.attach_again();
            self.choose_addresses().await;
        }
        self.tables.dataplane().begin_epoch();
    }

    /// Sets the addresses that packets leave with, as the interfaces and services are now.
    async fn choose_addresses(&mut self) {
        let desired = Arc::clone(self.tables.applied());
        let before = self.tables.dataplane().addresses().clone();
        match self.network.addresses(&self.options.interfaces, &before, &desired).await {
            Ok(addresses) => {
                if let Err(error) = self.tables.dataplane_mut().set_addresses(&addresses) {
                    error!(error = describe(&error), "the interfaces' addresses could not be set");
                }
            }
            Err(error) => error!(error = describe(&error), "the interfaces' addresses are not known"),
        }
    }

    async fn confirm_neighbours(&self) {
        let addresses = self.tables.dataplane().addresses();
        self.network.confirm_neighbours(|interface| addresses.contains_key(&interface)).await;
    }

    /// An interface that was removed and made again has a new number and no program.
    fn attach_again(&mut self) {
        for interface in self.options.interfaces.clone() {
            let is_there = nix::net::if_::if_nametoindex(interface.as_str()).is_ok();
            let kernel = self.tables.dataplane_mut();
            match kernel.attached_to(&interface) {
                Some(_) => {
                    self.lost.remove(&interface);
                }
                None if is_there => {
                    if !self.options.keep_sysctls {
                        self.sysctls.prepare(std::slice::from_ref(&interface));
                    }
                    match kernel.attach(&interface, self.options.xdp) {
                        Ok(()) => info!("attached to {interface} again, which had been removed"),
                        Err(error) if self.lost.insert(interface.clone()) => {
                            error!(error = describe(&error), "cannot attach to {interface} again");
                        }
                        Err(_again) => {}
                    }
                }
                None => {
                    if self.lost.insert(interface.clone()) {
                        warn!("interface {interface} is gone; wharf attaches to it when it comes back");
                    }
                }
            }
        }
    }

    fn answer(&self, request: Request) -> Response {
        match request {
            Request::Status => self.status().map_or_else(|error| Response::Error(describe(&error)), Response::Status),
            Request::Services => Response::Services(self.services()),
            Request::Backends => Response::Backends(self.backends()),
        }
    }

    fn status(&self) -> Result<StatusReport, DataplaneError> {
        let kernel = self.tables.dataplane();
        let interfaces = self.options.interfaces.iter().map(|name| {
            let addresses = kernel.addresses_of(name);
            InterfaceReport {
                name: name.clone(),
                xdp: kernel.attached_to(name).map_or("gone", |_| self.options.xdp.name()).to_owned(),
                source_ipv4: addresses.v4,
                source_ipv6: addresses.v6,
            }
        });
        Ok(StatusReport {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            interfaces: interfaces.collect(),
            services_file: self.options.services.clone(),
            revision: self.revision,
            applied_seconds_ago: self.applied.elapsed().as_secs(),
            services_error: self.refused.clone(),
            tables: self
                .tables
                .usage()
                .into_iter()
                .map(|usage| TableReport { name: usage.table.to_owned(), used: usage.used, size: usage.size })
                .collect(),
            counters: kernel
                .counters()?
                .into_iter()
                .map(|count| CounterReport {
                    action: count.counter.action.to_owned(),
                    name: count.counter.name.to_owned(),
                    packets: count.packets,
                    bytes: count.bytes,
                })
                .collect(),
        })
    }

    fn services(&self) -> Vec<ServiceReport> {
        let services = self.tables.applied().services().iter();
        services
            .map(|(name, service)| ServiceReport {
                name: name.name.to_string(),
                port: name.port.to_string(),
                protocol: name.protocol,
                family: name.family,
                frontends: service.frontends.iter().copied().collect(),
                algorithm: service.algorithm.name().to_owned(),
                backends: service.backends.len(),
                flows: self.tables.members(name).map(|(_, _, flows)| flows).sum(),
            })
            .collect()
    }

    fn backends(&self) -> Vec<BackendReport> {
        let names = self.tables.applied().services().keys();
        names
            .flat_map(|name| {
                self.tables.members(name).map(|(address, member, flows)| BackendReport {
                    service: name.name.to_string(),
                    port: name.port.to_string(),
                    protocol: name.protocol,
                    address,
                    weight: member.weight.get(),
                    flows,
                })
            })
            .collect()
    }
}

/// The names by which the kernel tells of interfaces, each once: they may have been given by other names of theirs.
fn canonical(interfaces: &[String]) -> Result<Vec<String>, DataplaneError> {
    let mut names = Vec::new();
    for interface in interfaces {
        let index = nix::net::if_::if_nametoindex(interface.as_str()).ok();
        let name = index.and_then(name_of);
        let name = name.ok_or_else(|| DataplaneError::NoInterface { interface: interface.clone() })?;
        if !names.contains(&name) {
            names.push(name);
        }
    }
    Ok(names)
}

/// The name of an interface.
fn name_of(index: u32) -> Option<String> {
    nix::net::if_::if_indextoname(index).ok()?.into_string().ok()
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

/// An error with all of its causes, on one line each way that it is shown.
fn describe(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
