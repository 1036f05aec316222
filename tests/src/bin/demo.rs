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
    traffic::{Arrivals, Conversations, Outcome},
};

/// How often each address is used to show how that is spread.
const TIMES: usize = 1_000;

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
        "Wharf is a load balancer: clients connect to one address, and wharf picks the machine that answers.

    client ─────── wharf ──┬── b1      Every machine here is a network namespace. The client knows only the
    192.168.1.2    (XDP)   ├── b2      addresses {VIP4} and {VIP6}, which no machine has:
                           └── b3      wharf, on the way, translates them, packet by packet, in the kernel."
    );
    let lab = Topology::new().client("client").backends(3).up();
    let _servers = lab.serve(8080);
    let client = lab.client();

    step("1. Start the agent on the machine in the middle, with this file:");
    let services = Services::new(&lab);
    println!("\n{}\n", services.all);
    let agent = Agent::start(&lab, &services.all, &[]);
    let interfaces: Vec<_> = lab.lb().interfaces().collect();
    println!("   It is up, with its programs on {}.", interfaces.join(", "));

    step("2. Use both addresses a thousand times each. The backend that answers says its name.");
    for vip in [format!("{VIP4}:80"), format!("[{VIP6}]:80")] {
        show(&format!("TCP connections to {vip}"), &client.get_many(&vip, TIMES, 16), &["b1", "b2", "b3"]);
    }
    for vip in [format!("{VIP4}:53"), format!("[{VIP6}]:53")] {
        show(&format!("UDP datagrams to {vip}"), &client.ask_many(&vip, TIMES, 16), &["b1", "b2", "b3"]);
    }

    step("3. Drain b3, by an edit of the file that gives it weight 0.");
    let traffic = Traffic::start(client);
    println!("   {} connections stay open and talk all the time, and new ones keep coming.", 2 * CONVERSATIONS);
    pause(Duration::from_secs(1));
    show("new connections before the edit", &traffic.take(), &["b1", "b2", "b3"]);
    agent.apply(&services.with_b3_drained);
    traffic.forget();
    pause(Duration::from_secs(1));
    show("after it: none for b3, and every open connection goes on", &traffic.take(), &["b1", "b2"]);
    traffic.expect_all_alive();

    step("4. Remove b3 from the file.");
    agent.apply(&services.without_b3);
    pause(Duration::from_secs(1));
    show("new connections", &traffic.take(), &["b1", "b2"]);

    step("5. Put it back.");
    agent.apply(&services.all);
    traffic.forget();
    pause(Duration::from_secs(1));
    show("new connections", &traffic.take(), &["b1", "b2", "b3"]);

    step("6. How did the open connections fare? Only those to a backend that is removed may end.");
    traffic.finish();

    step("7. Ask the agent what it knows: wharf backends");
    let backends = agent.cli(&["backends"]);
    assert!(backends.status.success(), "wharf backends: {}", String::from_utf8_lossy(&backends.stderr));
    println!();
    String::from_utf8_lossy(&backends.stdout).lines().for_each(|line| println!("   {line}"));
    agent.stop();
    drop(lab);
    println!("\nAll went as it should, in {:.0} s. Nothing is left of it.", began.elapsed().as_secs_f32());
}

/// The services file in the versions that the demo goes through.
struct Services {
    all: String,
    with_b3_drained: String,
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
            with_b3_drained: file(&|address| Some(format!("{{ address: {address}, weight: 0 }}"))),
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

    fn expect_all_alive(&self) {
        for conversations in &self.conversations {
            let stuck = conversations.stuck(Duration::from_secs(1));
            assert!(stuck.is_empty(), "open connections are stuck, to {stuck:?}");
        }
    }

    fn finish(self) {
        let tally: Tally = self.arrivals.into_iter().map(Arrivals::finish).sum();
        assert!(tally.errors.is_empty(), "new connections failed: {tally}");
        let all: Vec<_> = self.conversations.into_iter().flat_map(Conversations::finish).collect();
        let (of_b3, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|outcome| outcome.backend == "b3");
        let broken: Vec<_> = others.iter().filter(|outcome| outcome.end.is_err()).collect();
        assert!(broken.is_empty(), "open connections to b1 and b2 broke: {broken:?}");
        let lines = |outcomes: &[Outcome]| outcomes.iter().map(|outcome| outcome.lines).sum::<usize>();
        println!(
            "\n   {:2} to b1 and b2: {} lines sent and echoed, and no connection broke",
            others.len(),
            lines(&others)
        );
        println!(
            "   {:2} to b3: {} lines; even a backend that is removed keeps the connections that it has",
            of_b3.len(),
            lines(&of_b3)
        );
    }
}

/// Shows a tally in bars, having made sure that it is evenly spread over these backends.
fn show(title: &str, tally: &Tally, backends: &[&str]) {
    println!("\n   {title}");
    for backend in ["b1", "b2", "b3"] {
        let answers = tally.of(backend);
        let bar = "█".repeat(answers * 90 / tally.total().max(1));
        println!("     {}", format!("{backend} {answers:5}  {bar}").trim_end());
    }
    assert_spread(tally, backends);
}

fn step(title: &str) {
    check_interrupt();
    println!("\n{title}");
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
