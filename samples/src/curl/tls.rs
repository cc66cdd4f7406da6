//! TLS of the applet.

use std::sync::Arc;

use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::client::danger::{
    HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
};
use tokio_rustls::rustls::crypto::{
    CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature,
};
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::{
    ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
};

use super::args::{Http, Options};
use super::connect::Target;
use super::{Failure, code};

/// Where distributions keep the roots that they trust.
const SYSTEM_ROOTS: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Speaks TLS on `stream`; whether HTTP/2 was agreed on.
pub(super) async fn secure(
    options: &Options,
    target: &Target,
    stream: TcpStream,
) -> Result<(TlsStream<TcpStream>, bool), Failure> {
    let name = ServerName::try_from(target.host.clone()).map_err(|_| {
        Failure::new(
            code::URL,
            format!("{} can't be a server's name", target.host),
        )
    })?;
    let connector = TlsConnector::from(Arc::new(config(options)?));
    let stream = connector
        .connect(name, stream)
        .await
        .map_err(|error| refused(&error))?;
    let is_two = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    Ok((stream, is_two))
}

fn refused(error: &std::io::Error) -> Failure {
    let inner = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<Error>());
    match inner {
        Some(Error::InvalidCertificate(reason)) => Failure::new(
            code::PEER_CERTIFICATE,
            format!("SSL certificate problem: {reason:?}; -k goes on without a check"),
        ),
        _ => Failure::new(code::TLS, format!("TLS connect error: {error}")),
    }
}

fn config(options: &Options) -> Result<ClientConfig, Failure> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| Failure::new(code::TLS, error.to_string()))?;
    let builder = if options.insecure {
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(NoCheck(provider)))
    } else {
        builder.with_root_certificates(roots(options)?)
    };
    let mut config = match &options.certificate {
        None => builder.with_no_client_auth(),
        Some(file) => {
            let wrong = |error: String| {
                Failure::new(
                    code::LOCAL_CERTIFICATE,
                    format!("could not load the certificate {file}: {error}"),
                )
            };
            let chain = certificates(file).map_err(wrong)?;
            // Without --key the key stands in the same file.
            let key_file = options.key.as_deref().unwrap_or(file);
            let key = PrivateKeyDer::from_pem_file(key_file)
                .map_err(|error| wrong(format!("{key_file}: {error}")))?;
            builder
                .with_client_auth_cert(chain, key)
                .map_err(|error| wrong(error.to_string()))?
        }
    };
    config.alpn_protocols = match options.http {
        Http::Any => vec![b"h2".to_vec(), b"http/1.1".to_vec()],
        Http::One | Http::OneZero => vec![b"http/1.1".to_vec()],
        Http::Two => vec![b"h2".to_vec()],
    };
    Ok(config)
}

fn certificates(file: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_file_iter(file)
        .map_err(|error| error.to_string())?
        .collect();
    certificates.map_err(|error| error.to_string())
}

fn roots(options: &Options) -> Result<RootCertStore, Failure> {
    let from_environment = std::env::var("CURL_CA_BUNDLE")
        .or_else(|_| std::env::var("SSL_CERT_FILE"))
        .ok();
    let file = options
        .ca_file
        .clone()
        .or(from_environment)
        .unwrap_or_else(|| SYSTEM_ROOTS.into());
    let wrong = |error: String| {
        Failure::new(
            code::CA_FILE,
            format!("could not read the trusted certificates in {file}: {error}"),
        )
    };
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(certificates(&file).map_err(wrong)?);
    if added == 0 {
        Err(wrong("there are none".into()))
    } else {
        Ok(roots)
    }
}

/// What `-k` asks for: any certificate is good; the handshake's signatures are checked all the same.
#[derive(Debug)]
struct NoCheck(Arc<CryptoProvider>);

impl ServerCertVerifier for NoCheck {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
