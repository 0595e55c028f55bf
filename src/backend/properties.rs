//! Paths, repetitions, waits and answers, whatever comes from either side.

use std::error::Error as _;
use std::fmt::Write as _;
use std::sync::Mutex;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use serde_json::Value;
use tokio::runtime::Runtime;

use super::breaker::Verdict;
use super::retry::{LEAST_ATTEMPT, Setback, may_repeat, retry_after};
use super::simulation::{refused, reset};
use super::*;
use crate::identity::simulated;

/// Stands in every foreign text; no error may show it.
const CANARY: &str = "canary-7f3a";

const BASES: [&str; 5] = [
    "http://backend.example",
    "https://backend.example/api/v1",
    "http://[::1]:8080/a%20b/ü",
    "http://10.0.0.1/x",
    "http://backend.example/users/..%2f/q",
];

/// What the wire carried, and what it answers.
#[derive(Default)]
struct Wire {
    asked: Mutex<Vec<Url>>,
    answer: Mutex<(u16, HeaderMap, Vec<u8>)>,
}

/// Clients of a backend that answers what a property wants, one for each base.
struct Bench {
    runtime: Runtime,
    clients: Vec<BackendClient>,
    wire: Arc<Wire>,
}

impl Bench {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let wire = Arc::new(Wire::default());
        let client = |base: &&str| {
            let settings = BackendSettings {
                max_attempts: 1,
                max_response_bytes: 4_096,
                circuit_breaker: false,
                ..BackendSettings::new(Url::parse(base).unwrap())
            };
            let identity = simulated::token_source(|| async {
                simulated::Answer::Token { secret: "token".to_owned(), life: Duration::from_secs(1 << 40) }
            });
            let wire = Arc::clone(&wire);
            let carry = move |request: Request| {
                wire.asked.lock().unwrap().push(request.url().clone());
                let (status, headers, body) = wire.answer.lock().unwrap().clone();
                let mut response = http::Response::new(body);
                *response.status_mut() = StatusCode::from_u16(status).unwrap();
                *response.headers_mut() = headers;
                futures_util::future::ready(Ok(response.into()))
            };
            BackendClient::simulated(&settings, identity, Box::new(move |request| Box::pin(carry(request))))
        };
        let clients = runtime.block_on(async { BASES.iter().map(client).collect() });
        Self { runtime, clients, wire }
    }

    fn answer(&self, status: u16, headers: HeaderMap, body: Vec<u8>) {
        *self.wire.answer.lock().unwrap() = (status, headers, body);
    }

    /// The one address that was asked meanwhile.
    fn asked<T>(&self, call: impl Future<Output = T>) -> Url {
        self.wire.asked.lock().unwrap().clear();
        self.runtime.block_on(call);
        let asked = self.wire.asked.lock().unwrap();
        assert_eq!(asked.len(), 1);
        asked[0].clone()
    }
}

thread_local! {
    static BENCH: Bench = Bench::new();
}

/// Ids as they are, and as they should not be.
fn id() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<String>(),
        "[a-zA-Z0-9@._:;=&+!~'()*,$ü日 -]{1,24}",
        "(\\.|\\.\\.|%2e|%2F|/|\\\\|\\?|#|%|@|:|//|;|\t|\r\n|\u{0}|\u{85}|a|evil\\.example){1,6}",
        "(\\.|\\.\\.|;|;a=b|a|\\[|\\]|\\||\\^|`|\\{|\\}|\"|'| |ü){1,6}",
    ]
}

/// Any JSON, with something in it that must not be quoted.
pub(crate) fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        Just(Value::from(CANARY)),
        Just(Value::from(format!("x, expected {CANARY}"))),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            vec((key(), inner), 0..6).prop_map(|entries| Value::Object(entries.into_iter().collect())),
        ]
    })
}

/// The names of the agreed form, and others.
fn key() -> impl Strategy<Value = String> {
    const AGREED: [&str; 10] =
        ["id", "name", "email", "created_at", "details", "total", "items", "data", "priority", "status"];
    prop_oneof![4 => proptest::sample::select(&AGREED[..]).prop_map(str::to_owned), 1 => ".{0,6}", 1 => Just(CANARY.to_owned())]
}

fn decoded(segment: &str) -> Vec<u8> {
    let bytes = segment.as_bytes();
    let (mut text, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        if bytes[at] == b'%' {
            text.push(u8::from_str_radix(&segment[at + 1..at + 3], 16).unwrap());
            at += 3;
        } else {
            text.push(bytes[at]);
            at += 1;
        }
    }
    text
}

fn segments(url: &Url) -> Vec<&str> {
    url.path_segments().unwrap().filter(|segment| !segment.is_empty()).collect()
}

fn told(error: &BackendError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let _ = write!(text, ": {cause} {cause:?}");
        source = cause.source();
    }
    text
}

fn status() -> impl Strategy<Value = u16> {
    prop_oneof![100u16..=999, proptest::sample::select(&[200u16, 201, 204, 302, 400, 401, 404, 408, 429, 500, 503][..])]
}

proptest! {
    #[test]
    fn an_id_is_refused_or_becomes_exactly_one_segment_below_the_base(id in id(), include_details: bool) {
        let Ok(segment) = Segment::try_from(id.clone()) else { return Ok(()) };
        BENCH.with(|bench| {
            bench.answer(404, HeaderMap::new(), Vec::new());
            for client in &bench.clients {
                let call = client.begin_call(Trace::begin());
                let url = bench.asked(client.user(&call, &segment, include_details));
                assert_eq!(url.origin(), client.base_url.origin());
                assert_eq!((url.username(), url.password(), url.fragment()), ("", None, None));
                assert_eq!(url.query(), include_details.then_some("include_details=true"));
                let (base, whole) = (segments(&client.base_url), segments(&url));
                assert_eq!(whole.len(), base.len() + 2, "{url}");
                assert_eq!(&whole[..base.len()], &base[..], "{url}");
                assert_eq!(whole[base.len()], "users");
                assert_eq!(decoded(whole[base.len() + 1]), id.as_bytes(), "{url}");
                let is_pchar = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,=:@%".contains(&byte);
                assert!(whole[base.len() + 1].bytes().all(is_pchar), "{url}");
                assert!(!["", ".", ".."].contains(&id.split(';').next().unwrap()), "{id} is a step in a path");
                assert_eq!(Url::parse(url.as_str()).unwrap(), url, "another parser sees the same");
                assert!(url.as_str().bytes().all(|byte| byte.is_ascii_graphic()), "{url}");
            }
        });
    }

    #[test]
    fn filters_arrive_as_they_were_given_and_as_nothing_else(
        dataset in "[a-z]{1,8}", limit in 1u32..=1_000, filters in option::of(vec((any::<String>(), json()), 0..4))
    ) {
        let filters = filters.map(|filters| Value::Object(filters.into_iter().collect()).to_string());
        BENCH.with(|bench| {
            bench.answer(404, HeaderMap::new(), Vec::new());
            let (client, query) = (&bench.clients[1], Query { dataset: dataset.clone().try_into().unwrap(), filters, limit });
            let url = bench.asked(client.query(&client.begin_call(Trace::begin()), &query));
            assert_eq!(url.path(), format!("/api/v1/query/{dataset}"));
            let pairs: Vec<_> = url.query_pairs().map(|(name, value)| (name.into_owned(), value.into_owned())).collect();
            let mut expected = vec![("limit".to_owned(), limit.to_string())];
            expected.extend(query.filters.as_ref().map(|filters| ("filters".to_owned(), filters.clone())));
            assert_eq!(pairs, expected);
            assert!(!url.as_str().contains('+') && url.fragment().is_none(), "{url}");
        });
    }

    #[test]
    fn whatever_the_backend_sends_becomes_an_answer_or_an_error_that_quotes_none_of_it(
        status in status(), header in option::of(vec(any::<u8>(), 0..20)), what in 0..3,
        body in prop_oneof![
            json().prop_map(|body| body.to_string().into_bytes()),
            (json(), 0usize..40).prop_map(|(body, cut)| { let mut text = body.to_string().into_bytes(); text.truncate(cut); text }),
            vec(any::<u8>(), 0..40),
            (4_000usize..5_000).prop_map(|length| vec![b' '; length]),
        ],
    ) {
        BENCH.with(|bench| {
            let value = header.and_then(|bytes| HeaderValue::from_bytes(&bytes).ok());
            bench.answer(status, HeaderMap::from_iter(value.map(|value| (header::RETRY_AFTER, value))), body.clone());
            let client = &bench.clients[0];
            let call = client.begin_call(Trace::begin());
            let answer = bench.runtime.block_on(async {
                match what {
                    0 => client.users(&call, 0, 10).await.map(drop),
                    1 => client.tickets(&call, None, 0, 10).await.map(drop),
                    _ => client.user(&call, &Segment::try_from("42".to_owned()).unwrap(), true).await.map(drop),
                }
            });
            match answer {
                Ok(()) => assert!((200..300).contains(&status)),
                Err(error) => {
                    let told = told(&error);
                    assert!(!told.contains(CANARY), "{told}");
                    assert_eq!(error.unknown_write, None, "a read has no fate");
                    match &error.failure {
                        Failure::Unauthorized => assert_eq!(status, 401),
                        Failure::Status { status: told, .. } => assert_eq!(told.as_u16(), status),
                        Failure::TooLarge(limit) => assert!(body.len() > *limit),
                        Failure::Unreadable(_) => assert!((200..300).contains(&status)),
                        failure => panic!("{failure:?}"),
                    }
                }
            }
        });
    }

    #[test]
    fn a_write_is_never_repeated_after_a_failure_that_may_have_left_something(status in 100u16..=999, kind in 0..4) {
        let status = StatusCode::from_u16(status).unwrap();
        let (setback, applied) = match kind {
            0 => (Setback::NotSent, false),
            1 => (Setback::Interrupted, true),
            2 => (Setback::Unreadable, true),
            _ => (Setback::Status(status), Failure::Status { status, retry_after: None }.may_have_been_applied()),
        };
        let repeated = may_repeat(true, setback);
        prop_assert!(!(repeated && applied), "{:?}", setback);
        prop_assert!(!repeated || matches!(setback, Setback::NotSent | Setback::Status(StatusCode::TOO_MANY_REQUESTS)));
        prop_assert!(!repeated || may_repeat(false, setback), "what is safe to write again is safe to read again");
        if let Setback::Status(status) = setback {
            let expected = [408, 429, 502, 503, 504].contains(&status.as_u16());
            prop_assert_eq!(may_repeat(false, setback), expected, "{}", status);
        }
        prop_assert!(crate::telemetry::metrics::RETRY_REASONS.contains(&setback.reason()));
    }

    #[test]
    fn no_wait_reaches_past_the_deadline_or_undercuts_what_the_backend_asked(
        most in 0u32..8, asked in vec(option::of(prop_oneof![any::<Duration>(), (0u64..5_000).prop_map(Duration::from_millis)]), 0..10),
        left in prop_oneof![any::<Duration>(), (0u64..12_000).prop_map(Duration::from_millis)],
    ) {
        let (mut attempts, mut left, mut made) = (Attempts::new(most), left, 1);
        for asked in asked {
            let Some(wait) = attempts.next_wait(asked, left) else {
                let impatient = asked.unwrap_or_default().saturating_add(LEAST_ATTEMPT) > left;
                // The longest jitter is a second.
                prop_assert!(made >= most || impatient || left < Duration::from_secs(1) + LEAST_ATTEMPT);
                continue;
            };
            made += 1;
            prop_assert!(made <= most, "{} attempts of {}", made, most);
            prop_assert!(wait >= asked.unwrap_or_default());
            prop_assert!(wait <= asked.unwrap_or_default().max(Duration::from_secs(1)));
            prop_assert!(wait.checked_add(LEAST_ATTEMPT).is_some_and(|needed| needed <= left), "{:?} of {:?}", wait, left);
            left -= wait;
        }
    }

    #[test]
    fn any_bytes_are_a_wait_or_none(bytes in prop_oneof![
        vec(any::<u8>(), 0..40),
        " ?[0-9]{0,25} ?".prop_map(String::into_bytes),
        "(Mon|Sun), [0-3][0-9] (Jan|Feb|Nov) [0-9]{4} [0-2][0-9]:[0-6][0-9]:[0-6][0-9] (GMT|UTC)".prop_map(String::into_bytes),
    ], now in 0u64..4_000_000_000) {
        let Ok(value) = HeaderValue::from_bytes(&bytes) else { return Ok(()) };
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(now);
        let wait = retry_after(&HeaderMap::from_iter([(header::RETRY_AFTER, value)]), now);
        // Every JSON reader keeps such a number, and adding to it does not overflow.
        prop_assert!(wait.unwrap_or_default() < Duration::from_secs(1 << 53), "{:?}", wait);
    }

    #[test]
    fn a_wait_survives_as_seconds_and_as_a_date(seconds in 0u64..=u32::MAX.into(), now in 0u64..4_000_000_000) {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(now);
        let date = httpdate::fmt_http_date(now + Duration::from_secs(seconds));
        let past = httpdate::fmt_http_date(now - Duration::from_secs(seconds).min(now.duration_since(SystemTime::UNIX_EPOCH).unwrap()));
        for (value, expected) in [(seconds.to_string(), seconds), (date, seconds), (past, 0)] {
            let headers = HeaderMap::from_iter([(header::RETRY_AFTER, HeaderValue::try_from(&value).unwrap())]);
            prop_assert_eq!(retry_after(&headers, now), Some(Duration::from_secs(expected)), "{}", value);
        }
    }

    #[test]
    fn a_breaker_lets_one_probe_through_and_never_shuts_for_longer_than_its_pause(
        steps in vec((0u8..10, 0u64..40_000), 1..60)
    ) {
        BENCH.with(|bench| bench.runtime.block_on(async {
            let breakers = Breakers::new();
            let source = |millis: u64| Source::new(CallerBit::SERVER, &(millis % 3).to_string());
            let mut admitted: Vec<(Admission<'_>, bool)> = Vec::new();
            for (step, millis) in steps {
                match step {
                    0..=2 => tokio::time::advance(Duration::from_millis(millis)).await,
                    3..=6 => match breakers.admit(Route::User, source(millis)) {
                        Ok(admission) => {
                            let probe = breakers.state(Route::User) == BreakerState::HalfOpen;
                            assert!(!(probe && admitted.iter().any(|(_, probe)| *probe)), "two probes");
                            assert_ne!(breakers.state(Route::User), BreakerState::Open);
                            admitted.push((admission, probe));
                        }
                        Err(wait) => {
                            assert!(wait <= Duration::from_secs(31) && !wait.is_zero(), "{wait:?}");
                            assert_ne!(breakers.state(Route::User), BreakerState::Closed);
                        }
                    },
                    _ if admitted.is_empty() => {}
                    _ => {
                        let (admission, _) = admitted.swap_remove(millis as usize % admitted.len());
                        match step {
                            7 => admission.settle(Verdict::Works),
                            8 => admission.settle(Verdict::Fails),
                            _ => drop(admission),
                        }
                    }
                }
            }
            admitted.clear();
            tokio::time::advance(Duration::from_secs(31)).await;
            assert!(breakers.admit(Route::User, source(0)).is_ok(), "shut for good");
        }));
    }
}

#[tokio::test]
async fn every_way_to_fail_has_one_place_in_the_retry_table_and_a_verdict() {
    let failures = [
        Failure::Unreachable(refused().await),
        Failure::Interrupted(reset()),
        Failure::Unreadable(serde_json::from_str::<u8>("x").unwrap_err().into()),
        Failure::Encoded("gzip".into()),
        Failure::TooLarge(1),
        Failure::Timeout(Duration::ZERO),
        Failure::Busy,
        Failure::CircuitOpen(Duration::ZERO),
        Failure::Unhealthy("UP".into()),
        Failure::Unauthorized,
    ];
    for failure in failures {
        let applied = failure.may_have_been_applied();
        let error = BackendError {
            failure,
            route: Route::CreateTicket,
            path: "/tickets".to_owned(),
            status: None,
            write: true,
            applied: false,
            unknown_write: None,
            token_rejected: false,
            token_replaced: false,
            detail: None,
        };
        let repeated = error.setback().is_some_and(|setback| may_repeat(true, setback));
        assert!(!(repeated && applied), "{error}");
        assert!(!(applied && error.was_turned_away()), "{error}");
        let _ = error.verdict();
    }
}
