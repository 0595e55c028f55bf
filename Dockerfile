# The image of mcp-server: one binary, without the stand-ins of `mcp-server demo`, on a base without shell or package manager.
#
#     docker build --build-arg VERSION=1.0.0 --build-arg REVISION="$(git rev-parse HEAD)" --tag mcp-server:1.0.0 .
#
# Both bases are arguments. Their defaults are tags, which move: a release passes what it has looked up and tested,
# `--build-arg BUILD_IMAGE=…@sha256:… --build-arg RUNTIME_IMAGE=…@sha256:…`, and no image should be published without.
# The libc of the builder must not be newer than the one of the runtime: both are of Debian 13.
#
# The file builds with BuildKit and without it: `az acr build` uses the classic builder. So no `RUN --mount`, heredoc or
# other syntax that only BuildKit knows; `scripts/image-test --lint` checks that.
#
# Nothing here depends on the processor. Build linux/amd64 and linux/arm64 each on a machine of that kind;
# `docker buildx build --platform linux/amd64,linux/arm64 --push` with a node of each makes one image index of them.
# Emulation needs no second machine, but is very slow.
#
# `scripts/image-test` builds this file without Docker and tests the image.
ARG BUILD_IMAGE=docker.io/library/rust:1.95-slim-trixie
# No OpenSSL and no C++ in it, whose defects would be ours to mend: TLS is rustls, linked into the binary.
ARG RUNTIME_IMAGE=gcr.io/distroless/base-nossl-debian13:nonroot


# cargo-auditable writes the list of dependencies into the binary, where image scanners look for it.
FROM ${BUILD_IMAGE} AS toolchain
ARG CARGO_AUDITABLE=0.7.7
RUN cargo install --locked cargo-auditable --version "${CARGO_AUDITABLE}"


# The dependencies, in a layer that is reused until Cargo.toml or Cargo.lock changes; the downloaded crates stay in it for
# the next stage. Cargo detects a changed source by its modification time, which image builders alter: so nothing of our
# own package stays in this layer.
FROM toolchain AS dependencies
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
RUN mkdir -p src benches examples/endure \
    && touch src/lib.rs \
    && echo 'fn main() {}' >src/main.rs \
    && cp src/main.rs benches/hot_path.rs \
    && cp src/main.rs examples/stand_ins.rs \
    && cp src/main.rs examples/token_cost.rs \
    && cp src/main.rs examples/endure/main.rs \
    && cargo auditable build --locked --release --no-default-features --lib \
    && cargo clean --locked --release --package mcp-server \
    && rm -r src


FROM dependencies AS build
COPY src src
RUN cargo auditable build --locked --release --no-default-features --bin mcp-server
# The label must not say what the binary does not.
ARG VERSION=unreleased
RUN test "${VERSION}" = unreleased || test "$(target/release/mcp-server --version)" = "mcp-server ${VERSION}"
# With the one library that Rust needs and the base does not have; the multiarch folder is the compiler's own name for it.
RUN install -D target/release/mcp-server /image/usr/local/bin/mcp-server \
    && install -D --mode=644 "$(gcc -print-file-name=libgcc_s.so.1)" "/image/usr/lib/$(gcc -dumpmachine)/libgcc_s.so.1"


FROM ${RUNTIME_IMAGE}
COPY --from=build /image/ /

# By number: Kubernetes cannot tell from a name that it is not root's.
USER 65532:65532
# MCP and health; metrics. It writes nothing: the root file system may be read-only.
EXPOSE 8000 9090
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/mcp-server"]
# For engines that restart what is unhealthy: alive, not ready, for a restart mends neither Entra ID nor the backend.
# Kubernetes ignores this and has its own probes; buildah and podman keep it only with `--format docker`.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s --retries=3 \
    CMD ["/usr/local/bin/mcp-server", "healthcheck", "live"]

# Last, so that they spoil no layer.
ARG VERSION=unreleased
ARG REVISION=unknown
# Where the source is, and the name in the registry of MCP servers, once there are any.
ARG SOURCE=""
ARG MCP_SERVER_NAME=""
LABEL org.opencontainers.image.title="mcp-server" \
      org.opencontainers.image.description="A Model Context Protocol server in front of an internal REST service, with Entra ID tokens for the way out" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      io.modelcontextprotocol.server.name="${MCP_SERVER_NAME}"
