//! `cargo xtask bench`: figures for docs/performance.md, measured beside peers in one run. Filled in below.

/// What to measure.
#[derive(clap::Args)]
pub struct Args {
    /// Rounds per proxy, interleaved.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
}

/// Runs the measurement.
pub fn run(args: &Args) -> anyhow::Result<()> {
    anyhow::bail!("not measured yet ({} rounds)", args.rounds)
}
