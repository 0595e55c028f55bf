//! Acting for the user who calls: the exchange of their token, through real HTTPS against the stand-in Entra, and whole calls.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mcp_server::demo::backend::RecordedRequest;
use mcp_server::demo::entra::{CLIENT_ID, DemoCaller, RESOURCE_APP_ID, TENANT_ID, USER_SCOPE};
use mcp_server::demo::fault::FaultRule;
use mcp_server::demo::{DemoOptions, StandIns};
use mcp_server::identity::{BearerToken, FaultClass, IdentityError, OnBehalfOf, UserAssertion};
use mcp_server::settings::BackendAuth;
use serde_json::{Map, Value, json};

use crate::support::callers::METADATA_URL;
use crate::support::{CallResult, Era, TestApp, error_object};

const ALICE: &str = "aaaaaaaa-1111-4222-8333-444444444444";
const BOB: &str = "bbbbbbbb-1111-4222-8333-444444444444";

/// A user's token for the server, with other claims where the test wants them.
fn users_token(stand_ins: &StandIns, user: &str, changes: Value) -> String {
    let mut claims = json!({
        "aud": CLIENT_ID, "oid": user, "sub": format!("{user}, pairwise"), "roles": null, "scp": "users.read",
        "azp": "cccccccc-1111-4222-8333-444444444444",
    });
    claims.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    stand_ins.entra.access_token(&claims)
}

fn assertion(stand_ins: &StandIns, user: &str, changes: Value) -> Arc<UserAssertion> {
    Arc::new(UserAssertion::new(TENANT_ID, user, users_token(stand_ins, user, changes).into()))
}

fn holder(stand_ins: &StandIns) -> OnBehalfOf {
    OnBehalfOf::new(&stand_ins.identity_settings(), Duration::from_secs(10)).unwrap()
}

/// What the token says, as the backend would read it.
fn claims(stand_ins: &StandIns, token: &BearerToken) -> Map<String, Value> {
    let token = token.authorization().to_str().unwrap().strip_prefix("Bearer ").unwrap();
    stand_ins.entra.verifier().verify(token).unwrap()
}

async fn refused(holder: &OnBehalfOf, user: Arc<UserAssertion>) -> Arc<IdentityError> {
    holder.token(&user).await.unwrap_err()
}

#[tokio::test]
async fn each_user_gets_a_token_in_their_own_name_once_by_secret_and_by_federation() {
    let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let federated = stand_ins.workload_identity_settings(file.path()).unwrap();
    for (settings, proof, acr) in
        [(stand_ins.identity_settings(), "client_secret", "1"), (federated, "client_assertion", "2")]
    {
        let before = stand_ins.entra.token_requests().len();
        let holder = OnBehalfOf::new(&settings, Duration::from_secs(10)).unwrap();
        for user in [ALICE, BOB] {
            let assertion = assertion(&stand_ins, user, json!({}));
            let token = holder.token(&assertion).await.unwrap();
            let claims = claims(&stand_ins, &token);
            assert_eq!((&claims["oid"], &claims["scp"]), (&json!(user), &json!(USER_SCOPE)));
            assert_eq!((&claims["azp"], &claims["azpacr"]), (&json!(CLIENT_ID), &json!(acr)));
            for _ in 0..10 {
                assert!(Arc::ptr_eq(&holder.token(&assertion).await.unwrap(), &token));
            }
        }
        let requests = stand_ins.entra.token_requests().split_off(before);
        assert_eq!((requests.len(), holder.remembered()), (2, 2));
        for request in requests {
            assert_eq!(request.field("requested_token_use"), Some("on_behalf_of"));
            assert!(request.field(proof).is_some() && request.field("assertion").is_some(), "{request:?}");
            assert!(request.headers.contains_key("client-request-id"));
        }
    }
}

#[tokio::test]
async fn a_rotated_federated_token_is_sent_at_the_next_exchange() {
    let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let settings = stand_ins.workload_identity_settings(file.path()).unwrap();
    let holder = OnBehalfOf::new(&settings, Duration::from_secs(10)).unwrap();
    std::fs::write(file.path(), "").unwrap();
    let error = refused(&holder, assertion(&stand_ins, ALICE, json!({}))).await;
    assert_eq!((error.class(), error.credential()), (FaultClass::Config, "on-behalf-of with workload identity"));
    assert!(error.hint().contains("AZURE_FEDERATED_TOKEN_FILE"), "{}", error.hint());
    stand_ins.workload_identity_settings(file.path()).unwrap();
    assert!(holder.token(&assertion(&stand_ins, BOB, json!({}))).await.is_ok());
}

#[tokio::test]
async fn a_refused_exchange_says_why_and_what_the_user_has_to_satisfy() {
    let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
    let holder = holder(&stand_ins);
    for (changes, status, code, hint) in [
        (json!({ "aud": RESOURCE_APP_ID }), 400, 500_131, "set AZURE_CLIENT_ID to the app"),
        (json!({ "scp": null, "roles": ["users.read"] }), 400, 7_000_114, "only users' tokens can be exchanged"),
        (json!({ "exp": 1_000_000 }), 400, 500_133, "The caller's token has expired"),
    ] {
        let error = refused(&holder, assertion(&stand_ins, ALICE, changes)).await;
        assert_eq!((error.status().map(|status| status.as_u16()), error.aadsts()), (Some(status), Some(code)));
        assert!(error.hint().contains(hint) && !error.retryable() && !error.needs_user(), "{}", error.hint());
    }

    stand_ins.entra.demand_context(Some("c1"));
    let token = users_token(&stand_ins, BOB, json!({}));
    let error = refused(&holder, Arc::new(UserAssertion::new(TENANT_ID, BOB, token.clone().into()))).await;
    assert!(error.needs_user());
    let claims: Value = serde_json::from_str(error.claims().unwrap()).unwrap();
    assert_eq!(claims["access_token"]["acrs"]["value"], "c1");
    assert!(!format!("{error:?} {error} {}", error.hint()).contains(&token));
    // Whoever comes back with what was asked for is another key: nobody has to wait for the cool-down.
    assert!(holder.token(&assertion(&stand_ins, BOB, json!({ "acrs": ["c1"] }))).await.is_ok());
}

#[tokio::test]
async fn a_tenant_that_is_no_guid_reaches_no_url_and_entra_away_is_told_from_a_refusal() {
    let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
    let holder = holder(&stand_ins);
    for tenant in ["../../elsewhere", "contoso.example", "", "common"] {
        let error = refused(&holder, Arc::new(UserAssertion::new(tenant, ALICE, "a.b.c".to_owned().into()))).await;
        assert_eq!(error.class(), FaultClass::Config, "{tenant}");
    }
    assert_eq!(stand_ins.entra.token_requests().len(), 0);
    stand_ins.entra.set_down(true).await.unwrap();
    let error = refused(&holder, assertion(&stand_ins, ALICE, json!({}))).await;
    assert!(error.class() == FaultClass::Connect && error.retryable() && error.retry_after().is_some(), "{error:?}");
    stand_ins.entra.set_down(false).await.unwrap();
    assert!(holder.token(&assertion(&stand_ins, BOB, json!({}))).await.is_ok(), "a failure is of one user");
}

/// A server whose callers need tokens, which it exchanges: the app that they are for is its own.
async fn acting_for_users(app_fallback: bool) -> TestApp {
    TestApp::guarded_with(
        |inbound| inbound.client_ids = vec![CLIENT_ID.to_owned()],
        |settings| settings.backend.auth = BackendAuth::OnBehalfOf { app_fallback },
    )
    .await
}

fn token_of(app: &TestApp, caller: DemoCaller, changes: Value) -> String {
    let mut claims = json!({ "aud": CLIENT_ID });
    claims.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    app.token_with(caller, claims)
}

/// What the token says that the backend was shown.
fn shown(app: &TestApp, request: &RecordedRequest) -> Map<String, Value> {
    let token = request.authorization_raw.as_deref().unwrap().strip_prefix("Bearer ").unwrap();
    app.stand_ins.entra.verifier().verify(token).unwrap()
}

fn profile(user: &str) -> Value {
    json!({ "name": "get_user_profile", "arguments": { "user_id": user } })
}

#[tokio::test]
async fn the_backend_sees_the_user_who_calls_and_their_token_never() {
    let app = acting_for_users(false).await;
    let people = [(DemoCaller::Reader, "1"), (DemoCaller::Writer, "2")];
    let tokens = people.map(|(caller, _)| token_of(&app, caller, json!({})));
    let calls = (0..40).map(|number| {
        let ((_, user), token) = (people[number % 2], &tokens[number % 2]);
        let era = Era::ALL[number / 2 % 2];
        app.send_as(token, era, "tools/call", profile(user))
    });
    for answer in futures_util::future::join_all(calls).await {
        assert_eq!(answer.status(), 200);
        assert!(answer.text().await.unwrap().contains(r#""isError":false"#));
    }
    let requests = app.backend_requests();
    assert_eq!(requests.len(), 40);
    for request in &requests {
        let (caller, _) = people.iter().find(|(_, user)| request.target.ends_with(&format!("/users/{user}"))).unwrap();
        let claims = shown(&app, request);
        assert_eq!((&claims["oid"], &claims["scp"]), (&json!(caller.object_id()), &json!(USER_SCOPE)), "{claims:?}");
        assert!(tokens.iter().all(|token| !format!("{request:?}").contains(&**token)));
    }
    let exchanges = app.stand_ins.entra.token_requests();
    let for_users = exchanges.iter().filter(|request| request.field("requested_token_use").is_some()).count();
    assert_eq!(for_users, 2, "one exchange for each user");
}

#[tokio::test]
async fn an_app_without_a_user_is_refused_or_acts_with_the_servers_rights_where_that_is_allowed() {
    let list = json!({ "name": "list_tickets", "arguments": {} });
    for era in Era::ALL {
        let strict = acting_for_users(false).await;
        let token = token_of(&strict, DemoCaller::Agent, json!({}));
        let answer = strict.send_as(&token, era, "tools/call", list.clone()).await;
        assert_eq!(answer.status(), 200);
        let answer: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
        let error = CallResult(answer["result"].clone()).error();
        assert_eq!((&error["error"], &error["details"]["retryable"]), (&json!("AUTHENTICATION_ERROR"), &json!(false)));
        assert!(error["message"].as_str().unwrap().contains("OBO_APP_FALLBACK"), "{error}");
        assert_eq!(strict.backend_requests().len(), 0);

        let lenient = acting_for_users(true).await;
        let token = token_of(&lenient, DemoCaller::Agent, json!({}));
        assert_eq!(lenient.send_as(&token, era, "tools/call", list.clone()).await.status(), 200);
        let requests = lenient.backend_requests();
        let claims = shown(&lenient, &requests[0]);
        let own = &lenient.stand_ins.entra.options().service_principal_id;
        assert_eq!((claims["oid"].as_str(), requests.len()), (Some(&**own), 1));
    }
}

#[tokio::test]
async fn a_user_who_has_to_sign_in_once_more_is_told_so_by_the_http_answer_with_the_claims() {
    let app = acting_for_users(true).await;
    app.stand_ins.entra.demand_context(Some("c1"));
    for (era, caller) in Era::ALL.into_iter().zip([DemoCaller::Reader, DemoCaller::Writer]) {
        let token = token_of(&app, caller, json!({}));
        for _ in 0..2 {
            let refused = app.send_as(&token, era, "tools/call", profile("1")).await;
            assert_eq!(refused.status(), 401);
            let challenge = refused.headers()["www-authenticate"].to_str().unwrap().to_owned();
            assert!(
                challenge
                    .starts_with(&format!(r#"Bearer resource_metadata="{METADATA_URL}", error="insufficient_claims""#))
            );
            let claims = challenge.split_once(r#" claims=""#).unwrap().1.split_once('"').unwrap().0;
            let claims: Value = serde_json::from_slice(&STANDARD.decode(claims).unwrap()).unwrap();
            assert_eq!(claims, json!({ "access_token": { "acrs": { "essential": true, "value": "c1" } } }));
            let problem: Value = serde_json::from_str(&refused.text().await.unwrap()).unwrap();
            let problem = error_object(&problem);
            assert_eq!(problem["error"], "AUTHENTICATION_ERROR");
            let details = &problem["details"];
            assert_eq!(
                (&details["status_code"], &details["aadsts"], &details["retryable"]),
                (&json!(401), &json!(50_076), &json!(false))
            );
            assert!(details.get("claims").is_none() && details["trace_id"].is_string(), "{problem}");
        }
        assert_eq!(app.backend_requests().len(), 0, "never with the server's token instead");
        let stronger = token_of(&app, caller, json!({ "acrs": ["c1"] }));
        assert_eq!(app.send_as(&stronger, era, "tools/call", profile("1")).await.status(), 200);
        app.stand_ins.backend.forget_requests();
    }
}

#[tokio::test]
async fn a_401_of_the_backend_costs_one_user_one_token_and_the_other_nothing() {
    let app = acting_for_users(false).await;
    let (reader, writer) =
        (token_of(&app, DemoCaller::Reader, json!({})), token_of(&app, DemoCaller::Writer, json!({})));
    let exchanges = || {
        let requests = app.stand_ins.entra.token_requests();
        requests.iter().filter(|request| request.field("requested_token_use").is_some()).count()
    };
    for (token, user) in [(&reader, "1"), (&writer, "2")] {
        assert_eq!(app.send_as(token, Era::Modern, "tools/call", profile(user)).await.status(), 200);
    }
    let own = app.stand_ins.entra.token_requests().len() - exchanges();
    app.stand_ins.backend.set_fault([FaultRule::status(401).on("GET /users/1").times(1)]);
    let answer = app.send_as(&reader, Era::Modern, "tools/call", profile("1")).await.text().await.unwrap();
    assert!(answer.contains(r#""isError":false"#), "replayed with a new token: {answer}");
    assert_eq!(exchanges(), 3);
    for (token, user) in [(&reader, "1"), (&writer, "2")] {
        assert_eq!(app.send_as(token, Era::Modern, "tools/call", profile(user)).await.status(), 200);
    }
    assert_eq!(exchanges(), 3);
    assert_eq!(app.stand_ins.entra.token_requests().len() - exchanges(), own, "the server's own token stays");
}

#[tokio::test]
async fn a_401_while_entra_is_away_fails_one_call_of_a_user_and_their_token_serves_on() {
    let app = acting_for_users(false).await;
    let token = token_of(&app, DemoCaller::Reader, json!({}));
    let call = async || {
        let answer = app.send_as(&token, Era::Modern, "tools/call", profile("1")).await.text().await.unwrap();
        let answer: Value = serde_json::from_str(&answer).unwrap();
        CallResult(answer["result"].clone())
    };
    call().await.structured();
    app.stand_ins.entra.set_down(true).await.unwrap();
    app.stand_ins.backend.set_fault([FaultRule::status(401).times(1)]);
    let error = call().await.error();
    assert_eq!((&error["error"], &error["details"]["retryable"]), (&json!("AUTHENTICATION_ERROR"), &json!(true)));
    assert_eq!(error["details"]["status_code"], 401, "the backend was asked: {error}");
    for _ in 0..10 {
        call().await.structured();
    }
    let sent: Vec<_> = app.backend_requests().into_iter().map(|request| request.authorization_raw).collect();
    assert!(sent.len() == 12 && sent.iter().all(|authorization| *authorization == sent[0]));
}

#[tokio::test]
async fn a_write_that_may_have_happened_is_told_as_such_and_not_as_a_sign_in_after_which_clients_call_again() {
    let app = TestApp::guarded_with(
        |inbound| inbound.client_ids = vec![CLIENT_ID.to_owned()],
        |settings| {
            settings.backend.auth = BackendAuth::OnBehalfOf { app_fallback: false };
            // The attempt whose outcome is unknown is repeated.
            settings.backend.idempotent_creates = true;
        },
    )
    .await;
    let token = token_of(&app, DemoCaller::Writer, json!({}));
    assert_eq!(app.send_as(&token, Era::Modern, "tools/call", profile("1")).await.status(), 200);
    app.stand_ins.entra.demand_context(Some("c1"));
    let faults = [FaultRule::status(503).times(1), FaultRule::status(401)];
    app.stand_ins.backend.set_fault(faults.map(|rule| rule.on("POST /tickets")));
    let ticket = json!({ "name": "create_ticket", "arguments": { "title": "Printer", "description": "long enough" } });
    let answer = app.send_as(&token, Era::Modern, "tools/call", ticket).await;
    assert_eq!((answer.status().as_u16(), answer.headers().get("www-authenticate")), (200, None));
    let answer: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
    let error = CallResult(answer["result"].clone()).error();
    let details = &error["details"];
    assert_eq!((&details["outcome"], &details["retryable"]), (&json!("unknown"), &json!(false)), "{error}");
}
