//! What a client does and sees: connections, datagrams, and which backend answered how often.

use std::{
    collections::BTreeMap,
    fmt,
    io::{self, BufRead as _, BufReader, IoSliceMut, Write as _},
    iter::Sum,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs, UdpSocket},
    os::fd::AsRawFd as _,
    sync::{
        LazyLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::socket::{
        self, AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage,
        setsockopt,
        sockopt::{Ipv4RecvErr, Ipv4Ttl, Ipv6RecvErr, Ipv6Ttl, ReuseAddr, UdpGsoSegment},
    },
};

use crate::{
    SLOWNESS,
    servers::{BURST, WHOAMI},
    topology::Host,
};

/// How long an answer may take. The network is inside one machine, so this is a failure and not a delay.
pub static TIMEOUT: LazyLock<Duration> = LazyLock::new(|| Duration::from_secs(10) * *SLOWNESS);

/// The same for pings, of which most in tests are not answered.
const PING_TIMEOUT: Duration = Duration::from_secs(3);

/// How long an attempt may take of which silence is a good outcome. TCP's second SYN comes after a second.
const PROMPT: Duration = Duration::from_millis(700);

/// What one line is, in bytes, that is meant to fill the way: many segments, and many windows.
const BULK: usize = 4 << 20;

/// How many datagrams are handed to the kernel as one, of how many bytes, and how often: these are two megabytes each way.
const BURST_COUNT: u16 = 40;
const BURST_SIZE: u16 = 1_000;
const BURSTS: usize = 50;

/// What becomes of an attempt to talk to an address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fate {
    /// This backend answered.
    Answered(String),
    /// Somebody said at once that there is nobody.
    Refused,
    /// No answer came, and nothing else.
    Silent,
    /// Another error.
    Failed(String),
}

/// Who answered a client, and whom it saw.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Seen {
    /// The name of the backend.
    pub backend: String,
    /// The client's address as the client knows it.
    pub own: SocketAddr,
    /// The client's address as the backend sees it.
    pub client: SocketAddr,
}

/// A TCP connection on which the backend has said its name.
#[derive(Debug)]
pub struct Connection {
    backend: String,
    stream: BufReader<TcpStream>,
}

/// A UDP socket that talks to one address.
#[derive(Debug)]
pub struct Datagrams {
    socket: UdpSocket,
}

/// Who answered how often, and what went wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Answers by backend.
    pub answers: BTreeMap<String, usize>,
    /// One text for each failure.
    pub errors: Vec<String>,
}

impl Host {
    /// Connects, and waits until the backend has said its name.
    pub fn tcp(&self, to: impl ToSocketAddrs) -> io::Result<Connection> {
        let to = address(to);
        self.namespace().run(|| Connection::open(to))
    }

    /// The same from this address and port.
    pub fn tcp_from(&self, from: impl ToSocketAddrs, to: impl ToSocketAddrs) -> io::Result<Connection> {
        let (from, to) = (address(from), address(to));
        self.namespace().run(|| Connection::open_from(from, to))
    }

    /// A UDP socket to `to`, with a source port that this host has not used yet.
    pub fn udp(&self, to: impl ToSocketAddrs) -> io::Result<Datagrams> {
        let to = address(to);
        self.udp_from(self.next_address(to), to)
    }

    /// The same with this address and port.
    pub fn udp_from(&self, from: impl ToSocketAddrs, to: impl ToSocketAddrs) -> io::Result<Datagrams> {
        let (from, to) = (address(from), address(to));
        self.namespace().run(|| Datagrams::open(from, to))
    }

    /// Sends an ICMP echo request, and waits for the reply.
    pub fn ping(&self, to: IpAddr) -> io::Result<()> {
        self.namespace().sysctl("ipv4/ping_group_range", "0 0");
        self.namespace().run(|| ping(to))
    }

    /// Uses a service in every way: TCP in single lines and in bulk, UDP in single datagrams and in bursts, both ways.
    /// Gives what the backend saw, of TCP and of UDP.
    pub fn exchange(&self, to: impl ToSocketAddrs) -> io::Result<[Seen; 2]> {
        let to = address(to);
        // Two connections from one port by different services could meet at one backend, where the second one gets another port.
        let mut connection = self.tcp_from(self.next_address(to), to)?;
        connection.echo("a line")?;
        connection.echo(&"a long line ".repeat(BULK / 12))?;
        let (own, client) = (connection.local_address()?, connection.whoami()?);
        let tcp = Seen { backend: connection.backend, own, client };
        let datagrams = self.udp(to)?;
        datagrams.ask("a datagram")?;
        for _ in 0..BURSTS {
            datagrams.burst(BURST_COUNT, BURST_SIZE)?;
        }
        let (own, (backend, client)) = (datagrams.local_address()?, datagrams.whoami()?);
        Ok([tcp, Seen { backend, own, client }])
    }

    /// Tries TCP and UDP, and waits for not even a second.
    pub fn fates(&self, to: impl ToSocketAddrs) -> [Fate; 2] {
        self.fates_within(PROMPT, address(to))
    }

    /// Asserts what becomes of TCP and UDP. Waits for not even a second only where silence is what is expected.
    #[track_caller]
    pub fn assert_fates(&self, to: impl ToSocketAddrs, expected: &[Fate; 2]) {
        let to = address(to);
        let limit = if expected.contains(&Fate::Silent) { PROMPT } else { *TIMEOUT };
        assert_eq!(&self.fates_within(limit, to), expected, "{} to {to}", self.name());
    }

    fn fates_within(&self, limit: Duration, to: SocketAddr) -> [Fate; 2] {
        let tcp = || Connection::over(TcpStream::connect_timeout(&to, limit)?).map(|connection| connection.backend);
        let udp = || {
            let datagrams = Datagrams::open(self.next_address(to), to)?;
            datagrams.socket.set_read_timeout(Some(limit))?;
            datagrams.ask("who?")
        };
        self.namespace().run(|| [tcp(), udp()]).map(Fate::from)
    }

    /// Opens and closes `count` connections, `concurrency` at a time.
    pub fn get_many(&self, to: impl ToSocketAddrs, count: usize, concurrency: usize) -> Tally {
        let to = address(to);
        self.many(count, concurrency, || Connection::open(to).map(|connection| connection.backend))
    }

    /// Who answers. Of three backends that are drawn at random it overlooks one once in four million times.
    pub fn meet_all(&self, to: impl ToSocketAddrs) -> Tally {
        self.get_many(to, 40, 4)
    }

    /// Asks once from each of `count` source ports, `concurrency` at a time.
    pub fn ask_many(&self, to: impl ToSocketAddrs, count: usize, concurrency: usize) -> Tally {
        let to = address(to);
        self.many(count, concurrency, || Datagrams::open(self.next_address(to), to)?.ask("who?"))
    }

    fn many(&self, count: usize, concurrency: usize, probe: impl Fn() -> io::Result<String> + Sync) -> Tally {
        let left = AtomicUsize::new(count);
        let work = || {
            let mut tally = Tally::default();
            while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
                tally.count(probe());
            }
            tally
        };
        self.namespace().run(|| {
            thread::scope(|scope| {
                let workers: Vec<_> = (0..concurrency).map(|_| scope.spawn(work)).collect();
                workers.into_iter().map(|worker| worker.join().expect("a probe does not panic")).sum()
            })
        })
    }

    /// Any address of ours, and a port below those that the kernel hands out; they come round again after 20,000.
    /// The kernel picks at random, and a port picked twice would be the same flow and not a new one.
    fn next_address(&self, to: SocketAddr) -> SocketAddr {
        let any = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        SocketAddr::new(any, 10_000 + self.port.fetch_add(1, Ordering::Relaxed) % 20_000)
    }
}

impl Connection {
    /// The stream, on which all that came has been read.
    pub(crate) fn into_stream(self) -> TcpStream {
        self.stream.into_inner()
    }

    /// To be called in the client's namespace.
    pub(crate) fn open(to: SocketAddr) -> io::Result<Self> {
        Self::over(TcpStream::connect_timeout(&to, *TIMEOUT)?)
    }

    fn open_from(from: SocketAddr, to: SocketAddr) -> io::Result<Self> {
        let family = if from.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let socket = socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        // An earlier connection from that port may not be forgotten yet.
        setsockopt(&socket, ReuseAddr, &true)?;
        socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(from))?;
        let stream = TcpStream::from(socket);
        // It bounds how long connecting takes, too; a connection that is still in progress then has failed.
        stream.set_write_timeout(Some(*TIMEOUT))?;
        match socket::connect(stream.as_raw_fd(), &SockaddrStorage::from(to)) {
            Err(Errno::EINPROGRESS) => Err(io::ErrorKind::TimedOut.into()),
            result => result.map_err(io::Error::from).and_then(|()| Self::over(stream)),
        }
    }

    fn over(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(*TIMEOUT))?;
        stream.set_write_timeout(Some(*TIMEOUT))?;
        let mut connection = Self { backend: String::new(), stream: BufReader::new(stream) };
        connection.backend = connection.read_line()?;
        Ok(connection)
    }

    /// The name of the backend that it reached.
    pub fn backend(&self) -> &str {
        &self.backend
    }

    /// The client's address and port.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.stream.get_ref().local_addr()
    }

    /// Sends a line and expects it back.
    pub fn echo(&mut self, line: &str) -> io::Result<()> {
        match self.ask(line)? {
            answer if answer == line => Ok(()),
            other => Err(io::Error::other(format!("sent {line:?}, got back {other:?}"))),
        }
    }

    /// Ends it without a farewell, so that the client may use its port again at once.
    pub fn reset(self) {
        // Closing it would not do: a process that is started at this moment has a copy of the descriptor.
        let nobody = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
        let length = size_of_val(&nobody) as libc::socklen_t;
        // SAFETY: The address is one, of this length.
        let result = unsafe { libc::connect(self.stream.get_ref().as_raw_fd(), &raw const nobody, length) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    }

    /// The client's address as the backend sees it.
    pub fn whoami(&mut self) -> io::Result<SocketAddr> {
        let answer = self.ask(WHOAMI)?;
        seen_by(&self.backend, &answer)
    }

    fn ask(&mut self, line: &str) -> io::Result<String> {
        self.stream.get_mut().write_all(format!("{line}\n").as_bytes())?;
        self.read_line()
    }

    fn read_line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.stream.read_line(&mut line).map_err(explain)?;
        match line.strip_suffix('\n') {
            Some(line) => Ok(line.to_owned()),
            None => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the backend closed the connection")),
        }
    }
}

impl Datagrams {
    /// To be called in the client's namespace.
    pub(crate) fn open(from: SocketAddr, to: SocketAddr) -> io::Result<Self> {
        let socket = UdpSocket::bind(from)?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(*TIMEOUT))?;
        Ok(Self { socket })
    }

    /// The client's address and port.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Sends one datagram, and waits for no answer.
    pub fn tell(&self, text: &str) -> io::Result<()> {
        self.socket.send(text.as_bytes()).map(drop)
    }

    /// Sends one datagram; the name of the backend that answered. Nothing is sent twice: a lost packet is an error.
    pub fn ask(&self, text: &str) -> io::Result<String> {
        let answer = self.exchange(text)?;
        match answer.split_once(' ') {
            Some((backend, echo)) if echo == text => Ok(backend.to_owned()),
            _ => Err(io::Error::other(format!("sent {text:?}, got back {answer:?}"))),
        }
    }

    /// The name of a backend, and the client's address as it sees it.
    pub fn whoami(&self) -> io::Result<(String, SocketAddr)> {
        let answer = self.exchange(WHOAMI)?;
        let backend = answer.split(' ').next().unwrap_or_default();
        Ok((backend.to_owned(), seen_by(backend, &answer)?))
    }

    /// Sends `count` datagrams of `size` bytes and expects an answer to each, and then has the backend send as many;
    /// at both ends they are handed to the kernel as one (`UDP_SEGMENT`), which need not take them apart before the last link.
    pub fn burst(&self, count: u16, size: u16) -> io::Result<()> {
        let question = "?".repeat(usize::from(size));
        setsockopt(&self.socket, UdpGsoSegment, &i32::from(size))?;
        let sent = self.socket.send(question.repeat(usize::from(count)).as_bytes());
        setsockopt(&self.socket, UdpGsoSegment, &0)?;
        sent?;
        for _ in 0..count {
            let answer = self.receive()?;
            if !answer.ends_with(&format!(" {question}")) {
                return Err(io::Error::other(format!("sent {size} bytes, got back {answer:?}")));
            }
        }
        self.tell(&format!("{BURST} {count} {size}"))?;
        for number in 0..count {
            let got = self.receive()?.len();
            if got != usize::from(size) {
                return Err(io::Error::other(format!("datagram {number} of the backend has {got} bytes, not {size}")));
            }
        }
        Ok(())
    }

    /// From now on what is larger than the way takes is refused, and not sent in fragments.
    pub fn never_fragment(&self) -> io::Result<()> {
        let (level, option, value) = match self.socket.local_addr()? {
            SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO),
            SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO),
        };
        let length = size_of_val(&value) as libc::socklen_t;
        // SAFETY: The kernel reads an int, which outlives the call.
        match unsafe { libc::setsockopt(self.socket.as_raw_fd(), level, option, (&raw const value).cast(), length) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Sends a datagram that may be forwarded `ttl - 1` times; who says that this was not enough (`MSG_ERRQUEUE` in ip(7)).
    pub fn expire(&self, ttl: u8) -> io::Result<IpAddr> {
        match self.socket.local_addr()? {
            SocketAddr::V4(_) => {
                setsockopt(&self.socket, Ipv4Ttl, &ttl.into())?;
                setsockopt(&self.socket, Ipv4RecvErr, &true)?;
            }
            SocketAddr::V6(_) => {
                setsockopt(&self.socket, Ipv6Ttl, &ttl.into())?;
                setsockopt(&self.socket, Ipv6RecvErr, &true)?;
            }
        }
        match self.exchange("who?") {
            Err(error) if error.kind() == io::ErrorKind::HostUnreachable => {}
            Err(error) => return Err(error),
            Ok(answer) => return Err(io::Error::other(format!("it arrived: {answer:?}"))),
        }
        let mut space = cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6);
        let mut buffer = [0; 64];
        let mut buffers = [IoSliceMut::new(&mut buffer)];
        let (descriptor, flags) = (self.socket.as_raw_fd(), MsgFlags::MSG_ERRQUEUE);
        let message = socket::recvmsg::<SockaddrStorage>(descriptor, &mut buffers, Some(&mut space), flags)?;
        let offender = message.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::Ipv4RecvErr(_, Some(by)) => {
                Some(Ipv4Addr::from(u32::from_be(by.sin_addr.s_addr)).into())
            }
            ControlMessageOwned::Ipv6RecvErr(_, Some(by)) => Some(Ipv6Addr::from(by.sin6_addr.s6_addr).into()),
            _ => None,
        });
        offender.ok_or_else(|| io::Error::other("nobody says so"))
    }

    fn exchange(&self, text: &str) -> io::Result<String> {
        self.socket.send(text.as_bytes())?;
        self.receive()
    }

    fn receive(&self) -> io::Result<String> {
        let mut buffer = vec![0; usize::from(u16::MAX)];
        let length = loop {
            match self.socket.recv(&mut buffer) {
                // A bounded wait is not taken up again by itself (signal(7)).
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result.map_err(explain)?,
            }
        };
        buffer.truncate(length);
        String::from_utf8(buffer).map_err(io::Error::other)
    }
}

impl Fate {
    /// Of TCP and UDP, when this backend answers.
    pub fn answered(by: &Host) -> [Self; 2] {
        [(); 2].map(|()| Self::Answered(by.name().to_owned()))
    }

    /// Of TCP and UDP, when somebody says that there is nobody.
    pub const REFUSED: [Self; 2] = [Self::Refused, Self::Refused];

    /// Of TCP and UDP, when nothing comes back.
    pub const SILENT: [Self; 2] = [Self::Silent, Self::Silent];
}

impl From<io::Result<String>> for Fate {
    fn from(attempt: io::Result<String>) -> Self {
        match attempt.map_err(|error| (error.kind(), error)) {
            Ok(backend) => Self::Answered(backend),
            Err((io::ErrorKind::ConnectionRefused, _)) => Self::Refused,
            Err((io::ErrorKind::TimedOut, _)) => Self::Silent,
            Err((_, error)) => Self::Failed(error.to_string()),
        }
    }
}

impl Tally {
    /// Adds one attempt.
    pub fn count(&mut self, attempt: io::Result<String>) {
        match attempt {
            Ok(backend) => *self.answers.entry(backend).or_default() += 1,
            Err(error) => self.errors.push(error.to_string()),
        }
    }

    /// How often `backend` answered.
    pub fn of(&self, backend: &str) -> usize {
        self.answers.get(backend).copied().unwrap_or_default()
    }

    /// How many answers there were.
    pub fn total(&self) -> usize {
        self.answers.values().sum()
    }
}

impl Sum for Tally {
    fn sum<I: Iterator<Item = Self>>(tallies: I) -> Self {
        tallies.fold(Self::default(), |mut sum, tally| {
            for (backend, count) in tally.answers {
                *sum.answers.entry(backend).or_default() += count;
            }
            sum.errors.extend(tally.errors);
            sum
        })
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (backend, count) in &self.answers {
            write!(f, "{backend} {count}, ")?;
        }
        write!(f, "{} errors", self.errors.len())?;
        // One says what is wrong; a thousand of the same would hide it.
        self.errors.first().map_or(Ok(()), |first| write!(f, ", the first: {first}"))
    }
}

/// Asserts that every attempt was answered, by these backends alone, and in equal parts but for chance.
#[track_caller]
pub fn assert_spread(tally: &Tally, backends: &[&str]) {
    let weights: Vec<_> = backends.iter().map(|&backend| (backend, 1)).collect();
    assert_weighted_spread(tally, &weights);
}

/// The same in parts by weight. A choice at random is further off than five standard deviations
/// once in two million times.
#[track_caller]
pub fn assert_weighted_spread(tally: &Tally, weights: &[(&str, u32)]) {
    assert!(tally.errors.is_empty(), "{tally}");
    let stranger = tally.answers.keys().find(|name| weights.iter().all(|(backend, _)| backend != name));
    assert!(stranger.is_none(), "{stranger:?} should not be asked: {tally}");
    let all: u32 = weights.iter().map(|(_, weight)| weight).sum();
    let total = f64::from(u32::try_from(tally.total()).expect("no test asks that often"));
    for &(backend, weight) in weights {
        let share = f64::from(weight) / f64::from(all);
        let deviation = (total * share * (1.0 - share)).sqrt();
        let answers = f64::from(u32::try_from(tally.of(backend)).expect("no more than all"));
        let off = (answers - total * share).abs();
        assert!(off <= 5.0 * deviation, "{backend} should have about {:.0} of {total}: {tally}", total * share);
    }
}

/// By a socket of the kind that ping(8) uses: the kernel fills in identifier and checksum, and sorts out the replies.
fn ping(to: IpAddr) -> io::Result<()> {
    let (family, protocol, request) = match to {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp, 8),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6, 128),
    };
    let socket = UdpSocket::from(socket::socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, protocol)?);
    socket.connect((to, 0))?;
    socket.set_read_timeout(Some(PING_TIMEOUT))?;
    // Type, code, checksum, identifier, sequence number.
    socket.send(&[request, 0, 0, 0, 0, 0, 0, 1])?;
    socket.recv(&mut [0; 8]).map(drop).map_err(explain)
}

/// The one address that is meant; names are not looked up in a lab.
#[track_caller]
pub(crate) fn address(to: impl ToSocketAddrs) -> SocketAddr {
    to.to_socket_addrs().ok().and_then(|mut all| all.next()).expect("an address and a port")
}

/// The kernel says "resource temporarily unavailable" where it means that no answer came in time.
pub(crate) fn explain(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::Error::new(io::ErrorKind::TimedOut, "no answer in time"),
        _ => error,
    }
}

fn seen_by(backend: &str, answer: &str) -> io::Result<SocketAddr> {
    let address = answer.strip_prefix(backend).and_then(|rest| rest.trim_start().parse().ok());
    address.ok_or_else(|| io::Error::other(format!("not a name and an address: {answer:?}")))
}
