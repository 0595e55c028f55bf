//! How a line of the log is written: as JSON, by field.

use std::fmt::{self, Write as _};
use std::time::Duration;

use time::OffsetDateTime;
use tracing::field::{Field, Visit};
use tracing::{Event, Level};
use tracing_log::NormalizeEvent as _;

use crate::telemetry::text::{Escaped, Text};
use crate::telemetry::trace::TraceId;

/// Writes an event. `function` is the name of the span that it happened in, and `trace_id` writes what is known of its trace.
pub(super) fn write_line(
    line: &mut Text,
    event: &Event<'_>,
    now: OffsetDateTime,
    function: &str,
    trace_id: impl FnOnce(&mut Text),
) {
    // Lines that come through the `log` crate carry their real origin in fields.
    let normalized = event.normalized_metadata();
    let metadata = normalized.as_ref().unwrap_or_else(|| event.metadata());
    line.push("{\"timestamp\":\"");
    line.time(now);
    line.push("\",\"level\":\"");
    line.push(level_word(metadata.level()));
    line.push("\",\"logger\":");
    line.json_string(metadata.target());
    line.push(",\"message\":\"");
    event.record(&mut WriteMessage(line));
    line.push("\",\"module\":");
    line.json_string(metadata.module_path().unwrap_or_else(|| metadata.target()));
    line.push(",\"function\":");
    line.json_string(function);
    line.push(",\"line\":");
    line.number(metadata.line().unwrap_or(0).into());
    line.push(",\"trace_id\":\"");
    trace_id(line);
    line.push("\"");
    event.record(&mut WriteFields(line));
    line.push("}\n");
}

/// A line of ours that is written without an event, whose machinery would cost more than the line.
pub(in crate::telemetry) struct OurLine {
    pub(in crate::telemetry) at: OffsetDateTime,
    pub(in crate::telemetry) level: Level,
    pub(in crate::telemetry) logger: &'static str,
    /// What stands between the message and the trace id: [`our_place`].
    pub(in crate::telemetry) place: &'static str,
    pub(in crate::telemetry) trace_id: TraceId,
}

impl OurLine {
    /// Writes what stands before the message, which has to be written next, escaped.
    pub(in crate::telemetry) fn begin(&self, line: &mut Text) {
        line.push("{\"timestamp\":\"");
        line.time(self.at);
        let level = level_word(&self.level);
        line.push_all(&["\",\"level\":\"", level, "\",\"logger\":\"", self.logger, "\",\"message\":\""]);
    }

    /// Writes what stands behind the message, but for the fields of its own and the end.
    pub(in crate::telemetry) fn go_on(&self, line: &mut Text) {
        line.push(self.place);
        line.trace_id(self.trace_id);
        line.push("\"");
    }
}

/// This place in the code, in a request, as the middle of an [`OurLine`].
macro_rules! our_place {
    () => {
        concat!(r#"","module":""#, module_path!(), r#"","function":"request","line":"#, line!(), r#","trace_id":""#)
    };
}
pub(in crate::telemetry) use our_place;

/// The contract's words: TRACE counts as DEBUG.
fn level_word(level: &Level) -> &'static str {
    match *level {
        Level::ERROR => "ERROR",
        Level::WARN => "WARNING",
        Level::INFO => "INFO",
        Level::DEBUG | Level::TRACE => "DEBUG",
    }
}

/// Finds the trace id among the fields of a span, as it stands in a JSON string.
#[derive(Default)]
pub(super) struct FindTraceId(pub(super) Option<Text>);

impl Visit for FindTraceId {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "trace_id" {
            let mut text = Text::default();
            let _ = write!(Escaped(&mut text), "{value:?}");
            self.0 = Some(text);
        }
    }
}

struct WriteMessage<'a>(&'a mut Text);

impl Visit for WriteMessage<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.0.escaped(value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            let _ = write!(Escaped(self.0), "{value:?}");
        }
    }
}

struct WriteFields<'a>(&'a mut Text);

impl WriteFields<'_> {
    /// Writes `,"name":` and says whether a value should follow. Names that every line has already are the line's own.
    fn key(&mut self, field: &Field) -> bool {
        let name = field.name();
        match name {
            "timestamp" | "level" | "logger" | "message" | "module" | "function" | "line" | "trace_id" => return false,
            _ if name.starts_with("log.") => return false,
            _ => {}
        }
        self.0.push(",");
        self.0.json_string(name);
        self.0.push(":");
        true
    }
}

impl Visit for WriteFields<'_> {
    fn record_bool(&mut self, field: &Field, value: bool) {
        if self.key(field) {
            self.0.push(if value { "true" } else { "false" });
        }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        if self.key(field) {
            if value < 0 {
                self.0.push("-");
            }
            self.0.number(value.unsigned_abs());
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        if self.key(field) {
            self.0.number(value);
        }
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        if self.key(field) {
            // Thousandths, as most are, need no search for the shortest digits that mean this number.
            let thousandths = value * 1_000.0;
            let rounded = thousandths as u64;
            if value.is_sign_positive() && thousandths < 1e12 && rounded as f64 / 1_000.0 == value {
                return self.0.milliseconds(Duration::from_micros(rounded));
            }
            // JSON has no NaN and no infinities.
            let _ = if value.is_finite() { write!(self.0, "{value}") } else { write!(self.0, "\"{value}\"") };
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if self.key(field) {
            self.0.json_string(value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if self.key(field) {
            self.0.push("\"");
            let _ = write!(Escaped(self.0), "{value:?}");
            self.0.push("\"");
        }
    }
}
