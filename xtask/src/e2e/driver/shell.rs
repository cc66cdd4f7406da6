//! How drivers call other programs; tests answer for these programs from a recording.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run;

/// Runs command lines.
pub trait Shell {
    /// Runs one to its end with its output shown.
    fn check(&mut self, command: &[&str]) -> anyhow::Result<()>;
    /// Runs one to its end and gives its standard output.
    fn output(&mut self, command: &[&str]) -> anyhow::Result<String>;
}

/// The machine's programs, with the kubeconfig that they are to write in `KUBECONFIG`.
pub struct Real {
    kubeconfig: PathBuf,
}

impl Real {
    /// With this kubeconfig; the user's own is left alone.
    pub fn new(kubeconfig: &Path) -> Self {
        Self {
            kubeconfig: kubeconfig.to_owned(),
        }
    }

    fn command(&self, command: &[&str]) -> Command {
        let (program, arguments) = command.split_first().unwrap_or((&"", &[]));
        let mut command = Command::new(program);
        command.args(arguments).env("KUBECONFIG", &self.kubeconfig);
        command
    }
}

impl Shell for Real {
    fn check(&mut self, command: &[&str]) -> anyhow::Result<()> {
        run::check(&mut self.command(command))
    }

    fn output(&mut self, command: &[&str]) -> anyhow::Result<String> {
        run::output(&mut self.command(command))
    }
}

/// A recording: `$ command line`, then the lines it printed, or `! message` where it failed.
#[cfg(test)]
pub struct Recorded<'a> {
    left: std::str::Lines<'a>,
    next: Option<&'a str>,
}

#[cfg(test)]
impl<'a> Recorded<'a> {
    /// To be called in this order.
    pub fn new(text: &'a str) -> Self {
        let mut left = text.lines();
        let next = left.next();
        Self { left, next }
    }

    /// Every line of the recording was called.
    pub fn ended(&self) -> bool {
        self.next.is_none()
    }
}

#[cfg(test)]
impl Shell for Recorded<'_> {
    fn check(&mut self, command: &[&str]) -> anyhow::Result<()> {
        self.output(command).map(drop)
    }

    fn output(&mut self, command: &[&str]) -> anyhow::Result<String> {
        let called = format!("$ {}", command.join(" "));
        assert_eq!(
            Some(called.as_str()),
            self.next,
            "another command line was recorded"
        );
        let mut printed = String::new();
        loop {
            self.next = self.left.next();
            match self.next {
                Some(line) if !line.starts_with("$ ") => {
                    if let Some(message) = line.strip_prefix("! ") {
                        self.next = self.left.next();
                        anyhow::bail!("{message}");
                    }
                    printed.push_str(line);
                    printed.push('\n');
                }
                _ => return Ok(printed),
            }
        }
    }
}
