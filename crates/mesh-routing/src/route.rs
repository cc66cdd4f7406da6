//! Route tables: virtual host by domain, route by its conditions.

use std::collections::HashMap;
use std::sync::Arc;

use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::envoy::config::route::v3::route::Action as PbAction;
use envoy_types::pb::envoy::config::route::v3::virtual_host::TlsRequirementType;
use envoy_types::pb::google::protobuf::{UInt32Value, UInt64Value};
use http::HeaderMap;

use crate::action::{Action, Direct, Forward, PathMatch, Redirect};
use crate::dynamic::{Dynamic, MetadataMatch};
use crate::error::{CompileError, Result, Within, every_field, flag};
use crate::filter::{RouteFilters, Scope};
use crate::headers::HeaderOps;
use crate::matcher::{Fraction, HeaderMatch, QueryMatch, equal};
use crate::retry::RetryPolicy;
use crate::rewrite::{split_port, split_query};
use crate::template::Template;

type Map<K, V> = HashMap<K, V, foldhash::fast::RandomState>;

/// What a decision needs to know of a request.
#[derive(Debug, Clone, Copy)]
pub struct RequestView<'a> {
    /// `Host` or `:authority`, as received.
    pub host: &'a str,
    /// The method.
    pub method: &'a str,
    /// Path with query, as it will be sent.
    pub path_and_query: &'a str,
    /// `http` or `https`.
    pub scheme: &'a str,
    /// The header fields.
    pub headers: &'a HeaderMap,
    /// A uniformly distributed number; it decides splits and fractions.
    pub random: u64,
}

/// A compiled `RouteConfiguration`.
#[derive(Debug)]
pub struct RouteTable {
    /// Its name.
    pub name: Arc<str>,
    hosts: Vec<VirtualHost>,
    exact: Map<Box<str>, u32>,
    /// `*.example.com` as `.example.com`, longest first.
    suffixes: Vec<(usize, Map<Box<str>, u32>)>,
    /// `example.*` as `example.`, longest first.
    prefixes: Vec<(usize, Map<Box<str>, u32>)>,
    any: Option<u32>,
    ignore_port: bool,
}

/// Fewer routes with a whole path than this are looked at one by one.
const INDEXED_FROM: usize = 8;

/// Routes with a whole path by that path, so that a virtual host with thousands of them is not gone through.
#[derive(Debug)]
struct PathIndex {
    /// Places of the routes of each path, in order.
    exact: Map<Box<str>, Vec<u32>>,
    /// Places of all other routes, in order.
    others: Vec<u32>,
}

impl PathIndex {
    fn of(routes: &[Route]) -> Option<Self> {
        let whole = |route: &Route| match &route.path {
            PathMatch::Exact(path) if !route.ignore_case => Some(path.clone()),
            _ => None,
        };
        if routes.iter().filter_map(whole).count() < INDEXED_FROM {
            return None;
        }
        let mut index = Self {
            exact: Map::default(),
            others: Vec::new(),
        };
        for (place, route) in (0_u32..).zip(routes) {
            match whole(route) {
                Some(path) => index.exact.entry(path).or_default().push(place),
                None => index.others.push(place),
            }
        }
        Some(index)
    }

    /// The places of the routes that could take a path, in order.
    fn candidates(&self, path: &str) -> impl Iterator<Item = u32> {
        let exact = self.exact.get(path).map_or(&[][..], Vec::as_slice);
        let (mut exact, mut others) = (exact.iter().peekable(), self.others.iter().peekable());
        std::iter::from_fn(move || {
            let exact_first = match (exact.peek(), others.peek()) {
                (Some(a), Some(b)) => a < b,
                (next, _) => next.is_some(),
            };
            if exact_first {
                exact.next()
            } else {
                others.next()
            }
            .copied()
        })
    }
}

/// A virtual host.
#[derive(Debug)]
pub struct VirtualHost {
    /// Its name.
    pub name: Arc<str>,
    routes: Vec<Route>,
    index: Option<PathIndex>,
    tls_only: Option<TlsRequirementType>,
    /// Send `x-envoy-attempt-count` upstream.
    pub request_attempt_count: bool,
    /// Send it downstream.
    pub response_attempt_count: bool,
    /// Tell the endpoint when a try follows one that timed out (`x-envoy-is-timeout-retry`).
    pub tell_timeouts: bool,
}

/// A route.
#[derive(Debug)]
pub struct Route {
    /// Its name.
    pub name: Arc<str>,
    path: PathMatch,
    ignore_case: bool,
    headers: Vec<HeaderMatch>,
    query: Vec<QueryMatch>,
    fraction: Option<Fraction>,
    grpc_only: bool,
    metadata: Vec<MetadataMatch>,
    /// What it says about filters, if anything.
    pub filters: Option<Box<RouteFilters>>,
    /// What it does.
    pub action: Action,
    /// Mutations of the request by route, virtual host and table, in Envoy's order.
    pub request_ops: HeaderOps,
    /// Mutations of the response.
    pub response_ops: HeaderOps,
}

/// A request that found its route.
#[derive(Debug, Clone, Copy)]
pub struct Matched<'a> {
    /// The virtual host.
    pub host: &'a VirtualHost,
    /// The route.
    pub route: &'a Route,
    /// Length of the part of the path that the route matched (prefix rewrites replace it).
    pub matched_len: usize,
}

/// What to do with a request.
#[derive(Debug, Clone, Copy)]
pub enum Decision<'a> {
    /// A route matched.
    Matched(Matched<'a>),
    /// The virtual host wants TLS: redirect to https.
    TlsRequired,
    /// No virtual host or no route: 404, flag NR.
    NoRoute,
}

impl RouteTable {
    /// Compiles the message.
    pub fn compile(m: &pb::RouteConfiguration) -> Result<Self> {
        every_field!(m, pb::RouteConfiguration,
        used {
            name, virtual_hosts, response_headers_to_add, response_headers_to_remove, request_headers_to_add,
            request_headers_to_remove, most_specific_header_mutations_wins, ignore_port_in_host_matching, typed_per_filter_config,
            request_mirror_policies,
        }
        // internal_only_headers: only where remote addresses are judged, and then they are cut by the connection manager.
        // validate_clusters: an unknown cluster is answered at request time, so tables and clusters may arrive in any order.
        // max_direct_response_body_size_bytes: bodies are in memory already. metadata: for people.
        irrelevant { internal_only_headers, validate_clusters, max_direct_response_body_size_bytes, metadata }
        refused {
            vhds, cluster_specifier_plugins, vhost_header, ignore_path_parameters_in_path_matching, route_specifiers,
        });
        let table_ops = Ops {
            request: HeaderOps::compile(&m.request_headers_to_add, &m.request_headers_to_remove)
                .within("request")?,
            response: HeaderOps::compile(&m.response_headers_to_add, &m.response_headers_to_remove)
                .within("response")?,
            outermost_first: m.most_specific_header_mutations_wins,
        };
        let scope = Scope::default()
            .inner(&m.typed_per_filter_config)?
            .with_mirrors(&m.request_mirror_policies)?;
        let mut table = Self {
            name: m.name.as_str().into(),
            hosts: Vec::with_capacity(m.virtual_hosts.len()),
            exact: Map::default(),
            suffixes: Vec::new(),
            prefixes: Vec::new(),
            any: None,
            ignore_port: m.ignore_port_in_host_matching,
        };
        for (i, host) in m.virtual_hosts.iter().enumerate() {
            let at = format!("virtual_hosts[{i}] {:?}", host.name);
            table
                .hosts
                .push(VirtualHost::compile(host, &table_ops, &scope).within(&at)?);
            for domain in &host.domains {
                table.add_domain(domain, i as u32).within(&at)?;
            }
        }
        table
            .suffixes
            .sort_by_key(|(len, _)| std::cmp::Reverse(*len));
        table
            .prefixes
            .sort_by_key(|(len, _)| std::cmp::Reverse(*len));
        Ok(table)
    }

    fn add_domain(&mut self, domain: &str, host: u32) -> Result<()> {
        let domain = domain.to_ascii_lowercase();
        let taken = match (
            domain.as_str(),
            domain.strip_prefix('*'),
            domain.strip_suffix('*'),
        ) {
            ("", ..) => {
                return Err(CompileError::new(
                    "domains",
                    "an empty domain matches nothing",
                ));
            }
            ("*", ..) => self.any.replace(host),
            (_, Some(suffix), _) => {
                of_length(&mut self.suffixes, suffix.len()).insert(suffix.into(), host)
            }
            (_, _, Some(prefix)) => {
                of_length(&mut self.prefixes, prefix.len()).insert(prefix.into(), host)
            }
            (exact, ..) => self.exact.insert(exact.into(), host),
        };
        match taken {
            Some(other) if other != host => Err(CompileError::new(
                "domains",
                format!("{domain:?} is also a domain of another virtual host"),
            )),
            _ => Ok(()),
        }
    }

    /// Decides what to do with a request of which filters have found out nothing.
    pub fn decide<'a>(&'a self, request: &RequestView<'_>) -> Decision<'a> {
        self.decide_with(request, None)
    }

    /// Decides what to do with a request. `known`: what filters have found out about it.
    pub fn decide_with<'a>(
        &'a self,
        request: &RequestView<'_>,
        known: Option<&Dynamic>,
    ) -> Decision<'a> {
        let Some(host) = self.virtual_host(request.host) else {
            return Decision::NoRoute;
        };
        if host.wants_redirect(request.scheme) {
            return Decision::TlsRequired;
        }
        let (path, query) = split_query(request.path_and_query);
        let query = query.strip_prefix('?').unwrap_or("");
        match host.find(request, known, path, query) {
            Some((route, matched_len)) => Decision::Matched(Matched {
                host,
                route,
                matched_len,
            }),
            None => Decision::NoRoute,
        }
    }

    /// The virtual host of an authority: exact, then the longest `*suffix`, then the longest `prefix*`, then `*`. Case does not count;
    /// the port does not either where the table says so.
    pub fn virtual_host(&self, authority: &str) -> Option<&VirtualHost> {
        let host = if self.ignore_port {
            split_port(authority).0
        } else {
            authority
        };
        let mut buffer = [0_u8; 256];
        let lower: &str = match buffer.get_mut(..host.len()) {
            Some(copy) => {
                copy.copy_from_slice(host.as_bytes());
                copy.make_ascii_lowercase();
                std::str::from_utf8(copy).unwrap_or(host)
            }
            // Longer than any DNS name: only the catch-all can take it.
            None => "",
        };
        let index = self.exact.get(lower).copied();
        let index =
            index.or_else(|| find_wildcard(&self.suffixes, lower, |h, n| h.get(h.len() - n..)));
        let index = index.or_else(|| find_wildcard(&self.prefixes, lower, |h, n| h.get(..n)));
        index.or(self.any).and_then(|i| self.hosts.get(i as usize))
    }

    /// All virtual hosts.
    pub fn virtual_hosts(&self) -> &[VirtualHost] {
        &self.hosts
    }
}

fn of_length(maps: &mut Vec<(usize, Map<Box<str>, u32>)>, len: usize) -> &mut Map<Box<str>, u32> {
    let at = match maps.iter().position(|(l, _)| *l == len) {
        Some(at) => at,
        None => {
            maps.push((len, Map::default()));
            maps.len() - 1
        }
    };
    &mut maps[at].1
}

/// Only hosts longer than the fixed part match a wildcard.
fn find_wildcard(
    maps: &[(usize, Map<Box<str>, u32>)],
    host: &str,
    part: impl Fn(&str, usize) -> Option<&str>,
) -> Option<u32> {
    maps.iter()
        .filter(|(len, _)| *len < host.len())
        .find_map(|(len, map)| map.get(part(host, *len)?).copied())
}

struct Ops {
    request: HeaderOps,
    response: HeaderOps,
    outermost_first: bool,
}

impl Ops {
    /// Joins the mutations of an inner level with these.
    fn around(&self, request: HeaderOps, response: HeaderOps) -> Ops {
        let join = |inner: HeaderOps, outer: &HeaderOps| match self.outermost_first {
            true => outer.clone().then(&inner),
            false => inner.then(outer),
        };
        Ops {
            request: join(request, &self.request),
            response: join(response, &self.response),
            outermost_first: self.outermost_first,
        }
    }
}

/// What routes take from their virtual host where they say nothing themselves.
struct Inherited {
    scope: Scope,
    retry: Option<RetryPolicy>,
    buffer_limit: Option<usize>,
}

impl Inherited {
    fn pass_to(&self, forward: &mut Forward, own_limit: Option<usize>) {
        if forward.retry.is_none() {
            forward.retry.clone_from(&self.retry);
        }
        if let Some(limit) = own_limit.or(self.buffer_limit) {
            forward.buffer_limit = limit;
        }
    }
}

/// The newer field beats the older one.
fn buffer_limit(older: Option<UInt32Value>, newer: Option<UInt64Value>) -> Option<usize> {
    let newer = newer.map(|limit| usize::try_from(limit.value).unwrap_or(usize::MAX));
    newer.or(older.map(|limit| limit.value as usize))
}

impl VirtualHost {
    fn compile(m: &pb::VirtualHost, table: &Ops, outer: &Scope) -> Result<Self> {
        every_field!(m, pb::VirtualHost,
        used {
            name, domains, routes, require_tls, request_headers_to_add, request_headers_to_remove, response_headers_to_add,
            response_headers_to_remove, include_request_attempt_count, include_attempt_count_in_response,
            include_is_timeout_retry_header, retry_policy, per_request_buffer_limit_bytes, request_body_buffer_limit, rate_limits,
            cors, typed_per_filter_config, request_mirror_policies,
        }
        // virtual_clusters: statistics that are not kept. metadata: for people.
        irrelevant { virtual_clusters, metadata }
        refused {
            matcher, retry_policy_typed_config, hedge_policy, route_specifiers,
        });
        let ops = table.around(
            HeaderOps::compile(&m.request_headers_to_add, &m.request_headers_to_remove)
                .within("request")?,
            HeaderOps::compile(&m.response_headers_to_add, &m.response_headers_to_remove)
                .within("response")?,
        );
        let inherited = Inherited {
            scope: outer
                .inner(&m.typed_per_filter_config)?
                .with_cors(m.cors.as_ref())?
                .with_host_limits(&m.rate_limits)?
                .with_mirrors(&m.request_mirror_policies)?,
            retry: m
                .retry_policy
                .as_ref()
                .map(RetryPolicy::compile)
                .transpose()
                .within("retry_policy")?,
            buffer_limit: buffer_limit(
                m.per_request_buffer_limit_bytes,
                m.request_body_buffer_limit,
            ),
        };
        let mut routes = Vec::with_capacity(m.routes.len());
        for (i, route) in m.routes.iter().enumerate() {
            routes.push(
                Route::compile(route, &ops, &inherited)
                    .within(format_args!("routes[{i}] {:?}", route.name))?,
            );
        }
        Ok(Self {
            name: m.name.as_str().into(),
            index: PathIndex::of(&routes),
            routes,
            tls_only: match TlsRequirementType::try_from(m.require_tls) {
                Ok(TlsRequirementType::None) => None,
                Ok(other) => Some(other),
                Err(_) => return Err(CompileError::new("require_tls", "is unknown")),
            },
            request_attempt_count: m.include_request_attempt_count,
            response_attempt_count: m.include_attempt_count_in_response,
            tell_timeouts: m.include_is_timeout_retry_header,
        })
    }

    /// EXTERNAL_ONLY is treated as ALL: who is external cannot be told without trusted addresses.
    fn wants_redirect(&self, scheme: &str) -> bool {
        self.tls_only.is_some() && scheme != "https"
    }

    /// The first route that takes a request, with the length of the part of the path that it matched.
    fn find(
        &self,
        request: &RequestView<'_>,
        known: Option<&Dynamic>,
        path: &str,
        query: &str,
    ) -> Option<(&Route, usize)> {
        let judge = |route: &'_ Route| route.matches(request, known, path, query);
        match &self.index {
            None => self.routes.iter().find_map(|r| Some((r, judge(r)?))),
            Some(index) => index.candidates(path).find_map(|place| {
                let route = self.routes.get(place as usize)?;
                Some((route, judge(route)?))
            }),
        }
    }

    /// Its routes in order.
    pub fn routes(&self) -> &[Route] {
        &self.routes
    }
}

impl Route {
    fn compile(m: &pb::Route, host: &Ops, inherited: &Inherited) -> Result<Self> {
        every_field!(m, pb::Route,
            used {
                name, r#match, action, request_headers_to_add, request_headers_to_remove, response_headers_to_add,
                response_headers_to_remove, per_request_buffer_limit_bytes, request_body_buffer_limit,
                typed_per_filter_config,
            }
            // decorator and tracing name spans: tracing is refused in the connection manager.
            irrelevant { metadata, decorator, tracing, stat_prefix }
            refused { route_specifiers });
        let conditions = m
            .r#match
            .as_ref()
            .ok_or_else(|| CompileError::new("match", "is missing"))?;
        let ops = host.around(
            HeaderOps::compile(&m.request_headers_to_add, &m.request_headers_to_remove)
                .within("request")?,
            HeaderOps::compile(&m.response_headers_to_add, &m.response_headers_to_remove)
                .within("response")?,
        );
        let mut route = Self::compile_match(conditions).within("match")?;
        route.name = m.name.as_str().into();
        let template = match &route.path {
            PathMatch::Template(template) => Some(template),
            _ => None,
        };
        let mut scope = inherited.scope.inner(&m.typed_per_filter_config)?;
        if let Some(PbAction::Route(action)) = &m.action {
            scope = scope.with_action(action).within("route")?;
        }
        route.action = compile_action(m.action.as_ref(), template, &scope)?;
        route.filters = scope.finish();
        if let Action::Forward(forward) = &mut route.action {
            if forward.entries_have_filters() {
                // Requests of this route must come to the filters, whatever the entry.
                route.filters.get_or_insert_default();
            }
            let own = buffer_limit(
                m.per_request_buffer_limit_bytes,
                m.request_body_buffer_limit,
            );
            inherited.pass_to(forward, own);
        }
        route.request_ops = ops.request;
        route.response_ops = ops.response;
        Ok(route)
    }

    fn compile_match(m: &pb::RouteMatch) -> Result<Self> {
        every_field!(m, pb::RouteMatch,
            used { case_sensitive, runtime_fraction, headers, query_parameters, grpc, path_specifier, dynamic_metadata }
            irrelevant {}
            refused { cookies, tls_context, filter_state });
        let ignore_case = !flag(m.case_sensitive.as_ref(), true);
        let mut headers = Vec::with_capacity(m.headers.len());
        for (i, header) in m.headers.iter().enumerate() {
            headers.push(HeaderMatch::compile(header).within(format_args!("headers[{i}]"))?);
        }
        let mut query = Vec::with_capacity(m.query_parameters.len());
        for (i, parameter) in m.query_parameters.iter().enumerate() {
            query.push(
                QueryMatch::compile(parameter).within(format_args!("query_parameters[{i}]"))?,
            );
        }
        Ok(Self {
            name: "".into(),
            // Envoy's case_sensitive does not touch safe_regex.
            path: PathMatch::compile(m, false)?,
            ignore_case,
            headers,
            query,
            fraction: m
                .runtime_fraction
                .as_ref()
                .map(Fraction::compile)
                .transpose()
                .within("runtime_fraction")?,
            grpc_only: m.grpc.is_some(),
            metadata: m
                .dynamic_metadata
                .iter()
                .map(MetadataMatch::compile)
                .collect::<Result<_>>()
                .within("dynamic_metadata")?,
            filters: None,
            action: Action::Direct(Direct {
                status: http::StatusCode::NOT_FOUND,
                body: bytes::Bytes::new(),
            }),
            request_ops: HeaderOps::default(),
            response_ops: HeaderOps::default(),
        })
    }

    /// Does anything that makes its answers look at the request?
    pub fn answers_read_request(&self) -> bool {
        self.response_ops.reads_request()
    }

    /// The length of the matched part of the path, if all conditions hold.
    fn matches(
        &self,
        request: &RequestView<'_>,
        known: Option<&Dynamic>,
        path: &str,
        query: &str,
    ) -> Option<usize> {
        let len = match (request.method == "CONNECT", &self.path) {
            (true, PathMatch::Connect) => 0,
            // A CONNECT request has no path.
            (true, _) => return None,
            (false, _) => self.matches_path(path)?,
        };
        let all = self.headers.iter().all(|header| header.matches(request))
            && self.query.iter().all(|parameter| parameter.matches(query))
            && self
                .fraction
                .is_none_or(|fraction| fraction.covers(request.random))
            && (!self.grpc_only || is_grpc(request.headers))
            && self.metadata.iter().all(|m| m.matches(known));
        all.then_some(len)
    }

    fn matches_path(&self, path: &str) -> Option<usize> {
        let (p, ic) = (path.as_bytes(), self.ignore_case);
        let begins = |prefix: &str| {
            p.len() >= prefix.len() && equal(&p[..prefix.len()], prefix.as_bytes(), ic)
        };
        match &self.path {
            PathMatch::Prefix(prefix) => begins(prefix).then_some(prefix.len()),
            PathMatch::Exact(exact) => equal(p, exact.as_bytes(), ic).then_some(p.len()),
            PathMatch::Segments(prefix) => (begins(prefix)
                && matches!(p.get(prefix.len()), None | Some(b'/')))
            .then_some(prefix.len()),
            PathMatch::Regex(regex) => regex.is_match(path).then_some(p.len()),
            PathMatch::Template(template) => template.matches(path).then_some(p.len()),
            PathMatch::Connect => None,
        }
    }
}

/// A `RouteMatch` by itself, for filters with rules of their own.
#[derive(Debug)]
pub(crate) struct Condition(Box<Route>);

impl Condition {
    pub(crate) fn compile(m: &pb::RouteMatch) -> Result<Self> {
        Route::compile_match(m).map(|route| Self(Box::new(route)))
    }

    /// Does the request match?
    pub(crate) fn holds(&self, request: &RequestView<'_>) -> bool {
        let (path, query) = split_query(request.path_and_query);
        let query = query.strip_prefix('?').unwrap_or("");
        self.0.matches(request, None, path, query).is_some()
    }
}

fn is_grpc(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(http::header::CONTENT_TYPE) else {
        return false;
    };
    let value = value.as_bytes();
    value.starts_with(b"application/grpc") && matches!(value.get(16), None | Some(b'+'))
}

fn compile_action(
    action: Option<&PbAction>,
    template: Option<&Template>,
    scope: &Scope,
) -> Result<Action> {
    match action {
        Some(PbAction::Route(m)) => Forward::compile(m, template, scope)
            .within("route")
            .map(|f| Action::Forward(Box::new(f))),
        Some(PbAction::Redirect(m)) => Redirect::compile(m)
            .within("redirect")
            .map(|r| Action::Redirect(Box::new(r))),
        Some(PbAction::DirectResponse(m)) => Direct::compile(m)
            .within("direct_response")
            .map(Action::Direct),
        Some(PbAction::FilterAction(_)) => Err(CompileError::unsupported("filter_action")),
        Some(PbAction::NonForwardingAction(_)) => {
            Err(CompileError::unsupported("non_forwarding_action"))
        }
        None => Err(CompileError::new("action", "is missing")),
    }
}
