//! Answers in Entra's place, whatever they are.

use std::fmt::Write as _;

use http::HeaderValue;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::identity::source::BearerToken;

/// Bytes that are an answer, nearly one, or none.
fn body() -> impl Strategy<Value = Vec<u8>> {
    let value = prop_oneof![
        Just(Value::Null),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<bool>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        "[!-~]{1,40}".prop_map(Value::from),
        "(Bearer|bearer|pop|3599|0|-1|99999999|1e3)".prop_map(Value::from),
        "AADSTS(0|[0-9]{0,12})(:|\r\n|\u{1b}| )?.{0,8}".prop_map(Value::from),
        (0u64..200_000).prop_map(Value::from),
        vec(any::<i64>(), 0..12).prop_map(Value::from),
        vec(any::<String>(), 0..2).prop_map(Value::from),
        "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-8[0-9a-f]{3}-[0-9a-f]{12}".prop_map(Value::from),
        "2026-[0-9]{2}-[0-9]{2} [0-9:]{8}Z".prop_map(Value::from),
    ];
    const NAMES: [&str; 11] = [
        "access_token",
        "token_type",
        "expires_in",
        "error",
        "suberror",
        "error_codes",
        "error_description",
        "trace_id",
        "correlation_id",
        "timestamp",
        "more",
    ];
    let object = vec((proptest::sample::select(&NAMES[..]), value), 0..9)
        .prop_map(|fields| Value::Object(fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()));
    prop_oneof![
        6 => object.prop_map(|object| object.to_string().into_bytes()),
        1 => ("[!-~]{1,40}", 0u64..200_000).prop_map(|(token, life)| json!({"access_token": token, "expires_in": life}).to_string().into_bytes()),
        1 => vec(any::<u8>(), 0..60),
    ]
}

fn retry_headers() -> impl Strategy<Value = HeaderMap> {
    let name = proptest::sample::select(&["retry-after", "x-ms-retry-after-ms", "retry-after-ms"][..]);
    let value = prop_oneof![
        vec(any::<u8>(), 0..30),
        "[0-9 -]{0,24}".prop_map(String::into_bytes),
        "Sun, [0-3][0-9] Nov (2026|1970|9999) 1[0-9]:00:00 GMT".prop_map(String::into_bytes),
    ];
    vec((name, value), 0..3).prop_map(|headers| {
        let value = |bytes: Vec<u8>| HeaderValue::from_bytes(&bytes).ok();
        HeaderMap::from_iter(
            headers.into_iter().filter_map(|(name, bytes)| Some((name.parse().unwrap(), value(bytes)?))),
        )
    })
}

proptest! {
    #[test]
    fn any_error_answer_is_read_and_says_nothing_that_breaks_a_line(
        status in 100u16..=999, headers in retry_headers(), body in body()
    ) {
        let status = StatusCode::from_u16(status).unwrap();
        let error = error_answer("client secret", status, &headers, &body);
        prop_assert_eq!(error.status(), Some(status));
        prop_assert_eq!(error.class(), FaultClass::Http);
        let mut said = format!("{error} {}", error.hint());
        for text in [error.detail(), error.trace_id(), error.correlation_id(), error.timestamp(), error.oauth_error(), error.suberror.as_deref()] {
            let _ = write!(said, " {}", text.unwrap_or_default());
            prop_assert!(text.is_none_or(|text| text.chars().count() <= MAX_DESCRIPTION));
        }
        prop_assert!(!said.contains(char::is_control), "{:?}", said);
        prop_assert!(error.codes.len() <= 8 && !error.codes.contains(&0), "{:?}", error.codes);
        prop_assert!(error.detail().is_some_and(|detail| !detail.is_empty()));
        for word in [error.oauth_error(), error.suberror.as_deref()].into_iter().flatten() {
            prop_assert!(is_word(word));
        }
        for id in [error.trace_id(), error.correlation_id()].into_iter().flatten() {
            prop_assert!(uuid::Uuid::try_parse(id).is_ok());
        }
        prop_assert!(!error.hint().is_empty());
    }

    #[test]
    fn a_checked_token_is_one_that_a_header_carries_and_the_sdk_can_read(body in body()) {
        let Ok(checked) = checked_token(&body) else { return Ok(()) };
        let checked: Value = serde_json::from_slice(&checked).unwrap();
        let (token, life) = (checked["access_token"].as_str().unwrap(), checked["expires_in"].as_u64().unwrap());
        prop_assert!((1..=MAX_LIFE).contains(&life));
        prop_assert_eq!(checked["token_type"].as_str(), Some("Bearer"));
        prop_assert!(!token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic()));
        let token = BearerToken::new(token, Instant::now(), Duration::from_secs(life));
        prop_assert!(token.is_some_and(|token| token.authorization().is_sensitive()));
    }

    #[test]
    fn foreign_text_becomes_one_bounded_line(text in any::<String>(), times in 1usize..400) {
        let cleaned = clean(&text.repeat(times));
        prop_assert!(!cleaned.contains(char::is_control));
        prop_assert!(cleaned.chars().count() <= MAX_DESCRIPTION);
        prop_assert_eq!(clean(&cleaned), cleaned);
    }
}
