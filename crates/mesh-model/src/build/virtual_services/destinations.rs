//! Destinations of rules: names made absolute, ports filled in, references checked.

use mesh_api::networking::virtual_service::{Destination, PortSelector};

use crate::problem::Reporter;
use crate::{Mesh, Severity, hostname};

/// For whom names are read.
pub(super) struct Context<'a> {
    /// Namespace of the rule, to which short names belong.
    pub(super) namespace: &'a str,
    pub(super) mesh: &'a Mesh,
    /// True for a VirtualService without hosts.
    pub(super) delegate: bool,
}

impl Context<'_> {
    /// Makes the host absolute, fills in the port where there is only one, and checks that all of it exists.
    pub(super) fn destination(
        &self,
        destination: &mut Destination,
        field: &str,
        report: &mut Reporter<'_>,
    ) {
        destination.host = hostname::absolute(&destination.host, self.namespace, &self.mesh.domain);
        let Some(service) = self.mesh.service(&destination.host) else {
            let message = format!(
                "there is no service {}; what is sent there fails",
                destination.host
            );
            report.not_found(format!("{field}.host"), message);
            return;
        };
        match &destination.port {
            None if service.ports.len() == 1 => {
                destination.port = Some(PortSelector {
                    number: u32::from(service.ports[0].number),
                })
            }
            None if service.ports.len() > 1 => {
                let message = format!(
                    "{} has several ports; name one, or the port that the client asked for is used",
                    destination.host
                );
                report.report(
                    Severity::Error,
                    Some("IST0112"),
                    format!("{field}.port"),
                    message,
                );
            }
            Some(port)
                if !u16::try_from(port.number)
                    .is_ok_and(|number| service.port(number).is_some()) =>
            {
                let message = format!(
                    "{} has no port {}; what is sent there fails",
                    destination.host, port.number
                );
                report.not_found(format!("{field}.port.number"), message);
            }
            _ => {}
        }
        self.check_subset(destination, field, report);
    }

    fn check_subset(&self, destination: &Destination, field: &str, report: &mut Reporter<'_>) {
        if destination.subset.is_empty() {
            return;
        }
        // Which of several rules a client uses may depend on its labels.
        let rules = self
            .mesh
            .destination_rules(&destination.host, self.namespace);
        if !rules
            .iter()
            .any(|rule| rule.subsets.contains_key(&destination.subset))
        {
            let message = format!(
                "no DestinationRule defines subset {} of {}; what is sent there fails. Add it to the rule's subsets",
                destination.subset, destination.host
            );
            report.not_found(format!("{field}.subset"), message);
        }
    }
}

/// What is wrong with the weights of a rule's destinations, if anything: Envoy would refuse the whole resource.
pub(super) fn weights(weights: impl Iterator<Item = i32> + Clone) -> Result<(), String> {
    if weights.clone().any(|weight| weight < 0)
        || (weights.clone().count() > 1 && weights.clone().all(|weight| weight == 0))
    {
        return Err(
            "weights may not be negative, and several destinations need a sum above 0".to_owned(),
        );
    }
    let total: i64 = weights.map(i64::from).sum();
    if total > i64::from(u32::MAX) {
        return Err(format!(
            "the sum of the weights, {total}, is more than 4294967295"
        ));
    }
    Ok(())
}
