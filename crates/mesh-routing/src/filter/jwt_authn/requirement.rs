//! Which tokens a request needs.

use std::sync::Arc;

use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::jwt_requirement::RequiresType;

use super::Provider;
use crate::error::{CompileError, Result, Within, every_field};

/// Levels of requirements within requirements.
const DEEPEST: usize = 16;

/// Which tokens a request needs.
#[derive(Debug, Clone)]
pub enum Requirement {
    /// None.
    Nothing,
    /// One of this provider; with audiences in the place of the provider's.
    Provider(Arc<Provider>, Option<Arc<[String]>>),
    /// One of the requirements.
    Any {
        /// The requirements in order.
        of: Vec<Requirement>,
        /// A request without a token passes.
        or_missing: bool,
        /// So does one with a bad token.
        or_failed: bool,
    },
    /// All of them.
    All(Vec<Requirement>),
    /// If there are tokens, they are good ones.
    AllowMissing,
    /// Whatever there is; good tokens are noted.
    AllowFailed,
}

impl Requirement {
    pub(super) fn compile(
        m: &pb::JwtRequirement,
        providers: &[Arc<Provider>],
        depth: usize,
    ) -> Result<Self> {
        if depth > DEEPEST {
            return Err(CompileError::new("requires_type", "is nested too deeply"));
        }
        let find = |name: &str| {
            let found = providers.iter().find(|p| *p.name == *name).cloned();
            found.ok_or_else(|| {
                CompileError::new("provider_name", format!("there is no provider {name:?}"))
            })
        };
        Ok(match &m.requires_type {
            None => Self::Nothing,
            Some(RequiresType::ProviderName(name)) => Self::Provider(find(name)?, None),
            Some(RequiresType::ProviderAndAudiences(m)) => {
                every_field!(m, pb::ProviderWithAudiences, used { provider_name, audiences } irrelevant {} refused {});
                let audiences = (!m.audiences.is_empty()).then(|| m.audiences.clone().into());
                Self::Provider(find(&m.provider_name)?, audiences)
            }
            Some(RequiresType::RequiresAny(list)) => {
                Self::any(&list.requirements, providers, depth).within("requires_any")?
            }
            Some(RequiresType::RequiresAll(list)) => {
                let all = list.requirements.iter();
                let all = all.map(|m| Self::compile(m, providers, depth + 1));
                Self::All(all.collect::<Result<_>>().within("requires_all")?)
            }
            Some(RequiresType::AllowMissing(_)) => Self::AllowMissing,
            Some(RequiresType::AllowMissingOrFailed(_)) => Self::AllowFailed,
            Some(RequiresType::ExtractOnlyWithoutValidation(_)) => {
                return Err(CompileError::unsupported("extract_only_without_validation"));
            }
        })
    }

    fn any(list: &[pb::JwtRequirement], providers: &[Arc<Provider>], depth: usize) -> Result<Self> {
        let (mut of, mut or_missing, mut or_failed) = (Vec::new(), false, false);
        for m in list {
            match &m.requires_type {
                Some(RequiresType::AllowMissing(_)) => or_missing = true,
                Some(RequiresType::AllowMissingOrFailed(_)) => or_failed = true,
                _ => of.push(Self::compile(m, providers, depth + 1)?),
            }
        }
        Ok(match (of.is_empty(), or_failed, or_missing) {
            (true, true, _) => Self::AllowFailed,
            (true, false, true) => Self::AllowMissing,
            (true, false, false) => {
                return Err(CompileError::new("requirements", "are empty"));
            }
            _ => Self::Any {
                of,
                or_missing,
                or_failed,
            },
        })
    }
}
