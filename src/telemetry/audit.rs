//! Who called which tool, with what outcome: one event for each tool call and each refused caller.
//!
//! Events stand in the log under the target `audit`, which no level silences and nothing samples; and, with `AUDIT_LOG_FILE`,
//! as a chain of hashes in a file of their own, written by a thread of its own. Arguments appear as their hash only: the SHA-256
//! of their JSON without blanks, the keys of every object in the order of their bytes.

mod chain;
mod file;
mod room;

use std::cell::RefCell;
use std::io::BufReader;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use time::OffsetDateTime;
use tracing::{Level, info};

pub use chain::{Broken, Digest, HexDigest, Incident, Whole};
pub use file::OpenError;
use file::{FileSink, Promise};

use super::logs::line::{OurLine, our_place};
use super::logs::{Line, Told, hand_past_events};
use super::text::Text;
use super::trace::TraceId;
use crate::settings::AuditSettings;

/// What happened, in plain values: telemetry knows no callers and no tools.
#[derive(Debug, Clone)]
pub struct Event {
    /// When it happened.
    pub at: OffsetDateTime,
    /// Of which kind.
    pub name: Name,
    /// Finds the log lines of the request.
    pub trace_id: TraceId,
    /// Who proved to be calling; `None` when nobody did.
    pub caller: Option<Arc<Subject>>,
    /// The other end of the connection.
    pub client_address: Option<IpAddr>,
    /// Which tool was to run.
    pub tool: Option<&'static Tool>,
    /// The hash of its arguments.
    pub arguments: Option<Digest>,
    /// Whether the caller may do this.
    pub decision: Decision,
    /// What came of it: `ok`, `cancelled`, `unknown` (a write that was sent and given up), or the code of an error.
    pub outcome: &'static str,
    /// The status of the backend's last answer.
    pub backend_status: Option<u16>,
    /// How often the backend was asked.
    pub attempts: u32,
    /// The key that went along with a write.
    pub idempotency_key: Option<Box<str>>,
    /// How long it took.
    pub took: Duration,
}

impl Event {
    /// A caller that was turned away before any tool was looked at; `outcome` is the word for the reason.
    pub fn refused_caller(trace_id: TraceId, client_address: Option<IpAddr>, outcome: &'static str) -> Self {
        Self {
            at: OffsetDateTime::now_utc(),
            name: Name::CallerRefused,
            trace_id,
            caller: None,
            client_address,
            tool: None,
            arguments: None,
            decision: Decision::Refused,
            outcome,
            backend_status: None,
            attempts: 0,
            idempotency_key: None,
            took: Duration::ZERO,
        }
    }
}

/// The kinds of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Name {
    /// Somebody called a tool.
    ToolCall,
    /// Somebody was not let in.
    CallerRefused,
}

impl Name {
    fn as_str(self) -> &'static str {
        match self {
            Self::ToolCall => "tool_call",
            Self::CallerRefused => "caller_refused",
        }
    }
}

/// Whether a caller may do what it asks for. What comes of it is another question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// It may.
    Allowed,
    /// It may not, or not now; nothing was sent to the backend.
    Refused,
}

impl Decision {
    fn as_str(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Refused => "refused",
        }
    }
}

/// A tool as the audit names it, written once.
#[derive(Debug, Clone)]
pub struct Tool {
    pub(super) name: &'static str,
    /// Its name and the hash of its input schema, as they stand among the fields of a record.
    fields: Text,
}

impl Tool {
    /// The tool with this name and input schema.
    pub fn new(name: &'static str, schema: &impl Serialize) -> Self {
        let mut fields = Text::default();
        fields.field("gen_ai.tool.name", name);
        fields.field("tool.schema_sha256", digest_of_json(schema).hex().as_str());
        Self { name, fields }
    }
}

/// Somebody who proved to be calling: ids, never names.
#[derive(Debug)]
pub struct Subject {
    /// The tenant that vouches for the rest.
    pub tenant: Box<str>,
    /// The user, or the service principal of an app that calls by itself.
    pub object: Box<str>,
    /// The client that the token was issued to.
    pub app: Box<str>,
}

/// The SHA-256 of a JSON value without blanks, the keys of every object in the order of their bytes: how arguments and schemas
/// are named in the audit.
pub fn digest_of_json(value: &impl Serialize) -> Digest {
    thread_local! {
        static JSON: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    /// What a usual call needs is kept; what a large one needed is given back.
    const KEPT: usize = 4_096;
    JSON.with_borrow_mut(|json| {
        json.clear();
        // serde_json keeps the keys of its objects sorted, and fails on none of its own values.
        let _ = serde_json::to_writer(&mut *json, value);
        let digest = Digest::of(json);
        json.shrink_to(KEPT);
        digest
    })
}

/// Where events go: by default, to the log alone.
#[derive(Debug, Default)]
pub struct Audit {
    file: Option<FileSink>,
    required: bool,
}

/// The promise that an event will find room, where one was asked for.
#[derive(Debug, Default)]
pub struct Slot(Option<Promise>);

/// Events cannot be written, and nothing may happen without them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unwritable;

impl Audit {
    /// Opens the file, if there shall be one, and continues its chain.
    ///
    /// # Errors
    ///
    /// When it cannot be opened, is in use by another server, or is no audit file.
    pub fn start(settings: &AuditSettings) -> Result<Self, OpenError> {
        let file = settings.file.as_deref().map(|path| FileSink::open(path, settings.required)).transpose()?;
        Ok(Self { file, required: settings.required })
    }

    /// Asked before a call begins.
    ///
    /// # Errors
    ///
    /// With `AUDIT_REQUIRED`, while the file cannot be written, the disk has no room for the event, or too many events wait for it.
    pub fn admit(&self) -> Result<Slot, Unwritable> {
        match &self.file {
            Some(file) if self.required => file.reserve().map(|slot| Slot(Some(slot))).ok_or(Unwritable),
            _ => Ok(Slot(None)),
        }
    }

    /// Writes the event of a tool call, and the line of the log that ends it. Called inside of the request's span.
    pub fn record_call(&self, slot: Slot, event: Event, told: Told) {
        log(self.keep(slot, event), Some(told));
    }

    /// Writes any other event. Called inside of the request's span, from which its line in the log takes the trace id.
    pub fn record(&self, event: Event) {
        log(self.keep(Slot::default(), event), None);
    }

    /// Hands an event to the file, if there is one; gives what the log says of it.
    fn keep(&self, slot: Slot, event: Event) -> Record {
        let record = Record::of(event);
        match (slot.0, &self.file) {
            (Some(slot), _) => slot.keep(record.clone()),
            (None, Some(file)) => file.send(record.clone()),
            (None, None) => {}
        }
        record
    }

    /// Events that did not get into the file, since the start.
    pub fn lost(&self) -> u64 {
        self.file.as_ref().map_or(0, FileSink::lost)
    }

    /// Whether events get into the file, as far as is known; true without one.
    pub fn is_writable(&self) -> bool {
        self.file.as_ref().is_none_or(FileSink::is_healthy)
    }

    /// Closes the file in good order, if that is done in time.
    pub async fn close(&self, patience: Duration) {
        if let Some(file) = &self.file {
            file.close(patience).await;
        }
    }
}

/// Writes an event to the log, and how its call ended, if it was one.
fn log(record: Record, told: Option<Told>) {
    if let Some(Line::Audit(record, told)) = hand_past_events(Line::Audit(record, told)) {
        record.tell();
        if let Some(told) = told {
            told.tell(&record);
        }
    }
}

/// Time-ordered, and unique without a system call.
fn event_id(at: OffsetDateTime) -> uuid::Uuid {
    let millis = (at.unix_timestamp_nanos() / 1_000_000) as u64;
    let mut random = [0; 10];
    fastrand::fill(&mut random);
    uuid::Builder::from_unix_timestamp_millis(millis, &random).into_uuid()
}

/// An event as it is recorded: the same in the log and in the file. Each of their threads gets one of its own: memory that one thread
/// takes and another gives back costs more than the copy.
#[derive(Debug, Clone)]
pub struct Record {
    id: uuid::Uuid,
    pub(super) event: Event,
}

impl Record {
    pub(super) fn of(event: Event) -> Self {
        Self { id: event_id(event.at), event }
    }

    /// As a line of the log.
    pub(super) fn write_to_log(&self, line: &mut Text) {
        let Event { at, trace_id, name, decision, outcome, .. } = self.event;
        let ours = OurLine { at, level: Level::INFO, logger: "audit", place: our_place!(), trace_id };
        ours.begin(line);
        line.push_all(&[name.as_str(), " ", decision.as_str(), ": "]);
        line.escaped(outcome);
        ours.go_on(line);
        self.write_fields(line);
        line.push("}\n");
    }

    /// The same as an event, for logs that are not JSON.
    pub(super) fn tell(&self) {
        let mut fields = Text::default();
        self.write_fields(&mut fields);
        let fields = fields.to_string();
        let fields = fields.strip_prefix(',').unwrap_or_default();
        let Event { name, decision, outcome, .. } = self.event;
        let (name, decision) = (name.as_str(), decision.as_str());
        info!(target: "audit", event = format_args!("{{{fields}}}"), "{name} {decision}: {outcome}");
    }

    /// As one JSON object with the same fields, for the file.
    fn write_to_file(&self, text: &mut Text) {
        text.push("{\"timestamp\":\"");
        text.time(self.event.at);
        text.push("\",\"trace_id\":\"");
        text.trace_id(self.event.trace_id);
        text.push("\"");
        self.write_fields(text);
        text.push("}");
    }

    /// What the log and the file have in common, each field with a comma before it.
    fn write_fields(&self, fields: &mut Text) {
        let event = &self.event;
        let mut id = [0; uuid::fmt::Hyphenated::LENGTH];
        let (name, id) = (event.name.as_str(), self.id.hyphenated().encode_lower(&mut id));
        // Whatever is not written as text is our own, and plain.
        fields.push_all(&[
            r#","event.name":""#,
            name,
            r#"","event.id":""#,
            id,
            r#"","event.decision":""#,
            event.decision.as_str(),
            "\"",
        ]);
        if let Some(tool) = event.tool {
            fields.append(&tool.fields);
        }
        if let Some(arguments) = &event.arguments {
            fields.push(r#","arguments_sha256":""#);
            arguments.write_to(fields);
            fields.push("\"");
        }
        fields.field("event.outcome", event.outcome);
        match event.caller.as_deref() {
            None => fields.push(r#","caller":"unauthenticated""#),
            Some(Subject { tenant, object, app }) => {
                for (name, id) in [("caller", object), ("caller.tenant", tenant), ("caller.app", app)] {
                    fields.field(name, id);
                }
            }
        }
        if let Some(key) = &event.idempotency_key {
            fields.field("idempotency_key", key);
        }
        if let Some(address) = event.client_address {
            fields.push(r#","client.address":""#);
            fields.address(address);
            fields.push("\"");
        }
        if let Some(status) = event.backend_status {
            fields.name("backend.status_code");
            fields.number(status.into());
        }
        fields.name("backend.attempts");
        fields.number(event.attempts.into());
        fields.name("event.duration_ms");
        fields.milliseconds(event.took);
    }
}

/// Follows the chain of a file, for `mcp-server audit verify`.
///
/// # Errors
///
/// At the first link that is broken, or when the file cannot be read.
pub fn verify(path: &Path) -> Result<Whole, Broken> {
    let head = file::read_head(&head_path(path))?;
    let lost = head.as_ref().map_or(0, |head| head.lost);
    let file = BufReader::with_capacity(1 << 20, std::fs::File::open(path)?);
    let mut whole = chain::verify(file, head.map(|head| head.end).as_ref())?;
    whole.lost_events += lost;
    Ok(whole)
}

/// The head of a file lies beside it.
fn head_path(path: &Path) -> PathBuf {
    let mut head = path.as_os_str().to_owned();
    head.push(".head");
    head.into()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::telemetry::trace::TraceContext;

    #[test]
    fn the_same_arguments_have_the_same_digest_in_whatever_order_they_come() {
        let parsed = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        let one = digest_of_json(&parsed(r#"{"b":{"y":1,"x":[1,2.5,null]},"a":"ü"}"#));
        assert_eq!(one, digest_of_json(&parsed(r#" { "a" : "\u00fc", "b": {"x":[1,2.50,null],"y":1}} "#)));
        // What anybody gets who hashes `{"a":"ü","b":{"x":[1,2.5,null],"y":1}}`.
        assert_eq!(one, Digest::of(r#"{"a":"ü","b":{"x":[1,2.5,null],"y":1}}"#.as_bytes()));
        assert_eq!(Digest::of(b"").hex().as_str(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert_ne!(one, digest_of_json(&json!({})));
    }

    #[test]
    fn a_record_is_one_object_whatever_its_parts_hold() {
        let hostile = "a\"\\\n\u{1b}[31m{},\u{2028}";
        let tool: &Tool = Box::leak(Box::new(Tool::new(hostile, &json!({}))));
        let arguments = Digest::of(b"{}");
        let event = Event {
            name: Name::ToolCall,
            caller: Some(Arc::new(Subject { tenant: hostile.into(), object: hostile.into(), app: hostile.into() })),
            tool: Some(tool),
            arguments: Some(arguments),
            idempotency_key: Some(hostile.into()),
            backend_status: Some(201),
            ..Event::refused_caller(TraceContext::begin().trace_id(), Some([127, 0, 0, 1].into()), hostile)
        };
        let mut text = Text::default();
        Record::of(event).write_to_file(&mut text);
        let text = text.to_string();
        let value: Value = serde_json::from_str(&text).unwrap();
        assert!(!text.contains(['\n', '\u{1b}', '\u{2028}']), "{text}");
        assert_eq!((&value["caller"], &value["client.address"]), (&json!(hostile), &json!("127.0.0.1")));
        assert_eq!(value["arguments_sha256"], arguments.hex().as_str());
        assert_eq!(value.as_object().unwrap().len(), 17, "{value:#}");
    }

    #[test]
    fn no_record_needs_more_room_than_is_claimed_for_one() {
        let guid = || "ffffffff-ffff-ffff-ffff-ffffffffffff".to_owned().into_boxed_str();
        let name: &str = Box::leak("n".repeat(128).into_boxed_str());
        let tool: &Tool = Box::leak(Box::new(Tool::new(name, &json!({}))));
        let event = Event {
            name: Name::ToolCall,
            caller: Some(Arc::new(Subject { tenant: guid(), object: guid(), app: guid() })),
            tool: Some(tool),
            arguments: Some(Digest::of(b"{}")),
            idempotency_key: Some("k".repeat(128).into()),
            backend_status: Some(u16::MAX),
            attempts: u32::MAX,
            took: Duration::MAX,
            ..Event::refused_caller(TraceContext::begin().trace_id(), Some([u16::MAX; 8].into()), name)
        };
        let mut text = Text::default();
        let mut end = chain::Head { sequence: u64::MAX - 1, ..chain::Head::start() };
        end.append(&mut text, |text| Record::of(event).write_to_file(text));
        assert!(text.len() as u64 <= room::EVENT_BYTES, "{}", text.len());
    }

    #[test]
    fn ids_of_events_are_unique_and_in_the_order_of_time() {
        let ids: std::collections::BTreeSet<_> =
            (0..10_000).map(|_| event_id(OffsetDateTime::now_utc()).to_string()).collect();
        assert_eq!(ids.len(), 10_000);
        assert!(ids.iter().all(|id| uuid::Uuid::try_parse(id).unwrap().get_version_num() == 7));
    }
}
