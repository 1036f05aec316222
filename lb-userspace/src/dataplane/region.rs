//! An array that others read while it is written: a kernel map mapped into memory, or plain memory in tests.

use std::{
    marker::PhantomData,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use memmap2::{MmapOptions, MmapRaw};

/// An array of `T`, whose elements are 8-byte aligned and take a multiple of 8 bytes, as in a BPF array map. A clone is the
/// same array.
#[derive(Clone, Debug)]
pub struct Region<T> {
    memory: Arc<MmapRaw>,
    length: u32,
    element: PhantomData<T>,
}

// `T: Copy` with any bytes a value is what aya's `Pod` says.
impl<T: aya::Pod> Region<T> {
    const STRIDE: usize = size_of::<T>().next_multiple_of(8);

    /// Maps a BPF array that was created with `BPF_F_MMAPABLE` and `length` elements.
    pub(super) fn map(map: impl AsFd, length: u32) -> std::io::Result<Self> {
        use std::os::fd::AsRawFd as _;
        let raw = map.as_fd().as_raw_fd();
        let memory = MmapOptions::new().len(length as usize * Self::STRIDE).map_raw(raw)?;
        Ok(Self { memory: memory.into(), length, element: PhantomData })
    }

    /// Zeroed memory.
    pub(super) fn anonymous(length: u32) -> std::io::Result<Self> {
        let memory = MmapOptions::new().len(length as usize * Self::STRIDE).map_anon()?;
        Ok(Self { memory: Arc::new(memory.into()), length, element: PhantomData })
    }

    /// How many elements there are.
    pub fn length(&self) -> u32 {
        self.length
    }

    /// A copy of an element.
    ///
    /// # Panics
    ///
    /// Beyond the end.
    pub fn get(&self, index: u32) -> T {
        // SAFETY: In bounds and aligned; any bytes are a T.
        unsafe { self.element(index).read_volatile() }
    }

    /// Writes an element that nobody looks at yet.
    ///
    /// # Panics
    ///
    /// Beyond the end.
    pub fn set(&self, index: u32, value: T) {
        // SAFETY: In bounds and aligned.
        unsafe { self.element(index).write_volatile(value) }
    }

    /// Changes the 8 bytes at `offset` of an element in one store; all that was written before is visible before.
    ///
    /// # Panics
    ///
    /// Beyond the end, or if the 8 bytes are not aligned.
    pub fn publish(&self, index: u32, offset: usize, word: u64) {
        self.word(index, offset).store(word, Ordering::Release);
    }

    /// Adds to the 8 bytes at `offset` of an element, to which others add at the same time; never below zero.
    ///
    /// # Panics
    ///
    /// Beyond the end, or if the 8 bytes are not aligned.
    pub fn add(&self, index: u32, offset: usize, difference: i64) {
        let add = |word: u64| Some(word.saturating_add_signed(difference));
        // It always has something to add.
        let _before = self.word(index, offset).fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
    }

    fn word(&self, index: u32, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= Self::STRIDE, "not a word of the element");
        // SAFETY: In bounds and aligned, as just checked; the memory lives as long as `self`.
        unsafe { AtomicU64::from_ptr(self.element(index).byte_add(offset).cast()) }
    }

    fn element(&self, index: u32) -> *mut T {
        assert!(index < self.length, "element {index} of {}", self.length);
        // SAFETY: Inside the mapping, which is `length` strides long.
        unsafe { self.memory.as_mut_ptr().byte_add(index as usize * Self::STRIDE).cast() }
    }
}
