//! kind: Kubernetes nodes as Docker containers (kind's documentation, "Quick Start" and "Loading an Image Into Your Cluster").

use std::path::{Path, PathBuf};

use anyhow::ensure;

use super::Provider;
use super::shell::Shell;

/// One cluster of kind.
pub struct Kind {
    /// Its name.
    pub name: String,
    /// Version of its nodes; kind's own default if none.
    pub version: Option<String>,
    /// The kubeconfig that kind writes.
    pub kubeconfig: PathBuf,
}

impl Provider for Kind {
    fn program(&self) -> &'static str {
        "kind"
    }

    fn create(&self, shell: &mut dyn Shell) -> anyhow::Result<()> {
        let there = shell.output(&["kind", "get", "clusters"])?;
        ensure!(
            !there.lines().any(|line| line == self.name),
            "a kind cluster of the name {0} is there already; delete it with `kind delete cluster --name {0}`, or choose another name with --cluster-name",
            self.name
        );
        let kubeconfig = self.kubeconfig.to_string_lossy();
        let mut create = vec![
            "kind",
            "create",
            "cluster",
            "--name",
            &self.name,
            "--kubeconfig",
            &kubeconfig,
            "--wait",
            "180s",
        ];
        let image = self
            .version
            .as_ref()
            .map(|version| format!("kindest/node:{version}"));
        if let Some(image) = &image {
            create.extend(["--image", image]);
        }
        shell.check(&create)
    }

    fn load(&self, shell: &mut dyn Shell, archive: &Path) -> anyhow::Result<()> {
        let archive = archive.to_string_lossy();
        shell.check(&[
            "kind",
            "load",
            "image-archive",
            &archive,
            "--name",
            &self.name,
        ])
    }

    fn logs(&self, shell: &mut dyn Shell, folder: &Path) -> anyhow::Result<()> {
        let folder = folder.join("nodes");
        let folder = folder.to_string_lossy();
        shell.check(&["kind", "export", "logs", &folder, "--name", &self.name])
    }

    fn delete(&self, shell: &mut dyn Shell) -> anyhow::Result<()> {
        let kubeconfig = self.kubeconfig.to_string_lossy();
        shell.check(&[
            "kind",
            "delete",
            "cluster",
            "--name",
            &self.name,
            "--kubeconfig",
            &kubeconfig,
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::super::shell::Recorded;
    use super::*;

    fn kind(version: Option<&str>) -> Kind {
        Kind {
            name: "mesh-e2e".to_owned(),
            version: version.map(str::to_owned),
            kubeconfig: PathBuf::from("/place/kubeconfig"),
        }
    }

    #[test]
    fn a_cluster_is_made_loaded_asked_and_deleted() -> anyhow::Result<()> {
        let mut shell = Recorded::new(include_str!("kind.txt"));
        let kind = kind(Some("v1.36.4"));
        kind.create(&mut shell)?;
        kind.load(&mut shell, Path::new("/place/mesh.tar"))?;
        kind.logs(&mut shell, Path::new("/place/failure"))?;
        kind.delete(&mut shell)?;
        assert!(shell.ended());
        Ok(())
    }

    #[test]
    fn somebody_elses_cluster_is_left_alone() {
        let mut shell = Recorded::new("$ kind get clusters\nother\nmesh-e2e");
        let error = kind(None).create(&mut shell).unwrap_err().to_string();
        assert!(
            error.contains("kind delete cluster --name mesh-e2e"),
            "{error}"
        );
        assert!(shell.ended());
    }

    #[test]
    fn kinds_own_default_version_and_its_failure() {
        let recording = "$ kind get clusters\nNo kind clusters found.\n$ kind create cluster --name mesh-e2e --kubeconfig /place/kubeconfig --wait 180s\n! failed to create cluster: Cannot connect to the Docker daemon";
        let mut shell = Recorded::new(recording);
        let error = kind(None).create(&mut shell).unwrap_err().to_string();
        assert!(error.contains("Docker daemon"), "{error}");
    }
}
