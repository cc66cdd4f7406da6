//! JSON Web Tokens: the `envoy.filters.http.jwt_authn` filter. Which tokens are looked for, where, and which of them a request needs;
//! reading and verifying them is the business of who runs the filter.

mod provider;
mod requirement;

use std::collections::HashMap;
use std::sync::Arc;

use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::per_route_config::RequirementSpecifier;
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::requirement_rule::RequirementType;

use crate::error::{CompileError, Result, Within, every_field};
use crate::route::{Condition, RequestView};

pub use provider::{ClaimHeader, FromHeader, KeySource, Provider, RemoteKeys};
pub use requirement::Requirement;

/// Where verified tokens are kept for later filters and routes.
pub const SECTION: &str = "envoy.filters.http.jwt_authn";

/// A compiled `JwtAuthentication`.
#[derive(Debug)]
pub struct JwtAuthn {
    /// The providers in the order of their names.
    pub providers: Vec<Arc<Provider>>,
    rules: Vec<Rule>,
    /// Requirements that routes can name.
    named: HashMap<String, Requirement>,
    /// Preflights of CORS carry no tokens and pass.
    pub bypass_preflight: bool,
    /// The answer to a refused request does not say why.
    pub silent: bool,
    /// Statistics, as `http.PREFIX.jwt_authn.`.
    pub stats: Box<str>,
}

#[derive(Debug)]
struct Rule {
    condition: Condition,
    requirement: Option<Requirement>,
}

/// What a route says: the requirement of this name; `None` needs no token.
#[derive(Debug)]
pub struct JwtPerRoute(Option<String>);

impl JwtAuthn {
    pub(crate) fn compile(m: &pb::JwtAuthentication) -> Result<Self> {
        every_field!(m, pb::JwtAuthentication,
            used { providers, rules, bypass_cors_preflight, requirement_map, strip_failure_response, stat_prefix }
            irrelevant {}
            refused { filter_state_rules });
        let mut names: Vec<&String> = m.providers.keys().collect();
        names.sort_unstable();
        let mut providers = Vec::with_capacity(names.len());
        for name in names {
            let provider = Provider::compile(name, &m.providers[name]);
            let provider = provider.within(format_args!("providers[{name:?}]"))?;
            providers.push(Arc::new(provider));
        }
        let mut named = HashMap::with_capacity(m.requirement_map.len());
        for (name, requirement) in &m.requirement_map {
            let requirement = Requirement::compile(requirement, &providers, 0)
                .within(format_args!("requirement_map[{name:?}]"))?;
            named.insert(name.clone(), requirement);
        }
        let mut rules = Vec::with_capacity(m.rules.len());
        for (i, rule) in m.rules.iter().enumerate() {
            let rule = Rule::compile(rule, &providers, &named);
            rules.push(rule.within(format_args!("rules[{i}]"))?);
        }
        Ok(Self {
            providers,
            rules,
            named,
            bypass_preflight: m.bypass_cors_preflight,
            silent: m.strip_failure_response,
            stats: m.stat_prefix.as_str().into(),
        })
    }

    /// What a request needs. `Err`: the route names a requirement that the filter does not have.
    pub fn requirement<'a>(
        &'a self,
        route: Option<&JwtPerRoute>,
        request: &RequestView<'_>,
    ) -> std::result::Result<Option<&'a Requirement>, UnknownRequirement> {
        match route {
            Some(JwtPerRoute(None)) => Ok(None),
            Some(JwtPerRoute(Some(name))) => match self.named.get(name) {
                Some(requirement) => Ok(Some(requirement)),
                None => Err(UnknownRequirement(name.clone())),
            },
            None => {
                let rule = self.rules.iter().find(|rule| rule.condition.holds(request));
                Ok(rule.and_then(|rule| rule.requirement.as_ref()))
            }
        }
    }
}

/// A route names a requirement that the filter does not have.
#[derive(Debug, thiserror::Error)]
#[error("the route asks for the requirement {0:?}, which the JWT filter does not have")]
pub struct UnknownRequirement(String);

impl Rule {
    fn compile(
        m: &pb::RequirementRule,
        providers: &[Arc<Provider>],
        named: &HashMap<String, Requirement>,
    ) -> Result<Self> {
        every_field!(m, pb::RequirementRule, used { r#match, requirement_type } irrelevant {} refused {});
        let condition = m.r#match.as_ref();
        let condition = condition.ok_or_else(|| CompileError::new("match", "is missing"))?;
        Ok(Self {
            condition: Condition::compile(condition).within("match")?,
            requirement: match &m.requirement_type {
                None => None,
                Some(RequirementType::Requires(m)) => {
                    Some(Requirement::compile(m, providers, 0).within("requires")?)
                }
                Some(RequirementType::RequirementName(name)) => {
                    let unknown = || {
                        CompileError::new("requirement_name", format!("{name:?} is not in the map"))
                    };
                    Some(named.get(name).ok_or_else(unknown)?.clone())
                }
            },
        })
    }
}

impl JwtPerRoute {
    pub(crate) fn compile(m: &pb::PerRouteConfig) -> Result<Self> {
        every_field!(m, pb::PerRouteConfig, used { requirement_specifier } irrelevant {} refused {});
        match &m.requirement_specifier {
            Some(RequirementSpecifier::Disabled(true)) => Ok(Self(None)),
            Some(RequirementSpecifier::RequirementName(name)) => Ok(Self(Some(name.clone()))),
            _ => Err(CompileError::new(
                "requirement_specifier",
                "is neither disabled: true nor a requirement_name",
            )),
        }
    }
}
