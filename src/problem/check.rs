//! What every error object owes its reader, whatever made it: for properties and fuzz targets.
#![allow(clippy::panic, reason = "a check fails by panicking")]

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;

const DETAILS: [&str; 13] = [
    "status_code",
    "path",
    "fields",
    "timeout_seconds",
    "outcome",
    "idempotency_key",
    "aadsts",
    "credential",
    "correlation_id",
    "retryable",
    "retry_after_seconds",
    "cause",
    "trace_id",
];

/// Holds an error object to contract §5: one line of JSON, every key once and in order, a message that says something.
#[track_caller]
pub(crate) fn assert_well_formed(json: &str) {
    assert!(!json.chars().any(|character| character < ' '), "not one line: {json:?}");
    let whole: Entries = serde_json::from_str(json).unwrap_or_else(|error| panic!("{error}: {json}"));
    assert_eq!(whole.keys(), ["error", "message", "details"], "{json}");
    let code = whole.text("error");
    let codes = ["VALIDATION_ERROR", "SERVICE_ERROR", "AUTHENTICATION_ERROR", "TIMEOUT_ERROR", "INTERNAL_ERROR"];
    assert!(codes.contains(&code), "{json}");
    assert!(whole.text("message").chars().any(char::is_alphanumeric), "{json}");
    assert!(!whole.text("message").chars().any(char::is_control), "{json}");

    let details = serde_json::from_str::<Parts>(json).unwrap_or_else(|error| panic!("{error}: {json}")).details;
    let mut places = details.keys().into_iter().map(|key| DETAILS.iter().position(|known| *known == key));
    let mut last = None;
    assert!(places.all(|place| place.is_some() && std::mem::replace(&mut last, place) < place), "{json}");
    assert!(details.value("retryable").is_some_and(Value::is_boolean), "{json}");
    if details.value("outcome").is_some() {
        assert!(["unknown", "created"].contains(&details.text("outcome")), "{json}");
        assert_eq!(details.value("retryable"), Some(&Value::Bool(false)), "it may be there twice: {json}");
    }
    if let Some(wait) = details.value("retry_after_seconds") {
        assert!(wait.is_u64(), "{json}");
    }
}

#[derive(serde::Deserialize)]
struct Parts {
    details: Entries,
}

/// An object with its keys as they stand, repeated ones included.
struct Entries(Vec<(String, Value)>);

impl Entries {
    fn keys(&self) -> Vec<&str> {
        self.0.iter().map(|(key, _)| key.as_str()).collect()
    }

    fn value(&self, key: &str) -> Option<&Value> {
        self.0.iter().find(|(known, _)| known == key).map(|(_, value)| value)
    }

    fn text(&self, key: &str) -> &str {
        self.value(key).and_then(Value::as_str).unwrap_or_default()
    }
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}
