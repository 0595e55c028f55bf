//! What the backend answers, as pure functions of what it is asked: the backend sends these bytes, and the generator builds them
//! again to check what came through a candidate. They keep to `api/backend.openapi.yaml`.
//!
//! Numbers below 10^9 have a fixed width, so that two right answers to the same kind of call have the same length.

use std::fmt::Write as _;

use serde_json::json;

const CREATED_AT: &str = "2026-03-04T05:06:07Z";
const UPDATED_AT: &str = "2026-04-05T06:07:08Z";
const DESCRIPTION: &str = "The printer on the fourth floor answers every job with a blank page.";
const DETAILS: &str = r#"{"department":"Engineering","title":"Site Reliability Engineer","phone":"+1-555-0100","location":"Rotterdam","manager_id":"u000000007","floor":4,"remote":true,"groups":["eng","oncall","platform"]}"#;

/// The id of a user.
pub fn user_id(number: u64) -> String {
    format!("u{number:09}")
}

/// A user; `details` only where one alone is asked for.
pub fn user(id: &str, details: bool) -> String {
    let more = if details { format!(r#","details":{DETAILS}"#) } else { String::new() };
    format!(r#"{{"id":"{id}","name":"User {id}","email":"{id}@example.com","created_at":"{CREATED_AT}"{more}}}"#)
}

/// The first users of many.
pub fn users(limit: u64) -> String {
    page(100_000, (0..limit).map(|number| user(&user_id(number), false)))
}

/// The first tickets of many, all in one state.
pub fn tickets(status: &str, limit: u64) -> String {
    let priorities = ["low", "medium", "high", "critical"];
    let ticket = |number: u64| {
        let assignee = (!number.is_multiple_of(3)).then(|| user_id(number));
        let (id, title) = (format!("t{number:09}"), format!("Ticket number {number:09}"));
        let priority = priorities.iter().cycle().nth(number as usize % 4).unwrap_or(&"low");
        ticket(&id, &title, DESCRIPTION, priority, status, assignee.as_deref())
    };
    page(5_000, (0..limit).map(ticket))
}

/// The ticket that a `POST /tickets` makes; its id comes from the title.
pub fn created_ticket(title: &str, description: &str, priority: &str, assignee_id: Option<&str>) -> String {
    let fnv = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let hash = title.bytes().fold(0xcbf2_9ce4_8422_2325, fnv);
    ticket(&format!("t{:09}", hash % 1_000_000_000), title, description, priority, "open", assignee_id)
}

fn ticket(id: &str, title: &str, description: &str, priority: &str, status: &str, assignee_id: Option<&str>) -> String {
    let (title, description) = (json!(title), json!(description));
    let assignee = assignee_id.map_or_else(String::new, |id| format!(r#","assignee_id":{}"#, json!(id)));
    format!(
        r#"{{"id":"{id}","title":{title},"description":{description},"priority":"{priority}","status":"{status}","created_at":"{CREATED_AT}","updated_at":"{UPDATED_AT}"{assignee}}}"#
    )
}

fn page(total: u64, items: impl Iterator<Item = String>) -> String {
    format!(r#"{{"total":{total},"items":[{}]}}"#, items.collect::<Vec<_>>().join(","))
}

/// The rows of a dataset, each 1 KiB with its comma.
pub fn rows(limit: u64) -> String {
    format!(r#"{{"data":[{}]}}"#, (0..limit).map(row).collect::<Vec<_>>().join(","))
}

fn row(number: u64) -> String {
    let (active, small) = (number.is_multiple_of(2), 100 + number % 900);
    let mut row = format!(
        r#"{{"id":{},"sku":"SKU-{number:09}","region":"eu-west-{}","active":{active},"price":{small}.25,"quantity":{},"ratio":0.{small},"parent":null,"tags":["alpha","beta","gamma"],"address":{{"street":"Coolsingel {small}","city":"Rotterdam","zip":"3011 AD","country":"NL"}},"metrics":{{"p50":{small},"p90":{small},"p99":{small},"samples":[1,2,3,5,8,13,21,34]}}"#,
        1_000_000 + number,
        1 + number % 3,
        1_000 + number % 9_000,
    );
    for field in 0..6 {
        let _ = write!(row, r#","field_{field}":"Lorem ipsum dolor sit amet {number:09}, consectetur""#);
    }
    row.push_str(r#","note":""#);
    let padding = 1_021_usize.saturating_sub(row.len());
    row.extend(std::iter::repeat_n('x', padding));
    row + r#""}"#
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn everything_is_json_of_the_size_that_was_asked_for() {
        let parse =
            |json: String| serde_json::from_str::<Value>(&json).unwrap_or_else(|error| panic!("{error}: {json}"));
        assert_eq!(parse(user("u000000001", true))["details"]["floor"], 4);
        assert_eq!(parse(users(10))["items"].as_array().map(Vec::len), Some(10));
        assert_eq!(parse(tickets("open", 7))["items"][6]["status"], "open");
        assert_eq!(parse(created_ticket("a \"b\" \\", "c", "low", None))["title"], "a \"b\" \\");
        for limit in [1, 10, 100, 1_000] {
            let (answer, wanted) = (rows(limit), limit as usize * 1_024);
            assert!(answer.len().abs_diff(wanted) <= 16, "{} for {wanted}", answer.len());
            assert_eq!(parse(answer)["data"].as_array().map(Vec::len), Some(limit as usize));
        }
    }

    #[test]
    fn right_answers_to_the_same_kind_of_call_have_the_same_length() {
        assert_eq!(user(&user_id(1), true).len(), user(&user_id(999_999), true).len());
        assert_eq!(row(0).len(), row(999).len());
    }
}
