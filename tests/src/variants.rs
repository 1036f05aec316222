//! What most tests of nodes are run for: both places where the agent's programs can be, and both kinds of pod network.

use crate::{
    agent::Agent,
    cluster::{Layout, Node, PodNetwork, Uplinks},
};

/// A value of the agent's `--xdp`, and a cluster in which that makes sense.
#[derive(Clone, Debug)]
pub struct Variant {
    /// `native`: XDP on uplinks, which are cards. `off`: tc alone, on uplinks that leave to others what veth leaves to others.
    pub xdp: &'static str,
    /// The cluster.
    pub layout: Layout,
}

/// Each place with each pod network, for what is to be shown of all kinds of traffic.
pub const VARIANTS: [Variant; 4] = [
    Variant::native(PodNetwork::Bridged),
    Variant::off(PodNetwork::Bridged),
    Variant::native(PodNetwork::Routed),
    Variant::off(PodNetwork::Routed),
];

/// Each place and each pod network once, for all else.
pub const PAIR: [Variant; 2] = [Variant::native(PodNetwork::Bridged), Variant::off(PodNetwork::Routed)];

impl Variant {
    const fn native(pods: PodNetwork) -> Self {
        Self { xdp: "native", layout: Layout::new(pods).uplinks(Uplinks::Cards) }
    }

    const fn off(pods: PodNetwork) -> Self {
        Self { xdp: "off", layout: Layout::new(pods).uplinks(Uplinks::Veth) }
    }

    /// The same with another cluster, made from this one.
    pub fn with(&self, change: impl FnOnce(Layout) -> Layout) -> Self {
        Self { xdp: self.xdp, layout: change(self.layout.clone()) }
    }

    /// Runs the agent on a node in this way; see [`Agent::start_on`].
    #[track_caller]
    pub fn start(&self, node: &Node, services: &str, arguments: &[&str]) -> Agent {
        // Where a test fails, this says in which variant.
        println!("--xdp {} on {} of {:?}", self.xdp, node.host().name(), self.layout);
        Agent::start_on(node, services, &[&["--xdp", self.xdp], arguments].concat())
    }
}
