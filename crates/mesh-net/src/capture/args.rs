//! The flags and variables of `istio-iptables`.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use super::{Backend, Config, DnsCapture, Exemption, Interception, Network, Validation, Which};
use crate::sockets::PROXY_UID;

/// What `--help` prints.
pub const HELP: &str = "\
Set up traffic capture in this network namespace (as istio-iptables does).

Usage: mesh init [FLAGS]

  -p, --envoy-port PORT                      outbound connections go here (15001)
  -z, --inbound-capture-port PORT            inbound connections go here (15006)
  -e, --inbound-tunnel-port PORT             never captured (15008)
  -u, --proxy-uid UIDS                       whose sockets are exempt (1337); where the uid is not mapped: the mark 0x539
  -g, --proxy-gid GIDS                       whose sockets are exempt (1337)
  -m, --istio-inbound-interception-mode M    REDIRECT or TPROXY (REDIRECT)
  -t, --istio-inbound-tproxy-mark MARK       mark of inbound packets, TPROXY only (1337)
  -r, --istio-inbound-tproxy-route-table N   routing table for them (133)
  -b, --istio-inbound-ports PORTS            inbound ports to capture, or * (none)
  -d, --istio-local-exclude-ports PORTS      inbound ports not to capture, where all are
  -i, --istio-service-cidr NETWORKS          destinations to capture, or * (none)
  -x, --istio-service-exclude-cidr NETWORKS  destinations not to capture
  -q, --istio-outbound-ports PORTS           destination ports to capture whatever the destination
  -o, --istio-local-outbound-ports-exclude PORTS  destination ports not to capture
  -c, --istio-exclude-interfaces NAMES       interfaces to leave alone
  -k, --kube-virt-interfaces NAMES           interfaces whose inbound traffic is a virtual machine's outbound traffic
      --redirect-dns                         DNS queries to the servers of /etc/resolv.conf go to port 15053
      --capture-all-dns                      with --redirect-dns: DNS queries to any server
      --drop-invalid                         drop packets that belong to no connection
      --dual-stack                           accepted: rules are for IPv4 and IPv6 always
      --run-validation                       try the rules out; exit code 126 if they don't do
      --skip-rule-apply                      set no rules, for --run-validation
      --iptables-probe-port PORT             where the trial connects to (15002)
      --probe-timeout DURATION               how long it may take (5s)
      --network-namespace FILE               work in this network namespace
      --backend nftables|iptables            by netlink (default), or by iptables-restore and ip6tables-restore, table nat only
      --native-nftables                      the same as --backend nftables
      --force-iptables-binary legacy|nft     the same as --backend iptables, with iptables-legacy or iptables-nft
      --force-apply, --reconcile             accepted: what is there is replaced always
  -n, --dry-run                              print the rules, change nothing
      --cleanup, --cleanup-only              remove the rules

Variables, for what no flag says: INBOUND_INTERCEPTION_MODE, INBOUND_TPROXY_MARK, ISTIO_META_DNS_CAPTURE, INVALID_DROP, ISTIO_DUAL_STACK,
ISTIO_OUTBOUND_OWNER_GROUPS (groups whose sockets are captured, or *), ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE,
ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR (what an application reaches of itself without capture, 127.0.0.1/32).
";

/// A flag that can't be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArgsError {
    /// There is no such flag.
    #[error("{0}: there is no such flag; mesh init --help lists them")]
    Unknown(String),
    /// The flag's value is missing.
    #[error("{0}: a value is missing")]
    Missing(String),
    /// The flag's value can't be read.
    #[error("{flag} {value:?}: {reason}")]
    Value {
        /// The flag.
        flag: String,
        /// Its value.
        value: String,
        /// What is wrong.
        reason: String,
    },
    /// This version does not do that yet.
    #[error("{0} is not supported by this version")]
    Unsupported(String),
}

/// The flags without a value; `--flag=true` and `--flag=false` are understood too.
const SWITCHES: &[&str] = &[
    "-n",
    "--dry-run",
    "--cleanup",
    "--cleanup-only",
    "--native-nftables",
    "--force-apply",
    "--reconcile",
    "--redirect-dns",
    "--capture-all-dns",
    "--drop-invalid",
    "--dual-stack",
    "--run-validation",
    "--skip-rule-apply",
    "--cni-mode",
    "--iptables-trace-logging",
];

/// Variables of Istio, and the flags that mean the same.
const VARIABLES: &[(&str, &str)] = &[
    ("INBOUND_INTERCEPTION_MODE", "-m"),
    ("INBOUND_TPROXY_MARK", "-t"),
    ("ISTIO_META_DNS_CAPTURE", "--redirect-dns"),
    ("INVALID_DROP", "--drop-invalid"),
    ("ISTIO_DUAL_STACK", "--dual-stack"),
    ("ISTIO_OUTBOUND_OWNER_GROUPS", ""),
    ("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", ""),
    ("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", ""),
];

impl Default for Config {
    fn default() -> Self {
        Self {
            outbound_port: 15001,
            inbound_port: 15006,
            tunnel_port: 15008,
            exemption: Exemption::Owner {
                uids: vec![PROXY_UID],
                gids: vec![PROXY_UID],
            },
            interception: Interception::Redirect,
            tproxy_mark: 1337,
            tproxy_table: 133,
            inbound: Which::Only(Vec::new()),
            inbound_exclude: Vec::new(),
            outbound: Which::Only(Vec::new()),
            outbound_exclude: Vec::new(),
            outbound_ports: Vec::new(),
            outbound_ports_exclude: Vec::new(),
            exclude_interfaces: Vec::new(),
            reroute_interfaces: Vec::new(),
            owner_groups: Which::All,
            owner_groups_exclude: Vec::new(),
            loopback: (Ipv4Addr::LOCALHOST, 32),
            dns: DnsCapture::default(),
            drop_invalid: false,
            validation: Validation {
                run: false,
                port: 15002,
                timeout: Duration::from_secs(5),
            },
            backend: Backend::Nftables,
            dry_run: false,
            skip_apply: false,
            cleanup_only: false,
            network_namespace: None,
        }
    }
}

impl Config {
    /// Reads the flags; `-x VALUE`, `--long VALUE` and `--long=VALUE`.
    ///
    /// # Errors
    /// A flag that does not exist, is not supported, or whose value can't be read.
    pub fn from_args(args: &[String]) -> Result<Self, ArgsError> {
        Self::read(args, |_| None)
    }

    /// The same, where `variable` says what the flags don't.
    ///
    /// # Errors
    /// As [`Config::from_args`], also for a variable's value.
    pub fn read(
        args: &[String],
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, ArgsError> {
        let mut config = Self::default();
        for (name, flag) in VARIABLES {
            let Some(value) = variable(name).filter(|value| !value.is_empty()) else {
                continue;
            };
            let field = Field {
                flag: name,
                value: &value,
            };
            match *flag {
                "" => config.variable(&field)?,
                flag if SWITCHES.contains(&flag) => {
                    if field.boolean()? {
                        config.switch(flag)?;
                    }
                }
                flag => config.valued(flag, &value)?,
            }
        }
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let (flag, inline) = match arg.split_once('=') {
                Some((flag, value)) if flag.starts_with("--") => (flag, Some(value)),
                _ => (arg.as_str(), None),
            };
            if SWITCHES.contains(&flag) {
                match inline {
                    // As if it were not there.
                    Some("false") => {}
                    None | Some("true") => config.switch(flag)?,
                    Some(value) => return Err(Field { flag, value }.wrong("it is true or false")),
                }
                continue;
            }
            let value = match inline {
                Some(value) => value,
                None => args
                    .next()
                    .ok_or_else(|| ArgsError::Missing(flag.to_owned()))?,
            };
            config.valued(flag, value)?;
        }
        Ok(config)
    }

    fn switch(&mut self, flag: &str) -> Result<(), ArgsError> {
        match flag {
            "-n" | "--dry-run" => self.dry_run = true,
            "--cleanup" | "--cleanup-only" => self.cleanup_only = true,
            "--redirect-dns" => self.dns.redirect = true,
            "--capture-all-dns" => self.dns.all = true,
            "--drop-invalid" => self.drop_invalid = true,
            "--run-validation" => self.validation.run = true,
            "--skip-rule-apply" => self.skip_apply = true,
            // The rules are for both families always.
            "--dual-stack" => {}
            "--native-nftables" => self.backend = Backend::Nftables,
            // Replacing what is there is all that this tool ever does.
            "--force-apply" | "--reconcile" => {}
            _ => return Err(ArgsError::Unsupported(flag.to_owned())),
        }
        Ok(())
    }

    fn valued(&mut self, flag: &str, value: &str) -> Result<(), ArgsError> {
        let field = Field { flag, value };
        match flag {
            "-p" | "--envoy-port" => self.outbound_port = field.one()?,
            "-z" | "--inbound-capture-port" => self.inbound_port = field.one()?,
            "-e" | "--inbound-tunnel-port" => self.tunnel_port = field.one()?,
            "-u" | "--proxy-uid" => {
                let users = field.list()?;
                if let Exemption::Owner { uids, .. } = &mut self.exemption {
                    *uids = users;
                }
            }
            "-g" | "--proxy-gid" => {
                let groups = field.list()?;
                if let Exemption::Owner { gids, .. } = &mut self.exemption {
                    *gids = groups;
                }
            }
            "-m" | "--istio-inbound-interception-mode" => {
                self.interception = match value {
                    "" | "REDIRECT" => Interception::Redirect,
                    "TPROXY" => Interception::Tproxy,
                    _ => return Err(field.wrong("it is REDIRECT or TPROXY")),
                }
            }
            "-t" | "--istio-inbound-tproxy-mark" => self.tproxy_mark = field.number_above_zero()?,
            "-r" | "--istio-inbound-tproxy-route-table" => {
                self.tproxy_table = field.number_above_zero()?
            }
            "-b" | "--istio-inbound-ports" => self.inbound = field.which(|f| f.list())?,
            "-d" | "--istio-local-exclude-ports" => self.inbound_exclude = field.list()?,
            "-i" | "--istio-service-cidr" => self.outbound = field.which(|f| f.networks())?,
            "-x" | "--istio-service-exclude-cidr" => self.outbound_exclude = field.networks()?,
            "-q" | "--istio-outbound-ports" => self.outbound_ports = field.list()?,
            "-o" | "--istio-local-outbound-ports-exclude" => {
                self.outbound_ports_exclude = field.list()?
            }
            "-c" | "--istio-exclude-interfaces" => self.exclude_interfaces = field.interfaces()?,
            "-k" | "--kube-virt-interfaces" => self.reroute_interfaces = field.interfaces()?,
            "--iptables-probe-port" => self.validation.port = field.one()?,
            "--probe-timeout" => self.validation.timeout = field.duration()?,
            "--network-namespace" => {
                self.network_namespace = Some(value)
                    .filter(|path| !path.is_empty())
                    .map(PathBuf::from)
            }
            "--backend" => {
                self.backend = match value {
                    "nftables" | "nft" => Backend::Nftables,
                    "iptables" => iptables(""),
                    _ => return Err(field.wrong("it is nftables or iptables")),
                }
            }
            "--force-iptables-binary" => {
                self.backend = match value {
                    "" => return Ok(()),
                    "legacy" => iptables("-legacy"),
                    "nft" => iptables("-nft"),
                    _ => return Err(field.wrong("it is legacy or nft")),
                }
            }
            // The log of this tool is one line.
            "--log_output_level" => {}
            other => return Err(ArgsError::Unknown(other.to_owned())),
        }
        Ok(())
    }

    /// The variables that have no flag.
    fn variable(&mut self, field: &Field<'_>) -> Result<(), ArgsError> {
        match field.flag {
            "ISTIO_OUTBOUND_OWNER_GROUPS" => self.owner_groups = field.which(|f| f.list())?,
            "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE" => self.owner_groups_exclude = field.list()?,
            _ => {
                let [(IpAddr::V4(address), prefix)] = field.networks()?[..] else {
                    return Err(field.wrong("it is one IPv4 network such as 127.0.0.0/8"));
                };
                self.loopback = (address, prefix);
            }
        }
        Ok(())
    }
}

fn iptables(suffix: &str) -> Backend {
    Backend::Iptables {
        program: format!("iptables{suffix}"),
    }
}

struct Field<'a> {
    flag: &'a str,
    value: &'a str,
}

impl Field<'_> {
    fn wrong(&self, reason: impl Into<String>) -> ArgsError {
        ArgsError::Value {
            flag: self.flag.to_owned(),
            value: self.value.to_owned(),
            reason: reason.into(),
        }
    }

    fn parts(&self) -> impl Iterator<Item = &str> {
        self.value
            .split(',')
            .map(str::trim)
            .filter(|part| !part.is_empty())
    }

    fn one<T: std::str::FromStr>(&self) -> Result<T, ArgsError> {
        self.value
            .trim()
            .parse()
            .map_err(|_| self.wrong("it is not a number in range"))
    }

    fn list<T: std::str::FromStr>(&self) -> Result<Vec<T>, ArgsError> {
        self.parts()
            .map(|part| {
                part.parse()
                    .map_err(|_| self.wrong(format!("{part:?} is not a number in range")))
            })
            .collect()
    }

    fn which<T>(
        &self,
        list: impl FnOnce(&Self) -> Result<Vec<T>, ArgsError>,
    ) -> Result<Which<T>, ArgsError> {
        if self.value.trim() == "*" {
            Ok(Which::All)
        } else {
            list(self).map(Which::Only)
        }
    }

    /// Names as the kernel takes them (at most 15 bytes, no space, no slash), and nothing that a backend reads as more than a name.
    fn interfaces(&self) -> Result<Vec<String>, ArgsError> {
        let odd = |c: char| c.is_whitespace() || c.is_control() || "/\"+*".contains(c);
        self.parts()
            .map(|part| {
                if part.len() > 15 || part.contains(odd) {
                    return Err(self.wrong(format!("{part:?} is not the name of an interface")));
                }
                Ok(part.to_owned())
            })
            .collect()
    }

    fn networks(&self) -> Result<Vec<Network>, ArgsError> {
        let network = |part: &str| -> Option<Network> {
            let (address, prefix) = match part.split_once('/') {
                Some((address, prefix)) => (address, Some(prefix)),
                None => (part, None),
            };
            let address: IpAddr = address.parse().ok()?;
            let longest = if address.is_ipv4() { 32 } else { 128 };
            let prefix = match prefix {
                Some(prefix) => prefix.parse().ok().filter(|p| *p <= longest)?,
                None => longest,
            };
            Some((address, prefix))
        };
        self.parts()
            .map(|part| {
                network(part).ok_or_else(|| {
                    self.wrong(format!(
                        "{part:?} is not a network such as 10.0.0.0/8 or fd00::/8"
                    ))
                })
            })
            .collect()
    }

    fn number_above_zero(&self) -> Result<u32, ArgsError> {
        match self.one()? {
            0 => Err(self.wrong("it is above 0")),
            number => Ok(number),
        }
    }

    /// True or false as Go reads it.
    fn boolean(&self) -> Result<bool, ArgsError> {
        match self.value {
            "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
            "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
            _ => Err(self.wrong("it is true or false")),
        }
    }

    /// A number with `ms`, `s` or `m`.
    fn duration(&self) -> Result<Duration, ArgsError> {
        let number = self
            .value
            .trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = match &self.value[number.len()..] {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            _ => 0,
        };
        let milliseconds = number.parse::<u32>().ok().filter(|n| *n > 0);
        match milliseconds {
            Some(number) if unit > 0 => Ok(Duration::from_millis(u64::from(number) * unit)),
            _ => Err(self.wrong("it is a time such as 5s or 500ms")),
        }
    }
}
