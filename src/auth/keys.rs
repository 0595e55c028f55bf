//! The issuers of a tenant's tokens and the keys that sign them: fetched at start, every hour, and once more for a key id that nobody
//! knows.
//!
//! One background task per tenant fetches; requests read what is held with one atomic load. The last good set is kept through
//! an outage, for a day; an odd key does not spoil a set, and a set without usable keys never replaces one that has some. A key ends
//! when two fetches in a row lack it: a single thin answer, as one of many servers may give it, takes nobody's token away.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use futures_util::FutureExt as _;
use jsonwebtoken::{DecodingKey, DecodingKeyKind};
use serde_json::Value;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;
use tracing::{Instrument as _, error_span, info, warn};

use super::discovery::{DocumentSource, Documents, FETCH, Issuers, Version};

/// Between two fetches when all is well, ± 10 %.
const REFRESH: Duration = Duration::from_secs(3600);
/// How long a set is used that cannot be renewed: revoked keys must not live for ever.
const LONGEST_USE: Duration = Duration::from_secs(24 * 3600);
/// Between two fetches that unknown key ids cause: whoever makes key ids up must not be able to make us ask Entra. And after a fetch
/// that lacked a known key, so that a key that is really withdrawn ends soon.
const LEAST_PAUSE: Duration = Duration::from_secs(300);
/// After a failure: doubles from the first to the last.
const FIRST_COOL_DOWN: Duration = Duration::from_secs(5);
const LAST_COOL_DOWN: Duration = Duration::from_secs(30);
/// Requests that may wait for a fetch. When Entra signs with a key that is new to us the first callers do; the others, like those who
/// make key ids up, are to come again.
pub(super) const WAITING: usize = 64;
/// Of one document.
const MAX_KEYS: usize = 64;
/// 2048 to 8192 bits: what the verification takes.
const MODULUS_BYTES: std::ops::RangeInclusive<usize> = 256..=1024;

/// One key that may sign.
#[derive(Clone)]
pub(super) struct Key {
    pub(super) id: String,
    pub(super) decoding: DecodingKey,
    /// Whether the key says itself that it is for this tenant's issuer, or says nothing about it.
    issuer_fits: bool,
    /// Only version 1's metadata name the set that it is in.
    only_v1: bool,
}

impl Key {
    /// Whether it may sign tokens of this version.
    pub(super) fn may_sign(&self, version: Version) -> bool {
        self.issuer_fits && (version == Version::V1 || !self.only_v1)
    }
}

#[cfg(test)]
impl Key {
    /// One that signs nothing.
    pub(super) fn any() -> Arc<Self> {
        let decoding = DecodingKey::from_secret(b"");
        Arc::new(Self { id: String::new(), decoding, issuer_fits: true, only_v1: false })
    }
}

struct KeySet {
    issuers: Issuers,
    keys: HashMap<String, Entry>,
    use_until: Instant,
}

struct Entry {
    key: Arc<Key>,
    /// The last fetch lacked it; the next one that does ends it.
    missing: bool,
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
    /// Begins to fetch, and does not wait for it. Needs a tokio runtime.
    pub(super) fn start(source: Arc<dyn DocumentSource>, tenant: String) -> Self {
        let progress = Progress { running: true, rounds: 0, may_ask_at: Instant::now() };
        let state = Arc::new(State {
            held: ArcSwapOption::empty(),
            progress: watch::Sender::new(progress),
            wanted: Notify::new(),
            room: Semaphore::new(WAITING),
        });
        let span = error_span!("signing_keys", tenant);
        let driver = drive(Arc::clone(&state), source, tenant).instrument(span);
        Self { state, _driver: AbortOnDropHandle::new(tokio::spawn(driver)) }
    }

    /// Whether tokens of this tenant can be checked.
    pub(super) fn has_keys(&self) -> bool {
        self.state.usable().is_some()
    }

    /// In which version this issuer of the tenant writes; `None` also while nothing is known of the tenant.
    pub(super) fn version_of(&self, issuer: &str) -> Option<Version> {
        self.state.usable()?.as_ref()?.issuers.version_of(issuer)
    }

    /// The issuer of the tenant's version 2 tokens.
    pub(super) fn v2_issuer(&self) -> Option<String> {
        Some(self.state.usable()?.as_ref()?.issuers.v2.clone())
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
        Ok(held.as_ref().and_then(|set| set.keys.get(kid)).map(|entry| Arc::clone(&entry.key)))
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

async fn drive(state: Arc<State>, source: Arc<dyn DocumentSource>, tenant: String) {
    let mut cool_down = FIRST_COOL_DOWN;
    loop {
        let fetch = AssertUnwindSafe(timeout(FETCH, source.fetch(&tenant))).catch_unwind();
        let fetched = match fetch.await {
            Ok(Ok(Ok(documents))) => parse(&documents, &tenant).map(|keys| (documents.issuers, keys)),
            Ok(Ok(Err(why))) => Err(why),
            Ok(Err(_elapsed)) => Err(format!("no answer within {FETCH:?}")),
            Err(_panic) => Err("a bug in this server: see the log before this".to_owned()),
        };
        let (pause, may_ask_in) = match fetched {
            Ok((issuers, keys)) => {
                let before = state.usable();
                let before = before.as_ref().and_then(|set| set.as_ref()).filter(|set| set.issuers == issuers);
                let keys = merged(keys, before.map(|set| &set.keys));
                let missing = keys.values().filter(|entry| entry.missing).count();
                if before.is_none_or(|set| {
                    set.keys.len() != keys.len() || !set.keys.keys().all(|kid| keys.contains_key(kid))
                }) {
                    info!(
                        "the signing keys of tenant `{tenant}` are known: {}; its tokens have the issuer `{}`",
                        keys.len(),
                        issuers.v2
                    );
                }
                if missing > 0 {
                    info!(
                        "tenant `{tenant}` does not publish {missing} of its known signing keys any more: they end if the next fetch lacks them too"
                    );
                }
                state.held.store(Some(Arc::new(KeySet { issuers, keys, use_until: Instant::now() + LONGEST_USE })));
                cool_down = FIRST_COOL_DOWN;
                let regular = REFRESH.mul_f64(0.9 + 0.2 * fastrand::f64());
                (if missing > 0 { LEAST_PAUSE } else { regular }, None)
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

/// What was fetched, and what is missing from it for the first time. Every key is a new one, so that all tokens are checked anew.
fn merged(fetched: HashMap<String, Key>, before: Option<&HashMap<String, Entry>>) -> HashMap<String, Entry> {
    let missing = before.into_iter().flatten().filter(|(id, entry)| !entry.missing && !fetched.contains_key(*id));
    let missing: Vec<_> = missing.map(|(_, entry)| (Key::clone(&entry.key), true)).collect();
    let all = fetched.into_values().map(|key| (key, false)).chain(missing);
    all.map(|(key, missing)| (key.id.clone(), Entry { key: Arc::new(key), missing })).collect()
}

/// The usable keys of the documents, entry by entry: what cannot be used costs only itself.
pub(super) fn parse(documents: &Documents, tenant: &str) -> Result<HashMap<String, Key>, String> {
    let mut keys = parse_set(&documents.keys, tenant, &documents.issuers, false)?;
    if let Some(of_v1) = &documents.keys_of_v1 {
        for (id, key) in parse_set(of_v1, tenant, &documents.issuers, true)? {
            keys.entry(id).or_insert(key);
        }
    }
    Ok(keys)
}

fn parse_set(document: &[u8], tenant: &str, issuers: &Issuers, only_v1: bool) -> Result<HashMap<String, Key>, String> {
    let document: Value = serde_json::from_slice(document).map_err(|_| "the answer is not JSON")?;
    let entries = document.get("keys").and_then(Value::as_array).ok_or("the answer has no list of keys")?;
    let mut keys = HashMap::new();
    let usable = entries.iter().filter_map(|entry| usable_key(entry, tenant, issuers, only_v1));
    for key in usable.take(MAX_KEYS) {
        keys.entry(key.id.clone()).or_insert(key);
    }
    if keys.is_empty() {
        return Err(format!("none of the {} entries is a usable RSA key", entries.len()));
    }
    Ok(keys)
}

fn usable_key(entry: &Value, tenant: &str, issuers: &Issuers, only_v1: bool) -> Option<Key> {
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
    // Keys name version 2's issuer, also those that sign tokens of version 1.
    let issuer_fits = match entry.get("issuer") {
        None => true,
        Some(named) => {
            named.as_str().is_some_and(|named| issuers.version_of(&named.replace("{tenantid}", tenant)).is_some())
        }
    };
    Some(Key { id: kid.to_owned(), decoding, issuer_fits, only_v1 })
}
