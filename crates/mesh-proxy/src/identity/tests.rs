use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use envoy_types::pb::google::protobuf::value::Kind;
use mesh_identity::ca::Authority;
use mesh_identity::spiffe::SpiffeId;
use mesh_identity::{channel, csr, trust};
use mesh_xds::Node;
use mesh_xds::certificate::{self, CertificateRequest, CertificateResponse, CertificateServer};
use mesh_xds::channel::Connector;
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::wrappers::ReceiverStream;

use super::{Agent, SPREAD, renewal};
use crate::secrets::{MESH_ROOTS, WORKLOAD};
use crate::shared::Shared;
use crate::{ProxyOptions, Role};

const HOUR: Duration = Duration::from_secs(3600);
const YEAR: u64 = 365 * 86_400;

/// What the authority of a test does.
#[derive(Default)]
struct Behaviour {
    away: bool,
    for_somebody_else: bool,
    /// Added to the time at which certificates are issued: the test's clock.
    ahead: Duration,
    issued: usize,
    tokens: Vec<String>,
}

/// A certificate authority on a port of the loopback address.
struct TestAuthority {
    signer: Mutex<Arc<Authority>>,
    behaviour: Mutex<Behaviour>,
}

impl certificate::Authority for TestAuthority {
    async fn create(
        self: Arc<Self>,
        request: tonic::Request<CertificateRequest>,
    ) -> Result<CertificateResponse, tonic::Status> {
        let mut behaviour = self.behaviour.lock().expect("a lock");
        if behaviour.away {
            return Err(tonic::Status::unavailable("away"));
        }
        let token = request.metadata().get("authorization").expect("a token");
        behaviour
            .tokens
            .push(token.to_str().expect("text").to_owned());
        behaviour.issued += 1;
        let mut identity: SpiffeId = ME.parse().expect("an id");
        let message = request.into_inner();
        let named = message.metadata.as_ref().map(|named| &named.fields);
        let named = named.and_then(|fields| fields["CertSigner"].kind.clone());
        assert_eq!(named, Some(Kind::StringValue("mesh".to_owned())));
        let checked =
            csr::check(&message.csr, std::slice::from_ref(&identity)).expect("a good request");
        if behaviour.for_somebody_else {
            identity.service_account = "admin".to_owned();
        }
        let now = SystemTime::now() + behaviour.ahead;
        let now = now
            .duration_since(SystemTime::UNIX_EPOCH)
            .expect("later")
            .as_secs();
        let signer = self.signer.lock().expect("a lock").clone();
        let lifetime = u64::try_from(message.validity_duration).expect("positive");
        let chain = signer
            .issue_workload(&checked, &identity, now, lifetime)
            .expect("a certificate");
        Ok(CertificateResponse {
            cert_chain: vec![chain, signer.roots().pem().to_owned()],
        })
    }
}

const ME: &str = "spiffe://cluster.local/ns/default/sa/reviews";

fn root() -> Arc<Authority> {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .expect("later");
    Arc::new(Authority::generate("cluster.local", "Root CA", now.as_secs(), YEAR).expect("a root"))
}

/// Serves the authority in TLS, with a certificate of `server`.
async fn serve(authority: &Arc<TestAuthority>, server: &Authority) -> SocketAddr {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .expect("later");
    let leaf = server
        .issue_server(&["localhost"], &[], now.as_secs(), YEAR)
        .expect("a leaf");
    let config = channel::server(&leaf, server.roots()).expect("a configuration");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let (sender, incoming) = tokio::sync::mpsc::channel(4);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = tokio_rustls::TlsAcceptor::from(config.clone());
            if let Ok(stream) = acceptor.accept(stream).await {
                let _ = sender.send(Ok::<_, std::io::Error>(stream)).await;
            }
        }
    });
    let service = CertificateServer::new(Arc::clone(authority));
    let server = tonic::transport::Server::builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(ReceiverStream::new(incoming)));
    address
}

struct World {
    dir: tempfile::TempDir,
    authority: Arc<TestAuthority>,
    shared: Arc<Shared>,
    address: SocketAddr,
}

impl World {
    async fn new(root: &Arc<Authority>) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").expect("/dev/shm is needed");
        let authority = Arc::new(TestAuthority {
            signer: Mutex::new(Arc::clone(root)),
            behaviour: Mutex::default(),
        });
        let address = serve(&authority, root).await;
        std::fs::write(dir.path().join("token"), "secret\n").expect("a token");
        let world = Self {
            shared: Shared::new(proxy(dir.path(), address)),
            dir,
            authority,
            address,
        };
        world.roots(root.certificate_pem());
        world
    }

    fn roots(&self, pem: &str) {
        std::fs::write(self.dir.path().join("roots.pem"), pem).expect("the roots");
    }

    /// A process of its own, as it were.
    fn agent(&mut self) -> Agent {
        self.shared = Shared::new(proxy(self.dir.path(), self.address));
        let options = self.shared.options.identity.clone().expect("an identity");
        let connector: Connector = Arc::new(|address| Box::pin(TcpStream::connect(address)));
        Agent::new(Arc::clone(&self.shared), options, connector)
    }

    fn behave(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.authority.behaviour.lock().expect("a lock"));
    }

    fn issued(&self) -> usize {
        self.authority.behaviour.lock().expect("a lock").issued
    }

    fn is_identified(&self) -> bool {
        self.shared.identified.load(Ordering::Acquire)
    }

    /// Fingerprints of what is presented, and of what is trusted.
    fn in_force(&self) -> (Option<String>, Vec<String>) {
        let text = |name: &str| {
            let held = self.shared.secrets.held(name);
            held.map(|held| held.certificates_pem.clone())
                .unwrap_or_default()
        };
        let prints = |pem: String| {
            let described = trust::describe(&pem).unwrap_or_default();
            described
                .into_iter()
                .map(|one| one.fingerprint)
                .collect::<Vec<_>>()
        };
        let leaf = prints(text(WORKLOAD)).into_iter().next();
        (leaf, prints(text(MESH_ROOTS)))
    }
}

fn proxy(dir: &Path, authority: SocketAddr) -> ProxyOptions {
    let file = |name: &str| dir.join(name).display().to_string();
    let vars: BTreeMap<String, String> = [
        ("POD_NAME", "reviews-1".to_owned()),
        ("POD_NAMESPACE", "default".to_owned()),
        ("SERVICE_ACCOUNT", "reviews".to_owned()),
        ("CA_ADDR", format!("localhost:{}", authority.port())),
        ("ISTIO_META_CERT_SIGNER", "mesh".to_owned()),
        ("MESH_TOKEN_FILE", file("token")),
        ("CA_ROOT_CA", file("roots.pem")),
        ("MESH_CREDENTIALS_DIR", dir.display().to_string()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    ProxyOptions::from_vars(Role::Sidecar, vars, Path::new("/nowhere")).expect("options")
}

#[test]
fn certificates_are_renewed_at_half_of_their_life_give_or_take_a_hundredth() {
    let now = SystemTime::UNIX_EPOCH + HOUR * 400_000;
    let at = |random| {
        renewal(now, now + HOUR * 24, 0.5, 0.01, random)
            .duration_since(now)
            .expect("later")
    };
    assert_eq!(at(0.5), HOUR * 12);
    let off = HOUR.mul_f64(0.24);
    assert!(at(0.0) >= HOUR * 12 - off - Duration::from_secs(1) && at(0.0) < HOUR * 12);
    assert!(at(1.0) <= HOUR * 12 + off + Duration::from_secs(1) && at(1.0) > HOUR * 12);
    assert_eq!(
        renewal(now, now - HOUR, 0.5, 0.01, 0.5),
        now,
        "what has expired is due"
    );
}

#[tokio::test]
async fn a_certificate_comes_stays_while_the_authority_is_away_and_ends_when_it_expires() {
    let root = root();
    let mut world = World::new(&root).await;
    world.behave(|b| b.away = true);
    let mut agent = world.agent();
    let start = SystemTime::now();
    agent.look(start).await;
    assert!(!world.is_identified(), "there is no certificate yet");
    world.behave(|b| b.away = false);
    agent.look(start + Duration::from_secs(60)).await;
    assert!(world.is_identified());
    let (first, roots) = world.in_force();
    assert!(first.is_some());
    assert_eq!(roots, [root.root()]);
    assert_eq!(
        world.authority.behaviour.lock().expect("a lock").tokens,
        ["Bearer secret"]
    );

    // Nothing happens before its time.
    agent.look(start + HOUR * 11).await;
    assert_eq!(world.issued(), 1);
    // Renewal fails: the last good one stays, until it expires.
    world.behave(|b| b.away = true);
    for hours in [13, 18, 23] {
        agent.look(start + HOUR * hours).await;
        assert!(world.is_identified());
        assert_eq!(world.in_force().0, first);
    }
    agent.look(start + HOUR * 25).await;
    assert!(!world.is_identified(), "an expired certificate is none");
    world.behave(|b| {
        b.away = false;
        b.ahead = HOUR * 26;
    });
    agent.look(start + HOUR * 26).await;
    assert!(world.is_identified());
    assert_ne!(world.in_force().0, first);
    assert_eq!(world.issued(), 2);
}

#[tokio::test]
async fn the_next_process_of_the_pod_begins_with_the_certificate_of_the_last() {
    let root = root();
    let mut world = World::new(&root).await;
    world.agent().look(SystemTime::now()).await;
    let (first, _) = world.in_force();
    world.behave(|b| b.away = true);
    let mut again = world.agent();
    assert!(world.is_identified(), "before anything was asked");
    assert_eq!(world.in_force().0, first);
    again.look(SystemTime::now()).await;
    assert_eq!(world.issued(), 1);
    // One of somebody else's mesh is not taken.
    world.roots(super::tests::root().certificate_pem());
    world.agent();
    assert!(!world.is_identified());
}

#[tokio::test]
async fn a_root_changes_in_three_steps_and_the_certificate_follows() {
    let (old, new) = (root(), root());
    let mut world = World::new(&old).await;
    let mut agent = world.agent();
    let mut renewed = agent.renewed();
    let now = SystemTime::now();
    agent.look(now).await;
    let (first, _) = world.in_force();
    renewed.mark_unchanged();

    // Both are trusted; nobody needs a new certificate for that. What the node says has changed.
    world.roots(&format!(
        "{}{}",
        old.certificate_pem(),
        new.certificate_pem()
    ));
    agent.look(now + SPREAD * 2).await;
    agent.look(now + SPREAD * 4).await;
    let (leaf, roots) = world.in_force();
    assert_eq!(
        (leaf, roots),
        (
            first.clone(),
            vec![old.root().to_owned(), new.root().to_owned()]
        )
    );
    assert!(renewed.has_changed().expect("open"));
    assert_eq!(world.issued(), 1);
    let mut node = Node::default();
    agent.node_update()(&mut node);
    let said = format!("{:?}", node.metadata);
    assert!(
        said.contains(old.root()) && said.contains(new.root()),
        "{said}"
    );

    // The new one signs.
    *world.authority.signer.lock().expect("a lock") = Arc::clone(&new);
    world.roots(&format!(
        "{}{}",
        new.certificate_pem(),
        old.certificate_pem()
    ));
    renewed.mark_unchanged();
    agent.look(now + SPREAD * 6).await;
    agent.look(now + SPREAD * 8).await;
    assert_eq!(world.issued(), 2);
    let held = agent.present.leaf.load_full().expect("a certificate");
    assert_eq!(held.root.as_deref(), Some(new.root()));
    assert!(renewed.has_changed().expect("open"));

    // The old one is gone.
    world.roots(new.certificate_pem());
    agent.look(now + SPREAD * 10).await;
    assert_eq!(world.in_force().1, [new.root()]);
    assert_eq!(world.issued(), 2);
    // An empty or broken file is an accident, not a change.
    for text in [
        "",
        "-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n",
    ] {
        world.roots(text);
        agent.look(now + SPREAD * 12).await;
        assert_eq!(world.in_force().1, [new.root()]);
    }
}

#[tokio::test]
async fn a_certificate_for_somebody_else_and_an_authority_of_another_root_are_refused() {
    let mut world = World::new(&root()).await;
    world.behave(|b| b.for_somebody_else = true);
    let mut agent = world.agent();
    agent.look(SystemTime::now()).await;
    assert_eq!(world.issued(), 1);
    assert!(!world.is_identified());
    assert_eq!(world.in_force().0, None);

    // The token is not even sent to a server that is not the mesh's.
    world.roots(root().certificate_pem());
    let mut agent = world.agent();
    agent.look(SystemTime::now()).await;
    assert_eq!(world.issued(), 1);
    assert!(!world.is_identified());
}
