//! The grace period: how long what was unpublished has to rest.

use std::io;

/// Waits until every program run that began before is over.
///
/// `MEMBARRIER_CMD_GLOBAL` is the kernel's `synchronize_rcu()` (kernel/sched/membarrier.c), and XDP and tc
/// programs run inside RCU read-side critical sections: after it, no run holds a slot, a backend or a
/// range that it read before.
pub(super) fn wait() -> io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: Three integers, no memory.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
