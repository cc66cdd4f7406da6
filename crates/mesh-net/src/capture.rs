//! Traffic capture for a sidecar: the rules of Istio's `istio-iptables`, as nftables rules or as iptables-restore text.
//!
//! [`Config::read`] reads the flags and variables of `istio-iptables`; [`Config::plan`] makes the rules, in its order; [`run_init`] is the whole
//! tool. By default the rules go to the kernel by netlink: no program, no file and no lock is needed, only CAP_NET_ADMIN in the pod's network
//! namespace. Rules of others, by whatever program, are left alone.

mod args;
mod iptables;
mod plan;
mod routes;
mod validate;

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use crate::nft::{self, Family, NftError};
use crate::ns;

pub use args::{ArgsError, HELP};
pub use plan::Plan;

/// The nftables table that holds the rules of address translation; every configuration has it.
pub const TABLE: &str = "istio-proxy-nat";
/// All our tables, in the order of iptables' nat, mangle and raw.
const TABLES: [&str; 3] = [TABLE, "istio-proxy-mangle", "istio-proxy-raw"];
/// Where the pod's servers of DNS are named.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Which ports or networks: all, or these.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which<T> {
    /// `*`.
    All,
    /// These; none of them is none at all.
    Only(Vec<T>),
}

/// A network of IPv4 or IPv6, and the length of its prefix.
pub type Network = (IpAddr, u8);

/// Who the rules leave alone: the proxy's own traffic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exemption {
    /// Sockets of these users and groups.
    Owner {
        /// `-u`.
        uids: Vec<u32>,
        /// `-g`.
        gids: Vec<u32>,
    },
    /// Sockets with this mark, where the proxy's uid has no meaning in the user namespace.
    Mark(u32),
}

/// Which program puts the rules in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backend {
    /// nftables over netlink, by this process itself.
    Nftables,
    /// Programs named after this one, such as `iptables-save` and `ip6tables-restore`, for the table nat.
    Iptables {
        /// `iptables`, `iptables-legacy` or `iptables-nft`.
        program: String,
    },
}

/// How inbound connections reach the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interception {
    /// Their destination is changed; the application sees the proxy's address.
    Redirect,
    /// They come as they are.
    Tproxy,
}

/// Which DNS queries go to the agent (port 15053).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DnsCapture {
    /// `--redirect-dns`: those to the servers.
    pub redirect: bool,
    /// `--capture-all-dns`: those to anybody.
    pub all: bool,
    /// The pod's servers; [`run_init`] reads them from `/etc/resolv.conf`.
    pub servers: Vec<IpAddr>,
}

/// How the rules are tried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Validation {
    /// `--run-validation`.
    pub run: bool,
    /// `--iptables-probe-port`: the connection is made to this port of the pod (15002).
    pub port: u16,
    /// `--probe-timeout` (5 s).
    pub timeout: Duration,
}

/// What to capture. The defaults are those of the flags.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// `-p`: where outbound connections go (15001).
    pub outbound_port: u16,
    /// `-z`: where inbound connections go (15006).
    pub inbound_port: u16,
    /// `-e`: never captured (15008).
    pub tunnel_port: u16,
    /// Who is exempt (uid and gid 1337).
    pub exemption: Exemption,
    /// `-m` (REDIRECT).
    pub interception: Interception,
    /// `-t`: the mark of packets that the proxy gets although they are for another address (1337).
    pub tproxy_mark: u32,
    /// `-r`: the routing table for them (133).
    pub tproxy_table: u32,
    /// `-b`: inbound ports that are captured (none).
    pub inbound: Which<u16>,
    /// `-d`: inbound ports that are not, where all are.
    pub inbound_exclude: Vec<u16>,
    /// `-i`: destinations that are captured (none).
    pub outbound: Which<Network>,
    /// `-x`: destinations that are not.
    pub outbound_exclude: Vec<Network>,
    /// `-q`: destination ports that are captured whatever the destination.
    pub outbound_ports: Vec<u16>,
    /// `-o`: destination ports that are not captured.
    pub outbound_ports_exclude: Vec<u16>,
    /// `-c`: interfaces that are left alone.
    pub exclude_interfaces: Vec<String>,
    /// `-k`: interfaces of virtual machines, whose inbound traffic is what the machine sends out.
    pub reroute_interfaces: Vec<String>,
    /// `ISTIO_OUTBOUND_OWNER_GROUPS`: groups whose sockets are captured (all).
    pub owner_groups: Which<u32>,
    /// `ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE`: groups whose sockets are not, where all are.
    pub owner_groups_exclude: Vec<u32>,
    /// `ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR`: what an application reaches of itself without capture (127.0.0.1/32).
    pub loopback: (Ipv4Addr, u8),
    /// Which DNS queries go to the agent.
    pub dns: DnsCapture,
    /// `--drop-invalid`: packets that belong to no connection are dropped.
    pub drop_invalid: bool,
    /// How the rules are tried out.
    pub validation: Validation,
    /// `--backend`.
    pub backend: Backend,
    /// `-n`: only print.
    pub dry_run: bool,
    /// `--skip-rule-apply`: set no rules; for trying out those that there are.
    pub skip_apply: bool,
    /// `--cleanup-only`: only remove.
    pub cleanup_only: bool,
    /// `--network-namespace`: a file that stands for the namespace to work in; the present one.
    pub network_namespace: Option<PathBuf>,
}

/// Why capture was not set up.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// A flag is wrong.
    #[error(transparent)]
    Args(#[from] ArgsError),
    /// The kernel refused rules.
    #[error(transparent)]
    Nft(#[from] NftError),
    /// The kernel does not have what the rules need.
    #[error(
        "{source}. Capture needs nf_tables with nat for both address families (Linux 5.2 or newer), and the modules {modules}: load them on the \
         node (`modprobe -a {modules}`), also at its start (/etc/modules-load.d)"
    )]
    Kernel {
        /// What was refused.
        source: NftError,
        /// The modules that these rules need.
        modules: String,
    },
    /// The kernel refused the routing that TPROXY needs.
    #[error("routing of marked packets, {what}: {errno}; CAP_NET_ADMIN is needed")]
    Route {
        /// The part that was refused.
        what: String,
        /// Why.
        errno: nix::Error,
    },
    /// The other backend's program failed.
    #[error("running {program}: {reason}; with --backend nftables no program is needed")]
    Program {
        /// The program.
        program: String,
        /// What it said.
        reason: String,
    },
    /// The other backend can't do that.
    #[error(
        "--backend iptables does not apply {0}, it only prints the rules (--dry-run); use --backend nftables"
    )]
    Backend(&'static str),
    /// The proxy's user does not exist here, and its mark is needed for something else.
    #[error(
        "interception mode TPROXY needs the proxy's user {0:?} in this user namespace; use REDIRECT"
    )]
    TproxyByMark(Vec<u32>),
    /// The namespace can't be entered.
    #[error("entering the network namespace {path}: {source}")]
    Namespace {
        /// Its file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The servers of DNS are not known.
    #[error("reading {RESOLV_CONF} for the servers of DNS: {0}; --capture-all-dns needs none")]
    Resolv(std::io::Error),
    /// The rules don't do what they should.
    #[error(
        "validating the capture rules: {0}; is the init container of this pod, or the CNI plugin, in order?"
    )]
    Validation(String),
    /// The report could not be written.
    #[error("writing the report: {0}")]
    Write(#[from] std::io::Error),
}

impl CaptureError {
    /// What the process ends with: 126 where the rules were tried out in vain, by which a CNI plugin knows that it has to mend the pod.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Validation(_) => 126,
            _ => 1,
        }
    }
}

/// `mesh init`: reads the flags, sets up (or removes, or prints) the rules of the calling thread's network namespace, and reports.
///
/// Doing it twice is doing it once: what an earlier run set up is replaced in one transaction.
///
/// # Errors
/// When a flag is wrong or the rules can't be put in; none was changed then.
pub fn run_init(args: &[String], out: &mut dyn Write) -> Result<(), CaptureError> {
    if args.iter().any(|a| a == "--help" || a == "-h") {
        return Ok(out.write_all(HELP.as_bytes())?);
    }
    let mut config = Config::read(args, |name| std::env::var(name).ok())?;
    if config.dns.redirect && !config.dns.all {
        let text = std::fs::read_to_string(RESOLV_CONF).map_err(CaptureError::Resolv)?;
        config.dns.servers = name_servers(&text);
    }
    // What is taken away does not depend on who was exempt.
    if !config.cleanup_only {
        config.exempt_by_mark_where_needed()?;
    }
    if config.dry_run {
        return Ok(out.write_all(config.text().as_bytes())?);
    }
    if let Some(path) = &config.network_namespace {
        ns::enter_network(path).map_err(|source| CaptureError::Namespace {
            path: path.clone(),
            source,
        })?;
    }
    if config.cleanup_only {
        config.cleanup()?;
        writeln!(out, "capture: removed")?;
        return Ok(());
    }
    if !config.skip_apply {
        let plan = config.plan();
        config.apply(&plan)?;
        writeln!(out, "{}", config.report(&plan))?;
    }
    if config.validation.run {
        validate::run(&config).map_err(CaptureError::Validation)?;
        writeln!(
            out,
            "capture: a connection to this pod reached the proxy's port"
        )?;
    }
    Ok(())
}

/// The servers of DNS in the text of a resolv.conf(5), each once.
fn name_servers(text: &str) -> Vec<IpAddr> {
    let mut servers: Vec<IpAddr> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let server = (words.next() == Some("nameserver")).then(|| words.next());
        if let Some(ip) = server.flatten().and_then(|word| word.parse().ok())
            && !servers.contains(&ip)
        {
            servers.push(ip);
        }
    }
    servers
}

impl Config {
    /// The rules as text, as `--dry-run` prints them.
    pub fn text(&self) -> String {
        let plan = self.plan();
        let routes: String = routes::of(self)
            .iter()
            .map(|route| format!("# {route}\n"))
            .collect();
        let rules = match self.backend {
            Backend::Nftables => {
                let tables: Vec<String> = plan.tables().iter().map(nft::Table::to_text).collect();
                tables.join("\n")
            }
            Backend::Iptables { .. } => iptables::restore_text(&plan),
        };
        format!("{routes}{rules}")
    }

    /// In a user namespace without the proxy's uid its sockets carry a mark instead.
    fn exempt_by_mark_where_needed(&mut self) -> Result<(), CaptureError> {
        let Exemption::Owner { uids, .. } = &self.exemption else {
            return Ok(());
        };
        if uids.iter().all(|uid| ns::is_mapped(*uid).unwrap_or(true)) {
            return Ok(());
        }
        // The mark of the proxy's sockets and the one of TPROXY are the same number.
        if self.interception == Interception::Tproxy {
            return Err(CaptureError::TproxyByMark(uids.clone()));
        }
        self.exemption = Exemption::Mark(crate::sockets::EXEMPT_MARK);
        Ok(())
    }

    fn apply(&self, plan: &Plan) -> Result<(), CaptureError> {
        match &self.backend {
            Backend::Nftables => {
                let tables = plan.tables();
                let absent: Vec<_> = TABLES
                    .into_iter()
                    .filter(|name| !tables.iter().any(|table| table.name == *name))
                    .map(|name| (Family::Inet, name))
                    .collect();
                nft::replace_all(&tables, &absent).map_err(|error| self.refused(error))?;
            }
            Backend::Iptables { program } => {
                if plan.tables().len() > 1 {
                    return Err(CaptureError::Backend(
                        "TPROXY, DNS capture and --drop-invalid",
                    ));
                }
                iptables::apply(program, plan)?;
            }
        }
        routes::apply(self)
    }

    /// What the kernel's refusal means: who has no module must be told which, for the pod can't load it.
    fn refused(&self, error: NftError) -> CaptureError {
        if !error.lacks_kernel_part() {
            return error.into();
        }
        let mut modules = vec!["nf_tables", "nft_chain_nat", "nft_redir"];
        if self.interception == Interception::Tproxy {
            modules.push("nft_tproxy");
        }
        if self.interception == Interception::Tproxy || self.dns.redirect || self.drop_invalid {
            modules.push("nft_ct");
        }
        CaptureError::Kernel {
            source: error,
            modules: modules.join(" "),
        }
    }

    fn cleanup(&self) -> Result<(), CaptureError> {
        match &self.backend {
            Backend::Nftables => {
                nft::replace_all(&[], &TABLES.map(|name| (Family::Inet, name)))?;
            }
            Backend::Iptables { program } => iptables::cleanup(program)?,
        }
        routes::remove(self)
    }

    /// One line that says what is captured now.
    fn report(&self, plan: &Plan) -> String {
        let exempt = match &self.exemption {
            Exemption::Owner { uids, gids } => format!("uid {uids:?} and gid {gids:?}"),
            Exemption::Mark(mark) => format!("mark {mark:#x} (the proxy's uid is not mapped here)"),
        };
        let outbound = match &self.outbound {
            Which::All => "everything".to_owned(),
            Which::Only(networks) if networks.is_empty() => "nothing".to_owned(),
            Which::Only(networks) => format!("{} networks", networks.len()),
        };
        let inbound = match &self.inbound {
            Which::All => format!("every port but {:?}", self.inbound_exclude),
            Which::Only(ports) => format!("ports {ports:?}"),
        };
        let mode = match self.interception {
            Interception::Redirect => "",
            Interception::Tproxy => " by TPROXY",
        };
        let dns = match (&self.dns.redirect, self.dns.all) {
            (false, _) => String::new(),
            (true, true) => ", all DNS to port 15053".to_owned(),
            (true, false) => format!(", DNS to {:?} to port 15053", self.dns.servers),
        };
        let backend = match &self.backend {
            Backend::Nftables => "nftables",
            Backend::Iptables { program } => program,
        };
        format!(
            "capture: outbound {outbound} to port {}, inbound {inbound} to port {}{mode}{dns}; exempt: {exempt}; {} rules by {backend}",
            self.outbound_port,
            self.inbound_port,
            plan.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_a_module_is_told_which() {
        let refused = |errno| NftError::Refused {
            what: "add the table istio-proxy-nat".to_owned(),
            errno,
        };
        let config = Config {
            interception: Interception::Tproxy,
            ..Config::default()
        };
        for errno in [nix::Error::ENOENT, nix::Error::EOPNOTSUPP] {
            let text = config.refused(refused(errno)).to_string();
            let command = "`modprobe -a nf_tables nft_chain_nat nft_redir nft_tproxy nft_ct`";
            assert!(text.contains(command), "{text}");
        }
        let text = Config::default()
            .refused(NftError::Open(nix::Error::EPROTONOSUPPORT))
            .to_string();
        assert!(
            text.contains("nft_redir`") && !text.contains("nft_tproxy"),
            "{text}"
        );
        let text = config.refused(refused(nix::Error::EPERM)).to_string();
        assert!(
            text.contains("CAP_NET_ADMIN") && !text.contains("modprobe"),
            "{text}"
        );
    }

    #[test]
    fn servers_are_read_as_the_resolver_reads_them() {
        let text = "# nameserver 1.1.1.1\nsearch a.b\nnameserver 10.96.0.10\n nameserver\tfd00::1 \nnameserver 10.96.0.10\nnameserver x\n";
        let expected: [IpAddr; 2] = ["10.96.0.10".parse().unwrap(), "fd00::1".parse().unwrap()];
        assert_eq!(name_servers(text), expected);
    }
}
