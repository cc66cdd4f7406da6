//! `mesh manifest generate`: the objects of an installation, for `kubectl apply -f -` and for repositories.

use std::process::ExitCode;

use crate::Global;
use crate::install::{Plan, Settings};

/// Print the objects of an installation
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum Command {
    /// Print all objects that `mesh install` with the same settings applies, in order, as YAML
    Generate {
        #[command(flatten)]
        settings: Settings,
    },
}

/// Runs the command. No cluster is asked.
///
/// # Errors
/// Settings that can't be taken.
pub fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    let Command::Generate { settings } = args.command;
    let mut plan = Plan::new(&settings.spec(None)?)?;
    crate::installer::build::mark(&mut plan);
    for warning in &plan.warnings {
        eprintln!("Warning: {warning}");
    }
    let objects: Vec<_> = plan.objects().cloned().collect();
    global.out.print(&mesh_api::yaml::to_string_all(&objects))?;
    Ok(ExitCode::SUCCESS)
}
