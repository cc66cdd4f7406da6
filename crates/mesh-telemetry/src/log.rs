//! The log: filter and form, changeable while the process runs.

use std::io::IsTerminal;
use std::sync::OnceLock;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Why the log could not be set up or changed.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter does not parse.
    #[error("log filter {filter:?}: {reason}; write it as `info` or `mesh_proxy=debug,info`")]
    Filter {
        /// The text.
        filter: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A log is set up already, or none is yet.
    #[error("the log: {0}")]
    State(String),
}

fn parse(filter: &str) -> Result<EnvFilter, LogError> {
    EnvFilter::try_new(filter).map_err(|error| LogError::Filter {
        filter: filter.to_owned(),
        reason: error.to_string(),
    })
}

/// Whether standard error is read by a person who has not asked for plain text (no-color.org): only then lines are coloured.
fn coloured() -> bool {
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    !plain && std::io::stderr().is_terminal()
}

/// Writes log lines to standard error from now on. `filter` is the default (as `info`); the variable `MESH_LOG` beats it. `json` makes
/// one JSON object of each line.
pub fn init(filter: &str, json: bool) -> Result<(), LogError> {
    let chosen = std::env::var("MESH_LOG").unwrap_or_else(|_| filter.to_owned());
    let (layer, handle) = reload::Layer::new(parse(&chosen)?);
    let base = tracing_subscriber::registry().with(layer);
    let done = match json {
        true => base
            .with(fmt::layer().json().with_writer(std::io::stderr))
            .try_init(),
        false => base
            .with(
                fmt::layer()
                    .with_writer(std::io::stderr)
                    .with_ansi(coloured()),
            )
            .try_init(),
    };
    done.map_err(|error| LogError::State(error.to_string()))?;
    // The global subscriber was free a moment ago, so this is the first handle.
    let _ = FILTER.set(handle);
    Ok(())
}

/// Replaces the filter.
pub fn set_filter(filter: &str) -> Result<(), LogError> {
    let handle = FILTER
        .get()
        .ok_or_else(|| LogError::State("not set up by this process".to_owned()))?;
    handle
        .reload(parse(filter)?)
        .map_err(|error| LogError::State(error.to_string()))
}

/// The filter in force.
pub fn filter() -> String {
    let handle = FILTER
        .get()
        .and_then(|h| h.with_current(ToString::to_string).ok());
    handle.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_filter_is_named() {
        let error = parse("mesh=nonsense=x").expect_err("not a filter");
        assert!(error.to_string().contains("mesh=nonsense=x"), "{error}");
    }
}
