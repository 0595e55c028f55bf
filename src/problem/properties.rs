//! The error object, whatever it is made of.

use proptest::collection::btree_map;
use proptest::option;
use proptest::prelude::*;
use serde_json::Value;

use super::check::assert_well_formed;
use super::*;
use crate::telemetry::trace::TraceContext;

fn error_code() -> impl Strategy<Value = ErrorCode> {
    prop_oneof![
        Just(ErrorCode::ValidationError),
        Just(ErrorCode::ServiceError),
        Just(ErrorCode::AuthenticationError),
        Just(ErrorCode::TimeoutError),
        Just(ErrorCode::InternalError),
    ]
}

fn details() -> impl Strategy<Value = Details> {
    let numbers = (
        option::of(any::<u16>()),
        option::of(0.0..1e9),
        option::of(any::<u32>()),
        option::of(prop_oneof![9 => any::<Duration>(), 1 => Just(Duration::MAX)]),
    );
    let texts = (option::of(any::<String>()), option::of(any::<String>()), option::of(any::<String>()));
    let fields = btree_map(".{0,8}", any::<String>(), 0..4);
    (numbers, texts, fields, any::<bool>(), any::<bool>()).prop_map(|(numbers, texts, fields, retryable, traced)| {
        Details {
            status_code: numbers.0,
            timeout_seconds: numbers.1,
            aadsts: numbers.2,
            retry_after_seconds: numbers.3,
            path: texts.0,
            idempotency_key: texts.1,
            cause: texts.2,
            fields,
            retryable,
            trace_id: traced.then(|| TraceContext::begin().trace_id()),
            ..Details::default()
        }
    })
}

proptest! {
    #[test]
    fn an_error_object_is_json_in_the_contract_order_whatever_it_says(
        error in error_code(), message in "[a-zA-Z`. ü\u{2028}🦀]{1,40}x", details in details()
    ) {
        let wait = details.retry_after_seconds;
        let fields = details.fields.clone();
        let problem = Problem { error, message, details: Box::new(details) };
        let json = problem.to_json();
        assert_well_formed(&json);
        let read: Value = serde_json::from_str(&json).unwrap();
        prop_assert_eq!(read["error"].as_str(), Some(error.as_str()));
        prop_assert_eq!(read["message"].as_str(), Some(&*problem.message));
        if let Some(wait) = wait {
            let told = read["details"]["retry_after_seconds"].as_u64().unwrap();
            prop_assert!(told >= wait.as_secs() && (told == u64::MAX || Duration::from_secs(told) >= wait), "nobody comes too early");
        }
        prop_assert_eq!(read["details"]["fields"].as_object().map_or(0, serde_json::Map::len), fields.len());
        for (field, wrong) in fields.iter().filter(|(field, _)| visible::text(field) == field.as_str()) {
            prop_assert_eq!(read["details"]["fields"][field].as_str(), Some(&*visible::text(wrong)));
        }
    }
}
