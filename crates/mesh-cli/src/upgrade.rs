//! `mesh upgrade`: the installation that is there, with this version of the program.

use std::process::ExitCode;

use anyhow::bail;
use serde_json::{Value, json};

use crate::Global;
use crate::install::Settings;
use crate::installer::record::{self, Record};
use crate::installer::{self, How};
use crate::version::VERSION;

/// Bring an installation to this version
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// What is asked for [default: what was asked for at the last installation of the revision]
    #[command(flatten)]
    pub settings: Settings,
    /// How it is done.
    #[command(flatten)]
    pub how: How,
}

/// Runs the command: as `mesh install`, of what the last installation was asked for. Pods keep their proxies until they are made anew.
///
/// # Errors
/// No installation, one of a newer version (unless forced), and those of `mesh install`.
pub async fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    let revision = args.settings.revision.as_deref().unwrap_or("default");
    let namespace = &global.istio_namespace;
    let cluster = global.cluster().await?;
    let session = installer::session(&cluster).await?;
    let Some(found) = record::read(&session, namespace, revision).await? else {
        bail!(
            "there is no installation of revision {revision:?} in namespace {namespace} to upgrade: `mesh install` makes one"
        );
    };
    if numbers(&found.version) > numbers(VERSION) && !args.how.force {
        bail!(
            "version {} is installed, and this is {VERSION}: nothing was changed; take the newer program, or --force",
            found.version
        );
    }
    let given = !args.settings.filename.is_empty() || !args.settings.set.is_empty();
    let spec = match given {
        true => args.settings.spec(installer::namespace(global))?,
        false => of_this_version(&found),
    };
    eprintln!("Version {} is installed, this is {VERSION}.", found.version);
    installer::carry_out("mesh upgrade", &spec, &args.how, global).await
}

/// What was asked for then; a tag that nobody chose was the version's.
fn of_this_version(found: &Record) -> Value {
    let mut spec = found.spec.clone();
    if spec["tag"] == found.version.as_str() {
        spec["tag"] = json!(VERSION);
    }
    spec
}

/// `1.20.3` as numbers; what is not one counts as nothing.
fn numbers(version: &str) -> Vec<u64> {
    let plain = version.split(['-', '+']).next().unwrap_or_default();
    plain
        .split('.')
        .map(|part| part.parse().unwrap_or(0))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::installer::record::Phase;

    #[test]
    fn versions_are_compared_by_number() {
        assert!(numbers("1.10.0") > numbers("1.9.9"));
        assert!(numbers("0.2.0-rc1") > numbers("0.1.9"));
    }

    #[test]
    fn a_tag_of_ones_own_stays() {
        let found = |tag: &str| Record {
            phase: Phase::Installed,
            version: "0.0.9".to_owned(),
            profile: "default".to_owned(),
            spec: json!({ "tag": tag }),
        };
        assert_eq!(of_this_version(&found("0.0.9"))["tag"], VERSION);
        assert_eq!(of_this_version(&found("mine"))["tag"], "mine");
    }
}
