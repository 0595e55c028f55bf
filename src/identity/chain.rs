//! One exchange: a new credential, one request to the authority, at most one more when the first found nobody.
//!
//! Which credential was chosen is a matter of configuration, settled before; nothing here switches from one to the
//! other. A new credential for each exchange costs microseconds and has no cache: a rotated token file counts at once.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use azure_core::cloud::{CloudConfiguration, CustomConfiguration};
use azure_core::credentials::{Secret, TokenCredential, TokenRequestOptions};
use azure_core::error::ErrorKind;
use azure_core::http::request::options::ClientRequestId;
use azure_core::http::{ClientMethodOptions, ClientOptions, Context, HttpClient, RetryOptions, Transport};
use azure_core::time::OffsetDateTime;
use azure_identity::{
    ClientAssertion, ClientAssertionCredential, ClientAssertionCredentialOptions, ClientSecretCredential,
    ClientSecretCredentialOptions,
};
use secrecy::ExposeSecret;
use tokio::io::AsyncReadExt;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info};
use uuid::Uuid;

use super::fault::{FaultClass, IdentityError};
use super::source::BearerToken;
use super::transport::{self, EntraTransport, Greeting};
use crate::settings::{Credential, IdentitySettings};

/// One attempt, from reading the token file to the last byte of the answer.
const ATTEMPT: Duration = Duration::from_secs(5);
/// The wait before the one retry.
const BREATH: Duration = Duration::from_millis(200);
/// A service account's token has 1 to 2 KiB.
const MAX_ASSERTION: u64 = 64 * 1024;

/// What can never work, found before anything is sent.
#[derive(Debug, thiserror::Error)]
pub enum IdentityStartError {
    /// The extra certificate authority is no certificate in PEM.
    #[error("the extra certificate authority is not a certificate in PEM")]
    ExtraCa,
    /// No HTTPS client: mostly an image without any certificate authority.
    #[error(
        "no HTTPS client for Entra can be built (are there certificate authorities? SSL_CERT_FILE can name a file of them)"
    )]
    Client(#[source] reqwest::Error),
    /// The SDK refuses the settings.
    #[error("the identity settings are refused: {0}")]
    Settings(String),
}

/// All that one exchange needs, made once.
pub(super) struct Exchange {
    settings: IdentitySettings,
    cloud: Arc<CloudConfiguration>,
    transport: Arc<EntraTransport>,
    budget: Duration,
}

impl Exchange {
    pub(super) fn new(settings: &IdentitySettings, budget: Duration) -> Result<Self, IdentityStartError> {
        // Exchanges are half an hour apart: a pooled connection would be a dead one.
        let client = transport::client(extra_ca(settings)?, 0).map_err(IdentityStartError::Client)?;
        let mut cloud = CustomConfiguration::default();
        cloud.authority_host = settings.authority.to_string();
        let exchange = Self {
            settings: settings.clone(),
            cloud: Arc::new(cloud.into()),
            transport: EntraTransport::new(client, name(&settings.credential)),
            budget,
        };
        exchange.credential().map_err(|error| IdentityStartError::Settings(error.to_string()))?;
        exchange.announce();
        Ok(exchange)
    }

    pub(super) fn credential_name(&self) -> &'static str {
        name(&self.settings.credential)
    }

    /// Asks the authority for what it tells everybody about the tenant.
    pub(super) async fn greet(&self) -> Result<Greeting, Box<IdentityError>> {
        let mut document = self.settings.authority.clone();
        document.set_path(&format!("{}/v2.0/.well-known/openid-configuration", self.settings.tenant_id));
        Ok(self.transport.greet(document).await?)
    }

    /// Ends within the budget, whatever happens outside.
    pub(super) async fn run(&self) -> Result<BearerToken, Box<IdentityError>> {
        let request_id = Uuid::new_v4().to_string();
        let result = with_one_retry(self.budget, self.credential_name(), || self.attempt(&request_id)).await;
        result.map_err(|mut error| {
            error.correlation_id.get_or_insert(request_id);
            error
        })
    }

    async fn attempt(&self, request_id: &str) -> Result<BearerToken, Box<IdentityError>> {
        let context = Context::new().with_value(ClientRequestId::new(request_id.to_owned()));
        let options = TokenRequestOptions { method_options: ClientMethodOptions { context } };
        let scopes: Vec<&str> = self.settings.scopes.iter().map(String::as_str).collect();
        // Entra counts the life from some moment after this one, so we never believe in a token for too long.
        let sent = Instant::now();
        let credential = self.credential().map_err(|error| self.explain(error))?;
        let token = credential.get_token(&scopes, Some(options)).await.map_err(|error| self.explain(error))?;
        let life = Duration::try_from(token.expires_on - OffsetDateTime::now_utc()).unwrap_or_default();
        BearerToken::new(token.token.secret(), sent, life).ok_or_else(|| {
            let error = IdentityError::new(FaultClass::Parse, self.credential_name());
            Box::new(error.with_detail("the token fits no header"))
        })
    }

    fn credential(&self) -> azure_core::Result<Arc<dyn TokenCredential>> {
        let client_options = ClientOptions {
            transport: Some(Transport::new(Arc::clone(&self.transport) as Arc<dyn HttpClient>)),
            retry: RetryOptions::none(),
            cloud: Some(Arc::clone(&self.cloud)),
            ..Default::default()
        };
        let IdentitySettings { tenant_id, client_id, .. } = &self.settings;
        Ok(match &self.settings.credential {
            // Not `WorkloadIdentityCredential`: that one reads the file with a blocking call, and sends a final newline too.
            Credential::WorkloadIdentity { token_file } => ClientAssertionCredential::new(
                tenant_id.clone(),
                client_id.clone(),
                TokenFile(token_file.clone()),
                Some(ClientAssertionCredentialOptions { client_options }),
            )?,
            Credential::ClientSecret { secret } => ClientSecretCredential::new(
                tenant_id,
                client_id.clone(),
                Secret::new(secret.expose_secret().to_owned()),
                Some(ClientSecretCredentialOptions { client_options }),
            )?,
        })
    }

    /// Finds our own error among the sources of the SDK's.
    fn explain(&self, error: azure_core::Error) -> Box<IdentityError> {
        let mut link: Option<&(dyn Error + 'static)> = Some(&error);
        while let Some(error) = link {
            if let Some(ours) = error.downcast_ref::<IdentityError>() {
                return Box::new(ours.clone());
            }
            link = error.source();
        }
        Box::new(IdentityError::new(FaultClass::Internal, self.credential_name()).with_detail(error.to_string()))
    }

    fn announce(&self) {
        let IdentitySettings { tenant_id, client_id, authority, credential, .. } = &self.settings;
        let (kind, authority) = (name(credential), authority.as_str());
        let file = match credential {
            Credential::WorkloadIdentity { token_file } => Some(token_file.display().to_string()),
            Credential::ClientSecret { .. } => None,
        };
        info!(
            identity.credential = kind,
            identity.tenant_id = tenant_id,
            identity.client_id = client_id,
            identity.authority = authority,
            identity.token_file = file,
            "tokens come from {authority} with {kind}, for client {client_id} of tenant {tenant_id}"
        );
    }
}

/// The certificate authorities to trust beside the platform's.
pub(super) fn extra_ca(settings: &IdentitySettings) -> Result<Vec<reqwest::Certificate>, IdentityStartError> {
    let Some(pem) = &settings.extra_ca_pem else { return Ok(Vec::new()) };
    let certificates = reqwest::Certificate::from_pem_bundle(pem.as_bytes()).unwrap_or_default();
    if certificates.is_empty() { Err(IdentityStartError::ExtraCa) } else { Ok(certificates) }
}

fn name(credential: &Credential) -> &'static str {
    match credential {
        Credential::WorkloadIdentity { .. } => "workload identity",
        Credential::ClientSecret { .. } => "client secret",
    }
}

/// Tries, and tries once more if nobody was there and time is left. An answer, even a bad one, is an answer: only a
/// server's own failure without a wish for a pause counts as nobody.
pub(super) async fn with_one_retry<T, F>(
    budget: Duration,
    credential: &'static str,
    attempt: impl Fn() -> F,
) -> Result<T, Box<IdentityError>>
where
    F: Future<Output = Result<T, Box<IdentityError>>>,
{
    let deadline = Instant::now() + budget;
    let left = || deadline.saturating_duration_since(Instant::now());
    let bounded = || async {
        let limit = left().min(ATTEMPT);
        timeout(limit, attempt()).await.unwrap_or_else(|_| {
            let error = IdentityError::new(FaultClass::Timeout, credential);
            Err(Box::new(error.with_detail(format!("no answer within {limit:?}"))))
        })
    };
    match bounded().await {
        Err(error) if left() > BREATH && worth_another(&error) => {
            debug!(error.class = error.class.as_str(), "{error}; trying once more in {BREATH:?}");
            sleep(BREATH).await;
            bounded().await
        }
        result => result,
    }
}

fn worth_another(error: &IdentityError) -> bool {
    match error.class {
        FaultClass::Http => error.pause.is_none() && error.status.is_some_and(|status| status.is_server_error()),
        FaultClass::Connect | FaultClass::Dns | FaultClass::Timeout | FaultClass::Io => true,
        FaultClass::Tls | FaultClass::Parse | FaultClass::Config | FaultClass::Internal => false,
    }
}

/// The projected service account token, read anew for each exchange and without the newline an editor may have left.
#[derive(Debug)]
struct TokenFile(PathBuf);

#[async_trait::async_trait]
impl ClientAssertion for TokenFile {
    async fn secret(&self, _: Option<ClientMethodOptions<'_>>) -> azure_core::Result<String> {
        read_assertion(&self.0).await.map_err(|error| azure_core::Error::new(ErrorKind::Credential, error))
    }
}

pub(super) async fn read_assertion(path: &Path) -> Result<String, IdentityError> {
    read_trimmed(path).await.map_err(|reason| {
        let error = IdentityError::new(FaultClass::Config, "workload identity");
        error.with_detail(format!("federated token file {}: {reason}", path.display()))
    })
}

async fn read_trimmed(path: &Path) -> Result<String, String> {
    let mut text = String::new();
    let file = tokio::fs::File::open(path).await.map_err(|error| error.to_string())?;
    file.take(MAX_ASSERTION + 1).read_to_string(&mut text).await.map_err(|error| error.to_string())?;
    if text.len() as u64 > MAX_ASSERTION {
        return Err(format!("larger than {MAX_ASSERTION} bytes"));
    }
    match text.trim() {
        "" => Err("empty".to_owned()),
        assertion => Ok(assertion.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use http::StatusCode;

    use super::*;

    fn failed(class: FaultClass) -> Box<IdentityError> {
        Box::new(IdentityError::new(class, "client secret"))
    }

    fn answered(status: u16, pause: Option<u64>) -> Box<IdentityError> {
        let (status, pause) = (StatusCode::from_u16(status).ok(), pause.map(Duration::from_secs));
        Box::new(IdentityError { status, pause, ..*failed(FaultClass::Http) })
    }

    #[tokio::test(start_paused = true)]
    async fn only_an_absent_authority_is_asked_twice() {
        for (error, attempts) in [
            (failed(FaultClass::Connect), 2),
            (failed(FaultClass::Dns), 2),
            (failed(FaultClass::Io), 2),
            (answered(500, None), 2),
            (answered(503, None), 2),
            (answered(503, Some(1)), 1),
            (answered(429, None), 1),
            (answered(400, None), 1),
            (answered(401, None), 1),
            (failed(FaultClass::Tls), 1),
            (failed(FaultClass::Parse), 1),
            (failed(FaultClass::Config), 1),
        ] {
            let made = Cell::new(0);
            let result: Result<(), _> = with_one_retry(8 * Duration::from_secs(1), "client secret", || {
                made.set(made.get() + 1);
                let error = error.clone();
                async { Err(error) }
            })
            .await;
            assert_eq!(result.unwrap_err().class(), error.class());
            assert_eq!(made.get(), attempts, "{error}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_exchange_that_hangs_ends_within_its_budget() {
        for (budget, attempts) in [(8_000, 2), (5_300, 2), (5_100, 1), (800, 1), (0, 1)] {
            let (made, begin) = (Cell::new(0), Instant::now());
            let budget = Duration::from_millis(budget);
            let result: Result<(), _> = with_one_retry(budget, "client secret", || {
                made.set(made.get() + 1);
                std::future::pending()
            })
            .await;
            assert_eq!(result.unwrap_err().class(), FaultClass::Timeout);
            assert_eq!(made.get(), attempts, "{budget:?}");
            assert!(begin.elapsed() <= budget + Duration::from_millis(1), "{:?}", begin.elapsed()); // the timer's grain
        }
    }

    #[tokio::test]
    async fn a_token_file_is_trimmed_and_a_useless_one_explained() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        for (content, expected) in [
            ("a.b.c\n".to_owned(), Ok("a.b.c")),
            (" \r\n".to_owned(), Err("empty")),
            ("x".repeat(70_000), Err("larger than 65536 bytes")),
        ] {
            std::fs::write(&path, content).unwrap();
            assert_eq!(read_trimmed(&path).await.as_deref().map_err(String::as_str), expected);
        }
        std::fs::remove_file(&path).unwrap();
        assert!(read_trimmed(&path).await.unwrap_err().contains("No such file"));
        assert!(read_trimmed(folder.path()).await.is_err());
    }
}

/// The whole way through the SDK, against an authority that says what the test wants.
#[cfg(test)]
#[cfg(feature = "demo")]
mod https_tests {
    use std::collections::HashMap;
    use std::sync::Mutex;

    use secrecy::SecretString;
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;
    use tokio_rustls::TlsAcceptor;
    use tokio_rustls::rustls::ServerConfig;
    use tokio_rustls::rustls::pki_types::PrivateKeyDer;

    use super::*;

    const TOKEN: &str = r#"{"token_type":"Bearer","expires_in":3599,"access_token":"the-token"}"#;

    struct Authority {
        settings: IdentitySettings,
        requests: Arc<Mutex<Vec<String>>>,
    }

    impl Authority {
        /// Gives the answers in turn, the last one for ever.
        async fn answering(credential: Credential, answers: &[&str]) -> Self {
            let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
            let key = PrivateKeyDer::try_from(certified.signing_key.serialize_der()).unwrap();
            let chain = vec![certified.cert.der().clone()];
            let config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key).unwrap();
            let acceptor = TlsAcceptor::from(Arc::new(config));
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let requests = Arc::new(Mutex::new(Vec::new()));
            let (seen, answers) =
                (Arc::clone(&requests), answers.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>());
            tokio::spawn(async move {
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                    let mut request = String::new();
                    while !is_complete(&request) {
                        let mut chunk = vec![0; 16 * 1024];
                        let read = stream.read(&mut chunk).await.unwrap();
                        request += std::str::from_utf8(&chunk[..read]).unwrap();
                    }
                    let number = {
                        let mut seen = seen.lock().unwrap();
                        seen.push(request);
                        seen.len().min(answers.len())
                    };
                    let _ = stream.write_all(answers[number - 1].as_bytes()).await;
                    let _ = stream.shutdown().await;
                }
            });
            let settings = IdentitySettings {
                tenant_id: "contoso.example".to_owned(),
                client_id: "the-client".to_owned(),
                authority: format!("https://localhost:{port}/").parse().unwrap(),
                scopes: vec!["api://backend/.default".to_owned()],
                credential,
                extra_ca_pem: Some(certified.cert.pem()),
            };
            Self { settings, requests }
        }

        fn exchange(&self) -> Exchange {
            Exchange::new(&self.settings, Duration::from_secs(8)).unwrap()
        }

        /// The form of the last request, and its head.
        fn last_request(&self) -> (HashMap<String, String>, String) {
            let request = self.requests.lock().unwrap().last().unwrap().clone();
            let (head, body) = request.split_once("\r\n\r\n").unwrap();
            (url::form_urlencoded::parse(body.as_bytes()).into_owned().collect(), head.to_owned())
        }
    }

    fn is_complete(request: &str) -> bool {
        let Some((head, body)) = request.split_once("\r\n\r\n") else { return false };
        header(head, "content-length").is_some_and(|length| length.parse() == Ok(body.len()))
    }

    fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
        let headers = head.lines().filter_map(|line| line.split_once(": "));
        headers.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value).next()
    }

    fn answer(status: &str, body: &str) -> String {
        format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
    }

    fn secret() -> Credential {
        Credential::ClientSecret { secret: SecretString::from("canary+secret") }
    }

    #[tokio::test]
    async fn a_secret_becomes_a_token_after_one_retry_with_one_request_id() {
        let answers = [answer("503 Unavailable", "busy"), answer("200 OK", TOKEN)];
        let authority = Authority::answering(secret(), &[&answers[0], &answers[1]]).await;
        let token = authority.exchange().run().await.unwrap();
        assert_eq!(token.authorization(), "Bearer the-token");
        let (form, head) = authority.last_request();
        assert!(head.starts_with("POST /contoso.example/oauth2/v2.0/token HTTP/1.1"), "{head}");
        assert_eq!(form["client_id"], "the-client");
        assert_eq!(form["client_secret"], "canary+secret");
        assert_eq!(form["scope"], "api://backend/.default");
        let id = header(&head, "client-request-id").unwrap();
        assert!(Uuid::try_parse(id).is_ok());
        assert_eq!(header(&head, "x-ms-client-request-id"), Some(id));
        let requests = authority.requests.lock().unwrap();
        assert_eq!(requests.len(), 2);
        assert!(requests[0].contains(id));
    }

    #[tokio::test]
    async fn a_rotated_token_file_is_sent_at_the_next_exchange() {
        let folder = tempfile::tempdir().unwrap();
        let token_file = folder.path().join("token");
        let credential = Credential::WorkloadIdentity { token_file: token_file.clone() };
        let authority = Authority::answering(credential, &[&answer("200 OK", TOKEN)]).await;
        let exchange = authority.exchange();
        for assertion in ["first.a.b", "second.a.b"] {
            std::fs::write(&token_file, format!("{assertion}\n")).unwrap();
            exchange.run().await.unwrap();
            assert_eq!(authority.last_request().0["client_assertion"], assertion);
        }
        std::fs::remove_file(&token_file).unwrap();
        let error = exchange.run().await.err().unwrap();
        assert_eq!((error.class(), error.credential()), (FaultClass::Config, "workload identity"));
        assert!(error.detail().unwrap().contains("No such file"), "{error:?}");
        assert_eq!(authority.requests.lock().unwrap().len(), 2);
    }

    #[tokio::test]
    async fn an_error_that_the_sdk_cannot_read_keeps_status_and_code() {
        let body = r#"{"error":"invalid_client","error_codes":[7000215],"error_description":"AADSTS7000215: x\r\ny"}"#;
        let authority = Authority::answering(secret(), &[&answer("401 Unauthorized", body)]).await;
        let error = authority.exchange().run().await.err().unwrap();
        assert_eq!((error.status(), error.aadsts()), (Some(http::StatusCode::UNAUTHORIZED), Some(7_000_215)));
        assert_eq!(authority.requests.lock().unwrap().len(), 1);
        let id = authority.last_request().1;
        assert_eq!(error.correlation_id(), header(&id, "client-request-id"));
        assert!(!format!("{error:?} {error}").contains("canary"));
    }

    #[tokio::test]
    async fn answers_that_are_no_token_are_refused_and_redirects_not_followed() {
        let huge = answer("200 OK", &format!(r#"{{"access_token":"{}"}}"#, "x".repeat(300_000)));
        let away = "HTTP/1.1 307 Away\r\nlocation: /elsewhere\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        for (text, class) in [
            (answer("200 OK", "{}"), FaultClass::Parse),
            (answer("200 OK", r#"{"access_token":"x","expires_in":1000000000000}"#), FaultClass::Parse),
            (huge, FaultClass::Parse),
            (away.to_owned(), FaultClass::Http),
            (String::new(), FaultClass::Io),
        ] {
            let authority = Authority::answering(secret(), &[&text]).await;
            let error = authority.exchange().run().await.err().unwrap();
            assert_eq!(error.class(), class, "{error:?}");
            assert!(authority.last_request().1.starts_with("POST /contoso.example/"));
        }
    }

    #[tokio::test]
    async fn failures_without_an_answer_are_told_apart() {
        let authority = Authority::answering(secret(), &[""]).await;
        let stranger = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap().cert.pem();
        let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        for (authority_url, class) in [
            (authority.settings.authority.to_string(), FaultClass::Tls),
            (format!("https://{nobody}"), FaultClass::Connect),
        ] {
            let settings = IdentitySettings {
                authority: authority_url.parse().unwrap(),
                extra_ca_pem: Some(stranger.clone()),
                ..authority.settings.clone()
            };
            let error = Exchange::new(&settings, Duration::from_secs(8)).unwrap().run().await.err().unwrap();
            assert_eq!(error.class(), class, "{error:?}");
        }
    }

    #[tokio::test]
    async fn what_can_never_work_is_refused_at_the_start() {
        let settings = Authority::answering(secret(), &[""]).await.settings;
        let refused = |settings| Exchange::new(&settings, Duration::from_secs(8)).err().unwrap();
        let no_pem = IdentitySettings { extra_ca_pem: Some("no PEM".to_owned()), ..settings.clone() };
        assert!(matches!(refused(no_pem), IdentityStartError::ExtraCa));
        let bad_tenant = IdentitySettings { tenant_id: "a b".to_owned(), ..settings };
        assert!(matches!(refused(bad_tenant), IdentityStartError::Settings(_)));
    }
}
