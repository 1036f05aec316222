//! `cargo xtask demo`: shows Wharf at work on real kernel networking, inside of network namespaces.
#![expect(
    clippy::panic,
    reason = "an expectation that is not met ends the demo, and all it raised goes on the way out"
)]

use std::{
    panic,
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{self, SigHandler, Signal},
    unistd::geteuid,
};
use tests::{
    agent::Agent,
    probe::{Tally, assert_spread},
    topology::{Host, Lab, Topology, VIP4, VIP6},
    traffic::{Arrivals, Conversation, Conversations},
};

/// How many connections are opened to each address to show how they are spread.
const CONNECTIONS: usize = 1_000;

/// How many connections stay open to each address while backends come and go.
const CONVERSATIONS: usize = 15;

/// Set by Ctrl-C, and looked at between the steps.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    if !geteuid().is_root() {
        eprintln!("The demo makes network namespaces and loads programs into the kernel, which only root may.");
        return ExitCode::FAILURE;
    }
    handle_interrupts();
    panic::set_hook(Box::new(|panic| {
        if !is_interrupted() {
            let cause = panic.payload();
            let text = cause.downcast_ref::<String>().map(String::as_str).or(cause.downcast_ref::<&str>().copied());
            eprintln!("\nThis should not have happened: {}", text.unwrap_or("no reason is known"));
        }
    }));
    match panic::catch_unwind(demo) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if is_interrupted() => {
            eprintln!("\nInterrupted; everything that the demo made is removed.");
            ExitCode::from(130)
        }
        Err(_) => ExitCode::FAILURE,
    }
}

fn demo() {
    let began = Instant::now();
    println!(
        "Wharf spreads the connections to one address over many machines. Here it does so on real kernel networking:

    client ─────── wharf ──┬── b1       The client knows only the addresses {VIP4} and {VIP6}.
    192.168.1.2    (XDP)   ├── b2       No machine has them; wharf, on the way, picks a backend for each
                           └── b3       connection. Machines are network namespaces, and go at the end."
    );
    let lab = Topology::new().client("client").backends(3).up();
    let _servers = lab.serve(8080);

    step("Start the agent with this file");
    let services = Services::new(&lab);
    println!("{}\n", services.all);
    let agent = Agent::start(&lab, &services.all, &[]);
    println!("    wharf run --services services.yaml --interface eth-client --interface eth-b1 …    is up");

    step("Open many connections; each backend says its name");
    let client = lab.client();
    for vip in [format!("{VIP4}:80"), format!("[{VIP6}]:80")] {
        show(
            &format!("{CONNECTIONS} TCP connections to {vip}"),
            &client.get_many(&vip, CONNECTIONS, 16),
            &["b1", "b2", "b3"],
        );
    }
    for vip in [format!("{VIP4}:53"), format!("[{VIP6}]:53")] {
        show(
            &format!("{CONNECTIONS} UDP datagrams to {vip}"),
            &client.ask_many(&vip, CONNECTIONS, 16),
            &["b1", "b2", "b3"],
        );
    }

    step("Drain b3, by editing the file while traffic goes on");
    let traffic = Traffic::start(client);
    println!("    {} connections stay open and send lines all the time; new ones keep coming.", 2 * CONVERSATIONS);
    pause(Duration::from_secs(1));
    show("new connections before", &traffic.take(), &["b1", "b2", "b3"]);
    agent.apply(&services.without_new_for_b3);
    traffic.forget();
    pause(Duration::from_secs(1));
    show(
        "new connections with `weight: 0` at b3: it gets none, and keeps those that it has",
        &traffic.take(),
        &["b1", "b2"],
    );

    step("Remove b3 from the file");
    agent.apply(&services.without_b3);
    pause(Duration::from_secs(1));
    show("new connections", &traffic.take(), &["b1", "b2"]);

    step("Put it back");
    agent.apply(&services.all);
    traffic.forget();
    pause(Duration::from_secs(1));
    show("new connections", &traffic.take(), &["b1", "b2", "b3"]);

    step("How the open connections fared meanwhile");
    traffic.finish();

    step("What the agent says (`wharf backends`)");
    let backends = agent.cli(&["backends"]);
    assert!(backends.status.success(), "wharf backends: {}", String::from_utf8_lossy(&backends.stderr));
    println!("{}", String::from_utf8_lossy(&backends.stdout).trim_end());
    agent.stop();
    drop(lab);
    println!(
        "\nAll went as it should, in {:.0} s. Everything that the demo made is removed.",
        began.elapsed().as_secs_f32()
    );
}

/// The services file in the versions that the demo goes through.
struct Services {
    all: String,
    without_new_for_b3: String,
    without_b3: String,
}

impl Services {
    fn new(lab: &Lab) -> Self {
        let file = |b3: &dyn Fn(String) -> Option<String>| {
            let b = |i| [lab.backend(i).v4().to_string(), format!("\"{}\"", lab.backend(i).v6())];
            let backends: Vec<_> = [b(1), b(2)].concat().into_iter().chain(b(3).into_iter().filter_map(b3)).collect();
            let backends = backends.join(", ");
            format!(
                "    services:
      - name: web
        addresses: [{VIP4}, \"{VIP6}\"]
        ports: [{{ port: 80, targetPort: 8080 }}]
        backends: [{backends}]
      - name: dns
        addresses: [{VIP4}, \"{VIP6}\"]
        ports: [{{ port: 53, targetPort: 8080, protocol: UDP }}]
        backends: [{backends}]"
            )
        };
        Self {
            all: file(&Some),
            without_new_for_b3: file(&|address| Some(format!("{{ address: {address}, weight: 0 }}"))),
            without_b3: file(&|_| None),
        }
    }
}

/// Connections to both addresses, open ones and new ones.
struct Traffic {
    conversations: Vec<Conversations>,
    arrivals: Vec<Arrivals>,
}

impl Traffic {
    fn start(client: &Host) -> Self {
        let vips = [format!("{VIP4}:80"), format!("[{VIP6}]:80")];
        Self {
            conversations: vips.iter().map(|vip| client.converse(vip, CONVERSATIONS)).collect(),
            arrivals: vips.iter().map(|vip| client.keep_calling(vip)).collect(),
        }
    }

    /// The new connections since the last time.
    fn take(&self) -> Tally {
        self.arrivals.iter().map(Arrivals::take).sum()
    }

    /// Leaves out of the next count what arrived while an edit came into force; but none may have failed.
    fn forget(&self) {
        let tally = self.take();
        assert!(tally.errors.is_empty(), "new connections failed: {tally}");
    }

    fn finish(self) {
        let tally: Tally = self.arrivals.into_iter().map(Arrivals::finish).sum();
        assert!(tally.errors.is_empty(), "new connections failed: {tally}");
        let all: Vec<_> = self.conversations.into_iter().flat_map(Conversations::finish).collect();
        let (of_b3, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|conversation| conversation.backend == "b3");
        let failed: Vec<_> = others.iter().filter(|conversation| conversation.end.is_err()).collect();
        assert!(failed.is_empty(), "open connections to b1 and b2 failed: {failed:?}");
        let lines = |conversations: &[Conversation]| conversations.iter().map(|it| it.lines).sum::<usize>();
        println!("    {} to b1 and b2: {} lines sent and echoed, none lost, none broken", others.len(), lines(&others));
        println!("    {} to b3: {} lines, until it was removed", of_b3.len(), lines(&of_b3));
    }
}

/// Shows a tally in bars, having made sure that it is evenly spread over these backends.
fn show(title: &str, tally: &Tally, backends: &[&str]) {
    println!("\n    {title}");
    for backend in ["b1", "b2", "b3"] {
        let answers = tally.of(backend);
        println!("      {backend} {answers:5}  {}", "█".repeat(answers * 90 / tally.total().max(1)));
    }
    if !tally.errors.is_empty() {
        println!("      {tally}");
    }
    assert_spread(tally, backends);
}

fn step(title: &str) {
    check_interrupt();
    println!("\n── {title} ──\n");
}

/// Lets traffic flow for a while.
fn pause(duration: Duration) {
    let end = Instant::now() + duration;
    while Instant::now() < end {
        check_interrupt();
        thread::sleep(Duration::from_millis(20));
    }
}

/// Makes Ctrl-C (and SIGTERM) unwind, so that namespaces and processes go as they do when a test fails.
fn handle_interrupts() {
    extern "C" fn note(_signal: i32) {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: The handler does nothing but store a flag.
        if let Err(error) = unsafe { signal::signal(signal, SigHandler::Handler(note)) } {
            panic!("cannot handle {signal}: {error}");
        }
    }
}

fn is_interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

fn check_interrupt() {
    if is_interrupted() {
        panic::resume_unwind(Box::new("interrupted"));
    }
}
