//! What the bench and its packet generator agree on.

/// The length of every generated packet, in bytes: room for Ethernet, IPv6 and TCP headers.
pub const LENGTH: usize = 80;

abi! {
    /// What the generator sends: a packet, and where in it the flow's tuple is written.
    pub struct Traffic where 112 {
        /// The packet, in memory order.
        pub packet: [u64; LENGTH / 8],
        /// The number of the next packet.
        pub next: u64,
        /// The number of flows less one; the number is a power of two.
        pub flow_mask: u32,
        /// Where the last four bytes of the client's address are; the flow's number goes into it and the client's port.
        pub client_offset: u16,
        /// Where the client's port is.
        pub port_offset: u16,
        /// Where the last four bytes of the service's address are.
        pub service_offset: u16,
        /// Zero.
        pub _pad: u16,
        /// The last four bytes of the first client's address, in host order.
        pub client: u32,
        /// The last four bytes of the first service's address, in host order.
        pub service: u32,
        /// The number of services; the flows take turns.
        pub services: u32,
    }
}
