//! The way to a token, through a stand-in Entra over real HTTPS: how often it is asked, what happens while it is away, and what
//! callers are told when it refuses.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use mcp_server::demo::entra::{CLIENT_SECRET, EXPIRED_CLIENT_SECRET};
use mcp_server::demo::fault::FaultRule;
use mcp_server::demo::{DemoOptions, StandIns, digest};
use mcp_server::settings::Credential;
use secrecy::SecretString;
use serde_json::{Value, json};
use time::OffsetDateTime;

use crate::support::{CallResult, Era, TestApp};

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
    tokio::time::timeout(Duration::from_secs(20), calling).await.expect("no token was asked for");
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
    let app = TestApp::spawn_against(stand_ins_with_lifetime(4).await, |_| {}).await;
    call_until_token_requests(&app, 3).await;
    let times: Vec<_> = app.stand_ins.entra.token_requests().iter().map(|request| request.at).collect();
    for pair in times.windows(2) {
        let apart = pair[1].duration_since(pair[0]).unwrap();
        assert!((1_000..3_000).contains(&apart.as_millis()), "{apart:?}");
    }
}

#[tokio::test]
async fn an_outage_of_entra_fails_no_call_while_the_token_is_good() {
    let app = TestApp::spawn_against(stand_ins_with_lifetime(6).await, |_| {}).await;
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
    let stand_ins = stand_ins_with_lifetime(4).await;
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
    assert_eq!(error["details"]["retry_after_seconds"], 3, "{error}");
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
