//! Users who come and go in any order, while tokens expire, are refused and Entra fails: nobody ever gets another's token.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use proptest::collection::vec;
use proptest::prelude::*;
use tokio::task::JoinHandle;
use tokio::time::{advance, sleep, timeout};

use super::*;

const SECOND: Duration = Duration::from_secs(1);

/// What Entra does at one exchange, after so many milliseconds.
#[derive(Debug, Clone, Copy)]
enum Reply {
    Token { after: u64, life: u64 },
    Refuse { after: u64, status: u16 },
    Panic,
}

/// What happens next.
#[derive(Debug, Clone, Copy)]
enum Event {
    /// A user calls with one of their tokens, and waits at most so many milliseconds.
    Call {
        user: usize,
        patience: u64,
    },
    /// The backend refuses the token that this user got last.
    Reject {
        user: usize,
    },
    Time {
        milliseconds: u64,
    },
}

fn replies() -> impl Strategy<Value = Vec<Reply>> {
    let reply = prop_oneof![
        5 => (0u64..3_000, 1u64..30).prop_map(|(after, life)| Reply::Token { after, life }),
        2 => (0u64..3_000, prop_oneof![Just(400u16), Just(401), Just(503)]).prop_map(|(after, status)| Reply::Refuse { after, status }),
        1 => Just(Reply::Panic),
    ];
    vec(reply, 1..20)
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        6 => (0usize..USERS, 0u64..4_000).prop_map(|(user, patience)| Event::Call { user, patience }),
        1 => (0usize..USERS).prop_map(|user| Event::Reject { user }),
        3 => (0u64..20_000).prop_map(|milliseconds| Event::Time { milliseconds }),
    ];
    vec(event, 1..30)
}

/// Two tenants with two users of the same object ids, each of them with two tokens.
const USERS: usize = 8;

fn user(number: usize) -> Arc<UserAssertion> {
    let token = format!("assertion-{}", number % 2);
    Arc::new(UserAssertion::new(&format!("tenant-{}", number / 4), &format!("user-{}", number / 2 % 2), token.into()))
}

fn name(user: &UserAssertion) -> String {
    format!("{}/{}/{}", user.tenant, user.object, user.token.expose_secret())
}

fn refused(status: u16) -> Box<IdentityError> {
    let status = StatusCode::from_u16(status).ok();
    Box::new(IdentityError { status, ..IdentityError::new(FaultClass::Http, "on-behalf-of with client secret") })
}

/// A holder whose Entra answers as `reply` says for the exchange's number, and with a token that names its user.
fn holder(
    remembered: usize,
    exchanges: Arc<AtomicUsize>,
    reply: impl Fn(usize) -> Reply + Send + Sync + 'static,
) -> Arc<OnBehalfOf> {
    let exchange = move |user: Arc<UserAssertion>| {
        let (sent, reply) = (Instant::now(), reply(exchanges.fetch_add(1, Relaxed)));
        async move {
            match reply {
                Reply::Token { after, life } => {
                    sleep(Duration::from_millis(after)).await;
                    Ok(BearerToken::new(&name(&user), sent, Duration::from_secs(life)).unwrap())
                }
                Reply::Refuse { after, status } => {
                    sleep(Duration::from_millis(after)).await;
                    Err(refused(status))
                }
                Reply::Panic => panic!("the exchange panics"),
            }
        }
        .boxed()
    };
    Arc::new(OnBehalfOf::with_exchange(
        "on-behalf-of with client secret",
        "api://b/.default",
        remembered,
        Box::new(exchange),
    ))
}

fn owner(token: &BearerToken) -> &str {
    token.authorization().to_str().unwrap().strip_prefix("Bearer ").unwrap()
}

fn run(future: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(future);
}

type Pending = JoinHandle<Option<Outcome>>;

async fn walk(events: &[Event], replies: Vec<Reply>, remembered: usize) {
    let exchanges = Arc::new(AtomicUsize::new(0));
    let holder = holder(remembered, Arc::clone(&exchanges), move |number| replies[number % replies.len()]);
    let mut pending: Vec<(usize, Pending)> = Vec::new();
    let mut last: Vec<Option<Arc<BearerToken>>> = vec![None; USERS];
    for event in events {
        match *event {
            Event::Call { user: number, patience } => {
                let (holder, user) = (Arc::clone(&holder), user(number));
                let call = async move { timeout(Duration::from_millis(patience), holder.token(&user)).await.ok() };
                pending.push((number, tokio::spawn(call)));
                tokio::task::yield_now().await;
            }
            Event::Reject { user: number } => {
                if let Some(token) = &last[number] {
                    holder.reject(&user(number), token);
                    // Of whose token it is, nobody else's seat depends.
                    holder.reject(&user((number + 1) % USERS), token);
                }
            }
            Event::Time { milliseconds } => advance(Duration::from_millis(milliseconds)).await,
        }
        let mut waiting = Vec::new();
        for (number, call) in pending {
            if !call.is_finished() {
                waiting.push((number, call));
            } else if let Some(Ok(token)) = call.await.unwrap() {
                assert_eq!(owner(&token), name(&user(number)), "a token of another");
                last[number] = Some(token);
            }
        }
        pending = waiting;
    }
    for (number, call) in pending {
        // Every wait has an end: that of the caller's patience.
        if let Some(Ok(token)) = timeout(10 * SECOND, call).await.unwrap().unwrap() {
            assert_eq!(owner(&token), name(&user(number)), "a token of another");
        }
    }
    sleep(10 * SECOND).await;
    assert_eq!(holder.flights.available_permits(), EXCHANGES_AT_ONCE, "an exchange left its seat");
    let calls = events.iter().filter(|event| matches!(event, Event::Call { .. })).count();
    let rejections = events.iter().filter(|event| matches!(event, Event::Reject { .. })).count();
    assert!(exchanges.load(Relaxed) <= calls + rejections, "more exchanges than calls and rejections");
}

proptest! {
    #[test]
    fn nobody_gets_the_token_of_another_whatever_expires_fails_or_is_given_up(
        events in events(), replies in replies(), remembered in prop_oneof![Just(64usize), Just(2)],
    ) {
        run(walk(&events, replies, remembered));
    }

    #[test]
    fn keys_are_the_same_for_the_same_four_parts_and_for_no_others(
        parts in proptest::array::uniform4("[a-c]{0,3}"), others in proptest::array::uniform4("[a-c]{0,3}"),
    ) {
        let key = |parts: &[String; 4]| {
            let holder = holder_for(&parts[3]);
            holder.key(&UserAssertion::new(&parts[0], &parts[1], parts[2].clone().into()))
        };
        prop_assert_eq!(key(&parts) == key(&others), parts == others);
    }
}

fn holder_for(scope: &str) -> OnBehalfOf {
    OnBehalfOf::with_exchange("x", scope, 1, Box::new(|_| async { Err(refused(400)) }.boxed()))
}

#[tokio::test(start_paused = true)]
async fn a_hundred_thousand_users_keep_to_the_bound_and_the_one_who_keeps_calling_keeps_the_token() {
    let exchanges = Arc::new(AtomicUsize::new(0));
    let holder = holder(REMEMBERED, Arc::clone(&exchanges), |_| Reply::Token { after: 0, life: 3_600 });
    let regular = user(0);
    for number in 0..100_000usize {
        let token = format!("assertion-{number}");
        let stranger = Arc::new(UserAssertion::new("tenant", &format!("user-{number}"), token.into()));
        assert_eq!(owner(&holder.token(&stranger).await.unwrap()), name(&stranger));
        if number % 100 == 0 {
            assert_eq!(owner(&holder.token(&regular).await.unwrap()), name(&regular));
        }
        if number % 10_000 == 9_999 {
            assert!(holder.remembered() <= REMEMBERED, "{}", holder.remembered());
        }
    }
    assert!(holder.remembered() <= REMEMBERED, "{}", holder.remembered());
    assert_eq!(exchanges.load(Relaxed), 100_001, "the one who kept calling was forgotten");
}

#[tokio::test(start_paused = true)]
async fn a_hundred_calls_of_one_user_are_one_exchange_also_when_the_first_leaves_and_when_it_fails() {
    for (reply, ok) in [
        (Reply::Token { after: 500, life: 3_600 }, true),
        (Reply::Refuse { after: 500, status: 400 }, false),
        (Reply::Panic, false),
    ] {
        let exchanges = Arc::new(AtomicUsize::new(0));
        let holder = holder(REMEMBERED, Arc::clone(&exchanges), move |_| reply);
        let user = user(0);
        let _ = timeout(Duration::from_millis(1), holder.token(&user)).await;
        let calls = (0..100).map(|_| holder.token(&user));
        let outcomes = futures_util::future::join_all(calls).await;
        assert!(outcomes.iter().all(|outcome| outcome.is_ok() == ok), "{reply:?}");
        assert_eq!(exchanges.load(Relaxed), 1, "{reply:?}");
        assert_eq!(holder.token(&user).await.is_ok(), ok, "a failure stands for its cool-down");
        assert_eq!(exchanges.load(Relaxed), 1, "{reply:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_exchange_of_one_user_keeps_no_other_user_waiting() {
    let holder = holder(REMEMBERED, Arc::default(), |number| Reply::Token {
        after: if number == 0 { 5_000 } else { 10 },
        life: 3_600,
    });
    let slow = tokio::spawn({
        let holder = Arc::clone(&holder);
        async move { holder.token(&user(0)).await.is_ok() }
    });
    tokio::task::yield_now().await;
    let begin = Instant::now();
    assert!(holder.token(&user(2)).await.is_ok());
    assert!(begin.elapsed() < SECOND, "{:?}", begin.elapsed());
    assert!(!slow.is_finished() && slow.await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_failure_of_one_user_is_theirs_and_a_throttling_is_everybodys() {
    let holder_of = |status| {
        holder(REMEMBERED, Arc::default(), move |number| match number {
            0 => Reply::Refuse { after: 0, status },
            _ => Reply::Token { after: 0, life: 3_600 },
        })
    };
    let holder = holder_of(400);
    assert!(holder.token(&user(0)).await.is_err());
    assert!(holder.token(&user(2)).await.is_ok());
    sleep(16 * SECOND).await;
    assert!(holder.token(&user(0)).await.is_ok(), "the cool-down has an end");

    let holder = holder_of(429);
    let throttled = holder.token(&user(0)).await.unwrap_err();
    assert!(Arc::ptr_eq(&holder.token(&user(2)).await.unwrap_err(), &throttled));
    sleep(3 * SECOND).await;
    assert!(holder.token(&user(2)).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_rejected_token_is_replaced_alone_and_at_most_once_in_thirty_seconds() {
    let exchanges = Arc::new(AtomicUsize::new(0));
    let holder = holder(REMEMBERED, Arc::clone(&exchanges), |_| Reply::Token { after: 10, life: 3_600 });
    let (a, b) = (user(0), user(2));
    let (of_a, of_b) = (holder.token(&a).await.unwrap(), holder.token(&b).await.unwrap());
    for _ in 0..10 {
        assert!(holder.reject(&a, &of_a));
    }
    for (user, token) in [(&a, &of_a), (&b, &of_b)] {
        assert!(Arc::ptr_eq(&holder.token(user).await.unwrap(), token), "it serves until another is there");
    }
    let second = holder.replacement(&a, &of_a).await.unwrap();
    assert!(!Arc::ptr_eq(&second, &of_a) && Arc::ptr_eq(&holder.token(&a).await.unwrap(), &second));
    assert!(holder.reject(&a, &of_a), "a newer one is here");
    assert!(Arc::ptr_eq(&holder.replacement(&a, &of_a).await.unwrap(), &second));
    assert!(!holder.reject(&a, &second), "too soon");
    assert!(Arc::ptr_eq(&holder.token(&a).await.unwrap(), &second));
    sleep(31 * SECOND).await;
    assert!(holder.reject(&a, &second));
    assert!(!Arc::ptr_eq(&holder.replacement(&a, &second).await.unwrap(), &second));
    assert_eq!(exchanges.load(Relaxed), 4);
}

#[tokio::test(start_paused = true)]
async fn a_rejected_token_that_entra_does_not_replace_serves_on_and_is_rejected_again_after_the_cool_down() {
    let exchanges = Arc::new(AtomicUsize::new(0));
    let holder = holder(REMEMBERED, Arc::clone(&exchanges), |number| match number {
        1 => Reply::Refuse { after: 10, status: 503 },
        _ => Reply::Token { after: 10, life: 60 },
    });
    let user = user(0);
    let token = holder.token(&user).await.unwrap();
    assert!(holder.reject(&user, &token));
    let failure = holder.replacement(&user, &token).await.unwrap_err();
    assert_eq!(failure.status(), Some(StatusCode::SERVICE_UNAVAILABLE));
    assert!(!holder.reject(&user, &token), "nothing to expect during a cool-down");
    assert!(Arc::ptr_eq(&holder.token(&user).await.unwrap(), &token));
    sleep(3 * SECOND).await;
    assert!(holder.reject(&user, &token));
    assert!(!Arc::ptr_eq(&holder.replacement(&user, &token).await.unwrap(), &token));
    sleep(61 * SECOND).await;
    assert!(holder.token(&user).await.is_ok());
    assert_eq!(exchanges.load(Relaxed), 4, "an expired token is replaced, whatever was rejected before");
}

#[tokio::test(start_paused = true)]
async fn what_is_too_much_at_once_is_refused_and_may_be_tried_again() {
    let holder = holder(REMEMBERED, Arc::default(), |_| Reply::Token { after: 1_000, life: 3_600 });
    let users: Vec<_> = (0..EXCHANGES_AT_ONCE + 10)
        .map(|number| Arc::new(UserAssertion::new("tenant", &number.to_string(), "token".into())))
        .collect();
    let outcomes = futures_util::future::join_all(users.iter().map(|user| holder.token(user))).await;
    let refused: Vec<_> = outcomes.into_iter().filter_map(Result::err).collect();
    assert_eq!(refused.len(), 10);
    assert!(refused.iter().all(|error| error.retryable() && error.retry_after().is_some()));
    assert!(holder.token(&users[EXCHANGES_AT_ONCE]).await.is_ok());
}
