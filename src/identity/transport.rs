//! Our own HTTP transport below the SDK: our roots, our time limits, our reading of Entra's answers.
//!
//! The SDK loses status and code of an error body that holds an escape, a `null` or anything but JSON; it takes `200 {}`
//! for a token, panics on a huge `expires_in` and reads bodies of any size. So it gets to see checked successes only; every
//! error is read here and travels through the SDK as an [`IdentityError`] among the sources of its own.

#[cfg(test)]
mod properties;

use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use azure_core::error::ErrorKind;
use azure_core::http::headers::Headers;
use azure_core::http::{AsyncRawResponse, Body, HttpClient, Request, StatusCode as AzureStatus};
use http::{HeaderMap, StatusCode, header};
use secrecy::SecretString;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::time::{Instant, timeout};

use super::fault::{FaultClass, IdentityError};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// For the answer to a question that any authority answers at once.
const GREETING: Duration = Duration::from_secs(5);
/// Entra's answers have a few KiB.
const MAX_BODY: usize = 256 * 1024;
/// Entra's longest tokens live 24 to 28 hours. More than two days is a mistake or a trap.
const MAX_LIFE: u64 = 172_800;
const MAX_DESCRIPTION: usize = 1_024;
const MAX_CLAIMS: usize = 4_096;
/// The SDK's name for the request id, and Entra's.
const SDK_REQUEST_ID: &str = "x-ms-client-request-id";
const ENTRA_REQUEST_ID: &str = "client-request-id";

/// Connections that nobody used for so long are given up before Entra or a firewall gives them up.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// The HTTPS client for Entra. Each build reads the platform's certificate store: do it once.
pub(super) fn client(extra_ca: Vec<reqwest::Certificate>, idle_connections: usize) -> reqwest::Result<reqwest::Client> {
    reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none()) // the credential goes to the authority and nowhere else
        .connect_timeout(CONNECT_TIMEOUT)
        .pool_max_idle_per_host(idle_connections)
        .pool_idle_timeout(POOL_IDLE_TIMEOUT)
        .tls_certs_merge(extra_ca)
        .build()
}

/// Carries the SDK's requests, and reads the answers for it.
#[derive(Debug)]
pub(super) struct EntraTransport {
    client: reqwest::Client,
    credential: &'static str,
}

impl EntraTransport {
    pub(super) fn new(client: reqwest::Client, credential: &'static str) -> Arc<Self> {
        Arc::new(Self { client, credential })
    }

    async fn send(&self, request: &Request) -> Result<Vec<u8>, IdentityError> {
        let fault = |class| IdentityError::new(class, self.credential);
        let Body::Bytes(body) = request.body() else {
            return Err(fault(FaultClass::Internal).with_detail("the SDK sent a stream"));
        };
        let mut outgoing = self.client.post(request.url().clone()).body(body.clone());
        for (name, value) in request.headers().iter() {
            outgoing = outgoing.header(name.as_str(), value.as_str());
            if name.as_str() == SDK_REQUEST_ID {
                outgoing = outgoing.header(ENTRA_REQUEST_ID, value.as_str());
            }
        }
        self.exchange(outgoing).await
    }

    /// Posts a form to the token endpoint, past the SDK; the token and its life.
    pub(super) async fn token(
        &self,
        endpoint: url::Url,
        form: String,
        request_id: &str,
    ) -> Result<(SecretString, Duration), IdentityError> {
        let outgoing = self
            .client
            .post(endpoint)
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
            .header(header::ACCEPT, "application/json")
            .header(SDK_REQUEST_ID, request_id)
            .header(ENTRA_REQUEST_ID, request_id)
            .body(form);
        let checked: Checked = serde_json::from_slice(&self.exchange(outgoing).await?).map_err(|error| {
            IdentityError::new(FaultClass::Internal, self.credential).with_detail(error.to_string())
        })?;
        Ok((checked.access_token.into(), Duration::from_secs(checked.expires_in)))
    }

    /// Sends, and gives a success that [`checked_token`] has seen.
    async fn exchange(&self, outgoing: reqwest::RequestBuilder) -> Result<Vec<u8>, IdentityError> {
        let mut response = outgoing.send().await.map_err(|error| self.unanswered(error))?;
        let (status, headers) = (response.status(), std::mem::take(response.headers_mut()));
        let body = self.read(response).await;
        if status.is_success() {
            return checked_token(&body?).map_err(|reason| IdentityError {
                status: Some(status),
                ..IdentityError::new(FaultClass::Parse, self.credential).with_detail(reason)
            });
        }
        Err(error_answer(self.credential, status, &headers, &body.unwrap_or_default()))
    }

    /// Asks a question that needs no credential, to see what lies on the way. That nobody answers on a connection that was made
    /// is no failure here: what does not answer is found out by the exchange.
    pub(super) async fn greet(&self, document: url::Url) -> Result<Greeting, IdentityError> {
        let sent = Instant::now();
        let answer = match timeout(GREETING, self.client.get(document).send()).await {
            Ok(Ok(response)) => Some(response),
            Ok(Err(error)) if error.is_connect() || error.is_builder() => return Err(self.unanswered(error)),
            Ok(Err(_)) | Err(_) => None,
        };
        let date = answer.as_ref().and_then(|response| response.headers().get(header::DATE));
        Ok(Greeting {
            peer: answer.as_ref().and_then(reqwest::Response::remote_addr),
            date: date.and_then(|date| httpdate::parse_http_date(date.to_str().ok()?).ok()),
            took: sent.elapsed(),
        })
    }

    async fn read(&self, mut response: reqwest::Response) -> Result<Vec<u8>, IdentityError> {
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| self.unanswered(error))? {
            if body.len() + chunk.len() > MAX_BODY {
                let fault = IdentityError::new(FaultClass::Parse, self.credential);
                return Err(fault.with_detail(format!("the answer is larger than {MAX_BODY} bytes")));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }

    fn unanswered(&self, error: reqwest::Error) -> IdentityError {
        let (class, detail) = classify(&error.without_url());
        IdentityError::new(class, self.credential).with_detail(detail)
    }
}

/// How the authority answered.
#[derive(Debug)]
pub struct Greeting {
    /// Who is at the other end of the connection: the authority, or a proxy; `None` when there was no answer.
    pub peer: Option<SocketAddr>,
    /// The authority's clock.
    pub date: Option<SystemTime>,
    /// How long it took.
    pub took: Duration,
}

#[async_trait]
impl HttpClient for EntraTransport {
    async fn execute_request(&self, request: &Request) -> azure_core::Result<AsyncRawResponse> {
        match self.send(request).await {
            Ok(body) => Ok(AsyncRawResponse::from_bytes(AzureStatus::Ok, Headers::new(), body)),
            Err(error) => Err(azure_core::Error::new(ErrorKind::Other, error)),
        }
    }
}

/// The kind of a failure without an answer, and its root cause. reqwest calls name, network and TLS failures alike "connect".
pub fn classify(error: &reqwest::Error) -> (FaultClass, String) {
    let mut class = match error {
        error if error.is_timeout() => FaultClass::Timeout,
        error if error.is_builder() => FaultClass::Config,
        error if error.is_connect() => FaultClass::Connect,
        _ => FaultClass::Io,
    };
    let mut root: &(dyn Error + 'static) = error;
    loop {
        let mut next = root.source();
        if let Some(error) = root.downcast_ref::<io::Error>() {
            match error.kind() {
                io::ErrorKind::TimedOut => class = FaultClass::Timeout,
                io::ErrorKind::InvalidData if class == FaultClass::Connect => class = FaultClass::Tls, // all of rustls' errors
                _ => {}
            }
            // `source()` of an I/O error skips the error it wraps.
            next = error.get_ref().map(|inner| inner as &(dyn Error + 'static)).or(next);
        } else if class == FaultClass::Connect && root.to_string().starts_with("dns error") {
            class = FaultClass::Dns;
        }
        match next {
            Some(error) => root = error,
            None => return (class, clean(&root.to_string())),
        }
    }
}

/// What [`checked_token`] lets through.
#[derive(Deserialize)]
struct Checked {
    access_token: String,
    expires_in: u64,
}

/// A success, cut down to what the SDK reads; the reason, if it holds no usable token.
pub(super) fn checked_token(body: &[u8]) -> Result<Vec<u8>, &'static str> {
    let answer: Map<String, Value> = serde_json::from_slice(body).map_err(|_| "the answer is not a JSON object")?;
    let token = match answer.get("access_token") {
        Some(Value::String(token)) if token.is_empty() => return Err("`access_token` is empty"),
        Some(Value::String(token)) if token.bytes().all(|byte| byte.is_ascii_graphic()) => token,
        Some(Value::String(_)) => return Err("`access_token` has characters that no header may carry"),
        _ => return Err("there is no `access_token`"),
    };
    match answer.get("token_type") {
        None => {}
        Some(Value::String(kind)) if kind.eq_ignore_ascii_case("bearer") => {}
        Some(_) => return Err("`token_type` is not `Bearer`"),
    }
    let life = match answer.get("expires_in") {
        Some(Value::Number(life)) => life.as_u64(),
        Some(Value::String(life)) => life.parse().ok(),
        _ => None,
    };
    let life =
        life.filter(|life| (1..=MAX_LIFE).contains(life)).ok_or("`expires_in` is no plausible number of seconds")?;
    let checked = json!({"token_type": "Bearer", "access_token": token, "expires_in": life, "ext_expires_in": life});
    Ok(checked.to_string().into_bytes())
}

/// What an error answer says, read field by field, so that one bad field costs only itself.
pub(super) fn error_answer(
    credential: &'static str,
    status: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
) -> IdentityError {
    let answer: Map<String, Value> = serde_json::from_slice(body).unwrap_or_default();
    let text = |name: &str| answer.get(name).and_then(Value::as_str);
    let id = |name: &str| text(name).and_then(|id| uuid::Uuid::try_parse(id).ok()).map(|id| id.to_string());
    let word = |name: &str| text(name).filter(|word| is_word(word)).map(str::to_owned);
    let from_entra = text("error").is_some();
    let described = text("error_description").map(clean).filter(|description| !description.trim().is_empty());
    let detail = match described {
        Some(description) if from_entra => description,
        _ if from_entra => "the error has no description".to_owned(),
        _ => format!("HTTP {} with a body that is not an Entra error", status.as_u16()),
    };
    IdentityError {
        status: Some(status),
        error: word("error"),
        suberror: word("suberror"),
        codes: if from_entra { codes(&answer) } else { Vec::new() },
        trace_id: id("trace_id"),
        correlation_id: id("correlation_id"),
        timestamp: text("timestamp").filter(|time| is_timestamp(time)).map(str::to_owned),
        claims: text("claims").filter(|claims| is_claims_request(claims)).map(str::to_owned),
        pause: asked_pause(headers),
        ..IdentityError::new(FaultClass::Http, credential).with_detail(detail)
    }
}

/// The AADSTS codes: from `error_codes`, else from the description, which begins with one.
fn codes(answer: &Map<String, Value>) -> Vec<u32> {
    let number = |code: &Value| code.as_u64().and_then(|code| u32::try_from(code).ok());
    let listed = answer.get("error_codes").and_then(Value::as_array);
    let codes: Vec<u32> = listed.into_iter().flatten().filter_map(number).filter(|code| *code > 0).take(8).collect();
    if !codes.is_empty() {
        return codes;
    }
    let description = answer.get("error_description").and_then(Value::as_str).unwrap_or_default();
    let digits = description.strip_prefix("AADSTS").and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next());
    digits.and_then(|digits| digits.parse().ok()).filter(|code| *code > 0).into_iter().collect()
}

/// `Retry-After` in its two forms, and Azure's own in milliseconds.
fn asked_pause(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    let millis = |name| text(name).and_then(|value| value.parse().ok()).map(Duration::from_millis);
    let standard = text(header::RETRY_AFTER.as_str()).and_then(|value| match value.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => httpdate::parse_http_date(value).ok()?.duration_since(SystemTime::now()).ok(),
    });
    standard.or_else(|| millis("x-ms-retry-after-ms")).or_else(|| millis("retry-after-ms"))
}

fn is_word(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-')
}

/// A claims request (OpenID Connect section 5.5) goes back to the client: only what is one, and not a long one.
fn is_claims_request(text: &str) -> bool {
    text.len() <= MAX_CLAIMS && serde_json::from_str::<Map<String, Value>>(text).is_ok()
}

/// Entra writes `2026-11-22 14:59:00Z`.
fn is_timestamp(text: &str) -> bool {
    (1..=32).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit() || b" :.TZ+-".contains(&byte))
}

/// Foreign text for the log: one line, bounded.
fn clean(text: &str) -> String {
    text.chars().take(MAX_DESCRIPTION).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn answer(status: u16, body: &str) -> IdentityError {
        let status = StatusCode::from_u16(status).unwrap();
        error_answer("client secret", status, &HeaderMap::new(), body.as_bytes())
    }

    #[test]
    fn an_entra_error_is_read_whole() {
        let error = answer(
            401,
            r#"{"error":"invalid_client","suberror":"bad_token","error_codes":[7000215,50001],
                "error_description":"AADSTS7000215: Invalid client secret provided.\r\nTrace ID: x \"q\" \u00fc",
                "timestamp":"2026-05-01 12:00:00Z","trace_id":"0e2c6c0b-1111-4222-8333-123456789abc",
                "correlation_id":"aaaaaaaa-1111-4222-8333-123456789abc","error_uri":"https://example.com"}"#,
        );
        assert_eq!(error.status(), Some(StatusCode::UNAUTHORIZED));
        assert_eq!(error.oauth_error(), Some("invalid_client"));
        assert_eq!(error.suberror.as_deref(), Some("bad_token"));
        assert_eq!(error.codes, [7_000_215, 50_001]);
        assert_eq!(error.timestamp(), Some("2026-05-01 12:00:00Z"));
        assert_eq!(error.trace_id(), Some("0e2c6c0b-1111-4222-8333-123456789abc"));
        assert_eq!(error.correlation_id(), Some("aaaaaaaa-1111-4222-8333-123456789abc"));
        assert_eq!(error.detail(), Some("AADSTS7000215: Invalid client secret provided.  Trace ID: x \"q\" ü"));
    }

    #[test]
    fn status_and_code_survive_odd_bodies() {
        let foreign = "a body that is not an Entra error";
        for (status, body, code, detail) in [
            (400, r#"{"error":"e","error_codes":[90002],"error_description":null}"#, Some(90_002), "no description"),
            (
                400,
                r#"{"error":"e","error_codes":null,"error_description":"AADSTS90002: Tenant"}"#,
                Some(90_002),
                "Tenant",
            ),
            (400, r#"{"error":"e","error_codes":[99999999999,-1,1.5,0],"error_description":"x"}"#, None, "x"),
            (400, r#"{"error":"e","error_codes":["7"],"error_description":"AADSTS99999999999999: x"}"#, None, "x"),
            (400, r#"{"error":"e","error_codes":[3000000000]}"#, Some(3_000_000_000), "no description"),
            (429, "Too Many Requests", None, foreign),
            (502, "<html>secret proxy page</html>", None, foreign),
            (503, r#"{"error":{"message":"secret"},"error_codes":[1]}"#, None, foreign),
            (503, r#"["secret"]"#, None, foreign),
            (400, "", None, foreign),
            (302, "{", None, foreign),
        ] {
            let error = answer(status, body);
            assert_eq!(error.status().map(|status| status.as_u16()), Some(status));
            assert_eq!(error.aadsts(), code, "{body}");
            let text = format!("{error} {} {error:?}", error.hint());
            assert!(text.contains(detail) && !text.contains("secret p") && !text.contains("\"secret\""), "{text}");
        }
    }

    #[test]
    fn foreign_text_reaches_no_field_but_the_detail() {
        let error = answer(
            400,
            r#"{"error":"<b>say this</b>","suberror":"two words","error_codes":[1],"error_description":"x",
                "trace_id":"not a uuid","correlation_id":"ignore all","timestamp":"now <b>"}"#,
        );
        assert_eq!(error.oauth_error(), None);
        assert_eq!(error.suberror, None);
        assert_eq!((error.trace_id(), error.correlation_id(), error.timestamp()), (None, None, None));
        let long = answer(400, &json!({"error": "e", "error_description": "\u{1b}ü".repeat(4_000)}).to_string());
        let detail = long.detail().unwrap();
        assert!(detail.chars().count() == MAX_DESCRIPTION && !detail.contains('\u{1b}'));
    }

    #[test]
    fn a_wish_for_a_pause_is_understood_in_each_form() {
        let later = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(100));
        for (name, value, least, most) in [
            ("retry-after", "60", 60_000, 60_000),
            ("retry-after", later.as_str(), 90_000, 100_000),
            ("x-ms-retry-after-ms", "1500", 1_500, 1_500),
            ("retry-after-ms", "20", 20, 20),
        ] {
            let headers = HeaderMap::from_iter([(name.parse().unwrap(), HeaderValue::from_str(value).unwrap())]);
            let pause = asked_pause(&headers).unwrap().as_millis();
            assert!((least..=most).contains(&pause), "{name}: {value} gave {pause}");
        }
        for value in ["soon", "-5", "", "Thu, 01 Jan 1970 00:00:00 GMT"] {
            let headers = HeaderMap::from_iter([(header::RETRY_AFTER, HeaderValue::from_static(value))]);
            assert_eq!(asked_pause(&headers), None, "{value}");
        }
    }

    #[test]
    fn only_a_usable_token_is_a_success() {
        let normal =
            br#"{"token_type":"bearer","expires_in":3599,"ext_expires_in":3599,"access_token":"a.b-c_d","more":1}"#;
        let expected =
            json!({"token_type": "Bearer", "access_token": "a.b-c_d", "expires_in": 3599, "ext_expires_in": 3599});
        assert_eq!(serde_json::from_slice::<Value>(&checked_token(normal).unwrap()).unwrap(), expected);
        let text = checked_token(br#"{"expires_in":"3599","access_token":"a.b-c_d"}"#).unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&text).unwrap(), expected);
        for body in [
            "",
            "{}",
            "[]",
            "<html>",
            r#"{"error":"invalid_client"}"#,
            r#"{"expires_in":3599}"#,
            r#"{"expires_in":3599,"access_token":""}"#,
            r#"{"expires_in":3599,"access_token":null}"#,
            r#"{"expires_in":3599,"access_token":"a\r\nb"}"#,
            r#"{"expires_in":3599,"access_token":"a b"}"#,
            r#"{"expires_in":3599,"access_token":"a","token_type":"pop"}"#,
            r#"{"access_token":"a"}"#,
            r#"{"expires_in":0,"access_token":"a"}"#,
            r#"{"expires_in":-1,"access_token":"a"}"#,
            r#"{"expires_in":172801,"access_token":"a"}"#,
            r#"{"expires_in":1000000000000,"access_token":"a"}"#,
            r#"{"expires_in":1e300,"access_token":"a"}"#,
            r#"{"expires_in":null,"access_token":"a"}"#,
        ] {
            assert!(checked_token(body.as_bytes()).is_err(), "{body}");
        }
    }

    #[tokio::test]
    async fn a_name_that_cannot_be_resolved_is_told_from_a_failing_connection() {
        struct NoSuchName;
        impl reqwest::dns::Resolve for NoSuchName {
            fn resolve(&self, _: reqwest::dns::Name) -> reqwest::dns::Resolving {
                Box::pin(async { Err(io::Error::other("no such name").into()) })
            }
        }
        let client = reqwest::Client::builder().no_proxy().dns_resolver(Arc::new(NoSuchName)).build().unwrap();
        let error = client.get("http://login.example/").send().await.unwrap_err();
        assert_eq!(classify(&error), (FaultClass::Dns, "no such name".to_owned()));
    }
}
