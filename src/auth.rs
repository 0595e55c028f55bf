//! Who is calling us, and what may they do?
//!
//! A [`Caller`] says it, and nobody outside this room can make one up that has an identity: only `verifier` gives identities,
//! for a token of Entra ID that it has checked. `discovery` and `keys` are what it is checked with, and `proven` remembers what was good. With
//! inbound authorization switched off every caller is anonymous, acts with the server's rights, and the network decides who that may be.

mod discovery;
mod keys;
#[cfg(test)]
#[cfg(feature = "demo")]
mod properties;
mod proven;
mod step_up;
#[cfg(test)]
#[cfg(feature = "demo")]
mod tests;
mod verifier;

use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

use secrecy::SecretString;

pub use crate::settings::Permission;
use crate::settings::PermissionNames;
use crate::telemetry::audit::Subject;
pub use step_up::StepUp;
pub use verifier::{Published, Recalled, Verifier, VerifierError, inspect};

/// The caller of one request. Placed in the request's extensions by the HTTP layer; private, so that it cannot be forged.
#[derive(Debug, Clone)]
pub struct Caller {
    address: IpAddr,
    identity: Option<Arc<Identity>>,
    /// What the caller wanted to do and may not. The tools find out, and the HTTP layer has to answer.
    lacked: Option<Arc<OnceLock<Lacked>>>,
}

/// A permission that a caller does not have, and the tool that wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lacked {
    /// The permission.
    pub permission: Permission,
    /// The tool.
    pub tool: &'static str,
}

impl Caller {
    /// A caller of whom only the address is known.
    pub fn unauthenticated(address: IpAddr) -> Self {
        Self { address: address.to_canonical(), identity: None, lacked: None }
    }

    /// The same caller, who has proved to be this one.
    #[must_use]
    pub fn identified(self, identity: Identity) -> Self {
        Self { identity: Some(Arc::new(identity)), lacked: Some(Arc::default()), ..self }
    }

    /// The client, as far as proxies that we trust name it; else the other end of the connection.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Who proved to be calling; `None` when nobody was asked to.
    pub fn identity(&self) -> Option<&Identity> {
        self.identity.as_deref()
    }

    /// Whether the caller may do this: whoever was not asked who they are may do everything.
    pub fn may(&self, permission: Permission) -> bool {
        self.identity().is_none_or(|identity| identity.permissions().holds(permission))
    }

    /// The same, for somebody who is about to do it: a refusal is remembered, for the answer has to say it.
    pub fn may_call(&self, tool: &'static str, permission: Permission) -> bool {
        let allowed = self.may(permission);
        if let (false, Some(lacked)) = (allowed, &self.lacked) {
            let _ = lacked.set(Lacked { permission, tool });
        }
        allowed
    }

    /// What the caller was refused in this request.
    pub fn lacked(&self) -> Option<Lacked> {
        self.lacked.as_ref().and_then(|lacked| lacked.get().copied())
    }
}

/// Who a checked token says is calling: in Entra a person or an app is the pair of its tenant and its object id, never a name.
#[derive(Debug)]
pub struct Identity {
    said: Arc<Said>,
    assertion: Option<SecretString>,
}

/// What a good token says.
#[derive(Debug)]
struct Said {
    /// Shared, for each call is written down with it.
    subject: Arc<Subject>,
    delegated: bool,
    permissions: Permissions,
}

impl Identity {
    /// The caller as the audit names it.
    pub fn subject(&self) -> &Arc<Subject> {
        &self.said.subject
    }

    /// `tid`: the tenant that vouches for the rest.
    pub fn tenant(&self) -> &str {
        &self.said.subject.tenant
    }

    /// `oid`: the user, or the service principal of an app that calls by itself.
    pub fn object(&self) -> &str {
        &self.said.subject.object
    }

    /// `azp` or `appid`: the client that the token was issued to.
    pub fn app(&self) -> &str {
        &self.said.subject.app
    }

    /// Whether an app calls on behalf of a user, and not by itself.
    pub fn is_delegated(&self) -> bool {
        self.said.delegated
    }

    /// What the token allows.
    pub fn permissions(&self) -> Permissions {
        self.said.permissions
    }

    /// The token itself, to be exchanged; `None` unless the verifier was told to keep it. It goes to Entra and nowhere else.
    pub fn assertion(&self) -> Option<&SecretString> {
        self.assertion.as_ref()
    }
}

/// A set of permissions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Permissions(u8);

impl Permissions {
    /// Whether this one is among them.
    pub fn holds(self, permission: Permission) -> bool {
        self.0 & bit(permission) != 0
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The permissions behind these names of scopes or roles. Names are compared whole.
    fn named<'a>(given: impl Iterator<Item = &'a str>, names: &PermissionNames) -> Self {
        let mut set = Self::default();
        for given in given {
            for (permission, _) in names.iter().filter(|(_, name)| *name == given) {
                set.0 |= bit(permission);
            }
        }
        set
    }
}

fn bit(permission: Permission) -> u8 {
    1 << permission as u8
}

/// Why a caller is not let in, or not let do something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// No bearer token was sent.
    NoToken,
    /// `Authorization` stands there twice, or is no `Bearer` and one token.
    MalformedHeader,
    /// The token is no JWT.
    MalformedToken,
    /// It is signed in another way than RS256.
    Algorithm,
    /// It names no key.
    NoKeyId,
    /// It names a key that its tenant does not publish.
    UnknownKey,
    /// Its key is not for its issuer.
    KeyIssuer,
    /// The signature is wrong.
    Signature,
    /// Its time is over.
    Expired,
    /// Its time has not come.
    NotYetValid,
    /// Another issuer made it, or the one that did is not trusted.
    Issuer,
    /// It is for another resource.
    Audience,
    /// Its tenant is not that of its issuer.
    Tenant,
    /// Its version does not fit its issuer.
    Version,
    /// A claim that has to be there is not, or has another form than Entra's.
    Claims,
    /// It names no client: an ID token.
    NotAnAccessToken,
    /// Its client may not call.
    Client,
    /// It is good, and grants none of our permissions.
    NoPermission,
    /// It is good, and does not grant the permission that the called tool wants.
    ToolPermission(Lacked),
    /// There are no keys to check it with.
    KeysUnavailable,
    /// Its key is unknown, keys are being fetched, and too many wait for them already.
    KeysAwaited,
    /// This machine's clock is before 1970: no token's times can be compared with it.
    Clock,
}

/// How a refusal is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// 400: the request is not well formed.
    Malformed,
    /// 401 without an error: nothing was sent that could be wrong.
    TokenWanted,
    /// 401: another token is needed.
    InvalidToken,
    /// 403: more permissions are needed.
    InsufficientScope,
    /// 403: no token of this client would do.
    Forbidden,
    /// 503: ask later.
    Unavailable,
}

impl Refusal {
    /// All of them: the closed set of words that logs and metrics may use.
    pub const WORDS: [&str; 22] = [
        "no_token",
        "malformed_header",
        "malformed_token",
        "algorithm",
        "no_key_id",
        "unknown_key",
        "key_issuer",
        "signature",
        "expired",
        "not_yet_valid",
        "issuer",
        "audience",
        "tenant",
        "version",
        "claims",
        "not_an_access_token",
        "client",
        "no_permission",
        "tool_permission",
        "keys_unavailable",
        "keys_awaited",
        "clock",
    ];

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoToken => "no_token",
            Self::MalformedHeader => "malformed_header",
            Self::MalformedToken => "malformed_token",
            Self::Algorithm => "algorithm",
            Self::NoKeyId => "no_key_id",
            Self::UnknownKey => "unknown_key",
            Self::KeyIssuer => "key_issuer",
            Self::Signature => "signature",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::Issuer => "issuer",
            Self::Audience => "audience",
            Self::Tenant => "tenant",
            Self::Version => "version",
            Self::Claims => "claims",
            Self::NotAnAccessToken => "not_an_access_token",
            Self::Client => "client",
            Self::NoPermission => "no_permission",
            Self::ToolPermission(_) => "tool_permission",
            Self::KeysUnavailable => "keys_unavailable",
            Self::KeysAwaited => "keys_awaited",
            Self::Clock => "clock",
        }
    }

    /// How it is answered.
    pub fn verdict(self) -> Verdict {
        match self {
            Self::NoToken => Verdict::TokenWanted,
            Self::MalformedHeader => Verdict::Malformed,
            Self::NoPermission | Self::ToolPermission(_) => Verdict::InsufficientScope,
            Self::Client => Verdict::Forbidden,
            Self::KeysUnavailable | Self::KeysAwaited | Self::Clock => Verdict::Unavailable,
            Self::MalformedToken
            | Self::Algorithm
            | Self::NoKeyId
            | Self::UnknownKey
            | Self::KeyIssuer
            | Self::Signature
            | Self::Expired
            | Self::NotYetValid
            | Self::Issuer
            | Self::Audience
            | Self::Tenant
            | Self::Version
            | Self::Claims
            | Self::NotAnAccessToken => Verdict::InvalidToken,
        }
    }

    /// What the caller is told. It helps whoever has a good token and the wrong one, and tells a forger nothing that the
    /// specification does not.
    pub fn advice(self) -> &'static str {
        match self {
            Self::NoToken => {
                "This server wants an access token of Entra ID: send it as `Authorization: Bearer <token>`."
            }
            Self::MalformedHeader => "Send one `Authorization` header: the word `Bearer`, a space, and the token.",
            Self::MalformedToken | Self::Claims => "The token is no access token of Entra ID.",
            Self::Algorithm | Self::NoKeyId | Self::UnknownKey | Self::KeyIssuer | Self::Signature => {
                "The token is not signed by a key of its tenant."
            }
            Self::Expired => "The token has expired: get a new one.",
            Self::NotYetValid => "The token is not valid yet: is the clock right that it was made by?",
            Self::Issuer | Self::Tenant | Self::Version => {
                "The token is from another tenant than those that may call, or of a version that is not accepted."
            }
            Self::Audience => "The token is for another resource: ask for one of the scopes of this server.",
            Self::NotAnAccessToken => "This is no access token, an ID token perhaps: send the access token.",
            Self::Client => {
                "This client application may not call this server. Its operators can add it to INBOUND_CLIENTS."
            }
            Self::NoPermission => {
                "The token grants none of this server's permissions: ask for its scopes, or have an app role assigned to the app."
            }
            Self::ToolPermission(_) => {
                "The token does not grant the permission that this tool wants: ask for its scope, or have its app role assigned to the app."
            }
            Self::KeysUnavailable => "The server cannot check tokens yet: it has not been able to fetch Entra's keys.",
            Self::KeysAwaited => {
                "The server does not know the token's key. It is fetching Entra's keys, and has no room for another request to wait for them."
            }
            Self::Clock => {
                "The server cannot check tokens: its clock is before 1970. Its operators have to set the clock of the machine that it runs on."
            }
        }
    }
}
