//! The rules as text. `UPDATE_GOLDEN=1` rewrites the files.

use std::path::PathBuf;

use mesh_net::capture::{Config, HELP, run_init};

/// What the injector passes; the cases add to it. The user 0 exists in every user namespace.
const SIDECAR: &[&str] = &[
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
];

/// Name of the case, its flags after those of the injector (`+`) or alone, and its variables.
type Case = (
    &'static str,
    &'static str,
    &'static [(&'static str, &'static str)],
);

/// One for every flag and variable.
const CASES: &[Case] = &[
    ("sidecar", "+", &[]),
    ("nothing", "-u 0", &[]),
    (
        "lists",
        "-u 0,1 -g 0 -b 80,8080 -i 10.0.0.0/8,192.168.1.7 -x 10.1.0.0/16 -q 443 -o 25,53",
        &[],
    ),
    ("interfaces", "-u 0 -b * -i * -c net1,net2", &[]),
    ("ports", "+ -p 25001 -z 25006 -e 25008", &[]),
    ("users", "+ --proxy-uid 0,7 --proxy-gid 8,9", &[]),
    ("inbound-list", "-u 0 --istio-inbound-ports=80,443", &[]),
    (
        "inbound-exclude",
        "-u 0 -b * --istio-local-exclude-ports 22",
        &[],
    ),
    ("inbound-none", "+ -b ", &[]),
    (
        "outbound-ipv6",
        "-u 0 -i 10.0.0.0/8,fd00::/8,2001:db8::1 -x fd00:1::/32",
        &[],
    ),
    ("outbound-loopback", "-u 0 -i 127.1.0.0/16", &[]),
    (
        "outbound-ports",
        "-u 0 --istio-outbound-ports 80 --istio-local-outbound-ports-exclude 81",
        &[],
    ),
    ("virtual-interfaces", "+ -k virt0,virt1", &[]),
    (
        "virtual-interfaces-lists",
        "-u 0 -i 10.0.0.0/8,fd00::/8 --kube-virt-interfaces virt0",
        &[],
    ),
    ("tproxy", "+ -m TPROXY", &[]),
    ("tproxy-list", "-u 0 -g 1 -m TPROXY -b 80,81 -t 7 -r 8", &[]),
    ("tproxy-none", "-u 0 -m TPROXY", &[]),
    ("tproxy-interfaces", "+ -m TPROXY -c net1 -k virt0", &[]),
    ("dns", "+ --redirect-dns", &[]),
    ("dns-all", "+ -g 1 --redirect-dns --capture-all-dns", &[]),
    ("dns-tproxy", "+ -m TPROXY --redirect-dns", &[]),
    ("drop-invalid", "+ --drop-invalid", &[]),
    (
        "dual-stack",
        "+ --dual-stack --force-apply --reconcile --log_output_level=default:info",
        &[],
    ),
    (
        "groups",
        "+",
        &[("ISTIO_OUTBOUND_OWNER_GROUPS", "2000,3000")],
    ),
    (
        "groups-exclude",
        "+",
        &[
            ("ISTIO_OUTBOUND_OWNER_GROUPS", "*"),
            ("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", "2000,3000"),
        ],
    ),
    (
        "loopback",
        "+",
        &[("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "127.0.0.0/8")],
    ),
    (
        "variables",
        "-u 0 -b *",
        &[
            ("INBOUND_INTERCEPTION_MODE", "TPROXY"),
            ("INBOUND_TPROXY_MARK", "9"),
            ("ISTIO_META_DNS_CAPTURE", "true"),
            ("INVALID_DROP", "1"),
            ("ISTIO_DUAL_STACK", "false"),
        ],
    ),
    (
        "flags-over-variables",
        "-u 0 -b * -m REDIRECT",
        &[("INBOUND_INTERCEPTION_MODE", "TPROXY")],
    ),
];

fn config(case: &Case, backend: &str) -> Config {
    let (_, flags, variables) = case;
    let (first, flags) = match flags.strip_prefix('+') {
        Some(rest) => (SIDECAR, rest.strip_prefix(' ').unwrap_or(rest)),
        None => (&[][..], *flags),
    };
    let mut args: Vec<String> = first.iter().map(|flag| (*flag).to_owned()).collect();
    args.extend(
        flags
            .split(' ')
            .filter(|f| !flags.is_empty() || !f.is_empty())
            .map(str::to_owned),
    );
    args.extend(["--backend".to_owned(), backend.to_owned()]);
    let variable = |name: &str| {
        let found = variables.iter().find(|(key, _)| *key == name);
        found.map(|(_, value)| (*value).to_owned())
    };
    let mut config = Config::read(&args, variable).unwrap();
    // Not those of this machine.
    config.dns.servers = vec!["10.96.0.10".parse().unwrap(), "fd00::a".parse().unwrap()];
    config
}

pub fn rules_are_what_they_were() {
    for case in CASES {
        for backend in ["nftables", "iptables"] {
            let text = config(case, backend).text();
            let file = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
                .join(format!("tests/golden/capture/{}.{backend}.txt", case.0));
            if std::env::var_os("UPDATE_GOLDEN").is_some() {
                std::fs::write(&file, &text).unwrap();
            }
            let expected = std::fs::read_to_string(&file)
                .unwrap_or_else(|e| panic!("{}: {e}", file.display()));
            assert_eq!(text, expected, "{}", file.display());
        }
    }
}

pub fn a_dry_run_prints_the_same() {
    let args: Vec<String> = SIDECAR
        .iter()
        .chain(&["--dry-run"])
        .map(|f| (*f).to_owned())
        .collect();
    let mut text = Vec::new();
    run_init(&args, &mut text).unwrap();
    let expected = config(&CASES[0], "nftables").text();
    assert_eq!(String::from_utf8(text).unwrap(), expected);
}

pub fn every_flag_of_the_help_has_a_case() {
    let cases: Vec<&str> = CASES
        .iter()
        .flat_map(|(_, flags, _)| flags.split([' ', '=']))
        .collect();
    // These change no rule.
    let others = [
        "--dry-run",
        "--cleanup",
        "--cleanup-only",
        "--backend",
        "--native-nftables",
        "--force-iptables-binary",
        "--run-validation",
        "--skip-rule-apply",
        "--iptables-probe-port",
        "--probe-timeout",
        "--network-namespace",
    ];
    for line in HELP.lines().filter(|line| line.starts_with("  ")) {
        let names: Vec<&str> = line
            .split_whitespace()
            .take_while(|word| word.starts_with('-'))
            .map(|word| word.trim_end_matches(','))
            .collect();
        let known =
            |name: &&str| cases.contains(name) || SIDECAR.contains(name) || others.contains(name);
        assert!(names.iter().any(known), "{line}");
        for name in names {
            // A flag that wants a value says so, a switch is taken: both know the flag.
            match Config::from_args(&[name.to_owned()]) {
                Ok(_) => {}
                Err(error) => assert!(error.to_string().contains("a value is missing"), "{error}"),
            }
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
        (&["-m", "MAGIC"], "MAGIC"),
        (&["--cni-mode"], "--cni-mode"),
        (&["--iptables-trace-logging"], "--iptables-trace-logging"),
        (&["-i", "fd00::/129"], "fd00::/129"),
        (&["-t", "0"], "above 0"),
        (&["--probe-timeout", "5"], "5s or 500ms"),
        (&["--force-iptables-binary", "both"], "both"),
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
