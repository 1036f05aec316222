//! See `fuzz::services_file`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::services_file(bytes));
