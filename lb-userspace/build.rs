//! Compiles the eBPF programs, which the agent carries inside it.

fn main() -> anyhow::Result<()> {
    xtask::build_ebpf::build_script()
}
