//! What runs on a backend: a TCP and a UDP server that say who they are.
//!
//! TCP: the server says its name on a line, then answers every line with the same line, until the client closes.
//! UDP: it answers every datagram with its name, a space, and what it got.
//! Asked [`WHOAMI`] it answers in both cases with its name and the client's address as it sees it.
//! Asked for a [`BURST`] of so many datagrams of so many bytes, the UDP server sends them, as one to the kernel.

use std::{
    io,
    net::{self, Ipv6Addr, SocketAddr},
};

use nix::sys::socket::{setsockopt, sockopt::UdpGsoSegment};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream, UdpSocket},
    runtime,
};

use crate::{
    netns::Background,
    topology::{Host, Lab},
};

/// The question to which the answer is the client's address.
pub const WHOAMI: &str = "whoami";

/// The demand to which a count and a size belong.
pub const BURST: &str = "burst";

/// A running server; its connections are cut when this is dropped.
pub type Server = Background<()>;

impl Host {
    /// Serves TCP and UDP over both families on `port`.
    pub fn serve(&self, port: u16) -> Server {
        let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let sockets = self.namespace().run(|| {
            let tcp = net::TcpListener::bind(any)?;
            tcp.set_nonblocking(true)?;
            // One for each address: from a socket that has none, answers would come from the address that is nearest to the client.
            let udp = self.addresses().map(|own| {
                let udp = net::UdpSocket::bind((own, port))?;
                udp.set_nonblocking(true)?;
                Ok(udp)
            });
            io::Result::Ok((tcp, udp.collect::<io::Result<Vec<_>>>()?))
        });
        let (tcp, udp) = sockets.unwrap_or_else(|error| panic!("{} cannot serve port {port}: {error}", self.name()));
        let name = self.name().to_owned();
        self.namespace().spawn(move |stop| {
            let runtime =
                runtime::Builder::new_current_thread().enable_all().build().expect("there are descriptors left");
            runtime.block_on(async {
                let tcp = TcpListener::from_std(tcp).expect("the runtime takes sockets");
                for udp in udp {
                    let udp = UdpSocket::from_std(udp).expect("the runtime takes sockets");
                    tokio::spawn(answer(udp, name.clone()));
                }
                tokio::select! {
                    () = accept(&tcp, &name) => {}
                    () = stop.cancelled() => {}
                }
            });
        })
    }
}

impl Lab {
    /// [`Host::serve`] on every backend.
    #[must_use = "servers stop when they are dropped"]
    pub fn serve(&self, port: u16) -> Vec<Server> {
        self.backends().iter().map(|backend| backend.serve(port)).collect()
    }
}

async fn accept(listener: &TcpListener, name: &str) {
    loop {
        // A connection that was reset before it was accepted is no reason to stop.
        if let Ok((stream, client)) = listener.accept().await {
            tokio::spawn(talk(stream, client, name.to_owned()));
        }
    }
}

async fn talk(mut stream: TcpStream, client: SocketAddr, name: String) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (read, mut write) = stream.split();
    write.write_all(format!("{name}\n").as_bytes()).await?;
    let mut lines = BufReader::new(read).lines();
    while let Some(line) = lines.next_line().await? {
        let answer = if line == WHOAMI { whoami(&name, client) } else { line };
        write.write_all(format!("{answer}\n").as_bytes()).await?;
    }
    Ok(())
}

async fn answer(socket: UdpSocket, name: String) {
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        // Errors are about answers to clients that are gone.
        let Ok((length, client)) = socket.recv_from(&mut buffer).await else { continue };
        let question = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
        if let Some((count, size)) = burst(&question) {
            let _ = setsockopt(&socket, UdpGsoSegment, &i32::from(size));
            let _ = socket.send_to(&vec![b'!'; usize::from(count) * usize::from(size)], client).await;
            let _ = setsockopt(&socket, UdpGsoSegment, &0);
            continue;
        }
        let answer = if question == WHOAMI { whoami(&name, client) } else { format!("{name} {question}") };
        let _ = socket.send_to(answer.as_bytes(), client).await;
    }
}

/// How many datagrams of how many bytes are demanded.
fn burst(question: &str) -> Option<(u16, u16)> {
    let (count, size) = question.strip_prefix(BURST)?.trim_start().split_once(' ')?;
    Some((count.parse().ok()?, size.parse().ok()?))
}

fn whoami(name: &str, client: SocketAddr) -> String {
    format!("{name} {}", SocketAddr::new(client.ip().to_canonical(), client.port()))
}
