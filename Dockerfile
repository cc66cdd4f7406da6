# The image for those who build with Docker. `cargo xtask dist` makes the same one without it, as an archive, and is what is tested.
#
#   docker build -t mesh:0.1.0 .
#
# The first stage needs the network, for the toolchain's packages and the crates.
FROM rust:1.95-bookworm AS build
RUN apt-get update && apt-get install --yes --no-install-recommends cmake clang && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# Packs the same layer as the archive's, and lays it out.
RUN cargo xtask dist --output /dist/mesh.tar \
 && mkdir /dist/archive /dist/root \
 && tar -x -f /dist/mesh.tar -C /dist/archive \
 && tar -x -z -f "/dist/archive/$(sed 's/.*"Layers":\["\([^"]*\)".*/\1/' /dist/archive/manifest.json)" -C /dist/root

FROM scratch
COPY --from=build /dist/root/ /
ENV PATH=/usr/local/bin
USER 1337
WORKDIR /
ENTRYPOINT ["/usr/local/bin/mesh"]
