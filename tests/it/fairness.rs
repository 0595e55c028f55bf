//! One noisy caller does not slow another: the rate limit of each caller, and who counts as one.

use std::time::Duration;

use mcp_server::demo::entra::{AGENT_CLIENT_ID, DemoCaller};
use mcp_server::demo::fault::FaultRule;
use mcp_server::settings::RateLimitSettings;
use serde_json::{Value, json};

use crate::support::{Era, TestApp, error_object, until};

/// So few requests a second that none comes in during a test.
const NONE_COMES_IN: f64 = 0.001;

/// Behind a proxy on loopback that tells the clients' addresses, with so many requests for each.
async fn limited(burst: u32) -> TestApp {
    TestApp::spawn_with(|settings| {
        settings.web.trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()];
        settings.web.rate_limit.per_address = NONE_COMES_IN;
        settings.web.rate_limit.burst = burst;
    })
    .await
}

fn call(app: &TestApp, client: &str) -> reqwest::RequestBuilder {
    let arguments = json!({ "name": "get_user_profile", "arguments": { "user_id": "42" } });
    app.request(Era::Modern, "tools/call", arguments).header("x-forwarded-for", client)
}

#[tokio::test]
async fn a_caller_over_its_limit_gets_429_with_the_wait_and_costs_the_backend_nothing() {
    let app = limited(3).await;
    app.until_ready().await;
    for _ in 0..3 {
        assert_eq!(call(&app, "203.0.113.7").send().await.unwrap().status(), 200);
    }
    let refused =
        call(&app, "203.0.113.7").header("traceparent", crate::support::calls::TRACEPARENT).send().await.unwrap();
    assert_eq!(refused.status(), 429);
    let wait: u64 = refused.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((900..=1_000).contains(&wait), "{wait}");
    let problem: Value = serde_json::from_str(&refused.text().await.unwrap()).unwrap();
    let problem = error_object(&problem);
    assert_eq!(problem["error"], "SERVICE_ERROR");
    assert_eq!(
        problem["details"],
        json!({ "status_code": 429, "retryable": true, "retry_after_seconds": wait, "trace_id": crate::support::calls::TRACE_ID })
    );
    assert_eq!(app.backend_requests().len(), 3);
    assert_eq!(app.metric(r#"mcp_server_shed_total{limit="caller"}"#).await, 1.0);
}

#[tokio::test]
async fn ten_times_its_burst_of_one_caller_costs_another_none_of_its_calls() {
    let app = limited(20).await;
    app.until_ready().await;
    let crowd = (0..200).map(|_| async { call(&app, "203.0.113.7").send().await.unwrap().status().as_u16() });
    let quiet = async {
        let mut answers = Vec::new();
        for _ in 0..20 {
            answers.push(call(&app, "203.0.113.8").send().await.unwrap().status().as_u16());
        }
        answers
    };
    let (noisy, quiet) = tokio::join!(futures_util::future::join_all(crowd), quiet);
    assert_eq!(quiet, [200; 20]);
    let admitted = noisy.iter().filter(|status| **status == 200).count();
    assert_eq!(admitted, 20);
    assert!(noisy.iter().all(|status| [200, 429].contains(status)), "{noisy:?}");
    assert_eq!(app.backend_requests().len(), admitted + 20);
}

#[tokio::test]
async fn a_client_cannot_become_another_one_by_what_it_writes_into_the_header() {
    let app = limited(1).await;
    assert_eq!(call(&app, "198.51.100.1, 203.0.113.7").send().await.unwrap().status(), 200);
    for claim in ["198.51.100.2, 203.0.113.7", "10.0.0.1,,203.0.113.7", "203.0.113.7, 127.0.0.2"] {
        assert_eq!(call(&app, claim).send().await.unwrap().status(), 429, "{claim}");
    }
    assert_eq!(call(&app, "203.0.113.7, 198.51.100.2").send().await.unwrap().status(), 200, "what the proxy heard");

    // Without a trusted proxy the header is nothing: all of them are the one connection's address.
    let direct = TestApp::spawn_with(|settings| {
        settings.web.rate_limit.per_address = NONE_COMES_IN;
        settings.web.rate_limit.burst = 1;
    })
    .await;
    assert_eq!(call(&direct, "203.0.113.1").send().await.unwrap().status(), 200);
    assert_eq!(call(&direct, "203.0.113.2").send().await.unwrap().status(), 429);
}

#[tokio::test]
async fn probes_and_preflights_have_no_limit_and_by_default_addresses_have_none_either() {
    let app = TestApp::spawn_with(|settings| {
        settings.web.rate_limit.per_address = NONE_COMES_IN;
        settings.web.rate_limit.burst = 1;
        settings.web.allowed_origins = vec!["https://app.example".to_owned()];
    })
    .await;
    let preflight = || {
        let request =
            app.http.request(reqwest::Method::OPTIONS, app.url("/mcp")).header("origin", "https://app.example");
        request.header("access-control-request-method", "POST").send()
    };
    for _ in 0..20 {
        assert_eq!(app.http.get(app.url("/health/live")).send().await.unwrap().status(), 200);
        assert_eq!(preflight().await.unwrap().status(), 200);
    }
    assert_eq!(call(&app, "").send().await.unwrap().status(), 200);
    let refused = call(&app, "").header("origin", "https://app.example").send().await.unwrap();
    assert_eq!(refused.status(), 429);
    assert_eq!(refused.headers()["access-control-allow-origin"], "https://app.example");
    let exposed = refused.headers()["access-control-expose-headers"].to_str().unwrap().to_owned();
    assert!(exposed.contains("retry-after") && exposed.contains("www-authenticate"), "{exposed}");

    let open = TestApp::spawn().await;
    for _ in 0..300 {
        assert_eq!(open.send(Era::Legacy, "tools/list", json!({})).await.status(), 200);
    }
}

#[tokio::test]
async fn an_identity_is_one_caller_whatever_token_or_address_it_comes_with() {
    let app = TestApp::guarded_with(
        |_| {},
        |settings| {
            settings.web.trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()];
            settings.web.rate_limit = RateLimitSettings {
                per_caller: NONE_COMES_IN,
                per_address: 0.0,
                refused_tokens: 0.0,
                burst: 4,
                in_flight: 0,
            };
        },
    )
    .await;
    let status = async |token: &str, address: &str| {
        call(&app, address).bearer_auth(token).send().await.unwrap().status().as_u16()
    };
    // Refused for who they are, callers cost nobody's bucket anything.
    for _ in 0..20 {
        assert_eq!(status("garbage", "203.0.113.1").await, 401);
    }
    for number in 0..4 {
        let token = app.token_with(DemoCaller::Reader, json!({ "uti": number }));
        assert_eq!(status(&token, &format!("203.0.113.{number}")).await, 200);
    }
    let another_client = app.token_with(DemoCaller::Reader, json!({ "azp": AGENT_CLIENT_ID }));
    assert_eq!(status(&another_client, "203.0.113.77").await, 429);
    assert_eq!(
        status(&app.token(DemoCaller::Writer), "203.0.113.1").await,
        200,
        "another person has a bucket of their own"
    );
    assert_eq!(app.backend_requests().len(), 5);
}

#[tokio::test]
async fn one_caller_with_slow_calls_leaves_room_for_the_others() {
    let app = TestApp::guarded_with(
        |_| {},
        |settings| {
            settings.web.rate_limit.in_flight = 5;
            settings.web.max_in_flight = 10;
        },
    )
    .await;
    app.stand_ins.backend.set_fault([FaultRule::hang().on("GET /users/42")]);
    let (noisy, quiet) = (app.token(DemoCaller::Reader), app.token(DemoCaller::Writer));
    let status = |answer: reqwest::Result<reqwest::Response>| answer.unwrap().status().as_u16();
    let mut slow: Vec<_> = (0..5).map(|_| tokio::spawn(call(&app, "").bearer_auth(&noisy).send())).collect();
    until(async || app.backend_requests().len() == 5).await;
    for _ in 0..20 {
        let refused = call(&app, "").bearer_auth(&noisy).send().await.unwrap();
        assert_eq!((refused.status().as_u16(), &refused.headers()["retry-after"]), (429, &"1".parse().unwrap()));
        let arguments = json!({ "name": "get_user_profile", "arguments": { "user_id": "7" } });
        let other = app.request(Era::Modern, "tools/call", arguments).bearer_auth(&quiet).send().await;
        assert_eq!(status(other), 200);
    }
    // A client that leaves gives its seat back.
    slow.pop().unwrap().abort();
    app.stand_ins.backend.set_fault([]);
    until(async || status(call(&app, "").bearer_auth(&noisy).send().await) == 200).await;
    slow.iter().for_each(tokio::task::JoinHandle::abort);
}

/// Tokens are wanted, from clients behind a proxy on loopback, and so many may be refused for each of them.
async fn limited_in_refusals(refused_tokens: f64, burst: u32) -> TestApp {
    TestApp::guarded_with(
        |_| {},
        |settings| {
            settings.web.trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()];
            settings.web.rate_limit =
                RateLimitSettings { per_caller: 0.0, refused_tokens, burst, ..RateLimitSettings::default() };
        },
    )
    .await
}

/// The token of the reader with the signature of another one.
fn forged(app: &TestApp, number: usize) -> String {
    let (genuine, other) = (app.token(DemoCaller::Reader), app.token_with(DemoCaller::Writer, json!({ "n": number })));
    let (message, _) = genuine.rsplit_once('.').unwrap();
    let (_, signature) = other.rsplit_once('.').unwrap();
    format!("{message}.{signature}")
}

#[tokio::test]
async fn a_flood_of_forged_tokens_is_not_checked_and_keeps_nobody_out_who_was_in() {
    let app = limited_in_refusals(NONE_COMES_IN, 5).await;
    let ask = async |token: &str, client: &str| call(&app, client).bearer_auth(token).send().await.unwrap();
    let status = async |token: &str, client: &str| ask(token, client).await.status().as_u16();
    let known = app.token(DemoCaller::Writer);
    assert_eq!(status(&known, "203.0.113.7").await, 200);
    let mut answers = Vec::new();
    for number in 0..40 {
        answers.push(status(&forged(&app, number), "203.0.113.7").await);
        assert_eq!(status(&known, "203.0.113.7").await, 200, "a neighbour with a token that was good before");
    }
    assert_eq!((&answers[..5], &answers[5..]), (&[401; 5][..], &[429; 35][..]));
    let refused = ask(&forged(&app, 40), "203.0.113.7").await;
    let wait: u64 = refused.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((900..=1_000).contains(&wait), "{wait}");
    assert!(refused.headers().get("www-authenticate").is_none(), "another token would not help");
    let problem: Value = serde_json::from_str(&refused.text().await.unwrap()).unwrap();
    let problem = error_object(&problem);
    assert_eq!((&problem["error"], &problem["details"]["retryable"]), (&json!("SERVICE_ERROR"), &json!(true)));
    // A new token waits like a bad one, for only a check could tell them apart; elsewhere it is good.
    let new = app.token(DemoCaller::Reader);
    assert_eq!((status(&new, "203.0.113.7").await, status(&new, "203.0.113.8").await), (429, 200));
    assert_eq!(status(&new, "203.0.113.7").await, 200, "and is known from then on");
    let without = call(&app, "203.0.113.7").send().await.unwrap();
    assert_eq!(without.status(), 401, "whoever has no token is told where to get one");
    assert_eq!(app.metric(r#"mcp_server_shed_total{limit="refused_tokens"}"#).await, 37.0);
    assert_eq!(app.metric(r#"mcp_server_callers_refused_total{reason="signature"}"#).await, 5.0);
}

#[tokio::test]
async fn what_may_be_refused_comes_back_with_time_and_good_tokens_cost_none_of_it() {
    let app = limited_in_refusals(20.0, 2).await;
    let status = async |token: &str| call(&app, "").bearer_auth(token).send().await.unwrap().status().as_u16();
    let new = async |number: usize| status(&app.token_with(DemoCaller::Reader, json!({ "uti": number }))).await;
    for number in 0..20 {
        assert_eq!(new(number).await, 200);
    }
    let flood = futures_util::future::join_all((0..40).map(|_| status("garbage"))).await;
    assert!(flood.contains(&401) && flood.contains(&429), "{flood:?}");
    until(async || new(20).await == 200).await;

    let unlimited = limited_in_refusals(0.0, 1).await;
    for _ in 0..50 {
        assert_eq!(call(&unlimited, "").bearer_auth("garbage").send().await.unwrap().status(), 401);
    }
}

/// Every tool, asked for what works.
fn sound_calls() -> [(&'static str, Value); 5] {
    [
        ("get_user_profile", json!({ "user_id": "42" })),
        ("list_users", json!({})),
        ("list_tickets", json!({})),
        ("query_data", json!({ "dataset": "sales" })),
        ("create_ticket", json!({ "title": "Printer", "description": "It prints nothing but zeros." })),
    ]
}

#[tokio::test]
async fn a_resource_that_fails_for_one_caller_takes_no_tool_from_the_others() {
    for (fault, tool, arguments) in [
        (FaultRule::status(500).on("GET /users/broken"), "get_user_profile", json!({ "user_id": "broken" })),
        (FaultRule::status(503).on("GET /users/broken"), "get_user_profile", json!({ "user_id": "broken" })),
        (FaultRule::close_before_head().on("GET /query/broken"), "query_data", json!({ "dataset": "broken" })),
        (FaultRule::hang().on("GET /query/broken"), "query_data", json!({ "dataset": "broken" })),
    ] {
        let app = TestApp::spawn_with(|settings| {
            settings.web.trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()];
            settings.backend.max_attempts = 1;
            settings.backend.timeout = Duration::from_secs(3);
        })
        .await;
        app.until_ready().await;
        app.stand_ins.backend.set_fault([fault]);
        let call = async |client: &str, tool: &str, arguments: &Value| {
            let params = json!({ "name": tool, "arguments": arguments });
            let answer = app.request(Era::Legacy, "tools/call", params).header("x-forwarded-for", client).send().await;
            let answer: Value = serde_json::from_str(&answer.unwrap().text().await.unwrap()).unwrap();
            answer["result"].clone()
        };
        for _ in 0..2 {
            let failed = futures_util::future::join_all((0..20).map(|_| call("203.0.113.7", tool, &arguments))).await;
            assert!(failed.iter().all(|result| result["isError"] == true), "{tool}: {failed:?}");
            for (sound, arguments) in sound_calls() {
                let result = call("203.0.113.8", sound, &arguments).await;
                assert_eq!(result["isError"], false, "{sound} beside a failing {tool}: {result}");
            }
        }
        assert_eq!(app.metric(r#"mcp_server_shed_total{limit="breaker"}"#).await, 0.0);
    }
}
