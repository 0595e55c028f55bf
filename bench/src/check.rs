//! Is it the right answer?
//!
//! Every answer: status 200, this call's JSON-RPC id and number in it, structured content, not an error. The first of each kind,
//! one in 64, and each whose length differs from the last that was compared is compared as a whole: structured content and text
//! with what the backend answered.

use memchr::memmem;
use serde_json::Value;

use crate::calls::{Call, Kind};

/// One in so many answers is compared as a whole in any case.
const COMPARED: u64 = 64;
/// Of a longer answer only so much at each end is searched: its envelope stands there.
const SEARCHED: usize = 8 * 1024;

pub struct Checker {
    passed_through: bool,
    seen: u64,
    /// The length of the last answer of each kind that was compared as a whole.
    lengths: Vec<(Kind, usize)>,
    pub compared: u64,
}

impl Checker {
    pub fn new(passed_through: bool) -> Self {
        Self { passed_through, seen: 0, lengths: Vec::new(), compared: 0 }
    }

    /// What is wrong with an answer, if anything is.
    pub fn check(&mut self, call: &Call, status: u16, body: &[u8]) -> Result<(), String> {
        if status != 200 {
            return Err(format!("HTTP {status}"));
        }
        self.seen += 1;
        let known = self.lengths.iter_mut().find(|(kind, _)| *kind == call.kind);
        let is_known = known.as_ref().is_some_and(|(_, length)| *length == body.len());
        if is_known && !self.seen.is_multiple_of(COMPARED) {
            return glance(call, body);
        }
        self.compared += 1;
        compare(call, body, self.passed_through)?;
        match known {
            Some((_, length)) => *length = body.len(),
            None => self.lengths.push((call.kind, body.len())),
        }
        Ok(())
    }
}

fn glance(call: &Call, body: &[u8]) -> Result<(), String> {
    let (start, end) = match body.len() > 2 * SEARCHED {
        true => (&body[..SEARCHED], &body[body.len() - SEARCHED..]),
        false => (body, &body[..0]),
    };
    let holds = |wanted: &[u8]| memmem::find(start, wanted).is_some() || memmem::find(end, wanted).is_some();
    let fails = matches!(call.kind, Kind::Failure(_));
    if holds(b"\"isError\":true") != fails {
        return Err(if fails { "a failure was reported as a success" } else { "a failed call" }.to_owned());
    }
    if !holds(&call.id_digits()) || call.mark().is_some_and(|mark| !holds(&mark)) {
        return Err("the answer to another call".to_owned());
    }
    if !fails && body.len() <= 2 * SEARCHED && !holds(b"\"structuredContent\"") {
        return Err("no structured content".to_owned());
    }
    Ok(())
}

fn compare(call: &Call, body: &[u8], passed_through: bool) -> Result<(), String> {
    let answer: Value = serde_json::from_slice(body).map_err(|error| format!("not JSON: {error}"))?;
    let result = &answer["result"];
    if answer["jsonrpc"] != "2.0" || answer["id"] != call.id {
        return Err("not the JSON-RPC answer to this call".to_owned());
    }
    let text = result["content"][0]["text"].as_str().ok_or("no text")?;
    let Some(wanted) = call.result(passed_through) else {
        return if result["isError"] == true { Ok(()) } else { Err("a failure was reported as a success".to_owned()) };
    };
    if result["isError"] == true {
        return Err(format!("a failed call: {text}"));
    }
    if result["structuredContent"] != wanted {
        return Err("structured content that differs from the backend's answer".to_owned());
    }
    match serde_json::from_str::<Value>(text) {
        Ok(said) if said == wanted => Ok(()),
        _ => Err("text that differs from the backend's answer".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn answer(call: &Call) -> Value {
        let data = call.result(false);
        let text = data.as_ref().map_or_else(|| "{}".to_owned(), Value::to_string);
        let mut result = json!({ "content": [{ "type": "text", "text": text }], "isError": data.is_none() });
        if let Some(data) = data {
            result["structuredContent"] = data;
        }
        json!({ "jsonrpc": "2.0", "id": call.id, "result": result })
    }

    fn verdict(checker: &mut Checker, call: &Call, answer: &Value) -> Result<(), String> {
        checker.check(call, 200, answer.to_string().as_bytes())
    }

    #[test]
    fn right_answers_pass_and_wrong_ones_do_not() {
        for kind in [Kind::User, Kind::Users, Kind::NewTicket, Kind::Tickets, Kind::Rows(3), Kind::Failure(503)] {
            let call = |number| Call { kind, id: 1_000_000_000 + number, number };
            let mut checker = Checker::new(false);
            let right = answer(&call(7));
            assert_eq!(verdict(&mut checker, &call(7), &right), Ok(()), "{kind:?} as a whole");
            assert_eq!(
                (verdict(&mut checker, &call(7), &right), checker.compared),
                (Ok(()), 1),
                "{kind:?} at a glance"
            );
            for checker in [&mut checker, &mut Checker::new(false)] {
                assert!(verdict(checker, &call(8), &right).is_err(), "{kind:?} of another call");
                assert!(checker.check(&call(7), 503, right.to_string().as_bytes()).is_err(), "{kind:?} with a 503");
                let mut wrong = right.clone();
                wrong["result"]["isError"] = (wrong["result"]["isError"] == false).into();
                assert!(verdict(checker, &call(7), &wrong).is_err(), "{kind:?} with the opposite outcome");
                let mut wrong = right.clone();
                wrong["result"]["content"] = json!([]);
                assert!(verdict(checker, &call(7), &wrong).is_err(), "{kind:?} without text");
                let mut wrong = right.clone();
                wrong["result"]["structuredContent"]["id"] = "other".into();
                assert_eq!(
                    verdict(checker, &call(7), &wrong).is_ok(),
                    kind == Kind::Failure(503),
                    "{kind:?} with more"
                );
            }
        }
    }
}
