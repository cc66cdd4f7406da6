//! The secrets of a stock Envoy: what Istio's agent gives its proxy (its own certificate, the mesh's roots), over SDS on a Unix socket.

use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::pin::Pin;

use anyhow::Context;
use envoy_types::pb::envoy::config::core::v3::DataSource;
use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::secret::Type;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, Secret, TlsCertificate,
};
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use envoy_types::pb::envoy::service::secret::v3::secret_discovery_service_server::{
    SecretDiscoveryService, SecretDiscoveryServiceServer,
};
use envoy_types::pb::google::protobuf::Any;
use futures::Stream;
use prost::Message;
use tokio::net::UnixListener;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, Streaming};

const SECRET: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;
type Answering<'a, T> = Pin<Box<dyn Future<Output = Result<Response<T>, Status>> + Send + 'a>>;

/// Secrets by their names, as the agent of a sidecar has them.
struct Secrets(Vec<Secret>);

/// Serves them until the process ends.
pub(super) fn serve(at: &Path, chain: &str, key: &str, roots: &str) -> anyhow::Result<()> {
    let inline = |text: &str| {
        Some(DataSource {
            specifier: Some(Specifier::InlineString(text.to_owned())),
            ..DataSource::default()
        })
    };
    let secret = |name: &str, what| Secret {
        name: name.to_owned(),
        r#type: Some(what),
    };
    let own = Type::TlsCertificate(TlsCertificate {
        certificate_chain: inline(chain),
        private_key: inline(key),
        ..TlsCertificate::default()
    });
    let trusted = Type::ValidationContext(CertificateValidationContext {
        trusted_ca: inline(roots),
        ..CertificateValidationContext::default()
    });
    let secrets = Secrets(vec![secret("default", own), secret("ROOTCA", trusted)]);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let listener = {
        let _inside = runtime.enter();
        UnixListener::bind(at).with_context(|| format!("listening at {}", at.display()))?
    };
    // Envoy runs as another user.
    std::fs::set_permissions(at, std::fs::Permissions::from_mode(0o777))?;
    std::thread::spawn(move || {
        let serving = tonic::transport::Server::builder()
            .add_service(SecretDiscoveryServiceServer::new(secrets))
            .serve_with_incoming(UnixListenerStream::new(listener));
        if let Err(error) = runtime.block_on(serving) {
            eprintln!("the server of secrets ended: {error}");
        }
    });
    Ok(())
}

impl SecretDiscoveryService for Secrets {
    type StreamSecretsStream = Answers<DiscoveryResponse>;
    type DeltaSecretsStream = Answers<DeltaDiscoveryResponse>;

    fn stream_secrets<'a, 'b>(
        &'a self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Answering<'b, Self::StreamSecretsStream>
    where
        'a: 'b,
        Self: 'b,
    {
        let secrets = self.0.clone();
        // An acknowledgement or a refusal is not answered: there is nothing else to give.
        let answers = request.into_inner().filter_map(move |asked| match asked {
            Ok(asked) if asked.response_nonce.is_empty() => {
                let named = |secret: &&Secret| asked.resource_names.contains(&secret.name);
                let packed = |secret: &Secret| Any {
                    type_url: SECRET.to_owned(),
                    value: secret.encode_to_vec(),
                };
                Some(Ok(DiscoveryResponse {
                    version_info: "1".to_owned(),
                    nonce: "1".to_owned(),
                    type_url: SECRET.to_owned(),
                    resources: secrets.iter().filter(named).map(packed).collect(),
                    ..DiscoveryResponse::default()
                }))
            }
            Ok(asked) => {
                if let Some(refused) = asked.error_detail {
                    eprintln!("stock Envoy refused a secret: {}", refused.message);
                }
                None
            }
            Err(error) => Some(Err(error)),
        });
        Box::pin(async { Ok(Response::new(Box::pin(answers) as Answers<_>)) })
    }

    fn delta_secrets<'a, 'b>(
        &'a self,
        _: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Answering<'b, Self::DeltaSecretsStream>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(async { Err(Status::unimplemented("secrets are asked for one by one")) })
    }

    fn fetch_secrets<'a, 'b>(
        &'a self,
        _: Request<DiscoveryRequest>,
    ) -> Answering<'b, DiscoveryResponse>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(async { Err(Status::unimplemented("secrets are streamed")) })
    }
}
