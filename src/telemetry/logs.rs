//! One JSON object a line on stdout (contract §6), or readable lines with `DEBUG=true`.
//!
//! Writing happens on a thread of its own, so that a slow terminal or pipe never slows a call; and so does formatting, of the lines that
//! every call causes. Libraries that print arguments or tokens at their talkative levels are capped
//! here, whatever `LOG_LEVEL` says.

#[cfg(feature = "benches")]
pub(crate) mod benching;
mod call;
pub(super) mod line;
#[cfg(test)]
mod properties;
mod subscriber;
mod writer;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use time::OffsetDateTime;
use tracing::level_filters::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Dispatch, Level, Metadata, Subscriber, dispatcher, info};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::settings::LogSettings;
use subscriber::LineSubscriber;
use writer::{LineWriter, WriterGuard};

pub(super) use writer::Line;

pub use super::text::Rfc3339;
pub use call::{Cause, Told};

/// How many lines of the process's log were dropped. The log is the process's, and so is this.
static DROPPED: OnceLock<Arc<AtomicU64>> = OnceLock::new();

/// How many lines were dropped so far because nobody read them in time; 0 where no log is installed.
pub fn dropped_lines() -> u64 {
    DROPPED.get().map_or(0, |dropped| dropped.load(Relaxed))
}

/// Hands over a line past the machinery of events, and past the level; gives it back where the log is not JSON.
pub(super) fn hand_past_events(line: Line) -> Option<Line> {
    let mut line = Some(line);
    dispatcher::get_default(|log| {
        if let Some(log) = log.downcast_ref::<LineSubscriber>()
            && let Some(line) = line.take()
        {
            log.hand_over(line);
        }
    });
    line
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
    let level = LevelSwitch { filter: settings.filter.clone(), raised: Arc::default() };
    let heard = Heard::of(settings, &level)?;
    if settings.debug {
        let lines = tracing_subscriber::fmt::layer()
            .with_writer(move || writer.clone())
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stdout()));
        tracing_subscriber::registry().with(heard).with(lines).try_init()?;
    } else {
        Dispatch::new(LineSubscriber::new(heard, writer)).try_init()?;
    }
    log_panics();
    Ok(LogGuard { level, _writer: guard })
}

/// What is heard: what `LOG_LEVEL` asks for, and everything down to DEBUG while the level is raised; of libraries what is fit to
/// print. Which call sites that are is worked out when it changes, so that a line costs what it cost before.
struct Heard {
    configured: Targets,
    /// How much of the lines that end calls.
    calls: LevelFilter,
    raised: Arc<AtomicBool>,
}

impl Heard {
    fn of(settings: &LogSettings, level: &LevelSwitch) -> anyhow::Result<Self> {
        // Audit events have no level: none may silence them, or the span that gives them their trace id.
        let configured = settings.filter.parse::<Targets>()?;
        let configured =
            configured.with_target("audit", Level::INFO).with_target("mcp_server::telemetry::trace", Level::ERROR);
        let hears = |level: &Level| configured.would_enable(call::LOGGER, level);
        let calls = [Level::INFO, Level::WARN, Level::ERROR].into_iter().find(hears);
        let calls = calls.map_or(LevelFilter::OFF, LevelFilter::from_level);
        Ok(Self { configured, calls, raised: Arc::clone(&level.raised) })
    }

    /// Whether the line is heard that ends a call, which is at INFO at least.
    fn hears_call(&self, level: Level) -> bool {
        level <= self.calls || self.raised.load(Relaxed)
    }

    fn hears(&self, metadata: &Metadata<'_>) -> bool {
        let is_raised = *metadata.level() <= Level::DEBUG && self.raised.load(Relaxed);
        (is_raised || self.configured.would_enable(metadata.target(), metadata.level())) && fit_to_print(metadata)
    }

    fn interest(&self, metadata: &Metadata<'_>) -> Interest {
        if self.hears(metadata) { Interest::always() } else { Interest::never() }
    }

    fn most(&self) -> LevelFilter {
        let levels = self.configured.iter().map(|(_, level)| level).chain(self.configured.default_level());
        let configured = levels.max().unwrap_or(LevelFilter::OFF);
        if self.raised.load(Relaxed) { configured.max(LevelFilter::DEBUG) } else { configured }
    }
}

impl<S: Subscriber> Layer<S> for Heard {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        self.interest(metadata)
    }

    fn enabled(&self, metadata: &Metadata<'_>, _context: Context<'_, S>) -> bool {
        self.hears(metadata)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.most())
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

/// What libraries may say at most. rmcp prints whole arguments, results and headers, lets any client cause warnings and has an ERROR for
/// each client that leaves: what matters of that, `web` and `tools` say themselves, in short lines. The Azure SDK repeats at INFO each failed exchange that `identity` reports; its and hyper's lower levels print requests. ANDed
/// with `LOG_LEVEL`, so no directive can lift it.
fn fit_to_print(metadata: &Metadata<'_>) -> bool {
    let target = metadata.target();
    let cap = if target.starts_with("mcp_server") {
        return true;
    } else if target.starts_with("rmcp") {
        LevelFilter::OFF
    } else if target.starts_with("typespec_client_core") {
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

#[cfg(test)]
pub(super) mod tests {
    use std::sync::{Arc, Mutex};

    use serde_json::Value;

    use super::*;

    /// What the log of the process would hold of `body`.
    pub(in crate::telemetry::logs) fn log_of(filter: &str, body: impl FnOnce()) -> String {
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
        let settings = LogSettings { filter: filter.to_owned(), debug: false };
        let level = LevelSwitch { filter: filter.to_owned(), raised: Arc::default() };
        let heard = Heard::of(&settings, &level).unwrap();
        dispatcher::with_default(&Dispatch::new(LineSubscriber::new(heard, writer)), body);
        drop(guard);
        let text = sink.0.lock().unwrap().clone();
        String::from_utf8(text).unwrap()
    }

    fn lines_under(filter: &str, body: impl FnOnce()) -> Vec<Value> {
        let log = log_of(filter, body);
        log.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
    }

    fn lines_of(body: impl FnOnce()) -> Vec<Value> {
        lines_under("debug", body)
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
    fn targets_are_heard_at_their_levels_and_the_audit_always() {
        let body = || {
            tracing::info!(target: "mcp_server::app", "app");
            tracing::debug!(target: "mcp_server::app::demo", "demo");
            tracing::warn!(target: "mcp_server::tools", "tools");
            tracing::error!(target: "hyper", "library");
            tracing::info!(target: "audit", "audit");
        };
        for (filter, expected) in [
            ("off", &["audit"][..]),
            ("error", &["library", "audit"]),
            ("info", &["app", "tools", "library", "audit"]),
            ("mcp_server::app=info,error", &["app", "library", "audit"]),
            ("mcp_server::app=debug", &["app", "demo", "audit"]),
            ("debug,mcp_server::app=off,hyper=off", &["tools", "audit"]),
        ] {
            let lines = lines_under(filter, body);
            let messages: Vec<_> = lines.iter().map(|line| line["message"].as_str().unwrap()).collect();
            assert_eq!(messages, expected, "{filter}");
        }
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
            tracing::warn!(target: "rmcp::transport::streamable_http_server::tower", "a header");
            tracing::error!(target: "rmcp::service", "failed to send pending response during drain");
            tracing::info!(target: "typespec_client_core::http", "failed response");
            tracing::debug!(target: "hyper::proto", "headers");
            tracing::debug!(target: "mcp_server::tools", "ours");
        });
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0]["message"], "ours");
    }
}
