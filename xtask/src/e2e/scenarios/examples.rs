//! The recipes of `examples/`, each with its `check.yaml`: what has to be seen once its files are applied.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde::Deserialize;

use super::counted::rolled_out;
use super::samples::sample;
use crate::e2e::cluster::Cluster;

/// A folder of `examples/`; part of the program, which runs where there is no work tree.
pub struct Example {
    name: &'static str,
    check: &'static str,
    files: &'static [(&'static str, &'static str)],
}

macro_rules! example {
    ($name:literal, [$($file:literal),+]) => {
        Example {
            name: $name,
            check: include_str!(concat!("../../../../examples/", $name, "/check.yaml")),
            files: &[$(($file, include_str!(concat!("../../../../examples/", $name, "/", $file)))),+],
        }
    };
}

pub(super) const CANARY: Example = example!(
    "canary",
    ["subsets.yaml", "90-10.yaml", "50-50.yaml", "all-v2.yaml"]
);
pub(super) const HEADER_ROUTING: Example = example!("header-routing", ["helloworld.yaml"]);
pub(super) const FAULT_INJECTION: Example = example!("fault-injection", ["httpbin.yaml"]);
pub(super) const CIRCUIT_BREAKER: Example = example!("circuit-breaker", ["httpbin.yaml"]);
pub(super) const MIRRORING: Example = example!("mirroring", ["helloworld.yaml"]);
pub(super) const RETRIES: Example = example!("retries", ["httpbin.yaml"]);
pub(super) const OUTLIER_DETECTION: Example = example!("outlier-detection", ["fragile.yaml"]);
pub(super) const LOCALITY_FAILOVER: Example = example!("locality-failover", ["regional.yaml"]);
pub(super) const STICKY_SESSIONS: Example = example!("sticky-sessions", ["helloworld.yaml"]);
pub(super) const LOCAL_RATE_LIMIT: Example = example!("local-rate-limit", ["httpbin.yaml"]);
pub(super) const GLOBAL_RATE_LIMIT: Example = example!("global-rate-limit", ["gateway.yaml"]);

/// Samples that an example may ask for, beside those that every cluster of the walk has.
const SAMPLES: &[(&str, &[&str])] = &[(
    "ratelimit",
    &[
        sample!("ratelimit/rate-limit-config.yaml"),
        sample!("ratelimit/rate-limit-service.yaml"),
    ],
)];

/// `check.yaml`; `examples/README.md` describes it for its readers.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Check {
    #[serde(default)]
    samples: Vec<String>,
    steps: Vec<Step>,
    /// What has to be true again after everything was deleted.
    #[serde(default)]
    undone: Vec<Step>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Step {
    says: String,
    #[serde(default)]
    apply: Vec<String>,
    #[serde(default = "client")]
    from: String,
    get: String,
    #[serde(default)]
    headers: Vec<String>,
    #[serde(default = "once")]
    times: usize,
    #[serde(default)]
    at_once: bool,
    answers: Vec<Expected>,
    #[serde(default)]
    all_alike: bool,
    #[serde(default)]
    logs: Vec<Log>,
    /// Seconds from the beginning of the step until it is as it says.
    takes: Option<[f64; 2]>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Expected {
    status: u16,
    #[serde(default)]
    contains: String,
    #[serde(default)]
    header: String,
    seconds: Option<[f64; 2]>,
    percent: Option<f64>,
    #[serde(default = "tolerance")]
    within: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Log {
    pods: String,
    container: String,
    contains: String,
    times: usize,
}

fn client() -> String {
    "app=curl".to_owned()
}

fn once() -> usize {
    1
}

fn tolerance() -> f64 {
    10.0
}

/// Applies, checks step by step, deletes, and checks what has to be true then.
pub(super) fn run(cluster: &Cluster, example: &Example) -> anyhow::Result<()> {
    let check = example.parsed()?;
    let mut applied = Vec::new();
    for name in &check.samples {
        for text in sample_files(name)? {
            apply(cluster, text, &mut applied)?;
        }
    }
    for step in &check.steps {
        for file in &step.apply {
            apply(cluster, example.file(file)?, &mut applied)?;
        }
        step.hold(cluster)?;
    }
    for text in applied.iter().rev() {
        cluster.delete_all(text).context("cleaning up")?;
    }
    check.undone.iter().try_for_each(|step| step.hold(cluster))
}

/// Applies a text and waits for the Deployments in it.
fn apply(
    cluster: &Cluster,
    text: &'static str,
    applied: &mut Vec<&'static str>,
) -> anyhow::Result<()> {
    cluster.apply(text)?;
    applied.push(text);
    for document in serde_yaml::Deserializer::from_str(text) {
        let object = serde_json::Value::deserialize(document)?;
        if object["kind"] == "Deployment" {
            rolled_out(cluster, object["metadata"]["name"].as_str().unwrap_or(""))?;
        }
    }
    Ok(())
}

fn sample_files(name: &str) -> anyhow::Result<&'static [&'static str]> {
    let found = SAMPLES.iter().find(|(known, _)| *known == name);
    let (_, files) = found.with_context(|| format!("no sample {name:?} for examples"))?;
    Ok(files)
}

impl Example {
    fn parsed(&self) -> anyhow::Result<Check> {
        serde_yaml::from_str(self.check)
            .with_context(|| format!("reading examples/{}/check.yaml", self.name))
    }

    fn file(&self, name: &str) -> anyhow::Result<&'static str> {
        let found = self.files.iter().find(|(file, _)| *file == name);
        found.map(|(_, text)| *text).with_context(|| {
            format!(
                "examples/{}/check.yaml applies {name:?}, which is no file of the example",
                self.name
            )
        })
    }
}

/// One answer as curl showed it: headers and body in one line.
struct Answer<'a> {
    text: &'a str,
    status: u16,
    seconds: f64,
}

impl Step {
    fn hold(&self, cluster: &Cluster) -> anyhow::Result<()> {
        let began = Instant::now();
        let mut try_number = 0;
        cluster.wait(&self.says, || {
            try_number += 1;
            let run = format!("{}-{try_number}", began.elapsed().as_nanos());
            self.seen(cluster, &run).map(Some)
        })?;
        if let Some([least, most]) = self.takes {
            let took = began.elapsed().as_secs_f64();
            ensure!(
                (least..=most).contains(&took),
                "{:?} took {took:.1} s, not {least} to {most}",
                self.says
            );
        }
        Ok(())
    }

    /// Sends the requests once and compares.
    fn seen(&self, cluster: &Cluster, run: &str) -> anyhow::Result<()> {
        let pods = cluster.pods(&self.from)?;
        let pod = pods
            .first()
            .with_context(|| format!("no pod {}", self.from))?;
        let printed = cluster.exec(pod, "curl", &["sh", "-c", &self.script(run)])?;
        let answers = printed
            .lines()
            .map(Answer::parse)
            .collect::<anyhow::Result<Vec<_>>>()?;
        ensure!(
            answers.len() == self.times,
            "{} requests brought {} answers: {printed}",
            self.times,
            answers.len()
        );
        self.shares(&answers)?;
        if self.all_alike {
            let bodies: std::collections::BTreeSet<_> =
                answers.iter().map(|answer| answer.body()).collect();
            ensure!(bodies.len() == 1, "the answers differ: {bodies:?}");
        }
        self.logs
            .iter()
            .try_for_each(|log| log.compare(cluster, run))
    }

    /// One process a request and one exec for all of them; `NUMBER` is the request's, `RUN` that of the try.
    fn script(&self, run: &str) -> String {
        let headers: String = self
            .headers
            .iter()
            .map(|header| format!(" -H '{header}'"))
            .collect();
        let call = format!(
            "curl -sS -i --max-time 15 -w ' %{{http_code}} %{{time_total}}'{headers} '{}'",
            self.get
        )
        .replace("NUMBER", "'\"$n\"'")
        .replace("RUN", run);
        let (end, wait) = if self.at_once {
            ("&", "; wait")
        } else {
            (";", "")
        };
        format!(
            "for n in $(seq {}); do {{ line=$({call} | tr '\\r\\n' '  '); printf '%s\\n' \"$line\"; }} {end} done{wait}",
            self.times
        )
    }

    /// Every answer is one of the expected ones, and each of those has its share.
    fn shares(&self, answers: &[Answer<'_>]) -> anyhow::Result<()> {
        let mut counts: BTreeMap<usize, u32> = BTreeMap::new();
        for answer in answers {
            let Some(which) = self.answers.iter().position(|e| e.covers(answer)) else {
                bail!(
                    "an answer that is not expected, after {:.3} s: {}",
                    answer.seconds,
                    answer.text
                );
            };
            *counts.entry(which).or_default() += 1;
        }
        let all = u32::try_from(answers.len())?;
        for (which, expected) in self.answers.iter().enumerate() {
            let count = counts.get(&which).copied().unwrap_or(0);
            let found = 100.0 * f64::from(count) / f64::from(all);
            if let Some(percent) = expected.percent {
                ensure!(
                    (found - percent).abs() <= expected.within,
                    "{found:.1} % of the answers are {} {:?}, not {percent} within {}",
                    expected.status,
                    expected.contains,
                    expected.within
                );
            }
        }
        Ok(())
    }
}

impl<'a> Answer<'a> {
    fn parse(line: &'a str) -> anyhow::Result<Self> {
        let mut words = line.trim_end().rsplit(' ');
        let mut word = || words.next().unwrap_or_default();
        let (seconds, status) = (word(), word());
        Ok(Self {
            text: line,
            status: status.parse().with_context(|| line.to_owned())?,
            seconds: seconds.parse().with_context(|| line.to_owned())?,
        })
    }

    /// What follows the empty line behind the headers, without curl's own words at the end.
    fn body(&self) -> &'a str {
        let body = self.text.split_once("    ").map_or("", |(_, body)| body);
        body.trim_end()
            .rsplitn(3, ' ')
            .nth(2)
            .unwrap_or_default()
            .trim()
    }
}

impl Expected {
    fn covers(&self, answer: &Answer<'_>) -> bool {
        self.status == answer.status
            && answer.text.contains(&self.contains)
            && answer.text.contains(&self.header)
            && self
                .seconds
                .is_none_or(|[least, most]| (least..=most).contains(&answer.seconds))
    }
}

impl Log {
    /// Copies and lines of a log may come a moment after the answer; what is too much stays too much.
    fn compare(&self, cluster: &Cluster, run: &str) -> anyhow::Result<()> {
        let wanted = self.contains.replace("RUN", run);
        let began = Instant::now();
        loop {
            let mut found = 0;
            for pod in cluster.pods(&self.pods)? {
                let log = cluster.call(&["logs", &pod, "-c", &self.container])?;
                found += log.lines().filter(|line| line.contains(&wanted)).count();
            }
            if found == self.times {
                return Ok(());
            }
            ensure!(
                found < self.times && began.elapsed() < Duration::from_secs(1),
                "{} shows {wanted:?} {found} times, not {}",
                self.pods,
                self.times
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const EXAMPLES: [Example; 11] = [
        CANARY,
        HEADER_ROUTING,
        FAULT_INJECTION,
        CIRCUIT_BREAKER,
        MIRRORING,
        RETRIES,
        OUTLIER_DETECTION,
        LOCALITY_FAILOVER,
        STICKY_SESSIONS,
        LOCAL_RATE_LIMIT,
        GLOBAL_RATE_LIMIT,
    ];

    /// Every folder is in the table with all its files, each is applied by its check, and the walk runs it.
    #[test]
    fn every_example_is_checked() {
        let root = crate::run::root().join("examples");
        let mut folders = BTreeSet::new();
        for entry in std::fs::read_dir(&root).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                folders.insert(entry.file_name().into_string().unwrap());
            }
        }
        let names: BTreeSet<_> = EXAMPLES.iter().map(|e| e.name.to_owned()).collect();
        assert_eq!(folders, names);
        let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
        for example in EXAMPLES {
            let check = example.parsed().unwrap();
            let applied: BTreeSet<_> = check
                .steps
                .iter()
                .flat_map(|step| step.apply.iter().cloned())
                .collect();
            let files = std::fs::read_dir(root.join(example.name))
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .filter(|name| name != "README.md" && name != "check.yaml");
            assert_eq!(applied, files.collect(), "{}", example.name);
            assert!(root.join(example.name).join("README.md").exists());
            let walk = format!("example {}", example.name);
            assert!(
                super::super::ALL.iter().any(|(name, _)| *name == walk),
                "{walk}"
            );
            assert!(
                readme.contains(&format!("({}/)", example.name)),
                "{}",
                example.name
            );
        }
    }

    #[test]
    fn answers_are_read() {
        let line = "HTTP/1.1 200 OK  content-length: 3  x-a: b    one two  200 0.012";
        let answer = Answer::parse(line).unwrap();
        assert_eq!((answer.status, answer.body()), (200, "one two"));
        let expected = |yaml: &str| serde_yaml::from_str::<Expected>(yaml).unwrap();
        assert!(expected("{status: 200, contains: two, seconds: [0.0, 0.1]}").covers(&answer));
        for wrong in [
            "{status: 503}",
            "{status: 200, contains: three}",
            "{status: 200, seconds: [1.0, 2.0]}",
            "{status: 200, header: 'x-a: c'}",
        ] {
            assert!(!expected(wrong).covers(&answer), "{wrong}");
        }
        assert!(Answer::parse("curl: (7) Failed to connect").is_err());
    }
}
