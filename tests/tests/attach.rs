//! Where the programs sit on an interface, and that nothing is left when they go.
#![expect(clippy::expect_used, reason = "this is test code: it fails by panicking")]

use lb_userspace::{
    dataplane::{
        Sizes,
        kernel::{Hook, Kernel, Origin, Settings, TcMode, XdpMode},
    },
    network::remove_empty_clsact,
};
use tests::netns::NetNs;

const SIZES: Sizes = Sizes { services: 8, backends: 8, slots: 8, flows: 128, pending_flows: 128, ..Sizes::DEFAULT };

/// An interface `up0` whose other end is `peer0`.
fn namespace() -> NetNs {
    let namespace = NetNs::new("attach");
    namespace.ip("link add up0 type veth peer name peer0\nlink set up0 up\nlink set peer0 up");
    namespace
}

fn load() -> Kernel {
    Kernel::load(&SIZES, &Settings::default()).expect("the programs load")
}

/// What `tc` shows of an interface.
fn tc(namespace: &NetNs, what: &str) -> String {
    let output = namespace.command("tc").args(what.split(' ')).output().expect("tc (iproute2) is needed");
    String::from_utf8(output.stdout).expect("text")
}

/// How many of our filters there are on each side.
fn filters(namespace: &NetNs, interface: &str) -> [usize; 2] {
    let shown = |side| tc(namespace, &format!("filter show dev {interface} {side}"));
    ["ingress", "egress"].map(|side| {
        shown(side).lines().filter(|line| line.contains(" wharf_tc_") && line.contains("direct-action")).count()
    })
}

/// Whether packets that reach the interface are counted.
fn sees_packets(kernel: &Kernel, namespace: &NetNs) -> bool {
    let packets = || kernel.counters().expect("counters can be read").iter().map(|it| it.packets).sum::<u64>();
    let before = packets();
    // The link's other end asks for neighbours.
    namespace.ip("link set peer0 down\nlink set peer0 up");
    tests::poll(std::time::Duration::from_secs(10), || (packets() > before).then_some(())).is_some()
}

#[test]
fn each_mode_takes_the_place_that_it_names() {
    for (mode, taken) in [
        (XdpMode::Auto, XdpMode::Native),
        (XdpMode::Native, XdpMode::Native),
        (XdpMode::Generic, XdpMode::Generic),
        (XdpMode::Off, XdpMode::Off),
    ] {
        let namespace = namespace();
        namespace.run(|| {
            let mut kernel = load();
            let attachment = kernel.attach_uplink("up0", mode, false).expect("it attaches");
            assert_eq!(attachment.xdp(), taken);
            assert!(attachment.why().is_none());
            assert!(sees_packets(&kernel, &namespace), "{mode:?}");
            kernel.detach();
            assert!(kernel.attached_to("up0").is_none());
        });
    }
}

#[test]
fn where_the_driver_refuses_auto_takes_tc_and_says_why_and_native_fails() {
    let namespace = namespace();
    // A veth takes no XDP program while its other end may send more than a page.
    namespace.ip("link set peer0 mtu 9000");
    namespace.run(|| {
        let mut kernel = load();
        let attachment = kernel.attach_uplink("up0", XdpMode::Auto, false).expect("tc takes its place");
        assert_eq!(attachment.xdp(), XdpMode::Off);
        let why = attachment.why().expect("it says why").to_string();
        assert!(why.contains("native XDP") && why.contains("up0") && why.contains("MTU"), "{why}");
        assert!(sees_packets(&kernel, &namespace));
        let mut strict = load();
        let error = strict.attach_uplink("up0", XdpMode::Native, false).expect_err("there is no native XDP");
        assert_eq!(error.to_string(), why, "{error:?}");
        assert!(strict.attached_to("up0").is_none(), "half of it would be worse than nothing");
    });
}

#[test]
fn without_tcx_filters_of_clsact_do_the_same_and_go_with_the_qdisc_that_was_made_for_them() {
    let namespace = namespace();
    namespace.ip("link add pod0 type veth peer name eth0");
    assert!(namespace.command("tc").args("qdisc add dev pod0 clsact".split(' ')).status().is_ok_and(|it| it.success()));
    namespace.run(|| {
        let mut kernel = load();
        kernel.forgo_tcx();
        let attachment = kernel.attach_uplink("up0", XdpMode::Off, false).expect("it attaches");
        assert_eq!((attachment.tc(), attachment.xdp()), (TcMode::Clsact, XdpMode::Off));
        kernel.attach_pod("pod0").expect("it attaches");
        assert_eq!(filters(&namespace, "up0"), [1, 1]);
        assert_eq!(filters(&namespace, "pod0"), [1, 1]);
        assert!(sees_packets(&kernel, &namespace));
        // The qdisc of pod0 was there before.
        let up0 = nix::net::if_::if_nametoindex("up0").expect("it is there");
        kernel.detach();
        assert_eq!(kernel.take_new_qdiscs(), [up0]);
        assert_eq!([filters(&namespace, "up0"), filters(&namespace, "pod0")], [[0, 0]; 2]);

        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            kernel.attach_pod("up0").expect("it attaches");
            remove_empty_clsact(up0).await.expect("it can be looked at");
            assert_eq!(filters(&namespace, "up0"), [1, 1], "a qdisc that is in use stays");
            kernel.detach();
            assert!(kernel.take_new_qdiscs().is_empty(), "it was there before");
            remove_empty_clsact(up0).await.expect("it can be removed");
            assert!(!tc(&namespace, "qdisc show dev up0").contains("clsact"));
        });
    });
}

#[test]
fn filters_of_an_agent_that_was_killed_are_replaced() {
    let namespace = namespace();
    namespace.run(|| {
        let mut killed = load();
        killed.forgo_tcx();
        killed.attach_uplink("up0", XdpMode::Off, false).expect("it attaches");
        std::mem::forget(killed);
        assert_eq!(filters(&namespace, "up0"), [1, 1]);
        let mut kernel = load();
        kernel.forgo_tcx();
        kernel.attach_uplink("up0", XdpMode::Off, false).expect("it attaches");
        assert_eq!(filters(&namespace, "up0"), [1, 1]);
        assert!(sees_packets(&kernel, &namespace));
    });
}

#[test]
fn every_program_runs_on_single_packets_and_tells_what_its_verification_took() {
    let namespace = namespace();
    namespace.run(|| {
        let kernel = load();
        let up0 = nix::net::if_::if_nametoindex("up0").expect("it is there");
        let mut arp = [0xFF; 42];
        arp[12..14].copy_from_slice(&[0x08, 0x06]);
        for hook in Hook::ALL {
            let after = kernel
                .runner(hook)
                .and_then(|mut runner| runner.run(&arp, up0, Origin::Received))
                .expect("the program runs");
            assert_eq!(after.packet, arp, "{hook:?}");
        }
        let instructions = kernel.verified_instructions().expect("the kernel tells of its programs");
        assert_eq!(instructions.len(), 12, "four hooks, and four stages of each kind");
        assert!(instructions.iter().all(|(_, count)| *count != Some(0)), "{instructions:?}");
    });
}

#[test]
fn by_xdp_nothing_is_sent_to_an_uplink_that_has_none() {
    let namespace = namespace();
    // A bridge takes nothing from XDP programs of other interfaces, and none of its own in the driver.
    namespace.ip("link add br0 type bridge");
    namespace.run(|| {
        let mut kernel = load();
        let attached = ["up0", "br0"].map(|name| {
            let attachment = kernel.attach_uplink(name, XdpMode::Auto, false).expect("it attaches");
            (attachment.index(), attachment.xdp())
        });
        let sends = attached.map(|(index, xdp)| (xdp, kernel.sends_by(index)));
        assert_eq!(sends, [(XdpMode::Native, true), (XdpMode::Off, false)]);
    });
}

#[test]
fn auto_takes_tc_on_a_veth_and_says_why() {
    let namespace = namespace();
    namespace.run(|| {
        let mut kernel = load();
        for (mode, taken) in [(XdpMode::Auto, XdpMode::Off), (XdpMode::Native, XdpMode::Native)] {
            let attachment = kernel.attach_uplink("up0", mode, true).expect("it attaches");
            assert_eq!(attachment.xdp(), taken);
            let why = attachment.why().map(ToString::to_string);
            assert_eq!(why.is_some_and(|why| why.contains("up0 is a veth")), mode == XdpMode::Auto);
        }
    });
}
