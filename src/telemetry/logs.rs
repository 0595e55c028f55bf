//! One JSON object a line on stdout (contract §6), or readable lines with `DEBUG=true`.
//!
//! Formatting happens on the caller's thread into a buffer of that thread; writing happens on a thread of its own, so that a
//! slow terminal or pipe never slows a call. Libraries that print arguments or tokens at their talkative levels are capped
//! here, whatever `LOG_LEVEL` says.

#[cfg(feature = "benches")]
pub(crate) mod benching;
#[cfg(test)]
mod properties;
mod writer;

use std::cell::RefCell;
use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use time::OffsetDateTime;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber, info};
use tracing_log::NormalizeEvent;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::settings::LogSettings;
use writer::{LineWriter, WriterGuard};

/// How many lines of the process's log were dropped. The log is the process's, and so is this.
static DROPPED: OnceLock<Arc<AtomicU64>> = OnceLock::new();

/// How many lines were dropped so far because nobody read them in time; 0 where no log is installed.
pub fn dropped_lines() -> u64 {
    DROPPED.get().map_or(0, |dropped| dropped.load(Relaxed))
}

/// Keeps the writer's thread alive; dropping it writes what is still queued.
pub struct LogGuard {
    level: LevelSwitch,
    _writer: WriterGuard,
}

impl LogGuard {
    /// What changes the level while the process runs.
    pub fn level(&self) -> LevelSwitch {
        self.level.clone()
    }
}

/// Installs the process's subscriber and panic hook. Called once, by the binary.
///
/// # Errors
///
/// When a subscriber is installed already, or the filter cannot be read (settings check it beforehand).
pub fn install(settings: &LogSettings) -> anyhow::Result<LogGuard> {
    let lament = if settings.debug { readable_lament } else { lament };
    let (writer, guard) = LineWriter::start(std::io::stdout(), lament)?;
    let _ = DROPPED.set(writer.dropped());
    let (levels, level) = Levels::of(settings)?;
    let subscriber = tracing_subscriber::registry().with(levels).with(filter_fn(fit_to_print));
    if settings.debug {
        let lines = tracing_subscriber::fmt::layer()
            .with_writer(move || writer.clone())
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stdout()));
        subscriber.with(lines).try_init()?;
    } else {
        subscriber.with(JsonLines { writer }).try_init()?;
    }
    log_panics();
    Ok(LogGuard { level, _writer: guard })
}

/// Lets through what `LOG_LEVEL` asks for, and everything down to DEBUG while the level is raised. Which call sites that are is
/// worked out when it changes, so that a line costs what it cost before.
struct Levels {
    configured: EnvFilter,
    raised: Arc<AtomicBool>,
}

impl Levels {
    fn of(settings: &LogSettings) -> anyhow::Result<(Self, LevelSwitch)> {
        // Audit events have no level: none may silence them, or the span that gives them their trace id.
        let configured = EnvFilter::try_new(&settings.filter)?
            .add_directive("audit=info".parse()?)
            .add_directive("mcp_server::telemetry::trace=error".parse()?);
        let level = LevelSwitch { filter: settings.filter.clone(), raised: Arc::default() };
        Ok((Self { configured, raised: Arc::clone(&level.raised) }, level))
    }

    fn raises(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::DEBUG && self.raised.load(Relaxed)
    }
}

impl<S: Subscriber> Layer<S> for Levels {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        let configured = Layer::<S>::register_callsite(&self.configured, metadata);
        if self.raises(metadata) { Interest::always() } else { configured }
    }

    fn enabled(&self, metadata: &Metadata<'_>, context: Context<'_, S>) -> bool {
        self.raises(metadata) || Layer::<S>::enabled(&self.configured, metadata, context)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        let configured = Layer::<S>::max_level_hint(&self.configured)?;
        Some(if self.raised.load(Relaxed) { configured.max(LevelFilter::DEBUG) } else { configured })
    }

    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        self.configured.on_new_span(attributes, id, context);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        Layer::<S>::on_record(&self.configured, id, values, context);
    }

    fn on_enter(&self, id: &Id, context: Context<'_, S>) {
        Layer::<S>::on_enter(&self.configured, id, context);
    }

    fn on_exit(&self, id: &Id, context: Context<'_, S>) {
        Layer::<S>::on_exit(&self.configured, id, context);
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        Layer::<S>::on_close(&self.configured, id, context);
    }
}

/// Raises the level to DEBUG and takes it back, while the process runs.
#[derive(Clone)]
pub struct LevelSwitch {
    filter: String,
    raised: Arc<AtomicBool>,
}

impl LevelSwitch {
    /// Changes over, and says so while that can be read.
    pub fn toggle(&self) {
        let was_raised = self.raised.load(Relaxed);
        if was_raised {
            info!("the log goes back to the level `{}`", self.filter);
        }
        self.raised.store(!was_raised, Relaxed);
        tracing::callsite::rebuild_interest_cache();
        if !was_raised {
            info!("the log is at DEBUG from now on; the same signal takes it back to `{}`", self.filter);
        }
    }
}

/// The line that tells of lines that are missing.
fn lament(lines: u64) -> String {
    format!(
        r#"{{"timestamp":"{}","level":"WARNING","logger":"{target}","message":"{lines} log lines were dropped: nobody reads stdout fast enough","module":"{target}","function":"-","line":{},"trace_id":"","dropped_lines":{lines}}}{}"#,
        Rfc3339(OffsetDateTime::now_utc()),
        line!(),
        '\n',
        target = module_path!(),
    )
}

fn readable_lament(lines: u64) -> String {
    format!(
        "{} WARN {lines} log lines were dropped: nobody reads stdout fast enough\n",
        Rfc3339(OffsetDateTime::now_utc())
    )
}

/// What libraries may say at most. rmcp prints whole arguments and results at DEBUG and lets any client cause warnings; the
/// Azure SDK repeats at INFO each failed exchange that `identity` reports; its and hyper's lower levels print requests. ANDed
/// with `LOG_LEVEL`, so no directive can lift it.
fn fit_to_print(metadata: &Metadata<'_>) -> bool {
    let target = metadata.target();
    let cap = if target.starts_with("mcp_server") {
        return true;
    } else if target.starts_with("rmcp::service") {
        LevelFilter::ERROR
    } else if target.starts_with("rmcp") || target.starts_with("typespec_client_core") {
        LevelFilter::WARN
    } else {
        LevelFilter::INFO
    };
    *metadata.level() <= cap
}

/// A panic becomes one ERROR line with its place and without its payload, which may hold anything.
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map_or_else(|| "an unknown place".to_owned(), ToString::to_string);
        tracing::error!(panic.location = place, "panicked at {place}; this is a bug in the server");
    }));
}

/// Writes each event as one line of JSON.
struct JsonLines {
    writer: LineWriter,
}

/// The trace id of a span, for the events inside it; as it stands in a JSON string.
struct SpanTraceId(String);

impl<S> Layer<S> for JsonLines
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        remember_trace_id(|found| attributes.record(found), id, &context);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        remember_trace_id(|found| values.record(found), id, &context);
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        thread_local! {
            static LINE: RefCell<String> = const { RefCell::new(String::new()) };
        }
        LINE.with(|line| {
            // Re-entered only if a `Display` of a field logs by itself: then that inner event is given up.
            let Ok(mut line) = line.try_borrow_mut() else { return };
            line.clear();
            write_line(&mut line, event, &context, OffsetDateTime::now_utc());
            // The queue takes whole lines; a full queue drops and counts instead of waiting.
            let _ = self.writer.clone().write_all(line.as_bytes());
        });
    }
}

/// Keeps the trace id that a span has, or has learnt.
fn remember_trace_id<S>(record: impl FnOnce(&mut FindTraceId), id: &Id, context: &Context<'_, S>)
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    let mut found = FindTraceId(None);
    record(&mut found);
    if let (Some(trace_id), Some(span)) = (found.0, context.span(id)) {
        span.extensions_mut().replace(SpanTraceId(trace_id));
    }
}

fn write_line<S>(line: &mut String, event: &Event<'_>, context: &Context<'_, S>, now: OffsetDateTime)
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    // Lines that come through the `log` crate carry their real origin in fields.
    let normalized = event.normalized_metadata();
    let metadata = normalized.as_ref().unwrap_or_else(|| event.metadata());
    line.push_str("{\"timestamp\":\"");
    let _ = write!(line, "{}", Rfc3339(now));
    line.push_str("\",\"level\":\"");
    line.push_str(level_word(metadata.level()));
    line.push_str("\",\"logger\":");
    write_json_string(line, metadata.target());
    line.push_str(",\"message\":\"");
    event.record(&mut WriteMessage(line));
    line.push_str("\",\"module\":");
    write_json_string(line, metadata.module_path().unwrap_or_else(|| metadata.target()));
    line.push_str(",\"function\":");
    write_json_string(line, context.lookup_current().map_or("-", |span| span.name()));
    let _ = write!(line, ",\"line\":{},\"trace_id\":\"", metadata.line().unwrap_or(0));
    for span in context.event_scope(event).into_iter().flatten() {
        if let Some(SpanTraceId(trace_id)) = span.extensions().get::<SpanTraceId>() {
            line.push_str(trace_id);
            break;
        }
    }
    line.push('"');
    event.record(&mut WriteFields(line));
    line.push_str("}\n");
}

/// The contract's words: TRACE counts as DEBUG.
fn level_word(level: &Level) -> &'static str {
    match *level {
        Level::ERROR => "ERROR",
        Level::WARN => "WARNING",
        Level::INFO => "INFO",
        Level::DEBUG | Level::TRACE => "DEBUG",
    }
}

/// Displays a UTC time as RFC 3339 with microseconds: the one form of time in logs and answers.
pub struct Rfc3339(pub OffsetDateTime);

impl fmt::Display for Rfc3339 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = self.0.to_calendar_date();
        let (hour, minute, second, micro) = self.0.to_hms_micro();
        let mut text = *b"....-..-..T..:..:.........Z";
        let parts: [(std::ops::Range<usize>, u32); 7] = [
            (0..4, year.unsigned_abs()),
            (5..7, u8::from(month).into()),
            (8..10, day.into()),
            (11..13, hour.into()),
            (14..16, minute.into()),
            (17..19, second.into()),
            (20..26, micro),
        ];
        for (place, mut number) in parts {
            for digit in text.get_mut(place).unwrap_or_default().iter_mut().rev() {
                *digit = b'0' + (number % 10) as u8;
                number /= 10;
            }
        }
        f.write_str(str::from_utf8(&text).unwrap_or_default())
    }
}

pub(super) fn write_json_string(line: &mut String, text: &str) {
    line.push('"');
    Escaped(line).push(text);
    line.push('"');
}

/// Writes text as the inside of a JSON string, so that nothing that is logged can break out of its line.
struct Escaped<'a>(&'a mut String);

impl Escaped<'_> {
    fn push(&mut self, text: &str) {
        // Nearly all text is printable ASCII without quotes.
        if text.bytes().all(|byte| matches!(byte, b' '..=b'~') && byte != b'"' && byte != b'\\') {
            self.0.push_str(text);
            return;
        }
        let mut clean = 0;
        for (at, character) in text.char_indices() {
            let escape = match character {
                '"' => "\\\"",
                '\\' => "\\\\",
                '\n' => "\\n",
                '\r' => "\\r",
                '\t' => "\\t",
                // C1 controls and line separators are legal JSON, and still move terminals and split lines.
                control if control.is_control() || matches!(control, '\u{2028}' | '\u{2029}') => "",
                _ => continue,
            };
            self.0.push_str(text.get(clean..at).unwrap_or_default());
            if escape.is_empty() {
                let _ = write!(self.0, "\\u{:04x}", u32::from(character));
            } else {
                self.0.push_str(escape);
            }
            clean = at + character.len_utf8();
        }
        self.0.push_str(text.get(clean..).unwrap_or_default());
    }
}

impl fmt::Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.push(text);
        Ok(())
    }
}

struct FindTraceId(Option<String>);

impl Visit for FindTraceId {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "trace_id" {
            let mut text = String::new();
            let _ = write!(Escaped(&mut text), "{value:?}");
            self.0 = Some(text);
        }
    }
}

struct WriteMessage<'a>(&'a mut String);

impl Visit for WriteMessage<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            Escaped(self.0).push(value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            let _ = write!(Escaped(self.0), "{value:?}");
        }
    }
}

struct WriteFields<'a>(&'a mut String);

impl WriteFields<'_> {
    /// Writes `,"name":` and says whether a value should follow. Names that every line has already are the line's own.
    fn key(&mut self, field: &Field) -> bool {
        const OURS: [&str; 8] = ["timestamp", "level", "logger", "message", "module", "function", "line", "trace_id"];
        let name = field.name();
        if OURS.contains(&name) || name.starts_with("log.") {
            return false;
        }
        self.0.push(',');
        write_json_string(self.0, name);
        self.0.push(':');
        true
    }
}

impl Visit for WriteFields<'_> {
    fn record_bool(&mut self, field: &Field, value: bool) {
        if self.key(field) {
            self.0.push_str(if value { "true" } else { "false" });
        }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        if self.key(field) {
            let _ = write!(self.0, "{value}");
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        if self.key(field) {
            let _ = write!(self.0, "{value}");
        }
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        if self.key(field) {
            // JSON has no NaN and no infinities.
            let _ = if value.is_finite() { write!(self.0, "{value}") } else { write!(self.0, "\"{value}\"") };
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if self.key(field) {
            write_json_string(self.0, value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if self.key(field) {
            self.0.push('"');
            let _ = write!(Escaped(self.0), "{value:?}");
            self.0.push('"');
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use serde_json::Value;

    use super::*;

    /// Runs `body` under a JSON subscriber and returns the parsed lines.
    fn lines_of(body: impl FnOnce()) -> Vec<Value> {
        #[derive(Clone, Default)]
        struct Sink(Arc<Mutex<Vec<u8>>>);
        impl std::io::Write for Sink {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0.lock().unwrap().extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let sink = Sink::default();
        let (writer, guard) = LineWriter::start(sink.clone(), lament).unwrap();
        let subscriber = tracing_subscriber::registry().with(filter_fn(fit_to_print)).with(JsonLines { writer });
        tracing::subscriber::with_default(subscriber, body);
        drop(guard);
        let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
    }

    #[test]
    fn every_line_carries_the_contract_fields_and_its_own() {
        let lines = lines_of(|| {
            let span = tracing::error_span!("request", trace_id = "0af7651916cd43dd8448eb211c80319c");
            let _inside = span.enter();
            tracing::warn!(tool.name = "list_users", attempts = 2_u64, ratio = f64::NAN, ok = true, "tool `x` failed");
        });
        let line = &lines[0];
        for field in ["timestamp", "level", "logger", "message", "module", "function", "line", "trace_id"] {
            assert!(!line[field].is_null(), "{field} in {line}");
        }
        assert_eq!(line["level"], "WARNING");
        assert_eq!(line["trace_id"], "0af7651916cd43dd8448eb211c80319c");
        assert_eq!(line["function"], "request");
        assert_eq!(line["tool.name"], "list_users");
        assert_eq!(line["attempts"], 2);
        assert_eq!(line["timestamp"].as_str().unwrap().len(), "2026-11-22T14:53:36.123456Z".len());
    }

    #[test]
    fn the_line_about_missing_lines_has_the_form_of_all_others() {
        let line: Value = serde_json::from_str(&lament(7)).unwrap();
        for field in ["timestamp", "level", "logger", "message", "module", "function", "line", "trace_id"] {
            assert!(!line[field].is_null(), "{field} in {line}");
        }
        assert_eq!((&line["dropped_lines"], lament(7).matches('\n').count()), (&7.into(), 1));
    }

    #[test]
    fn hostile_text_stays_inside_its_line() {
        let hostile = "a\"\\\n\r\u{1b}[31mFAKE\u{0}\u{85}\u{2028}ü🦀";
        let lines = lines_of(|| tracing::info!(name = hostile, "{hostile}"));
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0]["message"], hostile);
        assert_eq!(lines[0]["name"], hostile);
    }

    #[test]
    fn a_trace_id_learnt_later_is_used_from_then_on() {
        let lines = lines_of(|| {
            let span = tracing::error_span!("request", trace_id = "first");
            let _inside = span.enter();
            tracing::info!("one");
            span.record("trace_id", "second");
            tracing::info!("two");
        });
        assert_eq!([&lines[0]["trace_id"], &lines[1]["trace_id"]], ["first", "second"]);
    }

    #[test]
    fn a_field_cannot_pose_as_one_of_the_lines_own() {
        let lines = lines_of(|| tracing::info!(level = "FATAL", trace_id = "forged", "message of ours"));
        assert_eq!(lines[0]["level"], "INFO");
        assert_eq!(lines[0]["trace_id"], "");
    }

    #[test]
    fn a_panic_is_one_line_that_tells_its_place_and_not_its_payload() {
        let before = std::panic::take_hook();
        log_panics();
        let lines = lines_of(|| {
            let span = tracing::error_span!("request", trace_id = "0af7651916cd43dd8448eb211c80319c");
            let _inside = span.enter();
            let panicked = std::panic::catch_unwind(|| panic!("canary in\nthe payload"));
            assert!(panicked.is_err());
        });
        std::panic::set_hook(before);
        let [line] = lines.as_slice() else { panic!("{lines:#?}") };
        assert_eq!((&line["level"], &line["logger"]), (&"ERROR".into(), &"mcp_server::telemetry::logs".into()));
        assert_eq!(line["trace_id"], "0af7651916cd43dd8448eb211c80319c");
        assert!(line["panic.location"].as_str().unwrap().starts_with("src/telemetry/logs.rs:"), "{line}");
        assert!(!line.to_string().contains("canary"), "{line}");
    }

    #[test]
    fn libraries_cannot_print_arguments() {
        let lines = lines_of(|| {
            tracing::debug!(target: "rmcp::handler", "arguments");
            tracing::warn!(target: "rmcp::service", "response error");
            tracing::info!(target: "typespec_client_core::http", "failed response");
            tracing::debug!(target: "hyper::proto", "headers");
            tracing::debug!(target: "mcp_server::tools", "ours");
        });
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0]["message"], "ours");
    }
}
