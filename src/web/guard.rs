//! The door of `/mcp`: this server as an OAuth 2.1 resource server, as MCP's authorization has it (RFC 6750, RFC 9728).
//!
//! Takes the caller's token off the request, has it checked, and leaves a [`Caller`] in its place: nothing behind the door can
//! keep, log or pass on what it never sees. Every refusal, also that of one tool, is answered by [`Guard::refuse`].

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde_json::json;
use tracing::{info, warn};

use super::problem;
use super::refusals::RefusalLimit;
use crate::auth::{Caller, Identity, Permission, Recalled, Refusal, Verdict, Verifier};
use crate::problem::{ErrorCode, Problem};
use crate::settings::{EntraInbound, RateLimitSettings};
use crate::telemetry::audit::{Audit, Event};
use crate::telemetry::metrics::{Metrics, Shed};
use crate::telemetry::trace::RequestTrace;

/// Where RFC 9728 puts the metadata; the resource's path follows.
const WELL_KNOWN: &str = "/.well-known/oauth-protected-resource";
/// How long a client may wait before it asks again when there are no keys.
const KEYS_PAUSE: Duration = Duration::from_secs(2);

/// What stood in `Authorization`, on its way from the front of the server to the door. It has no `Debug`.
#[derive(Clone)]
pub(super) enum Presented {
    /// No such field.
    Nothing,
    /// One.
    One(HeaderValue),
    /// More than one: two readers could take two of them.
    Several,
}

impl Presented {
    /// Takes it off the request. Whatever happens to the request afterwards, the token is no part of it any more.
    pub(super) fn take(headers: &mut HeaderMap) -> Self {
        let mut values = headers.get_all(header::AUTHORIZATION).iter();
        let presented = match (values.next(), values.next()) {
            (None, _) => return Self::Nothing,
            (Some(value), None) => Self::One(value.clone()),
            (Some(_), Some(_)) => Self::Several,
        };
        headers.remove(header::AUTHORIZATION);
        presented
    }

    /// The token, by the grammar of RFC 6750, section 2.1.
    fn token(&self) -> Result<&str, Refusal> {
        let value = match self {
            Self::Nothing => return Err(Refusal::NoToken),
            Self::Several => return Err(Refusal::MalformedHeader),
            Self::One(value) => value.to_str().map_err(|_| Refusal::MalformedHeader)?,
        };
        let (scheme, token) = value.split_once(' ').unwrap_or((value, ""));
        if !scheme.eq_ignore_ascii_case("bearer") {
            // Another scheme is not a broken one: its sender has yet to learn what is wanted here.
            return Err(Refusal::NoToken);
        }
        let token = token.trim_matches(' ');
        let is_token68 = token.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~+/=".contains(&byte));
        if token.is_empty() || !is_token68 { Err(Refusal::MalformedHeader) } else { Ok(token) }
    }
}

/// Lets callers in whose token is good.
pub struct Guard {
    verifier: Arc<Verifier>,
    metrics: Arc<Metrics>,
    audit: Arc<Audit>,
    refusal_limit: Option<RefusalLimit>,
    /// What stands before the names of scopes in requests for tokens: Entra wants them qualified, tokens have them short.
    scope_prefix: String,
    settings: EntraInbound,
    metadata_url: String,
    /// All scopes that are of use here.
    scopes: Vec<String>,
}

impl Guard {
    /// `offered` are the permissions that some tool wants.
    pub fn new(
        settings: &EntraInbound,
        rate_limit: &RateLimitSettings,
        verifier: Arc<Verifier>,
        (metrics, audit): (Arc<Metrics>, Arc<Audit>),
        offered: impl IntoIterator<Item = Permission>,
    ) -> Self {
        // Entra takes `resource` and the scopes' owner for the same only if both are the same App ID URI.
        let owner = settings.scope_owner();
        let scope_prefix = format!("{}/", owner.trim_end_matches('/'));
        let mut scopes: Vec<_> =
            offered.into_iter().map(|permission| format!("{scope_prefix}{}", settings.scopes.of(permission))).collect();
        scopes.dedup();
        Self {
            verifier,
            metrics,
            audit,
            refusal_limit: RefusalLimit::new(rate_limit),
            scope_prefix,
            metadata_url: format!(
                "{}{WELL_KNOWN}{}",
                settings.public_url.origin().ascii_serialization(),
                settings.public_url.path()
            ),
            scopes,
            settings: settings.clone(),
        }
    }

    /// Where the metadata are served: at the root form, and below it at the path that clients know and at our own.
    pub(super) fn metadata_paths(&self) -> Vec<String> {
        let mut paths = vec![WELL_KNOWN.to_owned(), format!("{WELL_KNOWN}/mcp")];
        let public = format!("{WELL_KNOWN}{}", self.settings.public_url.path());
        if !paths.contains(&public) {
            paths.push(public);
        }
        paths
    }

    /// The protected resource metadata of RFC 9728.
    pub(super) fn metadata(&self) -> Response {
        let metadata = json!({
            "resource": self.settings.public_url.as_str(),
            "authorization_servers": self.verifier.authorization_servers(),
            "scopes_supported": self.scopes,
            "bearer_methods_supported": ["header"],
            "resource_name": "MCP server",
        });
        let headers = [(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "public, max-age=300")];
        (headers, Body::from(metadata.to_string())).into_response()
    }

    /// Puts the caller's identity in the place of their token, or answers.
    pub(super) async fn admit(&self, request: &mut Request) -> Result<Caller, Box<Response>> {
        let presented = request.extensions_mut().remove::<Presented>().unwrap_or(Presented::Nothing);
        let Some(caller) = request.extensions_mut().remove::<Caller>() else {
            return Err(Box::new(problem::response(StatusCode::INTERNAL_SERVER_ERROR, Problem::internal())));
        };
        let checked = match presented.token() {
            Ok(token) => match self.check(token, caller.address()).await {
                Ok(checked) => checked,
                Err(wait) => {
                    self.metrics.shed(Shed::RefusedTokens);
                    return Err(Box::new(problem::too_many_refused_tokens(wait)));
                }
            },
            Err(refusal) => Err(refusal),
        };
        match checked {
            Ok(identity) => {
                let caller = caller.identified(identity);
                request.extensions_mut().insert(caller.clone());
                Ok(caller)
            }
            Err(refusal) => Err(Box::new(self.refuse(refusal, &caller, request.extensions().get()))),
        }
    }

    /// What the token is worth, unless too many from its address were worth nothing.
    async fn check(&self, token: &str, address: IpAddr) -> Result<Result<Identity, Refusal>, Duration> {
        match (self.verifier.recall(token), &self.refusal_limit) {
            (Recalled::Good(identity), _) => return Ok(Ok(identity)),
            // Whatever others send from there, it is checked.
            (Recalled::Stale, _) | (Recalled::Unknown, None) => {}
            (Recalled::Unknown, Some(limit)) => limit.admit(address)?,
        }
        let checked = self.verifier.verify(token).await;
        if let Some(limit) = &self.refusal_limit {
            limit.checked(address, &checked);
        }
        Ok(checked)
    }

    /// The one place where a caller is refused for who they are or what they may do: it is written down here, and answered.
    pub(super) fn refuse(&self, refusal: Refusal, caller: &Caller, trace: Option<&RequestTrace>) -> Response {
        let verdict = refusal.verdict();
        self.metrics.caller_refused(refusal.as_str());
        // Who is let in and may not call one tool stands in the audit already, with the tool and its arguments.
        if let (None, Some(trace)) = (caller.identity(), trace) {
            let event = Event::refused_caller(trace.context().trace_id(), Some(caller.address()), refusal.as_str());
            self.audit.record(event);
        }
        let (reason, address) = (refusal.as_str(), caller.address());
        let (tenant, object, app) = match caller.identity() {
            Some(identity) => (Some(identity.tenant()), Some(identity.object()), Some(identity.app())),
            None => (None, None, None),
        };
        let tool = match refusal {
            Refusal::ToolPermission(lacked) => Some(lacked.tool),
            _ => None,
        };
        macro_rules! refused {
            ($level:ident) => {
                $level!(
                    refusal = reason,
                    client.address = %address,
                    caller.tenant = tenant,
                    caller.object = object,
                    caller.app = app,
                    gen_ai.tool.name = tool,
                    "a caller was refused: {reason}"
                )
            };
        }
        match refusal {
            // How every client begins, and how every token ends.
            Refusal::NoToken | Refusal::Expired => refused!(info),
            _ => refused!(warn),
        }
        let (status, code, error) = match verdict {
            Verdict::Malformed => (StatusCode::BAD_REQUEST, ErrorCode::ValidationError, Some("invalid_request")),
            Verdict::TokenWanted => (StatusCode::UNAUTHORIZED, ErrorCode::AuthenticationError, None),
            Verdict::InvalidToken => (StatusCode::UNAUTHORIZED, ErrorCode::AuthenticationError, Some("invalid_token")),
            Verdict::InsufficientScope => {
                (StatusCode::FORBIDDEN, ErrorCode::AuthenticationError, Some("insufficient_scope"))
            }
            Verdict::Forbidden => (StatusCode::FORBIDDEN, ErrorCode::AuthenticationError, None),
            Verdict::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, ErrorCode::ServiceError, None),
        };
        let mut problem = Problem::new(code, refusal.advice());
        if verdict == Verdict::Unavailable {
            problem.details.retryable = true;
            problem.details.retry_after_seconds = Some(KEYS_PAUSE);
            return problem::response(status, problem);
        }
        let mut response = problem::response(status, problem);
        if let Ok(challenge) = HeaderValue::try_from(self.challenge(refusal, error)) {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
        }
        response
    }

    /// The user has to sign in once more before the backend may be called for them: 401, and the claims challenge that clients of
    /// Entra know.
    pub(super) fn step_up(&self, problem: &Problem) -> Response {
        let claims = BASE64.encode(problem.details.claims.as_deref().unwrap_or("{}"));
        let challenge = format!(
            r#"Bearer resource_metadata="{}", error="insufficient_claims", error_description="The user has to sign in once more", claims="{claims}", scope="{}""#,
            self.metadata_url,
            self.scopes.join(" ")
        );
        let mut response = problem::response(StatusCode::UNAUTHORIZED, problem.clone());
        if let Ok(challenge) = HeaderValue::try_from(challenge) {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
        }
        response
    }

    fn challenge(&self, refusal: Refusal, error: Option<&str>) -> String {
        let mut challenge = format!("Bearer resource_metadata=\"{}\"", self.metadata_url);
        let scope = match refusal {
            Refusal::ToolPermission(lacked) => {
                Some(format!("{}{}", self.scope_prefix, self.settings.scopes.of(lacked.permission)))
            }
            Refusal::MalformedHeader | Refusal::Client => None,
            _ => Some(self.scopes.join(" ")),
        };
        let parameters =
            [("error", error), ("error_description", error.map(|_| refusal.advice())), ("scope", scope.as_deref())];
        for (name, value) in parameters {
            if let Some(value) = value {
                challenge.push_str(&format!(", {name}=\"{value}\""));
            }
        }
        challenge
    }
}
