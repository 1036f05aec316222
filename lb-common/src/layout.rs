//! The `abi!` macro: how a struct that crosses the boundary between agent and kernel is declared.

/// Declares a struct whose bytes both the kernel programs and the agent read.
///
/// The size is written beside the name and checked, and so is that the fields fill it:
/// padding has to be a field, or bytes that nobody set would be part of map keys.
/// A struct generic over its address lists the size for each address type.
/// This is the only place that implements `aya::Pod`.
macro_rules! abi {
    ($(#[$meta:meta])* pub struct $name:ident<$a:ident> where $($addr:ty => $size:literal),+ {
        $($(#[$field_meta:meta])* pub $field:ident: $type:ty,)*
    }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub struct $name<$a: Address> {
            $($(#[$field_meta])* pub $field: $type,)*
        }
        impl<$a: Address> $name<$a> {
            const FIELDS: usize = 0 $(+ size_of::<$type>())*;
        }
        $(
            const _: () = assert!(size_of::<$name<$addr>>() == $size && <$name<$addr>>::FIELDS == $size);
            #[cfg(feature = "user")]
            #[expect(unsafe_code, reason = "the assertion above is what the promise rests on")]
            // SAFETY: Integers, byte arrays and transparent wrappers of them only, without padding: any bytes are a value.
            unsafe impl aya::Pod for $name<$addr> {}
        )+
    };
    ($(#[$meta:meta])* pub struct $name:ident where $size:literal {
        $($(#[$field_meta:meta])* pub $field:ident: $type:ty,)*
    }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub struct $name {
            $($(#[$field_meta])* pub $field: $type,)*
        }
        const _: () = assert!(size_of::<$name>() == $size && 0 $(+ size_of::<$type>())* == $size);
        #[cfg(feature = "user")]
        #[expect(unsafe_code, reason = "the assertion above is what the promise rests on")]
        // SAFETY: Integers, byte arrays and transparent wrappers of them only, without padding: any bytes are a value.
        unsafe impl aya::Pod for $name {}
    };
}
