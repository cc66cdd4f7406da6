//! Rules for Telemetry, WasmPlugin and TrafficExtension.

use std::collections::HashSet;

use crate::extensions::wasm_plugin::{EnvValueSource, VmConfig};
use crate::extensions::{TrafficExtension, WasmPlugin};
use crate::telemetry::{CustomTag, ProviderRef, TagOperation, Telemetry};

use super::{Check, Validate, names};

impl Validate for Telemetry {
    fn validate(&self, check: &mut Check) {
        names::attachment(
            self.selector.as_ref(),
            self.target_ref.as_ref(),
            &self.target_refs,
            check,
        );
        if self.tracing.len() > 1 {
            check.warn_at("tracing", "only the first entry is used");
        }
        check.each("tracing", &self.tracing, |check, tracing| {
            if tracing
                .random_sampling_percentage
                .is_some_and(|share| !(0.0..=100.0).contains(&share))
            {
                check.error_at(
                    "randomSamplingPercentage",
                    "a share is a number from 0 to 100",
                );
            }
            if tracing.providers.len() > 1 {
                check.warn_at("providers", "only the first provider is used");
            }
            providers(&tracing.providers, check);
            for (name, tag) in &tracing.custom_tags {
                check.at(&format!("customTags[{name}]"), |check| {
                    if name.is_empty() {
                        check.error("a tag needs a name");
                    }
                    custom_tag(tag, check);
                });
            }
        });
        check.each("accessLogging", &self.access_logging, |check, logging| {
            providers(&logging.providers, check);
            if let Some(filter) = &logging.filter {
                check.at("filter.expression", |check| {
                    expression(&filter.expression, check)
                });
            }
        });
        check.each("metrics", &self.metrics, |check, metrics| {
            providers(&metrics.providers, check);
            check.each("overrides", &metrics.overrides, |check, change| {
                for (tag, change) in &change.tag_overrides {
                    let valued = !change.value.is_empty();
                    let right = if change.operation == TagOperation::Upsert {
                        valued
                    } else {
                        !valued
                    };
                    check.require(
                        right,
                        &format!("tagOverrides[{tag}].value"),
                        "UPSERT needs a value, REMOVE takes none",
                    );
                }
            });
        });
    }
}

fn providers(list: &[ProviderRef], check: &mut Check) {
    check.each("providers", list, |check, provider| {
        check.require(
            !provider.name.is_empty(),
            "name",
            "empty; write the name of a provider of the mesh configuration",
        );
    });
}

fn custom_tag(tag: &CustomTag, check: &mut Check) {
    let (field, text) = match tag {
        CustomTag::Literal(literal) => ("literal.value", &literal.value),
        CustomTag::Environment(environment) => ("environment.name", &environment.name),
        CustomTag::Header(header) => ("header.name", &header.name),
        CustomTag::Formatter(formatter) => ("formatter.value", &formatter.value),
    };
    check.require(!text.is_empty(), field, "empty");
}

/// Checks the outside of an expression in CEL: quotes are closed, brackets come in pairs.
fn expression(text: &str, check: &mut Check) {
    if text.trim().is_empty() {
        return check.error("empty; write a condition such as \"response.code >= 500\"");
    }
    let mut open = Vec::new();
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '(' => open.push(')'),
            '[' => open.push(']'),
            '{' => open.push('}'),
            ')' | ']' | '}' if open.pop() != Some(letter) => {
                return check.error(format!("{text:?} has a {letter:?} that closes nothing"));
            }
            '"' | '\'' => {
                let mut escaped = false;
                let closed = letters.any(|inner| {
                    let end = inner == letter && !escaped;
                    escaped = inner == '\\' && !escaped;
                    end
                });
                if !closed {
                    return check.error(format!("{text:?} has a quote that is not closed"));
                }
            }
            _ => {}
        }
    }
    if let Some(missing) = open.last() {
        check.error(format!("{text:?} lacks a {missing:?}"));
    }
}

impl Validate for WasmPlugin {
    fn validate(&self, check: &mut Check) {
        names::attachment(
            self.selector.as_ref(),
            self.target_ref.as_ref(),
            &self.target_refs,
            check,
        );
        wasm_source(&self.url, &self.sha256, check);
        vm_config(self.vm_config.as_ref(), check);
    }
}

impl Validate for TrafficExtension {
    fn validate(&self, check: &mut Check) {
        names::attachment(self.selector.as_ref(), None, &self.target_refs, check);
        match (&self.wasm, &self.lua) {
            (Some(wasm), None) => check.at("wasm", |check| {
                wasm_source(&wasm.url, &wasm.sha256, check);
                vm_config(wasm.vm_config.as_ref(), check);
            }),
            (None, Some(lua)) => {
                check.require(
                    (1..=65536).contains(&lua.inline_code.len()),
                    "lua.inlineCode",
                    "a script has 1 to 65536 characters",
                );
            }
            _ => check.error("exactly one of wasm and lua has to be given"),
        }
    }
}

fn wasm_source(url: &str, sha256: &str, check: &mut Check) {
    let scheme = url.split_once("://").map_or("", |(scheme, _)| scheme);
    check.require(!url.is_empty(), "url", "empty; write where the module is");
    check.require(
        matches!(scheme, "" | "http" | "https" | "oci" | "file"),
        "url",
        "the scheme is http, https, oci or file",
    );
    let digest =
        sha256.is_empty() || (sha256.len() == 64 && sha256.bytes().all(|b| b.is_ascii_hexdigit()));
    check.require(digest, "sha256", "a digest has 64 hex digits");
    if let Some((_, named)) = url.rsplit_once("@sha256:") {
        check.require(
            sha256.is_empty() || named.eq_ignore_ascii_case(sha256),
            "sha256",
            "differs from the digest in url; leave one of them out",
        );
    }
}

fn vm_config(config: Option<&VmConfig>, check: &mut Check) {
    let mut seen = HashSet::new();
    let env = config.map_or(&[][..], |config| &config.env);
    check.each("vmConfig.env", env, |check, variable| {
        check.require(
            seen.insert(&variable.name),
            "name",
            "this variable is there twice",
        );
        check.require(!variable.name.is_empty(), "name", "empty");
        let host = variable.value_from == EnvValueSource::Host && !variable.value.is_empty();
        check.require(!host, "value", "a value from the HOST can't be given here");
    });
}
