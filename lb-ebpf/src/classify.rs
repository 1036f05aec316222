//! Whose packet is it: the questions asked of a packet that has no flow.

use lb_common::{
    abi::ServiceKey,
    flow::Direction,
    net::Address,
    parse::Segment,
    verdict::{DropReason, PassReason, Verdict},
};

use crate::maps::{self, FamilyMaps};

/// The id of the service that a packet may open a flow to.
#[inline(always)]
pub(crate) fn service<F: FamilyMaps>(segment: &Segment<F::Address>) -> Result<u32, Verdict> {
    let key = &segment.key;
    let frontend = ServiceKey::new(key.destination, key.destination_port, key.proto);
    let id = maps::service_id::<F>(&frontend).ok_or(PassReason::NotService)?;
    if !segment.opens_flow() {
        return Err(DropReason::NoFlow.into());
    }
    Ok(id)
}

/// Whether the packet may go one hop further (RFC 1812, section 5.3.1). The stack answers a request that may not;
/// a reply is addressed to us, and the stack would not know that it is not.
#[inline(always)]
pub(crate) fn lives_on<A: Address>(segment: &Segment<A>, direction: Direction) -> Result<(), Verdict> {
    match direction {
        _ if segment.ttl > 1 => Ok(()),
        Direction::Request => Err(PassReason::TtlExpired.into()),
        Direction::Reply => Err(DropReason::ReplyTtlExpired.into()),
    }
}
