//! Arguments and error objects, whatever a model or a backend comes up with.

use std::collections::BTreeSet;
use std::time::Duration;

use jsonschema::Validator;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Map, json};

use super::*;
use crate::backend::properties::json as any_json;
use crate::backend::{BackendError, Failure, FormError, IdentityError, Route};
use crate::identity::simulated;
use crate::problem::check::assert_well_formed;

/// A tool with an independent judge of its arguments, for all of them and for each alone.
struct Judged {
    entry: &'static Entry,
    whole: Validator,
    alone: Vec<(String, Validator)>,
    fields: Vec<(String, Value)>,
    required: Vec<String>,
    decodes: fn(&Entry, JsonObject) -> Result<(), Problem>,
}

fn judged<T: Tool>() -> Judged {
    let entry = find(T::NAME).unwrap();
    let schema = Value::Object((*entry.definition.input_schema).clone());
    let fields: Vec<_> = schema["properties"].as_object().unwrap().clone().into_iter().collect();
    let names = schema["required"].as_array().into_iter().flatten();
    Judged {
        entry,
        whole: jsonschema::draft202012::new(&schema).unwrap(),
        alone: fields.iter().map(|(name, rule)| (name.clone(), jsonschema::draft202012::new(rule).unwrap())).collect(),
        required: names.map(|name| name.as_str().unwrap().to_owned()).collect(),
        fields,
        decodes: |entry, arguments| args::decode::<T>(&entry.rules, arguments).map(drop),
    }
}

impl std::fmt::Debug for Judged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.entry.definition.name)
    }
}

static JUDGED: LazyLock<[Judged; 5]> = LazyLock::new(|| {
    [
        judged::<tickets::CreateTicket>(),
        judged::<users::GetUserProfile>(),
        judged::<tickets::ListTickets>(),
        judged::<users::ListUsers>(),
        judged::<data::QueryData>(),
    ]
});

/// Any value, small.
fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
        Just(json!([])),
        Just(json!(["low", 1])),
        vec((".{0,4}", any::<u16>().prop_map(Value::from)), 0..3)
            .prop_map(|entries| Value::Object(entries.into_iter().collect())),
    ]
}

/// Values at the edges of what a rule of a schema accepts, on both sides, and others.
fn near(rule: &Value) -> BoxedStrategy<Value> {
    let number = |key: &str| rule.get(key).and_then(Value::as_u64);
    let own = match (rule["type"].as_str().unwrap(), rule.get("enum")) {
        ("string", Some(choices)) => {
            let mut choices: Vec<Value> = choices.as_array().unwrap().clone();
            let shouted: Vec<_> =
                choices.iter().map(|choice| Value::from(choice.as_str().unwrap().to_uppercase())).collect();
            choices.extend(shouted);
            choices.extend([json!(""), json!("low "), json!("inprogress")]);
            select(choices).boxed()
        }
        ("string", None) => {
            let (min, max) = (number("minLength").unwrap_or(0) as usize, number("maxLength").unwrap_or(64) as usize);
            let lengths = vec![min.saturating_sub(1), min, min + 1, max - 1, max, max + 1];
            let long =
                (select(lengths), select(vec!["a", "ü", "🦀"])).prop_map(|(length, of)| Value::from(of.repeat(length)));
            let odd =
                "(a|b|/|\\\\|\\?|#|%|\\.|\\.\\.|;|\u{0}|\u{1f}|\u{7f}|\u{85}|\u{9f}|\u{a0}|\u{2028}|ü|\n| ){0,14}";
            prop_oneof![2 => long, 2 => odd.prop_map(Value::from), 1 => any::<String>().prop_map(Value::from), 3 => "[a-z0-9]{10,20}".prop_map(Value::from), 1 => any::<i64>().prop_map(Value::from)].boxed()
        }
        ("integer", _) => {
            let (min, max) = (number("minimum").unwrap_or(0), number("maximum").unwrap_or(args::MAX_SAFE_INTEGER));
            let edges = vec![
                json!(min),
                json!(max),
                json!(max + 1),
                json!(min as i64 - 1),
                json!(min as f64),
                json!(max as f64),
                json!(max as f64 + 2.0),
                json!(min as f64 - 0.5),
                json!(-0.0),
                json!(1.5),
                json!(1e30),
                json!(-1e30),
                json!(1e-300),
                json!(u64::MAX),
                json!(i64::MIN),
                json!(9_007_199_254_740_993_u64),
                json!(1.8446744073709552e19),
            ];
            let texts = prop_oneof![
                any::<i64>().prop_map(|number| number.to_string()),
                (0u64..1_100).prop_map(|number| number.to_string()),
                "[-+ ]?0?[0-9]{1,3}(\\.0)?(e1)?",
            ];
            prop_oneof![
                select(edges),
                (min..=max).prop_map(Value::from),
                (0u64..200).prop_map(Value::from),
                texts.prop_map(Value::from),
            ]
            .boxed()
        }
        ("boolean", _) => {
            prop_oneof![any::<bool>().prop_map(Value::from), "([tT]rue|FALSE|fals|1|yes|)".prop_map(Value::from)]
                .boxed()
        }
        _ => {
            let object = vec((".{0,6}", any_value()), 0..4)
                .prop_map(|entries| Value::Object(entries.into_iter().collect()))
                .boxed();
            let texts = prop_oneof![object.clone(), any_value()].prop_map(|value| value.to_string().into());
            prop_oneof![2 => object, 1 => texts].boxed()
        }
    };
    prop_oneof![4 => own, 1 => any_value()].boxed()
}

/// A tool, and arguments derived from its schema: some absent, some unknown, most nearly right.
fn arguments() -> impl Strategy<Value = (&'static Judged, JsonObject)> {
    (0..JUDGED.len()).prop_flat_map(|tool| {
        let judged = &JUDGED[tool];
        let known: Vec<_> = judged
            .fields
            .iter()
            .map(|(name, rule)| (Just(name.clone()), proptest::option::weighted(0.8, near(rule))))
            .collect();
        let names: Vec<_> = judged.fields.iter().map(|(name, _)| name.clone()).collect();
        let unknown = prop_oneof![
            3 => Just(Vec::new()),
            1 => vec((prop_oneof![
                ".{0,8}".boxed(),
                (select(names), select(vec!["\u{0}", " ", "\n", "x"])).prop_map(|(name, more)| format!("{name}{more}")).boxed(),
                (60usize..70).prop_map(|length| "u".repeat(length)).boxed(),
            ], any_value()), 1..12),
        ];
        (known, unknown).prop_map(move |(known, unknown)| {
            let known = known.into_iter().filter_map(|(name, value)| Some((name, value?)));
            (judged, Map::from_iter(unknown.into_iter().chain(known)))
        })
    })
}

/// What is refused beyond the schema, and what is let through beyond it: `.` and `..` as path segments, also with parameters; `null` for absent, and values in
/// the form of another type that can mean one thing only.
fn as_the_schema_sees_it(judged: &Judged, arguments: &JsonObject) -> JsonObject {
    let mut arguments = arguments.clone();
    arguments.retain(|name, value| {
        let known = judged.fields.iter().any(|(known, _)| known == name);
        !(value.is_null() && known && !judged.required.contains(name))
    });
    for (name, rule) in &judged.fields {
        let Some(value) = arguments.get_mut(name) else { continue };
        let meant = match (rule["type"].as_str().unwrap(), &*value) {
            ("integer", Value::String(text)) => {
                let number = text.parse::<i128>().ok().filter(|number| number.to_string() == *text);
                number.and_then(|number| {
                    u64::try_from(number).map(Value::from).or_else(|_| i64::try_from(number).map(Value::from)).ok()
                })
            }
            ("boolean", Value::String(text)) => text.to_lowercase().parse::<bool>().ok().map(Value::from),
            ("object", Value::String(text)) => serde_json::from_str(text).ok().filter(Value::is_object),
            ("string", Value::Number(number)) if rule.get("pattern").is_some() && !number.is_f64() => {
                Some(number.to_string().into())
            }
            _ => None,
        };
        if let Some(meant) = meant {
            *value = meant;
        }
    }
    for (name, rule) in &judged.fields {
        if let Some(value) = arguments.get_mut(name)
            && rule.get("pattern").is_some()
            && value.as_str().is_some_and(is_step)
        {
            *value = json!("a/b");
        }
    }
    arguments
}

/// Whether a server that drops path parameters is left with a dot segment, or with nothing.
fn is_step(segment: &str) -> bool {
    let name = segment.split(';').next().unwrap_or_default();
    !segment.is_empty() && matches!(name, "" | "." | "..")
}

fn failure() -> impl Strategy<Value = (&'static str, u16, Option<Duration>)> {
    let kinds = vec![
        "identity",
        "unauthorized",
        "status",
        "unreachable",
        "interrupted",
        "unreadable",
        "encoded",
        "too large",
        "timeout",
        "busy",
        "open",
        "unhealthy",
    ];
    let wait = prop_oneof![any::<Duration>(), (0u64..100_000).prop_map(Duration::from_millis)];
    (prop_oneof![1 => select(kinds), 1 => Just("status")], 100u16..=999, proptest::option::of(wait))
}

fn make(kind: &str, status: u16, wait: Option<Duration>) -> Failure {
    thread_local! {
        static BROKEN: reqwest::Client = reqwest::Client::builder().no_proxy().build().unwrap();
    }
    let broken = || BROKEN.with(|client| client.get("no address").build().unwrap_err());
    let code = http::StatusCode::from_u16(status).unwrap();
    match kind {
        "identity" => {
            let error: IdentityError = simulated::refusal(status, vec![u32::from(status), 7_000_215], wait);
            Failure::Identity(Arc::new(error))
        }
        "unauthorized" => Failure::Unauthorized,
        "status" => Failure::Status { status: code, retry_after: wait },
        "unreachable" => Failure::Unreachable(broken()),
        "interrupted" => Failure::Interrupted(broken()),
        "unreadable" => Failure::Unreadable(FormError::from(serde_json::from_str::<u8>("\"x\"").unwrap_err())),
        "encoded" => Failure::Encoded("gzip".into()),
        "too large" => Failure::TooLarge(status.into()),
        "timeout" => Failure::Timeout(wait.unwrap_or_default()),
        "busy" => Failure::Busy,
        "open" => Failure::CircuitOpen(wait.unwrap_or_default()),
        _ => Failure::Unhealthy("UP".into()),
    }
}

/// An object of any JSON, its keys in the order in which a tree has them.
fn any_object() -> impl Strategy<Value = Value> {
    vec((any::<String>(), any_json()), 0..4).prop_map(|entries| Value::Object(entries.into_iter().collect()))
}

proptest! {
    #[test]
    fn a_response_is_written_as_rmcp_writes_it(
        object in any_object(), fails in any::<bool>(), number in any::<i64>(), name in proptest::option::of(any::<String>()),
        is_modern in any::<bool>(),
    ) {
        use rmcp::model::{RequestId, ServerJsonRpcMessage, ServerResult};

        let id = name.map_or(RequestId::Number(number), |name| RequestId::String(name.into()));
        let ended = || match fails {
            true => Err(Problem::new(crate::problem::ErrorCode::ServiceError, object.to_string())),
            false => Ok(object.to_string().into()),
        };
        let meta = object.as_object().cloned().map(MetaObject::from).filter(|_| is_modern);
        let written = plain::response(&id, ended(), meta.as_ref().map(|_| object.to_string()).as_deref());
        let mut by_rmcp = ServerResult::CallToolResult(result(ended(), meta));
        if !is_modern {
            by_rmcp.strip_result_type_for_legacy_peer();
        }
        let by_rmcp = serde_json::to_string(&ServerJsonRpcMessage::response(by_rmcp, id)).unwrap();
        prop_assert_eq!(String::from_utf8(written.into_vec()).unwrap(), by_rmcp);
    }

    #[test]
    fn the_check_accepts_exactly_what_the_published_schema_accepts((judged, arguments) in arguments()) {
        let accepted = judged.entry.rules.check(&mut arguments.clone()).is_empty();
        let legal = judged.whole.is_valid(&Value::Object(as_the_schema_sees_it(judged, &arguments)));
        prop_assert_eq!(accepted, legal, "{}: {:?}", judged.entry.definition.name, arguments);
        match (judged.decodes)(judged.entry, arguments) {
            Ok(()) => prop_assert!(accepted),
            Err(problem) => {
                assert_well_formed(&problem.to_json());
                prop_assert!(!accepted && !problem.details.fields.is_empty(), "the check and the decoder disagree");
                prop_assert!(problem.to_json().len() < 8_192, "the answer must not grow with the mistake");
            }
        }
    }

    #[test]
    fn every_mistake_is_reported_under_the_name_that_the_caller_used((judged, arguments) in arguments()) {
        let seen = as_the_schema_sees_it(judged, &arguments);
        let mut wrong = BTreeSet::new();
        for (name, rule) in &judged.alone {
            let bad = match seen.get(name) {
                Some(value) => !rule.is_valid(value),
                None => judged.required.contains(name),
            };
            if bad {
                wrong.insert(name.clone());
            }
        }
        let unknown: Vec<_> = arguments.keys().filter(|name| judged.fields.iter().all(|(known, _)| known != *name)).collect();
        let told = judged.entry.rules.check(&mut arguments.clone());
        for name in &wrong {
            prop_assert!(told.contains_key(name), "`{}` is wrong and not told: {:?}", name, told);
            prop_assert!(!told[name].contains("is not an argument"), "{:?}", told);
        }
        let others: Vec<_> = told.keys().filter(|name| !wrong.contains(*name)).collect();
        prop_assert!(others.iter().all(|name| told[*name].contains("is not an argument")), "{:?}", told);
        prop_assert!(others.is_empty() == unknown.is_empty() && others.len() <= unknown.len().min(8), "{:?} of {:?}", others, unknown);
        for (name, what) in &told {
            prop_assert!(!name.chars().chain(what.chars()).any(char::is_control), "{:?}: {:?}", name, what);
        }
    }

    #[test]
    fn every_failure_becomes_a_well_formed_error_object(
        (kind, status, wait) in failure(), write: bool, unknown: bool, applied: bool, id in "[^/\\\\?#%\u{0}-\u{1f}\u{7f}-\u{9f}]{1,20}",
    ) {
        let failure = make(kind, status, wait);
        let unknown = (write && unknown).then(|| "3f0c9f0e-0000-4000-8000-000000000000".to_owned());
        let answered = matches!(failure, Failure::Status { .. } | Failure::Unreadable(_) | Failure::Timeout(_)).then_some(status);
        let path = format!("/users/{id}");
        let error =
            BackendError { failure, route: Route::User, path, status: answered, write, applied, unknown_write: unknown.clone(), token_rejected: false, token_replaced: unknown.is_some(), detail: Some("x".into()) };
        let problem = error::advice(&error, || format!("user `{id}`"));
        let json = problem.to_json();
        assert_well_formed(&json);
        let object: Value = serde_json::from_str(&json).unwrap();
        let details = &object["details"];
        prop_assert_eq!(details["outcome"].as_str(), unknown.as_ref().map(|_| if applied { "created" } else { "unknown" }));
        prop_assert_eq!(details["idempotency_key"].as_str(), unknown.as_deref());
        prop_assert!(unknown.is_none() || details["retryable"] == false);
        prop_assert!(problem.message.ends_with('.') && problem.message.len() < 800, "{}", problem.message);
        let code = match kind {
            "identity" | "unauthorized" => "AUTHENTICATION_ERROR",
            "timeout" => "TIMEOUT_ERROR",
            _ => "SERVICE_ERROR",
        };
        prop_assert_eq!(object["error"].as_str(), Some(code));
        if kind == "status" {
            prop_assert_eq!(details["status_code"].as_u64(), Some(status.into()));
        }
        if let (Some(wait), "status" | "open") = (wait, kind) {
            let told = details["retry_after_seconds"].as_u64().unwrap();
            prop_assert!(told == u64::MAX || Duration::from_secs(told) >= wait);
        }
    }
}
