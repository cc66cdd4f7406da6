//! Control groups (version 2) for resource limits, where the machine lets us write them; elsewhere limits are reported, not enforced.

use std::fs;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::Container;

use super::env::quantity_value;

const MOUNT: &str = "/sys/fs/cgroup";
/// Processes a container may have: a fork bomb stays in its pod.
const PIDS_MAX: &str = "4096";
/// The period of the processor quota, in microseconds.
const CPU_PERIOD: f64 = 100_000.0;

/// The group that holds all containers' groups; `None` where there is no writable version 2 hierarchy with the controllers.
pub fn prepare(state: &Path) -> Option<PathBuf> {
    let controllers = fs::read_to_string(Path::new(MOUNT).join("cgroup.controllers")).ok()?;
    if !controllers.split_whitespace().any(|c| c == "memory") {
        return None;
    }
    let base = base(state);
    // What a run that was killed left behind is empty by now.
    remove(state);
    let enable = |dir: &Path| fs::write(dir.join("cgroup.subtree_control"), "+cpu +memory +pids");
    enable(Path::new(MOUNT)).ok()?;
    fs::create_dir_all(&base).ok()?;
    enable(&base).ok()?;
    Some(base)
}

fn base(state: &Path) -> PathBuf {
    let name: String = state
        .to_string_lossy()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    Path::new(MOUNT).join(format!("mesh{name}"))
}

/// Removes the groups of the cluster with this state directory once all its processes have ended.
pub fn remove(state: &Path) {
    let base = base(state);
    for entry in fs::read_dir(&base).into_iter().flatten().flatten() {
        let _ = fs::remove_dir(entry.path());
    }
    let _ = fs::remove_dir(&base);
}

/// Makes a container's group with its limits.
pub fn make(base: &Path, name: &str, container: &Container) -> std::io::Result<PathBuf> {
    let dir = base.join(name);
    fs::create_dir_all(&dir)?;
    for (file, value) in limits(container) {
        fs::write(dir.join(file), value)?;
    }
    Ok(dir)
}

fn limits(container: &Container) -> Vec<(&'static str, String)> {
    let limits = container.resources.as_ref().and_then(|r| r.limits.as_ref());
    let limit = |name: &str| {
        limits
            .and_then(|l| l.get(name))
            .and_then(|q| quantity_value(&q.0))
    };
    let mut out = vec![("pids.max", PIDS_MAX.to_owned())];
    if let Some(bytes) = limit("memory") {
        out.push(("memory.max", format!("{bytes:.0}")));
    }
    if let Some(cpus) = limit("cpu") {
        out.push((
            "cpu.max",
            format!("{:.0} {CPU_PERIOD:.0}", cpus * CPU_PERIOD),
        ));
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn limits_in_the_kernels_units() {
        let container: Container = serde_json::from_value(
            json!({"name": "c", "resources": {"limits": {"cpu": "500m", "memory": "1Mi"}}}),
        )
        .unwrap();
        let expected = [
            ("pids.max", "4096".to_owned()),
            ("memory.max", "1048576".to_owned()),
            ("cpu.max", "50000 100000".to_owned()),
        ];
        assert_eq!(limits(&container), expected);
    }
}
