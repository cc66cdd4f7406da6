//! The table of built-in images: what an image reference of a pod runs on the local cluster.
//!
//! A reference is matched by the last component of its path, without registry, tag or digest, so that
//! `registry.example/istio/examples-bookinfo-reviews-v2:1.20.3` and `example.internal:5000/x/examples-bookinfo-reviews-v2`
//! run the same program.

/// The binary that every built-in image runs, as it is bound into each container.
const MESH: &str = "/usr/local/bin/mesh";

/// One built-in image: the configuration that a real image would carry, without a file system of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Image {
    /// Last path component of the references that select this image.
    pub name: &'static str,
    /// The image's `ENTRYPOINT`; a container's `command` replaces it.
    pub entrypoint: &'static [&'static str],
    /// The image's `CMD`; a container's `args` replace it, and a `command` drops it.
    pub cmd: &'static [&'static str],
    /// Environment of the image; the container's own variables win over it.
    pub env: &'static [(&'static str, &'static str)],
    /// Numeric user that the image runs as; `None` leaves the choice to the node agent.
    pub user: Option<u32>,
    /// Working directory in the container.
    pub workdir: &'static str,
    /// Names to link to the binary in `/usr/local/bin`; called by such a name the binary is that program
    /// (see [`crate::applet`]).
    pub applets: &'static [&'static str],
}

/// Applets of the images that people exec into to send requests by hand.
const CLIENT_APPLETS: &[&str] = &["curl", "sleep"];

/// The binary itself by the name of Istio's agent, which hooks of the proxy's container call.
const AGENT_APPLETS: &[&str] = &["pilot-agent"];

const fn image(name: &'static str, entrypoint: &'static [&'static str]) -> Image {
    Image {
        name,
        entrypoint,
        cmd: &[],
        env: &[],
        user: None,
        workdir: "/",
        applets: CLIENT_APPLETS,
    }
}

const fn sample(
    name: &'static str,
    entrypoint: &'static [&'static str],
    env: &'static [(&'static str, &'static str)],
) -> Image {
    Image {
        env,
        user: Some(1000),
        ..image(name, entrypoint)
    }
}

const PRODUCTPAGE: &[&str] = &[MESH, "sample", "productpage"];
const DETAILS: &[&str] = &[MESH, "sample", "details"];
const RATINGS: &[&str] = &[MESH, "sample", "ratings"];
const REVIEWS: &[&str] = &[MESH, "sample", "reviews"];
const HELLOWORLD: &[&str] = &[MESH, "sample", "helloworld"];

/// All built-in images. Names are unique (a test checks it).
static IMAGES: &[Image] = &[
    // The mesh's own parts; the last two are the names that the field's manifests and annotations carry.
    Image {
        user: Some(1337),
        applets: AGENT_APPLETS,
        ..image("mesh", &[MESH])
    },
    Image {
        user: Some(1337),
        applets: AGENT_APPLETS,
        ..image("proxyv2", &[MESH])
    },
    Image {
        user: Some(1337),
        applets: &[],
        ..image("pilot", &[MESH])
    },
    // Bookinfo.
    sample("examples-bookinfo-productpage-v1", PRODUCTPAGE, &[]),
    sample(
        "examples-bookinfo-details-v1",
        DETAILS,
        &[("SERVICE_VERSION", "v1")],
    ),
    sample(
        "examples-bookinfo-details-v2",
        DETAILS,
        &[
            ("SERVICE_VERSION", "v2"),
            ("ENABLE_EXTERNAL_BOOK_SERVICE", "true"),
        ],
    ),
    sample(
        "examples-bookinfo-ratings-v1",
        RATINGS,
        &[("SERVICE_VERSION", "v1")],
    ),
    sample(
        "examples-bookinfo-ratings-v2",
        RATINGS,
        &[("SERVICE_VERSION", "v2")],
    ),
    sample(
        "examples-bookinfo-ratings-v-faulty",
        RATINGS,
        &[("SERVICE_VERSION", "v-faulty")],
    ),
    sample(
        "examples-bookinfo-ratings-v-delayed",
        RATINGS,
        &[("SERVICE_VERSION", "v-delayed")],
    ),
    sample(
        "examples-bookinfo-ratings-v-unavailable",
        RATINGS,
        &[("SERVICE_VERSION", "v-unavailable")],
    ),
    sample(
        "examples-bookinfo-ratings-v-unhealthy",
        RATINGS,
        &[("SERVICE_VERSION", "v-unhealthy")],
    ),
    sample(
        "examples-bookinfo-reviews-v1",
        REVIEWS,
        &[("SERVICE_VERSION", "v1"), ("ENABLE_RATINGS", "false")],
    ),
    sample(
        "examples-bookinfo-reviews-v2",
        REVIEWS,
        &[
            ("SERVICE_VERSION", "v2"),
            ("ENABLE_RATINGS", "true"),
            ("STAR_COLOR", "black"),
        ],
    ),
    sample(
        "examples-bookinfo-reviews-v3",
        REVIEWS,
        &[
            ("SERVICE_VERSION", "v3"),
            ("ENABLE_RATINGS", "true"),
            ("STAR_COLOR", "red"),
        ],
    ),
    // Others of the field's samples.
    sample(
        "examples-helloworld-v1",
        HELLOWORLD,
        &[("SERVICE_VERSION", "v1")],
    ),
    sample(
        "examples-helloworld-v2",
        HELLOWORLD,
        &[("SERVICE_VERSION", "v2")],
    ),
    Image {
        user: Some(65532),
        ..image("go-httpbin", &[MESH, "sample", "httpbin"])
    },
    image(
        "httpbin",
        &[MESH, "sample", "httpbin", "--port", "80", "--plain"],
    ),
    Image {
        user: Some(100),
        cmd: &["sleep", "infinity"],
        ..image("curl", &[])
    },
    Image {
        cmd: &["sleep", "infinity"],
        ..image("sleep", &[])
    },
    Image {
        cmd: &["sleep", "infinity"],
        ..image("busybox", &[])
    },
    Image {
        cmd: &["9000", "hello"],
        ..image("tcp-echo-server", &[MESH, "sample", "tcp-echo"])
    },
    Image {
        applets: &["fortio", "curl", "sleep"],
        ..image("fortio", &[MESH, "sample", "fortio"])
    },
    Image {
        applets: &["ratelimit", "curl", "sleep"],
        ..image("ratelimit", &[MESH, "sample", "ratelimit"])
    },
    Image {
        applets: &["ext-authz", "curl", "sleep"],
        ..image("ext-authz", &[MESH, "sample", "ext-authz"])
    },
    Image {
        applets: &["jwt-server", "curl", "sleep"],
        ..image("jwt-server", &[MESH, "sample", "jwt-server"])
    },
    // Plain web servers with pages that can be told apart.
    image("httpd", &[MESH, "sample", "web", "httpd"]),
    image("tomcat", &[MESH, "sample", "web", "tomcat"]),
    image("nginx", &[MESH, "sample", "web", "nginx"]),
];

/// The built-in image that `reference` selects, or `None` where there is none.
///
/// ```
/// let image = mesh_samples::images::lookup("registry.example/istio/examples-bookinfo-reviews-v2:1.20.3").unwrap();
/// assert_eq!(image.entrypoint, ["/usr/local/bin/mesh", "sample", "reviews"]);
/// ```
pub fn lookup(reference: &str) -> Option<&'static Image> {
    let name = last_component(reference);
    IMAGES.iter().find(|image| image.name == name)
}

/// All built-in images, in the order in which a message should list them.
pub fn known() -> impl Iterator<Item = &'static Image> {
    IMAGES.iter()
}

/// The name alone: no registry and path, no tag, no digest.
fn last_component(reference: &str) -> &str {
    let without_digest = reference
        .split_once('@')
        .map_or(reference, |(name, _)| name);
    // Only after the last slash is a colon the start of a tag; before it, it is a registry's port.
    let last = without_digest
        .rsplit_once('/')
        .map_or(without_digest, |(_, last)| last);
    last.split_once(':').map_or(last, |(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_matched_by_their_last_component() {
        for (reference, expected) in [
            (
                "istio/examples-bookinfo-details-v1:1.20.3",
                "examples-bookinfo-details-v1",
            ),
            (
                "registry.internal:5000/a/b/examples-bookinfo-details-v1",
                "examples-bookinfo-details-v1",
            ),
            (
                "registry.example/mccutchen/go-httpbin:v2.15.0",
                "go-httpbin",
            ),
            ("kennethreitz/httpbin", "httpbin"),
            ("curlimages/curl:8.16.0@sha256:00ff", "curl"),
            ("mesh:0.1.0", "mesh"),
            ("registry.example/istio/proxyv2:1.30.0", "proxyv2"),
            ("registry.example/busybox", "busybox"),
        ] {
            assert_eq!(
                lookup(reference).map(|image| image.name),
                Some(expected),
                "{reference}"
            );
        }
    }

    #[test]
    fn unknown_and_odd_references_select_nothing() {
        for reference in [
            "",
            "/",
            ":",
            "@",
            "redis:alpine",
            "examples-bookinfo-details-v1/other",
            "localhost:5000/",
        ] {
            assert_eq!(lookup(reference), None, "{reference}");
        }
    }

    #[test]
    fn names_are_unique_and_samples_exist() {
        let mut seen = std::collections::BTreeSet::new();
        for image in known() {
            assert!(seen.insert(image.name), "{} is listed twice", image.name);
            if let [_, "sample", name, ..] = image.entrypoint {
                assert!(
                    crate::names().any(|known| known == *name),
                    "{} runs the unknown sample {name}",
                    image.name
                );
            }
            for applet in image.applets {
                assert!(
                    crate::is_applet(applet) || AGENT_APPLETS.contains(applet),
                    "{} links the unknown applet {applet}",
                    image.name
                );
            }
        }
    }
}
