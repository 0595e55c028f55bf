//! What can go wrong on the way to a token, and what to do about it.
//!
//! Decisions rest on the kind of fault, the HTTP status and OAuth's `error` field. AADSTS numbers are for people: they
//! pick the advice and nothing else. Text written by others goes to the log only, through [`IdentityError::detail`].

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use tokio::time::Instant;

/// In whose hands a remedy can be.
const DEPLOYER: &str = "whoever deploys this server";
const DIRECTORY: &str = "whoever administers the app or the managed identity in Entra";
const CLUSTER: &str = "whoever runs the cluster";
const NETWORK: &str = "whoever runs the network and its proxies";
const MICROSOFT: &str = "Microsoft";
const DEVELOPERS: &str = "the developers of this server";

/// Why there is no token. Made once for each failed exchange and shared by everyone who waited for it.
#[derive(Debug, Clone)]
pub struct IdentityError {
    pub(super) class: FaultClass,
    pub(super) credential: &'static str,
    pub(super) status: Option<StatusCode>,
    /// OAuth's `error` and `suberror`, when they look like the identifiers they should be.
    pub(super) error: Option<String>,
    pub(super) suberror: Option<String>,
    pub(super) codes: Vec<u32>,
    pub(super) trace_id: Option<String>,
    pub(super) correlation_id: Option<String>,
    pub(super) timestamp: Option<String>,
    /// What the user's next token has to satisfy, as a claims request in JSON.
    pub(super) claims: Option<String>,
    /// The pause that Entra asked for.
    pub(super) pause: Option<Duration>,
    /// When the next exchange is due; the token source fills it in.
    pub(super) retry_at: Option<Instant>,
    pub(super) detail: Option<String>,
}

/// The kind of a fault: a small, closed set, fit for a metric's label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultClass {
    /// Entra, or something in front of it, answered with an error.
    Http,
    /// No connection could be made.
    Connect,
    /// The authority's name could not be resolved.
    Dns,
    /// The TLS handshake failed: mostly a certificate that is not trusted.
    Tls,
    /// Nobody answered in time.
    Timeout,
    /// The connection broke on the way.
    Io,
    /// A success that holds no usable token.
    Parse,
    /// Something on our side is missing or wrong: the token file, a setting.
    Config,
    /// A defect in this program or in the SDK.
    Internal,
}

impl FaultClass {
    /// The class as one lower-case word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Connect => "connect",
            Self::Dns => "dns",
            Self::Tls => "tls",
            Self::Timeout => "timeout",
            Self::Io => "io",
            Self::Parse => "parse",
            Self::Config => "config",
            Self::Internal => "internal",
        }
    }
}

impl IdentityError {
    pub(super) fn new(class: FaultClass, credential: &'static str) -> Self {
        Self {
            class,
            credential,
            status: None,
            error: None,
            suberror: None,
            codes: Vec::new(),
            trace_id: None,
            correlation_id: None,
            timestamp: None,
            claims: None,
            pause: None,
            retry_at: None,
            detail: None,
        }
    }

    /// A call's time was over while it waited so long for a token.
    pub fn waited_for(credential: &'static str, waited: Duration) -> Arc<Self> {
        Arc::new(Self::new(FaultClass::Timeout, credential).with_detail(format!("no token within {waited:?}")))
    }

    pub(super) fn with_detail(self, detail: impl Into<String>) -> Self {
        Self { detail: Some(detail.into()), ..self }
    }

    /// The kind of fault.
    pub fn class(&self) -> FaultClass {
        self.class
    }

    /// The HTTP status, when there was an answer.
    pub fn status(&self) -> Option<StatusCode> {
        self.status
    }

    /// OAuth's `error` field, such as `invalid_client`.
    pub fn oauth_error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    /// The first AADSTS code of the answer.
    pub fn aadsts(&self) -> Option<u32> {
        self.codes.first().copied()
    }

    /// What the user has to satisfy at their next sign-in, as a claims request in JSON: for the client, word for word.
    pub fn claims(&self) -> Option<&str> {
        self.claims.as_deref()
    }

    /// Whether nothing is wrong but that the user has to sign in once more.
    pub fn needs_user(&self) -> bool {
        self.claims.is_some() || self.error.as_deref() == Some("interaction_required")
    }

    /// What we tried to sign in with: `workload identity` or `client secret`, and perhaps on behalf of a user.
    pub fn credential(&self) -> &'static str {
        self.credential
    }

    /// Whether it may pass by itself. What does not is a matter of configuration, for the operator.
    pub fn retryable(&self) -> bool {
        match self.class {
            FaultClass::Http => {
                let passing = |status: StatusCode| {
                    status.is_server_error()
                        || matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS)
                };
                self.status.is_some_and(passing) || self.error.as_deref() == Some("temporarily_unavailable")
            }
            FaultClass::Connect | FaultClass::Dns | FaultClass::Timeout | FaultClass::Io | FaultClass::Internal => true,
            FaultClass::Tls | FaultClass::Parse | FaultClass::Config => false,
        }
    }

    /// What is left of the cool-down, after which asking again makes sense; `None` when waiting alone mends nothing.
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_at.filter(|_| self.retryable()).map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// Entra's correlation id, or the request id we sent: Microsoft's support finds the attempt by either.
    pub fn correlation_id(&self) -> Option<&str> {
        self.correlation_id.as_deref()
    }

    /// Entra's trace id.
    pub fn trace_id(&self) -> Option<&str> {
        self.trace_id.as_deref()
    }

    /// When Entra answered, by its own clock.
    pub fn timestamp(&self) -> Option<&str> {
        self.timestamp.as_deref()
    }

    /// The cause in other people's words: names tenants, apps and files. For the log and the operator's terminal only.
    pub fn detail(&self) -> Option<&str> {
        self.detail.as_deref()
    }

    /// The pause that Entra asked for.
    pub fn asked_pause(&self) -> Option<Duration> {
        self.pause
    }

    /// What it means and what to do next: for the operator and for the model alike.
    pub fn hint(&self) -> String {
        let Advice { means, remedy, .. } = self.advice();
        if self.retryable() {
            format!(
                "{means}. It may pass by itself: try again later. If it lasts, the operator of this server should {remedy}."
            )
        } else {
            format!("{means}. Trying again does not help: the operator of this server has to {remedy}.")
        }
    }

    /// What it means, in whose hands the remedy is, and which one it is: by the AADSTS code, else by the kind of fault.
    pub fn advice(&self) -> &'static Advice {
        let by_code = self.codes.iter().find_map(|code| match self.is_for_a_user() {
            true => row(ADVICE_FOR_USERS, *code).or_else(|| advice(*code)),
            false => advice(*code),
        });
        by_code.unwrap_or_else(|| self.advice_without_code())
    }

    fn is_for_a_user(&self) -> bool {
        self.credential.starts_with("on-behalf-of")
    }

    fn advice_without_code(&self) -> &'static Advice {
        match (self.class, self.status.map(|status| status.as_u16())) {
            (FaultClass::Http, Some(429)) => &Advice {
                codes: &[],
                means: "Entra throttles this identity",
                remedy: "look for what else asks tokens for AZURE_CLIENT_ID",
                hands: DEPLOYER,
            },
            (FaultClass::Http, Some(407)) => &Advice {
                codes: &[],
                means: "The proxy wants to be signed in to",
                remedy: "correct HTTPS_PROXY, or add the authority to NO_PROXY",
                hands: DEPLOYER,
            },
            (FaultClass::Http, Some(300..=399)) => &Advice {
                codes: &[],
                means: "The authority redirects, which Entra's token endpoint never does",
                remedy: "check AZURE_AUTHORITY_HOST and HTTPS_PROXY",
                hands: DEPLOYER,
            },
            (FaultClass::Http, _) if self.retryable() => &Advice {
                codes: &[],
                means: "Entra, or a proxy before it, is unwell",
                remedy: "look at the status of Microsoft Entra and at the proxy",
                hands: NETWORK,
            },
            (FaultClass::Http, _) => &Advice {
                codes: &[],
                means: "Entra refuses this sign-in",
                remedy: "check AZURE_TENANT_ID, AZURE_CLIENT_ID, AZURE_SCOPES and the credential",
                hands: DEPLOYER,
            },
            (FaultClass::Connect | FaultClass::Io, _) => &Advice {
                codes: &[],
                means: "There is no connection to Entra",
                remedy: "check that this server may reach AZURE_AUTHORITY_HOST on port 443, and HTTPS_PROXY if one is needed",
                hands: NETWORK,
            },
            (FaultClass::Dns, _) => &Advice {
                codes: &[],
                means: "The name of Entra's authority cannot be resolved",
                remedy: "check the name in AZURE_AUTHORITY_HOST, and that DNS works where this server runs",
                hands: DEPLOYER,
            },
            (FaultClass::Timeout, _) => &Advice {
                codes: &[],
                means: "Entra does not answer in time",
                remedy: "check that neither a firewall nor HTTPS_PROXY swallows connections to AZURE_AUTHORITY_HOST",
                hands: NETWORK,
            },
            (FaultClass::Tls, _) => &Advice {
                codes: &[],
                means: "The authority's certificate is not trusted, or TLS is broken on the way",
                remedy: "make SSL_CERT_FILE or SSL_CERT_DIR hold the certificate authority in use, and check AZURE_AUTHORITY_HOST",
                hands: DEPLOYER,
            },
            (FaultClass::Parse, _) => &Advice {
                codes: &[],
                means: "What answered for Entra gave no usable token",
                remedy: "check that AZURE_AUTHORITY_HOST is Entra, and that no proxy answers in its place",
                hands: DEPLOYER,
            },
            (FaultClass::Config, _) if self.credential.ends_with("workload identity") => &Advice {
                codes: &[],
                means: "The federated token cannot be used",
                remedy: "check the file that AZURE_FEDERATED_TOKEN_FILE names: it must exist, be readable and hold a token",
                hands: DEPLOYER,
            },
            (FaultClass::Config, _) => &Advice {
                codes: &[],
                means: "The identity settings cannot work",
                remedy: "check AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_AUTHORITY_HOST",
                hands: DEPLOYER,
            },
            (FaultClass::Internal, _) => &Advice {
                codes: &[],
                means: "The sign-in failed by a defect of the server",
                remedy: "report it, with the log",
                hands: DEVELOPERS,
            },
        }
    }
}

impl fmt::Display for IdentityError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no token with {}: ", self.credential)?;
        f.write_str(match self.class {
            FaultClass::Http => "the authority answered",
            FaultClass::Connect => "no connection to the authority",
            FaultClass::Dns => "the authority's name cannot be resolved",
            FaultClass::Tls => "no TLS connection to the authority",
            FaultClass::Timeout => "the authority did not answer in time",
            FaultClass::Io => "the connection to the authority broke",
            FaultClass::Parse => "the authority's answer holds no usable token",
            FaultClass::Config => "the configuration cannot be used",
            FaultClass::Internal => "the exchange failed by a defect",
        })?;
        if let Some(status) = self.status.filter(|_| self.class == FaultClass::Http) {
            write!(f, " {}", status.as_u16())?;
        }
        if let Some(error) = &self.error {
            write!(f, " {error}")?;
        }
        if let Some(code) = self.aadsts() {
            write!(f, " (AADSTS{code})")?;
        }
        Ok(())
    }
}

impl std::error::Error for IdentityError {}

/// Logs a failed exchange with all that is known of it, beside what else there is to say. A macro, for the level of an event is fixed
/// where it is written.
macro_rules! log_failure {
    ($level:ident, $failure:expr, $($more:tt)+) => {
        ::tracing::$level!(
            identity.credential = $failure.credential(),
            error.class = $failure.class().as_str(),
            http.status = $failure.status().map(|status| status.as_u16()),
            entra.error = $failure.oauth_error(),
            entra.suberror = $failure.suberror.as_deref(),
            entra.aadsts = $failure.aadsts(),
            entra.trace_id = $failure.trace_id(),
            entra.correlation_id = $failure.correlation_id(),
            entra.timestamp = $failure.timestamp(),
            error.detail = $failure.detail(),
            $($more)+
        )
    };
}

pub(super) use log_failure;

/// What some failures mean, and what should be done by whom.
#[derive(Debug)]
pub struct Advice {
    /// The numbers after `AADSTS`; empty when there is none.
    pub codes: &'static [u32],
    /// What happened: the start of a sentence, without a full stop.
    pub means: &'static str,
    /// What to do: continues "the operator has to …".
    pub remedy: &'static str,
    /// In whose hands that is.
    pub hands: &'static str,
}

/// The advice for an AADSTS code, if we have any.
pub fn advice(code: u32) -> Option<&'static Advice> {
    row(ADVICE, code)
}

fn row(table: &'static [Advice], code: u32) -> Option<&'static Advice> {
    table.iter().find(|advice| advice.codes.contains(&code))
}

/// The codes that a token exchange without a user meets.
const ADVICE: &[Advice] = &[
    Advice {
        codes: &[7_000_215],
        means: "The client secret is wrong",
        remedy: "set AZURE_CLIENT_SECRET to the secret's value (not to its id) of the app in AZURE_CLIENT_ID",
        hands: DEPLOYER,
    },
    Advice {
        codes: &[7_000_222],
        means: "The client secret has expired",
        remedy: "create a new secret for the app in AZURE_CLIENT_ID and put it in AZURE_CLIENT_SECRET",
        hands: DIRECTORY,
    },
    Advice {
        codes: &[7_000_218, 7_000_216],
        means: "No credential reached Entra",
        remedy: "check that the file in AZURE_FEDERATED_TOKEN_FILE holds a token and that no proxy cuts requests",
        hands: DEPLOYER,
    },
    Advice {
        codes: &[700_016],
        means: "The tenant does not know this client id",
        remedy: "correct AZURE_CLIENT_ID or AZURE_TENANT_ID: the app does not live in this tenant",
        hands: DEPLOYER,
    },
    Advice {
        codes: &[90_002],
        means: "Entra does not know this tenant",
        remedy: "correct AZURE_TENANT_ID, or AZURE_AUTHORITY_HOST if the tenant lives in another cloud",
        hands: DEPLOYER,
    },
    Advice {
        codes: &[70_021],
        means: "No federated credential matches the service account's token",
        remedy: "compare issuer, subject and audience of the federated credential with those of the token",
        hands: DIRECTORY,
    },
    Advice {
        codes: &[700_211],
        means: "No federated credential has the issuer of the service account's token",
        remedy: "set the federated credential's issuer to the cluster's OIDC issuer, with its final slash",
        hands: DIRECTORY,
    },
    Advice {
        codes: &[700_212],
        means: "No federated credential has the audience of the service account's token",
        remedy: "use the audience `api://AzureADTokenExchange` in the federated credential and in the projected token",
        hands: DIRECTORY,
    },
    Advice {
        codes: &[700_213],
        means: "No federated credential has the subject of the service account's token",
        remedy: "set the federated credential's subject to `system:serviceaccount:<namespace>:<service account>`",
        hands: DIRECTORY,
    },
    Advice {
        codes: &[7_002_138],
        means: "The federated credential's subject differs from the token's in upper and lower case",
        remedy: "write the subject exactly as in the token: Entra compares case",
        hands: DIRECTORY,
    },
    Advice {
        codes: &[700_024],
        means: "The service account's token has expired, or is not valid yet",
        remedy: "check that the kubelet rotates the file in AZURE_FEDERATED_TOKEN_FILE, and the node's clock",
        hands: CLUSTER,
    },
    Advice {
        codes: &[70_023],
        means: "The service account's token lives too long for Entra, or does not say when it was issued",
        remedy: "point AZURE_FEDERATED_TOKEN_FILE at the projected token, not at the default service account's",
        hands: DEPLOYER,
    },
    Advice {
        codes: &[50_027],
        means: "What the token file holds is not a well-formed token",
        remedy: "point AZURE_FEDERATED_TOKEN_FILE at the projected service account token",
        hands: DEPLOYER,
    },
    Advice {
        codes: &[50_013, 5_000_811],
        means: "The signature of the service account's token cannot be verified",
        remedy: "check that the federated credential's issuer is this very cluster's",
        hands: DIRECTORY,
    },
    Advice {
        codes: &[70_011, 1_002_012, 700_022],
        means: "The scopes are not those of one known resource",
        remedy: "set AZURE_SCOPES to one resource followed by `/.default`",
        hands: DEPLOYER,
    },
    Advice {
        codes: &[500_011],
        means: "The tenant does not know the resource in the scope",
        remedy: "correct AZURE_SCOPES, or register the backend's app (its App ID URI) in the tenant of AZURE_TENANT_ID",
        hands: DEPLOYER,
    },
    Advice {
        codes: &[90_033, 90_024, 90_006],
        means: "Entra is unwell for the moment",
        remedy: "look at the status of Microsoft Entra",
        hands: MICROSOFT,
    },
];

/// The codes that only an exchange for a user meets, or that mean something else there.
const ADVICE_FOR_USERS: &[Advice] = &[
    Advice {
        codes: &[65_001],
        means: "Nobody has consented yet that this app calls the backend for users",
        remedy: "grant admin consent to the backend's delegated permission for the app in AZURE_CLIENT_ID",
        hands: DIRECTORY,
    },
    Advice {
        codes: &[50_013, 500_131, 5_000_811],
        means: "The caller's token is not one that this app may exchange",
        remedy: "set AZURE_CLIENT_ID to the app that the callers' tokens are for (INBOUND_AUDIENCE): no other may exchange them",
        hands: DEPLOYER,
    },
    Advice {
        codes: &[500_133, 700_082],
        means: "The caller's token has expired",
        remedy: "check the clock of this server, if users who have just signed in see this too",
        hands: DEPLOYER,
    },
    Advice {
        codes: &[7_000_114],
        means: "The caller's token is an app's own, and only users' tokens can be exchanged",
        remedy: "have callers sign in as users, or let apps act with the server's own rights (OBO_APP_FALLBACK)",
        hands: DEPLOYER,
    },
    Advice {
        codes: &[50_076, 50_079, 50_158, 53_000, 53_003],
        means: "The user's organisation asks for more than the user's sign-in satisfies",
        remedy: "look at the Conditional Access policies of the backend, if signing in once more does not help the user",
        hands: DIRECTORY,
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(status: u16, codes: &[u32]) -> IdentityError {
        IdentityError {
            status: StatusCode::from_u16(status).ok(),
            error: Some("invalid_client".to_owned()),
            codes: codes.to_vec(),
            ..IdentityError::new(FaultClass::Http, "client secret").with_detail("AADSTS7000215: app 'payroll'")
        }
    }

    #[test]
    fn a_failure_names_status_code_and_remedy_and_keeps_foreign_text_to_the_log() {
        let error = answered(401, &[7_000_215]);
        assert_eq!(
            error.to_string(),
            "no token with client secret: the authority answered 401 invalid_client (AADSTS7000215)"
        );
        assert_eq!(
            error.hint(),
            "The client secret is wrong. Trying again does not help: the operator of this server has to set AZURE_CLIENT_SECRET \
             to the secret's value (not to its id) of the app in AZURE_CLIENT_ID."
        );
        assert!(!error.hint().contains("payroll") && !error.to_string().contains("payroll"));
        assert_eq!(error.detail(), Some("AADSTS7000215: app 'payroll'"));
    }

    #[test]
    fn what_may_pass_by_itself_is_told_by_the_status_and_never_by_the_code() {
        for (status, retryable) in
            [(302, false), (400, false), (401, false), (407, false), (408, true), (429, true), (500, true), (503, true)]
        {
            assert_eq!(answered(status, &[7_000_215]).retryable(), retryable, "{status}");
        }
        let unavailable = IdentityError { error: Some("temporarily_unavailable".to_owned()), ..answered(400, &[]) };
        assert!(unavailable.retryable());
        for class in [FaultClass::Tls, FaultClass::Parse, FaultClass::Config] {
            assert!(!IdentityError::new(class, "client secret").retryable(), "{class:?}");
        }
    }

    #[test]
    fn advice_has_one_row_for_each_code() {
        for table in [ADVICE, ADVICE_FOR_USERS] {
            let mut codes: Vec<u32> = table.iter().flat_map(|advice| advice.codes).copied().collect();
            let all = codes.len();
            codes.sort_unstable();
            codes.dedup();
            assert_eq!(codes.len(), all);
        }
        assert_eq!(advice(90_006).map(|advice| advice.means), Some("Entra is unwell for the moment"));
        assert!(advice(1).is_none());
    }

    #[test]
    fn a_code_means_something_else_where_a_users_token_was_exchanged() {
        let own = answered(400, &[50_013]);
        let for_a_user = IdentityError { credential: "on-behalf-of with client secret", ..own.clone() };
        assert!(own.hint().starts_with("The signature of the service account's token"), "{}", own.hint());
        assert!(for_a_user.hint().starts_with("The caller's token is not one"), "{}", for_a_user.hint());
        let secret = IdentityError { codes: vec![7_000_215], ..for_a_user };
        assert_eq!(secret.advice().means, "The client secret is wrong");
        assert!(!secret.needs_user());
        assert!(IdentityError { error: Some("interaction_required".to_owned()), ..secret }.needs_user());
    }

    #[test]
    fn every_fault_has_a_hint_for_the_operator() {
        for class in [
            FaultClass::Http,
            FaultClass::Connect,
            FaultClass::Dns,
            FaultClass::Tls,
            FaultClass::Timeout,
            FaultClass::Io,
            FaultClass::Parse,
            FaultClass::Config,
            FaultClass::Internal,
        ] {
            let hint = IdentityError::new(class, "workload identity").hint();
            assert!(hint.contains("the operator of this server"), "{}: {hint}", class.as_str());
        }
    }
}
