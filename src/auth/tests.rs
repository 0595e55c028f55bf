//! Keys over a clock that is turned by hand, and the exact reason of each refusal.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use tokio::time::{Instant, advance};
use url::Url;

use super::discovery::{DocumentSource, Documents, Issuers};
use super::keys::{TenantKeys, Undecided, WAITING};
use super::*;
use crate::demo::entra::{API_APP_ID, DemoCaller, EntraOptions, StandInEntra, TENANT_ID, TokenVersion};
use crate::settings::EntraInbound;

const ISSUER: &str = "https://login.example/tenant/v2.0";
const MINUTE: Duration = Duration::from_secs(60);

/// Answers what it is told to, in turn, and the last for ever; counts.
#[derive(Default)]
struct Scripted {
    answers: Mutex<VecDeque<Answer>>,
    fetches: AtomicUsize,
}

#[derive(Clone)]
enum Answer {
    Keys(&'static [&'static str]),
    Text(&'static str),
    Fails,
    Hangs,
    Panics,
}

impl Scripted {
    fn new(answers: impl IntoIterator<Item = Answer>) -> Arc<Self> {
        Arc::new(Self { answers: Mutex::new(answers.into_iter().collect()), fetches: AtomicUsize::new(0) })
    }

    fn fetches(&self) -> usize {
        self.fetches.load(Relaxed)
    }
}

impl DocumentSource for Scripted {
    fn fetch<'a>(&'a self, _tenant: &'a str) -> BoxFuture<'a, Result<Documents, String>> {
        Box::pin(async {
            self.fetches.fetch_add(1, Relaxed);
            let answer = {
                let mut answers = self.answers.lock().unwrap();
                if answers.len() > 1 { answers.pop_front() } else { answers.front().cloned() }
            };
            let issuers = Issuers { v2: ISSUER.to_owned(), v1: None };
            let documents = |keys| Ok(Documents { issuers, keys, keys_of_v1: None });
            match answer.unwrap() {
                Answer::Keys(kids) => documents(document(kids).to_string().into_bytes()),
                Answer::Text(text) => documents(text.as_bytes().to_vec()),
                Answer::Fails => Err("HTTP 503".to_owned()),
                Answer::Hangs => std::future::pending().await,
                Answer::Panics => panic!("a bug"),
            }
        })
    }
}

fn document(kids: &[&str]) -> Value {
    let modulus = URL_SAFE_NO_PAD.encode([0xA5; 256]);
    let keys = kids.iter().map(|kid| json!({ "kty": "RSA", "use": "sig", "kid": kid, "n": modulus, "e": "AQAB" }));
    json!({ "keys": keys.collect::<Vec<_>>() })
}

fn start(source: &Arc<Scripted>) -> TenantKeys {
    let source: Arc<dyn DocumentSource> = Arc::<Scripted>::clone(source);
    TenantKeys::start(source, "tenant".to_owned())
}

/// Lets the background work do what it can do now.
async fn settle() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}

/// Whether the key is found.
async fn finds(keys: &TenantKeys, kid: &str) -> Result<bool, Undecided> {
    Ok(keys.find(kid).await?.is_some())
}

#[tokio::test(start_paused = true)]
async fn keys_are_fetched_at_start_and_hourly_and_the_last_good_set_is_kept_for_a_day() {
    let source = Scripted::new([Answer::Keys(&["a"]), Answer::Keys(&["b"]), Answer::Fails]);
    let keys = start(&source);
    assert!(!keys.has_keys());
    settle().await;
    assert_eq!((source.fetches(), finds(&keys, "a").await), (1, Ok(true)));
    advance(53 * MINUTE).await;
    settle().await;
    assert_eq!(source.fetches(), 1, "not before 54 minutes are over");
    advance(14 * MINUTE).await;
    settle().await;
    assert_eq!((source.fetches(), finds(&keys, "b").await, keys.has_keys()), (2, Ok(true), true));
    // From here on Entra is away. What is known serves for a day.
    for _ in 0..23 {
        advance(60 * MINUTE).await;
        settle().await;
        assert_eq!(finds(&keys, "b").await, Ok(true));
    }
    advance(61 * MINUTE).await;
    assert_eq!((finds(&keys, "b").await, keys.has_keys()), (Err(Undecided::NoKeys), false));
}

#[tokio::test(start_paused = true)]
async fn a_key_is_held_until_the_next_fetch_and_for_a_day_at_most() {
    let source = Scripted::new([Answer::Keys(&["a"]), Answer::Keys(&["a", "b"]), Answer::Keys(&["b"]), Answer::Fails]);
    let keys = start(&source);
    settle().await;
    let a = keys.find("a").await.unwrap().unwrap();
    assert!(keys.hold(&a));
    let b = keys.find("b").await.unwrap().unwrap();
    assert!(!keys.hold(&a), "the next fetch has brought it anew");
    let a = keys.find("a").await.unwrap().unwrap();
    assert!(keys.hold(&a) && keys.hold(&b));
    advance(67 * MINUTE).await;
    settle().await;
    let b = keys.find("b").await.unwrap().unwrap();
    assert!(!keys.hold(&a) && keys.hold(&b));
    advance(23 * 60 * MINUTE).await;
    assert!(keys.hold(&b));
    advance(61 * MINUTE).await;
    assert!(!keys.hold(&b), "nobody could renew it");
}

#[tokio::test(start_paused = true)]
async fn one_thin_answer_ends_no_key_and_two_in_a_row_do() {
    let (both, thin) = (Answer::Keys(&["a", "b"]), Answer::Keys(&["a"]));
    let source = Scripted::new([both.clone(), thin.clone(), both, thin.clone(), thin]);
    let keys = start(&source);
    settle().await;
    // A key id that nobody knows causes a fetch, and what comes is thinner than before.
    assert_eq!((finds(&keys, "made-up").await, source.fetches()), (Ok(false), 2));
    assert_eq!(finds(&keys, "b").await, Ok(true));
    advance(5 * MINUTE).await;
    settle().await;
    assert_eq!((finds(&keys, "b").await, source.fetches()), (Ok(true), 3), "looked for again soon, and there");
    advance(67 * MINUTE).await;
    settle().await;
    assert_eq!((finds(&keys, "b").await, source.fetches()), (Ok(true), 4));
    advance(5 * MINUTE).await;
    settle().await;
    assert_eq!(source.fetches(), 5);
    assert_eq!((finds(&keys, "b").await, finds(&keys, "a").await), (Ok(false), Ok(true)), "lacking twice in a row");
}

#[tokio::test(start_paused = true)]
async fn a_failure_between_two_thin_answers_does_not_count_and_a_day_ends_all() {
    let (both, thin) = (Answer::Keys(&["a", "b"]), Answer::Keys(&["a"]));
    let source = Scripted::new([both.clone(), thin.clone(), Answer::Fails, both, Answer::Fails]);
    let keys = start(&source);
    settle().await;
    advance(67 * MINUTE).await;
    settle().await;
    for fetches in [3, 4] {
        advance(5 * MINUTE).await;
        settle().await;
        assert_eq!((finds(&keys, "b").await, source.fetches()), (Ok(true), fetches));
    }
    advance(25 * 60 * MINUTE).await;
    assert_eq!(finds(&keys, "b").await, Err(Undecided::NoKeys));
}

#[tokio::test(start_paused = true)]
async fn what_holds_no_usable_key_never_replaces_a_good_set() {
    for answer in [
        Answer::Text(""),
        Answer::Text("no JSON"),
        Answer::Text("[]"),
        Answer::Text(r#"{"keys":[]}"#),
        Answer::Text(r#"{"keys":[{"kty":"RSA","kid":"a","n":"AQAB","e":"AQAB"}]}"#),
        Answer::Fails,
        Answer::Hangs,
        Answer::Panics,
    ] {
        let hangs = matches!(answer, Answer::Hangs);
        let source = Scripted::new([Answer::Keys(&["a"]), answer, Answer::Keys(&["a", "b"])]);
        let keys = start(&source);
        settle().await;
        advance(67 * MINUTE).await;
        settle().await;
        if hangs {
            advance(Duration::from_secs(5)).await;
            settle().await;
        }
        assert_eq!((source.fetches(), finds(&keys, "a").await), (2, Ok(true)));
        advance(Duration::from_secs(5)).await;
        settle().await;
        assert_eq!((source.fetches(), finds(&keys, "b").await), (3, Ok(true)), "the next attempt comes in seconds");
    }
}

#[tokio::test(start_paused = true)]
async fn without_any_keys_attempts_go_on_and_nobody_waits() {
    let source = Scripted::new([Answer::Fails]);
    let keys = start(&source);
    let begin = Instant::now();
    settle().await;
    for (pause, fetches) in [(5, 2), (10, 3), (20, 4), (30, 5), (30, 6)] {
        assert_eq!(finds(&keys, "a").await, Err(Undecided::NoKeys));
        advance(Duration::from_secs(pause)).await;
        settle().await;
        assert_eq!(source.fetches(), fetches, "after {:?}", begin.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn an_unknown_key_id_causes_one_fetch_in_five_minutes_whoever_asks() {
    let source = Scripted::new([Answer::Keys(&["a"]), Answer::Keys(&["a", "b"]), Answer::Keys(&["a", "b", "c"])]);
    let keys = start(&source);
    settle().await;
    // Everybody who waits for the one fetch gets what it brings.
    let asks = futures_util::future::join_all((0..WAITING).map(|_| finds(&keys, "b"))).await;
    assert!(asks.iter().all(|found| *found == Ok(true)));
    assert_eq!(source.fetches(), 2);
    for number in 0..2_000 {
        assert_eq!(finds(&keys, &format!("made-up-{number}")).await, Ok(false));
    }
    advance(Duration::from_secs(299)).await;
    assert_eq!((finds(&keys, "c").await, source.fetches()), (Ok(false), 2));
    advance(Duration::from_secs(1)).await;
    assert_eq!((finds(&keys, "c").await, source.fetches()), (Ok(true), 3));
    assert_eq!((finds(&keys, "d").await, source.fetches()), (Ok(false), 3));
}

#[tokio::test(start_paused = true)]
async fn so_many_wait_for_a_fetch_and_the_others_are_told_at_once_to_come_again() {
    let source = Scripted::new([Answer::Keys(&["a"]), Answer::Hangs]);
    let keys = start(&source);
    settle().await;
    let mut waiting: Vec<_> = (0..WAITING).map(|_| Box::pin(finds(&keys, "b"))).collect();
    for one in &mut waiting {
        assert!(one.now_or_never().is_none());
    }
    let begin = Instant::now();
    for number in 0..1_000 {
        assert_eq!(finds(&keys, &format!("made-up-{number}")).await, Err(Undecided::Crowded));
    }
    assert_eq!((finds(&keys, "a").await, begin.elapsed()), (Ok(true), Duration::ZERO), "a known key needs no room");
    drop(waiting.pop());
    waiting.push(Box::pin(finds(&keys, "b")));
    let found = futures_util::future::join_all(waiting).await;
    assert!(found.iter().all(|found| *found == Ok(false)), "who leaves makes room");
    assert_eq!((finds(&keys, "b").await, source.fetches()), (Ok(false), 2), "nobody waits where nothing is fetched");
}

#[tokio::test(start_paused = true)]
async fn a_fetch_that_fails_for_an_unknown_key_id_may_be_tried_again_in_seconds() {
    let source = Scripted::new([Answer::Keys(&["a"]), Answer::Fails, Answer::Hangs, Answer::Keys(&["a", "b"])]);
    let keys = start(&source);
    settle().await;
    assert_eq!((finds(&keys, "b").await, source.fetches()), (Ok(false), 2));
    assert_eq!((finds(&keys, "b").await, source.fetches()), (Ok(false), 2), "not at once");
    let begin = Instant::now();
    advance(Duration::from_secs(5)).await;
    settle().await; // the driver's own next attempt hangs, and whoever asks meanwhile waits for it no longer than it may take
    assert_eq!((finds(&keys, "b").await, source.fetches()), (Ok(false), 3));
    assert!(begin.elapsed() <= Duration::from_secs(10), "{:?}", begin.elapsed());
    settle().await;
    advance(Duration::from_secs(10)).await;
    settle().await;
    assert_eq!((finds(&keys, "b").await, source.fetches()), (Ok(true), 4));
}

pub(super) fn inbound() -> EntraInbound {
    EntraInbound {
        client_ids: vec![API_APP_ID.to_owned()],
        app_id_uris: Vec::new(),
        tenants: vec![TENANT_ID.to_owned()],
        clients: Vec::new(),
        public_url: Url::parse("https://mcp.example/mcp").unwrap(),
        scopes: PermissionNames::default(),
        roles: PermissionNames::default(),
    }
}

/// The stand-in and a verifier that has its keys.
pub(super) async fn verifier(settings: &EntraInbound, keep_assertion: bool) -> (StandInEntra, Verifier) {
    verifier_of(EntraOptions::default(), settings, keep_assertion).await
}

async fn verifier_of(options: EntraOptions, settings: &EntraInbound, keep_assertion: bool) -> (StandInEntra, Verifier) {
    let entra = StandInEntra::start(options).await.unwrap();
    let verifier = Verifier::start(settings, &entra.authority(), Some(entra.ca_pem()), keep_assertion).unwrap();
    let ready = async {
        while !verifier.is_ready() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), ready).await.unwrap();
    (entra, verifier)
}

#[tokio::test]
async fn each_refusal_has_its_own_word() {
    let (entra, verifier) = verifier(&inbound(), false).await;
    let reader = |changes: Value| entra.caller_token(DemoCaller::Reader, &changes);
    let headed = |header: Value| entra.sign(&header, &entra.caller_claims(DemoCaller::Reader, &json!({})));
    let good = reader(json!({}));
    let (message, _) = good.rsplit_once('.').unwrap();
    for (token, word) in [
        ("x".to_owned(), "malformed_token"),
        (headed(json!({ "alg": "none" })), "malformed_token"),
        (headed(json!({ "alg": "HS256" })), "algorithm"),
        (headed(json!({ "kid": null })), "no_key_id"),
        (headed(json!({ "kid": "x" })), "unknown_key"),
        (headed(json!({ "crit": [] })), "malformed_token"),
        (format!("{message}.AAAA"), "signature"),
        (reader(json!({ "exp": 1 })), "expired"),
        (reader(json!({ "nbf": 1e12 })), "not_yet_valid"),
        (reader(json!({ "iss": "https://sts.windows.net/x/" })), "issuer"),
        (reader(json!({ "aud": "x" })), "audience"),
        (reader(json!({ "tid": "x" })), "tenant"),
        (reader(json!({ "ver": "1.0" })), "version"),
        (reader(json!({ "oid": "x" })), "claims"),
        (reader(json!({ "exp": null })), "claims"),
        (reader(json!({ "azp": null })), "not_an_access_token"),
        (reader(json!({ "scp": "x" })), "no_permission"),
    ] {
        let refusal = verifier.verify(&token).await.unwrap_err();
        assert_eq!(refusal.as_str(), word, "{token}");
        assert!(Refusal::WORDS.contains(&word));
    }
}

#[tokio::test]
async fn an_identity_says_who_it_is_and_keeps_its_token_only_for_those_who_exchange_it() {
    for keep in [false, true] {
        let (entra, verifier) = verifier(&inbound(), keep).await;
        let token = entra.caller_token(DemoCaller::Writer, &json!({}));
        let identity = verifier.verify(&token).await.unwrap();
        let writer = (TENANT_ID, DemoCaller::Writer.object_id(), true);
        assert_eq!((identity.tenant(), identity.object(), identity.is_delegated()), writer);
        assert_eq!(identity.assertion().is_some(), keep);
        assert!(!format!("{identity:?}").contains("eyJ"));
        let caller = Caller::unauthenticated([127, 0, 0, 1].into()).identified(identity);
        assert!(Permission::ALL.into_iter().all(|permission| caller.may(permission)));
        let agent = verifier.verify(&entra.caller_token(DemoCaller::Agent, &json!({}))).await.unwrap();
        assert!(!agent.is_delegated());
        let caller = Caller::unauthenticated([127, 0, 0, 1].into()).identified(agent);
        assert!(caller.may_call("list_tickets", Permission::TicketsRead) && caller.lacked().is_none());
        assert!(!caller.may_call("list_users", Permission::UsersRead));
        assert_eq!(caller.lacked(), Some(Lacked { permission: Permission::UsersRead, tool: "list_users" }));
    }
}

fn recalled(verifier: &Verifier, token: &str) -> &'static str {
    match verifier.recall(token) {
        Recalled::Good(_) => "good",
        Recalled::Stale => "stale",
        Recalled::Unknown => "unknown",
    }
}

#[tokio::test]
async fn a_token_that_was_good_is_known_until_its_keys_are_fetched_again_and_checked_then() {
    for keep in [false, true] {
        let (entra, verifier) = verifier(&inbound(), keep).await;
        let [old, other] =
            [DemoCaller::Writer, DemoCaller::Reader].map(|caller| entra.caller_token(caller, &json!({})));
        assert_eq!(recalled(&verifier, &old), "unknown");
        let verified = verifier.verify(&old).await.unwrap();
        let Recalled::Good(known) = verifier.recall(&old) else { panic!("it is not known") };
        assert_eq!(format!("{known:?}"), format!("{verified:?}"));
        assert_eq!(known.assertion().map(ExposeSecret::expose_secret), keep.then_some(old.as_str()));
        // Nobody is known by another's token, or by a part of their own.
        assert_eq!(
            [&other, &old[..old.len() - 1], "", &format!("{old}=")].map(|token| recalled(&verifier, token)),
            ["unknown"; 4]
        );

        if keep {
            entra.rotate_keys().await.unwrap();
        } else {
            entra.replace_keys().await.unwrap();
        }
        assert_eq!(recalled(&verifier, &old), "good", "nobody knows of the new key yet");
        verifier.verify(&entra.caller_token(DemoCaller::Writer, &json!({}))).await.unwrap();
        assert_eq!(recalled(&verifier, &old), "stale");
        let checked = verifier.verify(&old).await.map(|_| ());
        // Its key is published still, or only one fetch has lacked it.
        assert_eq!((checked, recalled(&verifier, &old)), (Ok(()), "good"));
    }
}

#[tokio::test]
async fn a_clock_before_1970_refuses_every_token_for_its_own_reason() {
    let (entra, mut verifier) = verifier(&inbound(), false).await;
    let token = entra.caller_token(DemoCaller::Reader, &json!({}));
    verifier.clock = || UNIX_EPOCH - Duration::from_secs(1);
    let refusal = verifier.verify(&token).await.unwrap_err();
    assert_eq!((refusal, refusal.verdict()), (Refusal::Clock, Verdict::Unavailable));
    assert!(refusal.advice().contains("clock"));
    verifier.clock = SystemTime::now;
    assert!(verifier.verify(&token).await.is_ok());
}

#[tokio::test]
async fn a_known_token_ends_when_it_ends() {
    let (entra, mut verifier) = verifier(&inbound(), false).await;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let token = entra.caller_token(DemoCaller::Reader, &json!({ "exp": now + 3_600 }));
    verifier.verify(&token).await.unwrap();
    for (clock, known) in [
        (SystemTime::now as fn() -> SystemTime, "good"),
        (|| SystemTime::now() + 59 * MINUTE, "good"),
        (|| SystemTime::now() + 62 * MINUTE, "stale"), // the leeway is a minute
        (|| SystemTime::now() - 62 * MINUTE, "stale"),
    ] {
        verifier.clock = clock;
        assert_eq!(recalled(&verifier, &token), known);
    }
}

/// A cloud like Azure China, whose issuers are on hosts of their own.
fn another_cloud() -> EntraOptions {
    EntraOptions {
        issuer_origin: Some("https://login.partner.example".to_owned()),
        v1_issuer_origin: "https://sts.partner.example".to_owned(),
        ..EntraOptions::default()
    }
}

#[tokio::test]
async fn issuers_are_those_that_the_tenants_metadata_name_and_no_others() {
    let v1 = json!({ "ver": "1.0", "aud": "api://mcp", "azp": null, "appid": "5e9d3c7b-1a2f-4d6e-8b0c-4f3e2d1c0b9a" });
    let with = |claims: &Value, issuer: &str| {
        let mut claims = claims.clone();
        claims["iss"] = json!(issuer);
        claims
    };
    for accepts_v1 in [false, true] {
        let app_id_uris = if accepts_v1 { vec!["api://mcp".to_owned()] } else { Vec::new() };
        let (entra, verifier) = verifier_of(another_cloud(), &EntraInbound { app_id_uris, ..inbound() }, false).await;
        let [of_v1, of_v2] = [TokenVersion::V1, TokenVersion::V2].map(|version| entra.issuer(version));
        assert_eq!(verifier.authorization_servers(), [&*of_v2]);
        let verify =
            async |claims: &Value| verifier.verify(&entra.caller_token(DemoCaller::Reader, claims)).await.map(|_| ());
        assert_eq!(verify(&json!({})).await, Ok(()));
        assert_eq!(verify(&with(&v1, &of_v1)).await.is_ok(), accepts_v1);
        let derived = format!("{}{TENANT_ID}/v2.0", entra.authority());
        for foreign in [
            &*derived,
            &format!("https://sts.windows.net/{TENANT_ID}/"),
            &format!("{of_v2}/"),
            &of_v2.replace("https", "http"),
            &of_v2.replace(TENANT_ID, "00000000-1111-4222-8333-444444444444"),
            &of_v2.to_uppercase(),
        ] {
            assert_eq!(verify(&with(&json!({}), foreign)).await, Err(Refusal::Issuer), "{foreign}");
            assert_eq!(verify(&with(&v1, foreign)).await, Err(Refusal::Issuer), "{foreign}");
        }
        // The issuer of one version is none of the other.
        assert!(verify(&with(&v1, &of_v2)).await.is_err() && verify(&with(&json!({}), &of_v1)).await.is_err());
    }
}

#[tokio::test]
async fn metadata_that_name_a_foreign_issuer_or_foreign_keys_are_not_believed() {
    let entra = StandInEntra::start(EntraOptions::default()).await.unwrap();
    let authority = entra.authority();
    let issuer = entra.issuer(TokenVersion::V2);
    let keys = format!("{authority}{TENANT_ID}/discovery/v2.0/keys");
    for (issuer, keys, good) in [
        (&*issuer, &*keys, true),
        (&format!("https://elsewhere.example/{TENANT_ID}/v2.0"), &keys, true),
        (&issuer, &keys.replace("https", "http"), false),
        (&issuer, &keys.replace("localhost", "127.0.0.1"), false),
        (&issuer, &format!("https://localhost/{TENANT_ID}/discovery/v2.0/keys"), false),
        (&issuer, &keys.replace("localhost", "me@localhost"), false),
        (&issuer, "not a URL", false),
        (&format!("{issuer}/"), &keys, false),
        (&issuer.replace("https", "http"), &keys, false),
        (&issuer.replace(TENANT_ID, "{tenantid}"), &keys, false),
        (&issuer.replace(TENANT_ID, "00000000-1111-4222-8333-444444444444"), &keys, false),
        (&format!("https://me:too@elsewhere.example/{TENANT_ID}/v2.0"), &keys, false),
        (&format!("https://elsewhere.example/{TENANT_ID}/v2.0?x"), &keys, false),
        (&format!("https://elsewhere.example/x/../{TENANT_ID}/v2.0"), &keys, false),
        ("", &keys, false),
    ] {
        let document = json!({ "issuer": issuer, "jwks_uri": keys }).to_string();
        let rule = crate::demo::fault::FaultRule::status(200).body(document);
        entra.set_fault([rule.on(&format!("GET /{TENANT_ID}/v2.0/.well-known"))]);
        let published = inspect(&inbound(), &authority, Some(entra.ca_pem())).await.unwrap().remove(0).1;
        assert_eq!(published.is_ok(), good, "{issuer} {keys}: {published:?}");
    }
}

#[tokio::test]
async fn each_tenant_has_issuers_of_its_own() {
    let other = "00000000-1111-4222-8333-444444444444";
    let (entra, verifier) =
        verifier(&EntraInbound { tenants: vec![other.to_owned(), TENANT_ID.to_owned()], ..inbound() }, false).await;
    let good = entra.caller_token(DemoCaller::Reader, &json!({}));
    assert_eq!(verifier.verify(&good).await.unwrap().tenant(), TENANT_ID);
    // The stand-in does not know the other tenant and publishes no keys for it.
    let issuer = entra.issuer(TokenVersion::V2).replace(TENANT_ID, other);
    let token = entra.caller_token(DemoCaller::Reader, &json!({ "iss": issuer, "tid": other }));
    assert_eq!(verifier.verify(&token).await.unwrap_err(), Refusal::KeysUnavailable);
    let mixed = entra.caller_token(DemoCaller::Reader, &json!({ "tid": other }));
    assert_eq!(verifier.verify(&mixed).await.unwrap_err(), Refusal::Tenant);
}

/// Spells of thin answers and failures, in any order: a key ends when two good answers in a row lack it, or after a day without one.
mod spells {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const IDS: [&str; 3] = ["a", "b", "c"];
    const SETS: [&[&str]; 7] = [&["a"], &["b"], &["c"], &["a", "b"], &["a", "c"], &["b", "c"], &["a", "b", "c"]];

    /// What must be held, answer by answer.
    struct Expected {
        processed: usize,
        last: &'static [&'static str],
        before: &'static [&'static str],
        use_until: Instant,
    }

    impl Expected {
        fn after(&mut self, fetches: usize, answers: &[Option<&'static [&'static str]>]) {
            while self.processed < fetches {
                let answer = answers[self.processed.min(answers.len() - 1)];
                self.processed += 1;
                if let Some(set) = answer {
                    self.before = if Instant::now() < self.use_until { self.last } else { &[] };
                    self.last = set;
                    self.use_until = Instant::now() + 24 * 60 * MINUTE;
                }
            }
        }

        fn find(&self, kid: &str) -> Result<bool, Undecided> {
            let held = self.last.contains(&kid) || self.before.contains(&kid);
            if Instant::now() < self.use_until { Ok(held) } else { Err(Undecided::NoKeys) }
        }
    }

    proptest! {
        #[test]
        fn end_a_key_only_when_two_answers_in_a_row_lack_it(
            choices in vec(0usize..9, 1..60), minutes in vec(1u32..120, 1..60),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
            let answers: Vec<_> = choices.iter().map(|choice| SETS.get(*choice).copied()).collect();
            runtime.block_on(async {
                let source = Scripted::new(choices.iter().map(|choice| match SETS.get(*choice) {
                    Some(set) => Answer::Keys(set),
                    None if *choice == SETS.len() => Answer::Fails,
                    None => Answer::Text(r#"{"keys":[]}"#),
                }));
                let keys = start(&source);
                settle().await;
                let mut expected = Expected { processed: 0, last: &[], before: &[], use_until: Instant::now() };
                for minutes in minutes {
                    expected.after(source.fetches(), &answers);
                    for kid in IDS {
                        // A key that is not held may cause a fetch.
                        let found = finds(&keys, kid).await;
                        expected.after(source.fetches(), &answers);
                        assert_eq!(found, expected.find(kid), "{kid} after {} of {choices:?}", expected.processed);
                    }
                    advance(minutes * MINUTE).await;
                    settle().await;
                }
            });
        }
    }
}
