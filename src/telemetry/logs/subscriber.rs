//! The subscriber of the JSON log, where no directive speaks of spans: targets and levels decide, and a span is a trace id.
//!
//! Spans are kept in one list: there are no more than requests in flight and tasks in the background. Entering one costs a place on
//! the thread's own stack; the list is asked when a span begins, is cloned or ends, and for each line.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use time::OffsetDateTime;
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_core::span::Current;
use tracing_subscriber::filter::Targets;

use super::fit_to_print;
use super::line::{FindTraceId, write_line};
use super::writer::LineWriter;

/// Writes each event that is heard as one line of JSON.
pub(super) struct LineSubscriber {
    configured: Targets,
    /// Whether everything down to DEBUG is heard.
    raised: Arc<AtomicBool>,
    spans: Mutex<Spans>,
    writer: LineWriter,
}

thread_local! {
    /// The spans that this thread is in, the innermost last.
    static ENTERED: RefCell<Vec<Id>> = const { RefCell::new(Vec::new()) };
}

/// The innermost span; none while the thread ends.
fn current() -> Option<Id> {
    ENTERED.try_with(|entered| entered.borrow().last().cloned()).ok().flatten()
}

impl LineSubscriber {
    pub(super) fn new(configured: Targets, raised: Arc<AtomicBool>, writer: LineWriter) -> Self {
        Self { configured, raised, spans: Mutex::default(), writer }
    }

    fn hears(&self, metadata: &Metadata<'_>) -> bool {
        let is_raised = *metadata.level() <= Level::DEBUG && self.raised.load(Relaxed);
        (is_raised || self.configured.would_enable(metadata.target(), metadata.level())) && fit_to_print(metadata)
    }

    fn spans(&self) -> MutexGuard<'_, Spans> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Subscriber for LineSubscriber {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if self.hears(metadata) { Interest::always() } else { Interest::never() }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.hears(metadata)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        let levels = self.configured.iter().map(|(_, level)| level).chain(self.configured.default_level());
        let configured = levels.max().unwrap_or(LevelFilter::OFF);
        Some(if self.raised.load(Relaxed) { configured.max(LevelFilter::DEBUG) } else { configured })
    }

    fn new_span(&self, attributes: &Attributes<'_>) -> Id {
        let mut found = FindTraceId::default();
        attributes.record(&mut found);
        let parent = if attributes.is_contextual() { current() } else { attributes.parent().cloned() };
        let mut spans = self.spans();
        let trace_id = found.0.or_else(|| parent.and_then(|parent| Some(spans.get(&parent)?.trace_id.clone())));
        spans.keep(Span { references: 1, metadata: attributes.metadata(), trace_id: trace_id.unwrap_or_default() })
    }

    fn record(&self, id: &Id, values: &Record<'_>) {
        let mut found = FindTraceId::default();
        values.record(&mut found);
        if let (Some(trace_id), Some(span)) = (found.0, self.spans().get(id)) {
            span.trace_id = trace_id;
        }
    }

    fn record_follows_from(&self, _id: &Id, _follows: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let span = if event.is_contextual() { current() } else { event.parent().cloned() };
        let metadata = span.as_ref().and_then(|id| self.spans().get(id).map(|span| span.metadata));
        self.writer.write_line(|line| {
            let function = metadata.map_or("-", Metadata::name);
            write_line(line, event, OffsetDateTime::now_utc(), function, |line| {
                if let Some(id) = span
                    && let Some(span) = self.spans().get(&id)
                {
                    line.push_str(&span.trace_id);
                }
            });
        });
    }

    fn enter(&self, id: &Id) {
        let _ = ENTERED.try_with(|entered| entered.borrow_mut().push(id.clone()));
    }

    fn exit(&self, id: &Id) {
        let _ = ENTERED.try_with(|entered| {
            let mut entered = entered.borrow_mut();
            // Nearly always the last.
            if let Some(place) = entered.iter().rposition(|other| other == id) {
                entered.remove(place);
            }
        });
    }

    fn clone_span(&self, id: &Id) -> Id {
        if let Some(span) = self.spans().get(id) {
            span.references += 1;
        }
        id.clone()
    }

    fn try_close(&self, id: Id) -> bool {
        self.spans().let_go(&id)
    }

    fn current_span(&self) -> Current {
        let known = |id: Id| self.spans().get(&id).map(|span| Current::new(id, span.metadata));
        current().and_then(known).unwrap_or_else(Current::none)
    }
}

/// The spans that are not closed.
#[derive(Default)]
struct Spans {
    kept: Vec<Option<Span>>,
    /// Places in `kept` where there is none.
    free: Vec<usize>,
}

struct Span {
    references: usize,
    metadata: &'static Metadata<'static>,
    /// As it stands in a JSON string; empty where nobody has named one.
    trace_id: String,
}

impl Spans {
    fn keep(&mut self, span: Span) -> Id {
        let place = self.free.pop().unwrap_or(self.kept.len());
        match self.kept.get_mut(place) {
            Some(free) => *free = Some(span),
            None => self.kept.push(Some(span)),
        }
        Id::from_u64(place as u64 + 1)
    }

    fn get(&mut self, id: &Id) -> Option<&mut Span> {
        self.kept.get_mut(place(id))?.as_mut()
    }

    /// Whether that was the last reference.
    fn let_go(&mut self, id: &Id) -> bool {
        let Some(kept) = self.kept.get_mut(place(id)) else { return false };
        let Some(span) = kept else { return false };
        span.references -= 1;
        let is_closed = span.references == 0;
        if is_closed {
            *kept = None;
            self.free.push(place(id));
        }
        is_closed
    }
}

/// Ids count from 1.
fn place(id: &Id) -> usize {
    id.into_u64() as usize - 1
}
