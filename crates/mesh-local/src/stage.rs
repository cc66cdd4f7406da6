//! The hidden stages that the binary is re-executed as.

use std::ffi::OsString;
use std::process::ExitCode;

/// Runs a hidden stage when `args` (the whole argument list, program name first) asks for one: `mesh local-stage NAME ...`.
///
/// Call it first thing in `main`, before any thread exists. `None`: not a stage, go on with the ordinary command line.
pub fn stage_main(args: &[OsString]) -> Option<ExitCode> {
    (args.get(1)? == "local-stage").then_some(ExitCode::FAILURE)
}
