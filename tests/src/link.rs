//! Makes a veth device behave like a network card where XDP looks at it.

use std::{
    ffi::CStr,
    io,
    net::UdpSocket,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
};

use nix::net::if_::if_nametoindex;

/// Makes packets leave `interface` as they would on a wire, and makes it take packets that an XDP program
/// at the other end of the pair sends. To be called in the interface's namespace; the second lasts as long as the result.
///
/// A veth device leaves checksums and segmentation to a card that never comes, and a program that
/// updates a checksum which is not there yet breaks it. And what is sent by `XDP_TX` or `XDP_REDIRECT`
/// is lost unless the receiving end polls. It does with GRO on, but for `XDP_TX` it is only woken
/// if it has a program as well (`veth_xdp_flush` in drivers/net/veth.c), so it gets one that passes all.
pub(crate) fn behave_like_hardware(interface: &str) -> io::Result<OwnedFd> {
    const SET_TSO: u32 = 0x1f;
    const SET_GSO: u32 = 0x24;
    for command in [SET_TSO, SET_GSO, SET_TX_CHECKSUM] {
        ethtool(interface, command, false)?;
    }
    pass_all(interface)
}

/// Whether `interface` puts segments together that it receives (GRO). To be called in the interface's namespace.
pub(crate) fn has_gro(interface: &str) -> io::Result<bool> {
    const GET_GRO: u32 = 0x2b;
    ethtool(interface, GET_GRO, false)
}

/// Makes `interface` put segments together that it receives, or not. To be called in the interface's namespace.
pub(crate) fn set_gro(interface: &str, is_on: bool) -> io::Result<()> {
    const SET_GRO: u32 = 0x2c;
    ethtool(interface, SET_GRO, is_on).map(drop)
}

/// Makes the kernel complete the checksums of what leaves by `interface`, as it does where a card can't do it.
/// To be called in the interface's namespace.
pub(crate) fn complete_checksums(interface: &str) -> io::Result<()> {
    ethtool(interface, SET_TX_CHECKSUM, false).map(drop)
}

/// `ETHTOOL_STXCSUM` (include/uapi/linux/ethtool.h).
const SET_TX_CHECKSUM: u32 = 0x17;

/// `struct ethtool_value` (include/uapi/linux/ethtool.h).
#[repr(C)]
struct EthtoolValue {
    command: u32,
    value: u32,
}

/// Tells a driver something, and says what it answers.
fn ethtool(interface: &str, command: u32, value: bool) -> io::Result<bool> {
    const SIOCETHTOOL: libc::Ioctl = 0x8946;
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    let mut setting = EthtoolValue { command, value: value.into() };
    // SAFETY: All zeros are a value of this struct of integers, arrays and pointers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte is left for the zero at the end.
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(interface.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_data = (&raw mut setting).cast();
    // SAFETY: The request points to a setting of the size that these commands read and write, and both outlive the call.
    match unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) } {
        0 => Ok(setting.value != 0),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The part of `union bpf_attr` that `BPF_PROG_LOAD` needs (include/uapi/linux/bpf.h).
#[repr(C)]
struct ProgramLoad {
    program_type: u32,
    instruction_count: u32,
    instructions: *const u64,
    license: *const libc::c_char,
}

/// The part that `BPF_LINK_CREATE` needs.
#[repr(C)]
struct LinkCreate {
    program: RawFd,
    interface: u32,
    attach_type: u32,
    flags: u32,
}

/// Attaches a program that is no more than `return XDP_PASS`; closing the descriptor detaches it.
fn pass_all(interface: &str) -> io::Result<OwnedFd> {
    const PROG_LOAD: libc::c_long = 5;
    const LINK_CREATE: libc::c_long = 28;
    const PROG_TYPE_XDP: u32 = 6;
    const ATTACH_TYPE_XDP: u32 = 37;
    const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
    const LICENSE: &CStr = c"GPL";
    /// `r0 = 2; exit`, where 2 is `XDP_PASS`.
    const INSTRUCTIONS: [u64; 2] = [0x2_0000_00b7, 0x95];
    let load = ProgramLoad {
        program_type: PROG_TYPE_XDP,
        instruction_count: 2,
        instructions: INSTRUCTIONS.as_ptr(),
        license: LICENSE.as_ptr(),
    };
    // SAFETY: The attribute is as the command wants it, and what it points to lives for ever.
    let program = unsafe { bpf(PROG_LOAD, &load) }?;
    let create = LinkCreate {
        program: program.as_raw_fd(),
        interface: if_nametoindex(interface)?,
        attach_type: ATTACH_TYPE_XDP,
        flags: XDP_FLAGS_DRV_MODE,
    };
    // SAFETY: The attribute is as the command wants it, and has no pointers.
    unsafe { bpf(LINK_CREATE, &create) }
}

/// A command of bpf(2) that makes a descriptor.
///
/// # Safety
///
/// `Attribute` is what the command takes, and its pointers are valid.
unsafe fn bpf<Attribute>(command: libc::c_long, attribute: &Attribute) -> io::Result<OwnedFd> {
    // SAFETY: By contract, and the size is that of the attribute.
    let descriptor = unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *attribute, size_of::<Attribute>()) };
    match RawFd::try_from(descriptor) {
        // SAFETY: The kernel has just made it for us.
        Ok(descriptor @ 0..) => Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }),
        _ => Err(io::Error::last_os_error()),
    }
}
