//! `mesh manifest generate`: the objects of an installation, for `kubectl apply -f -` and for repositories.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};

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
    /// Write a Helm chart that makes the same objects of the same values
    Chart {
        /// Folder for it; it is made, or holds such a chart
        #[arg(short, long, value_name = "FOLDER")]
        output: PathBuf,
    },
}

/// Runs the command. No cluster is asked.
///
/// # Errors
/// Settings that can't be taken.
pub fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    let settings = match args.command {
        Command::Generate { settings } => settings,
        Command::Chart { output } => return chart(&output, global),
    };
    let mut plan = Plan::new(&settings.spec(None)?)?;
    crate::installer::build::mark(&mut plan);
    for warning in &plan.warnings {
        eprintln!("Warning: {warning}");
    }
    let objects: Vec<_> = plan.objects().cloned().collect();
    global.out.print(&mesh_api::yaml::to_string_all(&objects))?;
    Ok(ExitCode::SUCCESS)
}

fn chart(folder: &Path, global: &Global) -> anyhow::Result<ExitCode> {
    let there = std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some());
    let is_chart = || {
        let about = std::fs::read_to_string(folder.join("Chart.yaml")).unwrap_or_default();
        about.lines().any(|line| line == "name: mesh")
    };
    if there && !is_chart() {
        bail!(
            "{} has files that are no chart of this program: name another folder",
            folder.display()
        );
    }
    let files = crate::chart::files()?;
    for (path, text) in &files {
        let path = folder.join(path);
        let parent = path.parent().unwrap_or(folder);
        std::fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    global.out.line(format_args!(
        "{} files in {}: helm install mesh {} -n istio-system --create-namespace",
        files.len(),
        folder.display(),
        folder.display()
    ))?;
    Ok(ExitCode::SUCCESS)
}
