//! Tokens for the backend in the name of the user who calls: the caller's own token is exchanged for one (OAuth 2.0 On-Behalf-Of).
//!
//! What is held is found by (tenant, user, the caller's token, scope) and by nothing less, so that nobody can get the token of
//! another. It is bounded in number; who is not asked for is forgotten first. As with the server's own token an exchange runs in a
//! task of its own, one at a time for each key, everyone who waits shares how it ended, and a failure stands for a while. No lock is
//! held while Entra is asked. Nothing is refreshed ahead: a caller's token rarely outlives what it was exchanged for.

#[cfg(test)]
mod properties;

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use http::StatusCode;
use quick_cache::sync::Cache;
use secrecy::{ExposeSecret as _, SecretString};
use sha2::{Digest as _, Sha256};
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tracing::{Instrument as _, debug, error_span};
use url::form_urlencoded;
use uuid::Uuid;

use super::chain::{self, IdentityStartError, read_assertion};
use super::fault::{FaultClass, IdentityError, log_failure};
use super::source::{BearerToken, FORCED_PAUSE, budget, cool_down};
use super::transport::{self, EntraTransport};
use crate::settings::{Credential, IdentitySettings};

/// Users, each with one of their tokens, that are remembered: 10,000 tokens of Entra take some 30 MB.
const REMEMBERED: usize = 10_000;
/// Exchanges at the same time; more are refused at once, and may be tried again.
const EXCHANGES_AT_ONCE: usize = 512;
/// Connections to Entra that are kept for the next user.
const IDLE_CONNECTIONS: usize = 8;
const GRANT: &str = "urn:ietf:params:oauth:grant-type:jwt-bearer";
const CLIENT_ASSERTION: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";

/// A user who calls, and the token by which they do: it proves to Entra that we may act for them.
pub struct UserAssertion {
    tenant: String,
    object: String,
    token: SecretString,
}

impl UserAssertion {
    /// `tenant` and `object` as a checked token has them (`tid`, `oid`), and that token.
    pub fn new(tenant: &str, object: &str, token: SecretString) -> Self {
        Self { tenant: tenant.to_owned(), object: object.to_owned(), token }
    }
}

impl fmt::Debug for UserAssertion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UserAssertion").finish_non_exhaustive()
    }
}

/// The one holder of tokens for users.
pub struct OnBehalfOf {
    credential: &'static str,
    scope: String,
    exchange: Exchange,
    seats: Cache<Key, Arc<Seat>>,
    flights: Arc<Semaphore>,
    /// Entra's wish to be left in peace (429), which it utters to one and means for all.
    throttled: Arc<Mutex<Option<Arc<IdentityError>>>>,
}

type Exchange = Box<dyn Fn(Arc<UserAssertion>) -> BoxFuture<'static, Answer> + Send + Sync>;
type Answer = Result<BearerToken, Box<IdentityError>>;
type Outcome = Result<Arc<BearerToken>, Arc<IdentityError>>;

/// SHA-256 over everything that a token belongs to, each part with its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key([u8; 32]);

/// The place of one key.
#[derive(Default)]
struct Seat(Mutex<Seated>);

#[derive(Default)]
struct Seated {
    held: Option<Arc<BearerToken>>,
    /// The exchange that runs.
    flight: Option<watch::Receiver<Option<Outcome>>>,
    /// Why the last exchange failed, if it did.
    failure: Option<Arc<IdentityError>>,
    failures: u32,
    forced_at: Option<Instant>,
}

impl Seat {
    fn lock(&self) -> MutexGuard<'_, Seated> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OnBehalfOf {
    /// Sets up the way to Entra; asks nobody yet. `call_timeout` is what a caller has in all.
    ///
    /// # Errors
    ///
    /// When no HTTPS client can be built, or the extra certificate authority is none.
    pub fn new(settings: &IdentitySettings, call_timeout: Duration) -> Result<Self, IdentityStartError> {
        let credential = match &settings.credential {
            Credential::WorkloadIdentity { .. } => "on-behalf-of with workload identity",
            Credential::ClientSecret { .. } => "on-behalf-of with client secret",
        };
        let client =
            transport::client(chain::extra_ca(settings)?, IDLE_CONNECTIONS).map_err(IdentityStartError::Client)?;
        let way = Arc::new(Way {
            settings: settings.clone(),
            credential,
            transport: EntraTransport::new(client, credential),
            budget: budget(call_timeout),
        });
        let exchange = move |user: Arc<UserAssertion>| {
            let way = Arc::clone(&way);
            async move { way.exchange(&user).await }.boxed()
        };
        Ok(Self::with_exchange(credential, &settings.scopes.join(" "), REMEMBERED, Box::new(exchange)))
    }

    fn with_exchange(credential: &'static str, scope: &str, remembered: usize, exchange: Exchange) -> Self {
        Self {
            credential,
            scope: scope.to_owned(),
            exchange,
            seats: Cache::new(remembered),
            flights: Arc::new(Semaphore::new(EXCHANGES_AT_ONCE)),
            throttled: Arc::default(),
        }
    }

    /// A token for this user; at once if one is held. Else waits for the exchange in flight, beginning it if need be, or fails as the
    /// last one did while its cool-down lasts. The caller bounds the wait: dropping the future stops nothing.
    ///
    /// # Errors
    ///
    /// When Entra gives no token for this user, or is asked for too many at once.
    pub async fn token(&self, user: &Arc<UserAssertion>) -> Outcome {
        self.obtain(user, |_| true).await
    }

    /// The same, but a token other than this one, which the backend rejected: for the call whose rejection [`reject`](Self::reject)
    /// has answered with `true`.
    ///
    /// # Errors
    ///
    /// As [`token`](Self::token).
    pub async fn replacement(&self, user: &Arc<UserAssertion>, rejected: &Arc<BearerToken>) -> Outcome {
        self.obtain(user, |token| !Arc::ptr_eq(token, rejected)).await
    }

    async fn obtain(&self, user: &Arc<UserAssertion>, accepts: impl Fn(&Arc<BearerToken>) -> bool) -> Outcome {
        let Ok(seat) =
            self.seats.get_or_insert_with(&self.key(user), || Ok::<_, std::convert::Infallible>(Arc::default()));
        let mut flight = {
            let mut seated = seat.lock();
            if let Some(token) = seated.usable().filter(|token| accepts(token)) {
                return Ok(Arc::clone(token));
            }
            match (&seated.flight, seated.cooling()) {
                (Some(flight), _) => flight.clone(),
                (None, Some(error)) => return Err(Arc::clone(error)),
                (None, None) => self.start(&seat, &mut seated, user)?,
            }
        };
        match flight.wait_for(Option::is_some).await.ok().and_then(|outcome| outcome.clone()) {
            Some(outcome) => outcome,
            None => Err(Arc::new(self.fault(FaultClass::Internal, "the exchange was given up"))),
        }
    }

    /// The backend answered 401 to this token: begins to replace it, and it alone, if it is still held, and keeps it meanwhile.
    /// Returns whether a different token may be expected. At most once in 30 s for each user: a backend that rejects every token must
    /// not turn calls into exchanges.
    pub fn reject(&self, user: &Arc<UserAssertion>, token: &Arc<BearerToken>) -> bool {
        let Some(seat) = self.seats.get(&self.key(user)) else { return true };
        let mut seated = seat.lock();
        if seated.flight.is_some() {
            return true;
        }
        if seated.cooling().is_some() {
            return false;
        }
        if seated.held.as_ref().is_none_or(|held| !Arc::ptr_eq(held, token)) {
            return true;
        }
        let now = Instant::now();
        // After a forced exchange that failed its cool-down decides, and that is over.
        let too_soon = seated.forced_at.is_some_and(|at| now.duration_since(at) < FORCED_PAUSE);
        if (too_soon && seated.failure.is_none()) || self.start(&seat, &mut seated, user).is_err() {
            return false;
        }
        seated.forced_at = Some(now);
        true
    }

    /// How many users are remembered, with a token, a failure or an exchange.
    pub fn remembered(&self) -> usize {
        self.seats.len()
    }

    /// Begins the exchange for a seat, which settles when it ends. The seat's lock is held: this only spawns.
    fn start(
        &self,
        seat: &Arc<Seat>,
        seated: &mut Seated,
        user: &Arc<UserAssertion>,
    ) -> Result<watch::Receiver<Option<Outcome>>, Arc<IdentityError>> {
        if let Some(error) = &*self.throttled.lock().unwrap_or_else(PoisonError::into_inner)
            && error.retry_at.is_some_and(|at| Instant::now() < at)
        {
            return Err(Arc::clone(error));
        }
        let Ok(permit) = Arc::clone(&self.flights).try_acquire_owned() else {
            let error = self.fault(FaultClass::Internal, "as many exchanges are running as may run at the same time");
            return Err(Arc::new(IdentityError { retry_at: Some(Instant::now() + Duration::from_secs(1)), ..error }));
        };
        let (tell, flight) = watch::channel(None);
        let (seat, exchange) = (Arc::clone(seat), (self.exchange)(Arc::clone(user)));
        let (credential, throttled) = (self.credential, Arc::clone(&self.throttled));
        let flight_of_one = async move {
            let fault = |class, detail: &str| Box::new(IdentityError::new(class, credential).with_detail(detail));
            let answer = AssertUnwindSafe(exchange).catch_unwind().await;
            let answer = answer.unwrap_or_else(|_| Err(fault(FaultClass::Internal, "the exchange panicked")));
            let answer = answer.and_then(|token| match token.is_usable(Instant::now()) {
                true => Ok(token),
                false => Err(fault(FaultClass::Parse, "the token had expired before it arrived")),
            });
            let outcome = seat.lock().settle(answer);
            if let Err(error) = &outcome
                && error.status == Some(StatusCode::TOO_MANY_REQUESTS)
            {
                *throttled.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(error));
            }
            report(&outcome);
            drop(permit);
            let _ = tell.send(Some(outcome));
        };
        // A task of its own: a caller who leaves must not end the exchange of those who stay.
        tokio::spawn(flight_of_one.instrument(error_span!("exchange")));
        seated.flight = Some(flight.clone());
        Ok(flight)
    }

    fn key(&self, user: &UserAssertion) -> Key {
        let mut hash = Sha256::new();
        for part in [&user.tenant, &user.object, user.token.expose_secret(), &self.scope] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Key(hash.finalize().into())
    }

    fn fault(&self, class: FaultClass, detail: &str) -> IdentityError {
        IdentityError::new(class, self.credential).with_detail(detail)
    }
}

impl fmt::Debug for OnBehalfOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnBehalfOf").field("credential", &self.credential).finish_non_exhaustive()
    }
}

impl Seated {
    fn usable(&self) -> Option<&Arc<BearerToken>> {
        self.held.as_ref().filter(|token| token.is_usable(Instant::now()))
    }

    /// The failure whose cool-down lasts.
    fn cooling(&self) -> Option<&Arc<IdentityError>> {
        self.failure.as_ref().filter(|error| error.retry_at.is_some_and(|at| Instant::now() < at))
    }

    fn settle(&mut self, answer: Answer) -> Outcome {
        self.flight = None;
        match answer {
            Ok(token) => {
                let token = Arc::new(token);
                self.failures = 0;
                self.failure = None;
                self.held = Some(Arc::clone(&token));
                Ok(token)
            }
            Err(mut error) => {
                self.failures = self.failures.saturating_add(1);
                error.retry_at = Some(Instant::now() + cool_down(&error, self.failures));
                let error = Arc::<IdentityError>::from(error);
                self.failure = Some(Arc::clone(&error));
                Err(error)
            }
        }
    }
}

fn report(outcome: &Outcome) {
    match outcome {
        Ok(token) => debug!(
            identity.token_life_s = token.life().as_secs(),
            "got a token on behalf of a user, good for {} s",
            token.life().as_secs()
        ),
        Err(failure) => {
            log_failure!(
                warn,
                failure,
                "{failure}; calls of this user fail unless a token is held. {}",
                failure.hint()
            );
        }
    }
}

/// The way to Entra, made once.
struct Way {
    settings: IdentitySettings,
    credential: &'static str,
    transport: Arc<EntraTransport>,
    budget: Duration,
}

impl Way {
    async fn exchange(&self, user: &UserAssertion) -> Answer {
        let request_id = Uuid::new_v4().to_string();
        let answer = chain::with_one_retry(self.budget, self.credential, || self.attempt(user, &request_id)).await;
        answer.map_err(|mut error| {
            error.correlation_id.get_or_insert(request_id);
            error
        })
    }

    async fn attempt(&self, user: &UserAssertion, request_id: &str) -> Answer {
        let fault = |class, detail| Box::new(IdentityError::new(class, self.credential).with_detail(detail));
        let federated = match &self.settings.credential {
            Credential::WorkloadIdentity { token_file } => Some(
                read_assertion(token_file)
                    .await
                    .map_err(|error| IdentityError { credential: self.credential, ..error })?,
            ),
            Credential::ClientSecret { .. } => None,
        };
        let form = self.form(user, federated.as_deref());
        // The tenant of the user, where the app was consented to; it stands in a path, so it has to be what Entra's tenants are.
        let tenant = Uuid::try_parse(&user.tenant)
            .map_err(|_| fault(FaultClass::Config, "the tenant of the caller's token is no GUID"))?;
        let mut endpoint = self.settings.authority.clone();
        endpoint.set_path(&format!("{tenant}/oauth2/v2.0/token"));

        // Entra counts the life from some moment after this one, so we never believe in a token for too long.
        let sent = Instant::now();
        let (secret, life) = self.transport.token(endpoint, form, request_id).await?;
        BearerToken::new(secret.expose_secret(), sent, life)
            .ok_or_else(|| fault(FaultClass::Parse, "the token fits no header"))
    }

    fn form(&self, user: &UserAssertion, federated: Option<&str>) -> String {
        let mut form = form_urlencoded::Serializer::new(String::new());
        form.append_pair("grant_type", GRANT)
            .append_pair("requested_token_use", "on_behalf_of")
            .append_pair("client_id", &self.settings.client_id)
            .append_pair("assertion", user.token.expose_secret())
            .append_pair("scope", &self.settings.scopes.join(" "));
        if let Credential::ClientSecret { secret } = &self.settings.credential {
            form.append_pair("client_secret", secret.expose_secret());
        }
        if let Some(assertion) = federated {
            form.append_pair("client_assertion_type", CLIENT_ASSERTION).append_pair("client_assertion", assertion);
        }
        form.finish()
    }
}
