//! What the backend itself says about an error: the text of its body, for the log.
//!
//! It is the backend's text. It may quote what callers sent and users wrote, so no caller gets it, and what is logged of it is short,
//! on one line, and without characters that nobody sees.

use std::fmt::{self, Write as _};

use serde::Deserializer as _;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

use crate::visible::is_invisible;

/// At most so many bytes of a body are kept to look at.
pub(super) const KEPT_BYTES: usize = 8 * 1024;

/// At most so many characters of its text are logged.
const LONGEST: usize = 500;

/// The members that describe an error: those of RFC 9457, and those that other frameworks use.
const MEMBERS: [&str; 6] = ["title", "detail", "message", "error", "error_description", "errors"];

/// How long a token is at least; it begins with `eyJ`, which is `{"` in Base64.
const SHORTEST_TOKEN: usize = 20;

/// Whether the answer has a body that may describe its error.
pub(super) fn is_described(headers: &http::HeaderMap) -> bool {
    let media_type = headers.get(http::header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let media_type = media_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    media_type == "application/json" || (media_type.starts_with("application/") && media_type.ends_with("+json"))
}

/// What the beginning of a JSON body says about its error.
pub(super) fn of(body: &[u8]) -> Option<Box<str>> {
    let mut members = [const { None }; MEMBERS.len()];
    // What stands before the place where the body breaks off is there all the same.
    let _broken_off = serde_json::Deserializer::from_slice(body).deserialize_map(Members(&mut members));
    let mut text = String::new();
    for (name, member) in MEMBERS.iter().zip(members) {
        let separator = if text.is_empty() { "" } else { "; " };
        let _ = match member {
            None | Some(Value::Null) => Ok(()),
            Some(Value::String(member)) => write!(text, "{separator}{member}"),
            Some(member) => write!(text, "{separator}{name}: {member}"),
        };
    }
    Some(shown(&text, LONGEST)).filter(|text| !text.is_empty())
}

/// A text of the backend's as a log or a terminal may show it: on one line, at most so long, nothing hidden, no token.
pub(super) fn shown(text: &str, longest: usize) -> Box<str> {
    let text = without_tokens(text.trim());
    let mut shown = String::new();
    let mut length = 0;
    for character in text.chars() {
        let before = shown.len();
        if character.is_control() || matches!(character, '\u{2028}' | '\u{2029}') || is_invisible(character) {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
        // An escape is longer than what it stands for.
        length += shown.get(before..).map_or(0, |added| added.chars().count());
        if length > longest {
            shown.truncate(before);
            shown.push('…');
            break;
        }
    }
    shown.into()
}

fn without_tokens(text: &str) -> String {
    let mut kept = String::new();
    let mut rest = text;
    while let Some((before, token)) = rest.find("eyJ").and_then(|at| rest.split_at_checked(at)) {
        let is_part = |character: char| character.is_ascii_alphanumeric() || matches!(character, '-' | '_' | '.' | '=');
        let end = token.find(|character| !is_part(character)).unwrap_or(token.len());
        let (token, after) = token.split_at_checked(end).unwrap_or((token, ""));
        kept.push_str(before);
        kept.push_str(if end < SHORTEST_TOKEN { token } else { "[token]" });
        rest = after;
    }
    kept.push_str(rest);
    kept
}

/// Puts the members of an object into their places, the first of each name.
struct Members<'a>(&'a mut [Option<Value>; MEMBERS.len()]);

impl<'de> Visitor<'de> for Members<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<String>()? {
            let place = MEMBERS.iter().position(|member| name.eq_ignore_ascii_case(member));
            match place.and_then(|place| self.0.get_mut(place)).filter(|member| member.is_none()) {
                Some(member) => *member = Some(map.next_value()?),
                None => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_members_that_describe_an_error_are_found_also_where_the_body_breaks_off() {
        for (body, expected) in [
            (r#"{"type":"about:blank","title":"Bad","status":422,"detail":"no such team"}"#, Some("Bad; no such team")),
            (r#"{"detail":"b","title":"a","detail":"c"}"#, Some("a; b")),
            (r#"{"Message":"An error has occurred."}"#, Some("An error has occurred.")),
            (r#"{"errors":{"title":["too long"]}}"#, Some(r#"errors: {"title":["too long"]}"#)),
            (r#"{"error":{"code":"Busy","message":"later"}}"#, Some(r#"error: {"code":"Busy","message":"later"}"#)),
            (r#"{"error":"invalid_token","error_description":"expired"}"#, Some("invalid_token; expired")),
            (r#"{"title":"Bad","detail":null,"errors":[{"field":"ti"#, Some("Bad")),
            (r#"{"status":422,"row":{"detail":"no"}}"#, None),
            (r#"{"detail":" "}"#, None),
            (r#"["detail"]"#, None),
            ("<html>", None),
            ("", None),
        ] {
            assert_eq!(of(body.as_bytes()).as_deref(), expected, "{body}");
        }
        assert_eq!(of(b"\xff{\"detail\":\"x\"}"), None);
    }

    #[test]
    fn a_text_is_shown_on_one_line_with_nothing_hidden_and_no_token() {
        let token = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJjYW5hcnkifQ.c2lnbmF0dXJl";
        for (text, expected) in [
            ("two\nlines\tand \u{1b}[31mred", "two\\nlines\\tand \\u{1b}[31mred".to_owned()),
            ("a\u{202e}b\u{200b}c\u{e0041}", "a\\u{202e}b\\u{200b}c\\u{e0041}".to_owned()),
            ("a\u{34f}b\u{3164}c\u{e01f0}", "a\\u{34f}b\\u{3164}c\\u{e01f0}".to_owned()),
            ("Ärger mit 日本", "Ärger mit 日本".to_owned()),
            (&format!("the token {token}, again {token}"), "the token [token], again [token]".to_owned()),
            ("heyJude", "heyJude".to_owned()),
        ] {
            assert_eq!(&*shown(text, 100), expected);
        }
        for text in ["x".repeat(501), "ü".repeat(501), "\u{202e}".repeat(501)] {
            let shown = shown(&text, LONGEST);
            assert!(shown.chars().count() <= LONGEST + 1 && shown.ends_with('…'), "{shown}");
        }
        assert_eq!(shown(&"x".repeat(500), LONGEST).len(), 500);
    }

    #[test]
    fn only_json_is_looked_at() {
        for (media_type, expected) in [
            ("application/json", true),
            ("Application/Problem+JSON; charset=utf-8", true),
            ("text/html", false),
            ("application/octet-stream", false),
            ("", false),
        ] {
            let value = http::HeaderValue::from_static(media_type);
            let headers = http::HeaderMap::from_iter([(http::header::CONTENT_TYPE, value)]);
            assert_eq!(is_described(&headers), expected, "{media_type}");
        }
    }
}
