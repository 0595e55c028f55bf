//! The token source: hands out the token it holds, and sees to it that it holds one.
//!
//! One background task, the driver, makes all exchanges, one at a time, each in a task of its own: at half of a token's
//! life, after a cool-down, or at once when the backend rejected the token. Callers never start one and never end one. While
//! a usable token is held a call costs one atomic load; without one it waits for the exchange in flight or gets the failure
//! that everyone gets until the cool-down is over. A token is used until it is replaced or really expires, however long Entra is
//! away and whatever the backend says of it: a 401 starts a refresh and drops nothing.

#[cfg(test)]
mod properties;

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use futures_util::FutureExt as _;
use http::HeaderValue;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::task::AbortOnDropHandle;
use tracing::{Instrument, debug, error, error_span, info, warn};

use super::chain::{Exchange, IdentityStartError};
use super::fault::{FaultClass, IdentityError, log_failure};
use crate::settings::IdentitySettings;

/// The longest that an exchange may take, however patient the callers are.
const EXCHANGE: Duration = Duration::from_secs(8);
/// A token this close to its end is not handed out: it could expire on the way.
const FLOOR: Duration = Duration::from_secs(5);
/// Between two exchanges, however short the tokens live.
const LEAST_PAUSE: Duration = Duration::from_secs(1);
/// The cool-down after a failure that may pass by itself: doubles from the first to the last.
const FIRST_COOL_DOWN: Duration = Duration::from_secs(2);
const LAST_COOL_DOWN: Duration = Duration::from_secs(30);
/// The cool-down after a failure that someone has to mend.
const CONFIGURATION_COOL_DOWN: Duration = Duration::from_secs(15);
/// The longest pause that Entra may ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// Between two refreshes that the backend's 401 forced.
pub(super) const FORCED_PAUSE: Duration = Duration::from_secs(30);

/// The one holder of the token for the backend. Dropping it stops the background work.
pub struct TokenSource {
    state: Arc<State>,
    driver: Option<AbortOnDropHandle<()>>,
}

impl TokenSource {
    /// Builds the transport and starts the first exchange in the background; does not wait for Entra, and heals by itself
    /// when Entra comes back. `call_timeout` is what a caller has in all: every exchange ends within 80 % of it, so that
    /// callers read its cause and not just that time is up. Needs a tokio runtime around it.
    pub fn start(settings: &IdentitySettings, call_timeout: Duration) -> Result<Arc<Self>, IdentityStartError> {
        let exchange = Arc::new(Exchange::new(settings, budget(call_timeout))?);
        let credential = exchange.credential_name();
        Ok(Self::with_exchange(credential, move || {
            let exchange = Arc::clone(&exchange);
            async move { exchange.run().await }
        }))
    }

    /// A source that has this token and never gets another: no background work, and none after the token's end.
    pub fn holding(token: BearerToken, credential: &'static str) -> Arc<Self> {
        let error =
            IdentityError::new(FaultClass::Parse, credential).with_detail("the one token there was has expired");
        let progress =
            Progress { running: false, failure: Some(Arc::new(error)), forced_at: None, counts: TokenStats::default() };
        let held = ArcSwapOption::from_pointee(token);
        let state = State { credential, held, progress: watch::Sender::new(progress) };
        Arc::new(Self { state: Arc::new(state), driver: None })
    }

    pub(super) fn with_exchange<F, E>(credential: &'static str, exchange: F) -> Arc<Self>
    where
        F: Fn() -> E + Send + Sync + 'static,
        E: Future<Output = Result<BearerToken, Box<IdentityError>>> + Send + 'static,
    {
        let progress = Progress { running: true, failure: None, forced_at: None, counts: TokenStats::default() };
        let state =
            Arc::new(State { credential, held: ArcSwapOption::empty(), progress: watch::Sender::new(progress) });
        let driver = tokio::spawn(keep_driving(Arc::clone(&state), exchange).instrument(error_span!("drive")));
        Arc::new(Self { state, driver: Some(AbortOnDropHandle::new(driver)) })
    }

    /// A usable token; at once if one is held. Else waits for the exchange in flight, or fails as that one did while the
    /// cool-down lasts. The caller bounds the wait: dropping the future stops nothing.
    pub async fn token(self: &Arc<Self>) -> Result<Arc<BearerToken>, Arc<IdentityError>> {
        match self.state.usable() {
            Some(token) => Ok(token),
            None => self.wait(|_| true).await,
        }
    }

    /// A usable token other than this one, which the backend rejected: for the call whose rejection [`reject`](Self::reject) has
    /// answered with `true`. Waits for the exchange in flight and fails as it does. The caller bounds the wait.
    pub async fn replacement(
        self: &Arc<Self>,
        rejected: &Arc<BearerToken>,
    ) -> Result<Arc<BearerToken>, Arc<IdentityError>> {
        self.wait(|token| !Arc::ptr_eq(token, rejected)).await
    }

    async fn wait(&self, accepts: impl Fn(&Arc<BearerToken>) -> bool) -> Result<Arc<BearerToken>, Arc<IdentityError>> {
        let mut progress = self.state.progress.subscribe();
        loop {
            let failure = {
                let progress = progress.borrow_and_update();
                progress.failure.clone().filter(|_| !progress.running)
            };
            // Looked at after the progress: what is stored in between wakes this loop once more.
            if let Some(token) = self.state.usable().filter(&accepts) {
                return Ok(token);
            }
            if let Some(failure) = failure {
                return Err(failure);
            }
            if progress.changed().await.is_err() {
                let error = IdentityError::new(FaultClass::Internal, self.state.credential);
                return Err(Arc::new(error.with_detail("the token source is gone")));
            }
        }
    }

    /// The backend answered 401 to this token: refreshes it at once if it is still the current one, and keeps it meanwhile, for the
    /// 401 may say nothing about the token. Returns whether a different token may be expected, that is whether a replay with the
    /// [`replacement`](Self::replacement) makes sense: not when Entra just failed, or the last forced refresh is less than 30 s ago.
    pub fn reject(self: &Arc<Self>, token: &Arc<BearerToken>) -> bool {
        if self.driver.is_none() {
            return false;
        }
        let state = &self.state;
        let mut replaced = false;
        let forced = state.progress.send_if_modified(|progress| {
            let current = state.held.load();
            let now = Instant::now();
            if progress.running {
                replaced = true;
                return false;
            }
            let current_is_rejected = current.as_ref().is_some_and(|current| Arc::ptr_eq(current, token));
            if !current_is_rejected {
                replaced = current.as_ref().is_some_and(|current| current.is_usable(now));
                return false;
            }
            let too_soon = progress.forced_at.is_some_and(|at| now.duration_since(at) < FORCED_PAUSE);
            if progress.failure.is_some() || too_soon {
                return false;
            }
            progress.forced_at = Some(now);
            progress.counts.forced += 1;
            progress.running = true; // wakes the driver
            true
        });
        if forced {
            warn!(
                "the backend answered 401 to a token that should be good: a new one is fetched, and it serves until then"
            );
        }
        forced || replaced
    }

    /// A usable token is held. Asks nobody.
    pub fn is_healthy(&self) -> bool {
        self.state.usable().is_some()
    }

    /// The word for the credential that is used.
    pub fn credential(&self) -> &'static str {
        self.state.credential
    }

    /// What there is to count and to measure.
    pub fn stats(&self) -> TokenStats {
        let now = Instant::now();
        let counts = self.state.progress.borrow().counts;
        match &*self.state.held.load() {
            Some(token) => TokenStats {
                age: Some(now.saturating_duration_since(token.sent)),
                expires_in: Some(token.expires_at.saturating_duration_since(now)),
                ..counts
            },
            None => counts,
        }
    }

    /// Why the last exchange failed; `None` once one has succeeded after it.
    pub fn last_error(&self) -> Option<Arc<IdentityError>> {
        self.state.progress.borrow().failure.clone()
    }
}

impl fmt::Debug for TokenSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenSource").field("credential", &self.state.credential).finish_non_exhaustive()
    }
}

/// A snapshot of the token source.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TokenStats {
    /// How long ago the token that is held was asked for.
    pub age: Option<Duration>,
    /// How long it still lives.
    pub expires_in: Option<Duration>,
    /// Exchanges that gave a token.
    pub succeeded: u64,
    /// Exchanges that failed in a way that may pass by itself.
    pub failed_transient: u64,
    /// Exchanges that failed in a way that someone has to mend.
    pub failed_configuration: u64,
    /// Refreshes that a 401 of the backend forced; they are counted above as well.
    pub forced: u64,
    /// How often the refreshing task panicked and was started again.
    pub restarts: u64,
}

/// A token for the backend, as the finished header.
pub struct BearerToken {
    authorization: HeaderValue,
    sent: Instant,
    refresh_at: Instant,
    unusable_at: Instant,
    expires_at: Instant,
}

impl BearerToken {
    /// `Bearer …`, marked as sensitive.
    pub fn authorization(&self) -> &HeaderValue {
        &self.authorization
    }

    /// How long it lives, from the moment it was asked for.
    pub fn life(&self) -> Duration {
        self.expires_at - self.sent
    }

    /// A token asked for at `sent`, to live for `life`; `None` if no header may carry it.
    pub(super) fn new(secret: &str, sent: Instant, life: Duration) -> Option<Self> {
        let mut authorization = HeaderValue::try_from(format!("Bearer {secret}")).ok()?;
        authorization.set_sensitive(true);
        let expires_at = sent + life;
        Some(Self {
            authorization,
            sent,
            refresh_at: sent + life.mul_f64(0.45 + 0.1 * fastrand::f64()),
            unusable_at: expires_at - FLOOR.min(life / 4),
            expires_at,
        })
    }

    pub(super) fn is_usable(&self, now: Instant) -> bool {
        now < self.unusable_at
    }
}

impl fmt::Debug for BearerToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BearerToken").finish_non_exhaustive()
    }
}

struct State {
    credential: &'static str,
    held: ArcSwapOption<BearerToken>,
    /// Its lock also orders what is written to `held`, so that nobody sees a result of an exchange by halves.
    progress: watch::Sender<Progress>,
}

/// Where the exchanges stand. Without a usable token either one is running or there is the failure of the last.
struct Progress {
    running: bool,
    failure: Option<Arc<IdentityError>>,
    forced_at: Option<Instant>,
    counts: TokenStats,
}

impl State {
    fn usable(&self) -> Option<Arc<BearerToken>> {
        let held = self.held.load();
        held.as_ref().filter(|token| token.is_usable(Instant::now())).map(Arc::clone)
    }

    /// Stores what an exchange gave, tells everyone, and returns when the next one is due.
    fn settle(&self, outcome: Result<BearerToken, Box<IdentityError>>, failures: &mut u32) -> Instant {
        let now = Instant::now();
        let outcome = outcome.and_then(|token| match token.is_usable(now) {
            true => Ok(Arc::new(token)),
            false => Err(Box::new(self.fault(FaultClass::Parse, "the token had expired before it arrived"))),
        });
        match outcome {
            Ok(token) => {
                let next = token.refresh_at.max(now + LEAST_PAUSE);
                self.progress.send_modify(|progress| {
                    self.held.store(Some(Arc::clone(&token)));
                    progress.running = false;
                    progress.failure = None;
                    progress.counts.succeeded += 1;
                });
                self.log_success(&token, next - now, std::mem::take(failures));
                next
            }
            Err(mut error) => {
                *failures += 1;
                let next = now + cool_down(&error, *failures);
                error.retry_at = Some(next);
                let error = Arc::<IdentityError>::from(error);
                self.progress.send_modify(|progress| {
                    progress.running = false;
                    progress.failure = Some(Arc::clone(&error));
                    match error.retryable() {
                        true => progress.counts.failed_transient += 1,
                        false => progress.counts.failed_configuration += 1,
                    }
                });
                self.log_failure(&error, next - now);
                next
            }
        }
    }

    fn fault(&self, class: FaultClass, detail: &str) -> IdentityError {
        IdentityError::new(class, self.credential).with_detail(detail)
    }

    fn log_success(&self, token: &BearerToken, next: Duration, failures_before: u32) {
        let credential = self.credential;
        let life = token.life().as_secs_f64().round() as u64;
        let next = next.as_secs();
        let first = self.progress.borrow().counts.succeeded == 1;
        if first || failures_before > 0 {
            info!(
                identity.credential = credential,
                identity.token_life_s = life,
                identity.failures_before = failures_before,
                "got a token with {credential}: good for {life} s, to be refreshed in {next} s"
            );
        } else {
            debug!(
                identity.credential = credential,
                identity.token_life_s = life,
                "refreshed the token with {credential}: good for {life} s, to be refreshed in {next} s"
            );
        }
    }

    fn log_failure(&self, failure: &IdentityError, next: Duration) {
        let (retry_in_ms, seconds, hint) = (next.as_millis() as u64, next.as_secs_f64(), failure.hint());
        macro_rules! log {
            ($level:ident, $consequence:literal) => {
                log_failure!(
                    $level,
                    failure,
                    retry_in_ms,
                    "{failure}; {}; next attempt in {seconds:.1} s. {hint}",
                    $consequence
                )
            };
        }
        match self.usable() {
            Some(_) => log!(warn, "the token that is held still serves"),
            None => log!(error, "calls to the backend fail"),
        }
    }
}

/// What one exchange may take when a caller has `call_timeout` in all.
pub(super) fn budget(call_timeout: Duration) -> Duration {
    EXCHANGE.min(call_timeout.mul_f64(0.8))
}

/// Drives for ever, through panics: without a driver the server would lose its token in the end and never get another.
async fn keep_driving<F, E>(state: Arc<State>, exchange: F)
where
    F: Fn() -> E + Send + Sync,
    E: Future<Output = Result<BearerToken, Box<IdentityError>>> + Send + 'static,
{
    while AssertUnwindSafe(drive(&state, &exchange)).catch_unwind().await.is_err() {
        error!("the task that refreshes the token panicked; it starts again in {LEAST_PAUSE:?}");
        state.progress.send_modify(|progress| progress.counts.restarts += 1);
        tokio::time::sleep(LEAST_PAUSE).await;
    }
}

async fn drive<F, E>(state: &State, exchange: &F)
where
    F: Fn() -> E + Sync,
    E: Future<Output = Result<BearerToken, Box<IdentityError>>> + Send + 'static,
{
    let mut wanted = state.progress.subscribe();
    let mut failures = 0;
    loop {
        state.progress.send_modify(|progress| progress.running = true);
        // A task of its own: a panic in the SDK is one failure, not the end of all refreshes.
        let flight = AbortOnDropHandle::new(tokio::spawn(exchange().instrument(error_span!("exchange"))));
        let outcome =
            flight.await.unwrap_or_else(|_| Err(Box::new(state.fault(FaultClass::Internal, "the exchange panicked"))));
        let next = state.settle(outcome, &mut failures);
        tokio::select! {
            () = sleep_until(next) => {}
            _ = wanted.wait_for(|progress| progress.running) => {} // set by `reject`
        }
    }
}

pub(super) fn cool_down(error: &IdentityError, failures: u32) -> Duration {
    let longest = match error.retryable() {
        true => LAST_COOL_DOWN.min(FIRST_COOL_DOWN * 2u32.pow(failures.saturating_sub(1).min(4))),
        false => CONFIGURATION_COOL_DOWN,
    };
    let jittered = longest.mul_f64(0.8 + 0.2 * fastrand::f64());
    jittered.max(error.pause.unwrap_or_default().min(LONGEST_PAUSE))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use http::StatusCode;
    use tokio::time::{sleep, timeout};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// What the fake authority does at one exchange.
    enum Step {
        Token { life: u64 },
        Fail(Box<IdentityError>),
        Hang,
        Panic,
    }

    struct Authority {
        source: Arc<TokenSource>,
        exchanges: Arc<AtomicUsize>,
    }

    impl Authority {
        /// Answers each exchange, counted from 1, as `script` says, half a second after it began.
        fn new(script: impl Fn(usize) -> Step + Send + Sync + 'static) -> Self {
            let exchanges = Arc::new(AtomicUsize::new(0));
            let counted = Arc::clone(&exchanges);
            let source = TokenSource::with_exchange("client secret", move || {
                let number = counted.fetch_add(1, Ordering::SeqCst) + 1;
                let (step, sent) = (script(number), Instant::now());
                async move {
                    sleep(SECOND / 2).await;
                    match step {
                        Step::Token { life } => {
                            Ok(BearerToken::new(&number.to_string(), sent, Duration::from_secs(life)).unwrap())
                        }
                        Step::Fail(error) => Err(error),
                        Step::Hang => {
                            sleep(EXCHANGE - SECOND / 2).await;
                            Err(Box::new(IdentityError::new(FaultClass::Timeout, "client secret")))
                        }
                        Step::Panic => panic!("the SDK panics"),
                    }
                }
            });
            Self { source, exchanges }
        }

        fn exchanges(&self) -> usize {
            self.exchanges.load(Ordering::SeqCst)
        }

        /// The number of the exchange that gave the token.
        async fn token(&self) -> usize {
            number(&self.source.token().await.unwrap())
        }

        async fn failure(&self) -> Arc<IdentityError> {
            self.source.token().await.unwrap_err()
        }
    }

    fn number(token: &BearerToken) -> usize {
        token.authorization().to_str().unwrap().strip_prefix("Bearer ").unwrap().parse().unwrap()
    }

    fn answered(status: StatusCode) -> Box<IdentityError> {
        Box::new(IdentityError { status: Some(status), ..IdentityError::new(FaultClass::Http, "client secret") })
    }

    fn down() -> Step {
        Step::Fail(answered(StatusCode::INTERNAL_SERVER_ERROR))
    }

    fn wrong_secret() -> Step {
        Step::Fail(answered(StatusCode::UNAUTHORIZED))
    }

    #[tokio::test(start_paused = true)]
    async fn a_hundred_first_callers_and_a_thousand_later_ones_cost_one_exchange() {
        let authority = Authority::new(|_| Step::Token { life: 3600 });
        let callers: Vec<_> = (0..100)
            .map(|_| {
                let source = Arc::clone(&authority.source);
                tokio::spawn(async move { number(&source.token().await.unwrap()) })
            })
            .collect();
        assert!(!authority.source.is_healthy());
        for caller in callers {
            assert_eq!(caller.await.unwrap(), 1);
        }
        for _ in 0..1_000 {
            assert_eq!(authority.token().await, 1);
        }
        assert!(authority.source.is_healthy());
        assert_eq!(authority.exchanges(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_is_shared_and_nobody_starts_another_exchange_before_the_cool_down_is_over() {
        let authority = Authority::new(|_| wrong_secret());
        let callers: Vec<_> = (0..20)
            .map(|_| {
                let source = Arc::clone(&authority.source);
                tokio::spawn(async move { source.token().await.unwrap_err() })
            })
            .collect();
        let begin = Instant::now();
        let first = authority.failure().await;
        for caller in callers {
            assert!(Arc::ptr_eq(&caller.await.unwrap(), &first));
        }
        for _ in 0..1_000 {
            assert!(Arc::ptr_eq(&authority.failure().await, &first));
        }
        assert_eq!(begin.elapsed(), SECOND / 2);
        assert_eq!(authority.exchanges(), 1);
        assert_eq!(first.retry_after(), None, "nothing that waiting would mend");
        assert!(Arc::ptr_eq(&authority.source.last_error().unwrap(), &first));
        sleep(60 * SECOND).await;
        assert!((4..=6).contains(&authority.exchanges()), "{}", authority.exchanges());
    }

    #[tokio::test(start_paused = true)]
    async fn a_start_without_entra_heals_by_itself() {
        let authority = Authority::new(|number| if number < 4 { down() } else { Step::Token { life: 3600 } });
        let failure = authority.failure().await;
        assert!(failure.retryable());
        let retry_after = failure.retry_after().unwrap();
        assert!(retry_after > SECOND && retry_after <= 2 * SECOND, "{retry_after:?}");
        sleep(20 * SECOND).await;
        assert!(authority.source.is_healthy());
        assert!(authority.source.last_error().is_none());
        let stats = authority.source.stats();
        assert_eq!((stats.succeeded, stats.failed_transient, stats.failed_configuration), (1, 3, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_server_refreshes_at_half_life_while_callers_get_the_old_token() {
        let authority = Authority::new(|_| Step::Token { life: 3600 });
        assert_eq!(authority.token().await, 1);
        sleep(1_600 * SECOND).await;
        assert_eq!(authority.exchanges(), 1);
        let mut begun = 0;
        while authority.token().await == 1 {
            begun = begun.max(authority.exchanges());
            let before = Instant::now();
            assert!(authority.source.token().await.is_ok());
            assert_eq!(before.elapsed(), Duration::ZERO, "a caller waited for a refresh");
            sleep(SECOND / 10).await;
        }
        assert_eq!(begun, 2, "the old token was not served during the refresh");
        let age = authority.source.stats().age.unwrap();
        assert!(age < SECOND, "{age:?}");
        sleep(24 * 3_600 * SECOND).await;
        assert!((45..=55).contains(&authority.exchanges()), "{}", authority.exchanges());
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_fails_no_call_while_the_token_lives_and_every_call_after() {
        let authority = Authority::new(|number| if number == 1 { Step::Token { life: 600 } } else { down() });
        assert_eq!(authority.token().await, 1);
        let begin = Instant::now();
        while begin.elapsed() < 594 * SECOND {
            assert_eq!(authority.token().await, 1);
            sleep(SECOND / 2).await;
        }
        assert!(authority.source.is_healthy() && authority.source.last_error().is_some());
        assert!(authority.exchanges() < 25, "{}", authority.exchanges());
        sleep(2 * SECOND).await;
        assert!(!authority.source.is_healthy());
        assert_eq!(authority.failure().await.status(), Some(StatusCode::INTERNAL_SERVER_ERROR));
    }

    #[tokio::test(start_paused = true)]
    async fn a_hanging_authority_stalls_no_call_while_the_token_lives() {
        let authority = Authority::new(|number| if number == 1 { Step::Token { life: 60 } } else { Step::Hang });
        assert_eq!(authority.token().await, 1);
        let begin = Instant::now();
        while begin.elapsed() < 54 * SECOND {
            let before = Instant::now();
            assert_eq!(authority.token().await, 1);
            assert_eq!(before.elapsed(), Duration::ZERO);
            sleep(SECOND / 10).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn callers_who_leave_stop_nothing() {
        let authority = Authority::new(|number| if number == 1 { Step::Hang } else { Step::Token { life: 3600 } });
        for _ in 0..26 {
            assert!(timeout(3 * SECOND / 10, authority.source.token()).await.is_err());
        }
        assert_eq!(authority.exchanges(), 1);
        assert_eq!(authority.failure().await.class(), FaultClass::Timeout);
        sleep(3 * SECOND).await;
        assert_eq!(authority.token().await, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_in_the_exchange_is_one_failure() {
        let authority = Authority::new(|number| if number == 1 { Step::Panic } else { Step::Token { life: 3600 } });
        assert_eq!(authority.failure().await.class(), FaultClass::Internal);
        sleep(3 * SECOND).await;
        assert_eq!(authority.token().await, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_rejected_token_is_replaced_once_in_thirty_seconds() {
        let authority = Authority::new(|_| Step::Token { life: 3600 });
        let first = authority.source.token().await.unwrap();
        for _ in 0..100 {
            assert!(authority.source.reject(&first), "another token is on its way");
        }
        let second = authority.source.replacement(&first).await.unwrap();
        assert_eq!(number(&second), 2);
        assert!(authority.source.reject(&first), "a newer token is here");
        for _ in 0..100 {
            assert!(!authority.source.reject(&second), "too soon for another refresh");
        }
        assert_eq!(authority.token().await, 2);
        sleep(31 * SECOND).await;
        assert!(authority.source.reject(&second));
        assert_eq!(number(&authority.source.replacement(&second).await.unwrap()), 3);
        sleep(60 * SECOND).await;
        assert_eq!((authority.exchanges(), authority.source.stats().forced), (3, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn a_rejected_token_serves_until_it_is_replaced_and_the_rejected_call_waits_for_that() {
        let authority = Authority::new(|_| Step::Token { life: 3600 });
        let first = authority.source.token().await.unwrap();
        assert!(authority.source.reject(&first));
        let begin = Instant::now();
        assert!(Arc::ptr_eq(&authority.source.token().await.unwrap(), &first));
        assert!(authority.source.is_healthy() && begin.elapsed() == Duration::ZERO);
        assert_eq!(number(&authority.source.replacement(&first).await.unwrap()), 2);
        assert_eq!((begin.elapsed(), authority.token().await), (SECOND / 2, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn a_rejected_token_that_entra_does_not_replace_is_kept_and_fails_the_rejected_call_with_entras_reason() {
        let authority = Authority::new(|number| match number {
            1 => Step::Token { life: 60 },
            2..=4 => down(),
            _ => Step::Token { life: 3600 },
        });
        let token = authority.source.token().await.unwrap();
        assert!(authority.source.reject(&token));
        let failure = authority.source.replacement(&token).await.unwrap_err();
        assert_eq!(failure.status(), Some(StatusCode::INTERNAL_SERVER_ERROR));
        assert!(!authority.source.reject(&token), "nothing to expect during a cool-down");
        // Entra is asked again and again, and not only at the token's half-life.
        let begin = Instant::now();
        while authority.token().await == 1 {
            sleep(SECOND / 10).await;
        }
        assert!(begin.elapsed() < 20 * SECOND, "{:?}", begin.elapsed());
        let stats = authority.source.stats();
        assert_eq!((authority.token().await, stats.forced, stats.failed_transient), (5, 1, 3));
    }

    #[tokio::test(start_paused = true)]
    async fn a_rejected_token_that_nobody_replaces_ends_when_it_expires() {
        let authority = Authority::new(|number| if number == 1 { Step::Token { life: 60 } } else { wrong_secret() });
        let token = authority.source.token().await.unwrap();
        assert!(authority.source.reject(&token));
        sleep(54 * SECOND).await;
        assert_eq!(authority.token().await, 1);
        sleep(2 * SECOND).await;
        assert_eq!(authority.failure().await.status(), Some(StatusCode::UNAUTHORIZED));
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_rejected_while_entra_is_away_is_kept() {
        let authority = Authority::new(|number| if number == 1 { Step::Token { life: 3600 } } else { down() });
        let token = authority.source.token().await.unwrap();
        while authority.source.last_error().is_none() {
            sleep(SECOND).await;
        }
        let exchanges = authority.exchanges();
        assert!(!authority.source.reject(&token));
        assert_eq!(authority.token().await, 1);
        assert_eq!(authority.exchanges(), exchanges);
    }

    #[tokio::test(start_paused = true)]
    async fn tokens_with_short_lives_are_used_and_cause_no_storm() {
        let authority = Authority::new(|_| Step::Token { life: 8 });
        let begin = Instant::now();
        while begin.elapsed() < 60 * SECOND {
            authority.token().await;
            sleep(SECOND / 10).await;
        }
        assert!((12..=18).contains(&authority.exchanges()), "{}", authority.exchanges());
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_that_is_dropped_asks_no_more() {
        let authority = Authority::new(|_| down());
        authority.failure().await;
        let Authority { source, exchanges } = authority;
        drop(source);
        sleep(600 * SECOND).await;
        assert_eq!(exchanges.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn the_cool_down_doubles_up_to_thirty_seconds_and_honours_entras_wish_up_to_five_minutes() {
        let transient = answered(StatusCode::SERVICE_UNAVAILABLE);
        for (failures, longest) in [(1, 2), (2, 4), (3, 8), (4, 16), (5, 30), (6, 30), (u32::MAX, 30)] {
            let pause = cool_down(&transient, failures);
            assert!(pause <= longest * SECOND && pause >= longest * SECOND * 8 / 10, "{failures}: {pause:?}");
        }
        assert!(cool_down(&answered(StatusCode::UNAUTHORIZED), 9) <= 15 * SECOND);
        for (asked, granted) in [(60, 60), (300, 300), (3_600, 300), (u64::MAX, 300)] {
            let throttled =
                IdentityError { pause: Some(Duration::from_secs(asked)), ..*answered(StatusCode::TOO_MANY_REQUESTS) };
            assert_eq!(cool_down(&throttled, 1), granted * SECOND, "{asked}");
        }
    }

    #[test]
    fn a_token_shows_itself_in_no_debug_output() {
        let token = BearerToken::new("canary", Instant::now(), SECOND).unwrap();
        assert!(token.authorization().is_sensitive());
        assert!(!format!("{token:?} {:?}", token.authorization()).contains("canary"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_without_a_driver_has_its_one_token_and_no_other() {
        let token = BearerToken::new("only", Instant::now(), 60 * SECOND).unwrap();
        let source = TokenSource::holding(token, "client secret");
        let only = source.token().await.unwrap();
        assert_eq!(only.authorization(), "Bearer only");
        assert!(!source.reject(&only) && source.is_healthy());
        tokio::time::advance(60 * SECOND).await;
        assert_eq!(source.token().await.unwrap_err().class(), FaultClass::Parse);
    }
}
