//! What a case is: a configuration in Envoy's own words, and requests. Read from `xtask/differential/*.yaml`, or generated.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, ensure};
use serde::Deserialize;
use serde_json::{Map, Value};

/// One file of cases.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    /// What the cases have in common; for people.
    #[serde(rename = "about")]
    _about: String,
    /// Texts that stand for themselves wherever the file has `${NAME}`.
    #[serde(default)]
    words: BTreeMap<String, String>,
    cases: Vec<Case>,
}

/// A configuration and what is sent to it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Case {
    /// Unique; reports and the list of differences name it, with its file's name before it.
    pub(super) name: String,
    /// Routes of a virtual host for all domains.
    #[serde(default)]
    pub(super) routes: Vec<Value>,
    /// Further fields of that virtual host.
    #[serde(default)]
    pub(super) host: Map<String, Value>,
    /// Virtual hosts in place of `routes` and `host`.
    #[serde(default)]
    pub(super) virtual_hosts: Vec<Value>,
    /// Further fields of the `RouteConfiguration`.
    #[serde(default)]
    pub(super) table: Map<String, Value>,
    /// Further fields of the `HttpConnectionManager`.
    #[serde(default)]
    pub(super) manager: Map<String, Value>,
    /// HTTP filters before the router.
    #[serde(default)]
    pub(super) filters: Vec<Value>,
    /// Further fields of the filter chain with that connection manager.
    #[serde(default)]
    pub(super) chain: Map<String, Value>,
    /// Only the proxies of other cases send to it.
    #[serde(default)]
    pub(super) server: bool,
    /// How many times a request passes a connection manager, where the case goes through proxies again (0 means 1).
    #[serde(default)]
    pub(super) hops: i64,
    /// Filter chains in place of one with a connection manager.
    #[serde(default)]
    pub(super) chains: Vec<Value>,
    /// Further fields of the `Listener`.
    #[serde(default)]
    pub(super) listener: Map<String, Value>,
    /// Clusters beside those that every case has.
    #[serde(default)]
    pub(super) clusters: BTreeMap<String, ClusterSpec>,
    /// Both proxies must refuse the configuration.
    #[serde(default)]
    pub(super) refused: bool,
    /// Sent one after the other.
    #[serde(default)]
    pub(super) requests: Vec<RequestSpec>,
}

/// A cluster of a case.
#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct ClusterSpec {
    /// Its endpoints, by name (`1` to `8`, `dead`, `tcp1`, `banner1`), in one locality.
    #[serde(default)]
    pub(super) endpoints: Vec<Value>,
    /// Spoken to in HTTP/2.
    #[serde(default)]
    pub(super) http2: bool,
    /// Further fields of the `Cluster`.
    #[serde(flatten)]
    pub(super) fields: Map<String, Value>,
}

/// A request, in full or as `GET /path`.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum RequestSpec {
    /// Method and target; everything else as by default.
    Short(String),
    /// In full.
    Full(Box<Request>),
}

/// HTTP versions of the client.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub(super) enum Version {
    /// HTTP/1.1.
    #[default]
    #[serde(rename = "1.1")]
    Http11,
    /// HTTP/2 with prior knowledge.
    #[serde(rename = "2")]
    Http2,
}

/// A request in full.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Request {
    /// `GET /path`.
    #[serde(default)]
    pub(super) send: String,
    /// Default `case.test`.
    pub(super) host: Option<String>,
    /// `name: value`.
    #[serde(default)]
    pub(super) headers: Vec<String>,
    #[serde(default)]
    pub(super) body: String,
    /// A body of so many bytes.
    #[serde(default)]
    pub(super) size: usize,
    /// The body comes without its length.
    #[serde(default)]
    pub(super) chunked: bool,
    /// `name: value`, after the body.
    #[serde(default)]
    pub(super) trailers: Vec<String>,
    #[serde(default)]
    pub(super) version: Version,
    /// What the endpoint does, try by try (see `upstream.rs`).
    #[serde(default)]
    pub(super) upstream: String,
    /// Milliseconds to wait before it: Envoy ejects endpoints on another thread than the one that answers.
    #[serde(default)]
    pub(super) pause_ms: u64,
    /// How often it is sent; each is compared.
    pub(super) times: Option<u32>,
    /// Compare how often each answer came, not each answer: for choices by chance.
    #[serde(default)]
    pub(super) shares: bool,
    /// Compare the time that it took.
    #[serde(default)]
    pub(super) timed: bool,
    /// How many requests reach endpoints, where more than the tries of this one do (mirrors). They are compared without order.
    pub(super) reaches: Option<usize>,
    /// Bytes sent as they stand, part by part; after each the answer is read. `ID` becomes the header that names the request.
    #[serde(default)]
    pub(super) raw: Vec<String>,
    /// As `raw`, below HTTP: what comes back is compared byte by byte.
    #[serde(default)]
    pub(super) tcp: Vec<String>,
}

impl RequestSpec {
    pub(super) fn full(&self) -> Request {
        match self {
            Self::Short(send) => Request {
                send: send.clone(),
                ..Request::default()
            },
            Self::Full(request) => (**request).clone(),
        }
    }
}

impl Request {
    /// Method and target.
    pub(super) fn line(&self) -> (&str, &str) {
        self.send.split_once(' ').unwrap_or(("GET", &self.send))
    }
}

/// `name: value`.
pub(super) fn header(line: &str) -> (&str, &str) {
    let (name, value) = line.split_once(':').unwrap_or((line, ""));
    (name.trim(), value.trim())
}

/// All cases of a folder, named `file/case`.
pub(super) fn load(folder: &Path) -> anyhow::Result<Vec<Case>> {
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .with_context(|| format!("reading {}", folder.display()))?
        .collect::<Result<Vec<_>, _>>()?
        .into_iter()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "yaml"))
        .collect();
    files.sort();
    let mut cases: Vec<Case> = Vec::new();
    for path in files {
        let stem = path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if stem == super::known::FILE {
            continue;
        }
        let text = std::fs::read_to_string(&path)?;
        let read = |text: &str| {
            serde_yaml::from_str::<File>(text)
                .with_context(|| format!("reading {}", path.display()))
        };
        let mut file = read(&text)?;
        if !file.words.is_empty() {
            let put = |text: String, (name, word): (&String, &String)| {
                text.replace(&format!("${{{name}}}"), word)
            };
            file = read(&file.words.iter().fold(text, put))?;
        }
        for mut case in file.cases {
            case.name = format!("{stem}/{}", case.name);
            ensure!(
                cases.iter().all(|known| known.name != case.name),
                "{} is there twice",
                case.name
            );
            ensure!(
                case.refused || case.server || !case.requests.is_empty(),
                "{} sends nothing",
                case.name
            );
            cases.push(case);
        }
    }
    Ok(cases)
}
