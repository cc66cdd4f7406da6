//! URI templates (`envoy.path.match.uri_template`, `envoy.path.rewrite.uri_template`): `/{country}/{lang=*}/**`.

use std::collections::BTreeSet;
use std::fmt::Write;

use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::extensions::path::r#match::uri_template::v3::UriTemplateMatchConfig;
use envoy_types::pb::envoy::extensions::path::rewrite::uri_template::v3::UriTemplateRewriteConfig;
use prost::Message;

use crate::error::{CompileError, Result};
use crate::regex::{Regex, escape};

/// Characters of a path segment (RFC 3986 section 3.3).
const SEGMENT: &str = "[^/]+";
/// Variables of one template, Envoy's limit.
const MOST_VARIABLES: usize = 5;

/// A path condition with variables.
#[derive(Debug, Clone)]
pub(crate) struct Template {
    regex: Regex,
}

/// What is made of a path that a [`Template`] has matched.
#[derive(Debug, Clone)]
pub(crate) struct TemplateRewrite {
    regex: Regex,
    /// In the form of [`Regex::expand`]: `${name}`.
    substitution: String,
}

impl Template {
    pub(crate) fn compile(m: &TypedExtensionConfig) -> Result<Self> {
        let config: UriTemplateMatchConfig = decode(m)?;
        let pattern = pattern(&config.path_template)?;
        Ok(Self {
            regex: Regex::new(&format!("^(?:{pattern})$"), false)?,
        })
    }

    pub(crate) fn matches(&self, path: &str) -> bool {
        self.regex.is_match(path)
    }

    /// The rewrite that belongs to this condition; it may use its variables only.
    pub(crate) fn rewrite(&self, m: &TypedExtensionConfig) -> Result<TemplateRewrite> {
        let config: UriTemplateRewriteConfig = decode(m)?;
        let text = &config.path_template_rewrite;
        let broken =
            |what: &str| CompileError::new("path_template_rewrite", format!("{text:?}: {what}"));
        if !text.starts_with('/') {
            return Err(broken("does not begin with a slash"));
        }
        let mut substitution = String::new();
        let mut rest = text.as_str();
        while let Some((before, tail)) = rest.split_once('{') {
            let (name, after) = tail
                .split_once('}')
                .ok_or_else(|| broken("a { without its }"))?;
            if !self.regex.has_group(name) {
                return Err(broken("uses a variable that the path does not have"));
            }
            substitution.push_str(&before.replace('$', "$$"));
            // Writing to a string cannot fail.
            let _ = write!(substitution, "${{{name}}}");
            rest = after;
        }
        substitution.push_str(&rest.replace('$', "$$"));
        Ok(TemplateRewrite {
            regex: self.regex.clone(),
            substitution,
        })
    }
}

impl TemplateRewrite {
    pub(crate) fn apply(&self, path: &str) -> String {
        let made = self.regex.expand(path, &self.substitution);
        made.unwrap_or_default()
    }
}

fn decode<M: Message + Default>(m: &TypedExtensionConfig) -> Result<M> {
    let any = m
        .typed_config
        .as_ref()
        .ok_or_else(|| CompileError::new("typed_config", "is missing"))?;
    if !any.type_url.contains(".uri_template.v3.") {
        return Err(CompileError::unsupported(any.type_url.clone()));
    }
    M::decode(any.value.as_slice())
        .map_err(|error| CompileError::new("typed_config", error.to_string()))
}

/// The template as a regular expression.
fn pattern(template: &str) -> Result<String> {
    let broken = |what: &str| CompileError::new("path_template", format!("{template:?}: {what}"));
    let Some(mut rest) = template.strip_prefix('/') else {
        return Err(broken("does not begin with a slash"));
    };
    let mut out = String::from("/");
    let mut names = BTreeSet::new();
    let mut open_ended = false;
    loop {
        if open_ended && !rest.is_empty() {
            return Err(broken("something follows **"));
        }
        let end = rest.find(['{', '*']).unwrap_or(rest.len());
        let (literal, tail) = rest.split_at(end);
        if literal.contains('}') {
            return Err(broken("a } without its {"));
        }
        out.push_str(&escape(literal));
        if let Some(tail) = tail.strip_prefix("**") {
            out.push_str(".*");
            (rest, open_ended) = (tail, true);
        } else if let Some(tail) = tail.strip_prefix('*') {
            out.push_str(SEGMENT);
            rest = tail;
        } else if let Some(tail) = tail.strip_prefix('{') {
            let (variable, tail) = tail
                .split_once('}')
                .ok_or_else(|| broken("a { without its }"))?;
            let (name, inner) = variable.split_once('=').unwrap_or((variable, "*"));
            let valid = name.starts_with(|c: char| c.is_ascii_alphabetic())
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
            if !valid || inner.is_empty() || inner.contains('{') {
                return Err(broken("a variable is {name} or {name=pattern}"));
            }
            if !names.insert(name) || names.len() > MOST_VARIABLES {
                return Err(broken("at most five variables, each of them once"));
            }
            let inner_out = match inner {
                "**" => ".*".to_owned(),
                inner => inner
                    .split('/')
                    .map(|part| match part {
                        "*" => SEGMENT.to_owned(),
                        "**" => ".*".to_owned(),
                        literal => escape(literal),
                    })
                    .collect::<Vec<_>>()
                    .join("/"),
            };
            let _ = write!(out, "(?P<{name}>{inner_out})");
            rest = tail;
            open_ended = inner.ends_with("**");
        } else {
            return Ok(out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(text: &str) -> Template {
        let pattern = pattern(text).expect(text);
        Template {
            regex: Regex::new(&format!("^(?:{pattern})$"), false).expect(text),
        }
    }

    fn rewritten(template: &Template, to: &str, path: &str) -> String {
        let config = UriTemplateRewriteConfig {
            path_template_rewrite: to.to_owned(),
        };
        let any = envoy_types::pb::google::protobuf::Any {
            type_url: "type.googleapis.com/envoy.extensions.path.rewrite.uri_template.v3.UriTemplateRewriteConfig".to_owned(),
            value: config.encode_to_vec(),
        };
        let config = TypedExtensionConfig {
            name: "envoy.path.rewrite.uri_template.uri_template_rewriter".to_owned(),
            typed_config: Some(any),
        };
        template.rewrite(&config).expect(to).apply(path)
    }

    #[test]
    fn templates_match_segments() {
        for (text, yes, no) in [
            ("/a/*/c", "/a/b/c", "/a/b/b/c"),
            ("/a/**", "/a/b/c", "/b"),
            ("/{country}/{lang}", "/de/en", "/de"),
            ("/v1/{path=**}", "/v1/x/y.js", "/v2/x"),
            ("/{x=videos/*}/play", "/videos/7/play", "/films/7/play"),
            ("/a.b/*", "/a.b/c", "/axb/c"),
        ] {
            let template = template(text);
            assert!(template.matches(yes), "{text} {yes}");
            assert!(!template.matches(no), "{text} {no}");
        }
    }

    #[test]
    fn rewrites_use_the_variables() {
        let template = template("/{country}/{lang}/{rest=**}");
        assert_eq!(
            rewritten(&template, "/x/{lang}-$1/{country}/{rest}", "/de/en/a/b"),
            "/x/en-$1/de/a/b"
        );
    }

    #[test]
    fn bad_templates_are_refused() {
        for text in [
            "a",
            "/{",
            "/}",
            "/{a}/{a}",
            "/{1}",
            "/**/a",
            "/{a=}",
            "/{a}/{b}/{c}/{d}/{e}/{f}",
        ] {
            assert!(pattern(text).is_err(), "{text}");
        }
    }
}
