//! The subscriber of the JSON log: targets and levels decide what is heard, and a span is a trace id.
//!
//! tracing-subscriber's registry keeps for any number of layers what they want to know of a span, and formats through them; that cost a tenth
//! of a call. Here spans are kept in short lists, one for each of some threads: there are no more than requests in flight and tasks in the
//! background. Entering one costs a place on the thread's own stack; a list is asked when a span begins, is cloned or ends, and for
//! each line.

use std::cell::RefCell;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use time::OffsetDateTime;
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Metadata, Subscriber};
use tracing_core::span::Current;

use super::Heard;
use super::line::{FindTraceId, write_line};
use super::writer::{Line, LineWriter};
use crate::telemetry::text::Text;

/// How many lists of spans there are. Threads take turns in choosing theirs.
const LISTS: usize = 16;

/// Writes each event that is heard as one line of JSON.
pub(super) struct LineSubscriber {
    heard: Heard,
    spans: [Mutex<Spans>; LISTS],
    writer: LineWriter,
}

/// How many threads have begun a span.
static THREADS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// The list in which the spans of this thread begin.
    static LIST: usize = THREADS.fetch_add(1, Relaxed) % LISTS;
    /// The spans that this thread is in, the innermost last.
    static ENTERED: RefCell<Vec<Id>> = const { RefCell::new(Vec::new()) };
}

/// The innermost span; none while the thread ends.
fn current() -> Option<Id> {
    ENTERED.try_with(|entered| entered.borrow().last().cloned()).ok().flatten()
}

impl LineSubscriber {
    pub(super) fn new(heard: Heard, writer: LineWriter) -> Self {
        Self { heard, spans: Default::default(), writer }
    }

    /// Hands over a line, of a call without how it ended where that is not heard.
    pub(super) fn hand_over(&self, mut line: Line) {
        if let Line::Audit(_, told) = &mut line {
            told.take_if(|told| !self.heard.hears_call(told.level));
        }
        self.writer.hand_over(line);
    }

    /// The list in which a span is kept, and its place there.
    fn kept(&self, id: &Id) -> Option<(MutexGuard<'_, Spans>, usize)> {
        let number = usize::try_from(id.into_u64()).ok()?.checked_sub(1)?;
        Some((lock(self.spans.get(number % LISTS)?), number / LISTS))
    }

    /// Asks a span for something.
    fn ask<T>(&self, id: &Id, question: impl FnOnce(&mut Span) -> T) -> Option<T> {
        let (mut spans, place) = self.kept(id)?;
        spans.kept.get_mut(place)?.as_mut().map(question)
    }
}

fn lock(spans: &Mutex<Spans>) -> MutexGuard<'_, Spans> {
    spans.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Subscriber for LineSubscriber {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        self.heard.interest(metadata)
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.heard.hears(metadata)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.heard.most())
    }

    fn new_span(&self, attributes: &Attributes<'_>) -> Id {
        let mut found = FindTraceId::default();
        attributes.record(&mut found);
        let parent = if attributes.is_contextual() { current() } else { attributes.parent().cloned() };
        let trace_id = found.0.or_else(|| self.ask(&parent?, |parent| parent.trace_id.clone()));
        let span = Span { references: 1, metadata: attributes.metadata(), trace_id: trace_id.unwrap_or_default() };
        let list = LIST.try_with(|list| *list).unwrap_or_default();
        let place = self.spans.get(list).map_or(0, |spans| lock(spans).keep(span));
        Id::from_u64((place * LISTS + list) as u64 + 1)
    }

    fn record(&self, id: &Id, values: &Record<'_>) {
        let mut found = FindTraceId::default();
        values.record(&mut found);
        if let Some(trace_id) = found.0 {
            self.ask(id, |span| span.trace_id = trace_id);
        }
    }

    fn record_follows_from(&self, _id: &Id, _follows: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let span = if event.is_contextual() { current() } else { event.parent().cloned() };
        let function = span.as_ref().and_then(|id| self.ask(id, |span| span.metadata.name())).unwrap_or("-");
        self.writer.write_line(|line| {
            write_line(line, event, OffsetDateTime::now_utc(), function, |line| {
                if let Some(id) = span {
                    self.ask(&id, |span| line.append(&span.trace_id));
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
        self.ask(id, |span| span.references += 1);
        id.clone()
    }

    fn try_close(&self, id: Id) -> bool {
        self.kept(&id).is_some_and(|(mut spans, place)| spans.let_go(place))
    }

    fn current_span(&self) -> Current {
        let known = |id: Id| self.ask(&id, |span| span.metadata).map(|metadata| Current::new(id, metadata));
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
    trace_id: Text,
}

impl Spans {
    /// Gives the span's place.
    fn keep(&mut self, span: Span) -> usize {
        let place = self.free.pop().unwrap_or(self.kept.len());
        match self.kept.get_mut(place) {
            Some(free) => *free = Some(span),
            None => self.kept.push(Some(span)),
        }
        place
    }

    /// Whether that was the last reference.
    fn let_go(&mut self, place: usize) -> bool {
        let Some(kept) = self.kept.get_mut(place) else { return false };
        let Some(span) = kept else { return false };
        span.references -= 1;
        let is_closed = span.references == 0;
        if is_closed {
            *kept = None;
            self.free.push(place);
        }
        is_closed
    }
}
