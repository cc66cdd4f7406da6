//! Applications to run inside the mesh, under the names that the field knows.
//!
//! * **In**: a sample's name with its arguments and environment ([`run`]), or a program name such as `curl` ([`applet`]);
//!   for the local cluster an image reference ([`images::lookup`]) or a sample's name ([`manifests`]).
//! * **Out**: a running HTTP or TCP server, an exit code, an image's configuration, YAML texts.
//! * **Never**: knows of the mesh. The applications talk plain HTTP to host names and pass tracing headers on, as any
//!   application would; nothing here reads mesh configuration.
//! * **Start here**: [`run`] is the table of programs; `images.rs` is the table of images that lead to them.

pub mod bookinfo;
mod curl;
pub mod ext_authz;
mod fortio;
pub mod helloworld;
pub mod httpbin;
pub mod images;
pub mod jwt_server;
mod manifests;
pub mod offline;
pub mod propagate;
pub mod ratelimit;
mod serve;
mod sleep;
pub mod tcp_echo;
pub mod upstream;
pub mod web;

use std::process::ExitCode;

/// One program of this crate: its name and its entry point, which takes the arguments after the name.
type Program = (&'static str, fn(&[String]) -> anyhow::Result<()>);

static PROGRAMS: &[Program] = &[
    ("productpage", bookinfo::productpage::main),
    ("details", bookinfo::details::main),
    ("reviews", bookinfo::reviews::main),
    ("ratings", bookinfo::ratings::main),
    ("helloworld", helloworld::main),
    ("httpbin", httpbin::main),
    ("tcp-echo", tcp_echo::main),
    ("fortio", fortio::main),
    ("web", web::main),
    ("ratelimit", ratelimit::main),
    ("ext-authz", ext_authz::main),
    ("jwt-server", jwt_server::main),
];

/// Programs that the binary becomes when it is called by their name (`argv[0]`).
type Applet = (&'static str, fn(&[String]) -> ExitCode);

static APPLETS: &[Applet] = &[
    ("curl", curl::main),
    ("ext-authz", ext_authz::applet),
    ("fortio", fortio::applet),
    ("jwt-server", jwt_server::applet),
    ("ratelimit", ratelimit::applet),
    ("sleep", sleep::main),
];

/// Names that [`run`] accepts.
pub fn names() -> impl Iterator<Item = &'static str> {
    PROGRAMS.iter().map(|(name, _)| *name)
}

/// Runs the sample `name` until it is told to stop (SIGTERM or SIGINT), on a runtime of its own.
///
/// # Errors
/// An unknown name, bad arguments or environment, or an address that cannot be bound.
pub fn run(name: &str, args: &[String]) -> anyhow::Result<()> {
    let Some((_, main)) = PROGRAMS.iter().find(|(known, _)| *known == name) else {
        let known: Vec<_> = names().collect();
        anyhow::bail!(
            "there is no sample called {name:?}; the samples are: {}",
            known.join(", ")
        );
    };
    main(args)
}

/// Whether the binary called as `name` is one of this crate's applets.
pub fn is_applet(name: &str) -> bool {
    APPLETS.iter().any(|(known, _)| *known == name)
}

/// Runs the applet that `argv0` names (a path or a bare name) with the arguments after it; `None` where there is no such
/// applet, so that the caller goes on with its own command line.
pub fn applet(argv0: &str, args: &[String]) -> Option<ExitCode> {
    let name = argv0.rsplit('/').next().unwrap_or(argv0);
    let (_, main) = APPLETS.iter().find(|(known, _)| *known == name)?;
    Some(main(args))
}

/// The manifests that `--sample NAME` applies: pairs of file name (relative to `samples/`) and YAML text, in order; `None`
/// where there is no such sample ([`manifest_names`] lists them).
pub fn manifests(sample: &str) -> Option<Vec<(&'static str, &'static str)>> {
    manifests::of(sample)
}

/// Names that [`manifests`] knows.
pub fn manifest_names() -> impl Iterator<Item = &'static str> {
    manifests::names()
}
