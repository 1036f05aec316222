# The agent, and the libraries that it is linked to: nothing else is in the image, no shell either.
#
#     docker build --tag wharf:0.1.0 .
#
# The eBPF programs are compiled by Debian's own compiler, which `cargo xtask setup` installs.
FROM rust:1-bookworm AS build
WORKDIR /wharf
COPY . .
RUN cargo xtask setup
RUN cargo build --locked --release --package lb-userspace --bin wharf
# What the binary is linked to, at the places where it looks for it.
RUN mkdir -p /image/usr/local/bin /image/run/wharf /image/host/proc/sys/net \
    && strip --strip-debug -o /image/usr/local/bin/wharf target/release/wharf \
    && ldd target/release/wharf | grep -o '/[^ ]*' | xargs cp --parents --dereference --target-directory=/image

FROM scratch
COPY --from=build /image /
ENV PATH=/usr/local/bin
ENTRYPOINT ["/usr/local/bin/wharf"]
