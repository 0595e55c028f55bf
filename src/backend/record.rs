//! Users and tickets as backends really send them: with what they have. One odd field costs neither the record nor its page.

use std::fmt::{self, Display};
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// Something that the backend keeps under an id.
pub(super) trait Record {
    /// What it is, with its article.
    const NAME: &'static str;
}

/// A record that is written as an object. serde would also take a list of the fields' values.
pub(super) struct Object<T>(pub(super) T);

impl<'de, T: Record + Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        struct Fields<T>(PhantomData<T>);
        impl<'de, T: Record + Deserialize<'de>> Visitor<'de> for Fields<T> {
            type Value = T;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(T::NAME)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map))
            }
        }
        input.deserialize_map(Fields(PhantomData)).map(Self)
    }
}

/// The items of a page. An error names the item.
pub(super) fn items<'de, D: Deserializer<'de>, T: Record + Deserialize<'de>>(input: D) -> Result<Vec<T>, D::Error> {
    struct Items<T>(PhantomData<T>);
    impl<'de, T: Record + Deserialize<'de>> Visitor<'de> for Items<T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
            let mut items = Vec::new();
            loop {
                match list.next_element::<Object<T>>() {
                    Ok(Some(Object(item))) => items.push(item),
                    Ok(None) => return Ok(items),
                    Err(error) => return Err(A::Error::custom(at(format_args!("items[{}]", items.len()), error))),
                }
            }
        }
    }
    input.deserialize_seq(Items(PhantomData))
}

/// An id: text, or an integer of any length as its digits.
pub(super) fn id<'de, D: Deserializer<'de>>(input: D) -> Result<String, D::Error> {
    let json = <&RawValue>::deserialize(input)?.get();
    let is_integer = json.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-');
    match json.as_bytes().first() {
        Some(b'"') => serde_json::from_str(json).map_err(D::Error::custom),
        _ if is_integer => Ok(json.to_owned()),
        Some(b'n') => Err(D::Error::missing_field("id")),
        _ => Err(D::Error::custom(".id is not a string or an integer")),
    }
}

/// A text, if there is one. A number, such as the seconds of a date, or a boolean is taken as it is written.
pub(super) fn text<'de, D: Deserializer<'de>>(input: D) -> Result<Option<String>, D::Error> {
    let json = <&RawValue>::deserialize(input)?.get();
    match json.as_bytes().first() {
        Some(b'"') => serde_json::from_str(json).map(Some).map_err(D::Error::custom),
        Some(b'n') => Ok(None),
        Some(b'{' | b'[') => Err(D::Error::custom("a text is an object or a list")),
        _ => Ok(Some(json.to_owned())),
    }
}

/// Drops what is beyond the limit, and tells whether there was any.
pub(super) fn cut<T>(items: &mut Vec<T>, limit: u32) -> bool {
    let sent = items.len();
    items.truncate(limit as usize);
    items.len() < sent
}

/// For fields that stand in a result only when they say something.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it")]
pub(super) fn is_false(value: &bool) -> bool {
    !value
}

/// An error with its place in the answer, without what serde quotes of the answer.
pub(super) fn at(place: impl Display, error: impl Display) -> String {
    let error = error.to_string();
    if let Some((_found, expected)) = error.rsplit_once(", expected ") {
        return format!("{place} is not {expected}");
    }
    if let Some((field, rest)) = error.strip_prefix("missing field `").and_then(|rest| rest.split_once('`')) {
        return format!("{place}.{field} is missing{rest}");
    }
    if error.starts_with('.') { format!("{place}{error}") } else { format!("{place}: {error}") }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::error::FormError;
    use super::super::{TicketPage, UserPage};

    /// The page as it is passed on, or what the log says of it.
    fn read<T: serde::de::DeserializeOwned + serde::Serialize>(page: &str) -> Result<Value, String> {
        let page: T = serde_json::from_str(page).map_err(|error| FormError::from(error).to_string())?;
        Ok(serde_json::to_value(page).unwrap())
    }

    #[test]
    fn an_item_is_read_with_what_it_has_and_what_is_none_is_named() {
        for (item, expected) in [
            (r#"{"id":"a"}"#, Ok(json!({ "id": "a" }))),
            (r#"{"id":7,"name":null,"email":null,"created_at":null}"#, Ok(json!({ "id": "7" }))),
            (r#"{"id":-7}"#, Ok(json!({ "id": "-7" }))),
            (r#"{"id":12345678901234567890123}"#, Ok(json!({ "id": "12345678901234567890123" }))),
            (
                r#"{"id":"\u0061","name":true,"created_at":1700000000.10}"#,
                Ok(json!({ "id": "a", "name": "true", "created_at": "1700000000.10" })),
            ),
            (r#"{"id":"a","created_at":"yesterday","more":[{}]}"#, Ok(json!({ "id": "a", "created_at": "yesterday" }))),
            ("{}", Err("items[1].id is missing at line 1")),
            (r#"{"id":null}"#, Err("items[1].id is missing")),
            (r#"{"id":1.5}"#, Err("items[1].id is not a string or an integer at line 1")),
            (r#"{"id":{"canary":1}}"#, Err("items[1].id is not a string or an integer at line 1")),
            (r#"{"id":"a","name":["canary"]}"#, Err("items[1]: a text is an object or a list at line 1")),
            ("null", Err("items[1] is not a user at line 1")),
            (r#""canary, expected canary""#, Err("items[1] is not a user at line 1")),
            (r#"["a","b","c","d"]"#, Err("items[1] is not a user at line 1")),
            (r#"{"id":"a""#, Err("items[1]: expected `,` or `}` at line 1")),
        ] {
            let read = read::<UserPage>(&format!(r#"{{"total":2,"items":[{{"id":"0"}},{item}]}}"#));
            match (read, expected) {
                (Ok(page), Ok(expected)) => assert_eq!(page, json!({ "total": 2, "items": [{ "id": "0" }, expected] })),
                (Err(told), Err(expected)) => {
                    assert!(told.starts_with(expected) && !told.contains("canary"), "{told} instead of {expected}");
                }
                (read, expected) => panic!("{item}: {read:?} instead of {expected:?}"),
            }
        }
    }

    #[test]
    fn a_ticket_may_stand_in_any_way_and_be_as_urgent_as_any_word() {
        let ticket = json!({ "id": "T", "status": "on_hold", "priority": "P1", "assignee_id": 7 });
        let page = json!({ "total": 1, "truncated": true, "items": [ticket] });
        let expected = json!({ "id": "T", "status": "on_hold", "priority": "P1", "assignee_id": "7" });
        assert_eq!(read::<TicketPage>(&page.to_string()), Ok(json!({ "total": 1, "items": [expected] })));
        let none = read::<TicketPage>(r#"{"total":1,"items":[7]}"#);
        assert!(none.unwrap_err().starts_with("items[0] is not a ticket"));
    }
}
