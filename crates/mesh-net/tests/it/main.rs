//! Capture and balancing, as text and in real network namespaces; copying between sockets.
//!
//! Each test runs in a process of its own: this binary again, with `--run NAME`. So a test that needs namespaces leaves for them while its
//! process has a single thread, as user_namespaces(7) demands. Names, filters and closing line are those of the usual harness.
#![allow(clippy::unwrap_used)] // A panic is how a test fails; clippy's allowance for tests sees `#[test]` only.

mod golden;
mod kernel;
mod modes;
mod namespace;

use std::process::{Command, ExitCode};

/// A test, and whether it runs in namespaces of its own.
struct Test {
    name: &'static str,
    isolated: bool,
    run: fn(),
}

macro_rules! tests {
    ($($isolated:literal $module:ident::$name:ident,)*) => {
        &[$(Test {
            name: concat!(stringify!($module), "::", stringify!($name)),
            isolated: $isolated,
            run: $module::$name,
        },)*]
    };
}

const TESTS: &[Test] = tests![
    false golden::rules_are_what_they_were,
    false golden::a_dry_run_prints_the_same,
    false golden::every_flag_of_the_help_has_a_case,
    false golden::flags_that_can_not_be_used_are_named,
    false golden::a_switch_that_is_off_is_no_switch,
    true kernel::connections_go_to_the_endpoints_strictly_in_turn,
    true kernel::a_set_keeps_what_it_holds_while_the_rules_around_it_change,
    true kernel::a_udp_flow_follows_its_service_once_it_is_forgotten,
    true kernel::thousands_of_endpoints_and_chains_fit_one_transaction,
    true kernel::a_sidecar_gets_what_is_captured_and_nothing_else,
    true modes::transparent_connections_keep_both_of_their_addresses,
    true modes::queries_of_the_application_go_to_the_agent,
    true modes::ipv6_is_captured_likewise,
    true modes::a_virtual_machine_behind_an_interface_is_captured,
    true modes::validation_tells_rules_that_work_from_none,
    true modes::another_network_namespace_can_be_named,
    true kernel::a_marked_connection_is_left_alone,
    false kernel::as_many_files_as_allowed_can_be_opened,
    false kernel::splice_carries_both_ways_and_keeps_half_closed_connections,
];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, name] = &args[..]
        && flag == "--run"
    {
        let test = TESTS.iter().find(|test| test.name == name).unwrap();
        if test.isolated {
            namespace::enter();
        }
        (test.run)();
        return ExitCode::SUCCESS;
    }
    match Selection::from_args(args) {
        Ok(selection) => selection.run(),
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Which tests to run, from the flags of the usual harness.
#[derive(Default)]
struct Selection {
    filters: Vec<String>,
    skip: Vec<String>,
    exact: bool,
    list: bool,
    only_ignored: bool,
    show: bool,
}

impl Selection {
    fn from_args(args: Vec<String>) -> Result<Self, String> {
        let mut selection = Self::default();
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let (flag, inline) = match arg.split_once('=') {
                Some((flag, value)) => (flag.to_owned(), Some(value.to_owned())),
                None => (arg.clone(), None),
            };
            let mut value = || {
                let value = inline.clone().or_else(|| args.next());
                value.ok_or_else(|| format!("{flag}: a value is missing"))
            };
            match flag.as_str() {
                "--exact" => selection.exact = true,
                "--list" => selection.list = true,
                "--ignored" => selection.only_ignored = true,
                "--nocapture" | "--no-capture" | "--show-output" => selection.show = true,
                "--skip" => selection.skip.push(value()?),
                // One process at a time is how these tests run; their report has one form.
                "--test-threads" | "--format" | "--color" => drop(value()?),
                "--include-ignored" | "-q" | "--quiet" => {}
                other if other.starts_with('-') => {
                    return Err(format!("{other}: this harness has no such flag"));
                }
                _ => selection.filters.push(arg),
            }
        }
        Ok(selection)
    }

    fn takes(&self, test: &Test) -> bool {
        let hits = |pattern: &String| {
            if self.exact {
                test.name == pattern
            } else {
                test.name.contains(pattern.as_str())
            }
        };
        // No test is ignored.
        !self.only_ignored
            && (self.filters.is_empty() || self.filters.iter().any(hits))
            && !self.skip.iter().any(hits)
    }

    fn run(&self) -> ExitCode {
        let chosen: Vec<&Test> = TESTS.iter().filter(|test| self.takes(test)).collect();
        if self.list {
            chosen
                .iter()
                .for_each(|test| println!("{}: test", test.name));
            return ExitCode::SUCCESS;
        }
        println!("\nrunning {} tests", chosen.len());
        let failed = chosen.iter().filter(|test| !self.passes(test)).count();
        let verdict = if failed == 0 { "ok" } else { "FAILED" };
        println!(
            "\ntest result: {verdict}. {} passed; {failed} failed; 0 ignored; 0 measured; {} filtered out\n",
            chosen.len() - failed,
            TESTS.len() - chosen.len()
        );
        // What the usual harness ends with.
        if failed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::from(101)
        }
    }

    fn passes(&self, test: &Test) -> bool {
        let output = Command::new("/proc/self/exe")
            .args(["--run", test.name])
            .output()
            .unwrap();
        let passed = output.status.success();
        println!(
            "test {} ... {}",
            test.name,
            if passed { "ok" } else { "FAILED" }
        );
        if self.show || !passed {
            print!("{}", String::from_utf8_lossy(&output.stdout));
            print!("{}", String::from_utf8_lossy(&output.stderr));
        }
        if !passed {
            println!("{}: {}", test.name, output.status);
        }
        passed
    }
}
