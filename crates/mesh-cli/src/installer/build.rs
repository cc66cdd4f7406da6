//! Which build of this program installs. Images are replaced under the same tag while something is developed, and a tag that stays changes no
//! pod template: so the templates say which program made them, and a newer one makes new pods, which take the image as it is then.

use std::hash::Hasher as _;
use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::install::Plan;

/// Annotation of pod templates.
const BUILD: &str = "install.mesh/build";

/// Marks the pod templates of a plan. Without a program that can be read they stay as they are.
pub(crate) fn mark(plan: &mut Plan) {
    let Some(build) = id() else {
        return;
    };
    for component in &mut plan.components {
        for object in deployments(&mut component.objects) {
            object["spec"]["template"]["metadata"]["annotations"][BUILD] = json!(build);
        }
    }
}

fn deployments(objects: &mut [Value]) -> impl Iterator<Item = &mut Value> {
    objects
        .iter_mut()
        .filter(|object| object["kind"] == "Deployment")
}

/// The object with the mark of one that is there: which build it was is no difference.
pub(crate) fn as_marked(object: &Value, live: &Value) -> Value {
    let pointer = format!(
        "/spec/template/metadata/annotations/{}",
        BUILD.replace('/', "~1")
    );
    let mut object = object.clone();
    if let Some(build) = live.pointer(&pointer)
        && object["kind"] == "Deployment"
    {
        object["spec"]["template"]["metadata"]["annotations"][BUILD] = build.clone();
    }
    object
}

/// The same for the same program file, another for another.
fn id() -> Option<&'static str> {
    static ID: OnceLock<Option<String>> = OnceLock::new();
    let read = || {
        let program = std::fs::read(std::env::current_exe().ok()?).ok()?;
        // Nobody gains anything by programs that collide.
        let mut hasher = std::hash::DefaultHasher::new();
        hasher.write(&program);
        Some(format!("{:016x}", hasher.finish()))
    };
    ID.get_or_init(read).as_deref()
}
