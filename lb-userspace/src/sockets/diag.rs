//! The kernel's list of sockets, and their end: `NETLINK_SOCK_DIAG` (`man 7 sock_diag`).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use rtnetlink::{
    packet_core::{
        DecodeError, NLM_F_ACK, NLM_F_DUMP, NetlinkDeserializable, NetlinkHeader, NetlinkPayload, NetlinkSerializable,
    },
    sys::{Socket, protocols::NETLINK_SOCK_DIAG},
};

use crate::{model::Protocol, network::netlink};

/// A socket that is connected.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    family: u8,
    protocol: u8,
    /// `struct inet_diag_sockid`: by what the kernel knows it.
    id: [u8; ID],
}

/// Bytes of `struct inet_diag_sockid` (`include/uapi/linux/inet_diag.h`): two ports, two addresses, interface, cookie.
const ID: usize = 48;
/// Bytes of `struct inet_diag_req_v2`: family, protocol, extensions, a pad, states, id.
const REQUEST: usize = 8 + ID;
/// The states of sockets that are connected, or about to be, as bits: `TCP_ESTABLISHED`, in which those of UDP are, too,
/// `TCP_SYN_SENT`; and those with one side closed, `TCP_FIN_WAIT1`, `TCP_FIN_WAIT2` and `TCP_CLOSE_WAIT`.
const CONNECTED: u32 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8;

/// A conversation with the kernel about the sockets of one network namespace: that of the thread that begins it.
pub(super) struct SockDiag {
    socket: Socket,
}

impl SockDiag {
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self { socket: netlink::open(NETLINK_SOCK_DIAG)? })
    }

    /// Makes sure that the kernel ends sockets of UDP.
    ///
    /// # Errors
    /// Of the kind `Unsupported` where it does not.
    pub(super) fn check(&self) -> io::Result<()> {
        self.connections(false, Protocol::Udp)?;
        // No socket has port 0.
        let protocol = Protocol::Udp.number().0 as u8;
        can_end(self.destroy(&Connection { family: libc::AF_INET as u8, protocol, id: [0; ID] }))
    }

    /// The connected sockets of a protocol.
    pub(super) fn connections(&self, is_ipv6: bool, protocol: Protocol) -> io::Result<Vec<Connection>> {
        let family = if is_ipv6 { libc::AF_INET6 } else { libc::AF_INET } as u8;
        let request = Request { kind: Kind::List, family, protocol: protocol.number().0 as u8, id: [0; ID] };
        let mut connections = Vec::new();
        self.ask(request, NLM_F_DUMP, |connection| connections.push(connection)).map_err(unlisted)?;
        Ok(connections)
    }

    /// Ends a socket: whatever its process does with it next fails (`ECONNABORTED`).
    pub(super) fn destroy(&self, connection: &Connection) -> io::Result<()> {
        let Connection { family, protocol, id, .. } = *connection;
        self.ask(Request { kind: Kind::Destroy, family, protocol, id }, NLM_F_ACK, |_| {}).map_err(unended)
    }

    fn ask(&self, request: Request, flags: u16, mut each: impl FnMut(Connection)) -> io::Result<()> {
        let protocol = request.protocol;
        netlink::ask(&self.socket, flags, Message::Request(request))?;
        loop {
            for answer in netlink::answers(&self.socket)? {
                match answer {
                    NetlinkPayload::InnerMessage(Message::Connection(connection)) => {
                        each(Connection { protocol, ..connection });
                    }
                    NetlinkPayload::Done(done) => return ended(done.code),
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(()),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    _ => {}
                }
            }
        }
    }
}

/// What the end of a list says: a negative error number where there is none.
fn ended(code: i32) -> io::Result<()> {
    if code >= 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code.saturating_neg())) }
}

/// Why there is no list.
fn unlisted(error: io::Error) -> io::Error {
    const WHY: &str = "this kernel does not list its sockets (CONFIG_INET_DIAG, CONFIG_INET_UDP_DIAG; as modules inet_diag, udp_diag)";
    if error.kind() == io::ErrorKind::NotFound { io::Error::new(io::ErrorKind::Unsupported, WHY) } else { error }
}

/// Why a socket is not ended.
fn unended(error: io::Error) -> io::Error {
    const WHY: &str = "this kernel ends no sockets (CONFIG_INET_DIAG_DESTROY)";
    let is_unknown = error.raw_os_error() == Some(libc::EOPNOTSUPP);
    if is_unknown { io::Error::new(io::ErrorKind::Unsupported, WHY) } else { error }
}

/// Whether sockets can be ended, by what the end of one that is not there gave.
fn can_end(ended: io::Result<()>) -> io::Result<()> {
    match ended {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

impl Connection {
    /// The number that the kernel gives to this socket and to no other: its halves come in this order.
    pub(super) fn cookie(&self) -> u64 {
        let half = |from: usize| {
            let bytes = self.id.get(from..from + 4).and_then(|bytes| bytes.try_into().ok());
            u64::from(bytes.map_or(0, u32::from_ne_bytes))
        };
        half(40) | half(44) << 32
    }

    /// Whom it is connected to.
    pub(super) fn peer(&self) -> Option<SocketAddr> {
        let port = u16::from_be_bytes(self.id.get(2..4)?.try_into().ok()?);
        let address: IpAddr = if i32::from(self.family) == libc::AF_INET6 {
            // IPv4 addresses have the form that is mapped into IPv6.
            Ipv6Addr::from(<[u8; 16]>::try_from(self.id.get(20..36)?).ok()?).to_canonical()
        } else {
            Ipv4Addr::from(<[u8; 4]>::try_from(self.id.get(20..24)?).ok()?).into()
        };
        Some(SocketAddr::new(address, port))
    }
}

enum Message {
    Request(Request),
    Connection(Connection),
}

struct Request {
    kind: Kind,
    family: u8,
    protocol: u8,
    id: [u8; ID],
}

#[derive(Clone, Copy)]
enum Kind {
    /// `SOCK_DIAG_BY_FAMILY`.
    List = 20,
    /// `SOCK_DESTROY`.
    Destroy = 21,
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        match self {
            Self::Request(request) => request.kind as u16,
            Self::Connection(_) => Kind::List as u16,
        }
    }

    fn buffer_len(&self) -> usize {
        REQUEST
    }

    fn serialize(&self, buffer: &mut [u8]) {
        let Self::Request(Request { family, protocol, id, .. }) = self else { return };
        let states = CONNECTED.to_ne_bytes();
        buffer.copy_from_slice(&[&[*family, *protocol, 0, 0], &states[..], id].concat());
    }
}

impl NetlinkDeserializable for Message {
    type Error = DecodeError;

    fn deserialize(_header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        let short = || DecodeError::buffer_too_small(payload.len(), 4 + ID);
        let id = payload.get(4..4 + ID).and_then(|id| id.try_into().ok()).ok_or_else(short)?;
        let family = payload.first().copied().ok_or_else(short)?;
        Ok(Self::Connection(Connection { family, protocol: 0, id }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From port 4660 to port 8080 at an address, with the cookie 0x01.._02..: as in `struct inet_diag_sockid`.
    fn id(peer: &[u8]) -> [u8; ID] {
        let mut id = [0; ID];
        id[..4].copy_from_slice(&[0x12, 0x34, 0x1F, 0x90]);
        id[20..20 + peer.len()].copy_from_slice(peer);
        id[40..44].copy_from_slice(&2_u32.to_ne_bytes());
        id[44..48].copy_from_slice(&1_u32.to_ne_bytes());
        id
    }

    #[test]
    fn requests_have_the_form_of_the_kernel() {
        let id = id(&[10, 0, 0, 1]);
        let message = Message::Request(Request { kind: Kind::Destroy, family: 2, protocol: 17, id });
        let mut bytes = vec![0xFF; message.buffer_len()];
        message.serialize(&mut bytes);
        assert_eq!((message.message_type(), bytes.len()), (21, 56));
        assert_eq!(bytes, [&[2, 17, 0, 0], &0x136_u32.to_ne_bytes()[..], &id].concat());
    }

    #[test]
    fn a_list_that_is_not_there_is_no_empty_one() {
        let listed = |code| ended(code).map_err(unlisted);
        assert!(listed(0).is_ok());
        assert!(listed(-libc::ENOENT).is_err_and(|error| error.to_string().contains("udp_diag")));
        assert!(listed(-libc::EPERM).is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied));
    }

    #[test]
    fn who_ends_no_sockets_says_so_of_one_that_is_not_there() {
        let refused = |errno| can_end(Err(unended(io::Error::from_raw_os_error(errno))));
        assert!(refused(libc::ENOENT).is_ok());
        let error = refused(libc::EOPNOTSUPP).unwrap_err();
        assert!(error.kind() == io::ErrorKind::Unsupported && error.to_string().contains("CONFIG_INET_DIAG_DESTROY"));
        assert!(refused(libc::EPERM).is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied));
    }

    #[test]
    fn answers_say_who_is_connected_to_whom() {
        let mapped = Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped().octets();
        let plain = "fd00::1".parse::<Ipv6Addr>().unwrap().octets();
        for (family, peer, expected) in [
            (libc::AF_INET, &[10, 0, 0, 1][..], "10.0.0.1:8080"),
            (libc::AF_INET6, &mapped, "10.0.0.1:8080"),
            (libc::AF_INET6, &plain, "[fd00::1]:8080"),
        ] {
            // Family, state, timer, retransmissions; more comes after the id.
            let payload = [&[family as u8, 1, 0, 0], &id(peer)[..], &[0; 20]].concat();
            let message = Message::deserialize(&NetlinkHeader::default(), &payload);
            let Ok(Message::Connection(connection)) = message else { panic!("{payload:?} is a connection") };
            assert_eq!((connection.peer(), connection.cookie()), (Some(expected.parse().unwrap()), 1 << 32 | 2));
        }
        assert!(Message::deserialize(&NetlinkHeader::default(), &[2; 51]).is_err());
    }
}
