//! The line that ends a call, with which every call ends.

use tracing::{Level, enabled, event};

use super::line::{
    Milliseconds, OurLine, our_place, write_address, write_milliseconds, write_name, write_number, write_text,
};
use super::{Line, hand_past_events};
use crate::telemetry::audit;

/// Whose line it is.
const LOGGER: &str = "mcp_server::tools::call";

/// What the line that ends a call says beside the call's record in the audit.
#[derive(Debug)]
pub struct Told {
    /// ERROR and WARN, or else INFO.
    pub level: Level,
    /// What came of the call for people, as what the tool did.
    pub verb: &'static str,
    /// Why it failed, for whoever operates the server.
    pub cause: Option<Box<str>>,
}

/// How a call ended.
#[derive(Debug)]
pub(in crate::telemetry) struct CallLine {
    pub(in crate::telemetry) record: audit::Record,
    pub(in crate::telemetry) told: Told,
}

/// Does something with a level that has to be known when this is compiled.
macro_rules! with_level {
    ($level:expr, $do:ident) => {
        match $level {
            Level::ERROR => $do!(Level::ERROR),
            Level::WARN => $do!(Level::WARN),
            _ => $do!(Level::INFO),
        }
    };
}

impl CallLine {
    /// Writes it, if its level is heard, after the audit event of the call, which always is. Called inside of the request's span.
    pub(in crate::telemetry) fn log(self) {
        macro_rules! is_heard {
            ($level:expr) => {
                enabled!(target: LOGGER, $level)
            };
        }
        let is_heard = with_level!(self.told.level, is_heard);
        match hand_past_events(if is_heard { Line::Call(self) } else { Line::Audit(self.record) }) {
            Some(Line::Call(line)) => {
                line.record.tell();
                line.tell();
            }
            Some(Line::Audit(record)) => record.tell(),
            Some(Line::Written(_)) | None => {}
        }
    }

    fn tool(&self) -> &'static str {
        self.record.event.tool.map_or("", |tool| tool.name)
    }

    pub(super) fn write(&self, line: &mut String) {
        let (event, told) = (&self.record.event, &self.told);
        let (at, level, trace_id) = (event.at, told.level, event.trace_id);
        let ours = OurLine { at, level, logger: LOGGER, place: our_place!(), trace_id };
        ours.begin(line);
        for part in ["tool `", self.tool(), "` ", told.verb, " after "] {
            line.push_str(part);
        }
        write_milliseconds(line, event.took);
        line.push_str(" ms");
        ours.go_on(line);
        write_text(line, "gen_ai.tool.name", self.tool());
        write_text(line, "outcome", event.outcome);
        write_name(line, "duration_ms");
        write_milliseconds(line, event.took);
        write_name(line, "backend.attempts");
        write_number(line, event.attempts.into());
        if let Some(status) = event.backend_status {
            write_name(line, "backend.status_code");
            write_number(line, status.into());
        }
        if let Some(address) = event.client_address {
            write_name(line, "client.address");
            line.push('"');
            write_address(line, address);
            line.push('"');
        }
        if let Some(cause) = &told.cause {
            write_text(line, "cause", cause);
        }
        line.push_str("}\n");
    }

    /// The same as an event, for logs that are not JSON.
    fn tell(&self) {
        let (event, name, verb) = (&self.record.event, self.tool(), self.told.verb);
        let (took_ms, address) = (Milliseconds(event.took), event.client_address.map(|address| address.to_string()));
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
                    cause = self.told.cause.as_deref(),
                    "tool `{name}` {verb} after {took_ms} ms"
                )
            };
        }
        with_level!(self.told.level, tell);
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
                        let told = Told { level, verb: "succeeded", cause: cause.map(Box::from) };
                        let line = CallLine { record: audit::Record::of(event), told };
                        if written { line.log() } else { line.tell() }
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
