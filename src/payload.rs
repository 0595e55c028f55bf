//! How a tool's result gets into its answer: written once, as text, past the tree that rmcp would build of it and print again.
//!
//! The HTTP side gives each request a [`Payload`]. The tool leaves its result there and hands rmcp two marks in its stead; when
//! rmcp has written the answer around them, the result takes their places: as it is in `structuredContent`, and as a JSON
//! string in `content`. Who calls tools without an HTTP side gets the same bytes the long way.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use memchr::memmem;
use serde_json::{Value, json};

/// The place where the result of one request waits.
#[derive(Debug, Clone, Default)]
pub struct Payload(Arc<OnceLock<Waiting>>);

#[derive(Debug)]
struct Waiting {
    json: String,
    marks: Marks,
}

/// What stands in an answer until the result takes its place. Nobody can know them beforehand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marks {
    /// Where the result goes as the text of a JSON string.
    pub text: String,
    /// Where it goes as it is.
    pub value: Value,
}

impl Marks {
    fn new() -> Self {
        let nonce = fastrand::u128(..);
        // An object, as the result is: anything else would make rmcp add to the content.
        let value = json!({ format!("payload-value-{nonce:032x}"): null });
        Self { text: format!("payload-text-{nonce:032x}"), value }
    }
}

impl Payload {
    /// Leaves a result, which must be compact JSON, and gives the marks to write instead, each of them once.
    ///
    /// # Errors
    ///
    /// Gives the result back when there is one already.
    pub fn leave(&self, json: String) -> Result<Marks, String> {
        let marks = Marks::new();
        match self.0.set(Waiting { json, marks: marks.clone() }) {
            Ok(()) => Ok(marks),
            Err(refused) => Err(refused.json),
        }
    }

    /// Whether a result waits.
    pub fn waits(&self) -> bool {
        self.0.get().is_some()
    }

    /// The answer with the result in its places. An answer without the marks, such as an error, is given back as it is.
    pub fn fill(&self, answer: Bytes) -> Bytes {
        let Some(Waiting { json, marks }) = self.0.get() else { return answer };
        let Some(parts) = Parts::of(&answer, marks) else { return answer };
        let mut whole = Vec::with_capacity(answer.len() + 2 * json.len() + json.len() / 4);
        whole.extend_from_slice(parts.before);
        escape(json, &mut whole);
        whole.extend_from_slice(parts.between);
        whole.extend_from_slice(json.as_bytes());
        whole.extend_from_slice(parts.after);
        whole.into()
    }
}

/// An answer, taken apart at its marks: the quotes of the text stay.
struct Parts<'a> {
    before: &'a [u8],
    between: &'a [u8],
    after: &'a [u8],
}

impl<'a> Parts<'a> {
    /// rmcp writes `content` before `structuredContent`.
    fn of(answer: &'a [u8], marks: &Marks) -> Option<Self> {
        let at = memmem::find(answer, marks.text.as_bytes())?;
        let (before, rest) = answer.split_at_checked(at)?;
        let rest = rest.get(marks.text.len()..)?;
        let value = marks.value.to_string();
        let (between, rest) = rest.split_at_checked(memmem::find(rest, value.as_bytes())?)?;
        Some(Self { before, between, after: rest.get(value.len()..)? })
    }
}

/// Compact JSON as the inside of a JSON string. Its own strings have their control characters escaped already.
fn escape(json: &str, out: &mut Vec<u8>) {
    let mut rest = json.as_bytes();
    while let Some(at) = memchr::memchr2(b'"', b'\\', rest)
        && let Some((plain, special)) = rest.split_at_checked(at)
        && let Some((special, after)) = special.split_first()
    {
        out.extend_from_slice(plain);
        out.extend_from_slice(&[b'\\', *special]);
        rest = after;
    }
    out.extend_from_slice(rest);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(marks: &Marks) -> Bytes {
        let result = json!({ "content": [{ "type": "text", "text": marks.text }], "structuredContent": marks.value });
        serde_json::to_vec(&json!({ "id": "an \"id\"", "jsonrpc": "2.0", "result": result })).unwrap().into()
    }

    #[test]
    fn a_result_takes_the_places_of_its_marks_as_text_and_as_it_is() {
        for result in [
            json!({}),
            json!({ "name": "Zoë \"Z\" \\ \n\t\u{1}\u{7f} 語 😀" }),
            json!({ "data": [{ "a": [1, -2.5, null, true, "", { "\"\\": {} }] }] }),
            json!({ "payload-text-": "payload-value-" }),
        ] {
            let payload = Payload::default();
            let marks = payload.leave(result.to_string()).unwrap();
            let filled: Value = serde_json::from_slice(&payload.fill(answer(&marks))).unwrap();
            assert_eq!(filled["result"]["content"][0]["text"], result.to_string());
            assert_eq!(filled["result"]["structuredContent"], result);
            assert_eq!(filled["id"], "an \"id\"");
        }
    }

    #[test]
    fn an_answer_without_the_marks_stays_as_it_is() {
        let (payload, other) = (Payload::default(), Payload::default());
        assert!(!payload.waits());
        assert_eq!(payload.fill("{}".into()), "{}");
        let marks = payload.leave("{}".to_owned()).unwrap();
        assert_eq!(payload.leave("[]".to_owned()), Err("[]".to_owned()));
        let elsewhere = other.leave("{}".to_owned()).unwrap();
        assert_ne!(marks, elsewhere);
        for answer in
            ["".into(), "{\"error\":{}}".into(), answer(&elsewhere), marks.text.into(), marks.value.to_string().into()]
        {
            assert_eq!(payload.fill(Bytes::clone(&answer)), answer);
        }
    }
}
