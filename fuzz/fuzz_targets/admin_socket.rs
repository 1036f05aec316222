//! See `fuzz::admin_socket`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::admin_socket(bytes));
