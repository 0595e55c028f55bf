//! The JSON-RPC response to a call as the body of an HTTP response.
//!
//! A result stands in its response twice, as text and as it is. A small response is written at once. Of a large one only the result is
//! held, with its lease of memory: the text is escaped piece by piece, as the client reads it, and the structure is the result itself.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use crate::memory::{Lease, SMALL_ANSWER};

/// So much of a result is escaped at a time.
const PIECE: usize = 32 << 10;
const TEXT_END: &[u8] = b"\"}],\"structuredContent\":";

/// The result of a call as compact JSON, with the memory that it was given.
#[derive(Debug)]
pub(crate) struct ResultText {
    json: String,
    lease: Lease,
}

impl ResultText {
    pub(super) fn new(mut json: String, lease: Lease) -> Self {
        // It may wait for its reader for long: room that grew by doubling is given back.
        if json.len() > SMALL_ANSWER && json.capacity() / 8 * 7 > json.len() {
            json.shrink_to_fit();
        }
        lease.set(json.capacity());
        Self { json, lease }
    }

    pub(super) fn as_str(&self) -> &str {
        &self.json
    }
}

impl From<String> for ResultText {
    fn from(json: String) -> Self {
        Self { json, lease: Lease::default() }
    }
}

/// The body of a response.
#[derive(Debug)]
pub struct ResponseBody {
    /// What comes next, as a whole; empty when it is the text's turn, or all is said.
    next: Bytes,
    large: Option<Box<LargeResult>>,
    /// The bytes that are still to come.
    left: u64,
}

#[derive(Debug)]
struct LargeResult {
    json: Bytes,
    /// So much of it has been escaped.
    escaped: usize,
    /// What follows the text, in turn.
    rest: std::array::IntoIter<Bytes, 3>,
}

impl ResponseBody {
    /// A response with a result: what stands before its text, and after its structure.
    pub(super) fn of_result(mut head: Vec<u8>, result: ResultText, tail: &[u8]) -> Self {
        let ResultText { json, lease } = result;
        if json.len() <= SMALL_ANSWER {
            let escaped = json.len() + specials(json.as_bytes());
            head.reserve_exact(escaped + TEXT_END.len() + json.len() + tail.len());
            escape(json.as_bytes(), &mut head);
            head.extend_from_slice(TEXT_END);
            head.extend_from_slice(json.as_bytes());
            head.extend_from_slice(tail);
            return head.into();
        }
        let escaped = json.len() + specials(json.as_bytes());
        // The piece that is being written is held as well.
        lease.set(json.capacity() + escaped.min(2 * PIECE));
        let (json, tail) = (lease.attach(json.into_bytes()), Bytes::copy_from_slice(tail));
        let left = head.len() + escaped + TEXT_END.len() + json.len() + tail.len();
        let rest = [Bytes::from_static(TEXT_END), json.clone(), tail].into_iter();
        Self { next: head.into(), large: Some(Box::new(LargeResult { json, escaped: 0, rest })), left: left as u64 }
    }

    /// The whole of it.
    #[cfg(any(test, feature = "benches"))]
    pub(super) fn into_vec(mut self) -> Vec<u8> {
        let mut whole = Vec::new();
        while let Some(piece) = self.next_piece() {
            whole.extend_from_slice(&piece);
        }
        whole
    }

    fn next_piece(&mut self) -> Option<Bytes> {
        let mut piece = std::mem::take(&mut self.next);
        if piece.is_empty() {
            piece = self.large.as_mut()?.next_piece()?;
        }
        self.left = self.left.saturating_sub(piece.len() as u64);
        if self.left == 0 {
            self.large = None;
        }
        Some(piece)
    }
}

impl LargeResult {
    fn next_piece(&mut self) -> Option<Bytes> {
        let unescaped = self.json.get(self.escaped..).unwrap_or_default();
        let plain = unescaped.get(..PIECE).unwrap_or(unescaped);
        if plain.is_empty() {
            return self.rest.next();
        }
        let mut piece = Vec::with_capacity(plain.len() + specials(plain));
        escape(plain, &mut piece);
        self.escaped += plain.len();
        Some(piece.into())
    }
}

impl From<Vec<u8>> for ResponseBody {
    fn from(whole: Vec<u8>) -> Self {
        Self { left: whole.len() as u64, next: whole.into(), large: None }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Poll::Ready(self.next_piece().map(|piece| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

/// How many bytes longer [`escape`] makes it.
fn specials(json: &[u8]) -> usize {
    json.iter().filter(|byte| matches!(byte, b'"' | b'\\')).count()
}

/// Compact JSON as the inside of a JSON string. Its own strings have their control characters escaped already.
pub(super) fn escape(json: &[u8], out: &mut Vec<u8>) {
    for plain in json.split_inclusive(|byte| matches!(byte, b'"' | b'\\')) {
        match plain.split_last() {
            Some((special @ (b'"' | b'\\'), plain)) => {
                out.extend_from_slice(plain);
                out.extend_from_slice(&[b'\\', *special]);
            }
            _ => out.extend_from_slice(plain),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::memory::ByteBudget;

    fn body(result: &str, lease: Lease) -> ResponseBody {
        let head = br#"{"result":{"content":[{"type":"text","text":""#.to_vec();
        ResponseBody::of_result(head, ResultText::new(result.to_owned(), lease), b"}}")
    }

    #[test]
    fn a_result_of_any_size_stands_twice_in_its_response_whose_length_is_known() {
        for length in [0, 1, SMALL_ANSWER - 8, SMALL_ANSWER - 7, SMALL_ANSWER, PIECE - 8, PIECE, 3 * PIECE + 1] {
            for filler in ["x", "\"", "\\", "語"] {
                let result = json!({ "a": filler.repeat(length) });
                let body = body(&result.to_string(), Lease::default());
                let announced = body.size_hint().exact();
                let whole = body.into_vec();
                assert_eq!(announced, Some(whole.len() as u64), "{length} {filler}");
                let response: Value = serde_json::from_slice(&whole).unwrap();
                assert_eq!(response["result"]["content"][0]["text"], result.to_string());
                assert_eq!(response["result"]["structuredContent"], result);
            }
        }
    }

    #[test]
    fn a_large_result_is_held_once_and_given_back_with_its_last_byte() {
        let budget = ByteBudget::new(64 << 20);
        let result = json!({ "a": "\"".repeat(1 << 20) }).to_string();
        let mut body = body(&result, budget.lease(0));
        let held = result.len()..result.len() + 3 * PIECE;
        assert!(held.contains(&budget.used()), "{}", budget.used());
        let mut last = Bytes::new();
        while let Some(piece) = body.next_piece() {
            assert!(piece.len() <= 2 * PIECE || piece == result, "{}", piece.len());
            last = if piece == result { piece } else { last };
        }
        assert!(body.is_end_stream());
        // The connection has not written the structure yet.
        assert!(held.contains(&budget.used()));
        drop(last);
        assert_eq!(budget.used(), 0);
    }
}
