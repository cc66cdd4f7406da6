//! The project's own tasks: `cargo xtask <task>`.
//!
//! In: the work tree. Out: verdicts and figures. Never: a check that is skipped without a word.
//! Start here: `Task` below lists everything; one module a task.

use std::process::ExitCode;

use clap::Parser;

mod bench;
mod differential;
mod dist;
mod e2e;
mod judges;
mod pki;
mod run;
mod rust_source;
mod test;
mod tidy;

/// The project's own tasks.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Task {
    /// Check the house rules that no compiler checks: crate edges, sizes, crate docs, the code map.
    Tidy,
    /// Run every test that needs Rust and namespaces only: unit and integration tests, then the end-to-end walk.
    Test(test::Args),
    /// Run the end-to-end walk against a cluster.
    E2e(e2e::Args),
    /// Run the checks that need other programs (kubectl, Envoy), installing them where that is possible.
    Judges(judges::Args),
    /// Send the same requests through a stock Envoy and our proxy with the same xDS, and compare everything.
    Differential(differential::Args),
    /// Build the static binary, and write the image archive.
    Dist(dist::Args),
    /// Measure the proxy beside its peers on this machine.
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let outcome = match Task::parse() {
        Task::Tidy => tidy::run(),
        Task::Test(args) => test::run(&args),
        Task::E2e(args) => e2e::run(&args),
        Task::Judges(args) => judges::run(&args),
        Task::Differential(args) => differential::run(&args),
        Task::Dist(args) => dist::run(&args),
        Task::Bench(args) => bench::run(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
