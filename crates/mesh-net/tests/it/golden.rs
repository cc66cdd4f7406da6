//! The rules as text. `UPDATE_GOLDEN=1` rewrites the files.

use std::path::PathBuf;

use mesh_net::capture::{Config, run_init};

/// Name of the case and its flags; what the sidecar template passes, and what users add by annotations.
const CASES: &[(&str, &[&str])] = &[
    (
        "sidecar",
        &[
            "-p",
            "15001",
            "-z",
            "15006",
            "-u",
            "0",
            "-m",
            "REDIRECT",
            "-i",
            "*",
            "-x",
            "",
            "-b",
            "*",
            "-d",
            "15090,15021,15020",
        ],
    ),
    ("nothing", &["-u", "0"]),
    (
        "lists",
        &[
            "-u",
            "0,1",
            "-g",
            "0",
            "-b",
            "80,8080",
            "-i",
            "10.0.0.0/8,192.168.1.7",
            "-x",
            "10.1.0.0/16",
            "-q",
            "443",
            "-o",
            "25,53",
        ],
    ),
    (
        "interfaces",
        &["-u", "0", "-b", "*", "-i", "*", "-c", "net1,net2"],
    ),
];

pub fn rules_are_what_they_were() {
    for (name, flags) in CASES {
        for backend in ["nftables", "iptables"] {
            let mut args: Vec<String> = flags.iter().map(|f| (*f).to_owned()).collect();
            args.extend([
                "--dry-run".to_owned(),
                "--backend".to_owned(),
                backend.to_owned(),
            ]);
            let mut text = Vec::new();
            run_init(&args, &mut text).unwrap();
            let text = String::from_utf8(text).unwrap();
            let file = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
                .join(format!("tests/golden/capture/{name}.{backend}.txt"));
            if std::env::var_os("UPDATE_GOLDEN").is_some() {
                std::fs::write(&file, &text).unwrap();
            }
            let expected = std::fs::read_to_string(&file)
                .unwrap_or_else(|e| panic!("{}: {e}", file.display()));
            assert_eq!(text, expected, "{}", file.display());
        }
    }
}

pub fn flags_that_can_not_be_used_are_named() {
    for (flags, named) in [
        (&["--bogus", "1"][..], "--bogus"),
        (&["-p"], "-p"),
        (&["-p", "70000"], "70000"),
        (&["-i", "10.0.0.0/33"], "10.0.0.0/33"),
        (&["-b", "80,abc"], "abc"),
        (&["-m", "TPROXY"], "TPROXY"),
        (&["--redirect-dns"], "--redirect-dns"),
        (&["--dry-run=perhaps"], "perhaps"),
        (&["-c", "an-interface-with-a-long-name"], "an-interface"),
        (&["-c", "net1\n-A OUTPUT"], "net1"),
        (&["--backend", "ebtables"], "ebtables"),
    ] {
        let args: Vec<String> = flags.iter().map(|f| (*f).to_owned()).collect();
        let error = Config::from_args(&args).unwrap_err().to_string();
        assert!(error.contains(named), "{flags:?}: {error}");
    }
}

pub fn a_switch_that_is_off_is_no_switch() {
    let args = [
        "--redirect-dns=false",
        "--dry-run=false",
        "--cleanup-only=true",
    ];
    let config = Config::from_args(&args.map(str::to_owned)).unwrap();
    assert!(!config.dry_run && config.cleanup_only);
}
