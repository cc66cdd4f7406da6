//! Which templates a pod gets: the built-in sidecar or gateway, and overlays of the ConfigMap.

use serde_json::Value;

use crate::{InjectContext, InjectError, PodView};

const ASKED: &str = "inject.istio.io/templates";
/// Aliases may name aliases, this deep.
const DEPTH: usize = 8;
/// So many templates may be behind one name; who has more has a circle.
const MOST: usize = 64;

/// A template that is built in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Builtin {
    /// A proxy beside the application.
    Sidecar,
    /// The proxy is the application.
    Gateway,
}

/// The templates of a pod.
pub(crate) struct Chosen<'a> {
    /// At most one of the built-in ones.
    pub(crate) builtin: Option<Builtin>,
    /// Overlays, in the order in which they are laid on.
    pub(crate) overlays: Vec<&'a Value>,
}

impl<'a> Chosen<'a> {
    /// Reads what a pod asks for, else takes the default of the configuration.
    pub(crate) fn of(
        pod: &PodView<'_>,
        context: &InjectContext<'a>,
        warnings: &mut Vec<String>,
    ) -> Result<Self, InjectError> {
        let config = context.config;
        let mut names = Vec::new();
        match pod.annotation(ASKED) {
            Some(list) => {
                let each = list.split(',').map(str::trim).filter(|n| !n.is_empty());
                each.for_each(|name| expand(name, context, DEPTH, &mut names));
            }
            None => config
                .default_templates
                .iter()
                .for_each(|name| expand(name, context, DEPTH, &mut names)),
        }
        let mut chosen = Self {
            builtin: None,
            overlays: Vec::new(),
        };
        for name in &names {
            match (name.as_str(), config.templates.get(name)) {
                ("gateway", _) => chosen.builtin = Some(Builtin::Gateway),
                ("sidecar", _) if chosen.builtin.is_none() => {
                    chosen.builtin = Some(Builtin::Sidecar);
                }
                ("sidecar", _) => {}
                (_, Some(overlay)) => chosen.overlays.push(overlay),
                (other, None) => return Err(unknown(other, context)),
            }
        }
        if chosen.builtin == Some(Builtin::Gateway) && names.iter().any(|name| name == "sidecar") {
            warnings.push(format!(
                "{ASKED}: a gateway needs no sidecar; of the two only the template \"gateway\" is used"
            ));
        }
        Ok(chosen)
    }
}

/// The templates behind a name, which may be an alias.
fn expand(name: &str, context: &InjectContext<'_>, depth: usize, into: &mut Vec<String>) {
    if into.len() >= MOST {
        return;
    }
    match context.config.aliases.get(name) {
        Some(names) if depth > 0 => {
            for behind in names {
                // An alias may have the name of a template, as `sidecar: [sidecar, extra]`.
                if behind == name {
                    into.push(behind.clone());
                } else {
                    expand(behind, context, depth - 1, into);
                }
            }
        }
        _ => into.push(name.to_owned()),
    }
}

fn unknown(name: &str, context: &InjectContext<'_>) -> InjectError {
    let mut available = vec!["sidecar", "gateway"];
    available.extend(context.config.templates.keys().map(String::as_str));
    available.extend(context.config.aliases.keys().map(String::as_str));
    let available: Vec<String> = available.iter().map(|name| format!("{name:?}")).collect();
    InjectError::Template {
        name: name.to_owned(),
        available: available.join(", "),
    }
}
