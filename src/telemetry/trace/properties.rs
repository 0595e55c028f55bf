//! Trace contexts, whatever a client sends for one.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// Well-formed, nearly so, and not at all.
fn traceparent() -> impl Strategy<Value = String> {
    prop_oneof![
        "[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}",
        "00-[0-9a-f]{32}-[0-9a-f]{16}-0[0-9](-[0-9a-f]*)?",
        "[0-9a-f]{1,3}-[0-9a-fA-F]{31,33}-0{0,16}[0-9a-f]{0,1}-[0-9a-g+-]{1,3}",
        "(00|01|ff|cc)-0{31}[01]-0{15}[01]-(00|01|ff|FF)(-.{0,4})?",
        ".{0,60}",
    ]
}

fn headers(name: HeaderName, bytes: &[u8]) -> HeaderMap {
    HeaderMap::from_iter(HeaderValue::from_bytes(bytes).ok().map(|value| (name, value)))
}

proptest! {
    #[test]
    fn a_traceparent_is_absent_or_survives_the_round_trip(text in traceparent()) {
        let Some(context) = TraceContext::parse(&text) else { return Ok(()) };
        let header = context.header();
        let header = header.to_str().unwrap();
        prop_assert_eq!(header.len(), 55);
        prop_assert_eq!(TraceContext::parse(header), Some(context));
        prop_assert_eq!(&header[2..53], &text[2..53], "trace and parent stay what they were");
        prop_assert_eq!(context.trace_id().to_string(), &text[3..35]);
        prop_assert!(text.get(..2) != Some("ff") && !text[..55].contains(|c: char| c.is_ascii_uppercase()));
    }

    #[test]
    fn every_context_is_read_as_it_was_written(trace_id in 1u128.., span_id in 1u64.., sampled: bool) {
        let context = TraceContext { trace_id: trace_id.into(), span_id, sampled };
        let header = context.header();
        prop_assert_eq!(TraceContext::parse(header.to_str().unwrap()), Some(context));
        let child = context.child();
        prop_assert_eq!((child.trace_id, child.sampled), (trace_id.into(), sampled));
        prop_assert!(child.span_id != 0);
    }

    #[test]
    fn a_request_has_a_trace_whatever_its_headers_say(
        parent in prop_oneof![traceparent().prop_map(String::into_bytes), vec(any::<u8>(), 0..80)],
        state in prop_oneof!["[ -~]{0,600}".prop_map(String::into_bytes), vec(any::<u8>(), 0..80)],
        meta in traceparent(), meta_state in ".{0,40}",
    ) {
        let mut all = headers(TRACEPARENT, &parent);
        all.extend(headers(TRACESTATE, &state));
        let trace = RequestTrace::new(&all);
        trace.adopt(&meta, Some(&meta_state));
        let adopted = TraceContext::parse(&meta);
        let sent = all.get(TRACEPARENT).and_then(|parent| parent.to_str().ok()).and_then(TraceContext::parse);
        if let Some(expected) = adopted.or(sent) {
            prop_assert_eq!(trace.context(), expected);
        }
        prop_assert!(TraceContext::parse(trace.context().header().to_str().unwrap()).is_some());
        if let Some(state) = &trace.trace().state {
            prop_assert!((1..=LONGEST_TRACESTATE).contains(&state.len()));
            let given = all.get(TRACESTATE).map(HeaderValue::as_bytes).unwrap_or_default();
            prop_assert_eq!(state.as_bytes(), if adopted.is_some() { meta_state.as_bytes() } else { given });
        }
    }
}
