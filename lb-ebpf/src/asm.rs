//! What Rust has no words for on this target: all of the inline assembly.

use lb_common::parse::MAX_OFFSET;

/// Hides from the optimizer how an address was computed.
///
/// The verifier ties a bounds check to the very pointer that was checked. Without this, the compiler
/// compares one sum and dereferences another of equal value, and the program is refused.
#[inline(always)]
pub(crate) fn opaque(mut address: usize) -> usize {
    // SAFETY: Moves a register to itself. (No instruction at all would do, but leaves line information
    // that points nowhere, which the kernel refuses.)
    unsafe {
        core::arch::asm!("{0} = {0}", inout(reg) address, options(nomem, nostack, preserves_flags));
    }
    address
}

/// Shows the verifier that an offset, which the parser found, is below 2^14.
///
/// A comparison would not do: the compiler may compare one register and use another that holds the same, and Linux 6.1 does
/// not see that they do.
#[inline(always)]
pub(crate) fn bounded(mut offset: usize) -> usize {
    const _: () = assert!(MAX_OFFSET < 1 << 14);
    // SAFETY: Clears bits that are not set.
    unsafe {
        core::arch::asm!("{0} &= 0x3fff", inout(reg) offset, options(nomem, nostack, preserves_flags));
    }
    offset
}

/// Adds to a counter that all CPUs share, and gives what it was before (`BPF_ATOMIC | BPF_FETCH`, Linux 5.12;
/// `core`'s atomics offer loads and stores alone here).
///
/// # Safety
///
/// The counter is aligned map memory.
#[inline(always)]
pub(crate) unsafe fn fetch_add(counter: *mut u64, mut value: u64) -> u64 {
    // SAFETY: As the caller promises.
    unsafe {
        core::arch::asm!(
            "{value} = atomic_fetch_add((u64 *)({counter} + 0), {value})",
            value = inout(reg) value,
            counter = in(reg) counter,
            options(nostack, preserves_flags),
        );
    }
    value
}
