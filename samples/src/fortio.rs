//! `fortio`: the load generator that the field's tasks use, as far as they use it: `fortio load`, `fortio curl`, `fortio server`.
//!
//! Options are spelled as Fortio's own (`-c 3` or `-c=3`, one dash or two); what is not here is refused by name.

mod load;
mod options;
mod ping;
mod server;

use std::process::ExitCode;

use self::options::Options;
use crate::serve::{block_on, say};

/// The image's own program: the server, unless told otherwise.
pub(crate) fn main(args: &[String]) -> anyhow::Result<()> {
    match args.split_first() {
        None => block_on(server::run(&Options::parse(&[])?)),
        Some((command, rest)) => run(command, rest),
    }
}

/// `fortio COMMAND ...` from a shell.
pub(crate) fn applet(args: &[String]) -> ExitCode {
    match main(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fortio: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: &str, args: &[String]) -> anyhow::Result<()> {
    let options = Options::parse(args)?;
    match command {
        "load" => block_on(async {
            let report = load::run(&options).await?;
            say(report.trim_end());
            Ok(())
        }),
        "curl" => block_on(async {
            say(load::curl(&options).await?.trim_end());
            Ok(())
        }),
        "server" => block_on(server::run(&options)),
        other => {
            anyhow::bail!("there is no command {other:?} here; there are load, curl and server")
        }
    }
}
