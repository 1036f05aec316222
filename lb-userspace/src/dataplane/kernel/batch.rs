//! Hash maps read many entries at a time.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::{Pod, maps::MapData};

use super::sys::bpf;

/// How many entries are read at once. A bucket of the kernel's hash table is read whole or not at all, and has few.
const BATCH: usize = 1024;

/// The member `batch` of `union bpf_attr` (include/uapi/linux/bpf.h).
#[repr(C, align(8))]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Reads entries of a hash map from a place on, which `None` puts at the beginning; gives the place to go on, `None` at the end.
pub(super) fn lookup_batch<K: Pod, V: Pod>(
    map: &MapData,
    cursor: Option<u32>,
    keys: &mut Vec<K>,
    values: &mut Vec<V>,
) -> io::Result<Option<u32>> {
    const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;
    const {
        // The kernel rounds values up to that.
        assert!(size_of::<V>().is_multiple_of(8));
    }
    keys.clear();
    values.clear();
    keys.reserve(BATCH);
    values.reserve(BATCH);
    let from = cursor.unwrap_or_default();
    let mut next = 0_u32;
    let mut attr = BatchAttr {
        in_batch: if cursor.is_some() { (&raw const from).expose_provenance() as u64 } else { 0 },
        out_batch: (&raw mut next).expose_provenance() as u64,
        keys: keys.as_mut_ptr().expose_provenance() as u64,
        values: values.as_mut_ptr().expose_provenance() as u64,
        count: BATCH as u32,
        map_fd: map.fd().as_fd().as_raw_fd() as u32,
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: The structure is what the command takes, and there is room for as many keys and values as `count` says,
    // of the map's own sizes; in_batch and out_batch are a bucket's number, of 32 bits (kernel/bpf/hashtab.c).
    let is_end = match unsafe { bpf(BPF_MAP_LOOKUP_BATCH, &mut attr) } {
        Ok(_) => false,
        // The end of the table is an error that says so, with the last entries beside it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => true,
        Err(error) => return Err(error),
    };
    let count = (attr.count as usize).min(BATCH);
    // SAFETY: The kernel has written so many, there is room for them, and any bytes are a value.
    unsafe {
        keys.set_len(count);
        values.set_len(count);
    }
    Ok((!is_end).then_some(next))
}
