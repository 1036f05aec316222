//! What the agent sets before it loads the programs: the kernel treats it as constant.

use aya_ebpf::Global;

/// The first port of the SNAT range, in host order.
#[unsafe(no_mangle)]
static SNAT_FIRST: Global<u16> = Global::new(1024);

/// The last port of the SNAT range, in host order, not below the first.
#[unsafe(no_mangle)]
static SNAT_LAST: Global<u16> = Global::new(u16::MAX);

/// The first port of the SNAT range and how many there are.
#[inline(always)]
pub(crate) fn snat_ports() -> (u16, u32) {
    let first = SNAT_FIRST.load();
    (first, u32::from(SNAT_LAST.load().wrapping_sub(first)) + 1)
}
