//! `mesh profile`: what the built-in profiles set.

use std::process::ExitCode;

use anyhow::bail;
use serde_json::{Value, json};
use similar::TextDiff;

use crate::Global;
use crate::get::Output;
use crate::install::{PROFILES, Settings, profile};

/// Show the built-in profiles of an installation
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum Command {
    /// List the profiles
    List,
    /// Print the settings of a profile, with -f and --set over them
    Dump {
        /// The profile [default: default, or the one that -f or --set names]
        #[arg(value_name = "PROFILE")]
        name: Option<String>,
        #[command(flatten)]
        settings: Settings,
        /// Only what is below this path, such as components
        #[arg(short = 'p', long, value_name = "PATH")]
        config_path: Option<String>,
        /// Form of the output: yaml or json
        #[arg(short, long, value_name = "FORM", value_parser = crate::version::form, default_value = "yaml")]
        output: Output,
    },
    /// Show in what two profiles differ
    Diff {
        /// The one
        #[arg(value_name = "PROFILE")]
        one: String,
        /// The other
        #[arg(value_name = "OTHER")]
        other: String,
    },
}

/// Runs the command. `diff` ends with 1 where there is a difference, as diff does.
///
/// # Errors
/// No such profile, settings that can't be taken.
pub fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::List => {
            for (name, text) in PROFILES {
                let about = text.lines().next().unwrap_or_default();
                let about = about.trim_start_matches(['#', ' ']);
                global.out.line(format_args!("{name:<10} {about}"))?;
            }
        }
        Command::Dump {
            name,
            mut settings,
            config_path,
            output,
        } => {
            settings
                .set
                .extend(name.map(|name| format!("profile={name}")));
            let spec = settings.spec(None)?;
            let shown = match &config_path {
                Some(path) => below(&spec, path)?,
                None => document(spec),
            };
            match output {
                Output::Json => global.out.line(serde_json::to_string_pretty(&shown)?)?,
                _ => global.out.print(&mesh_api::yaml::to_string(&shown))?,
            }
        }
        Command::Diff { one, other } => {
            let text = |name: &str| -> anyhow::Result<String> {
                Ok(mesh_api::yaml::to_string(&document(profile(name)?)))
            };
            let (before, after) = (text(&one)?, text(&other)?);
            let diff = TextDiff::from_lines(&before, &after);
            let shown = diff.unified_diff().header(&one, &other).to_string();
            global.out.print(&shown)?;
            return Ok(ExitCode::from(u8::from(!shown.is_empty())));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn document(spec: Value) -> Value {
    json!({ "apiVersion": "install.istio.io/v1alpha1", "kind": "IstioOperator", "spec": spec })
}

/// A field of the settings by its path.
fn below(spec: &Value, path: &str) -> anyhow::Result<Value> {
    let mut place = spec;
    for key in path.split('.') {
        match place.get(key) {
            Some(next) => place = next,
            None => bail!("--config-path {path}: nothing is set there"),
        }
    }
    Ok(place.clone())
}
