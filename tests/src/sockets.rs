//! Calls on sockets as processes make them: who answers, and whom the process is shown.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::AsRawFd,
};

use crate::{
    probe::{Connection, TIMEOUT, address, explain},
    slowness,
    topology::Host,
};

/// A way to talk to an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Call {
    /// A TCP connection.
    Tcp,
    /// A UDP socket that is connected.
    Connected,
    /// A UDP socket that is not.
    Unconnected,
}

impl Call {
    /// Every way.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Connected, Self::Unconnected];
}

/// A UDP socket: not connected, unless one connects it.
#[derive(Debug)]
pub struct Datagrams {
    socket: UdpSocket,
}

impl Host {
    /// The name of who answers a process that talks to an address in this way, and is shown that very address as its peer.
    ///
    /// An emulated machine may stand still for so long that a neighbour on the way is given up, and a datagram with it: there, who gets
    /// no answer asks once more, on another socket.
    pub fn call(&self, call: Call, to: SocketAddr) -> io::Result<String> {
        let result = self.call_once(call, to);
        let is_lost = result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::TimedOut);
        if !(is_lost && call != Call::Tcp && slowness() > 1) {
            return result;
        }
        eprintln!("{}: no answer from {to} ({call:?}), asked again", self.name());
        self.call_once(call, to)
    }

    fn call_once(&self, call: Call, to: SocketAddr) -> io::Result<String> {
        match call {
            Call::Tcp => self.namespace().run(|| {
                let connection = Connection::open(to)?;
                let backend = connection.backend().to_owned();
                shown(connection.into_stream().peer_addr()?, to)?;
                Ok(backend)
            }),
            Call::Connected => {
                let socket = self.datagrams(to.ip());
                socket.connect(to)?;
                socket.ask_peer()
            }
            Call::Unconnected => self.datagrams(to.ip()).ask(to),
        }
    }

    /// A UDP socket of the family of this address.
    pub fn datagrams(&self, like: IpAddr) -> Datagrams {
        let any = if like.is_ipv4() { IpAddr::from(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = self.namespace().run(|| UdpSocket::bind((any, 0)).expect("there are ports left"));
        socket.set_read_timeout(Some(*TIMEOUT)).expect("it is no zero");
        Datagrams { socket }
    }
}

/// Ends that a socket is connected (connect(2), `AF_UNSPEC`).
pub fn disconnect(socket: &impl AsRawFd) -> io::Result<()> {
    let nobody = libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
    // SAFETY: The kernel reads an address of this length.
    let result = unsafe { libc::connect(socket.as_raw_fd(), &raw const nobody, size_of_val(&nobody) as u32) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl Datagrams {
    /// Connects it.
    pub fn connect(&self, to: impl std::net::ToSocketAddrs) -> io::Result<()> {
        self.socket.connect(address(to))
    }

    /// Ends that it is connected.
    pub fn disconnect(&self) -> io::Result<()> {
        disconnect(&self.socket)
    }

    /// Whom the process is shown as its peer.
    pub fn peer(&self) -> io::Result<SocketAddr> {
        self.socket.peer_addr()
    }

    /// Whether the kernel has ended it.
    pub fn is_ended(&self) -> bool {
        let error = self.socket.take_error().expect("it is a socket");
        error.is_some_and(|error| error.kind() == io::ErrorKind::ConnectionAborted)
    }

    /// Asks this address; the name of who answers, if the answer comes from there as the process sees it.
    pub fn ask(&self, to: impl std::net::ToSocketAddrs) -> io::Result<String> {
        let to = address(to);
        self.socket.send_to(b"who?", to)?;
        self.answer(to)
    }

    /// Asks the peer; the name of who answers, if the answer comes from there as the process sees it.
    pub fn ask_peer(&self) -> io::Result<String> {
        let peer = self.peer()?;
        self.socket.send(b"who?")?;
        self.answer(peer)
    }

    fn answer(&self, to: SocketAddr) -> io::Result<String> {
        let mut buffer = [0; 64];
        let (length, from) = self.socket.recv_from(&mut buffer).map_err(explain)?;
        shown(from, to)?;
        let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
        match text.split_once(' ') {
            Some((backend, "who?")) => Ok(backend.to_owned()),
            _ => Err(io::Error::other(format!("it answered {text:?}"))),
        }
    }
}

/// The same address in the form that sockets of IPv6 have for those of IPv4.
pub fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) => (ip.to_ipv6_mapped(), address.port()).into(),
        IpAddr::V6(_) => address,
    }
}

/// Expects that a process is shown whom it asked for.
fn shown(peer: SocketAddr, expected: SocketAddr) -> io::Result<()> {
    if peer == expected { Ok(()) } else { Err(io::Error::other(format!("{peer} is shown in place of {expected}"))) }
}
