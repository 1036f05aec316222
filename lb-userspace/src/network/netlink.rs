//! Conversations with the kernel over netlink that go by turns: a question, then its answer.

use std::io;

use rtnetlink::{
    packet_core::{
        NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
    },
    sys::{Socket, SocketAddr},
};

/// A socket of this thread's network namespace that speaks with the kernel.
pub(crate) fn open(protocol: isize) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

/// Asks the kernel, which answers before this returns.
pub(crate) fn ask<M: NetlinkSerializable>(socket: &Socket, flags: u16, question: M) -> io::Result<()> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(question));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    Ok(())
}

/// The messages of one datagram of an answer.
pub(crate) fn answers<M: NetlinkDeserializable>(socket: &Socket) -> io::Result<Vec<NetlinkPayload<M>>> {
    let (datagram, _) = socket.recv_from_full()?;
    let (mut rest, mut answers) = (&datagram[..], Vec::new());
    while !rest.is_empty() {
        let message = NetlinkMessage::<M>::deserialize(rest).map_err(io::Error::other)?;
        rest = rest.get((message.header.length as usize).next_multiple_of(4)..).unwrap_or_default();
        answers.push(message.payload);
    }
    Ok(answers)
}
