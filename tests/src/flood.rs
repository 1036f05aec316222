//! A SYN flood: connections that nobody means to open, from addresses that nobody has.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs},
    os::fd::AsRawFd as _,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::sys::socket::{self, AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage};
use tokio_util::sync::CancellationToken;

use crate::{cluster::FORGED, netns::Background, packet::Packet, probe::address, topology::Host};

/// How many are sent between two looks at the clock.
const VOLLEY: u32 = 100;

/// A flood that goes on until it is finished or dropped.
#[derive(Debug)]
#[must_use = "the flood ends when this is dropped"]
pub struct Flood {
    sent: Arc<AtomicU32>,
    sender: Background<()>,
}

impl Host {
    /// Sends `rate` SYNs a second, if the machine is as fast as that, each from another address or port.
    pub fn flood(&self, to: impl ToSocketAddrs, rate: u32) -> Flood {
        let to = address(to);
        let sent = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&sent);
        let sender = self.namespace().spawn(move |stop| send(to, rate, &counter, &stop));
        Flood { sent, sender }
    }
}

impl Flood {
    /// How many SYNs were sent so far.
    pub fn sent(&self) -> u32 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Ends it; how many SYNs were sent.
    pub fn finish(self) -> u32 {
        self.sender.finish();
        self.sent.load(Ordering::Relaxed)
    }
}

fn send(to: SocketAddr, rate: u32, sent: &AtomicU32, stop: &CancellationToken) {
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    // Such a socket takes a whole IP packet, and asks for nothing but where to send it (raw(7)).
    let socket = socket::socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw).expect("we are root");
    // A port in the address would be a protocol to this kind of socket.
    let next = SockaddrStorage::from(SocketAddr::new(to.ip(), 0));
    let begin = Instant::now();
    while !stop.is_cancelled() {
        let first = sent.load(Ordering::Relaxed);
        for number in first..first + VOLLEY {
            let syn = forged_syn(number, to);
            // What does not fit into a queue is lost, as in any flood.
            let _ = socket::sendto(socket.as_raw_fd(), &syn, &next, MsgFlags::empty());
        }
        sent.store(first + VOLLEY, Ordering::Relaxed);
        let due = Duration::from_secs(1).mul_f64(f64::from(first + VOLLEY) / f64::from(rate));
        thread::sleep(due.saturating_sub(begin.elapsed()));
    }
}

/// An IP packet; no two of the first billion have the same address and port.
fn forged_syn(number: u32, to: SocketAddr) -> Vec<u8> {
    const ETHERNET: usize = 14;
    const ADDRESSES: u32 = 1 << 16;
    let (host, port) = (number % ADDRESSES, 1_024 + number / ADDRESSES % 60_000);
    let packet = match to.ip() {
        IpAddr::V4(to) => {
            let source = Ipv4Addr::from_bits(FORGED.0.to_bits() + host);
            Packet::v4(&source.to_string(), &to.to_string())
        }
        IpAddr::V6(to) => {
            let source = Ipv6Addr::from_bits(FORGED.1.to_bits() + u128::from(host));
            Packet::v6(&source.to_string(), &to.to_string())
        }
    };
    packet.tcp(port as u16, to.port()).syn().bytes().split_off(ETHERNET)
}
