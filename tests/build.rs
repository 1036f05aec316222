//! Compiles the eBPF programs: the packet generator of the bench is one of them.

fn main() -> anyhow::Result<()> {
    xtask::build_ebpf::build_script()
}
