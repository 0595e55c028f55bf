//! W3C Trace Context: whose request is this, and what do we tell the next hop?
//!
//! One [`RequestTrace`] accompanies a request from the first byte to the log line. It starts with the `traceparent` header
//! (or an id of ours) and may be replaced once, when the body turns out to carry `params._meta.traceparent`, which wins.

#[cfg(test)]
mod properties;

use std::fmt;
use std::sync::{Arc, OnceLock};

use http::{HeaderMap, HeaderName, HeaderValue};
use tracing::Span;

/// The header, and the key of `params._meta`, that names the trace and its parent.
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// The header, and the key of `params._meta`, that tracing systems pass along for themselves.
pub const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
/// The specification asks to pass at least so many characters on; longer ones are dropped.
const LONGEST_TRACESTATE: usize = 512;

/// A W3C trace context, version 00: <https://www.w3.org/TR/trace-context/>.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    trace_id: TraceId,
    /// The span of whoever called us; ours when the trace begins here.
    span_id: u64,
    sampled: bool,
}

impl TraceContext {
    /// Begins a trace. The ids are unique, not secret: no system call is spent on them.
    pub fn begin() -> Self {
        Self { trace_id: TraceId::from(fastrand::u128(1..)), span_id: fastrand::u64(1..), sampled: false }
    }

    /// Reads a `traceparent`. Anything that is not well-formed is as good as absent, as the specification asks.
    pub fn parse(traceparent: &str) -> Option<Self> {
        let mut parts = traceparent.split('-');
        let (version, trace_id, span_id, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let lengths = [version.len(), trace_id.len(), span_id.len(), flags.len()];
        let lower_hex = |part: &str| part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if lengths != [2, 32, 16, 2] || ![version, trace_id, span_id, flags].into_iter().all(lower_hex) {
            return None;
        }
        // Later versions may append fields; version 00 has exactly four, and ff is forbidden.
        if version == "ff" || (version == "00" && parts.next().is_some()) {
            return None;
        }
        let context = Self {
            trace_id: u128::from_str_radix(trace_id, 16).ok()?.into(),
            span_id: u64::from_str_radix(span_id, 16).ok()?,
            sampled: u8::from_str_radix(flags, 16).ok()? & 1 == 1,
        };
        (context.trace_id != TraceId::from(0) && context.span_id != 0).then_some(context)
    }

    /// The same, with this decision about whether it is recorded.
    #[must_use]
    pub(super) fn sampled_as(self, sampled: bool) -> Self {
        Self { sampled, ..self }
    }

    pub(super) fn is_sampled(self) -> bool {
        self.sampled
    }

    pub(super) fn span_id_bytes(self) -> [u8; 8] {
        self.span_id.to_be_bytes()
    }

    /// The same trace, with a new span id: what the next hop, or one attempt, sees as its parent.
    #[must_use]
    pub fn child(self) -> Self {
        Self { span_id: fastrand::u64(1..), ..self }
    }

    /// The 32 hexadecimal digits that logs, errors and headers share.
    pub fn trace_id(self) -> TraceId {
        self.trace_id
    }

    /// The `traceparent` header.
    pub fn header(self) -> HeaderValue {
        let mut text = *b"00-................................-................-00";
        if let Some(digits) = text.get_mut(3..35) {
            write_hex(digits, &self.trace_id.0);
        }
        if let Some(digits) = text.get_mut(36..52) {
            write_hex(digits, &self.span_id.to_be_bytes());
        }
        if self.sampled
            && let Some(flag) = text.last_mut()
        {
            *flag = b'1';
        }
        HeaderValue::from_bytes(&text).unwrap_or_else(|_| HeaderValue::from_static(""))
    }
}

/// Fills the digits with bytes in hexadecimal. Written out because it happens several times a call, and formatting is slow; without a table,
/// so that many digits are made at once.
pub(super) fn write_hex(digits: &mut [u8], bytes: &[u8]) {
    let digit = |nibble: u8| nibble.wrapping_add(if nibble < 10 { b'0' } else { b'a' - 10 });
    for (pair, byte) in digits.as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
        *pair = [digit(byte >> 4), digit(byte & 0xf)];
    }
}

/// What is passed on to the next hop: the context, and the vendors' state that came with it.
#[derive(Debug, Clone)]
pub struct Trace {
    /// Trace and parent.
    pub context: TraceContext,
    /// `tracestate`, unread; it belongs to its `traceparent` and goes where that goes.
    pub state: Option<HeaderValue>,
}

impl Trace {
    /// Begins a trace of our own.
    pub fn begin() -> Self {
        Self { context: TraceContext::begin(), state: None }
    }

    fn parse(traceparent: &str, tracestate: Option<&str>) -> Option<Self> {
        let context = TraceContext::parse(traceparent)?;
        let printable = |state: &&str| {
            !state.is_empty()
                && state.len() <= LONGEST_TRACESTATE
                && state.bytes().all(|byte| matches!(byte, b' '..=b'~'))
        };
        let state = tracestate.filter(printable).and_then(|state| HeaderValue::from_str(state).ok());
        Some(Self { context, state })
    }
}

/// Displays as 32 lower-case hexadecimal digits. Kept as bytes, for what a number of that size is a part of has to lie at multiples of
/// 16, and the allocator is slower there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TraceId([u8; 16]);

impl From<u128> for TraceId {
    fn from(id: u128) -> Self {
        Self(id.to_be_bytes())
    }
}

impl TraceId {
    pub(super) fn bytes(self) -> [u8; 16] {
        self.0
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut digits = [b'0'; 32];
        write_hex(&mut digits, &self.0);
        f.write_str(str::from_utf8(&digits).unwrap_or_default())
    }
}

impl fmt::Debug for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The trace of one request, shared between the HTTP layer, which answers with it, and the tool, which may learn a better one.
#[derive(Debug, Clone)]
pub struct RequestTrace(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    from_header: Trace,
    /// Whether there was no such header, and the trace began here.
    is_ours: bool,
    from_meta: OnceLock<Trace>,
    span: Span,
}

impl RequestTrace {
    /// Takes the request's trace headers, or begins a trace.
    pub fn new(headers: &HeaderMap) -> Self {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let trace = text(TRACEPARENT).and_then(|parent| Trace::parse(parent, text(TRACESTATE)));
        let is_ours = trace.is_none();
        let trace = trace.unwrap_or_else(Trace::begin);
        // At ERROR, so that no filter can switch it off: every line of this request takes its trace id from here.
        let span = tracing::error_span!("request", trace_id = %trace.context.trace_id());
        Self(Arc::new(Shared { from_header: trace, is_ours, from_meta: OnceLock::new(), span }))
    }

    /// `params._meta.traceparent` wins over the header (SEP-414); one that is malformed is dropped.
    pub fn adopt(&self, traceparent: &str, tracestate: Option<&str>) {
        if let Some(trace) = Trace::parse(traceparent, tracestate) {
            let trace_id = trace.context.trace_id();
            if self.0.from_meta.set(trace).is_ok() {
                self.0.span.record("trace_id", tracing::field::display(trace_id));
            }
        }
    }

    /// The trace that holds now.
    pub fn trace(&self) -> &Trace {
        self.0.from_meta.get().unwrap_or(&self.0.from_header)
    }

    /// The same, if somebody else began it.
    pub fn parent(&self) -> Option<&Trace> {
        self.0.from_meta.get().or_else(|| self.in_header())
    }

    /// The trace of the HTTP request, where the message named another parent.
    pub fn link(&self) -> Option<&Trace> {
        let meta = self.0.from_meta.get()?;
        self.in_header().filter(|header| header.context != meta.context)
    }

    fn in_header(&self) -> Option<&Trace> {
        Some(&self.0.from_header).filter(|_| !self.0.is_ours)
    }

    /// Its context.
    pub fn context(&self) -> TraceContext {
        self.trace().context
    }

    /// The span that gives its trace id to every log line written inside it.
    pub fn span(&self) -> &Span {
        &self.0.span
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALID: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_valid_traceparent_survives_the_round_trip() {
        let context = TraceContext::parse(VALID).unwrap();
        assert_eq!(context.header(), VALID);
        assert_eq!(context.trace_id().to_string(), "0af7651916cd43dd8448eb211c80319c");
        let child = context.child().header();
        assert!(child.to_str().unwrap().starts_with("00-0af7651916cd43dd8448eb211c80319c-"));
        assert_ne!(child, VALID);
    }

    #[test]
    fn what_is_malformed_counts_as_absent() {
        for bad in [
            "",
            "garbage",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-extra",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ] {
            assert_eq!(TraceContext::parse(bad), None, "{bad}");
        }
        assert!(TraceContext::parse(&format!("01{}-more", &VALID[2..])).is_some(), "later versions may grow");
    }

    #[test]
    fn the_body_wins_over_the_header_once() {
        let trace = RequestTrace::new(&HeaderMap::from_iter([(TRACEPARENT, HeaderValue::from_static(VALID))]));
        trace.adopt("nonsense", None);
        assert_eq!(trace.context().header(), VALID);
        let meta = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";
        trace.adopt(meta, Some("vendor=1"));
        trace.adopt(VALID, None);
        assert_eq!(trace.context().header(), meta);
        assert_eq!(trace.trace().state.as_ref().unwrap(), "vendor=1");
    }

    #[test]
    fn a_tracestate_goes_with_its_traceparent_or_not_at_all() {
        let state = |parent: &'static str, state: &str| {
            let headers =
                [(TRACEPARENT, HeaderValue::from_static(parent)), (TRACESTATE, HeaderValue::from_str(state).unwrap())];
            RequestTrace::new(&HeaderMap::from_iter(headers)).trace().state.clone()
        };
        assert_eq!(state(VALID, "a=1,b=2").unwrap(), "a=1,b=2");
        assert_eq!(state("malformed", "a=1"), None);
        assert_eq!(state(VALID, &"x".repeat(LONGEST_TRACESTATE + 1)), None);
    }
}
