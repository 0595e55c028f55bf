//! The tools about support tickets.

use schemars::JsonSchema;
use serde::Deserialize;
use validator::Validate;

use super::args::{MAX_SAFE_INTEGER, SEGMENT_PATTERN};
use super::error::{ProblemExt as _, segment};
use super::users::default_limit;
use super::{Effect, Tool};
use crate::backend::{BackendClient, Call, NewTicket, Priority, Ticket, TicketPage, TicketStatus};
use crate::problem::Problem;

/// Create a support ticket and return it with its id. Each call creates another ticket: when a call fails with `outcome` `unknown`, look in `list_tickets` before calling again.
#[derive(Debug, Deserialize, JsonSchema, Validate)]
#[serde(deny_unknown_fields)]
pub(super) struct CreateTicket {
    /// The matter in one line.
    #[validate(length(min = 1, max = 200))]
    title: String,
    /// What happened, what was expected, what was tried.
    #[validate(length(min = 10, max = 5000))]
    description: String,
    /// How urgent it is.
    #[serde(default)]
    priority: Priority,
    /// The id of the user who shall work on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[validate(length(min = 1, max = 128))]
    #[schemars(with = "String", length(min = 1, max = 128), extend("pattern" = SEGMENT_PATTERN))]
    assignee_id: Option<String>,
}

impl Tool for CreateTicket {
    const NAME: &'static str = "create_ticket";
    const TITLE: &'static str = "Create ticket";
    const EFFECT: Effect = Effect::Adds;
    type Output = Ticket;

    async fn run(self, backend: &BackendClient, call: &Call) -> Result<Ticket, Problem> {
        let assignee_id = self.assignee_id.map(|id| segment("assignee_id", id)).transpose()?;
        let ticket = NewTicket {
            title: self.title,
            description: self.description,
            priority: self.priority,
            assignee_id: assignee_id.map(|id| id.to_string()),
        };
        backend.create_ticket(call, &ticket).await.or_problem(|| "place for tickets".to_owned())
    }
}

/// List support tickets, newest first, a page at a time. `total` tells how many there are; go on with `skip`.
#[derive(Debug, Deserialize, JsonSchema, Validate)]
#[serde(deny_unknown_fields)]
pub(super) struct ListTickets {
    /// Only tickets that stand like this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "TicketStatus")]
    status: Option<TicketStatus>,
    /// How many tickets to pass over.
    #[serde(default)]
    #[validate(range(min = 0, max = MAX_SAFE_INTEGER))]
    skip: u64,
    /// How many tickets to return at most.
    #[serde(default = "default_limit")]
    #[validate(range(min = 1, max = 100))]
    limit: u32,
}

impl Tool for ListTickets {
    const NAME: &'static str = "list_tickets";
    const TITLE: &'static str = "List tickets";
    const EFFECT: Effect = Effect::Reads;
    type Output = TicketPage;

    async fn run(self, backend: &BackendClient, call: &Call) -> Result<TicketPage, Problem> {
        backend.tickets(call, self.status, self.skip, self.limit).await.or_problem(|| "list of tickets".to_owned())
    }
}
