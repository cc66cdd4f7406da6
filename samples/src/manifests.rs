//! The samples' manifests, embedded so that the binary alone can apply them.

macro_rules! files {
    ($($path:literal),+ $(,)?) => { &[$(($path, include_str!(concat!("../", $path)))),+] };
}

/// A sample's name and its files (path below `samples/`, YAML text) in the order of applying.
type Sample = (&'static str, &'static [(&'static str, &'static str)]);

static SAMPLES: &[Sample] = &[
    (
        "bookinfo",
        files![
            "bookinfo/platform/kube/bookinfo.yaml",
            "bookinfo/networking/bookinfo-gateway.yaml"
        ],
    ),
    (
        "httpbin",
        files!["httpbin/httpbin.yaml", "httpbin/httpbin-gateway.yaml"],
    ),
    (
        "helloworld",
        files![
            "helloworld/helloworld.yaml",
            "helloworld/helloworld-gateway.yaml"
        ],
    ),
    ("curl", files!["curl/curl.yaml"]),
    ("sleep", files!["sleep/sleep.yaml"]),
    ("ext-authz", files!["ext-authz/ext-authz.yaml"]),
    ("jwt-server", files!["jwt-server/jwt-server.yaml"]),
    ("fortio", files!["httpbin/sample-client/fortio-deploy.yaml"]),
    (
        "ratelimit",
        files![
            "ratelimit/rate-limit-config.yaml",
            "ratelimit/rate-limit-service.yaml"
        ],
    ),
    ("tcp-echo", files!["tcp-echo/tcp-echo-services.yaml"]),
    ("web", files!["web/web.yaml"]),
];

/// Files of `sample`, or `None` where there is no such sample.
pub(crate) fn of(sample: &str) -> Option<Vec<(&'static str, &'static str)>> {
    SAMPLES
        .iter()
        .find(|(name, _)| *name == sample)
        .map(|(_, files)| files.to_vec())
}

/// Names that [`of`] knows.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    SAMPLES.iter().map(|(name, _)| *name)
}
