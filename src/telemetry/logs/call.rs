//! The line that ends a call, with which every call ends.

use std::net::IpAddr;
use std::time::Duration;

use time::OffsetDateTime;
use tracing::{Level, enabled, event};

use super::line::{
    Milliseconds, OurLine, our_place, write_address, write_milliseconds, write_name, write_number, write_text,
};
use super::{Line, hand_past_events};
use crate::telemetry::trace::TraceId;

/// Whose line it is.
const LOGGER: &str = "mcp_server::tools::call";

/// How a call ended, in plain values.
#[derive(Debug, Clone)]
pub struct CallLine {
    /// ERROR and WARN, or else INFO.
    pub level: Level,
    /// When it ended.
    pub at: OffsetDateTime,
    /// The trace of the request.
    pub trace_id: TraceId,
    /// Which tool was called.
    pub tool: &'static str,
    /// What came of it: `ok`, `cancelled`, or the code of an error.
    pub outcome: &'static str,
    /// The same for people, as what the tool did.
    pub verb: &'static str,
    /// How long it took.
    pub took: Duration,
    /// How often the backend was asked.
    pub attempts: u32,
    /// The status of the backend's last answer.
    pub backend_status: Option<u16>,
    /// The other end of the connection.
    pub client_address: Option<IpAddr>,
    /// Why it failed, for whoever operates the server.
    pub cause: Option<Box<str>>,
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
    /// Writes it, if its level is heard. Called inside of the request's span.
    pub fn log(self) {
        macro_rules! is_heard {
            ($level:expr) => {
                enabled!(target: LOGGER, $level)
            };
        }
        if with_level!(self.level, is_heard)
            && let Some(Line::Call(line)) = hand_past_events(Line::Call(self))
        {
            line.tell();
        }
    }

    pub(super) fn write(&self, line: &mut String) {
        let ours =
            OurLine { at: self.at, level: self.level, logger: LOGGER, place: our_place!(), trace_id: self.trace_id };
        ours.begin(line);
        for part in ["tool `", self.tool, "` ", self.verb, " after "] {
            line.push_str(part);
        }
        write_milliseconds(line, self.took);
        line.push_str(" ms");
        ours.go_on(line);
        write_text(line, "gen_ai.tool.name", self.tool);
        write_text(line, "outcome", self.outcome);
        write_name(line, "duration_ms");
        write_milliseconds(line, self.took);
        write_name(line, "backend.attempts");
        write_number(line, self.attempts.into());
        if let Some(status) = self.backend_status {
            write_name(line, "backend.status_code");
            write_number(line, status.into());
        }
        if let Some(address) = self.client_address {
            write_name(line, "client.address");
            line.push('"');
            write_address(line, address);
            line.push('"');
        }
        if let Some(cause) = &self.cause {
            write_text(line, "cause", cause);
        }
        line.push_str("}\n");
    }

    /// The same as an event, for logs that are not JSON.
    fn tell(&self) {
        let (name, verb, took_ms) = (self.tool, self.verb, Milliseconds(self.took));
        let address = self.client_address.map(|address| address.to_string());
        macro_rules! tell {
            ($level:expr) => {
                event!(
                    target: LOGGER,
                    $level,
                    gen_ai.tool.name = name,
                    outcome = self.outcome,
                    duration_ms = self.took.as_micros() as f64 / 1_000.0,
                    backend.attempts = self.attempts,
                    backend.status_code = self.backend_status,
                    client.address = address.as_deref(),
                    cause = self.cause.as_deref(),
                    "tool `{name}` {verb} after {took_ms} ms"
                )
            };
        }
        with_level!(self.level, tell);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::super::tests::log_of;
    use super::*;
    use crate::telemetry::trace::RequestTrace;

    #[test]
    fn the_line_says_what_its_event_would_and_is_heard_where_that_is() {
        let hostile = "a\"\\\n\u{1b}[31m{},\u{2028}";
        for (level, cause) in [(Level::INFO, None), (Level::WARN, Some(hostile)), (Level::ERROR, Some("x"))] {
            for filter in ["off", "error", "warn", "info", "mcp_server::tools=error,info"] {
                let lines_of = |written: bool| {
                    let log = log_of(filter, || {
                        let trace = RequestTrace::new(&http::HeaderMap::new());
                        let _inside = trace.span().enter();
                        let line = CallLine {
                            level,
                            at: OffsetDateTime::now_utc(),
                            trace_id: trace.context().trace_id(),
                            tool: "list_users",
                            outcome: "ok",
                            verb: "succeeded",
                            took: Duration::from_micros(1_500),
                            attempts: 2,
                            backend_status: cause.map(|_| 503),
                            client_address: cause.map(|_| [10, 0, 0, 7].into()),
                            cause: cause.map(Box::from),
                        };
                        if written { line.log() } else { line.tell() }
                    });
                    let lines = log.lines().map(|line| {
                        let mut line: Value = serde_json::from_str(line).unwrap();
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
