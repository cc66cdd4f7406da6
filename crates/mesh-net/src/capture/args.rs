//! The flags of `istio-iptables`.

use std::net::Ipv4Addr;

use super::{Backend, Config, Exemption, Network, Which};
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
  -m, --istio-inbound-interception-mode M    REDIRECT (the only mode of this version)
  -b, --istio-inbound-ports PORTS            inbound ports to capture, or * (none)
  -d, --istio-local-exclude-ports PORTS      inbound ports not to capture, where all are
  -i, --istio-service-cidr NETWORKS          destinations to capture, or * (none)
  -x, --istio-service-exclude-cidr NETWORKS  destinations not to capture
  -q, --istio-outbound-ports PORTS           destination ports to capture whatever the destination
  -o, --istio-local-outbound-ports-exclude PORTS  destination ports not to capture
  -c, --istio-exclude-interfaces NAMES       interfaces to leave alone
      --backend nftables|iptables            by netlink (default), or by iptables-restore, IPv4 only
      --native-nftables                      the same as --backend nftables
  -n, --dry-run                              print the rules, change nothing
      --cleanup-only                         remove the rules
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
            inbound: Which::Only(Vec::new()),
            inbound_exclude: Vec::new(),
            outbound: Which::Only(Vec::new()),
            outbound_exclude: Vec::new(),
            outbound_ports: Vec::new(),
            outbound_ports_exclude: Vec::new(),
            exclude_interfaces: Vec::new(),
            backend: Backend::Nftables,
            dry_run: false,
            cleanup_only: false,
        }
    }
}

impl Config {
    /// Reads the flags; `-x VALUE`, `--long VALUE` and `--long=VALUE`.
    ///
    /// # Errors
    /// A flag that does not exist, is not supported, or whose value can't be read.
    pub fn from_args(args: &[String]) -> Result<Self, ArgsError> {
        let mut config = Self::default();
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
            "--cleanup-only" => self.cleanup_only = true,
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
            "-m" | "--istio-inbound-interception-mode" => match value {
                "" | "REDIRECT" => {}
                other => return Err(ArgsError::Unsupported(format!("{flag} {other}"))),
            },
            "-b" | "--istio-inbound-ports" => self.inbound = field.which(|f| f.list())?,
            "-d" | "--istio-local-exclude-ports" => self.inbound_exclude = field.list()?,
            "-i" | "--istio-service-cidr" => self.outbound = field.which(|f| f.networks())?,
            "-x" | "--istio-service-exclude-cidr" => self.outbound_exclude = field.networks()?,
            "-q" | "--istio-outbound-ports" => self.outbound_ports = field.list()?,
            "-o" | "--istio-local-outbound-ports-exclude" => {
                self.outbound_ports_exclude = field.list()?
            }
            "-c" | "--istio-exclude-interfaces" => self.exclude_interfaces = field.interfaces()?,
            "--backend" => {
                self.backend = match value {
                    "nftables" | "nft" => Backend::Nftables,
                    "iptables" => Backend::Iptables,
                    _ => return Err(field.wrong("it is nftables or iptables")),
                }
            }
            // The log of this tool is one line.
            "--log_output_level" => {}
            "-k"
            | "--kube-virt-interfaces"
            | "-t"
            | "--istio-inbound-tproxy-mark"
            | "-r"
            | "--istio-inbound-tproxy-route-table"
            | "--iptables-probe-port"
            | "--probe-timeout"
            | "--network-namespace"
            | "--force-iptables-binary" => {
                return Err(ArgsError::Unsupported(flag.to_owned()));
            }
            other => return Err(ArgsError::Unknown(other.to_owned())),
        }
        Ok(())
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
            let (address, prefix) = part.split_once('/').unwrap_or((part, "32"));
            let prefix: u8 = prefix.parse().ok().filter(|p| *p <= 32)?;
            Some((address.parse::<Ipv4Addr>().ok()?, prefix))
        };
        self.parts()
            .map(|part| {
                network(part).ok_or_else(|| {
                    self.wrong(format!(
                        "{part:?} is not an IPv4 network such as 10.0.0.0/8"
                    ))
                })
            })
            .collect()
    }
}
