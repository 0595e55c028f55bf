//! Acting for the user who calls: the exchange of their token, through real HTTPS against the stand-in Entra.

use std::sync::Arc;
use std::time::Duration;

use mcp_server::demo::entra::{CLIENT_ID, RESOURCE_APP_ID, TENANT_ID, USER_SCOPE};
use mcp_server::demo::{DemoOptions, StandIns};
use mcp_server::identity::{BearerToken, FaultClass, IdentityError, OnBehalfOf, UserAssertion};
use serde_json::{Map, Value, json};

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
