//! minikube: a Kubernetes node in a container or a virtual machine (minikube's documentation, "Commands").

use std::path::Path;

use anyhow::{Context, ensure};
use serde_json::Value;

use super::Provider;
use super::shell::Shell;

/// One profile of minikube. It writes the kubeconfig that `KUBECONFIG` names.
pub struct Minikube {
    /// Its name.
    pub name: String,
    /// Version of Kubernetes; minikube's own default if none.
    pub version: Option<String>,
}

impl Provider for Minikube {
    fn program(&self) -> &'static str {
        "minikube"
    }

    fn create(&self, shell: &mut dyn Shell) -> anyhow::Result<()> {
        let listed =
            shell.output(&["minikube", "profile", "list", "--light", "--output", "json"])?;
        let listed: Value = serde_json::from_str(&listed)
            .with_context(|| format!("reading what `minikube profile list` printed: {listed:?}"))?;
        let there = ["valid", "invalid"]
            .into_iter()
            .filter_map(|list| listed[list].as_array())
            .flatten()
            .any(|profile| profile["Name"] == self.name.as_str());
        ensure!(
            !there,
            "a minikube profile of the name {0} is there already; delete it with `minikube delete --profile {0}`, or choose another name with --cluster-name",
            self.name
        );
        let mut start = vec![
            "minikube",
            "start",
            "--profile",
            &self.name,
            "--wait",
            "all",
            "--interactive=false",
        ];
        if let Some(version) = &self.version {
            start.extend(["--kubernetes-version", version]);
        }
        shell.check(&start)
    }

    fn load(&self, shell: &mut dyn Shell, archive: &Path) -> anyhow::Result<()> {
        let archive = archive.to_string_lossy();
        shell.check(&[
            "minikube",
            "--profile",
            &self.name,
            "image",
            "load",
            &archive,
        ])
    }

    fn logs(&self, shell: &mut dyn Shell, folder: &Path) -> anyhow::Result<()> {
        let file = folder.join("minikube.log");
        let file = file.to_string_lossy();
        shell.check(&["minikube", "--profile", &self.name, "logs", "--file", &file])
    }

    fn delete(&self, shell: &mut dyn Shell) -> anyhow::Result<()> {
        shell.check(&["minikube", "delete", "--profile", &self.name])
    }
}

#[cfg(test)]
mod tests {
    use super::super::shell::Recorded;
    use super::*;

    fn minikube() -> Minikube {
        Minikube {
            name: "mesh-e2e".to_owned(),
            version: Some("v1.34.2".to_owned()),
        }
    }

    #[test]
    fn a_cluster_is_made_loaded_asked_and_deleted() -> anyhow::Result<()> {
        let mut shell = Recorded::new(include_str!("minikube.txt"));
        let minikube = minikube();
        minikube.create(&mut shell)?;
        minikube.load(&mut shell, Path::new("/place/mesh.tar"))?;
        minikube.logs(&mut shell, Path::new("/place/failure"))?;
        minikube.delete(&mut shell)?;
        assert!(shell.ended());
        Ok(())
    }

    #[test]
    fn somebody_elses_profile_is_left_alone_also_a_broken_one() {
        for list in ["valid", "invalid"] {
            let printed = format!(
                "$ minikube profile list --light --output json\n{{\"{list}\":[{{\"Name\":\"mesh-e2e\"}}]}}"
            );
            let mut shell = Recorded::new(&printed);
            let error = minikube().create(&mut shell).unwrap_err().to_string();
            assert!(
                error.contains("minikube delete --profile mesh-e2e"),
                "{error}"
            );
            assert!(shell.ended());
        }
    }
}
