//! What the kernel can do, found out by trying: versions don't tell, as distributions take features back to old kernels and
//! leave others out.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsRawFd as _, OwnedFd, RawFd},
};

use aya::{
    maps::MapType,
    programs::{ProgramError, ProgramType, loaded_programs},
    sys::{is_map_supported, is_program_supported},
};

use super::sys::bpf_descriptor;

/// Something of the kernel's that the programs are built on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// Programs that meet packets in XDP.
    Xdp,
    /// Programs that meet packets in tc.
    Tc,
    /// Programs that meet connections of processes.
    SockAddr,
    /// A kind of map.
    Map(Map),
    /// tc programs by BPF links.
    Tcx,
}

/// The kinds of maps that the programs use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "they are the kernel's names")]
pub enum Map {
    Hash,
    LruHash,
    LpmTrie,
    MmapableArray,
    ProgramArray,
    PerCpuArray,
}

impl Map {
    /// Every kind.
    pub const ALL: [Self; 6] =
        [Self::Hash, Self::LruHash, Self::LpmTrie, Self::MmapableArray, Self::ProgramArray, Self::PerCpuArray];

    /// What the kernel calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Hash => "hash",
            Self::LruHash => "LRU hash",
            Self::LpmTrie => "LPM trie",
            Self::MmapableArray => "mmapable array",
            Self::ProgramArray => "program array",
            Self::PerCpuArray => "per-CPU array",
        }
    }

    fn is_there(self) -> io::Result<bool> {
        let kind = match self {
            Self::Hash => MapType::Hash,
            Self::LruHash => MapType::LruHash,
            Self::LpmTrie => MapType::LpmTrie,
            Self::MmapableArray => return is_known(make_mmapable_array()),
            Self::ProgramArray => MapType::ProgramArray,
            Self::PerCpuArray => MapType::PerCpuArray,
        };
        is_map_supported(kind).map_err(|error| error.io_error)
    }
}

impl Feature {
    /// Whether the kernel has it. A program is loaded or a map made, and dropped again; nothing is attached.
    pub fn is_there(self) -> io::Result<bool> {
        match self {
            Self::Xdp => has_program(ProgramType::Xdp),
            Self::Tc => has_program(ProgramType::SchedClassifier),
            Self::SockAddr => has_program(ProgramType::CgroupSockAddr),
            Self::Map(map) => map.is_there(),
            Self::Tcx => has_tcx(),
        }
    }
}

/// The name of a loaded program; `None` if there is none of this number, or it may not be asked for.
pub fn program_name(id: u32) -> Option<String> {
    let mut programs = loaded_programs().map_while(Result::ok);
    Some(programs.find(|program| program.id() == id)?.name_as_str()?.to_owned())
}

fn has_program(kind: ProgramType) -> io::Result<bool> {
    is_program_supported(kind).map_err(|error| match error {
        ProgramError::SyscallError(error) => error.io_error,
        error => io::Error::other(error),
    })
}

/// Whether a refusal is one of a thing that the kernel does not know.
fn is_known(made: io::Result<OwnedFd>) -> io::Result<bool> {
    match made {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::E2BIG)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Asks for a link to an interface that is not there: a kernel with tcx looks for the interface, and others don't know the
/// type of attachment (`tcx_link_attach` in `kernel/bpf/tcx.c`, `link_create` in `kernel/bpf/syscall.c`).
fn has_tcx() -> io::Result<bool> {
    let program = load_tc_program()?;
    let link = make_tcx_link(program.as_raw_fd(), i32::MAX.cast_unsigned());
    match link {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(true),
        link => is_known(link),
    }
}

/// An array of one element that a process can map into its memory.
fn make_mmapable_array() -> io::Result<OwnedFd> {
    const MAP_CREATE: libc::c_int = 0;
    const ARRAY: u32 = 2;
    const MMAPABLE: u32 = 1 << 10;
    /// Type, key size, value size, entries, flags.
    type MapCreate = [u32; 5];
    let mut attribute: MapCreate = [ARRAY, 4, 4, 1, MMAPABLE];
    // SAFETY: The attribute is as the command wants it, and has no pointers.
    unsafe { bpf_descriptor(MAP_CREATE, &mut attribute) }
}

/// A tc program that does nothing.
fn load_tc_program() -> io::Result<OwnedFd> {
    /// The part of `union bpf_attr` that the command needs (include/uapi/linux/bpf.h).
    #[repr(C)]
    struct ProgramLoad {
        kind: u32,
        instruction_count: u32,
        instructions: *const u64,
        licence: *const libc::c_char,
    }
    const PROG_LOAD: libc::c_int = 5;
    const SCHED_CLS: u32 = 3;
    const LICENCE: &CStr = c"GPL";
    /// `r0 = 0; exit`.
    static INSTRUCTIONS: [u64; 2] = [0xb7, 0x95];
    let mut attribute = ProgramLoad {
        kind: SCHED_CLS,
        instruction_count: 2,
        instructions: INSTRUCTIONS.as_ptr(),
        licence: LICENCE.as_ptr(),
    };
    // SAFETY: The attribute is as the command wants it, and what it points to lives for ever.
    unsafe { bpf_descriptor(PROG_LOAD, &mut attribute) }
}

fn make_tcx_link(program: RawFd, interface: u32) -> io::Result<OwnedFd> {
    const LINK_CREATE: libc::c_int = 28;
    const TCX_INGRESS: u32 = 46;
    /// Program, interface, type of attachment, flags.
    type LinkCreate = [u32; 4];
    let mut attribute: LinkCreate = [program.cast_unsigned(), interface, TCX_INGRESS, 0];
    // SAFETY: The attribute is as the command wants it, and has no pointers.
    unsafe { bpf_descriptor(LINK_CREATE, &mut attribute) }
}
