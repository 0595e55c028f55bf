//! The callers of the demo: two people and an agent, as the tenant knows them, and the API that the MCP server is to them.
//!
//! Their tokens are made without asking over HTTP; `signin` makes the same ones for clients that sign a person in.

use serde_json::{Value, json};
use uuid::Uuid;

use super::super::wire::unix_now;
use super::keys::overlay;
use super::{Directory, StandInEntra, TokenVersion};

/// The client id of the MCP server's app registration: the audience of (version 2) tokens for it.
pub const API_APP_ID: &str = "c4a1f6d2-7e3b-4b8c-a5d0-9f8e7d6c5b4a";
/// The public client that people use: an editor, a chat program.
pub const PEOPLES_CLIENT_ID: &str = "5e9d3c7b-1a2f-4d6e-8b0c-4f3e2d1c0b9a";
/// The client id of the agent that calls by itself.
pub const AGENT_CLIENT_ID: &str = "8b7a6c5d-4e3f-4a2b-9c1d-0e9f8a7b6c5d";

/// The permissions of the MCP server, as scopes and as app roles.
pub(super) const PERMISSIONS: [&str; 4] = ["users.read", "tickets.read", "tickets.write", "data.read"];

/// Who calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DemoCaller {
    /// A person who may read.
    Reader,
    /// A person who may do everything.
    Writer,
    /// An app without a person, which looks after tickets.
    Agent,
}

impl DemoCaller {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Reader, Self::Writer, Self::Agent];

    /// What people call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Reader => "reader",
            Self::Writer => "writer",
            Self::Agent => "agent",
        }
    }

    /// The object id of the person, or of the agent's service principal.
    #[must_use]
    pub fn object_id(self) -> &'static str {
        match self {
            Self::Reader => "11d5a9c3-6b2e-4f70-8d1c-a2b3c4d5e6f7",
            Self::Writer => "22e6b0d4-7c3f-4a81-9e2d-b3c4d5e6f7a8",
            Self::Agent => "33f7c1e5-8d40-4b92-af3e-c4d5e6f7a8b9",
        }
    }

    /// What they were granted.
    #[must_use]
    pub fn permissions(self) -> &'static [&'static str] {
        match self {
            Self::Reader => &["users.read", "tickets.read", "data.read"],
            Self::Writer => &PERMISSIONS,
            Self::Agent => &["tickets.read", "tickets.write"],
        }
    }
}

impl StandInEntra {
    /// An access token for the MCP server, of version 2. The fields of `changes` replace claims, `null` removes one.
    #[must_use]
    pub fn caller_token(&self, caller: DemoCaller, changes: &Value) -> String {
        self.sign(&json!({}), &self.caller_claims(caller, changes))
    }

    /// The claims of [`StandInEntra::caller_token`].
    #[must_use]
    pub fn caller_claims(&self, caller: DemoCaller, changes: &Value) -> Value {
        let directory = &self.state.directory;
        let mut claims = match caller {
            DemoCaller::Agent => {
                let mut claims = common_claims(directory, caller, AGENT_CLIENT_ID);
                overlay(&mut claims, &json!({ "sub": caller.object_id(), "roles": caller.permissions() }));
                claims
            }
            person => user_claims(directory, person, PEOPLES_CLIENT_ID, &person.permissions().join(" ")),
        };
        overlay(&mut claims, changes);
        claims
    }
}

/// The claims of a person's token. `scopes` are short names with blanks between them.
pub(super) fn user_claims(directory: &Directory, person: DemoCaller, client_id: &str, scopes: &str) -> Value {
    let mut claims = common_claims(directory, person, client_id);
    // Other than `oid`, the subject of a person is another one for each application.
    let subject = format!("{}-as-the-api-knows-them", person.name());
    let name = format!("{}@{}", person.name(), directory.options.tenant_domain);
    overlay(&mut claims, &json!({ "sub": subject, "scp": scopes, "name": person.name(), "preferred_username": name }));
    claims
}

fn common_claims(directory: &Directory, caller: DemoCaller, client_id: &str) -> Value {
    let now = unix_now();
    json!({
        "iss": directory.issuer(TokenVersion::V2), "aud": API_APP_ID, "tid": directory.options.tenant_id, "ver": "2.0",
        "iat": now, "nbf": now, "exp": now + directory.token_lifetime().as_secs() as i64,
        "oid": caller.object_id(), "azp": client_id, "azpacr": "0",
        "rh": "1.AAAA", "uti": Uuid::new_v4().simple().to_string(),
    })
}
