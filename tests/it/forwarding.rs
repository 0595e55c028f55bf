//! What the backend is told of the caller, and that nobody but a checked token can tell it.

use mcp_server::demo::backend::RecordedRequest;
use mcp_server::demo::entra::{AGENT_CLIENT_ID, DemoCaller, PEOPLES_CLIENT_ID, TENANT_ID};
use serde_json::json;

use crate::support::{Era, TestApp, until};

const TOLD: [&str; 3] = ["x-caller-subject", "x-caller-app", "x-caller-tenant"];

fn told(request: &RecordedRequest) -> [Option<&str>; 3] {
    TOLD.map(|name| request.header(name))
}

/// A call that claims to come from somebody else.
async fn call(app: &TestApp, era: Era, token: Option<&str>) {
    let arguments = json!({ "name": "list_tickets", "arguments": {} });
    let mut request = app.request(era, "tools/call", arguments);
    for name in TOLD {
        request = request.header(name, "forged").header(name, "and-twice");
    }
    if let Some(token) = token {
        request = request.bearer_auth(token);
    }
    assert_eq!(request.send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn the_backend_is_told_who_calls_by_the_token_and_never_by_a_header() {
    let app = TestApp::guarded_with(|_| {}, |settings| settings.backend.forward_caller = true).await;
    for (caller, client) in [
        (DemoCaller::Reader, PEOPLES_CLIENT_ID),
        (DemoCaller::Writer, PEOPLES_CLIENT_ID),
        (DemoCaller::Agent, AGENT_CLIENT_ID),
    ] {
        for era in Era::ALL {
            app.stand_ins.backend.forget_requests();
            call(&app, era, Some(&app.token(caller))).await;
            let requests = app.backend_requests();
            assert_eq!(told(&requests[0]), [Some(caller.object_id()), Some(client), Some(TENANT_ID)]);
            for name in TOLD {
                assert_eq!(requests[0].headers.get_all(name).iter().count(), 1, "{name}");
            }
        }
    }
}

#[tokio::test]
async fn nothing_is_told_unless_it_is_asked_for_nor_of_the_servers_own_questions() {
    let silent = TestApp::guarded().await;
    call(&silent, Era::Modern, Some(&silent.token(DemoCaller::Reader))).await;
    assert_eq!(told(&silent.backend_requests()[0]), [None; 3]);

    let anonymous = TestApp::spawn_with(|settings| settings.backend.forward_caller = true).await;
    call(&anonymous, Era::Modern, None).await;
    assert_eq!(told(&anonymous.backend_requests()[0]), [None; 3], "there is nobody to tell of");

    let healthy = TestApp::guarded_with(
        |_| {},
        |settings| {
            settings.backend.forward_caller = true;
            settings.backend.check_in_readiness = true;
        },
    )
    .await;
    let asked = || healthy.stand_ins.backend.requests().into_iter().find(|request| request.target == "/health");
    until(async || asked().is_some()).await;
    assert_eq!(told(&asked().unwrap()), [None; 3]);
}
