//! System calls of which the libraries that we use know nothing.

use std::{
    ffi::CString,
    io,
    mem::size_of,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, net::UnixDatagram},
    },
    path::Path,
};

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

/// The beginning of `struct bpf_link_info`, as it is for the links of XDP and tcx.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    _pad: u32,
    interface: u32,
    attach_type: u32,
}

/// The number of the interface that a pinned XDP or tcx link is on; 0 if that is gone.
pub(super) fn link_interface(path: &Path) -> io::Result<u32> {
    const BPF_OBJ_GET: libc::c_int = 7;
    const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
    const BPF_LINK_TYPE_XDP: u32 = 6;
    const BPF_LINK_TYPE_TCX: u32 = 11;
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = ObjectAttr { pathname: path.as_ptr().expose_provenance() as u64, bpf_fd: 0, file_flags: 0 };
    // SAFETY: The attributes are the command's, and the path is there.
    let link = unsafe { bpf_descriptor(BPF_OBJ_GET, &mut attr)? };
    let mut info = LinkInfo::default();
    let mut attr = InfoAttr {
        bpf_fd: link.as_raw_fd() as u32,
        info_len: size_of::<LinkInfo>() as u32,
        info: (&raw mut info).expose_provenance() as u64,
    };
    // SAFETY: The attributes are the command's, and there is room for so much.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)? };
    if matches!(info.kind, BPF_LINK_TYPE_XDP | BPF_LINK_TYPE_TCX) {
        Ok(info.interface)
    } else {
        Err(io::ErrorKind::InvalidInput.into())
    }
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
