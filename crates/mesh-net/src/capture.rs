//! Traffic capture for a sidecar: the rules of Istio's `istio-iptables`, as nftables rules or as iptables-restore text.
//!
//! [`Config::from_args`] reads the flags of `istio-iptables`; [`Config::plan`] makes the rules, in its order; [`run_init`] is the whole tool.
//! Interception mode REDIRECT is here; TPROXY, DNS capture and what goes with them are refused by name.

mod args;
mod iptables;
mod plan;

use std::io::Write;
use std::net::Ipv4Addr;

use crate::nft::{self, Family, NftError};
use crate::ns;

pub use args::{ArgsError, HELP};
pub use plan::Plan;

/// The nftables table that holds the rules.
pub const TABLE: &str = "istio-proxy-nat";

/// Which ports or networks: all, or these.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which<T> {
    /// `*`.
    All,
    /// These; none of them is none at all.
    Only(Vec<T>),
}

/// An IPv4 network.
pub type Network = (Ipv4Addr, u8);

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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// nftables over netlink, by this process itself.
    Nftables,
    /// The programs `iptables-save` and `iptables-restore`, for IPv4 only.
    Iptables,
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
    /// `--backend`.
    pub backend: Backend,
    /// `-n`: only print.
    pub dry_run: bool,
    /// `--cleanup-only`: only remove.
    pub cleanup_only: bool,
}

/// Why capture was not set up.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// A flag is wrong.
    #[error(transparent)]
    Args(#[from] ArgsError),
    /// The kernel refused.
    #[error(transparent)]
    Nft(#[from] NftError),
    /// The other backend's program failed.
    #[error("running {program}: {reason}; with --backend nftables no program is needed")]
    Program {
        /// The program.
        program: String,
        /// What it said.
        reason: String,
    },
    /// The report could not be written.
    #[error("writing the report: {0}")]
    Write(#[from] std::io::Error),
}

/// `mesh init`: reads the flags, sets up (or removes, or prints) the rules of the calling thread's network namespace, and reports.
///
/// Doing it twice is doing it once: what an earlier run set up is replaced in one transaction.
///
/// # Errors
/// When a flag is wrong or the rules can't be put in; nothing was changed then.
pub fn run_init(args: &[String], out: &mut dyn Write) -> Result<(), CaptureError> {
    if args.iter().any(|a| a == "--help" || a == "-h") {
        return Ok(out.write_all(HELP.as_bytes())?);
    }
    let mut config = Config::from_args(args)?;
    if let Exemption::Owner { uids, .. } = &config.exemption
        && !uids.iter().all(|uid| ns::is_mapped(*uid).unwrap_or(true))
    {
        config.exemption = Exemption::Mark(crate::sockets::EXEMPT_MARK);
    }
    let plan = config.plan();
    if config.dry_run {
        let text = match config.backend {
            Backend::Nftables => plan.table().to_text(),
            Backend::Iptables => iptables::restore_text(&plan),
        };
        return Ok(out.write_all(text.as_bytes())?);
    }
    if config.cleanup_only {
        match config.backend {
            Backend::Nftables => nft::delete_table(Family::Inet, TABLE)?,
            Backend::Iptables => iptables::cleanup()?,
        }
        writeln!(out, "capture: removed")?;
        return Ok(());
    }
    match config.backend {
        Backend::Nftables => plan.table().replace()?,
        Backend::Iptables => iptables::apply(&plan)?,
    }
    writeln!(out, "{}", config.report(&plan))?;
    Ok(())
}

impl Config {
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
        let (rules, backend) = match self.backend {
            Backend::Nftables => (plan.len(), "nftables"),
            Backend::Iptables => (iptables::rules(plan).count(), "iptables (IPv4 only)"),
        };
        format!(
            "capture: outbound {outbound} to port {}, inbound {inbound} to port {}; exempt: {exempt}; {} rules by {backend}",
            self.outbound_port, self.inbound_port, rules
        )
    }
}
