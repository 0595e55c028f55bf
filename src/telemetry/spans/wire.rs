//! Spans as OTLP's protobuf, written straight into the bytes that are sent: a span is no tree of objects at any time.
//!
//! Fields stand in the order in which they become known, which protobuf leaves open. The numbers are those of
//! `opentelemetry/proto/trace/v1/trace.proto`; the tests read what is written here with the types made from it.

use std::net::IpAddr;

use http::HeaderValue;

use super::TraceContext;
use crate::telemetry::text::Text;

/// Whether a span answers somebody or asks somebody.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Server = 2,
    Client = 3,
}

/// What a span is a part of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parent {
    pub(super) span_id: [u8; 8],
    /// Whether it is somebody else's.
    pub(super) is_remote: bool,
}

/// How a field is written.
#[derive(Clone, Copy)]
enum Wire {
    Varint = 0,
    Fixed64 = 1,
    Bytes = 2,
    Fixed32 = 5,
}

/// Most spans fit.
const USUAL_BYTES: usize = 512;

/// A message that is being written.
#[derive(Debug, Default)]
pub(super) struct Message(Vec<u8>);

impl Message {
    /// Nothing yet, behind so many bytes to be filled later; there will be about so many in all.
    pub(super) fn with_room(room: usize, bytes: usize) -> Self {
        let mut message = Vec::with_capacity(room + bytes + bytes / 8 + USUAL_BYTES);
        message.resize(room, 0);
        Self(message)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    /// Adds a span to a batch, written by `write`.
    pub(super) fn span(&mut self, write: impl FnOnce(&mut Self)) {
        self.0.reserve(USUAL_BYTES);
        self.0.push(2 << 3 | Wire::Bytes as u8);
        // Its length stands before it, in two bytes, which is enough for nearly all, and is told at the end.
        let place = self.0.len()..self.0.len() + 2;
        self.0.extend_from_slice(&[0, 0]);
        write(self);
        let length = self.0.len().saturating_sub(place.end);
        match self.0.get_mut(place.clone()) {
            Some([low, high]) if length < 1 << 14 => (*low, *high) = (length as u8 | 0x80, (length >> 7) as u8),
            Some(_) => {
                let mut longer = Self::default();
                longer.varint(length as u64);
                self.0.splice(place, longer.0);
            }
            None => {}
        }
    }

    /// Begins a span: with its trace's state, its parent, and what is the same in all of its kind.
    pub(super) fn begin_span(
        &mut self,
        kind: Kind,
        ours: TraceContext,
        state: Option<&HeaderValue>,
        parent: Option<Parent>,
        start: u64,
        description: &Self,
    ) {
        self.context(ours, state, parent.is_some_and(|parent| parent.is_remote), 16);
        if let Some(parent) = parent {
            self.id(4, parent.span_id);
        }
        self.number(6, kind as u64);
        self.fixed64(7, start);
        self.append(description);
    }

    /// Adds fields that are written already.
    pub(super) fn append(&mut self, fields: &Self) {
        self.0.extend_from_slice(&fields.0);
    }

    /// The name, in parts.
    pub(super) fn name(&mut self, parts: &[&str]) {
        self.head(5, parts.iter().map(|part| part.len()).sum());
        for part in parts {
            self.0.extend_from_slice(part.as_bytes());
        }
    }

    pub(super) fn text(&mut self, name: &str, value: impl AsRef<[u8]>) {
        let value = value.as_ref();
        self.attribute(name, 1 << 3 | Wire::Bytes as u8, value.len() as u64, value);
    }

    pub(super) fn address(&mut self, name: &str, value: IpAddr) {
        let mut text = Text::with_capacity(45);
        text.address(value);
        self.text(name, text.as_bytes());
    }

    pub(super) fn integer(&mut self, name: &str, value: u32) {
        self.attribute(name, 3 << 3 | Wire::Varint as u8, value.into(), &[]);
    }

    /// Another trace that this span belongs to as well.
    pub(super) fn link(&mut self, to: TraceContext, state: Option<&HeaderValue>) {
        let mut link = Self::default();
        link.context(to, state, true, 6);
        self.bytes(13, &link.0);
    }

    /// The status of a span that went wrong.
    pub(super) fn failure(&mut self, why: &str) {
        const ERROR: u64 = 2;
        self.head(15, length_of_bytes(why.len()) + 2);
        self.bytes(2, why.as_bytes());
        self.number(3, ERROR);
    }

    pub(super) fn end(&mut self, end: u64) {
        self.fixed64(8, end);
    }

    /// What stands before the spans in a whole export, if they take so many bytes: the resource and the scope, which are encoded.
    pub(super) fn envelope(resource: &[u8], scope: &[u8], spans: usize) -> Vec<u8> {
        let scope_spans = length_of_bytes(scope.len()) + spans;
        let resource_spans = length_of_bytes(resource.len()) + length_of_bytes(scope_spans);
        let mut envelope = Self(Vec::with_capacity(Self::longest_envelope(resource, scope)));
        envelope.head(1, resource_spans);
        envelope.bytes(1, resource);
        envelope.head(2, scope_spans);
        envelope.bytes(1, scope);
        envelope.0
    }

    /// How long that is at most.
    pub(super) fn longest_envelope(resource: &[u8], scope: &[u8]) -> usize {
        const LONGEST_HEAD: usize = 1 + 10;
        4 * LONGEST_HEAD + resource.len() + scope.len()
    }

    /// Ids, state and flags, which spans and links have in common, but for the number of the flags.
    fn context(&mut self, context: TraceContext, state: Option<&HeaderValue>, is_remote: bool, flags: u32) {
        /// Somebody knows whether the parent is remote; and it is.
        const HAS_IS_REMOTE: u32 = 0x100;
        const IS_REMOTE: u32 = 0x200;
        self.id(1, context.trace_id().bytes());
        self.id(2, context.span_id_bytes());
        if let Some(state) = state {
            self.bytes(3, state.as_bytes());
        }
        let remote = if is_remote { IS_REMOTE } else { 0 };
        self.tag(flags, Wire::Fixed32);
        self.0.extend_from_slice(&(u32::from(context.is_sampled()) | HAS_IS_REMOTE | remote).to_le_bytes());
    }

    fn id<const N: usize>(&mut self, field: u8, id: [u8; N]) {
        self.0.extend_from_slice(&[field << 3 | Wire::Bytes as u8, N as u8]);
        self.0.extend_from_slice(&id);
    }

    /// An attribute: the tag of its value, the number that follows, which is the value or its length, and what comes behind that.
    fn attribute(&mut self, name: &str, tag: u8, number: u64, rest: &[u8]) {
        let value = 1 + length_of_varint(number) + rest.len();
        let whole = length_of_bytes(name.len()) + length_of_bytes(value);
        if whole < 0x80 {
            // The same as below, for lengths of one byte, which nearly all are.
            self.0.extend_from_slice(&[9 << 3 | 2, whole as u8, 1 << 3 | 2, name.len() as u8]);
            self.0.extend_from_slice(name.as_bytes());
            self.0.extend_from_slice(&[2 << 3 | 2, value as u8, tag]);
        } else {
            self.head(9, whole);
            self.bytes(1, name.as_bytes());
            self.head(2, value);
            self.0.push(tag);
        }
        self.varint(number);
        self.0.extend_from_slice(rest);
    }

    fn bytes(&mut self, field: u32, bytes: &[u8]) {
        self.head(field, bytes.len());
        self.0.extend_from_slice(bytes);
    }

    fn number(&mut self, field: u32, number: u64) {
        self.tag(field, Wire::Varint);
        self.varint(number);
    }

    fn fixed64(&mut self, field: u32, number: u64) {
        self.tag(field, Wire::Fixed64);
        self.0.extend_from_slice(&number.to_le_bytes());
    }

    /// Begins a field of so many bytes.
    fn head(&mut self, field: u32, length: usize) {
        self.tag(field, Wire::Bytes);
        self.varint(length as u64);
    }

    fn tag(&mut self, field: u32, wire: Wire) {
        self.varint(u64::from(field << 3 | wire as u32));
    }

    fn varint(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.0.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.0.push(number as u8);
    }
}

/// How long a field of bytes is, whose number is below 16.
fn length_of_bytes(length: usize) -> usize {
    1 + length_of_varint(length as u64) + length
}

fn length_of_varint(number: u64) -> usize {
    (64 - (number | 1).leading_zeros() as usize).div_ceil(7)
}

#[cfg(test)]
mod tests {
    use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
    use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value::Value};
    use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span, Status, span::Link};
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;

    fn attribute(key: &str, value: Value) -> KeyValue {
        KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value) }), ..Default::default() }
    }

    proptest! {
        /// Whatever the lengths are, a reader of OTLP finds what was said.
        #[test]
        fn what_is_written_is_what_is_read(
            text in ".{0,300}", times in prop_oneof![Just(1), Just(70)], integer: u32, why in "[a-z]{0,200}",
            start: u64, end: u64, spans in 0..4_usize,
        ) {
            let text = text.repeat(times);
            let ours = TraceContext::parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").unwrap();
            let other = TraceContext::parse("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00").unwrap();
            let state = HeaderValue::from_static("a=1");
            let mut description = Message::default();
            description.name(&["GET ", &text]);
            let parent = Some(Parent { span_id: other.span_id_bytes(), is_remote: true });
            let mut batch = Message::default();
            for _ in 0..spans {
                batch.span(|span| {
                    span.begin_span(Kind::Client, ours, Some(&state), parent, start, &description);
                    span.text("text", &text);
                    span.integer("integer", integer);
                    span.address("address", "2001:db8:1111:2222:3333:4444:5555:6666".parse().unwrap());
                    span.link(other, None);
                    span.failure(&why);
                    span.end(end);
                });
            }
            let expected = Span {
                trace_id: 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c_u128.to_be_bytes().to_vec(),
                span_id: 0xb7ad_6b71_6920_3331_u64.to_be_bytes().to_vec(),
                trace_state: "a=1".to_owned(),
                parent_span_id: 0x00f0_67aa_0ba9_02b7_u64.to_be_bytes().to_vec(),
                flags: 0x301,
                name: format!("GET {text}"),
                kind: 3,
                start_time_unix_nano: start,
                end_time_unix_nano: end,
                attributes: vec![
                    attribute("text", Value::StringValue(text)),
                    attribute("integer", Value::IntValue(integer.into())),
                    attribute("address", Value::StringValue("2001:db8:1111:2222:3333:4444:5555:6666".to_owned())),
                ],
                links: vec![Link {
                    trace_id: 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736_u128.to_be_bytes().to_vec(),
                    span_id: 0x00f0_67aa_0ba9_02b7_u64.to_be_bytes().to_vec(),
                    flags: 0x300,
                    ..Default::default()
                }],
                status: Some(Status { message: why, code: 2 }),
                ..Default::default()
            };
            let mut export = Message::envelope(&[], &[], batch.0.len());
            prop_assert!(export.len() <= Message::longest_envelope(&[], &[]));
            export.extend(batch.0);
            let read = ExportTraceServiceRequest::decode(export.as_slice()).unwrap();
            let scope_spans = ScopeSpans { scope: Some(Default::default()), spans: vec![expected; spans], ..Default::default() };
            let resource_spans =
                ResourceSpans { resource: Some(Default::default()), scope_spans: vec![scope_spans], ..Default::default() };
            prop_assert_eq!(read.resource_spans, [resource_spans]);
        }
    }
}
