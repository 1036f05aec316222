//! Socket-level balancing: what a call on a socket names is translated once, and its packets need nothing more.
//!
//! The programs run in the calls of processes, at the root of the control groups. The kernel holds the socket's lock meanwhile, but
//! a softirq may come between, and run our programs for packets: so nothing of a CPU's own is written here, but by atomic stores.

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{bpf_get_current_ancestor_cgroup_id, bpf_get_netns_cookie, bpf_get_socket_cookie},
    programs::{SockAddrContext, SockContext},
};
use lb_common::{
    abi::{Backend, DATAGRAM_SERVICES, Datagrams, FlowKey, Frontend, ServiceKey, Translation, VipKey, Whose},
    flow::Tick,
    net::{Address, IfIndex, IpProto, Ipv4Be, Ipv6Be, Port, V4, V6, halves, whole},
    verdict::{AnswerReason, DropReason, PassReason, Verdict},
};

use crate::{
    config, count,
    maps::{self, FamilyMaps},
    select, track,
};

/// How deep below the root control groups may be whose sockets are left alone.
const MAX_LEVELS: u32 = 64;

/// The address in a call on a socket.
pub(crate) trait Named<A: Address> {
    fn context(&self) -> &SockAddrContext;
    fn address(&self) -> A;
    fn set_address(&self, address: A);

    #[inline(always)]
    fn port(&self) -> Port {
        // SAFETY: The kernel gives a context; a port stands in the first half of its word.
        Port::from_bytes(unsafe {
            (&raw const (*self.context().sock_addr).user_port).cast::<[u8; 2]>().read_volatile()
        })
    }

    #[inline(always)]
    fn set_port(&self, port: Port) {
        let [first, second] = port.to_bytes();
        // SAFETY: As above; the kernel takes whole words only.
        unsafe {
            (&raw mut (*self.context().sock_addr).user_port).write_volatile(u32::from_ne_bytes([first, second, 0, 0]));
        }
    }

    /// TCP, UDP, or what else there is.
    #[inline(always)]
    fn proto(&self) -> IpProto {
        // SAFETY: As above.
        IpProto(unsafe { (&raw const (*self.context().sock_addr).protocol).read_volatile() } as u16)
    }

    /// What the kernel says of a UDP socket: whether it is connected.
    #[inline(always)]
    fn is_connected(&self) -> bool {
        /// `TCP_ESTABLISHED` (`include/net/tcp_states.h`), in which those of UDP are, too.
        const CONNECTED: u32 = 1;
        // SAFETY: As above; the kernel gives the socket with the context.
        let state = unsafe { (&raw const (*(*self.context().sock_addr).__bindgen_anon_1.sk).state).read_volatile() };
        state == CONNECTED
    }

    /// The number that the kernel gives to this socket and to no other.
    #[inline(always)]
    fn cookie(&self) -> u64 {
        // SAFETY: The helper takes the context of the program.
        unsafe { bpf_get_socket_cookie(self.context().as_ptr()) }
    }

    /// The network namespace of the socket.
    #[inline(always)]
    fn namespace(&self) -> u64 {
        // SAFETY: The helper takes the context of the program.
        unsafe { bpf_get_netns_cookie(self.context().as_ptr()) }
    }
}

/// An IPv4 address.
struct Plain4(SockAddrContext);

/// An IPv4 address in the form that sockets of IPv6 have for them (RFC 4291, section 2.5.5.2).
struct Mapped4(Plain6);

/// An IPv6 address.
struct Plain6(SockAddrContext);

impl Named<Ipv4Be> for Plain4 {
    #[inline(always)]
    fn context(&self) -> &SockAddrContext {
        &self.0
    }

    #[inline(always)]
    fn address(&self) -> Ipv4Be {
        // SAFETY: The kernel gives a context.
        let word = unsafe { (&raw const (*self.0.sock_addr).user_ip4).read_volatile() };
        Ipv4Be::from_bytes(word.to_ne_bytes())
    }

    #[inline(always)]
    fn set_address(&self, address: Ipv4Be) {
        let word = u32::from_ne_bytes(address.to_bytes());
        // SAFETY: As above.
        unsafe { (&raw mut (*self.0.sock_addr).user_ip4).write_volatile(word) }
    }
}

impl Named<Ipv4Be> for Mapped4 {
    #[inline(always)]
    fn context(&self) -> &SockAddrContext {
        &self.0.0
    }

    #[inline(always)]
    fn address(&self) -> Ipv4Be {
        let [_, _, _, word] = self.0.words();
        Ipv4Be::from_bytes(word.to_ne_bytes())
    }

    #[inline(always)]
    fn set_address(&self, address: Ipv4Be) {
        let word = u32::from_ne_bytes(address.to_bytes());
        // SAFETY: The kernel gives a context. What stands before the address stays.
        unsafe { (&raw mut (*self.0.0.sock_addr).user_ip6[3]).write_volatile(word) }
    }
}

impl Plain6 {
    #[inline(always)]
    fn words(&self) -> [u32; 4] {
        let context = self.0.sock_addr;
        // SAFETY: The kernel gives a context.
        unsafe {
            [
                (&raw const (*context).user_ip6[0]).read_volatile(),
                (&raw const (*context).user_ip6[1]).read_volatile(),
                (&raw const (*context).user_ip6[2]).read_volatile(),
                (&raw const (*context).user_ip6[3]).read_volatile(),
            ]
        }
    }

    /// Whether it is an IPv4 address.
    #[inline(always)]
    fn is_mapped(&self) -> bool {
        let [a, b, c, _] = self.words();
        a == 0 && b == 0 && c == u32::to_be(0xFFFF)
    }
}

impl Named<Ipv6Be> for Plain6 {
    #[inline(always)]
    fn context(&self) -> &SockAddrContext {
        &self.0
    }

    #[inline(always)]
    fn address(&self) -> Ipv6Be {
        let [a, b, c, d] = self.words();
        Ipv6Be::from_words([whole(a, b), whole(c, d)])
    }

    #[inline(always)]
    fn set_address(&self, address: Ipv6Be) {
        let [first, second] = address.to_words();
        let ((a, b), (c, d)) = (halves(first), halves(second));
        // SAFETY: The kernel gives a context.
        unsafe {
            (&raw mut (*self.0.sock_addr).user_ip6[0]).write_volatile(a);
            (&raw mut (*self.0.sock_addr).user_ip6[1]).write_volatile(b);
            (&raw mut (*self.0.sock_addr).user_ip6[2]).write_volatile(c);
            (&raw mut (*self.0.sock_addr).user_ip6[3]).write_volatile(d);
        }
    }
}

/// A call that names an address.
pub(crate) trait Call {
    /// `Ok`: it goes to a backend.
    fn run<F: FamilyMaps, N: Named<F::Address>>(named: &N) -> Result<(), Verdict>;
}

/// The program of a call on sockets of IPv4.
#[inline(always)]
pub(crate) fn take4<C: Call>(context: SockAddrContext) -> i32 {
    count::finish_call(C::run::<V4, _>(&Plain4(context)))
}

/// The program of a call on sockets of IPv6.
#[inline(always)]
pub(crate) fn take6<C: Call>(context: SockAddrContext) -> i32 {
    let named = Plain6(context);
    count::finish_call(if named.is_mapped() { C::run::<V4, _>(&Mapped4(named)) } else { C::run::<V6, _>(&named) })
}

/// A socket is connected: from now on all that it sends goes to the backend.
pub(crate) struct Connect;

impl Call for Connect {
    #[inline(always)]
    fn run<F: FamilyMaps, N: Named<F::Address>>(named: &N) -> Result<(), Verdict> {
        let result = connect::<F, N>(named);
        if matches!(result, Err(Verdict::Pass(_))) {
            forget(named);
        }
        result
    }
}

#[inline(always)]
fn connect<F: FamilyMaps, N: Named<F::Address>>(named: &N) -> Result<(), Verdict> {
    let (key, namespace) = asked::<F, N>(named)?;
    let is_of_node = namespace == config::node_namespace();
    let is_reached = (is_of_node || config::ends_all_sockets()) && !config::leaves_udp();
    // One that can't be ended would go on sending to a backend that is gone, or its process would see answers come from there. Packet by
    // packet it is served as well. But a process may have nothing else.
    let is_left = config::ends(IpProto::UDP) && !is_reached || config::shows_backends();
    if key.proto == IpProto::UDP && is_left && has_packets(namespace) {
        return Err(PassReason::NotService.into());
    }
    let now = track::now();
    let chosen = choose::<F, N>(named, &key, namespace, now)?;
    let translation = chosen.translation::<F, N>(named, now);
    let is_noted = note(named, key.proto, &translation);
    let can_end = !(config::ends(key.proto) && is_reached) || maps::watch(named.cookie(), &translation);
    // Nor can this one.
    if key.proto == IpProto::UDP && !(is_noted && can_end) && has_packets(namespace) {
        maps::unwatch(named.cookie());
        return Err(PassReason::NotService.into());
    }
    go_to(named, chosen.backend.address, chosen.backend.port);
    Ok(())
}

/// Whether what the sockets of a network namespace send is met packet by packet.
#[inline(always)]
fn has_packets(namespace: u64) -> bool {
    if namespace == config::node_namespace() { maps::is_met_at(IfIndex::LOOPBACK) } else { config::meets_pods() }
}

/// Notes what a socket is connected to. `false` where there is no room.
#[inline(always)]
fn note<A: Address, N: Named<A>>(named: &N, proto: IpProto, translation: &Translation) -> bool {
    if proto == IpProto::TCP {
        return maps::set_peer(named.cookie(), translation);
    }
    maps::connected_or_new(named.context()).map(|place| *place = *translation).is_some()
}

/// A socket may be connected once more, and then to no service: what it was connected to is over.
#[inline(always)]
fn forget<A: Address, N: Named<A>>(named: &N) {
    if named.proto() == IpProto::TCP {
        end(IpProto::TCP, named.cookie());
    } else if let Some(translation) = maps::connected(named.context())
        && translation.family != 0
    {
        translation.family = 0;
        end(IpProto::UDP, named.cookie());
    }
}

/// A socket is closed.
#[inline(always)]
pub(crate) fn release(SockContext { sock }: SockContext) -> i32 {
    // SAFETY: The kernel gives a context.
    let proto = IpProto(unsafe { (&raw const (*sock).protocol).read_volatile() } as u16);
    if is_balanced(proto) {
        // SAFETY: The helper takes the context of the program.
        end(proto, unsafe { bpf_get_socket_cookie(sock.cast()) });
    }
    count::ALLOW
}

/// What tables have of a socket by its cookie goes.
#[inline(always)]
fn end(proto: IpProto, cookie: u64) {
    if proto == IpProto::TCP {
        maps::forget_peer(cookie);
    }
    if config::ends(proto) {
        maps::unwatch(cookie);
    }
}

/// A socket sends a datagram to an address. One that is connected to a service, and names it all the same, stays with its backend: it is
/// given nobody else's answers. One that is connected elsewhere, or was without us, is therefore left to packets. Of one that is not
/// connected: as long as it sends to a service now and then, it is one flow, and stays with its backend.
pub(crate) struct Sendmsg;

impl Call for Sendmsg {
    #[inline(always)]
    fn run<F: FamilyMaps, N: Named<F::Address>>(named: &N) -> Result<(), Verdict> {
        let (key, namespace) = asked::<F, N>(named)?;
        let now = track::now();
        let address = named.address().to_words();
        let is_to_it = |known: &Translation| {
            known.family == F::NUMBER && known.service_port == key.port && known.service_address == address
        };
        if named.is_connected() {
            let connected = maps::connected(named.context());
            // For a socket of IPv6 that talks IPv4 the kernel itself names the peer, also where its process names none
            // (`udpv6_sendmsg` in `net/ipv6/udp.c`): the backend, which may be a frontend as well.
            if connected.as_ref().is_some_and(|it| is_backend::<F>(it, address, key.port)) {
                return Err(PassReason::NotService.into());
            }
            if let Some(connected) = connected
                && is_to_it(connected)
                && maps::is_current(connected.backend, connected.generation)
            {
                go_to(named, connected.backend_address, connected.backend_port);
                return Ok(());
            }
            if has_packets(namespace) {
                return Err(PassReason::NotService.into());
            }
        }
        if let Some(datagrams) = maps::datagrams(named.context()) {
            let turn = next_turn(datagrams);
            for known in &mut datagrams.translations {
                if known.turn != 0
                    && is_to_it(known)
                    && now.since(known.last_used) <= config::timeouts().datagram
                    && maps::is_current(known.backend, known.generation)
                {
                    known.last_used = now.0;
                    known.turn = turn;
                    datagrams.turn = turn;
                    go_to(named, known.backend_address, known.backend_port);
                    return Ok(());
                }
            }
        }
        let chosen = choose::<F, N>(named, &key, namespace, now)?;
        if let Some(datagrams) = maps::datagrams_or_new(named.context()) {
            let turn = next_turn(datagrams);
            datagrams.turn = turn;
            if let Some(translation) = place(datagrams, address, key.port) {
                *translation = Translation { turn, ..chosen.translation::<F, N>(named, now) };
            }
        }
        go_to(named, chosen.backend.address, chosen.backend.port);
        Ok(())
    }
}

/// A socket is to have an address and a port: not one that is a `NodePort`, whose packets it would never see.
pub(crate) struct Bind;

impl Call for Bind {
    #[inline(always)]
    fn run<F: FamilyMaps, N: Named<F::Address>>(named: &N) -> Result<(), Verdict> {
        let (proto, port) = (named.proto(), named.port());
        if !is_balanced(proto) || port.word() == 0 || named.namespace() != config::node_namespace() {
            return Err(PassReason::NotService.into());
        }
        let address = named.address();
        let has_all = address == F::Address::UNSPECIFIED;
        // A socket of IPv6 that has all addresses has those of IPv4, too.
        let of_ipv4 = ServiceKey::new(Ipv4Be::UNSPECIFIED, port, proto);
        if is_node_port::<F>(&ServiceKey::new(in_tables(address), port, proto), has_all)
            || has_all && is_node_port::<V4>(&of_ipv4, has_all)
        {
            return Err(DropReason::PortInUse.into());
        }
        Err(PassReason::NotService.into())
    }
}

#[inline(always)]
fn is_node_port<F: FamilyMaps>(key: &ServiceKey<F::Address>, has_all: bool) -> bool {
    let is_taken = |Frontend { flags, .. }: Frontend| {
        flags & Frontend::NODE_PORT != 0 && (has_all || flags & Frontend::BIND_ONLY == 0)
    };
    maps::may_be(Whose::Services, key.address) && maps::frontend::<F>(key).is_some_and(is_taken)
}

/// The kernel tells whom a datagram came from, or whom a socket is connected to: the service in place of its backend, so that a process is
/// shown what it asked for. What a UDP socket was before it was connected, or while it was, is no more. It can't fail.
pub(crate) struct Show;

impl Call for Show {
    #[inline(always)]
    fn run<F: FamilyMaps, N: Named<F::Address>>(named: &N) -> Result<(), Verdict> {
        show::<F, N>(named);
        Err(PassReason::NotService.into())
    }
}

/// Whether an address is the backend's that a socket got.
#[inline(always)]
fn is_backend<F: FamilyMaps>(translation: &Translation, address: [u64; 2], port: Port) -> bool {
    translation.family == F::NUMBER && translation.backend_port == port && translation.backend_address == address
}

#[inline(always)]
fn show<F: FamilyMaps, N: Named<F::Address>>(named: &N) {
    let (address, port) = (named.address().to_words(), named.port());
    let is_from = |it: &Translation| is_backend::<F>(it, address, port);
    if named.proto() == IpProto::TCP {
        return maps::peer(named.cookie()).iter().filter(|it| is_from(it)).for_each(|it| come_from(named, it));
    }
    if named.is_connected() {
        return maps::connected(named.context()).iter().filter(|it| is_from(it)).for_each(|it| come_from(named, it));
    }
    let Some(datagrams) = maps::datagrams(named.context()) else { return };
    // One backend may be that of two services: then it answers the one that was sent to last.
    let mut last: Option<&mut Translation> = None;
    for known in &mut datagrams.translations {
        if known.turn != 0 && is_from(known) && last.as_ref().is_none_or(|last| known.turn > last.turn) {
            last = Some(known);
        }
    }
    if let Some(known) = last {
        // A flow lives for as long as either side has something to say.
        known.last_used = track::now().0;
        come_from(named, known);
    }
}

#[inline(always)]
fn go_to<A: Address, N: Named<A>>(named: &N, address: [u64; 2], port: Port) {
    named.set_address(A::from_words(address));
    named.set_port(port);
}

#[inline(always)]
fn come_from<A: Address, N: Named<A>>(named: &N, translation: &Translation) {
    go_to(named, translation.service_address, translation.service_port);
}

/// The number of the next datagram: never zero, which stands for none.
#[inline(always)]
fn next_turn(datagrams: &Datagrams) -> u32 {
    datagrams.turn.wrapping_add(1).max(1)
}

/// The place for a service: its own, or that of the one that was not sent to for longest.
#[inline(always)]
fn place(datagrams: &mut Datagrams, address: [u64; 2], port: Port) -> Option<&mut Translation> {
    let (mut place, mut oldest) = (0, u32::MAX);
    for (index, known) in datagrams.translations.iter().enumerate() {
        let is_same = known.service_port == port && known.service_address == address;
        let turn = if is_same { 0 } else { known.turn };
        if turn < oldest {
            (place, oldest) = (index, turn);
        }
    }
    datagrams.translations.get_mut(place & (DATAGRAM_SERVICES - 1))
}

/// What a call asks for, and in which network namespace, if its sockets are balanced here: as the key of a frontend.
#[inline(always)]
fn asked<F: FamilyMaps, N: Named<F::Address>>(named: &N) -> Result<(ServiceKey<F::Address>, u64), Verdict> {
    let proto = named.proto();
    let is_here = named.address().is_this_host();
    let address = in_tables(named.address());
    if !maps::may_be(Whose::Services, address) || !is_balanced(proto) {
        return Err(PassReason::NotService.into());
    }
    let namespace = named.namespace();
    let is_of_node = namespace == config::node_namespace();
    // A pod's loopback is its own.
    if !is_of_node && (is_here || !config::balances_all_sockets()) || is_exempt() {
        return Err(PassReason::NotService.into());
    }
    Ok((ServiceKey::new(address, named.port(), proto), namespace))
}

/// The address that a frontend is looked up by: one entry stands for all addresses of this host's own.
#[inline(always)]
fn in_tables<A: Address>(address: A) -> A {
    if address.is_this_host() { A::UNSPECIFIED } else { address }
}

#[inline(always)]
fn is_balanced(proto: IpProto) -> bool {
    proto == IpProto::TCP || proto == IpProto::UDP
}

/// Whether the process is in a control group whose sockets are left alone.
#[inline(always)]
fn is_exempt() -> bool {
    for level in 0..MAX_LEVELS {
        if config::may_be_exempt(level) {
            // SAFETY: The helper takes a number; it gives zero where the process is not so deep.
            let id = unsafe { bpf_get_current_ancestor_cgroup_id(level as i32) };
            if maps::is_exempt(id) {
                return true;
            }
        }
    }
    false
}

/// The backend that a call gets.
struct Chosen {
    id: u32,
    backend: &'static Backend,
}

impl Chosen {
    /// What the call named, and what it got in its place.
    #[inline(always)]
    fn translation<F: FamilyMaps, N: Named<F::Address>>(&self, named: &N, now: Tick) -> Translation {
        Translation {
            // What the process named, and not the entry that stands for it.
            service_address: named.address().to_words(),
            backend_address: self.backend.address,
            service_port: named.port(),
            backend_port: self.backend.port,
            backend: self.id,
            generation: self.backend.generation,
            last_used: now.0,
            turn: 0,
            family: F::NUMBER,
        }
    }
}

/// The backend that the call gets. Clients on the node are in the cluster: source ranges are not for them, and for external
/// addresses the policy is Cluster.
#[inline(always)]
fn choose<F: FamilyMaps, N: Named<F::Address>>(
    named: &N,
    key: &ServiceKey<F::Address>,
    namespace: u64,
    now: Tick,
) -> Result<Chosen, Verdict> {
    let is_served = |frontend: &Frontend| frontend.flags & Frontend::BIND_ONLY == 0;
    let Some(frontend) = maps::frontend::<F>(key).filter(is_served) else {
        return Err(match maps::vip::<F>(key.address) {
            Some(flags) if flags & VipKey::REFUSES != 0 => AnswerReason::WrongPort.into(),
            _ => PassReason::NotService.into(),
        });
    };
    let choice = select::choice(frontend, true)?;
    // The address and port that it will send from are not known yet: its namespace and the socket stand for them.
    let client = F::Address::of_namespace(namespace);
    let port = Port::from_host(named.cookie() as u16);
    let flow = FlowKey::new(client, key.address, (port, key.port), key.proto);
    let id = select::backend(choice, &flow, now)?;
    let backend = maps::backend(id).ok_or(DropReason::MapMissing)?;
    maps::count_flow(id);
    Ok(Chosen { id, backend })
}
