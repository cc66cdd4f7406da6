//! Which upgrades of a connection are let through (`upgrade_configs` of connection manager and route).

use envoy_types::pb::envoy::config::route::v3::route_action::UpgradeConfig as RouteUpgrade;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::UpgradeConfig as ManagerUpgrade;

use crate::error::{CompileError, Result, Within, every_field, flag};

/// Upgrade types that are let through or refused; names do not depend on case.
#[derive(Debug, Clone, Default)]
pub struct Upgrades(Vec<Upgrade>);

#[derive(Debug, Clone)]
struct Upgrade {
    kind: Box<str>,
    how: Passage,
}

/// What becomes of an upgrade.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passage {
    /// Refused.
    No,
    /// Passed on to the endpoint, which decides.
    Through,
    /// A CONNECT that ends here: its bytes go to the endpoint as they are.
    Terminated,
}

impl Upgrades {
    pub(crate) fn of_manager(configs: &[ManagerUpgrade]) -> Result<Self> {
        let mut all = Vec::with_capacity(configs.len());
        for (i, m) in configs.iter().enumerate() {
            let at = format!("upgrade_configs[{i}]");
            every_field!(m, ManagerUpgrade, used { upgrade_type, enabled } irrelevant {} refused { filters });
            let how = passage(flag(m.enabled.as_ref(), true), false);
            add(&mut all, &m.upgrade_type, how).within(at)?;
        }
        Ok(Self(all))
    }

    pub(crate) fn of_route(configs: &[RouteUpgrade]) -> Result<Self> {
        let mut all = Vec::with_capacity(configs.len());
        for (i, m) in configs.iter().enumerate() {
            let at = format!("upgrade_configs[{i}]");
            every_field!(m, RouteUpgrade, used { upgrade_type, enabled, connect_config } irrelevant {} refused {});
            let connect = m.upgrade_type.eq_ignore_ascii_case("connect");
            if let Some(config) = &m.connect_config {
                if !connect {
                    let error = CompileError::new("connect_config", "belongs to CONNECT only");
                    return Err(error).within(at);
                }
                if config.proxy_protocol_config.is_some() || config.allow_post {
                    let error = CompileError::unsupported(
                        "connect_config with proxy_protocol_config or allow_post",
                    );
                    return Err(error).within(at);
                }
            }
            let how = passage(flag(m.enabled.as_ref(), true), m.connect_config.is_some());
            add(&mut all, &m.upgrade_type, how).within(at)?;
        }
        Ok(Self(all))
    }

    /// What these say of a type; `None` where they do not mention it.
    pub fn find(&self, kind: &str) -> Option<Passage> {
        let found = self.0.iter().find(|u| u.kind.eq_ignore_ascii_case(kind));
        found.map(|upgrade| upgrade.how)
    }
}

fn passage(enabled: bool, terminated: bool) -> Passage {
    match (enabled, terminated) {
        (false, _) => Passage::No,
        (true, false) => Passage::Through,
        (true, true) => Passage::Terminated,
    }
}

fn add(all: &mut Vec<Upgrade>, kind: &str, how: Passage) -> Result<()> {
    if kind.is_empty() || all.iter().any(|u| u.kind.eq_ignore_ascii_case(kind)) {
        return Err(CompileError::new(
            "upgrade_type",
            format!("{kind:?} is empty or given twice"),
        ));
    }
    if kind.eq_ignore_ascii_case("connect-udp") {
        return Err(CompileError::unsupported("upgrade_type connect-udp"));
    }
    all.push(Upgrade {
        kind: kind.into(),
        how,
    });
    Ok(())
}
