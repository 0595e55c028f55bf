//! The way to a token, through a stand-in Entra over real HTTPS: how often it is asked, what happens while it is away, and what
//! callers are told when it refuses.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt as _};
use mcp_server::demo::entra::{CLIENT_SECRET, EXPIRED_CLIENT_SECRET};
use mcp_server::demo::fault::FaultRule;
use mcp_server::demo::{DemoOptions, StandIns, digest};
use mcp_server::settings::Credential;
use secrecy::SecretString;
use serde_json::{Value, json};
use time::OffsetDateTime;

use crate::support::{CallResult, Era, TestApp, until};

const NOBODY: &str = "00000000-0000-4000-8000-000000000000";

async fn stand_ins() -> StandIns {
    StandIns::start(DemoOptions::default()).await.unwrap()
}

async fn stand_ins_with_lifetime(seconds: u64) -> StandIns {
    let stand_ins = stand_ins().await;
    stand_ins.entra.set_token_lifetime(Duration::from_secs(seconds));
    stand_ins
}

async fn ask(app: &TestApp) -> CallResult {
    app.call(Era::Legacy, "get_user_profile", json!({ "user_id": "42" })).await
}

fn token_requests(app: &TestApp) -> u64 {
    app.stand_ins.entra.token_request_count().get()
}

/// Makes call after call, of which none may fail, until the stand-in has seen so many token requests.
async fn call_until_token_requests(app: &TestApp, count: u64) {
    let calling = async {
        while token_requests(app) < count {
            ask(app).await.structured();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), calling).await.expect("no token was asked for");
    ask(app).await.structured();
}

#[tokio::test]
async fn a_thousand_calls_cost_one_token_request() {
    let app = TestApp::spawn().await;
    for _ in 0..20 {
        for result in join_all((0..50).map(|_| ask(&app))).await {
            result.structured();
        }
    }
    assert_eq!((app.backend_requests().len(), token_requests(&app)), (1_000, 1));
}

#[tokio::test]
async fn a_hundred_first_calls_at_once_cost_one_token_request() {
    let stand_ins = stand_ins().await;
    stand_ins.entra.set_fault([FaultRule::delay(Duration::from_millis(300))]);
    let app = TestApp::spawn_against(stand_ins, |_| {}).await;
    for result in join_all((0..100).map(|_| ask(&app))).await {
        result.structured();
    }
    assert_eq!(token_requests(&app), 1);
}

#[tokio::test]
async fn a_token_is_replaced_before_it_expires_and_no_call_notices() {
    let app = TestApp::spawn_against(stand_ins_with_lifetime(8).await, |_| {}).await;
    call_until_token_requests(&app, 3).await;
    let times: Vec<_> = app.stand_ins.entra.token_requests().iter().map(|request| request.at).collect();
    for pair in times.windows(2) {
        let apart = pair[1].duration_since(pair[0]).unwrap();
        assert!(apart >= Duration::from_secs(1), "{apart:?}");
    }
    // The backend looks at the token's times too.
    assert!(app.backend_requests().iter().all(|request| request.status.is_some_and(|status| status == 200)));
}

#[tokio::test]
async fn an_outage_of_entra_fails_no_call_while_the_token_is_good() {
    // From half of its life on another one is asked for, and for three quarters of it it is used: four seconds lie between.
    let app = TestApp::spawn_against(stand_ins_with_lifetime(16).await, |_| {}).await;
    ask(&app).await.structured();
    app.stand_ins.entra.set_fault([FaultRule::status(503)]);
    call_until_token_requests(&app, 3).await;
    app.stand_ins.entra.set_down(true).await.unwrap();
    ask(&app).await.structured();
    app.until_ready().await;
}

#[tokio::test]
async fn a_start_without_entra_is_alive_and_not_ready_and_heals_by_itself() {
    let stand_ins = stand_ins().await;
    stand_ins.entra.set_down(true).await.unwrap();
    let app = TestApp::spawn_against(stand_ins, |_| {}).await;

    let error = ask(&app).await.error();
    assert_eq!(error["error"], "AUTHENTICATION_ERROR");
    assert_eq!(error["details"]["retryable"], true, "{error}");
    assert_eq!(error["details"]["aadsts"], Value::Null, "{error}");
    assert!(error["details"]["retry_after_seconds"].as_u64().is_some_and(|wait| wait <= 2), "{error}");
    assert!(error["message"].as_str().unwrap().contains("AZURE_AUTHORITY_HOST"), "{error}");
    assert_eq!(app.http.get(app.url("/health/live")).send().await.unwrap().status(), 200);
    let ready = app.http.get(app.url("/health/ready")).send().await.unwrap();
    assert_eq!(ready.status(), 503);
    let ready: Value = serde_json::from_str(&ready.text().await.unwrap()).unwrap();
    assert_eq!((&ready["status"], &ready["dependencies"]["azure_auth"]), (&json!("not_ready"), &json!("unhealthy")));
    assert_eq!(app.backend_requests().len(), 0);

    app.stand_ins.entra.set_down(false).await.unwrap();
    app.until_ready().await;
    ask(&app).await.structured();
}

#[tokio::test]
async fn an_entra_that_never_answers_is_named_as_the_cause_before_the_call_runs_out_of_time() {
    let stand_ins = stand_ins().await;
    stand_ins.entra.set_fault([FaultRule::hang()]);
    let app = TestApp::spawn_against(stand_ins, |settings| settings.backend.timeout = Duration::from_secs(1)).await;
    let error = ask(&app).await.error();
    assert_eq!(error["error"], "AUTHENTICATION_ERROR", "{error}");
    assert_eq!(error["details"]["retryable"], true, "{error}");
    assert!(error["message"].as_str().unwrap().contains("does not answer in time"), "{error}");
}

#[tokio::test]
async fn a_rotated_service_account_token_is_sent_at_the_next_refresh() {
    let stand_ins = stand_ins_with_lifetime(10).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let identity = stand_ins.workload_identity_settings(file.path()).unwrap();
    let mut assertions = vec![std::fs::read_to_string(file.path()).unwrap()];
    let app = TestApp::spawn_against(stand_ins, |settings| settings.identity = identity).await;
    ask(&app).await.structured();

    assertions.push(app.stand_ins.entra.service_account_token(&json!({})));
    std::fs::write(file.path(), format!("{}\n", assertions[1])).unwrap();
    call_until_token_requests(&app, 2).await;

    let requests = app.stand_ins.entra.token_requests();
    for (request, assertion) in requests.iter().zip(&assertions) {
        assert_eq!(request.field("client_assertion"), Some(&*digest(assertion)));
        assert_eq!(request.field("client_secret"), None);
        assert_eq!(
            request.field("client_assertion_type"),
            Some("urn:ietf:params:oauth:client-assertion-type:jwt-bearer")
        );
    }
}

#[tokio::test]
async fn what_entra_refuses_is_told_with_its_code_and_a_remedy_and_without_secrets() {
    let stand_ins = Arc::new(stand_ins().await);
    let now = OffsetDateTime::now_utc().unix_timestamp();
    let secret = |secret: &str| Proof::Secret(secret.to_owned());
    let assertion = |changes| Proof::Assertion(stand_ins.entra.service_account_token(&changes));
    let hour = 3_600;
    for (aadsts, wrong, proof, remedy) in [
        (7_000_215, Wrong::Proof, secret("canary-of-a-wrong-secret"), "AZURE_CLIENT_SECRET"),
        (7_000_222, Wrong::Proof, secret(EXPIRED_CLIENT_SECRET), "create a new secret"),
        (700_016, Wrong::Client, secret(CLIENT_SECRET), "AZURE_CLIENT_ID"),
        (90_002, Wrong::Tenant, secret(CLIENT_SECRET), "AZURE_TENANT_ID"),
        (500_011, Wrong::Scope, secret(CLIENT_SECRET), "AZURE_SCOPES"),
        (700_211, Wrong::Proof, assertion(json!({ "iss": "https://elsewhere.example/" })), "issuer"),
        (700_212, Wrong::Proof, assertion(json!({ "aud": ["api://elsewhere"] })), "api://AzureADTokenExchange"),
        (700_213, Wrong::Proof, assertion(json!({ "sub": "system:serviceaccount:a:b" })), "subject"),
        (7_002_138, Wrong::Proof, assertion(json!({ "sub": "System:ServiceAccount:mcp-system:mcp-server" })), "case"),
        (
            700_024,
            Wrong::Proof,
            assertion(json!({ "iat": now - 3 * hour, "nbf": now - 3 * hour, "exp": now - hour })),
            "AZURE_FEDERATED_TOKEN_FILE",
        ),
        (70_023, Wrong::Proof, assertion(json!({ "exp": now + 48 * hour })), "AZURE_FEDERATED_TOKEN_FILE"),
        (50_027, Wrong::Proof, Proof::Assertion("canary-that-is-no-token".to_owned()), "AZURE_FEDERATED_TOKEN_FILE"),
        (700_016, Wrong::Client, assertion(json!({})), "AZURE_CLIENT_ID"),
    ] {
        let file = tempfile::NamedTempFile::new().unwrap();
        let app = TestApp::spawn_against(Arc::clone(&stand_ins), |settings| {
            wrong.apply(&mut settings.identity);
            settings.identity.credential = proof.credential(file.path());
        })
        .await;
        let result = ask(&app).await;
        let error = result.error();
        assert_eq!(error["error"], "AUTHENTICATION_ERROR", "{error}");
        let details = &error["details"];
        assert_eq!(details["aadsts"], aadsts, "{error}");
        assert_eq!(details["credential"], proof.name(), "{error}");
        assert_eq!(details["retryable"], false, "{error}");
        assert_eq!(details["trace_id"].as_str().map(str::len), Some(32), "{error}");
        assert!(details["correlation_id"].is_string(), "{error}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(remedy) && message.contains("the operator of this server has to"), "{error}");
        for untold in [proof.text(), "Trace ID", "AADSTS", "mcp-demo.onmicrosoft.com"] {
            assert!(!result.text().contains(untold), "`{untold}` in {error}");
        }
    }
    assert_eq!(stand_ins.backend.request_count().get(), 0);
}

enum Wrong {
    Proof,
    Client,
    Tenant,
    Scope,
}

impl Wrong {
    fn apply(&self, identity: &mut mcp_server::settings::IdentitySettings) {
        match self {
            Self::Proof => {}
            Self::Client => NOBODY.clone_into(&mut identity.client_id),
            Self::Tenant => NOBODY.clone_into(&mut identity.tenant_id),
            Self::Scope => identity.scopes = vec!["api://nobody/.default".to_owned()],
        }
    }
}

enum Proof {
    Secret(String),
    Assertion(String),
}

impl Proof {
    fn text(&self) -> &str {
        match self {
            Self::Secret(text) | Self::Assertion(text) => text,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Secret(_) => "client secret",
            Self::Assertion(_) => "workload identity",
        }
    }

    fn credential(&self, file: &std::path::Path) -> Credential {
        match self {
            Self::Secret(secret) => Credential::ClientSecret { secret: SecretString::from(secret.clone()) },
            Self::Assertion(assertion) => {
                std::fs::write(file, assertion).unwrap();
                Credential::WorkloadIdentity { token_file: file.to_owned() }
            }
        }
    }
}

#[tokio::test]
async fn a_throttled_identity_waits_as_long_as_entra_asks() {
    let stand_ins = stand_ins().await;
    let throttled = FaultRule::status(429).header("retry-after", "3").header("content-type", "text/plain");
    stand_ins.entra.set_fault([throttled.body("Too Many Requests").times(1)]);
    let app = TestApp::spawn_against(stand_ins, |_| {}).await;
    let error = ask(&app).await.error();
    assert_eq!(error["error"], "AUTHENTICATION_ERROR");
    assert_eq!(error["details"]["retryable"], true, "{error}");
    assert!(error["details"]["retry_after_seconds"].as_u64().is_some_and(|wait| wait <= 3), "{error}");
    assert!(error["message"].as_str().unwrap().contains("throttles"), "{error}");

    app.until_ready().await;
    ask(&app).await.structured();
    let requests = app.stand_ins.entra.token_requests();
    assert_eq!(requests.len(), 2);
    assert!(requests[1].at.duration_since(requests[0].at).unwrap() >= Duration::from_secs(3));
}

#[tokio::test]
async fn one_401_of_the_backend_costs_one_new_token_and_one_replay() {
    let app = TestApp::spawn().await;
    app.stand_ins.backend.set_fault([FaultRule::status(401).times(1)]);
    ask(&app).await.structured();
    let sent: Vec<_> = app.backend_requests().into_iter().map(|request| request.authorization_raw).collect();
    assert_eq!((sent.len(), token_requests(&app)), (2, 2));
    assert_ne!(sent[0], sent[1]);
}

#[tokio::test]
async fn a_backend_that_refuses_every_token_costs_one_forced_refresh_however_many_calls_there_are() {
    let app = TestApp::spawn().await;
    app.stand_ins.backend.set_fault([FaultRule::status(401)]);
    let first = ask(&app).await.error();
    assert_eq!(first["error"], "AUTHENTICATION_ERROR");
    assert_eq!(first["details"]["retryable"], false, "{first}");
    assert!(first["message"].as_str().unwrap().contains("AZURE_SCOPES"), "{first}");
    for result in join_all((0..50).map(|_| ask(&app))).await {
        assert_eq!(result.error()["error"], "AUTHENTICATION_ERROR");
    }
    assert_eq!((token_requests(&app), app.backend_requests().len()), (2, 52));
}

#[tokio::test]
async fn a_401_while_entra_is_away_fails_one_call_and_takes_the_token_from_no_other() {
    let app = TestApp::spawn().await;
    ask(&app).await.structured();
    app.stand_ins.entra.set_down(true).await.unwrap();
    app.stand_ins.backend.set_fault([FaultRule::status(401).times(1)]);
    let error = ask(&app).await.error();
    assert_eq!((&error["error"], &error["details"]["retryable"]), (&json!("AUTHENTICATION_ERROR"), &json!(true)));
    assert_eq!(error["details"]["status_code"], 401, "the backend was asked: {error}");
    for _ in 0..20 {
        ask(&app).await.structured();
    }
    assert_eq!(app.http.get(app.url("/health/ready")).send().await.unwrap().status(), 200);
    let first = app.backend_requests()[0].authorization_raw.clone();
    assert!(app.backend_requests().iter().all(|request| request.authorization_raw == first));

    app.stand_ins.entra.set_down(false).await.unwrap();
    app.stand_ins.entra.token_request_count().reaches(2).await;
    until(async || {
        ask(&app).await.structured();
        app.backend_requests().last().unwrap().authorization_raw != first
    })
    .await;
}

#[tokio::test]
async fn while_a_rejected_token_is_replaced_it_serves_other_calls_and_the_rejected_one_is_replayed() {
    let app = TestApp::spawn_with(|settings| settings.backend.timeout = Duration::from_secs(60)).await;
    ask(&app).await.structured();
    // The first attempt at another token ends after five seconds, the second one at once.
    app.stand_ins.entra.set_fault([FaultRule::hang().times(1)]);
    app.stand_ins.backend.set_fault([FaultRule::status(401).times(1)]);
    let meanwhile = async {
        app.stand_ins.entra.token_request_count().reaches(2).await;
        ask(&app).await.structured();
        app.backend_requests().len()
    };
    let (rejected, sent_meanwhile) = tokio::join!(ask(&app), meanwhile);
    rejected.structured();
    let sent: Vec<_> = app.backend_requests().into_iter().map(|request| request.authorization_raw).collect();
    assert_eq!((sent.len(), sent_meanwhile), (4, 3));
    assert!(sent[..3].iter().all(|token| *token == sent[0]) && sent[3] != sent[0]);
}

#[tokio::test]
async fn a_replica_without_traffic_replaces_a_token_that_the_backend_revokes_and_is_ready_again() {
    let app = TestApp::spawn_with(|settings| settings.backend.check_in_readiness = true).await;
    app.until_ready().await;
    let before = token_requests(&app);
    app.stand_ins.entra.replace_keys().await.unwrap(); // the backend accepts none of the tokens before
    let replaced = app.stand_ins.entra.token_request_count().reaches(before + 1);
    tokio::time::timeout(Duration::from_secs(60), replaced).await.expect("no other token was asked for");
    until(async || {
        let checks = app.stand_ins.backend.requests();
        checks.last().is_some_and(|check| check.status.is_some_and(|status| status == 200))
    })
    .await;
    app.until_ready().await;
    assert_eq!((app.backend_requests().len(), token_requests(&app)), (0, before + 1));
}

#[tokio::test]
async fn a_call_whose_time_ends_while_it_waits_for_a_token_does_not_blame_the_backend() {
    let timeout = Duration::from_secs(6);
    let app = TestApp::spawn_with(|settings| settings.backend.timeout = timeout).await;
    ask(&app).await.structured();
    // The exchange may take 80 % of a call's time, and the backend has had more than the rest of it.
    app.stand_ins.backend.set_fault([FaultRule::status(401).after(timeout / 2)]);
    app.stand_ins.entra.set_fault([FaultRule::hang()]);
    let begin = Instant::now();
    let error = ask(&app).await.error();
    assert!(begin.elapsed() >= timeout, "{:?}", begin.elapsed());
    assert_eq!((&error["error"], &error["details"]["retryable"]), (&json!("AUTHENTICATION_ERROR"), &json!(true)));
    assert!(error["message"].as_str().unwrap().contains("Entra does not answer in time"), "{error}");
    assert_eq!((token_requests(&app), app.backend_requests().len()), (2, 2));
}

/// What a caller gets while something is wrong on the way to the token.
enum Ends {
    Well,
    /// With an AUTHENTICATION_ERROR that may pass by itself or not, and whose message holds these words.
    Badly {
        retryable: bool,
        words: &'static str,
    },
}

#[tokio::test]
async fn every_fault_on_the_way_to_a_token_ends_calls_in_time_and_never_asks_twice_at_once() {
    use Ends::{Badly, Well};
    const HANGS: &str = "hangs";
    const TOO_SLOW: &str = "too slow";

    let status = |code| vec![FaultRule::status(code)];
    let answers = |body: &str| vec![FaultRule::status(200).body(body.to_owned())];
    let secret = None;
    let file = |content: Option<&'static str>| Some(content);
    let [unwell, refuses] = ["is unwell", "refuses this sign-in"];
    let garbage = Badly { retryable: false, words: "no usable token" };
    let rows = [
        ("no file", file(None), vec![], 3_599, Badly { retryable: false, words: "AZURE_FEDERATED_TOKEN_FILE" }, 0),
        (
            "an empty file",
            file(Some(" \n")),
            vec![],
            3_599,
            Badly { retryable: false, words: "AZURE_FEDERATED_TOKEN_FILE" },
            0,
        ),
        ("400", secret, status(400), 3_599, Badly { retryable: false, words: refuses }, 1),
        ("401", secret, status(401), 3_599, Badly { retryable: false, words: refuses }, 1),
        ("429", secret, status(429), 3_599, Badly { retryable: true, words: "throttles" }, 1),
        ("500", secret, status(500), 3_599, Badly { retryable: true, words: unwell }, 2),
        ("503", secret, status(503), 3_599, Badly { retryable: true, words: unwell }, 2),
        ("503 once", secret, vec![FaultRule::status(503).times(1)], 3_599, Well, 2),
        (
            "closes",
            secret,
            vec![FaultRule::close_before_head()],
            3_599,
            Badly { retryable: true, words: "no connection" },
            2,
        ),
        (HANGS, secret, vec![FaultRule::hang()], 3_599, Badly { retryable: true, words: "in time" }, 2),
        ("slow", secret, vec![FaultRule::delay(Duration::from_millis(700))], 3_599, Well, 1),
        (
            TOO_SLOW,
            secret,
            vec![FaultRule::delay(Duration::from_secs(30))],
            3_599,
            Badly { retryable: true, words: "in time" },
            2,
        ),
        ("broken JSON", secret, vec![FaultRule::broken_json()], 3_599, garbage, 1),
        (
            "wrong types",
            secret,
            vec![FaultRule::wrong_types()],
            3_599,
            Badly { retryable: false, words: "no usable token" },
            1,
        ),
        ("nothing", secret, answers(""), 3_599, Badly { retryable: false, words: "no usable token" }, 1),
        (
            "too much",
            secret,
            vec![FaultRule::huge_body(300_000)],
            3_599,
            Badly { retryable: false, words: "no usable token" },
            1,
        ),
        ("tokens of eight seconds", secret, vec![], 8, Well, 1),
    ];
    // Four at once, for each has keys of its own to make.
    let every = stream::iter(rows).for_each_concurrent(4, async |(name, assertion, faults, lifetime, ends, most)| {
        let stand_ins = stand_ins_with_lifetime(lifetime).await;
        stand_ins.entra.set_fault(faults);
        let folder = tempfile::tempdir().unwrap();
        let begin = Instant::now();
        let app = TestApp::spawn_against(stand_ins, |settings| {
            // A call has time enough, however busy the machine is, unless it is the end of its time that is looked at.
            settings.backend.timeout = Duration::from_secs(if [HANGS, TOO_SLOW].contains(&name) { 4 } else { 60 });
            if let Some(content) = assertion {
                let token_file = folder.path().join("token");
                if let Some(content) = content {
                    std::fs::write(&token_file, content).unwrap();
                }
                settings.identity.credential = Credential::WorkloadIdentity { token_file };
            }
        })
        .await;
        for result in join_all((0..20).map(|_| ask(&app))).await {
            match &ends {
                Well => drop(result.structured()),
                Badly { retryable, words } => {
                    let error = result.error();
                    assert_eq!(error["error"], "AUTHENTICATION_ERROR", "{name}: {error}");
                    assert_eq!(error["details"]["retryable"], *retryable, "{name}: {error}");
                    assert!(error["message"].as_str().unwrap().contains(words), "{name}: {error}");
                }
            }
        }
        // The calls share one exchange; the next begins after a cool-down, or at half of a token's life.
        let requests = token_requests(&app);
        let shortest_pause = Duration::from_millis(1_600);
        let exchanges = 1 + begin.elapsed().div_duration_f64(shortest_pause) as u64;
        assert!(requests <= most * exchanges, "{name}: {requests} token requests in {:?}", begin.elapsed());
        assert!(app.stand_ins.entra.token_requests_at_once() <= 1, "{name}");
        let calls = if matches!(ends, Well) { 20 } else { 0 };
        assert_eq!(app.backend_requests().len(), calls, "{name}");
    });
    every.await;
}

/// The life of a token is counted from the moment it was asked for, by a clock that nobody sets: what Entra's clock says, and ours,
/// does not matter. (The clock of the machine cannot be set in a test; the token's own times can.)
#[tokio::test]
async fn a_clock_that_is_ten_minutes_wrong_costs_neither_calls_nor_token_requests() {
    let now = OffsetDateTime::now_utc().unix_timestamp();
    for minutes in [-10, 10] {
        let stand_ins = stand_ins().await;
        let at = |seconds: i64| now + minutes * 60 + seconds;
        let token = stand_ins.entra.access_token(&json!({ "iat": at(0), "nbf": at(0), "exp": at(3_599) }));
        let answer = json!({
            "token_type": "Bearer", "access_token": token, "expires_in": 3_599, "ext_expires_in": 3_599,
            "expires_on": at(3_599), "not_before": at(0),
        });
        stand_ins.entra.set_fault([FaultRule::status(200)
            .body(answer.to_string())
            .header("date", "Thu, 01 Jan 2026 00:00:00 GMT")]);
        let user = json!({ "id": "42", "name": "x", "email": "x", "created_at": "x" });
        stand_ins.backend.set_fault([FaultRule::status(200).body(user.to_string())]);
        let app = TestApp::spawn_against(stand_ins, |_| {}).await;
        for result in join_all((0..20).map(|_| ask(&app))).await {
            result.structured();
        }
        assert_eq!(token_requests(&app), 1);
        let expires_in = app.metric("mcp_server_token_expires_in_seconds").await;
        assert!((3_500.0..3_600.0).contains(&expires_in), "{expires_in}");
        let sent = app.backend_requests()[0].authorization_raw.clone();
        assert_eq!(sent.unwrap(), format!("Bearer {token}"));
    }
}

#[tokio::test]
async fn a_token_that_expires_while_the_backend_has_it_costs_one_refresh_and_one_replay() {
    let stand_ins = stand_ins_with_lifetime(8).await;
    let app = TestApp::spawn_against(stand_ins, |settings| settings.backend.timeout = Duration::from_secs(60)).await;
    app.until_ready().await;
    app.stand_ins.backend.set_fault([FaultRule::delay(Duration::from_millis(8_300)).times(1)]);
    ask(&app).await.structured();
    let sent: Vec<_> =
        app.backend_requests().into_iter().map(|request| (request.status, request.authorization_raw)).collect();
    let [(first_status, first), (second_status, second)] = sent.as_slice() else { panic!("{sent:?}") };
    let codes = [first_status, second_status].map(|status| status.unwrap().as_u16());
    assert_eq!(codes, [401, 200]);
    assert_ne!(first, second);
    assert_eq!(app.stand_ins.entra.token_requests_at_once(), 1);
}
