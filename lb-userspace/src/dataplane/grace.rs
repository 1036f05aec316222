//! The grace period: how long what was unpublished has to rest.

use std::{io, thread, time::Duration};

/// Waits until every program run that began before is over.
///
/// `MEMBARRIER_CMD_GLOBAL` is the kernel's `synchronize_rcu()` (kernel/sched/membarrier.c), and XDP and tc
/// programs run inside RCU read-side critical sections: after it, no run holds a slot, a backend or a
/// range that it read before.
pub fn wait() -> io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: Three integers, no memory.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    match io::Error::last_os_error() {
        _ if result == 0 => Ok(()),
        // Kernels with tickless CPUs (nohz_full) don't offer it. A run takes microseconds, and nothing of it is preempted.
        error if error.raw_os_error() == Some(libc::EINVAL) => {
            thread::sleep(MANY_RUNS);
            Ok(())
        }
        error => Err(error),
    }
}

/// Far longer than the longest run of a program that any CPU could be in.
const MANY_RUNS: Duration = Duration::from_millis(500);
