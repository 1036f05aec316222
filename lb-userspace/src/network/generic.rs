//! What the kernel tells of a network card by generic netlink: what its driver does in XDP, and which features are on. One that is off
//! can be switched on, and off again.

use std::io;

use rtnetlink::{
    packet_core::{
        DecodeError, DefaultNla, Emitable as _, NLM_F_ACK, NetlinkDeserializable, NetlinkHeader, NetlinkPayload,
        NetlinkSerializable, NlasIterator,
    },
    sys::{Socket, protocols::NETLINK_GENERIC},
};

use super::netlink;

/// What a driver says that it does in XDP (`enum netdev_xdp_act` in `include/uapi/linux/netdev.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct XdpFeatures(pub(crate) u64);

impl XdpFeatures {
    /// Whether programs run in the driver, and may send packets back.
    pub(crate) const fn runs_programs(self) -> bool {
        self.0 & 1 != 0
    }

    /// Whether it sends what programs on other interfaces redirect to it.
    pub(crate) const fn is_target(self) -> bool {
        self.0 & 1 << 2 != 0
    }
}

/// A conversation with the kernel, of this network namespace.
pub(crate) struct Generic {
    socket: Socket,
}

impl Generic {
    pub(crate) fn open() -> io::Result<Self> {
        Ok(Self { socket: netlink::open(NETLINK_GENERIC)? })
    }

    /// What the driver of an interface does in XDP: since Linux 6.3.
    pub(crate) fn xdp_features(&self, interface: u32) -> io::Result<XdpFeatures> {
        const DEV_GET: u8 = 1;
        const IFINDEX: u16 = 1;
        const XDP_FEATURES: u16 = 3;
        let asked = DefaultNla::new(IFINDEX, interface.to_ne_bytes().to_vec());
        let answer = self.ask(self.family("netdev")?, DEV_GET, &[asked])?;
        let features = find(&answer, XDP_FEATURES).and_then(|value| value.try_into().ok());
        features.map(|value| XdpFeatures(u64::from_ne_bytes(value))).ok_or_else(incomplete)
    }

    /// The names of the features that are on, as `ethtool -k` has them.
    pub(crate) fn offloads(&self, interface: u32) -> io::Result<Vec<String>> {
        const FEATURES_GET: u8 = 11;
        const ACTIVE: u16 = 4;
        let index = DefaultNla::new(HEADER_INDEX, interface.to_ne_bytes().to_vec());
        let answer = self.ask(self.family("ethtool")?, FEATURES_GET, &[nested(HEADER_NEST, &[index])])?;
        let active = attributes(find(&answer, ACTIVE).ok_or_else(incomplete)?);
        let bits = attributes(find(&active, SET_BITS).unwrap_or_default());
        let name =
            |bit: &[u8]| Some(String::from_utf8_lossy(find(&attributes(bit), BIT_NAME)?.strip_suffix(&[0])?).into());
        Ok(bits.iter().filter_map(|(_, bit)| name(bit)).collect())
    }

    /// Switches a feature, by the name that `ethtool -k` has for it, and no other.
    pub(crate) fn set_offload(&self, interface: u32, name: &str, is_on: bool) -> io::Result<()> {
        const FEATURES_SET: u8 = 12;
        const WANTED: u16 = 3;
        const SET_BIT: u16 = 1;
        const BIT_VALUE: u16 = 3;
        const HEADER_FLAGS: u16 = 3;
        const OMIT_REPLY: u32 = 1 << 1;
        let index = DefaultNla::new(HEADER_INDEX, interface.to_ne_bytes().to_vec());
        let flags = DefaultNla::new(HEADER_FLAGS, OMIT_REPLY.to_ne_bytes().to_vec());
        let mut bit = vec![DefaultNla::new(BIT_NAME, [name.as_bytes(), &[0]].concat())];
        // A flag, which is there or not.
        bit.extend(is_on.then(|| DefaultNla::new(BIT_VALUE, Vec::new())));
        let wanted = nested(WANTED, &[nested(SET_BITS, &[nested(SET_BIT, &bit)])]);
        let asked = [nested(HEADER_NEST, &[index, flags]), wanted];
        match self.send(NLM_F_ACK, self.family("ethtool")?, FEATURES_SET, &asked)? {
            // An acknowledgement is an error of number 0.
            NetlinkPayload::Error(error) if error.code.is_none() => Ok(()),
            NetlinkPayload::Error(error) => Err(error.to_io()),
            _ => Err(incomplete()),
        }
    }

    /// The number of a family of messages.
    fn family(&self, name: &str) -> io::Result<u16> {
        const CONTROLLER: u16 = 16;
        const GET_FAMILY: u8 = 3;
        const FAMILY_ID: u16 = 1;
        const FAMILY_NAME: u16 = 2;
        let asked = DefaultNla::new(FAMILY_NAME, [name.as_bytes(), &[0]].concat());
        let answer = self.ask(CONTROLLER, GET_FAMILY, &[asked]).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => io::Error::other(format!("the kernel has no generic netlink family {name}")),
            _ => error,
        })?;
        let id = find(&answer, FAMILY_ID).and_then(|value| value.try_into().ok());
        id.map(u16::from_ne_bytes).ok_or_else(incomplete)
    }

    /// Asks for one thing.
    fn ask(&self, family: u16, command: u8, attributes: &[DefaultNla]) -> io::Result<Vec<Attribute>> {
        match self.send(0, family, command, attributes)? {
            NetlinkPayload::InnerMessage(Message { body: Body::Answer(attributes), .. }) => Ok(attributes),
            NetlinkPayload::Error(error) => Err(error.to_io()),
            _ => Err(incomplete()),
        }
    }

    /// Sends a message and takes what it is answered with.
    fn send(
        &self,
        flags: u16,
        family: u16,
        command: u8,
        attributes: &[DefaultNla],
    ) -> io::Result<NetlinkPayload<Message>> {
        let question = Message { family, command, body: Body::Question(attributes.to_vec()) };
        netlink::ask(&self.socket, flags, question)?;
        netlink::answers(&self.socket)?.into_iter().next().ok_or_else(incomplete)
    }
}

/// Attributes that messages of the family `ethtool` have in common (`include/uapi/linux/ethtool_netlink.h`).
const HEADER_NEST: u16 = 1;
const HEADER_INDEX: u16 = 1;
const SET_BITS: u16 = 3;
const BIT_NAME: u16 = 2;

/// An attribute that has others in it.
fn nested(kind: u16, inside: &[DefaultNla]) -> DefaultNla {
    const NESTED: u16 = 1 << 15;
    let mut value = vec![0; inside.buffer_len()];
    inside.emit(&mut value);
    DefaultNla::new(kind | NESTED, value)
}

/// Kind and value.
type Attribute = (u16, Vec<u8>);

/// A message of generic netlink (`struct genlmsghdr` in `include/uapi/linux/genetlink.h`, and attributes).
struct Message {
    family: u16,
    command: u8,
    body: Body,
}

enum Body {
    Question(Vec<DefaultNla>),
    Answer(Vec<Attribute>),
}

/// Command, version, and two bytes of nothing.
const HEADER: usize = 4;

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        self.family
    }

    fn buffer_len(&self) -> usize {
        let Body::Question(attributes) = &self.body else { return HEADER };
        HEADER + attributes.as_slice().buffer_len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        if let (Body::Question(attributes), Some((header, rest))) = (&self.body, buffer.split_at_mut_checked(HEADER)) {
            header.copy_from_slice(&[self.command, 1, 0, 0]);
            attributes.as_slice().emit(rest);
        }
    }
}

impl NetlinkDeserializable for Message {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        let body = payload.get(HEADER..).ok_or_else(|| DecodeError::buffer_too_small(payload.len(), HEADER))?;
        let command = payload.first().copied().unwrap_or_default();
        Ok(Self { family: header.message_type, command, body: Body::Answer(attributes(body)) })
    }
}

/// The attributes up to the first that makes no sense.
fn attributes(bytes: &[u8]) -> Vec<Attribute> {
    NlasIterator::new(bytes).map_while(Result::ok).map(|it| (it.kind(), it.value().to_vec())).collect()
}

fn find(attributes: &[Attribute], kind: u16) -> Option<&[u8]> {
    attributes.iter().find(|(it, _)| *it == kind).map(|(_, value)| value.as_slice())
}

fn incomplete() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer lacks what was asked for")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_by_their_kind_and_nonsense_ends_them() {
        let whole = [6, 0, 1, 0, 20, 0, 0, 0, 5, 0, 2, 128, 7, 0, 0, 0];
        assert_eq!(attributes(&whole), [(1, vec![20, 0]), (2, vec![7])]);
        assert_eq!(attributes(&[whole.as_slice(), &[99, 0, 3, 0]].concat()).len(), 2);
        assert_eq!(find(&attributes(&whole), 2), Some(&[7][..]));
        assert!(find(&attributes(&whole), 3).is_none());
    }

    #[test]
    fn the_kernel_tells_of_loopback() {
        const LOOPBACK: u32 = 1;
        let ask = || Generic::open().expect("every kernel has generic netlink");
        match ask().offloads(LOOPBACK) {
            Ok(names) => assert!(names.iter().any(|name| name == "loopback"), "{names:?}"),
            Err(error) => eprintln!("skipped: {error}"),
        }
        match ask().xdp_features(LOOPBACK) {
            Ok(features) => assert!(!features.runs_programs()),
            Err(error) => eprintln!("skipped: {error}"),
        }
        ask().set_offload(LOOPBACK, "no such offload", true).unwrap_err();
        let error = ask().family("no such family").unwrap_err();
        assert!(error.to_string().contains("no such family"), "{error}");
    }

    #[test]
    fn what_a_driver_does_is_read_from_its_bits() {
        let veth = XdpFeatures(0b10_0011);
        assert!(veth.runs_programs() && !veth.is_target());
        assert!(XdpFeatures(0b110_0111).is_target());
        assert!(!XdpFeatures(0).runs_programs());
    }
}
