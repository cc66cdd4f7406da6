//! `istio.v1.auth.IstioCertificateService`, both ends: a workload sends a certificate request, the authority answers with a chain.
//!
//! Messages and names are those of Istio's `security/v1alpha1/ca.proto`.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use envoy_types::pb::google::protobuf::Struct;
use tonic::body::Body;
use tonic::server::{Grpc, NamedService, UnaryService};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;
use tower::Service;

use crate::channel::Opened;

const METHOD: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
/// Largest request, in bytes: a certificate request and a few settings.
const MAX_REQUEST: usize = 64 << 10;

/// `istio.v1.auth.IstioCertificateRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CertificateRequest {
    /// The certificate request, PEM.
    #[prost(string, tag = "1")]
    pub csr: String,
    /// Wanted validity in seconds; 0 leaves it to the authority.
    #[prost(int64, tag = "3")]
    pub validity_duration: i64,
    /// `CertSigner` and `ImpersonatedIdentity`.
    #[prost(message, optional, tag = "4")]
    pub metadata: Option<Struct>,
}

/// `istio.v1.auth.IstioCertificateResponse`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct CertificateResponse {
    /// PEM: the leaf, what is between it and the root, and last the roots that are trusted.
    #[prost(string, repeated, tag = "1")]
    pub cert_chain: Vec<String>,
}

/// Asks for a certificate on an open connection.
///
/// # Errors
/// What the authority says: `UNAUTHENTICATED`, `INVALID_ARGUMENT`, …, or that it can't be reached.
pub async fn create(
    connection: &Opened,
    request: CertificateRequest,
) -> Result<CertificateResponse, Status> {
    let mut client = tonic::client::Grpc::new(connection.channel.clone());
    client
        .ready()
        .await
        .map_err(|error| Status::unavailable(error.to_string()))?;
    let codec: ProstCodec<CertificateRequest, CertificateResponse> = ProstCodec::default();
    let path = tonic::codegen::http::uri::PathAndQuery::from_static(METHOD);
    let answer = client
        .unary(connection.request(request), path, codec)
        .await?;
    Ok(answer.into_inner())
}

/// Who answers the requests.
pub trait Authority: Send + Sync + 'static {
    /// Issues a certificate. What the caller is, is among the extensions of the request.
    ///
    /// # Errors
    /// The status to answer with.
    fn create(
        self: Arc<Self>,
        request: Request<CertificateRequest>,
    ) -> impl Future<Output = Result<CertificateResponse, Status>> + Send;
}

/// The gRPC service around an [`Authority`].
pub struct CertificateServer<A>(Arc<A>);

impl<A> CertificateServer<A> {
    /// The service of an authority.
    pub fn new(authority: Arc<A>) -> Self {
        Self(authority)
    }
}

impl<A> Clone for CertificateServer<A> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<A> NamedService for CertificateServer<A> {
    const NAME: &'static str = "istio.v1.auth.IstioCertificateService";
}

type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;

struct Create<A>(Arc<A>);

impl<A: Authority> UnaryService<CertificateRequest> for Create<A> {
    type Response = CertificateResponse;
    type Future = Boxed<Result<Response<CertificateResponse>, Status>>;

    fn call(&mut self, request: Request<CertificateRequest>) -> Self::Future {
        let authority = Arc::clone(&self.0);
        Box::pin(async move { authority.create(request).await.map(Response::new) })
    }
}

impl<A: Authority> Service<http::Request<Body>> for CertificateServer<A> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Boxed<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let authority = Arc::clone(&self.0);
        Box::pin(async move {
            if request.uri().path() != METHOD {
                return Ok(
                    Status::unimplemented("the only method is CreateCertificate").into_http(),
                );
            }
            let codec: ProstCodec<CertificateResponse, CertificateRequest> = ProstCodec::default();
            let mut grpc = Grpc::new(codec).max_decoding_message_size(MAX_REQUEST);
            Ok(grpc.unary(Create(authority), request).await)
        })
    }
}
