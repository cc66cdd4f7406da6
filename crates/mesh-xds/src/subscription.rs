//! The rules of one ADS stream, without IO: requests and resource sets go in, responses come out.
//!
//! Responses are not held back until the one before is acknowledged: the order on the stream is the order of effect, and a
//! client may delay its acknowledgement of clusters until their endpoints have come (Envoy does). What was refused counts as
//! sent: it goes out again when it changes, not before.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use envoy_types::pb::google::rpc::Status;

use crate::nack::{self, Rejection};
use crate::resources::{ByName, Resource, ResourceSet};
use crate::types;

/// Types on one stream. Istio knows 15 or so.
const MAX_TYPES: usize = 32;
/// Names one stream may subscribe to, all types together.
const MAX_NAMES: usize = 200_000;
/// Bytes of one name.
const MAX_NAME: usize = 4096;
/// Unanswered responses remembered per type; an acknowledgement of an older one is taken for stale.
const MAX_OUTSTANDING: usize = 64;

/// Which of the two forms of the protocol a stream speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Only what changed (`DeltaAggregatedResources`).
    Delta,
    /// Everything of a type (`StreamAggregatedResources`).
    StateOfTheWorld,
}

/// What happened on a stream, for whoever keeps the status of nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamEvent {
    /// A response went out.
    Sent {
        /// Type of its resources.
        type_url: String,
        /// Its nonce.
        nonce: String,
        /// Its version (`version_info` or `system_version_info`).
        version: String,
        /// How many resources it holds.
        upserts: usize,
        /// How many names it removes.
        removals: usize,
    },
    /// The client took a response.
    Acked {
        /// Type of the response.
        type_url: String,
        /// Nonce of the response.
        nonce: String,
        /// Version of the response.
        version: String,
        /// Names of the resources in it.
        names: Vec<String>,
    },
    /// The client refused a response, or parts of it.
    Nacked {
        /// Type of the response.
        type_url: String,
        /// Nonce of the response.
        nonce: String,
        /// Version of the response.
        version: String,
        /// Names of the resources in it; those that are not refused are taken, if the client tells them apart.
        names: Vec<String>,
        /// The client's text.
        message: String,
        /// The resources that it refuses.
        rejections: Vec<Rejection>,
    },
    /// An acknowledgement of nothing that is outstanding; ignored.
    StaleNonce {
        /// The type it names.
        type_url: String,
    },
}

/// A request that breaks the protocol or a limit; the stream has to end.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// No type URL.
    #[error("the request has no type_url; set it to the type of the resources")]
    NoType,
    /// More types than [`MAX_TYPES`].
    #[error("more than {MAX_TYPES} resource types on one stream")]
    TooManyTypes,
    /// More names than [`MAX_NAMES`].
    #[error("more than {MAX_NAMES} resource names on one stream; subscribe to \"*\" instead")]
    TooManyNames,
    /// A name longer than [`MAX_NAME`] bytes.
    #[error("a resource name of {0} bytes; at most {MAX_NAME} are taken")]
    NameTooLong(usize),
}

/// A response to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// Type of the resources.
    pub type_url: String,
    /// To be repeated by the client's answer.
    pub nonce: String,
    /// The version to show.
    pub version: String,
    /// What to add or replace (in [`Mode::StateOfTheWorld`], for clusters and listeners: everything).
    pub resources: Vec<Arc<Resource>>,
    /// Names to remove (in [`Mode::Delta`] only).
    pub removals: Vec<String>,
}

/// The state of one stream.
#[derive(Debug)]
pub struct Subscription {
    mode: Mode,
    nonce_prefix: String,
    counter: u64,
    set: Option<Arc<ResourceSet>>,
    /// By push rank, then type URL.
    types: BTreeMap<(usize, String), TypeState>,
    names: usize,
}

#[derive(Debug, Default)]
struct TypeState {
    wildcard: bool,
    /// Explicit names, without the wildcard.
    names: BTreeSet<String>,
    /// Version by name, of what the client holds as far as we know.
    sent: BTreeMap<String, String>,
    /// Explicit names that the client knows to be absent.
    known_absent: BTreeSet<String>,
    /// State of the world: the resources of the last response of a full-state type.
    last_full: ByName,
    /// An answer is due even if it is empty.
    answer_due: bool,
    upserts_due: bool,
    removals_due: bool,
    outstanding: VecDeque<Outstanding>,
}

#[derive(Debug)]
struct Outstanding {
    nonce: String,
    version: String,
    names: Vec<String>,
}

impl Subscription {
    /// A stream without subscriptions. `nonce_prefix` sets its nonces apart from those of other streams.
    #[must_use]
    pub fn new(mode: Mode, nonce_prefix: &str) -> Self {
        Self {
            mode,
            nonce_prefix: nonce_prefix.to_owned(),
            counter: 0,
            set: None,
            types: BTreeMap::new(),
            names: 0,
        }
    }

    /// The resources that the client should have from now on. Before the first call nothing is sent.
    pub fn set_resources(&mut self, set: Arc<ResourceSet>) {
        for ((_, type_url), state) in &mut self.types {
            let same = match (&self.set, set.of_type(type_url)) {
                (None, _) => false,
                (Some(old), new) => match (old.of_type(type_url), new) {
                    (Some(old), Some(new)) => Arc::ptr_eq(old, new),
                    (None, None) => true,
                    _ => false,
                },
            };
            if !same {
                state.upserts_due = true;
                state.removals_due = true;
            }
        }
        self.set = Some(set);
    }

    /// Takes a delta request: acknowledgement, subscriptions, or both.
    ///
    /// # Errors
    /// When the request breaks the protocol or a limit; end the stream then.
    pub fn delta_request(
        &mut self,
        request: &DeltaDiscoveryRequest,
    ) -> Result<Vec<StreamEvent>, ProtocolError> {
        check_names(&request.resource_names_subscribe)?;
        let first = !self.knows(&request.type_url);
        let state = self.type_state(&request.type_url)?;
        let events = state.acknowledge(
            &request.type_url,
            &request.response_nonce,
            request.error_detail.as_ref(),
        );
        let before = state.names.len();
        if first {
            state.sent = request
                .initial_resource_versions
                .iter()
                .map(|(name, version)| (name.clone(), version.clone()))
                .collect();
            if request.resource_names_subscribe.is_empty()
                && types::empty_means_wildcard(&request.type_url)
            {
                state.subscribe_wildcard();
            }
            state.removals_due = true;
        }
        for name in &request.resource_names_subscribe {
            if name == types::WILDCARD {
                state.subscribe_wildcard();
                continue;
            }
            // Subscribing again to a name asks for it again: the client may have dropped it (xDS protocol, delta).
            if !first {
                state.sent.remove(name);
                state.known_absent.remove(name);
            }
            state.names.insert(name.clone());
            state.upserts_due = true;
        }
        for name in &request.resource_names_unsubscribe {
            state.unsubscribe(name);
        }
        let after = state.names.len();
        self.count_names(before, after)?;
        Ok(events)
    }

    /// Takes a state-of-the-world request.
    ///
    /// # Errors
    /// When the request breaks the protocol or a limit; end the stream then.
    pub fn sotw_request(
        &mut self,
        request: &DiscoveryRequest,
    ) -> Result<Vec<StreamEvent>, ProtocolError> {
        check_names(&request.resource_names)?;
        let first = !self.knows(&request.type_url);
        let state = self.type_state(&request.type_url)?;
        // Only an answer to the latest response speaks about the present subscriptions (xDS protocol, "stale nonce"). The
        // first request of a type on a stream is taken with any nonce: it may be from an earlier stream.
        let latest = state.outstanding.back().map(|last| last.nonce.as_str());
        if !first
            && !request.response_nonce.is_empty()
            && latest.is_some_and(|latest| latest != request.response_nonce)
        {
            return Ok(vec![StreamEvent::StaleNonce {
                type_url: request.type_url.clone(),
            }]);
        }
        let events = if first {
            Vec::new()
        } else {
            state.acknowledge(
                &request.type_url,
                &request.response_nonce,
                request.error_detail.as_ref(),
            )
        };
        let before = state.names.len();
        state.sotw_names(&request.type_url, &request.resource_names, first);
        let after = state.names.len();
        self.count_names(before, after)?;
        Ok(events)
    }

    /// The next response, or nothing when the client is up to date. Additions and changes come in push order, removals after
    /// all of them in the reverse order, so that nothing is removed while something still refers to it.
    pub fn next_response(&mut self) -> Option<Outgoing> {
        let set = Arc::clone(self.set.as_ref()?);
        let keys: Vec<(usize, String)> = self.types.keys().cloned().collect();
        for key in &keys {
            if let Some((resources, removals)) = self.due_upserts(key, &set) {
                return Some(self.emit(key, resources, removals));
            }
        }
        for key in keys.iter().rev() {
            if let Some((resources, removals)) = self.due_removals(key, &set) {
                return Some(self.emit(key, resources, removals));
            }
        }
        None
    }

    fn knows(&self, type_url: &str) -> bool {
        self.types
            .contains_key(&(types::push_rank(type_url), type_url.to_owned()))
    }

    fn type_state(&mut self, type_url: &str) -> Result<&mut TypeState, ProtocolError> {
        if type_url.is_empty() {
            return Err(ProtocolError::NoType);
        }
        if self.types.len() >= MAX_TYPES && !self.knows(type_url) {
            return Err(ProtocolError::TooManyTypes);
        }
        Ok(self
            .types
            .entry((types::push_rank(type_url), type_url.to_owned()))
            .or_default())
    }

    fn count_names(&mut self, before: usize, after: usize) -> Result<(), ProtocolError> {
        self.names = self.names + after - before;
        if self.names > MAX_NAMES {
            return Err(ProtocolError::TooManyNames);
        }
        Ok(())
    }

    fn due_upserts(&mut self, key: &(usize, String), set: &ResourceSet) -> Option<Parts> {
        let mode = self.mode;
        let state = self.types.get_mut(key)?;
        if !std::mem::take(&mut state.upserts_due) && !state.answer_due {
            return None;
        }
        let empty = ByName::new();
        let available = set.of_type(&key.1).map_or(&empty, Arc::as_ref);
        let changed = state.changed(available);
        if mode == Mode::StateOfTheWorld && types::full_state(&key.1) {
            return state.full_response(&key.1, available, &changed);
        }
        let mut removals = state.newly_absent(available);
        if key.1 == types::LISTENER {
            // A listener may take over the address of one that goes, and nothing refers to listeners: both in one message.
            removals.extend(state.gone(available));
            state.removals_due = false;
        }
        if mode == Mode::StateOfTheWorld {
            removals.clear();
        }
        if changed.is_empty() && removals.is_empty() && !state.answer_due {
            return None;
        }
        if key.1 == types::CLUSTER {
            self.resend_endpoints(key, &changed);
        }
        Some((changed, removals))
    }

    /// A stock Envoy warms a changed cluster anew and waits for its endpoints, without asking for them again as it never
    /// unsubscribed: send them once more. Clients that take endpoints by wildcard keep them apart from clusters.
    fn resend_endpoints(&mut self, clusters: &(usize, String), changed: &[Arc<Resource>]) {
        let updated: Vec<String> = match self.types.get(clusters) {
            Some(state) => changed
                .iter()
                .filter(|resource| state.sent.contains_key(&resource.name))
                .map(|resource| resource.name.clone())
                .collect(),
            None => return,
        };
        let key = (
            types::push_rank(types::ENDPOINT),
            types::ENDPOINT.to_owned(),
        );
        let Some(endpoints) = self.types.get_mut(&key).filter(|state| !state.wildcard) else {
            return;
        };
        for name in updated {
            if endpoints.sent.remove(&name).is_some() {
                endpoints.upserts_due = true;
            }
        }
    }

    fn due_removals(&mut self, key: &(usize, String), set: &ResourceSet) -> Option<Parts> {
        let mode = self.mode;
        let state = self.types.get_mut(key)?;
        if !std::mem::take(&mut state.removals_due) {
            return None;
        }
        let empty = ByName::new();
        let available = set.of_type(&key.1).map_or(&empty, Arc::as_ref);
        let gone = state.gone(available);
        if gone.is_empty() {
            return None;
        }
        for name in &gone {
            state.sent.remove(name);
        }
        match mode {
            Mode::Delta => {
                // The client will know that these are absent.
                let explicit = gone.iter().filter(|name| state.names.contains(*name));
                state.known_absent.extend(explicit.cloned());
                Some((Vec::new(), gone))
            }
            Mode::StateOfTheWorld if types::full_state(&key.1) => {
                state.last_full = state.wanted(available);
                Some((state.last_full.values().cloned().collect(), Vec::new()))
            }
            // For other types the client drops what nothing refers to.
            Mode::StateOfTheWorld => None,
        }
    }

    fn emit(
        &mut self,
        key: &(usize, String),
        resources: Vec<Arc<Resource>>,
        removals: Vec<String>,
    ) -> Outgoing {
        self.counter += 1;
        let nonce = format!("{}-{}", self.nonce_prefix, self.counter);
        let version = match self.mode {
            Mode::Delta => self.counter.to_string(),
            Mode::StateOfTheWorld => content_version(&resources),
        };
        if let Some(state) = self.types.get_mut(key) {
            state.answer_due = false;
            for resource in &resources {
                state.known_absent.remove(&resource.name);
                state
                    .sent
                    .insert(resource.name.clone(), resource.version.clone());
            }
            for name in &removals {
                state.sent.remove(name);
            }
            if state.outstanding.len() == MAX_OUTSTANDING {
                state.outstanding.pop_front();
            }
            state.outstanding.push_back(Outstanding {
                nonce: nonce.clone(),
                version: version.clone(),
                names: resources.iter().map(|r| r.name.clone()).collect(),
            });
        }
        Outgoing {
            type_url: key.1.clone(),
            nonce,
            version,
            resources,
            removals,
        }
    }
}

type Parts = (Vec<Arc<Resource>>, Vec<String>);

impl Outgoing {
    /// The event that tells of this response.
    #[must_use]
    pub fn sent(&self) -> StreamEvent {
        StreamEvent::Sent {
            type_url: self.type_url.clone(),
            nonce: self.nonce.clone(),
            version: self.version.clone(),
            upserts: self.resources.len(),
            removals: self.removals.len(),
        }
    }
}

impl TypeState {
    fn subscribe_wildcard(&mut self) {
        self.wildcard = true;
        self.upserts_due = true;
        self.answer_due = true;
    }

    fn unsubscribe(&mut self, name: &str) {
        if name == types::WILDCARD {
            self.wildcard = false;
            let names = &self.names;
            self.sent.retain(|name, _| names.contains(name));
            return;
        }
        self.names.remove(name);
        self.known_absent.remove(name);
        // Under a wildcard the client goes on receiving it, so it has to be sent again (xDS protocol, "unsubscribe").
        self.sent.remove(name);
        self.upserts_due |= self.wildcard;
    }

    fn sotw_names(&mut self, type_url: &str, names: &[String], first: bool) {
        let wildcard = names.iter().any(|name| name == types::WILDCARD)
            || (names.is_empty()
                && types::empty_means_wildcard(type_url)
                && (first || self.wildcard));
        let explicit: BTreeSet<String> = names
            .iter()
            .filter(|name| *name != types::WILDCARD)
            .cloned()
            .collect();
        if !first && wildcard == self.wildcard && explicit == self.names {
            return;
        }
        self.sent
            .retain(|name, _| wildcard || explicit.contains(name));
        self.answer_due |= wildcard || types::full_state(type_url);
        self.wildcard = wildcard;
        self.names = explicit;
        self.upserts_due = true;
    }

    fn acknowledge(
        &mut self,
        type_url: &str,
        nonce: &str,
        error: Option<&Status>,
    ) -> Vec<StreamEvent> {
        if nonce.is_empty() {
            return Vec::new();
        }
        let found = self
            .outstanding
            .iter()
            .position(|response| response.nonce == nonce);
        let Some(response) = found.and_then(|at| self.outstanding.remove(at)) else {
            return vec![StreamEvent::StaleNonce {
                type_url: type_url.to_owned(),
            }];
        };
        let type_url = type_url.to_owned();
        let nonce = response.nonce;
        let version = response.version;
        let names = response.names;
        vec![match error {
            None => StreamEvent::Acked {
                type_url,
                nonce,
                version,
                names,
            },
            Some(status) => StreamEvent::Nacked {
                type_url,
                nonce,
                version,
                message: status.message.clone(),
                rejections: nack::from_status(status, names.iter().map(String::as_str)),
                names,
            },
        }]
    }

    fn wants(&self, name: &str) -> bool {
        self.wildcard || self.names.contains(name)
    }

    fn wanted(&self, available: &ByName) -> ByName {
        available
            .iter()
            .filter(|(name, _)| self.wants(name))
            .map(|(name, resource)| (name.clone(), Arc::clone(resource)))
            .collect()
    }

    /// What is wanted and not there in this version.
    fn changed(&self, available: &ByName) -> Vec<Arc<Resource>> {
        let differs =
            |resource: &&Arc<Resource>| self.sent.get(&resource.name) != Some(&resource.version);
        if self.wildcard {
            return available.values().filter(differs).cloned().collect();
        }
        self.names
            .iter()
            .filter_map(|name| available.get(name))
            .filter(differs)
            .cloned()
            .collect()
    }

    /// Names asked for that don't exist and that the client was not told about: it may be waiting for them.
    fn newly_absent(&mut self, available: &ByName) -> Vec<String> {
        let absent: Vec<String> = self
            .names
            .iter()
            .filter(|name| {
                !available.contains_key(*name)
                    && !self.sent.contains_key(*name)
                    && !self.known_absent.contains(*name)
            })
            .cloned()
            .collect();
        self.known_absent.extend(absent.iter().cloned());
        absent
    }

    /// What the client holds and should not.
    fn gone(&self, available: &ByName) -> Vec<String> {
        self.sent
            .keys()
            .filter(|name| !available.contains_key(*name))
            .cloned()
            .collect()
    }

    /// State of the world: everything of the type. Clusters that go are kept in it until the routes have let go of them.
    fn full_response(
        &mut self,
        type_url: &str,
        available: &ByName,
        changed: &[Arc<Resource>],
    ) -> Option<Parts> {
        let mut full = self.wanted(available);
        let gone = self.last_full.keys().any(|name| !full.contains_key(name));
        if type_url == types::LISTENER {
            self.removals_due = false;
            if gone {
                self.sent.retain(|name, _| full.contains_key(name));
            }
            if changed.is_empty() && !gone && !self.answer_due {
                return None;
            }
        } else {
            if changed.is_empty() && !self.answer_due {
                return None;
            }
            for (name, resource) in &self.last_full {
                if self.wildcard || self.names.contains(name) {
                    full.entry(name.clone())
                        .or_insert_with(|| Arc::clone(resource));
                }
            }
        }
        self.last_full = full;
        Some((self.last_full.values().cloned().collect(), Vec::new()))
    }
}

fn check_names(names: &[String]) -> Result<(), ProtocolError> {
    match names.iter().map(String::len).max() {
        Some(longest) if longest > MAX_NAME => Err(ProtocolError::NameTooLong(longest)),
        _ => Ok(()),
    }
}

/// A version for a response as a whole: FNV-1a over names and versions.
fn content_version(resources: &[Arc<Resource>]) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for resource in resources {
        for byte in resource
            .name
            .bytes()
            .chain([0])
            .chain(resource.version.bytes())
            .chain([0])
        {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    format!("{hash:016x}")
}
