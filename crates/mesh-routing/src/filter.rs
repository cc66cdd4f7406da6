//! The HTTP filters that act on requests, in the order of the connection manager, and what routes say about them.
//!
//! The set is closed: access control, tokens, external authorization, fault injection, CORS, local and global rate limits. The router is
//! the proxy itself; filters that are statistics or metadata exchange are built in; all others are refused by name.

pub mod alpn;
pub mod cors;
pub mod descriptor;
pub mod ext_authz;
pub mod fault;
pub mod jwt_authn;
pub mod local_rate_limit;
pub mod rate_limit;
pub mod rbac;
pub mod service;

use std::collections::HashMap;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::RuntimeFractionalPercent;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::filters::http as http_filters;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_filter::ConfigType;
use envoy_types::pb::envoy::r#type::v3::FractionalPercent;
use envoy_types::pb::envoy::r#type::v3::fractional_percent::DenominatorType;
use envoy_types::pb::google::protobuf::Any;
use prost::Message;

use crate::error::{CompileError, Result, Within, every_field, flag};
use crate::mirror::Mirror;
use cors::CorsPolicy;
use descriptor::{Limits, RateLimits};
use ext_authz::{ExtAuthz, ExtAuthzPerRoute};
use fault::Fault;
use jwt_authn::{JwtAuthn, JwtPerRoute, KeySource, Provider};
use local_rate_limit::LocalRateLimit;
use rate_limit::{RateLimit, RateLimitPerRoute};
use rbac::Rbac;

const ROUTER: &str = "envoy.extensions.filters.http.router.v3.Router";
const CORS: &str = "envoy.extensions.filters.http.cors.v3.Cors";
const CORS_POLICY: &str = "envoy.extensions.filters.http.cors.v3.CorsPolicy";
const FAULT: &str = "envoy.extensions.filters.http.fault.v3.HTTPFault";
const LOCAL_RATE_LIMIT: &str = "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit";
const RATE_LIMIT: &str = "envoy.extensions.filters.http.ratelimit.v3.RateLimit";
const RATE_LIMIT_PER_ROUTE: &str = "envoy.extensions.filters.http.ratelimit.v3.RateLimitPerRoute";
const RBAC: &str = "envoy.extensions.filters.http.rbac.v3.RBAC";
const RBAC_PER_ROUTE: &str = "envoy.extensions.filters.http.rbac.v3.RBACPerRoute";
const JWT: &str = "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication";
const JWT_PER_ROUTE: &str = "envoy.extensions.filters.http.jwt_authn.v3.PerRouteConfig";
const EXT_AUTHZ: &str = "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz";
const EXT_AUTHZ_PER_ROUTE: &str = "envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute";
const FILTER_CONFIG: &str = "envoy.config.route.v3.FilterConfig";
/// Statistics and metadata exchange, which are built in; the ALPN names of requests, which the connection manager looks for itself.
const BUILT_IN: &[&str] = &[
    alpn::ALPN,
    "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig",
    "io.istio.http.peer_metadata.Config",
    "stats.PluginConfig",
];

/// The filters of a connection manager.
#[derive(Debug, Default)]
pub struct HttpFilters {
    filters: Vec<HttpFilter>,
    /// One of them acts without a word from the route.
    unasked: bool,
    /// The connection manager's part of their statistics' names, as in `http.PREFIX.rbac.denied`.
    pub stats: Box<str>,
}

#[derive(Debug)]
struct HttpFilter {
    /// The key under which routes configure it.
    name: Box<str>,
    /// Off unless a route says otherwise.
    disabled: bool,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Fault(Arc<Fault>),
    /// Has no settings of its own.
    Cors,
    LocalRateLimit(Arc<LocalRateLimit>),
    RateLimit(Arc<RateLimit>),
    Rbac(Arc<Rbac>),
    Jwt(Arc<JwtAuthn>),
    ExtAuthz(Arc<ExtAuthz>),
}

/// A filter that is to see a request, with the most specific settings for it.
#[derive(Debug)]
pub enum Active<'a> {
    /// Delays, aborts, slows down.
    Fault(&'a Arc<Fault>),
    /// Most specific policy first; never empty.
    Cors(&'a [Arc<CorsPolicy>]),
    /// Counts in this process.
    LocalRateLimit(&'a Arc<LocalRateLimit>, Option<&'a RouteFilters>),
    /// Asks a service; with what the route says of rate limits and of this filter.
    RateLimit(
        &'a Arc<RateLimit>,
        Option<&'a RouteFilters>,
        Option<&'a RateLimitPerRoute>,
    ),
    /// Judges. The first is the filter, which counts; the second has the rules.
    Rbac(&'a Arc<Rbac>, &'a Arc<Rbac>),
    /// Reads tokens.
    Jwt(&'a Arc<JwtAuthn>, Option<&'a JwtPerRoute>),
    /// Asks a service.
    ExtAuthz(&'a Arc<ExtAuthz>, Option<&'a ExtAuthzPerRoute>),
}

impl HttpFilters {
    /// Compiles the list of a connection manager, whose statistics are called `stats`.
    pub(crate) fn compile(list: &[hcm::HttpFilter], stats: &str) -> Result<Self> {
        let mut all = Self {
            stats: stats.into(),
            ..Self::default()
        };
        for (i, filter) in list.iter().enumerate() {
            let at = format!("http_filters[{i}] {}", filter.name);
            if let Some(kind) = Kind::compile(filter).within(at)? {
                all.filters.push(HttpFilter {
                    name: filter.name.as_str().into(),
                    disabled: filter.disabled,
                    kind,
                });
            }
        }
        all.unasked = all.filters.iter().any(|filter| {
            !filter.disabled
                && match &filter.kind {
                    Kind::Fault(fault) => fault.acts(),
                    Kind::LocalRateLimit(limit) => limit.acts(),
                    Kind::RateLimit(limit) => limit.asks_always(),
                    Kind::Rbac(rbac) => rbac.acts(),
                    Kind::Jwt(_) | Kind::ExtAuthz(_) => true,
                    Kind::Cors => false,
                }
        });
        Ok(all)
    }

    /// Providers whose keys are to be fetched before a request asks for them.
    pub fn fetched_ahead(&self) -> impl Iterator<Item = &Arc<Provider>> {
        let jwt = self.filters.iter().filter_map(|filter| match &filter.kind {
            Kind::Jwt(jwt) => Some(jwt),
            _ => None,
        });
        let providers = jwt.flat_map(|jwt| &jwt.providers);
        providers.filter(|p| matches!(&p.keys, KeySource::Remote(remote) if remote.ahead))
    }

    /// Could any filter act on a request of this route? (`None`: it has none, or the route says nothing about filters.)
    pub fn wanted(&self, route: Option<&RouteFilters>) -> bool {
        self.unasked || (route.is_some() && !self.filters.is_empty())
    }

    /// The filters that are to see a request of this route, in order.
    pub fn active<'a>(
        &'a self,
        route: Option<&'a RouteFilters>,
    ) -> impl Iterator<Item = Active<'a>> {
        let mut place = 0;
        std::iter::from_fn(move || self.next_active(&mut place, route))
    }

    /// The next filter from `place` on that is to see a request of this route; `place` moves behind it. (After each filter the route may
    /// be another one.)
    pub fn next_active<'a>(
        &'a self,
        place: &mut usize,
        route: Option<&'a RouteFilters>,
    ) -> Option<Active<'a>> {
        loop {
            let filter = self.filters.get(*place)?;
            *place += 1;
            if let Some(active) = filter.active(route) {
                return Some(active);
            }
        }
    }
}

impl HttpFilter {
    fn active<'a>(&'a self, route: Option<&'a RouteFilters>) -> Option<Active<'a>> {
        let setting = route.and_then(|route| route.setting(&self.name));
        match setting {
            Some(Setting::Off) => return None,
            None if self.disabled => return None,
            _ => {}
        }
        match (&self.kind, setting) {
            (Kind::Fault(_), Some(Setting::Fault(fault))) => Some(Active::Fault(fault)),
            (Kind::Fault(fault), _) => fault.acts().then_some(Active::Fault(fault)),
            (Kind::Cors, Some(Setting::Cors(policies))) => Some(Active::Cors(policies)),
            (Kind::Cors, _) => route
                .map(|route| route.old_cors.as_slice())
                .filter(|policies| !policies.is_empty())
                .map(Active::Cors),
            (Kind::LocalRateLimit(_), Some(Setting::LocalRateLimit(limit)))
            | (Kind::LocalRateLimit(limit), _) => {
                limit.acts().then_some(Active::LocalRateLimit(limit, route))
            }
            (Kind::RateLimit(limit), setting) => {
                let settings = match setting {
                    Some(Setting::RateLimit(settings)) => Some(&**settings),
                    _ => None,
                };
                Some(Active::RateLimit(limit, route, settings))
            }
            (Kind::Rbac(filter), Some(Setting::Rbac(rules))) => {
                rules.acts().then_some(Active::Rbac(filter, rules))
            }
            (Kind::Rbac(filter), _) => filter.acts().then_some(Active::Rbac(filter, filter)),
            (Kind::Jwt(filter), Some(Setting::Jwt(route))) => {
                Some(Active::Jwt(filter, Some(route)))
            }
            (Kind::Jwt(filter), _) => Some(Active::Jwt(filter, None)),
            (Kind::ExtAuthz(filter), Some(Setting::ExtAuthz(route))) => {
                (!route.off).then_some(Active::ExtAuthz(filter, Some(route)))
            }
            (Kind::ExtAuthz(filter), _) => Some(Active::ExtAuthz(filter, None)),
        }
    }
}

impl Kind {
    /// `None` for filters that are built in, and for optional ones of an unknown type, which Envoy leaves out, too.
    fn compile(m: &hcm::HttpFilter) -> Result<Option<Self>> {
        every_field!(m, hcm::HttpFilter, used { name, is_optional, disabled, config_type } irrelevant {} refused {});
        let any = match &m.config_type {
            Some(ConfigType::TypedConfig(any)) => any,
            // Envoy knows a filter by its type; only the router used to be named without one.
            None if m.name == "envoy.filters.http.router" => return Ok(None),
            Some(ConfigType::ConfigDiscovery(_)) => {
                return Err(CompileError::unsupported("config_discovery"));
            }
            None => return Err(CompileError::new("typed_config", "is missing")),
        };
        Ok(match type_name(any) {
            FAULT => Some(Self::Fault(Arc::new(Fault::compile(&decode(any)?)?))),
            CORS => Some(Self::Cors),
            LOCAL_RATE_LIMIT => Some(Self::LocalRateLimit(Arc::new(LocalRateLimit::compile(
                &decode(any)?,
                false,
            )?))),
            RATE_LIMIT => Some(Self::RateLimit(Arc::new(RateLimit::compile(&decode(
                any,
            )?)?))),
            RBAC => Some(Self::Rbac(Arc::new(Rbac::compile(&decode(any)?)?))),
            JWT => Some(Self::Jwt(Arc::new(JwtAuthn::compile(&decode(any)?)?))),
            EXT_AUTHZ => Some(Self::ExtAuthz(Arc::new(ExtAuthz::compile(&decode(any)?)?))),
            ROUTER => None,
            known if BUILT_IN.contains(&known) => None,
            _ if m.is_optional || m.disabled => None,
            other => return Err(CompileError::unsupported(other)),
        })
    }
}

fn type_name(any: &Any) -> &str {
    any.type_url.rsplit('/').next().unwrap_or("")
}

fn decode<M: Message + Default>(any: &Any) -> Result<M> {
    M::decode(any.value.as_slice())
        .map_err(|error| CompileError::new("typed_config", error.to_string()))
}

/// What a route says about filters, the virtual host's and the table's word included.
#[derive(Debug, Default)]
pub struct RouteFilters {
    settings: Vec<(Arc<str>, Setting)>,
    /// Policies of the fields that were there before filters had settings per route.
    old_cors: Vec<Arc<CorsPolicy>>,
    limits: Limits,
}

/// The word of a route about one filter.
#[derive(Debug, Clone)]
enum Setting {
    Off,
    /// The connection manager's settings; turns a disabled filter on.
    On,
    Fault(Arc<Fault>),
    Cors(Vec<Arc<CorsPolicy>>),
    LocalRateLimit(Arc<LocalRateLimit>),
    RateLimit(Arc<RateLimitPerRoute>),
    Rbac(Arc<Rbac>),
    Jwt(Arc<JwtPerRoute>),
    ExtAuthz(Arc<ExtAuthzPerRoute>),
}

impl RouteFilters {
    fn setting(&self, filter: &str) -> Option<&Setting> {
        let found = self.settings.iter().find(|(name, _)| **name == *filter);
        found.map(|(_, setting)| setting)
    }

    /// The rate limits of the route and its virtual host.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }
}

/// What outer levels (table, virtual host, route) say about filters, on the way to the inner ones.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scope {
    settings: Vec<(Arc<str>, Setting)>,
    old_cors: Vec<Arc<CorsPolicy>>,
    limits: Limits,
    mirrors: Arc<[Mirror]>,
}

impl Scope {
    /// This level's `typed_per_filter_config` over that of the outer ones.
    pub(crate) fn inner(&self, settings: &HashMap<String, Any>) -> Result<Self> {
        let mut scope = self.clone();
        // In a fixed order, so that a refused one is always the same.
        let mut names: Vec<&String> = settings.keys().collect();
        names.sort_unstable();
        for name in names {
            let at = format!("typed_per_filter_config[{name:?}]");
            if let Some(setting) = Setting::compile(&settings[name]).within(at)? {
                scope.add(name, setting);
            }
        }
        Ok(scope)
    }

    fn add(&mut self, name: &str, setting: Setting) {
        let Some((_, outer)) = self.settings.iter_mut().find(|(n, _)| **n == *name) else {
            self.settings.push((name.into(), setting));
            return;
        };
        *outer = match (setting, &*outer) {
            // Fields that the inner policy leaves open are taken from the outer one.
            (Setting::Cors(inner), Setting::Cors(outer)) => {
                Setting::Cors(inner.iter().chain(outer).cloned().collect())
            }
            // The context of all levels goes along.
            (Setting::ExtAuthz(inner), Setting::ExtAuthz(outer)) => {
                Setting::ExtAuthz(Arc::new(inner.within(outer)))
            }
            (inner, _) => inner,
        };
    }

    /// Adds the `cors` field of a virtual host or route.
    pub(crate) fn with_cors(mut self, policy: Option<&route::CorsPolicy>) -> Result<Self> {
        if let Some(policy) = policy {
            self.old_cors
                .insert(0, Arc::new(CorsPolicy::compile_old(policy).within("cors")?));
        }
        Ok(self)
    }

    /// Sets the rate limits of the virtual host.
    pub(crate) fn with_host_limits(mut self, limits: &[route::RateLimit]) -> Result<Self> {
        self.limits.host = RateLimits::compile(limits).within("rate_limits")?;
        Ok(self)
    }

    /// Sets what takes the place of the outer level's, where there is any.
    pub(crate) fn with_mirrors(
        mut self,
        list: &[route::route_action::RequestMirrorPolicy],
    ) -> Result<Self> {
        if !list.is_empty() {
            self.mirrors = Mirror::compile_all(list)?.into();
        }
        Ok(self)
    }

    /// Adds what a route says in its action.
    pub(crate) fn with_action(self, m: &route::RouteAction) -> Result<Self> {
        let mut scope = self
            .with_cors(m.cors.as_ref())?
            .with_mirrors(&m.request_mirror_policies)?;
        scope.limits.route = RateLimits::compile(&m.rate_limits).within("rate_limits")?;
        scope.limits.include_host = flag(m.include_vh_rate_limits.as_ref(), false);
        Ok(scope)
    }

    /// Copies that the route asks for, or the virtual host or the table in its place.
    pub(crate) fn mirrors(&self) -> Arc<[Mirror]> {
        self.mirrors.clone()
    }

    /// For the route; `None` where there is nothing to say.
    pub(crate) fn finish(self) -> Option<Box<RouteFilters>> {
        let silent = self.settings.is_empty()
            && self.old_cors.is_empty()
            && self.limits.route.is_empty()
            && self.limits.host.is_empty();
        (!silent).then(|| {
            Box::new(RouteFilters {
                settings: self.settings,
                old_cors: self.old_cors,
                limits: self.limits,
            })
        })
    }
}

impl Setting {
    /// `None` for optional settings of an unknown type.
    fn compile(any: &Any) -> Result<Option<Self>> {
        if type_name(any) != FILTER_CONFIG {
            return Self::compile_typed(any).map(Some);
        }
        let m: route::FilterConfig = decode(any)?;
        if m.disabled {
            return Ok(Some(Self::Off));
        }
        let Some(config) = &m.config else {
            return Err(CompileError::new("config", "is missing"));
        };
        match Self::compile_typed(config).within("config") {
            Err(_) if m.is_optional && !Self::knows(config) => Ok(None),
            other => other.map(Some),
        }
    }

    fn knows(any: &Any) -> bool {
        [
            FAULT,
            CORS,
            CORS_POLICY,
            LOCAL_RATE_LIMIT,
            RATE_LIMIT_PER_ROUTE,
            RBAC_PER_ROUTE,
            JWT_PER_ROUTE,
            EXT_AUTHZ_PER_ROUTE,
        ]
        .contains(&type_name(any))
    }

    fn compile_typed(any: &Any) -> Result<Self> {
        Ok(match type_name(any) {
            FAULT => Self::Fault(Arc::new(Fault::compile(&decode(any)?)?)),
            CORS_POLICY => {
                let policy: http_filters::cors::v3::CorsPolicy = decode(any)?;
                Self::Cors(vec![Arc::new(CorsPolicy::compile(&policy)?)])
            }
            CORS => Self::On,
            LOCAL_RATE_LIMIT => {
                Self::LocalRateLimit(Arc::new(LocalRateLimit::compile(&decode(any)?, true)?))
            }
            RATE_LIMIT_PER_ROUTE => {
                Self::RateLimit(Arc::new(RateLimitPerRoute::compile(&decode(any)?)?))
            }
            RBAC_PER_ROUTE => Self::Rbac(Arc::new(Rbac::compile_route(&decode(any)?)?)),
            JWT_PER_ROUTE => Self::Jwt(Arc::new(JwtPerRoute::compile(&decode(any)?)?)),
            EXT_AUTHZ_PER_ROUTE => {
                Self::ExtAuthz(Arc::new(ExtAuthzPerRoute::compile(&decode(any)?)?))
            }
            known if BUILT_IN.contains(&known) => Self::On,
            "" => return Err(CompileError::new("type_url", "is missing")),
            other => return Err(CompileError::unsupported(other)),
        })
    }
}

/// A share of requests: so many of a hundred, ten thousand or a million.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Percent {
    numerator: u32,
    of: u32,
}

impl Percent {
    pub(crate) const NONE: Self = Self {
        numerator: 0,
        of: 100,
    };
    pub(crate) const ALL: Self = Self {
        numerator: 100,
        of: 100,
    };

    pub(crate) fn compile(m: &FractionalPercent) -> Result<Self> {
        let of = match DenominatorType::try_from(m.denominator) {
            Ok(DenominatorType::Hundred) => 100,
            Ok(DenominatorType::TenThousand) => 10_000,
            Ok(DenominatorType::Million) => 1_000_000,
            Err(_) => return Err(CompileError::new("denominator", "is unknown")),
        };
        Ok(Self {
            numerator: m.numerator,
            of,
        })
    }

    /// `absent` where the field is not set. Runtime keys name overrides from files that do not exist here.
    pub(crate) fn of_runtime(m: Option<&RuntimeFractionalPercent>, absent: Self) -> Result<Self> {
        match m {
            None => Ok(absent),
            Some(m) => match &m.default_value {
                Some(value) => Self::compile(value).within("default_value"),
                None => Err(CompileError::new("default_value", "is missing")),
            },
        }
    }

    /// The same with a smaller numerator, if that is what a request asks for (Envoy's percentage headers).
    pub(crate) fn at_most(self, numerator: Option<u32>) -> Self {
        Self {
            numerator: numerator.map_or(self.numerator, |n| n.min(self.numerator)),
            ..self
        }
    }

    /// Can it ever cover a request?
    pub fn is_zero(self) -> bool {
        self.numerator == 0
    }

    /// Is a request with this random number in the share?
    pub fn covers(self, random: u64) -> bool {
        random % u64::from(self.of) < u64::from(self.numerator)
    }
}
