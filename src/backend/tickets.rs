//! Support tickets, as the backend takes and sends them.

use bytes::Bytes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::record::{self, Object, Record, cut, is_false};
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

/// A support ticket, with what the backend says of it. Fields that it adds are dropped here.
#[derive(Debug, Clone, Deserialize, Serialize, JsonSchema)]
pub struct Ticket {
    /// The ticket's id.
    #[serde(deserialize_with = "record::id")]
    pub id: String,
    /// One line.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "record::text")]
    #[schemars(with = "String")]
    pub title: Option<String>,
    /// The whole story.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "record::text")]
    #[schemars(with = "String")]
    pub description: Option<String>,
    /// How urgent it is: a [`Priority`], or another word of the backend's.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "record::text")]
    #[schemars(with = "String", extend("usually" = "Usually low, medium, high or critical."))]
    pub priority: Option<String>,
    /// Where it stands: a [`TicketStatus`], or another word of the backend's.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "record::text")]
    #[schemars(with = "String", extend("usually" = "Usually open, in_progress or closed."))]
    pub status: Option<String>,
    /// When it was made, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "record::text")]
    #[schemars(with = "String")]
    pub created_at: Option<String>,
    /// When it last changed, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "record::text")]
    #[schemars(with = "String")]
    pub updated_at: Option<String>,
    /// The id of the user who works on it.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "record::text")]
    #[schemars(with = "String")]
    pub assignee_id: Option<String>,
}

impl Record for Ticket {
    const NAME: &'static str = "a ticket";
}

/// A page of tickets.
#[derive(Debug, Clone, Deserialize, Serialize, JsonSchema)]
pub struct TicketPage {
    /// How many tickets there are in all, with this status if one was asked for.
    pub total: u64,
    /// The tickets of this page, no more than were asked for.
    #[serde(deserialize_with = "record::items")]
    pub items: Vec<Ticket>,
    /// Whether the backend sent more.
    #[serde(skip_deserializing, skip_serializing_if = "is_false")]
    pub truncated: bool,
}

impl BackendClient {
    /// `POST /tickets`, with an `Idempotency-Key` of its own.
    ///
    /// # Errors
    ///
    /// [`BackendError`]; one whose `unknown_write` is set may have made the ticket all the same.
    pub async fn create_ticket(&self, call: &Call, ticket: &NewTicket) -> Result<Ticket, BackendError> {
        let body = serde_json::to_vec(ticket).map(Bytes::from).unwrap_or_default();
        let Object(ticket) =
            self.send(call, Outgoing::write(Route::CreateTicket, self.url(&["tickets"]), body)).await?;
        Ok(ticket)
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
        let mut page: TicketPage = self.send(call, Outgoing::read(Route::Tickets, url)).await?;
        page.truncated = cut(&mut page.items, limit);
        Ok(page)
    }
}
