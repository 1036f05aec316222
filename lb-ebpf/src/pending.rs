//! Flows that are not established: opened, found, promoted. A flood of SYNs makes only such, in a table of their own, and
//! forces out no flow that carries data.
//!
//! Their entries are changed in place, field by field. The kernel may give the memory of an evicted entry to another one in
//! that very moment; then that one is promoted a packet later, or ends a little sooner.

use lb_common::{
    abi::{Backend, Flow, FlowAbout, FlowKey},
    flow::{Direction, State, TcpFlags, Tick},
    net::{Address, IfIndex, IpProto, Port},
    parse::{self, Segment},
    verdict::{DropReason, Verdict},
};

use crate::{
    classify, config, emit,
    maps::{self, FamilyMaps, Workspace},
    packet::{Hook, Packet},
    select, socket,
    track::{self, EEXIST, Moment},
};

/// How many source ports are tried for a new flow: the client's own, then random ones of the SNAT range.
/// With half of the range in use towards one backend, one flow in 2^15 finds none.
const SNAT_TRIES: u32 = 16;

/// For how long, in ticks, a connection that is opening keeps its tuple from others while neither end says anything: no client
/// takes so long to acknowledge an answer. A flood of SYNs would else take all tuples towards a backend for a minute.
const OPENING_TUPLE: u32 = 3;

/// How many bytes a backend may have sent when its client's first acknowledgement comes: none, but by TCP Fast Open (RFC 7413)
/// an initial window. Of acknowledgements that are guessed one in 2^16 gets through.
const FIRST_WINDOW: u32 = 1 << 16;

/// The pending flow of a packet, copied from its entry, which notes what the packet says. One that is over is removed; one
/// that this packet establishes is promoted.
#[inline(always)]
pub(crate) fn find<P: Packet, F: FamilyMaps>(
    packet: &P,
    segment: &Segment<F::Address>,
    moment: Moment,
) -> Result<Option<&'static mut Flow<F::Address>>, Verdict> {
    let key = &segment.key;
    let Some(mut entry) = maps::flow(F::pending(), key) else { return Ok(None) };
    let flow = &mut F::workspace().ok_or(DropReason::MapMissing)?.flow;
    if !maps::copy_flow(key, entry, flow) {
        return Ok(None);
    }
    if track::is_over(F::pending(), segment, flow, moment.tick) {
        track::close(F::pending(), key, flow);
        return Ok(None);
    }
    let has_lasted = moment.tick.since(flow.last_seen) > 0;
    if emit::has_lost_its_hop(flow, moment) {
        emit::lookup::<P, F>(packet, segment, moment, flow)?;
        maps::replace_flow(F::pending(), key, flow);
        let Some(replaced) = maps::flow(F::pending(), key) else { return Ok(None) };
        entry = replaced;
    }
    if flow.state() == State::Promoted {
        return Ok(Some(flow));
    }
    let peer_key = &mut F::workspace().ok_or(DropReason::MapMissing)?.peer_key;
    *peer_key = flow.answer(key.proto);
    let Some(peer) = track::peer(F::pending(), key, peer_key) else {
        // Forced out by others: without it the two ends can't talk, and the client opens the flow again.
        maps::remove_flow(F::pending(), key);
        return Ok(None);
    };
    entry.last_seen = moment.tick.0;
    // The copy is what becomes an established flow.
    flow.last_seen = moment.tick.0;
    if flow.direction() == Direction::Reply {
        note_answer(packet, segment, entry);
    } else if !segment.flags.is_syn()
        && !segment.flags.resets()
        && is_proven(packet, segment, peer, has_lasted)
        && promote::<F>(key, peer, segment.flags)
    {
        for left in [entry, peer] {
            left.state = State::Promoted as u8;
            left.last_seen = moment.tick.0;
        }
        return Ok(Some(flow));
    }
    if segment.flags.ends() {
        entry.state = State::Closing as u8;
    }
    if segment.flags.resets() {
        peer.state = State::Closing as u8;
        peer.last_seen = moment.tick.0;
    }
    Ok(Some(flow))
}

/// Makes the entries of a new flow to a backend: one for the replies, whose tuple no other flow may have, and one for the requests.
/// Where another CPU opens the same flow meanwhile, its entries stay.
#[inline(never)] // The stack, as in `track`.
#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "by value it takes two registers, and BPF has five for arguments"
)]
pub(crate) fn open<P: Packet, F: FamilyMaps>(
    packet: &P,
    segment: &Segment<F::Address>,
    moment: &Moment,
    id: u32,
) -> Result<(), Verdict> {
    let key = &segment.key;
    let backend = maps::backend(id).ok_or(DropReason::MapMissing)?;
    let address = F::Address::from_words(backend.address);
    let flags = if packet.is_own() {
        Flow::<F::Address>::OWN
    } else if packet.hook() == Hook::POD && address == key.source {
        Flow::<F::Address>::HAIRPIN
    } else if packet.hook() == Hook::POD || backend.flags & Backend::ON_NODE != 0 {
        Flow::<F::Address>::ON_NODE
    } else {
        0
    };
    let workspace = F::workspace().ok_or(DropReason::MapMissing)?;
    let about = FlowAbout {
        direction: Direction::Request,
        backend: id,
        generation: backend.generation,
        flags,
        now: moment.tick,
    };
    workspace.peer_key = FlowKey::new(address, key.source, (backend.port, key.source_port), key.proto);
    make_entry(&mut workspace.flow, key, &workspace.peer_key, &about);
    if flags & Flow::<F::Address>::OWN != 0 {
        emit::lookup::<P, F>(packet, segment, *moment, &mut workspace.flow)?;
        let interface = workspace.flow.hop.interface;
        if !maps::is_met_at(if interface == IfIndex(0) { IfIndex::LOOPBACK } else { interface }) {
            return Err(DropReason::ReplyUnseen.into());
        }
        // The process's is one for the way to the service, on which the backend need not be.
        if interface != IfIndex(0)
            && let Ok(address) = source::<P, F>(packet, &workspace.flow)
        {
            workspace.peer_key.destination = address;
            workspace.flow.leave_from(address);
        }
    } else if flags & Flow::<F::Address>::ON_NODE == 0 {
        classify::lives_on(segment, Direction::Request)?;
        // The way out is asked for first: our address depends on it, and a packet that can't leave makes no entry.
        if workspace.flow.needs_hop() {
            emit::lookup::<P, F>(packet, segment, *moment, &mut workspace.flow)?;
        }
        workspace.peer_key.destination = source::<P, F>(packet, &workspace.flow)?;
        workspace.flow.leave_from(workspace.peer_key.destination);
    }
    let about = FlowAbout { direction: Direction::Reply, ..about };
    make_entry(&mut workspace.peer, &workspace.peer_key, key, &about);
    if flags & Flow::<F::Address>::OWN != 0 && key.proto != IpProto::SCTP {
        // Its own port is one that the node's connections take, and the node may open one to this very backend from there.
        leave_from(workspace, random_port());
    }
    claim::<P, F>(packet, key, workspace, *moment)?;
    match maps::claim_flow(F::pending(), key, &workspace.flow) {
        Ok(()) => {
            maps::count_flow(id);
            Ok(())
        }
        Err(error) => {
            maps::remove_flow(F::pending(), &workspace.peer_key);
            if error == EEXIST { Ok(()) } else { Err(DropReason::FlowTableFull.into()) }
        }
    }
}

#[inline(never)] // The stack: the compiler would keep what both entries have in common there.
fn make_entry<A: Address>(flow: &mut Flow<A>, key: &FlowKey<A>, answer: &FlowKey<A>, about: &FlowAbout) {
    flow.set(key, answer, about);
}

/// Claims a tuple for the replies by adding their entry: to the client's port, or else to a random one of the SNAT range.
/// A tuple that a socket of the host has or listens for is the host's.
///
/// The entry is added to the pending flows first, and then the established ones are looked at: a flow that is promoted on
/// another CPU is among the latter before it leaves the former.
#[inline(always)]
fn claim<P: Packet, F: FamilyMaps>(
    packet: &P,
    key: &FlowKey<F::Address>,
    workspace: &mut Workspace<F::Address>,
    moment: Moment,
) -> Result<(), DropReason> {
    // SCTP's checksum is a CRC over the ports, too.
    let tries = if workspace.peer_key.proto == IpProto::SCTP { 1 } else { SNAT_TRIES };
    for _ in 0..tries {
        let Workspace { flow, peer, peer_key, .. } = workspace;
        let is_ours = flow.is_on_node() || !socket::has_tuple::<P, F>(packet, peer_key);
        if is_ours && !are_alike(key, peer_key) && is_free::<F>(peer_key, moment) {
            match maps::claim_flow(F::pending(), peer_key, peer) {
                Ok(()) if track::reap(F::flows(), peer_key, moment.tick) => return Ok(()),
                Ok(()) => maps::remove_flow(F::pending(), peer_key),
                Err(EEXIST) => {}
                Err(_no_room) => return Err(DropReason::FlowTableFull),
            }
        }
        leave_from(workspace, random_port());
    }
    Err(DropReason::SnatPortsExhausted)
}

/// Whether both directions would be of one tuple: a backend that is its own client may ask from the very port that it listens on.
#[inline(never)] // The stack, as in `track`: Linux 6.1 adds up the frames of all calls.
fn are_alike<A: Address>(key: &FlowKey<A>, answer: &FlowKey<A>) -> bool {
    *key == *answer
}

/// Has a new flow's packets leave from another port.
#[inline(always)]
fn leave_from<A: Address>(workspace: &mut Workspace<A>, port: Port) {
    workspace.flow.leave_from_port(port);
    workspace.peer.arrive_at_port(&mut workspace.peer_key, port);
}

/// Whether no pending flow holds a tuple. What is left of a promoted one does not, and is removed.
#[inline(always)]
fn is_free<F: FamilyMaps>(key: &FlowKey<F::Address>, moment: Moment) -> bool {
    match maps::flow(F::pending(), key) {
        None => true,
        Some(holder) if holder.state() == State::Promoted => {
            track::close(F::pending(), key, holder);
            true
        }
        Some(holder) => {
            let timeout = config::timeouts().opening;
            // One that is opening is looked at as if it were later.
            let ahead = if holder.state() == State::Opening { timeout.saturating_sub(OPENING_TUPLE) } else { 0 };
            track::reap(F::pending(), key, Tick(moment.tick.0.wrapping_add(ahead)))
        }
    }
}

/// The address that packets leave with: ours on the interface that they leave by, as for the kernel's masquerading.
/// Where the FIB does not say which (a tunnel), ours on the one that they came in by; where that has none, the node's.
#[inline(always)]
fn source<P: Packet, F: FamilyMaps>(packet: &P, flow: &Flow<F::Address>) -> Result<F::Address, DropReason> {
    let egress = flow.hop.interface;
    let interface = if egress == IfIndex(0) { packet.interface() } else { egress };
    let mut address = maps::address::<F>(interface);
    if address == F::Address::UNSPECIFIED {
        address = maps::address::<F>(IfIndex(0));
    }
    if address == F::Address::UNSPECIFIED { Err(DropReason::NoSourceAddress) } else { Ok(address) }
}

/// A random port of the SNAT range.
#[inline(always)]
fn random_port() -> Port {
    let (first, n_ports) = config::snat_ports();
    let offset = (u64::from(select::random()) * u64::from(n_ports)) >> 32;
    Port::from_host(first.wrapping_add(offset as u16))
}

/// Notes that the backend has answered, and with which sequence number: only a client that has seen it can acknowledge it.
#[inline(always)]
fn note_answer<P: Packet, A: Address>(packet: &P, segment: &Segment<A>, entry: &mut Flow<A>) {
    if segment.key.proto == IpProto::TCP {
        if segment.flags.0 & (TcpFlags::SYN | TcpFlags::ACK) != TcpFlags::SYN | TcpFlags::ACK {
            return;
        }
        let Some((sequence, _)) = parse::tcp_numbers(packet, segment.transport) else { return };
        entry.sequence = sequence;
    }
    entry.flags |= Flow::<A>::ANSWERED;
}

/// Whether a request shows that its client has had the backend's answer, and so is who it says. For UDP it is enough that
/// there was an answer, or that the flow has lasted: senders who never hear back are common.
#[inline(always)]
fn is_proven<P: Packet, A: Address>(packet: &P, segment: &Segment<A>, peer: &Flow<A>, has_lasted: bool) -> bool {
    match segment.key.proto {
        IpProto::TCP => {
            let Some((_, acknowledged)) = parse::tcp_numbers(packet, segment.transport) else { return false };
            peer.is_answered() && acknowledged.wrapping_sub(peer.sequence).wrapping_sub(1) < FIRST_WINDOW
        }
        IpProto::UDP => peer.is_answered() || has_lasted,
        _ => peer.is_answered(),
    }
}

/// Gives a flow its entries among the established ones. `false` if there is no room for them.
#[inline(never)] // The stack, as in `track`.
fn promote<F: FamilyMaps>(key: &FlowKey<F::Address>, entry: &Flow<F::Address>, flags: TcpFlags) -> bool {
    let Some(Workspace { flow, peer, peer_key, .. }) = F::workspace() else { return false };
    if !maps::copy_flow(peer_key, entry, peer) {
        return false;
    }
    for established in [&mut *flow, &mut *peer] {
        established.flags |= Flow::<F::Address>::ESTABLISHED;
        // The backend may have closed already.
        if established.state() == State::Opening {
            established.state = State::Established as u8;
        }
    }
    flow.state = flow.state().after(flags) as u8;
    // The replies' tuple decides, as when it was claimed. Whose it is if it is taken: this flow's, promoted by another CPU.
    if maps::claim_flow(F::flows(), peer_key, peer).is_err() || maps::claim_flow(F::flows(), key, flow).is_err() {
        return track::peer(F::flows(), key, peer_key).is_some();
    }
    if flow.state() != State::Closing {
        maps::count_active(flow.backend, flow.generation, 1);
    }
    true
}
