//! How a tool's result gets into its answer: written once, as text, past the tree that rmcp would build of it and print again.
//!
//! The HTTP side gives each request a [`Payload`]. The tool leaves its result there and hands rmcp two marks in its stead; when
//! rmcp has written the answer around them, the result takes their places: as it is in `structuredContent`, and as a JSON
//! string in `content`. Who calls tools without an HTTP side gets the same bytes the long way.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use serde_json::Value;

/// The place where the result of one request waits.
#[derive(Clone, Default)]
pub struct Payload(Arc<OnceLock<Waiting>>);

struct Waiting {
    json: String,
    text_mark: String,
    value_mark: String,
}

/// What stands in an answer until the result takes its place.
#[derive(Debug, PartialEq, Eq)]
pub struct Marks {
    /// For the place of the result as text.
    pub text: String,
    /// For the place of the result as it is: an object too, for anything else would make rmcp add to the content.
    pub value: Value,
}

impl Payload {
    /// Leaves a result, which must be compact JSON, and gives the marks to write instead, each of them once.
    ///
    /// # Errors
    ///
    /// Gives the result back when there is one already.
    pub fn leave(&self, json: String) -> Result<Marks, String> {
        // Nobody can know the number beforehand; and what comes first in a mark is rare elsewhere, so marks are found at once.
        let nonce = fastrand::u64(..);
        let (text_mark, value_mark) = (format!("\u{E000}{nonce:x}"), format!("\u{E001}{nonce:x}"));
        let marks = Marks {
            text: text_mark.clone(),
            value: Value::Object([(value_mark.clone(), Value::Null)].into_iter().collect()),
        };
        match self.0.set(Waiting { json, text_mark, value_mark }) {
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
        let Some(waiting) = self.0.get() else { return answer };
        let Some([before, between, after]) = waiting.around_the_marks(&answer) else { return answer };
        let json = waiting.json.as_bytes();
        let mut whole = Vec::with_capacity(answer.len() + 2 * json.len() + json.len() / 4);
        whole.extend_from_slice(before);
        escape(json, &mut whole);
        whole.extend_from_slice(between);
        whole.extend_from_slice(json);
        whole.extend_from_slice(after);
        whole.into()
    }
}

impl Waiting {
    /// What stands before, between and after the marks: rmcp writes `content` before `structuredContent`.
    fn around_the_marks<'a>(&self, answer: &'a [u8]) -> Option<[&'a [u8]; 3]> {
        let (before, rest) = split_at_mark(answer, &self.text_mark)?;
        let (between, after) = split_at_mark(rest, &self.value_mark)?;
        Some([before, between.strip_suffix(b"{\"")?, after.strip_prefix(b"\":null}")?])
    }
}

fn split_at_mark<'a>(answer: &'a [u8], mark: &str) -> Option<(&'a [u8], &'a [u8])> {
    let mark = mark.as_bytes();
    memchr::memchr_iter(*mark.first()?, answer).find_map(|at| {
        let (before, rest) = answer.split_at_checked(at)?;
        Some((before, rest.strip_prefix(mark)?))
    })
}

/// Compact JSON as the inside of a JSON string. Its own strings have their control characters escaped already.
fn escape(json: &[u8], out: &mut Vec<u8>) {
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
    use serde_json::json;

    use super::*;

    fn answer(marks: &Marks) -> Bytes {
        let result = json!({ "content": [{ "type": "text", "text": marks.text }], "structuredContent": &marks.value });
        serde_json::to_vec(&json!({ "id": "\u{E000}\u{E001} \"id\"", "jsonrpc": "2.0", "result": result }))
            .unwrap()
            .into()
    }

    #[test]
    fn a_result_takes_the_places_of_its_marks_as_text_and_as_it_is() {
        for result in [
            json!({}),
            json!({ "name": "Zoë \"Z\" \\ \n\t\u{1}\u{7f} 語 😀" }),
            json!({ "data": [{ "a": [1, -2.5, null, true, "", { "\"\\": {} }] }] }),
            json!({ "\u{E000}": "\u{E001}\u{E000}" }),
        ] {
            let payload = Payload::default();
            let marks = payload.leave(result.to_string()).unwrap();
            let filled: Value = serde_json::from_slice(&payload.fill(answer(&marks))).unwrap();
            assert_eq!(filled["result"]["content"][0]["text"], result.to_string());
            assert_eq!(filled["result"]["structuredContent"], result);
            assert_eq!(filled["id"], "\u{E000}\u{E001} \"id\"");
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
