//! Metrics of the application merged with the proxy's: who scrapes the pod asks the agent, which asks the application.

use serde_json::{Map, Value};

use crate::PodView;
use crate::annotations::{Settings, parse_bool};

/// Variable of the proxy that tells where the application's own metrics are.
const VARIABLE: &str = "ISTIO_PROMETHEUS_ANNOTATIONS";
/// Annotation that switches merging off for a pod.
pub(crate) const SWITCH: &str = "prometheus.istio.io/merge-metrics";
const SCRAPE: &str = "prometheus.io/scrape";
const PORT: &str = "prometheus.io/port";
const PATH: &str = "prometheus.io/path";

/// What merging changes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Merged {
    /// The variable of the proxy, where the application has metrics of its own.
    pub(crate) variable: Option<(&'static str, String)>,
    /// Annotations that the pod gets.
    pub(crate) annotations: [(&'static str, String); 3],
}

/// What merging changes on a pod; `None` leaves its annotations as they are.
pub(crate) fn merged(view: &PodView<'_>, settings: &Settings<'_>) -> Option<Merged> {
    let port = settings.proxy.status_port;
    // Who says that a pod is not to be scraped means the proxy, too.
    let refused = view
        .annotation(SCRAPE)
        .is_some_and(|value| parse_bool(SCRAPE, value) == Ok(false));
    if !settings.merge_metrics || refused || port == 0 {
        return None;
    }
    let port = port.to_string();
    let mut own = Map::new();
    for (key, name) in [("scrape", SCRAPE), ("path", PATH), ("port", PORT)] {
        if let Some(value) = view.annotation(name).filter(|value| !value.is_empty()) {
            own.insert(key.to_owned(), value.into());
        }
    }
    // An application on the agent's own port would be the agent asking itself.
    let itself = own.get("port").is_some_and(|own| *own == port.as_str());
    let variable = (!own.is_empty() && !itself).then(|| {
        own.insert("scrape".to_owned(), "true".into());
        (VARIABLE, Value::Object(own).to_string())
    });
    let annotations = [
        (SCRAPE, "true".to_owned()),
        (PORT, port),
        (PATH, "/stats/prometheus".to_owned()),
    ];
    Some(Merged {
        variable,
        annotations,
    })
}
