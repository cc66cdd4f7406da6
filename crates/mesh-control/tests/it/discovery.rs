//! A proxy as far as discovery goes: it keeps what it is sent.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use mesh_xds::json::{Descriptors, Naming, to_json};
use mesh_xds::{AdsClient, ClientConfig, Handler, Node, Rejection, Resource, Update};
use tokio::sync::watch;

/// Resources by type and name.
pub type Held = BTreeMap<String, BTreeMap<String, Resource>>;

/// What a proxy holds, and how many updates it got.
#[derive(Clone, Default)]
pub struct View {
    pub held: Held,
    /// Names in each update after the first of its type, in order.
    pub updates: Vec<(String, Vec<String>)>,
    /// Types that have been answered.
    pub answered: usize,
}

struct Proxy {
    view: watch::Sender<View>,
    refuse: Option<&'static str>,
}

impl Handler for Proxy {
    async fn update(&mut self, update: Update) -> Vec<Rejection> {
        let refused = |resource: &Resource| self.refuse == Some(resource.name.as_str());
        let rejections = update
            .upserts
            .iter()
            .filter(|resource| refused(resource))
            .map(|resource| Rejection {
                name: resource.name.clone(),
                message: "refused by the test".to_owned(),
            })
            .collect();
        self.view.send_modify(|view| {
            let names = update
                .upserts
                .iter()
                .map(|resource| resource.name.clone())
                .collect();
            view.updates.push((update.type_url.clone(), names));
            view.answered += 1;
            let held = view.held.entry(update.type_url).or_default();
            for resource in update.upserts {
                held.insert(resource.name.clone(), resource);
            }
            for name in update.removals {
                held.remove(&name);
            }
        });
        rejections
    }
}

/// A running proxy; dropped, it disconnects.
pub struct Running {
    pub view: watch::Receiver<View>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub const ID: &str = "sidecar~10.244.7.10~reviews-v1.default~default.svc.cluster.local";

pub fn connect(address: SocketAddr, id: &str) -> Running {
    run(address, id, None, BTreeMap::new())
}

pub fn run(
    address: SocketAddr,
    id: &str,
    refuse: Option<&'static str>,
    versions: BTreeMap<String, BTreeMap<String, String>>,
) -> Running {
    let node = Node {
        id: id.to_owned(),
        ..Default::default()
    };
    let mut config = ClientConfig::new(vec![address.to_string()], node);
    config.initial_versions = versions;
    run_with(config, refuse)
}

pub fn run_with(config: ClientConfig, refuse: Option<&'static str>) -> Running {
    let (client, _state) = AdsClient::new(config);
    let (sender, view) = watch::channel(View::default());
    let task = tokio::spawn(client.run(Proxy {
        view: sender,
        refuse,
    }));
    Running { view, task }
}

impl Running {
    /// Waits until the view satisfies a condition.
    pub async fn until(&mut self, what: &str, condition: impl Fn(&View) -> bool) -> View {
        let waiting = self.view.wait_for(|view| condition(view));
        match tokio::time::timeout(Duration::from_secs(20), waiting).await {
            Ok(view) => view.unwrap().clone(),
            Err(_) => panic!("{what} did not come"),
        }
    }

    /// Waits for the first answer to all four types.
    pub async fn complete(&mut self) -> View {
        self.until("an answer to each type", |view| view.answered >= 4)
            .await
    }
}

impl View {
    /// Whether the JSON of any resource of the type holds the text.
    pub fn mentions(&self, type_url: &str, text: &str) -> bool {
        Descriptors::keep();
        self.held
            .get(type_url)
            .into_iter()
            .flat_map(BTreeMap::values)
            .any(|resource| {
                let json = to_json(type_url, &resource.value, Naming::Proto).unwrap();
                json.to_string().contains(text)
            })
    }

    pub fn versions(&self) -> BTreeMap<String, BTreeMap<String, String>> {
        self.held
            .iter()
            .map(|(type_url, held)| {
                let versions = held
                    .iter()
                    .map(|(name, resource)| (name.clone(), resource.version.clone()));
                (type_url.clone(), versions.collect())
            })
            .collect()
    }
}
