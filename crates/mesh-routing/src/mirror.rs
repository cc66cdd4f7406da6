//! Copies of requests: `request_mirror_policies`.

use std::sync::Arc;

use envoy_types::pb::envoy::config::common::mutation_rules::v3::HeaderMutation;
use envoy_types::pb::envoy::config::common::mutation_rules::v3::header_mutation::Action;
use envoy_types::pb::envoy::config::route::v3::route_action as pb;
use http::{HeaderName, HeaderValue};

use crate::error::{CompileError, Result, Within, every_field};
use crate::filter::Percent;
use crate::headers::HeaderOps;
use crate::route::RequestView;

/// A cluster that gets a copy of requests; its answers are discarded.
#[derive(Debug)]
pub struct Mirror {
    cluster: Target,
    fraction: Percent,
    /// Mutations of the copy alone.
    pub request_ops: HeaderOps,
    host: Option<HeaderValue>,
    append_suffix: bool,
}

#[derive(Debug)]
enum Target {
    Named(Arc<str>),
    Header(HeaderName),
}

impl Mirror {
    /// Compiles the policies of one level.
    pub(crate) fn compile_all(list: &[pb::RequestMirrorPolicy]) -> Result<Vec<Self>> {
        let mut all = Vec::with_capacity(list.len());
        for (i, policy) in list.iter().enumerate() {
            all.push(Self::compile(policy).within(format_args!("request_mirror_policies[{i}]"))?);
        }
        Ok(all)
    }

    fn compile(m: &pb::RequestMirrorPolicy) -> Result<Self> {
        every_field!(m, pb::RequestMirrorPolicy,
            used {
                cluster, cluster_header, runtime_fraction, disable_shadow_host_suffix_append, request_headers_mutations,
                host_rewrite_literal,
            }
            // Tracing is refused in the connection manager.
            irrelevant { trace_sampled }
            refused {});
        let cluster = match (m.cluster.as_str(), m.cluster_header.as_str()) {
            ("", "") => return Err(CompileError::new("cluster", "is missing")),
            ("", header) => Target::Header(
                header
                    .parse()
                    .map_err(|_| CompileError::new("cluster_header", "is not a header name"))?,
            ),
            (cluster, "") => Target::Named(cluster.into()),
            _ => {
                return Err(CompileError::new(
                    "cluster",
                    "cannot be combined with cluster_header",
                ));
            }
        };
        let host =
            match m.host_rewrite_literal.as_str() {
                "" => None,
                host => Some(HeaderValue::from_str(host).map_err(|_| {
                    CompileError::new("host_rewrite_literal", "is not a header value")
                })?),
            };
        Ok(Self {
            cluster,
            fraction: Percent::of_runtime(m.runtime_fraction.as_ref(), Percent::ALL)
                .within("runtime_fraction")?,
            request_ops: compile_mutations(&m.request_headers_mutations)
                .within("request_headers_mutations")?,
            host,
            append_suffix: !m.disable_shadow_host_suffix_append,
        })
    }

    /// The cluster that gets a copy of this request, if it is one of those to be copied.
    pub fn target(&self, request: &RequestView<'_>, random: u64) -> Option<Arc<str>> {
        if !self.fraction.covers(random) {
            return None;
        }
        match &self.cluster {
            Target::Named(name) => Some(name.clone()),
            Target::Header(header) => Some(request.headers.get(header)?.to_str().ok()?.into()),
        }
    }

    /// The authority of the copy: `-shadow` goes behind the host, before the port.
    pub fn host(&self, host: &HeaderValue) -> HeaderValue {
        if let Some(host) = &self.host {
            return host.clone();
        }
        if !self.append_suffix {
            return host.clone();
        }
        let text = host.to_str().unwrap_or("");
        let (name, port) = crate::rewrite::split_port(text);
        let shadow = match port {
            Some(port) => format!("{name}-shadow:{port}"),
            None => format!("{name}-shadow"),
        };
        HeaderValue::try_from(shadow).unwrap_or_else(|_| host.clone())
    }
}

fn compile_mutations(list: &[HeaderMutation]) -> Result<HeaderOps> {
    let mut ops = HeaderOps::default();
    for mutation in list {
        let next = match &mutation.action {
            Some(Action::Remove(name)) => HeaderOps::compile(&[], std::slice::from_ref(name))?,
            Some(Action::Append(option)) => HeaderOps::compile(std::slice::from_ref(option), &[])?,
            Some(Action::RemoveOnMatch(_)) => {
                return Err(CompileError::unsupported("remove_on_match"));
            }
            None => return Err(CompileError::new("action", "is missing")),
        };
        ops = ops.then(&next);
    }
    Ok(ops)
}
