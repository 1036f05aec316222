//! System calls of which the libraries that we use know nothing.

use std::{
    ffi::CString,
    io,
    mem::size_of,
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, net::UnixDatagram},
    },
    path::Path,
};

use lb_common::net;

/// The number that the kernel gives to this network namespace and to no other (`SO_NETNS_COOKIE`, since Linux 5.14).
pub(super) fn namespace_cookie() -> io::Result<u64> {
    let socket = UnixDatagram::unbound()?;
    let (mut cookie, mut length) = (0_u64, size_of::<u64>() as libc::socklen_t);
    // SAFETY: The option is 64 bits, which there is room for.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// The members of `union bpf_attr` (include/uapi/linux/bpf.h) for `BPF_OBJ_GET`.
#[repr(C)]
struct ObjectAttr {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// The members for `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
struct InfoAttr {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// The members for `BPF_LINK_UPDATE`.
#[repr(C)]
struct LinkUpdateAttr {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// The beginning of `struct bpf_link_info`: what comes last is as it is for the links of XDP and tcx, or of control groups.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    _pad: u32,
    /// The number of the interface and the attach type, or the id of the control group.
    place: [u32; 2],
}

/// The members for `BPF_MAP_LOOKUP_ELEM`.
#[repr(C)]
struct ElementAttr {
    map_fd: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The id of the program in a place of a program array, if there is one: that is what the kernel tells of it
/// (`bpf_fd_array_map_lookup_elem` in kernel/bpf/arraymap.c).
pub(super) fn program_in(array: BorrowedFd<'_>, index: u32) -> io::Result<Option<u32>> {
    const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
    let mut id = 0_u32;
    let mut attr = ElementAttr {
        map_fd: array.as_raw_fd() as u32,
        _pad: 0,
        key: (&raw const index).expose_provenance() as u64,
        value: (&raw mut id).expose_provenance() as u64,
        flags: 0,
    };
    // SAFETY: The attributes are the command's; keys and values of such a map are 32 bits.
    match unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &mut attr) } {
        Ok(_) => Ok(Some(id)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// What a pinned link is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LinkPlace {
    /// In XDP or tcx: the interface with this number; 0 if it is gone.
    Interface(u32),
    /// The control group with this id; 0 if it is gone.
    ControlGroup(u64),
}

/// Where a pinned link is.
pub(super) fn link_place(path: &Path) -> io::Result<LinkPlace> {
    const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
    const BPF_LINK_TYPE_CGROUP: u32 = 3;
    const BPF_LINK_TYPE_XDP: u32 = 6;
    const BPF_LINK_TYPE_TCX: u32 = 11;
    let link = pinned(path)?;
    let mut info = LinkInfo::default();
    let mut attr = InfoAttr {
        bpf_fd: link.as_raw_fd() as u32,
        info_len: size_of::<LinkInfo>() as u32,
        info: (&raw mut info).expose_provenance() as u64,
    };
    // SAFETY: The attributes are the command's, and there is room for so much.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)? };
    let [first, second] = info.place;
    match info.kind {
        BPF_LINK_TYPE_XDP | BPF_LINK_TYPE_TCX => Ok(LinkPlace::Interface(first)),
        BPF_LINK_TYPE_CGROUP => Ok(LinkPlace::ControlGroup(net::whole(first, second))),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// Puts another program into a pinned link, in one step.
pub(super) fn update_link(path: &Path, program: BorrowedFd<'_>) -> io::Result<()> {
    const BPF_LINK_UPDATE: libc::c_int = 29;
    let link = pinned(path)?;
    let mut attr = LinkUpdateAttr {
        link_fd: link.as_raw_fd() as u32,
        new_prog_fd: program.as_raw_fd() as u32,
        flags: 0,
        old_prog_fd: 0,
    };
    // SAFETY: The attributes are the command's, and hold no pointers.
    unsafe { bpf(BPF_LINK_UPDATE, &mut attr)? };
    Ok(())
}

/// What is pinned.
fn pinned(path: &Path) -> io::Result<OwnedFd> {
    const BPF_OBJ_GET: libc::c_int = 7;
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = ObjectAttr { pathname: path.as_ptr().expose_provenance() as u64, bpf_fd: 0, file_flags: 0 };
    // SAFETY: The attributes are the command's, and the path is there.
    unsafe { bpf_descriptor(BPF_OBJ_GET, &mut attr) }
}

/// bpf(2): what the command returns.
///
/// # Safety
///
/// `attr` is the beginning of what the command takes (`union bpf_attr` in include/uapi/linux/bpf.h), and its pointers are valid.
pub(super) unsafe fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: By contract; the kernel takes what is missing for zero.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as libc::c_int) }
}

/// The same of a command that makes a descriptor.
///
/// # Safety
///
/// As for [`bpf`], and the command is one that makes a descriptor.
pub(super) unsafe fn bpf_descriptor<T>(command: libc::c_int, attr: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: By contract; the kernel has just made the descriptor for us.
    unsafe { Ok(OwnedFd::from_raw_fd(bpf(command, attr)?)) }
}
