//! JSON Web Tokens at work: tokens are found, verified, remembered, and what is in them goes where the provider says.
//!
//! A token that was verified before costs a look-up. Requirements are evaluated without waiting; where keys have to be fetched first, that
//! happens outside and the evaluation begins anew, with nothing done to the request in between.

mod cache;
mod effects;
pub mod keys;
mod tokens;

use std::rc::Rc;
use std::sync::Arc;
use std::time::SystemTime;

use http::header::{ORIGIN, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, request};
use mesh_identity::jwt::{Jwt, JwtError};
use mesh_routing::filter::jwt_authn::{JwtAuthn, JwtPerRoute, Provider, Requirement};

use super::stats::{Counter, Stats, inc};
use super::{LocalReply, Notes, Request};
use crate::http::view;
use cache::Verified;
use effects::Effects;
use keys::{Keys, Lookup};
use tokens::Token;
pub(super) use tokens::{decoded, without_parameter};

const REQUEST_METHOD: HeaderName = HeaderName::from_static("access-control-request-method");
/// Bytes of the request's address in an answer (Envoy: `MaxUriLength`).
const LONGEST_REALM: usize = 256;
/// Keys of so many providers are fetched for one request; more cannot be missing honestly.
const MOST_FETCHES: usize = 16;

/// What one filter counts.
#[derive(Debug)]
pub struct JwtStats {
    allowed: Counter,
    denied: Counter,
    preflights: Counter,
    hits: Counter,
    misses: Counter,
}

impl JwtStats {
    fn new(stats: &Stats, manager: &str, filter: &str) -> Self {
        let of = |name: &str| match filter {
            "" => stats.counter(format!("http.{manager}.jwt_authn.{name}")),
            filter => stats.counter(format!("http.{manager}.jwt_authn.{filter}.{name}")),
        };
        Self {
            allowed: of("allowed"),
            denied: of("denied"),
            preflights: of("cors_preflight_bypassed"),
            hits: of("jwt_cache_hit"),
            misses: of("jwt_cache_miss"),
        }
    }
}

/// Why a requirement is not met, so far.
enum Unmet {
    /// For good.
    Failed(JwtError),
    /// The keys of this provider have to be fetched first.
    Keys(Arc<Provider>),
}

impl From<JwtError> for Unmet {
    fn from(error: JwtError) -> Self {
        Self::Failed(error)
    }
}

impl<'a> Request<'a> {
    /// Reads the request's tokens. The second part of the answer: the route is to be looked for again.
    pub(super) async fn jwt(
        &self,
        filter: &'a Arc<JwtAuthn>,
        route: Option<&JwtPerRoute>,
        parts: &mut request::Parts,
        notes: &mut Notes,
    ) -> (Option<LocalReply<'a>>, bool) {
        let counters = &self.exchange.connection.worker.shared.counters;
        let stats = counters.jwt(filter, || {
            JwtStats::new(&counters.stats, &self.manager.filters.stats, &filter.stats)
        });
        if filter.bypass_preflight && is_preflight(parts) {
            inc(&stats.preflights);
            inc(&stats.allowed);
            return (None, false);
        }
        let requirement = match filter.requirement(route, &view(self.exchange, parts)) {
            Ok(requirement) => requirement,
            Err(error) => {
                inc(&stats.denied);
                let mut reply = LocalReply::new(StatusCode::FORBIDDEN, None);
                reply.body = format!("Failed JWT authentication: {error}").into();
                return (Some(reply), false);
            }
        };
        let Some(requirement) = requirement else {
            inc(&stats.allowed);
            return (None, false);
        };
        let (met, effects) = self.evaluate(filter, requirement, &stats, parts).await;
        match met {
            Ok(()) => {
                inc(&stats.allowed);
                (None, effects.apply(filter, parts, notes))
            }
            Err(error) => {
                inc(&stats.denied);
                tracing::debug!(remote = %self.exchange.connection.remote, %error, "token refused");
                (Some(refuse(filter, error, &self.realm(parts))), false)
            }
        }
    }

    async fn evaluate(
        &self,
        filter: &JwtAuthn,
        requirement: &Requirement,
        stats: &JwtStats,
        parts: &request::Parts,
    ) -> (Result<(), JwtError>, Effects) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let shared = &self.exchange.connection.worker.shared;
        for _ in 0..MOST_FETCHES {
            let mut evaluation = Evaluation {
                filter,
                stats,
                keys: &shared.counters.keys,
                parts,
                now: now.as_ref().map_or(0, |since| since.as_secs()),
                effects: Effects::default(),
            };
            match evaluation.meet(requirement) {
                Ok(()) => return (Ok(()), evaluation.effects),
                Err(Unmet::Failed(error)) => return (Err(error), evaluation.effects),
                Err(Unmet::Keys(provider)) => {
                    let worker = &self.exchange.connection.worker;
                    Box::pin(keys::fetch(worker, self.snapshot, &provider)).await;
                }
            }
        }
        (Err(JwtError::FetchFail), Effects::default())
    }

    /// The address that the client asked for, for `www-authenticate`.
    fn realm(&self, parts: &request::Parts) -> String {
        let view = view(self.exchange, parts);
        let mut end = view.path_and_query.len().min(LONGEST_REALM);
        while !view.path_and_query.is_char_boundary(end) {
            end -= 1;
        }
        let path = view.path_and_query.get(..end).unwrap_or("");
        format!("{}://{}{path}", view.scheme, view.host)
    }
}

/// A preflight carries no credentials (Fetch standard, "CORS-preflight request").
fn is_preflight(parts: &request::Parts) -> bool {
    let has = |name: &HeaderName| parts.headers.get(name).is_some_and(|v| !v.is_empty());
    parts.method == Method::OPTIONS && has(&ORIGIN) && has(&REQUEST_METHOD)
}

fn refuse<'a>(filter: &JwtAuthn, error: JwtError, realm: &str) -> LocalReply<'a> {
    let status = match error {
        JwtError::AudienceNotAllowed => StatusCode::FORBIDDEN,
        _ => StatusCode::UNAUTHORIZED,
    };
    let mut reply = LocalReply::new(status, None);
    if filter.silent {
        return reply;
    }
    reply.body = error.to_string().into();
    // RFC 6750 section 3.
    let challenge = match error {
        JwtError::Missing => format!("Bearer realm=\"{realm}\""),
        _ => format!("Bearer realm=\"{realm}\", error=\"invalid_token\""),
    };
    if let Ok(challenge) = HeaderValue::try_from(challenge) {
        reply.headers.insert(WWW_AUTHENTICATE, challenge);
    }
    reply
}

/// One evaluation of a requirement for one request.
struct Evaluation<'e> {
    filter: &'e JwtAuthn,
    stats: &'e JwtStats,
    keys: &'e keys::Store,
    parts: &'e request::Parts,
    now: u64,
    effects: Effects,
}

impl<'e> Evaluation<'e> {
    fn meet(&mut self, requirement: &Requirement) -> Result<(), Unmet> {
        match requirement {
            Requirement::Nothing => Ok(()),
            Requirement::Provider(provider, audiences) => {
                let audiences = audiences.as_deref().unwrap_or(&provider.audiences);
                self.one_of(provider, audiences)
            }
            Requirement::All(all) => all.iter().try_for_each(|one| self.meet(one)),
            Requirement::Any {
                of,
                or_missing,
                or_failed,
            } => match self.any(of) {
                Err(Unmet::Failed(_)) if *or_failed => Ok(()),
                Err(Unmet::Failed(JwtError::Missing)) if *or_missing => Ok(()),
                other => other,
            },
            Requirement::AllowMissing => self.every(false),
            Requirement::AllowFailed => self.every(true),
        }
    }

    /// The first that is met counts. Of several reasons against it, the one that says most (Envoy: `AnyVerifierImpl::onComplete`).
    fn any(&mut self, of: &[Requirement]) -> Result<(), Unmet> {
        let mut reason = JwtError::Missing;
        for one in of {
            match self.meet(one) {
                Ok(()) => return Ok(()),
                Err(Unmet::Keys(provider)) => return Err(Unmet::Keys(provider)),
                Err(Unmet::Failed(error)) => {
                    let vague = matches!(error, JwtError::Missing | JwtError::UnknownIssuer);
                    if !vague || reason == JwtError::Missing {
                        reason = error;
                    }
                }
            }
        }
        Err(reason.into())
    }

    /// All tokens at the provider's places must be good: of a good one and a bad one the endpoint might believe the bad one.
    fn one_of(&mut self, provider: &Arc<Provider>, audiences: &[String]) -> Result<(), Unmet> {
        let found = tokens::find(provider, self.parts, &self.effects);
        if found.is_empty() {
            return Err(JwtError::Missing.into());
        }
        for token in found.into_iter().rev() {
            let verified = self.verify(provider, audiences, &token.text)?;
            self.effects.accept(provider, verified, token.place);
        }
        Ok(())
    }

    /// Tokens at all places of all providers, each verified by the provider of its issuer.
    fn every(&mut self, forgiving: bool) -> Result<(), Unmet> {
        let mut found: Vec<(Token<'e>, Vec<Arc<Provider>>)> = Vec::new();
        for provider in &self.filter.providers {
            for token in tokens::find(provider, self.parts, &self.effects) {
                match found
                    .iter_mut()
                    .find(|(known, _)| known.place == token.place && known.text == token.text)
                {
                    Some((_, providers)) => providers.push(provider.clone()),
                    None => found.push((token, vec![provider.clone()])),
                }
            }
        }
        for (token, providers) in found.into_iter().rev() {
            match self.by_issuer(&token, &providers) {
                Err(Unmet::Failed(_)) if forgiving => {}
                other => other?,
            }
        }
        Ok(())
    }

    fn by_issuer(&mut self, token: &Token<'e>, providers: &[Arc<Provider>]) -> Result<(), Unmet> {
        let jwt = Jwt::parse(&token.text)?;
        let of_issuer = |p: &&Arc<Provider>| p.issuer.as_deref() == Some(jwt.issuer());
        let provider = providers.iter().find(of_issuer);
        let provider = provider.or_else(|| providers.iter().find(|p| p.issuer.is_none()));
        let provider = provider.ok_or(JwtError::UnknownIssuer)?;
        let verified = self.verify(provider, &provider.audiences, &token.text)?;
        self.effects.accept(provider, verified, token.place.clone());
        Ok(())
    }

    fn verify(
        &self,
        provider: &Arc<Provider>,
        audiences: &[String],
        token: &str,
    ) -> Result<Rc<Verified>, Unmet> {
        let looked_up = self.keys.lookup(provider);
        if let Lookup::Ready(keys) = &looked_up
            && let Some(verified) = cache::get(token, provider.id, keys.id)
        {
            inc(&self.stats.hits);
            verified.jwt.check_time(self.now, provider.clock_skew)?;
            verified.jwt.check_audience(audiences)?;
            return Ok(verified);
        }
        inc(&self.stats.misses);
        let jwt = Jwt::parse(token)?;
        if provider
            .issuer
            .as_deref()
            .is_some_and(|issuer| issuer != jwt.issuer())
        {
            return Err(JwtError::UnknownIssuer.into());
        }
        jwt.check_time(self.now, provider.clock_skew)?;
        check_limits(provider, &jwt, self.now)?;
        jwt.check_audience(audiences)?;
        let keys: Arc<Keys> = match looked_up {
            Lookup::Ready(keys) => keys,
            Lookup::Failed(error) => return Err(error.into()),
            Lookup::Fetch => return Err(Unmet::Keys(provider.clone())),
        };
        keys.jwks.verify(&jwt)?;
        let verified = Rc::new(Verified::new(provider, jwt));
        cache::put(token, provider.id, keys.id, &verified);
        Ok(verified)
    }
}

fn check_limits(provider: &Provider, jwt: &Jwt, now: u64) -> Result<(), JwtError> {
    let subject = |m: &mesh_routing::matcher::StringMatch| m.matches(jwt.subject());
    if !provider.subjects.as_ref().is_none_or(subject)
        || (provider.require_expiration && jwt.expires() == 0)
    {
        return Err(JwtError::VerificationFail);
    }
    let Some(most) = provider.max_lifetime else {
        return Ok(());
    };
    let from = if jwt.issued() > 0 { jwt.issued() } else { now };
    match jwt.expires() > 0 && jwt.expires().saturating_sub(from) <= most.as_secs() {
        true => Ok(()),
        false => Err(JwtError::VerificationFail),
    }
}

/// All values of a header that are text.
fn values<'h>(headers: &'h HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'h str> {
    let all = headers.get_all(name).into_iter();
    all.filter_map(|value| value.to_str().ok())
}
