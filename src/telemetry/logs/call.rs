//! The line that ends a call, with which every call ends.

use tracing::{Level, event};

use super::line::{OurLine, our_place};
use crate::telemetry::audit;
use crate::telemetry::text::{Milliseconds, Text};

/// Whose line it is.
pub(super) const LOGGER: &str = "mcp_server::tools::call";

/// What the line that ends a call says beside the call's record in the audit.
#[derive(Debug)]
pub struct Told {
    /// ERROR and WARN, or else INFO.
    pub level: Level,
    /// What came of the call for people, as what the tool did.
    pub verb: &'static str,
    /// Why it failed, for whoever operates the server.
    pub cause: Option<Box<Cause>>,
}

/// Why a call failed.
#[derive(Debug, Clone)]
pub struct Cause {
    /// The error with its sources.
    pub text: String,
    /// What the backend says about it.
    pub backend_detail: Option<Box<str>>,
}

fn tool(event: &audit::Event) -> &'static str {
    event.tool.map_or("", |tool| tool.name)
}

impl Told {
    /// Writes the line of the call with this record.
    pub(super) fn write(&self, record: &audit::Record, line: &mut Text) {
        let event = &record.event;
        let (at, level, trace_id) = (event.at, self.level, event.trace_id);
        let ours = OurLine { at, level, logger: LOGGER, place: our_place!(), trace_id };
        ours.begin(line);
        line.push_all(&["tool `", tool(event), "` ", self.verb, " after "]);
        line.milliseconds(event.took);
        line.push(" ms");
        ours.go_on(line);
        line.field("gen_ai.tool.name", tool(event));
        line.field("outcome", event.outcome);
        line.name("duration_ms");
        line.milliseconds(event.took);
        line.name("backend.attempts");
        line.number(event.attempts.into());
        if let Some(status) = event.backend_status {
            line.name("backend.status_code");
            line.number(status.into());
        }
        if let Some(address) = event.client_address {
            line.name("client.address");
            line.push("\"");
            line.address(address);
            line.push("\"");
        }
        if let Some(cause) = &self.cause {
            line.field("cause", &cause.text);
            if let Some(detail) = &cause.backend_detail {
                line.field("backend_detail", detail);
            }
        }
        line.push("}\n");
    }

    /// The same as an event, for logs that are not JSON.
    pub(in crate::telemetry) fn tell(&self, record: &audit::Record) {
        let event = &record.event;
        let (name, verb) = (tool(event), self.verb);
        let (took_ms, address) = (Milliseconds(event.took), event.client_address.map(|address| address.to_string()));
        let cause = self.cause.as_deref();
        macro_rules! tell {
            ($level:expr) => {
                event!(
                    target: LOGGER,
                    $level,
                    gen_ai.tool.name = name,
                    outcome = event.outcome,
                    duration_ms = event.took.as_micros() as f64 / 1_000.0,
                    backend.attempts = event.attempts,
                    backend.status_code = event.backend_status,
                    client.address = address.as_deref(),
                    cause = cause.map(|cause| cause.text.as_str()),
                    backend_detail = cause.and_then(|cause| cause.backend_detail.as_deref()),
                    "tool `{name}` {verb} after {took_ms} ms"
                )
            };
        }
        match self.level {
            Level::ERROR => tell!(Level::ERROR),
            Level::WARN => tell!(Level::WARN),
            _ => tell!(Level::INFO),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::Value;

    use super::super::tests::log_of;
    use super::*;
    use crate::telemetry::trace::RequestTrace;

    #[test]
    fn the_line_says_what_its_event_would_and_is_heard_where_that_is() {
        let hostile = "a\"\\\n\u{1b}[31m{},\u{2028}";
        let tool: &audit::Tool = Box::leak(Box::new(audit::Tool::new("list_users", &"schema")));
        for (level, cause) in [(Level::INFO, None), (Level::WARN, Some(hostile)), (Level::ERROR, Some("x"))] {
            for filter in ["off", "error", "warn", "info", "mcp_server::tools=error,info"] {
                let lines_of = |written: bool| {
                    let log = log_of(filter, || {
                        let trace = RequestTrace::new(&http::HeaderMap::new());
                        let _inside = trace.span().enter();
                        let (trace_id, address) = (trace.context().trace_id(), cause.map(|_| [10, 0, 0, 7].into()));
                        let event = audit::Event {
                            tool: Some(tool),
                            took: Duration::from_micros(1_500),
                            attempts: 2,
                            backend_status: cause.map(|_| 503),
                            ..audit::Event::refused_caller(trace_id, address, "ok")
                        };
                        let cause =
                            cause.map(|text| Cause { text: text.to_owned(), backend_detail: Some(text.into()) });
                        let told = Told { level, verb: "succeeded", cause: cause.map(Box::new) };
                        let audit = audit::Audit::default();
                        if written {
                            audit.record_call(audit::Slot::default(), event, told);
                        } else {
                            told.tell(&audit::Record::of(event));
                        }
                    });
                    let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
                    let (audit, lines): (Vec<_>, Vec<_>) = lines.partition(|line| line["logger"] == "audit");
                    assert_eq!(audit.len(), usize::from(written), "whatever is heard");
                    let lines = lines.into_iter().map(|mut line| {
                        assert_eq!(line["trace_id"].as_str().unwrap().len(), 32);
                        for field in ["timestamp", "trace_id", "line"] {
                            line[field].take();
                        }
                        line
                    });
                    lines.collect::<Vec<_>>()
                };
                let lines = lines_of(true);
                assert_eq!(lines, lines_of(false), "{level} {filter}");
                assert!(lines.len() <= 1);
            }
        }
    }
}
