//! See `fuzz::kubernetes_objects`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::kubernetes_objects(bytes));
