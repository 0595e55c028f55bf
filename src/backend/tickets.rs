//! Support tickets, as the backend takes and sends them.

use bytes::Bytes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{BackendClient, BackendError, Call, Outgoing, Route};

/// How urgent a ticket is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
#[expect(missing_docs, reason = "a doc comment on a variant turns the schema's plain `enum` into a `oneOf`")]
pub enum Priority {
    Low,
    #[default]
    Medium,
    High,
    Critical,
}

/// Where a ticket stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
#[expect(missing_docs, reason = "a doc comment on a variant turns the schema's plain `enum` into a `oneOf`")]
pub enum TicketStatus {
    Open,
    InProgress,
    Closed,
}

impl TicketStatus {
    fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::InProgress => "in_progress",
            Self::Closed => "closed",
        }
    }
}

/// What `POST /tickets` takes.
#[derive(Debug, Clone, Serialize)]
pub struct NewTicket {
    /// One line.
    pub title: String,
    /// The whole story.
    pub description: String,
    /// How urgent it is.
    pub priority: Priority,
    /// Who shall work on it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub assignee_id: Option<String>,
}

/// A support ticket. Fields that the backend adds are dropped here.
#[derive(Debug, Clone, Deserialize, Serialize, JsonSchema)]
pub struct Ticket {
    /// The ticket's id.
    pub id: String,
    /// One line.
    pub title: String,
    /// The whole story.
    pub description: String,
    /// How urgent it is.
    pub priority: Priority,
    /// Where it stands.
    pub status: TicketStatus,
    /// When it was made, RFC 3339.
    pub created_at: String,
    /// When it last changed, RFC 3339.
    pub updated_at: String,
    /// The id of the user who works on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String")]
    pub assignee_id: Option<String>,
}

/// A page of tickets.
#[derive(Debug, Clone, Deserialize, Serialize, JsonSchema)]
pub struct TicketPage {
    /// How many tickets there are in all, with this status if one was asked for.
    pub total: u64,
    /// The tickets of this page.
    pub items: Vec<Ticket>,
}

impl BackendClient {
    /// `POST /tickets`, with an `Idempotency-Key` of its own.
    ///
    /// # Errors
    ///
    /// [`BackendError`]; one whose `unknown_write` is set may have made the ticket all the same.
    pub async fn create_ticket(&self, call: &Call, ticket: &NewTicket) -> Result<Ticket, BackendError> {
        let body = serde_json::to_vec(ticket).map(Bytes::from).unwrap_or_default();
        self.send(call, Outgoing::write(Route::CreateTicket, self.url(&["tickets"]), body)).await
    }

    /// `GET /tickets?skip&limit[&status]`.
    ///
    /// # Errors
    ///
    /// [`BackendError`], as every method here.
    pub async fn tickets(
        &self,
        call: &Call,
        status: Option<TicketStatus>,
        skip: u64,
        limit: u32,
    ) -> Result<TicketPage, BackendError> {
        let mut url = self.url(&["tickets"]);
        let status = status.map(|status| format!("&status={}", status.as_str())).unwrap_or_default();
        url.set_query(Some(&format!("skip={skip}&limit={limit}{status}")));
        self.send(call, Outgoing::read(Route::Tickets, url)).await
    }
}
