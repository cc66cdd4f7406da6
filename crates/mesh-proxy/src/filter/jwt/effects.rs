//! What good tokens do to a request, gathered while requirements are evaluated and done once at the end.

use std::rc::Rc;
use std::sync::Arc;

use http::request;
use mesh_routing::filter::jwt_authn::{JwtAuthn, Provider, SECTION};

use super::cache::Verified;
use super::tokens::{Place, without_parameter};
use crate::filter::Notes;
use crate::message;

/// What is to be done.
#[derive(Debug, Default)]
pub(super) struct Effects {
    accepted: Vec<(Rc<Verified>, bool)>,
    taken: Vec<Place>,
}

impl Effects {
    /// A token is good.
    pub(super) fn accept(
        &mut self,
        provider: &Arc<Provider>,
        verified: Rc<Verified>,
        place: Place,
    ) {
        if !provider.forward && !self.has_taken(&place) {
            self.taken.push(place);
        }
        self.accepted.push((verified, provider.clear_route));
    }

    /// Has the token at this place been taken away?
    pub(super) fn has_taken(&self, place: &Place) -> bool {
        self.taken.contains(place)
    }

    /// Does it. Headers that tokens make are the client's to make never, whether there is a token or not. True if the route is to be
    /// looked for again.
    pub(super) fn apply(
        self,
        filter: &JwtAuthn,
        parts: &mut request::Parts,
        notes: &mut Notes,
    ) -> bool {
        for provider in &filter.providers {
            if let Some(name) = &provider.payload_header {
                parts.headers.remove(name);
            }
            for claim in &provider.claim_headers {
                parts.headers.remove(&claim.name);
            }
        }
        for place in &self.taken {
            take(place, parts);
        }
        let mut reroute = false;
        for (verified, clears_route) in self.accepted {
            for (name, value) in &verified.headers {
                parts.headers.append(name.clone(), value.clone());
            }
            if let Some(metadata) = &verified.metadata {
                notes.add_shared(SECTION, metadata.clone());
            }
            let changed = !verified.headers.is_empty() || verified.metadata.is_some();
            reroute |= clears_route && changed;
        }
        reroute
    }
}

fn take(place: &Place, parts: &mut request::Parts) {
    match place {
        Place::Header(name) => {
            parts.headers.remove(name);
        }
        Place::Param(name) => {
            let path = parts.uri.path_and_query().map_or("/", |p| p.as_str());
            let path = without_parameter(path, name);
            if let Some(uri) = message::with_path(&parts.uri, &path) {
                parts.uri = uri;
            }
        }
        // Cookies carry more than tokens; Envoy leaves them, too.
        Place::Cookie => {}
    }
}
