//! What a user sees, step by step. Each scenario leaves the cluster as it found it.

use super::cluster::Cluster;

mod access;
mod capture;
mod counted;
mod examples;
mod gateway_tokens;
mod graceful;
mod identity;
mod limits;
mod load;
mod mtls;
mod pods;
mod policy;
mod refusals;
mod reviews;
mod routes;
mod samples;
mod tasks;
mod tcp;
mod tokens;
mod upgrade;
mod web;
pub mod wire;

type Scenario = fn(&mut Cluster) -> anyhow::Result<()>;

/// All scenarios, in the order of the walk.
pub const ALL: &[(&str, Scenario)] = &[
    (
        "the product page shows all versions of reviews, a third each",
        reviews::thirds,
    ),
    ("round robin is strictly in turn", reviews::in_turn),
    ("weights of 80 and 20 hold", reviews::weights),
    ("end-user jason goes to v2 only", reviews::jason),
    (
        "twenty changes under load lose nothing",
        reviews::changes_under_load,
    ),
    (
        "every hop goes through the proxies and is counted on both sides",
        counted::counted,
    ),
    (
        "workloads speak mutual TLS without being told to",
        mtls::automatic,
    ),
    (
        "every proxy has a certificate of the mesh's root",
        identity::shown,
    ),
    (
        "the root is changed under load and nothing is lost",
        identity::rotated_under_load,
    ),
    (
        "on the node's network nothing but TLS is seen",
        wire::overhears,
    ),
    (
        "under STRICT a plain client gets no answer, but for exceptions",
        mtls::strict,
    ),
    (
        "policy: deny all, then allow by identity, with Bookinfo",
        policy::bookinfo,
    ),
    (
        "policy: requests by identity, method, path and address",
        policy::requests,
    ),
    (
        "policy: a dry run counts and refuses nothing, AUDIT neither",
        policy::dry_run,
    ),
    (
        "policy: connections by port and identity",
        policy::connections,
    ),
    ("policy: a service of one's own decides", policy::custom),
    ("tokens are judged, the good and the bad", tokens::judged),
    (
        "tokens at the gateway: none, no entrance; claims choose the route",
        gateway_tokens::routed,
    ),
    (
        "without the capture rules in a pod, its edges are not counted",
        counted::edges_uncaptured,
    ),
    (
        "without the capture rules nothing is counted",
        counted::flushed,
    ),
    (
        "a client outside the mesh gets plain round robin",
        pods::outside,
    ),
    (
        "a pod may do with the API what its roles say",
        access::roles,
    ),
    (
        "the proxy runs as uid 1337 where uids are mapped",
        pods::proxy_uid,
    ),
    (
        "traffic runs on while the control plane is away",
        pods::control_plane_away,
    ),
    (
        "a killed sidecar and a killed application come back",
        pods::killed,
    ),
    (
        "web servers by weight, for clients in the mesh",
        web::by_weight,
    ),
    (
        "web servers by content, and from canary to whole",
        web::by_content,
    ),
    ("faults for jason", tasks::faults),
    ("reviews shift from v1 to v3", tasks::shifting),
    (
        "a timeout is shorter than what it waits for",
        tasks::timeouts,
    ),
    ("TCP by weight through the gateway", tcp::shifting),
    (
        "a service outside is reached through a forward proxy",
        tcp::tunnelled,
    ),
    (
        "TLS goes by server name, at the gateway and in sidecars",
        routes::by_server_name,
    ),
    (
        "a part of a host's rules is another team's",
        routes::delegated,
    ),
    (
        "a pod of a StatefulSet is reached by its name",
        routes::by_pod,
    ),
    (
        "names are answered beside the application where its queries are captured",
        capture::names,
    ),
    (
        "by TPROXY the application sees the caller's own address",
        capture::addresses,
    ),
    (
        "circuit breaking under a load generator",
        limits::circuit_breaking,
    ),
    ("requests are mirrored", limits::mirroring),
    (
        "a local rate limit by EnvoyFilter",
        limits::local_rate_limit,
    ),
    ("example canary", |cluster| {
        examples::run(cluster, &examples::CANARY)
    }),
    ("example header-routing", |cluster| {
        examples::run(cluster, &examples::HEADER_ROUTING)
    }),
    ("example fault-injection", |cluster| {
        examples::run(cluster, &examples::FAULT_INJECTION)
    }),
    ("example circuit-breaker", |cluster| {
        examples::run(cluster, &examples::CIRCUIT_BREAKER)
    }),
    ("example mirroring", |cluster| {
        examples::run(cluster, &examples::MIRRORING)
    }),
    ("example retries", |cluster| {
        examples::run(cluster, &examples::RETRIES)
    }),
    ("example outlier-detection", |cluster| {
        examples::run(cluster, &examples::OUTLIER_DETECTION)
    }),
    ("example locality-failover", |cluster| {
        examples::run(cluster, &examples::LOCALITY_FAILOVER)
    }),
    ("example sticky-sessions", |cluster| {
        examples::run(cluster, &examples::STICKY_SESSIONS)
    }),
    ("example local-rate-limit", |cluster| {
        examples::run(cluster, &examples::LOCAL_RATE_LIMIT)
    }),
    ("example global-rate-limit", |cluster| {
        examples::run(cluster, &examples::GLOBAL_RATE_LIMIT)
    }),
    (
        "a rolling restart, scaling and changes under load lose nothing",
        graceful::nothing_is_lost,
    ),
    (
        "an upgrade in place, under load, loses nothing",
        upgrade::in_place,
    ),
    (
        "bad input is refused with its reason and changes nothing",
        refusals::bad_input,
    ),
    ("state survives SIGKILL of the main process", pods::survives),
];
