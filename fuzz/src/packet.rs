//! The packet parser.

use std::cell::RefCell;

use lb_common::{
    net::{Address, IpProto},
    parse::{self, AnySegment, Bytes, Embedded, Header, MAX_OFFSET, Part, Segment},
};

/// An Ethernet frame: it has a segment that lies inside of it, or there is a reason why not. Offsets are those that the
/// kernel's verifier has been told to forget, and none is larger than it has been told.
pub fn packet(bytes: &[u8]) {
    let packet = Watched { bytes, settled: RefCell::default() };
    match parse::packet(&packet) {
        Ok(AnySegment::V4(segment)) => {
            packet.check(&segment);
            if segment.is_icmp() {
                packet.check_embedded(parse::embedded4(&packet, segment.transport).ok());
            }
        }
        Ok(AnySegment::V6(segment)) => {
            packet.check(&segment);
            if segment.is_icmp() {
                packet.check_embedded(parse::embedded6(&packet, segment.transport).ok());
            }
        }
        Err(_reason) => {}
    }
}

/// A packet that notes what the parser does with it.
struct Watched<'a> {
    bytes: &'a [u8],
    settled: RefCell<Vec<usize>>,
}

impl Bytes for Watched<'_> {
    fn read<T: Header>(&self, offset: usize) -> Option<T> {
        // An ICMP message has another packet's headers behind its own.
        assert!(offset <= 2 * MAX_OFFSET, "{offset}");
        self.bytes.read(offset)
    }

    fn length(&self) -> usize {
        self.bytes.len()
    }

    fn settle(&self, offset: usize) -> usize {
        self.settled.borrow_mut().push(offset);
        offset
    }
}

impl Watched<'_> {
    fn check<A: Address>(&self, segment: &Segment<A>) {
        let Segment { network, transport, ip_length, .. } = *segment;
        let header = match (segment.key.proto, segment.part) {
            (_, Part::Later) => 0,
            (IpProto::TCP, _) => 20,
            (IpProto::SCTP, _) => 16,
            _ => 8,
        };
        let end = network + usize::from(ip_length);
        assert!(transport + header <= end && end <= self.bytes.len(), "{transport} + {header}, {end}");
        assert!(transport <= MAX_OFFSET, "{transport}");
        self.check_settled([network, transport]);
        if segment.key.proto == IpProto::TCP && header != 0 {
            assert!(parse::tcp_numbers(self, transport).is_some());
        }
    }

    fn check_embedded<A: Address>(&self, embedded: Option<Embedded<A>>) {
        let Some(Embedded { network, transport, .. }) = embedded else { return };
        assert!(network < transport && transport + 8 <= self.bytes.len(), "{network}, {transport}");
        self.check_settled([network, transport]);
    }

    fn check_settled(&self, offsets: [usize; 2]) {
        let settled = self.settled.borrow();
        assert!(offsets.iter().all(|offset| settled.contains(offset)), "{offsets:?} of {settled:?}");
    }
}
