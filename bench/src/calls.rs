//! The calls: what is sent, and what has to come back.

use serde_json::{Value, json};

use crate::answers;

/// What a call asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    User,
    Users,
    NewTicket,
    Tickets,
    /// So many rows of a dataset, 1 KiB each.
    Rows(u64),
    /// A user for whom the backend has only this status: the right answer is a failed call.
    Failure(u16),
}

/// The two ways to speak MCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Era {
    /// 2025-11-25.
    Legacy,
    /// 2026-07-28: each request says by itself what it is.
    Modern,
}

/// A call that was made: its JSON-RPC id, and the number that its arguments hold where they hold one.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    pub kind: Kind,
    pub id: u64,
    pub number: u64,
}

const FIRST_ID: u64 = 1_000_000_000;
/// The place of a number in a template.
const HOLE: u64 = 999_999_999;
const TITLE: &str = "Ticket from the load generator ";
const DESCRIPTION: &str = "The printer on the fourth floor answers every job with a blank page.";
const ASSIGNEE: &str = "u000000042";
const DATASET: &str = "sales";
const PAGE: u64 = 10;

impl Kind {
    fn tool(self) -> &'static str {
        match self {
            Self::User | Self::Failure(_) => "get_user_profile",
            Self::Users => "list_users",
            Self::NewTicket => "create_ticket",
            Self::Tickets => "list_tickets",
            Self::Rows(_) => "query_data",
        }
    }

    fn arguments(self) -> Value {
        match self {
            Self::User => json!({ "user_id": answers::user_id(HOLE), "include_details": true }),
            Self::Failure(status) => json!({ "user_id": format!("status-{status}") }),
            Self::Users => json!({ "skip": 0, "limit": PAGE }),
            Self::NewTicket => {
                let title = format!("{TITLE}{HOLE}");
                json!({ "title": title, "description": DESCRIPTION, "priority": "high", "assignee_id": ASSIGNEE })
            }
            Self::Tickets => json!({ "status": "open", "skip": 0, "limit": PAGE }),
            Self::Rows(limit) => json!({ "dataset": DATASET, "limit": limit }),
        }
    }
}

impl Call {
    /// The result of a call that succeeds. A candidate that passes the backend's answer through adds nothing of its own.
    pub fn result(&self, passed_through: bool) -> Option<Value> {
        let json = match self.kind {
            Kind::User => answers::user(&answers::user_id(self.number), true),
            Kind::Users => answers::users(PAGE),
            Kind::NewTicket => {
                answers::created_ticket(&format!("{TITLE}{:09}", self.number), DESCRIPTION, "high", Some(ASSIGNEE))
            }
            Kind::Tickets => answers::tickets("open", PAGE),
            Kind::Rows(limit) => answers::rows(limit),
            Kind::Failure(_) => return None,
        };
        let mut result: Value = serde_json::from_str(&json).ok()?;
        if let (Kind::Rows(limit), false) = (self.kind, passed_through) {
            result["dataset"] = DATASET.into();
            result["rows"] = limit.into();
        }
        Some(result)
    }

    /// What the answer to this very call holds, beside its id.
    pub fn mark(&self) -> Option<[u8; 10]> {
        let first = match self.kind {
            Kind::User => b'u',
            Kind::NewTicket => b' ',
            _ => return None,
        };
        let mut mark = [first; 10];
        write_digits(&mut mark[1..], self.number);
        Some(mark)
    }

    /// Its id as it stands in the answer.
    pub fn id_digits(&self) -> [u8; 10] {
        let mut digits = [0; 10];
        write_digits(&mut digits, self.id);
        digits
    }
}

/// The field that carries a token, where there is one.
pub fn authorization(bearer: Option<&str>) -> String {
    bearer.map_or_else(String::new, |token| format!("Authorization: Bearer {token}\r\n"))
}

/// A request with two places of fixed width: the JSON-RPC id and the number.
struct Template {
    kind: Kind,
    bytes: Vec<u8>,
    id_at: usize,
    number_at: Option<usize>,
}

impl Template {
    fn new(kind: Kind, era: Era, host: &str, bearer: Option<&str>) -> Self {
        let mut params = json!({ "name": kind.tool(), "arguments": kind.arguments() });
        let mut more = String::new();
        let version = match era {
            Era::Legacy => "2025-11-25",
            Era::Modern => {
                params["_meta"] = json!({
                    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
                    "io.modelcontextprotocol/clientInfo": { "name": "bench", "version": "0" },
                    "io.modelcontextprotocol/clientCapabilities": {},
                });
                more = format!("Mcp-Method: tools/call\r\nMcp-Name: {}\r\n", kind.tool());
                "2026-07-28"
            }
        };
        let body = json!({ "jsonrpc": "2.0", "id": FIRST_ID, "method": "tools/call", "params": params }).to_string();
        let head = format!(
            "POST /mcp HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n\
             Accept: application/json, text/event-stream\r\nMcp-Protocol-Version: {version}\r\n{more}{}\
             Content-Length: {}\r\n\r\n",
            authorization(bearer),
            body.len()
        );
        let place = |digits: u64| body.find(&digits.to_string()).map(|at| head.len() + at);
        let (id_at, number_at) = (place(FIRST_ID).unwrap_or_default(), place(HOLE));
        Self { kind, id_at, number_at, bytes: (head + &body).into_bytes() }
    }
}

/// Makes calls, one kind after the other as often as the mix says.
pub struct Maker {
    templates: Vec<Template>,
    next: u64,
}

impl Maker {
    pub fn new(mix: &[Kind], era: Era, host: &str, bearer: Option<&str>) -> Self {
        Self { templates: mix.iter().map(|kind| Template::new(*kind, era, host, bearer)).collect(), next: 0 }
    }

    /// Writes the next request.
    pub fn write(&mut self, out: &mut Vec<u8>) -> Call {
        let template = &self.templates[(self.next % self.templates.len() as u64) as usize];
        let call = Call { kind: template.kind, id: FIRST_ID + self.next % FIRST_ID, number: self.next % 1_000_000 };
        self.next += 1;
        out.clear();
        out.extend_from_slice(&template.bytes);
        write_digits(&mut out[template.id_at..template.id_at + 10], call.id);
        if let Some(at) = template.number_at {
            write_digits(&mut out[at..at + 9], call.number);
        }
        call
    }
}

fn write_digits(out: &mut [u8], mut number: u64) {
    for digit in out.iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
}
