//! The keys that a tenant signs its tokens with: fetched at start, every hour, and once more for a key id that nobody knows.
//!
//! One background task per tenant fetches; requests read what is held with one atomic load. The last good set is kept through
//! an outage, for a day; an odd key does not spoil a set, and a set without usable keys never replaces one that has some.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use jsonwebtoken::{DecodingKey, DecodingKeyKind};
use serde_json::Value;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;
use tracing::{Instrument as _, error_span, info, warn};
use url::Url;

/// Between two fetches when all is well, ± 10 %.
const REFRESH: Duration = Duration::from_secs(3600);
/// How long a set is used that cannot be renewed: revoked keys must not live for ever.
const LONGEST_USE: Duration = Duration::from_secs(24 * 3600);
/// Between two fetches that unknown key ids cause: whoever makes key ids up must not be able to make us ask Entra.
const LEAST_PAUSE: Duration = Duration::from_secs(300);
/// After a failure: doubles from the first to the last.
const FIRST_COOL_DOWN: Duration = Duration::from_secs(5);
const LAST_COOL_DOWN: Duration = Duration::from_secs(30);
/// One fetch, and how long a request waits for one.
const FETCH: Duration = Duration::from_secs(5);
const CONNECT: Duration = Duration::from_secs(3);
/// Requests that may wait for a fetch. When Entra signs with a key that is new to us the first callers do; the others, like those who
/// make key ids up, are to come again.
pub(super) const WAITING: usize = 64;
/// Entra's sets have some ten KiB, with certificates.
const MAX_BODY: usize = 512 * 1024;
const MAX_KEYS: usize = 64;
/// 2048 to 8192 bits: what the verification takes.
const MODULUS_BYTES: std::ops::RangeInclusive<usize> = 256..=1024;

/// Where the keys of a tenant come from.
pub(super) trait KeySource: Send + Sync + 'static {
    /// The document as it came, within bounds.
    fn fetch<'a>(&'a self, tenant: &'a str) -> BoxFuture<'a, Result<Vec<u8>, String>>;
}

/// The tenants' own endpoint at the authority, over HTTPS.
pub(super) struct KeyEndpoint {
    client: reqwest::Client,
    authority: Url,
}

impl KeyEndpoint {
    pub(super) fn new(authority: &Url, extra_ca: Vec<reqwest::Certificate>) -> reqwest::Result<Self> {
        let client = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none()) // whoever could redirect us would choose the keys
            .connect_timeout(CONNECT)
            .timeout(FETCH)
            .pool_max_idle_per_host(0) // fetches are an hour apart
            .tls_certs_merge(extra_ca)
            .build()?;
        Ok(Self { client, authority: authority.clone() })
    }

    async fn get(&self, path: String) -> Result<Vec<u8>, String> {
        let mut url = self.authority.clone();
        url.set_path(&path);
        let mut response = self.client.get(url).send().await.map_err(root_cause)?;
        if !response.status().is_success() {
            return Err(format!("HTTP {}", response.status().as_u16()));
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(root_cause)? {
            if body.len() + chunk.len() > MAX_BODY {
                return Err(format!("the answer is larger than {MAX_BODY} bytes"));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }

    /// How many keys a tenant publishes that can be used, once it has said that its tokens have this issuer.
    pub(super) async fn inspect(&self, tenant: &str, issuer: &str) -> Result<usize, String> {
        let document = self.get(format!("{tenant}/v2.0/.well-known/openid-configuration")).await?;
        let document: Value = serde_json::from_slice(&document).map_err(|_| "the answer is not JSON")?;
        match document.get("issuer").and_then(Value::as_str) {
            Some(named) if named == issuer => {}
            Some(named) if named.len() <= 200 && named.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'`') => {
                return Err(format!("its tokens have the issuer `{named}`, and `{issuer}` is expected"));
            }
            _ => return Err("the authority does not say which issuer its tokens have".to_owned()),
        }
        Ok(parse(&self.fetch(tenant).await?, tenant, issuer)?.len())
    }
}

impl KeySource for KeyEndpoint {
    fn fetch<'a>(&'a self, tenant: &'a str) -> BoxFuture<'a, Result<Vec<u8>, String>> {
        Box::pin(self.get(format!("{tenant}/discovery/v2.0/keys")))
    }
}

fn root_cause(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut root: &dyn std::error::Error = &error;
    while let Some(source) = root.source() {
        root = source;
    }
    root.to_string()
}

/// One key that may sign.
pub(super) struct Key {
    pub(super) id: String,
    pub(super) decoding: DecodingKey,
    /// Whether the key says itself that it is for this tenant's issuer, or says nothing about it.
    pub(super) issuer_fits: bool,
}

#[cfg(test)]
impl Key {
    /// One that signs nothing.
    pub(super) fn any() -> Arc<Self> {
        Arc::new(Self { id: String::new(), decoding: DecodingKey::from_secret(b""), issuer_fits: true })
    }
}

struct KeySet {
    keys: HashMap<String, Arc<Key>>,
    use_until: Instant,
}

/// Why nothing can be said about a token now.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Undecided {
    /// There are no keys to check anything with.
    NoKeys,
    /// Its key may be among those that are being fetched, and as many requests as may wait for them already.
    Crowded,
}

/// The keys of one tenant. Dropping it stops the background work.
pub(super) struct TenantKeys {
    state: Arc<State>,
    _driver: AbortOnDropHandle<()>,
}

struct State {
    held: ArcSwapOption<KeySet>,
    progress: watch::Sender<Progress>,
    wanted: Notify,
    room: Semaphore,
}

/// What a request with an unknown key id has to know.
struct Progress {
    /// A fetch runs, or has been asked for.
    running: bool,
    /// How many have ended.
    rounds: u64,
    /// Before this, nobody may ask for another.
    may_ask_at: Instant,
}

impl TenantKeys {
    /// Begins to fetch, and does not wait for it. `issuer` is what the tenant's version 2 tokens have as `iss`. Needs a tokio
    /// runtime.
    pub(super) fn start(source: Arc<dyn KeySource>, tenant: String, issuer: String) -> Self {
        let progress = Progress { running: true, rounds: 0, may_ask_at: Instant::now() };
        let state = Arc::new(State {
            held: ArcSwapOption::empty(),
            progress: watch::Sender::new(progress),
            wanted: Notify::new(),
            room: Semaphore::new(WAITING),
        });
        let span = error_span!("signing_keys", tenant);
        let driver = drive(Arc::clone(&state), source, tenant, issuer).instrument(span);
        Self { state, _driver: AbortOnDropHandle::new(tokio::spawn(driver)) }
    }

    /// Whether tokens of this tenant can be checked.
    pub(super) fn has_keys(&self) -> bool {
        self.state.usable().is_some()
    }

    /// Whether this very key, and not one of the same name, is held and may be used.
    pub(super) fn hold(&self, key: &Arc<Key>) -> bool {
        self.state.look(&key.id).is_ok_and(|held| held.is_some_and(|held| Arc::ptr_eq(&held, key)))
    }

    /// The key with this id: at once if it is held; after one fetch if nobody has seen it, it is time for one, and
    /// there is room to wait.
    pub(super) async fn find(&self, kid: &str) -> Result<Option<Arc<Key>>, Undecided> {
        if let Some(key) = self.state.look(kid)? {
            return Ok(Some(key));
        }
        let mut progress = self.state.progress.subscribe();
        let rounds = progress.borrow_and_update().rounds;
        if !self.state.ask_for_more() {
            return Ok(None);
        }
        let _room = self.state.room.try_acquire().map_err(|_full| Undecided::Crowded)?;
        let _ = timeout(FETCH, progress.wait_for(|progress| progress.rounds != rounds)).await;
        self.state.look(kid)
    }
}

impl State {
    fn usable(&self) -> Option<arc_swap::Guard<Option<Arc<KeySet>>>> {
        let held = self.held.load();
        let usable = held.as_ref().is_some_and(|set| Instant::now() < set.use_until);
        usable.then_some(held)
    }

    fn look(&self, kid: &str) -> Result<Option<Arc<Key>>, Undecided> {
        let held = self.usable().ok_or(Undecided::NoKeys)?;
        Ok(held.as_ref().and_then(|set| set.keys.get(kid)).map(Arc::clone))
    }

    /// Whether a fetch is under way, or now is: many who ask get the same one.
    fn ask_for_more(&self) -> bool {
        let mut under_way = false;
        self.progress.send_if_modified(|progress| {
            let asks = !progress.running && Instant::now() >= progress.may_ask_at;
            if asks {
                progress.running = true;
                progress.may_ask_at = Instant::now() + LEAST_PAUSE;
                self.wanted.notify_one();
            }
            under_way = progress.running;
            false // nobody waits for the question
        });
        under_way
    }
}

async fn drive(state: Arc<State>, source: Arc<dyn KeySource>, tenant: String, issuer: String) {
    let mut cool_down = FIRST_COOL_DOWN;
    loop {
        let fetch = AssertUnwindSafe(timeout(FETCH, source.fetch(&tenant))).catch_unwind();
        let fetched = match fetch.await {
            Ok(Ok(Ok(document))) => parse(&document, &tenant, &issuer),
            Ok(Ok(Err(why))) => Err(why),
            Ok(Err(_elapsed)) => Err(format!("no answer within {FETCH:?}")),
            Err(_panic) => Err("a bug in this server: see the log before this".to_owned()),
        };
        let (pause, may_ask_in) = match fetched {
            Ok(keys) => {
                let before = state.held.load();
                let same = before.as_ref().is_some_and(|set| {
                    set.keys.len() == keys.len() && keys.keys().all(|kid| set.keys.contains_key(kid))
                });
                if !same {
                    info!("the signing keys of tenant `{tenant}` are known: {}", keys.len());
                }
                state.held.store(Some(Arc::new(KeySet { keys, use_until: Instant::now() + LONGEST_USE })));
                cool_down = FIRST_COOL_DOWN;
                (REFRESH.mul_f64(0.9 + 0.2 * fastrand::f64()), None)
            }
            Err(why) => {
                let meanwhile = if state.usable().is_some() {
                    "those that are known go on serving"
                } else {
                    "until there are some, every caller is answered with 503"
                };
                warn!("cannot fetch the keys that tenant `{tenant}` signs its tokens with: {why}; {meanwhile}");
                let pause = cool_down;
                cool_down = (cool_down * 2).min(LAST_COOL_DOWN);
                (pause, Some(pause))
            }
        };
        state.progress.send_modify(|progress| {
            progress.running = false;
            progress.rounds = progress.rounds.wrapping_add(1);
            if let Some(may_ask_in) = may_ask_in {
                // Nothing was learned, so the question may be put again sooner.
                progress.may_ask_at = Instant::now() + may_ask_in;
            }
        });
        let _ = timeout(pause, state.wanted.notified()).await;
        state.progress.send_if_modified(|progress| {
            progress.running = true;
            false
        });
    }
}

/// The usable keys of a document, entry by entry: what cannot be used costs only itself.
pub(super) fn parse(document: &[u8], tenant: &str, issuer: &str) -> Result<HashMap<String, Arc<Key>>, String> {
    let document: Value = serde_json::from_slice(document).map_err(|_| "the answer is not JSON")?;
    let entries = document.get("keys").and_then(Value::as_array).ok_or("the answer has no list of keys")?;
    let mut keys = HashMap::new();
    for key in entries.iter().filter_map(|entry| usable_key(entry, tenant, issuer)).take(MAX_KEYS) {
        keys.entry(key.id.clone()).or_insert_with(|| Arc::new(key));
    }
    if keys.is_empty() {
        return Err(format!("none of the {} entries is a usable RSA key", entries.len()));
    }
    Ok(keys)
}

fn usable_key(entry: &Value, tenant: &str, issuer: &str) -> Option<Key> {
    let text = |name: &str| entry.get(name).and_then(Value::as_str);
    // Entra's keys have no `alg`.
    let signs_so = entry.get("kty")?.as_str()? == "RSA"
        && entry.get("use").is_none_or(|usage| usage == "sig")
        && entry.get("alg").is_none_or(|algorithm| algorithm == "RS256");
    let kid = text("kid").filter(|kid| signs_so && (1..=256).contains(&kid.len()))?;
    let decoding = DecodingKey::from_rsa_components(text("n")?, text("e")?).ok()?;
    let DecodingKeyKind::RsaModulusExponent { n, e } = decoding.kind() else { return None };
    if !MODULUS_BYTES.contains(&n.len()) || !(1..=8).contains(&e.len()) {
        return None;
    }
    let issuer_fits = match entry.get("issuer") {
        None => true,
        Some(of_the_key) => of_the_key.as_str().is_some_and(|of| of.replace("{tenantid}", tenant) == issuer),
    };
    Some(Key { id: kid.to_owned(), decoding, issuer_fits })
}
