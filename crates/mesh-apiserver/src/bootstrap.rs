//! What every cluster has before anybody asks: four namespaces and the `kubernetes` Service with its endpoint.

use std::net::Ipv4Addr;

use serde_json::{Value, json};

use crate::storage::{Expect, WriteError};
use crate::write::now;
use crate::{ApiServer, OpenError};

/// Creates what is missing; the endpoint of the server itself is brought up to date.
pub fn create_first_objects(api: &ApiServer) -> Result<(), OpenError> {
    for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
        let namespace = json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": { "name": name, "labels": { "kubernetes.io/metadata.name": name } },
            "spec": { "finalizers": ["kubernetes"] }, "status": { "phase": "Active" },
        });
        ensure(
            api,
            "core/namespaces",
            &format!("/{name}"),
            namespace,
            false,
        )?;
    }
    let address = Ipv4Addr::from(api.service_range().0).to_string();
    let advertise = api.options().advertise;
    let labels = json!({ "component": "apiserver", "provider": "kubernetes" });
    let metadata = json!({ "name": "kubernetes", "namespace": "default", "labels": labels });
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": metadata,
        "spec": {
            "clusterIP": address, "clusterIPs": [address], "type": "ClusterIP", "sessionAffinity": "None",
            "internalTrafficPolicy": "Cluster", "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
            "ports": [{ "name": "https", "port": 443, "protocol": "TCP", "targetPort": advertise.port() }],
        },
        "status": { "loadBalancer": {} },
    });
    ensure(api, "core/services", "default/kubernetes", service, false)?;
    let port = json!({ "name": "https", "port": advertise.port(), "protocol": "TCP" });
    let mut skipped = metadata.clone();
    skipped["labels"] = json!({ "endpointslice.kubernetes.io/skip-mirror": "true" });
    let endpoints = json!({
        "apiVersion": "v1", "kind": "Endpoints", "metadata": skipped,
        "subsets": [{ "addresses": [{ "ip": advertise.ip().to_string() }], "ports": [port] }],
    });
    ensure(api, "core/endpoints", "default/kubernetes", endpoints, true)?;
    let mut named = metadata;
    named["labels"] = json!({ "kubernetes.io/service-name": "kubernetes" });
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": named, "addressType": "IPv4",
        "endpoints": [{ "addresses": [advertise.ip().to_string()], "conditions": { "ready": true } }], "ports": [port],
    });
    ensure(
        api,
        "discovery.k8s.io/endpointslices",
        "default/kubernetes",
        slice,
        true,
    )
}

/// Creates an object, or brings it up to date where `refresh` is set.
pub fn ensure(
    api: &ApiServer,
    storage: &str,
    key: &str,
    mut object: Value,
    refresh: bool,
) -> Result<(), OpenError> {
    let current = api.storage().get(storage, key);
    let expect = match &current {
        None => {
            object["metadata"]["uid"] = uuid::Uuid::new_v4().to_string().into();
            object["metadata"]["creationTimestamp"] = now().into();
            Expect::Absent
        }
        Some(current) => {
            for field in ["uid", "creationTimestamp", "resourceVersion"] {
                object["metadata"][field] = current.value["metadata"][field].clone();
            }
            if !refresh || object == current.value {
                return Ok(());
            }
            Expect::Revision(current.revision)
        }
    };
    // The first objects come before the first client: nobody else waits while this thread does.
    let written = api.storage().put(storage, key, expect, object);
    match futures::executor::block_on(written) {
        Ok(_) => Ok(()),
        Err(WriteError::Store(error)) => Err(error.into()),
        Err(changed) => Err(OpenError::Bootstrap(format!("{key}: {changed}"))),
    }
}
