//! What each tool asks of the backend, what it accepts, and what it gives back.

use mcp_server::demo::backend::RecordedRequest;
use mcp_server::demo::fault::FaultRule;
use serde_json::{Value, json};

use crate::support::calls::{TRACE_ID, TRACEPARENT, is_uuid};
use crate::support::{Era, TestApp};

const DESCRIPTION: &str = "It does not start any more.";

#[tokio::test]
async fn each_tool_asks_the_backend_for_exactly_what_it_was_asked() {
    let app = TestApp::spawn().await;
    let text = |character: &str, times: usize| character.repeat(times);
    for (tool, arguments, line, body) in [
        ("get_user_profile", json!({ "user_id": "42" }), "GET /users/42", None),
        ("get_user_profile", json!({ "user_id": "42", "include_details": false }), "GET /users/42", None),
        (
            "get_user_profile",
            json!({ "user_id": "42", "include_details": true }),
            "GET /users/42?include_details=true",
            None,
        ),
        ("list_users", json!({}), "GET /users?skip=0&limit=10", None),
        ("list_users", json!({ "skip": 20.0, "limit": 10.0 }), "GET /users?skip=20&limit=10", None),
        ("list_users", json!({ "skip": 7, "limit": 100 }), "GET /users?skip=7&limit=100", None),
        ("list_tickets", json!({}), "GET /tickets?skip=0&limit=10", None),
        (
            "list_tickets",
            json!({ "status": "in_progress", "limit": 1 }),
            "GET /tickets?skip=0&limit=1&status=in_progress",
            None,
        ),
        ("query_data", json!({ "dataset": "sales" }), "GET /query/sales?limit=100", None),
        (
            "query_data",
            json!({ "dataset": "sales", "limit": 2, "filters": { "region": "EMEA", "returned": false } }),
            "GET /query/sales?limit=2&filters=%7B%22region%22%3A%22EMEA%22%2C%22returned%22%3Afalse%7D",
            None,
        ),
        (
            "query_data",
            json!({ "dataset": "sales", "filters": { "product": "a&b=c#d +é" } }),
            "GET /query/sales?limit=100&filters=%7B%22product%22%3A%22a%26b%3Dc%23d%20%2B%C3%A9%22%7D",
            None,
        ),
        (
            "create_ticket",
            json!({ "title": "Printer", "description": DESCRIPTION }),
            "POST /tickets",
            Some(json!({ "title": "Printer", "description": DESCRIPTION, "priority": "medium" })),
        ),
        (
            "create_ticket",
            json!({ "title": text("é", 200), "description": text("😀", 10), "priority": "critical", "assignee_id": "ann@example.com" }),
            "POST /tickets",
            Some(
                json!({ "title": text("é", 200), "description": text("😀", 10), "priority": "critical", "assignee_id": "ann@example.com" }),
            ),
        ),
        (
            "create_ticket",
            json!({ "title": "a\r\nX-Injected: y", "description": DESCRIPTION }),
            "POST /tickets",
            Some(json!({ "title": "a\r\nX-Injected: y", "description": DESCRIPTION, "priority": "medium" })),
        ),
    ] {
        for era in Era::ALL {
            let (result, requests) = app.call_and_watch(era, tool, arguments.clone()).await;
            result.structured();
            let [request] = requests.as_slice() else { panic!("{arguments}: {requests:?}") };
            assert_eq!(format!("{} {}", request.method, request.target), line);
            assert_eq!(serde_json::from_slice::<Value>(&request.body).ok(), body, "{arguments}");
            assert_headers(request);
        }
    }
}

fn assert_headers(request: &RecordedRequest) {
    assert_headers_alone(request);
    assert!(request.header("traceparent").unwrap().starts_with(&format!("00-{TRACE_ID}-")));
}

fn assert_headers_alone(request: &RecordedRequest) {
    let mut names: Vec<_> = request.headers.keys().map(http::HeaderName::as_str).collect();
    names.sort_unstable();
    if request.method == http::Method::POST {
        let expected =
            ["accept", "accept-encoding", "authorization", "content-length", "content-type", "host", "idempotency-key"];
        assert_eq!(names, [expected.as_slice(), &["traceparent", "user-agent"]].concat());
        assert_eq!(request.header("content-type"), Some("application/json"));
        assert!(is_uuid(request.header("idempotency-key").unwrap()), "{request:?}");
    } else {
        assert_eq!(names, ["accept", "accept-encoding", "authorization", "host", "traceparent", "user-agent"]);
        assert!(request.body.is_empty());
    }
    assert_eq!(request.header("accept"), Some("application/json"));
    assert_eq!(request.header("user-agent"), Some(concat!("mcp-server/", env!("CARGO_PKG_VERSION"))));
    assert!(request.authorization_raw.as_ref().unwrap().starts_with("Bearer ey"));
}

#[tokio::test]
async fn nothing_that_the_caller_sends_as_a_header_reaches_the_backend() {
    let app = TestApp::spawn().await;
    for era in Era::ALL {
        app.stand_ins.backend.forget_requests();
        let call =
            app.request(era, "tools/call", json!({ "name": "get_user_profile", "arguments": { "user_id": "42" } }));
        let call = ["authorization", "cookie", "x-forwarded-for", "x-request-id", "baggage", "proxy-authorization"]
            .into_iter()
            .fold(call, |call, name| call.header(name, "Bearer canary-of-the-caller"));
        assert_eq!(call.send().await.unwrap().status(), 200);
        let requests = app.backend_requests();
        assert_headers_alone(&requests[0]);
        assert!(!format!("{requests:?}").contains("canary-of-the-caller"));
    }
}

#[tokio::test]
async fn answers_of_calls_at_the_same_time_are_not_mixed_up() {
    let app = TestApp::spawn().await;
    let calls = (1..=100).map(|id: u32| {
        let (app, era) = (&app, Era::ALL[id as usize % 2]);
        async move {
            let user = app.call(era, "get_user_profile", json!({ "user_id": id.to_string() })).await;
            assert_eq!(user.structured()["id"], id.to_string());
        }
    });
    futures_util::future::join_all(calls).await;
    assert_eq!(app.stand_ins.entra.token_request_count().get(), 1);
}

#[tokio::test]
async fn every_ticket_has_an_idempotency_key_of_its_own() {
    let app = TestApp::spawn().await;
    for _ in 0..2 {
        app.call(Era::Modern, "create_ticket", json!({ "title": "x", "description": DESCRIPTION })).await.structured();
    }
    let requests = app.backend_requests();
    assert_ne!(requests[0].header("idempotency-key"), requests[1].header("idempotency-key"));
}

#[tokio::test]
async fn results_match_their_published_schema_and_stand_twice_as_the_same_object() {
    let app = TestApp::spawn().await;
    let schemas = app.schemas().await;
    for (tool, arguments) in [
        ("get_user_profile", json!({ "user_id": "1" })),
        ("get_user_profile", json!({ "user_id": "1", "include_details": true })),
        ("list_users", json!({ "limit": 100 })),
        ("list_users", json!({ "skip": 100_000 })),
        ("create_ticket", json!({ "title": "x", "description": DESCRIPTION })),
        ("create_ticket", json!({ "title": "x", "description": DESCRIPTION, "assignee_id": "7" })),
        ("list_tickets", json!({ "limit": 100 })),
        ("list_tickets", json!({ "status": "closed" })),
        ("query_data", json!({ "dataset": "sales", "limit": 1000 })),
        ("query_data", json!({ "dataset": "incidents" })),
        ("query_data", json!({ "dataset": "sales", "filters": { "region": "nowhere" } })),
    ] {
        for era in Era::ALL {
            let result = app.call(era, tool, arguments.clone()).await;
            let structured = result.structured();
            let wrong: Vec<_> = schemas[tool].output.iter_errors(structured).map(|wrong| wrong.to_string()).collect();
            assert!(wrong.is_empty(), "{tool} {arguments}: {wrong:?}");
            assert_eq!(result.text().len(), structured.to_string().len(), "the text is compact JSON");
            assert!(!has_null_field(tool, structured), "{structured}");
        }
    }
}

/// Rows of datasets may hold null; nothing else may.
fn has_null_field(tool: &str, value: &Value) -> bool {
    let null = |object: &Value| object.as_object().unwrap().values().any(Value::is_null);
    tool != "query_data" && (null(value) || value["items"].as_array().is_some_and(|items| items.iter().any(null)))
}

#[tokio::test]
async fn a_created_ticket_is_there_afterwards() {
    let app = TestApp::spawn().await;
    for era in Era::ALL {
        let title = format!("The printer of {era:?}");
        let ticket = json!({ "title": title, "description": DESCRIPTION, "priority": "high" });
        let created = app.call(era, "create_ticket", ticket).await;
        let newest = app.call(era, "list_tickets", json!({ "limit": 1, "status": "open" })).await;
        assert_eq!(&newest.structured()["items"][0], created.structured());
        assert_eq!(created.structured()["title"], title);
        assert_eq!(created.structured()["status"], "open");
    }
}

#[tokio::test]
async fn pages_and_filters_reach_the_caller_as_asked() {
    let app = TestApp::spawn().await;
    for era in Era::ALL {
        let page = app.call(era, "list_users", json!({ "skip": 248, "limit": 5 })).await;
        let ids: Vec<_> =
            page.structured()["items"].as_array().unwrap().iter().map(|user| user["id"].clone()).collect();
        assert_eq!((&page.structured()["total"], ids), (&json!(250), vec![json!("249"), json!("250")]));

        let filters = json!({ "region": "APAC", "returned": true });
        let query = app.call(era, "query_data", json!({ "dataset": "sales", "filters": filters, "limit": 5 })).await;
        let rows = query.structured()["data"].as_array().unwrap();
        assert_eq!((&query.structured()["rows"], &query.structured()["dataset"]), (&json!(5), &json!("sales")));
        assert!(rows.len() == 5 && rows.iter().all(|row| row["region"] == "APAC" && row["returned"] == true));
    }
}

#[tokio::test]
async fn fields_that_the_backend_adds_are_dropped_from_users_and_tickets_and_kept_in_details_and_data() {
    let app = TestApp::spawn().await;
    let user = json!({ "id": "7", "name": "Ada", "email": "ada@x.example", "created_at": "2026-01-01T00:00:00Z" });
    let ticket = json!({
        "id": "T-1", "title": "x", "description": DESCRIPTION, "priority": "low", "status": "open",
        "created_at": "2026-01-01T00:00:00Z", "updated_at": "2026-01-01T00:00:00Z",
    });
    let details = json!({ "office": null, "badges": [{ "level": 3 }], "since": 1.5 });
    let row = json!({ "n": 9_007_199_254_740_993_u64, "nothing": null, "nested": { "deep": [1, "😀"] } });
    let [get_user, create, with_details, query] = [
        ("get_user_profile", json!({ "user_id": "7" })),
        ("create_ticket", json!({ "title": "x", "description": DESCRIPTION })),
        ("get_user_profile", json!({ "user_id": "7", "include_details": true })),
        ("query_data", json!({ "dataset": "sales" })),
    ];
    for ((tool, arguments), sent, expected) in [
        (&get_user, with(&user, json!({ "salary": 1, "details": details })), user.clone()),
        (&get_user, with(&user, json!({ "details": null })), user.clone()),
        (
            &with_details,
            with(&user, json!({ "salary": 1, "details": details })),
            with(&user, json!({ "details": details })),
        ),
        (&with_details, with(&user, json!({ "details": null })), user.clone()),
        (&with_details, user.clone(), user.clone()),
        (&create, with(&ticket, json!({ "channel": "api", "assignee_id": null })), ticket.clone()),
        (
            &create,
            with(&ticket, json!({ "channel": "api", "assignee_id": "7" })),
            with(&ticket, json!({ "assignee_id": "7" })),
        ),
        (
            &("list_users", json!({})),
            json!({ "total": 1, "next": "/x", "items": [with(&user, json!({ "salary": 1 }))] }),
            json!({ "total": 1, "items": [user] }),
        ),
        (
            &("list_tickets", json!({})),
            json!({ "total": 1, "next": "/x", "items": [with(&ticket, json!({ "salary": 1 }))] }),
            json!({ "total": 1, "items": [ticket] }),
        ),
        (
            &query,
            json!({ "data": [row, {}], "took_ms": 3 }),
            json!({ "dataset": "sales", "rows": 2, "data": [row, {}] }),
        ),
    ] {
        app.stand_ins.backend.set_fault([FaultRule::status(200).body(sent.to_string())]);
        for era in Era::ALL {
            let result = app.call(era, tool, arguments.clone()).await;
            assert_eq!(result.structured(), &expected, "{tool} {sent}");
        }
    }
}

fn with(object: &Value, more: Value) -> Value {
    let mut object = object.clone();
    object.as_object_mut().unwrap().append(&mut more.as_object().unwrap().clone());
    object
}

#[tokio::test]
async fn whatever_is_within_the_bounds_is_sent() {
    let app = TestApp::spawn().await;
    let schemas = app.schemas().await;
    for (tool, arguments) in within_bounds() {
        assert!(schemas[tool].input.is_valid(&arguments), "{tool} {arguments}");
        for era in Era::ALL {
            let (result, requests) = app.call_and_watch(era, tool, arguments.clone()).await;
            assert_eq!(requests.len(), 1, "{tool} {arguments}: {result:?}");
        }
    }
}

fn within_bounds() -> Vec<(&'static str, Value)> {
    let ticket =
        |title: &str, description: &str| ("create_ticket", json!({ "title": title, "description": description }));
    let mut calls = vec![ticket("x", DESCRIPTION)];
    for character in ["x", "é", "語", "😀"] {
        calls.push(ticket(&character.repeat(200), &character.repeat(10)));
        calls.push(ticket(character, &character.repeat(5000)));
        for length in [1, 128] {
            let id = character.repeat(length);
            calls.push(("get_user_profile", json!({ "user_id": id })));
            calls.push(("query_data", json!({ "dataset": id })));
            calls.push(("create_ticket", json!({ "title": "x", "description": DESCRIPTION, "assignee_id": id })));
        }
    }
    for tool in ["list_users", "list_tickets"] {
        for limit in [1, 2, 99, 100] {
            calls.push((tool, json!({ "limit": limit })));
        }
        for skip in [0, 1, 9_007_199_254_740_991_u64] {
            calls.push((tool, json!({ "skip": skip })));
        }
        calls.push((tool, json!({ "limit": 10.0, "skip": 1e2 })));
    }
    for limit in [1, 100, 101, 999, 1000] {
        calls.push(("query_data", json!({ "dataset": "sales", "limit": limit })));
    }
    for filters in [json!({}), json!({ "region": ["EMEA", "APAC"] }), json!({ "sold_on": null })] {
        calls.push(("query_data", json!({ "dataset": "sales", "filters": filters })));
    }
    for status in ["open", "in_progress", "closed"] {
        calls.push(("list_tickets", json!({ "status": status })));
    }
    for priority in ["low", "medium", "high", "critical"] {
        calls.push(("create_ticket", json!({ "title": "x", "description": DESCRIPTION, "priority": priority })));
    }
    calls
}

#[tokio::test]
async fn null_for_an_optional_argument_counts_as_absent() {
    let app = TestApp::spawn().await;
    for (tool, arguments, target) in [
        ("get_user_profile", json!({ "user_id": "42", "include_details": null }), "/users/42"),
        ("list_users", json!({ "skip": null, "limit": null }), "/users?skip=0&limit=10"),
        ("list_tickets", json!({ "status": null, "skip": null, "limit": null }), "/tickets?skip=0&limit=10"),
        ("query_data", json!({ "dataset": "sales", "filters": null, "limit": null }), "/query/sales?limit=100"),
        (
            "create_ticket",
            json!({ "title": "x", "description": DESCRIPTION, "priority": null, "assignee_id": null }),
            "/tickets",
        ),
    ] {
        for era in Era::ALL {
            let (result, requests) = app.call_and_watch(era, tool, arguments.clone()).await;
            result.structured();
            assert_eq!(requests[0].target, target);
            assert!(!String::from_utf8_lossy(&requests[0].body).contains("null"));
        }
    }
}

#[tokio::test]
async fn arguments_may_be_left_out_where_none_is_required() {
    let app = TestApp::spawn().await;
    for era in Era::ALL {
        for tool in ["list_users", "list_tickets"] {
            let result = app.result(era, "tools/call", json!({ "name": tool })).await;
            assert_eq!(result["isError"], false, "{result}");
        }
    }
}

#[tokio::test]
async fn whatever_is_beyond_the_bounds_is_refused_with_advice_and_nothing_is_sent() {
    let app = TestApp::spawn().await;
    let schemas = app.schemas().await;
    for (tool, arguments, fields) in beyond_bounds() {
        assert!(!schemas[tool].input.is_valid(&arguments), "{tool} {arguments}");
        for era in Era::ALL {
            let (result, requests) = app.call_and_watch(era, tool, arguments.clone()).await;
            let error = result.error();
            assert_eq!(error["details"]["fields"], fields, "{tool} {arguments}: {error}");
            assert_eq!(error["error"], "VALIDATION_ERROR");
            assert_eq!(error["details"]["retryable"], false);
            assert!(requests.is_empty(), "{tool} {arguments}: {requests:?}");
        }
    }
}

fn beyond_bounds() -> Vec<(&'static str, Value, Value)> {
    let ticket = |title: &str, description: &str| json!({ "title": title, "description": description });
    let title = |count: usize| json!({ "title": format!("has {count} characters; it must be a string of 1 to 200 characters") });
    let description = |count: usize| json!({ "description": format!("has {count} characters; it must be a string of 10 to 5000 characters") });
    let id = |field: &str, what: &str| json!({ field: format!("{what}; it must be a string of 1 to 128 characters") });
    let limit =
        |what: &str, max: usize| json!({ "limit": format!("is {what}; it must be an integer from 1 to {max}") });
    let skip = |what: &str| json!({ "skip": format!("is {what}; it must be an integer from 0 to 9007199254740991") });

    let mut calls = vec![("create_ticket", ticket("", DESCRIPTION), title(0))];
    for character in ["x", "é", "語", "😀"] {
        calls.push(("create_ticket", ticket(&character.repeat(201), DESCRIPTION), title(201)));
        calls.push(("create_ticket", ticket("x", &character.repeat(9)), description(9)));
        calls.push(("create_ticket", ticket("x", &character.repeat(5001)), description(5001)));
        let long = character.repeat(129);
        calls.push(("get_user_profile", json!({ "user_id": long }), id("user_id", "has 129 characters")));
        calls.push(("query_data", json!({ "dataset": long }), id("dataset", "has 129 characters")));
        calls.push((
            "create_ticket",
            with(&ticket("x", DESCRIPTION), json!({ "assignee_id": long })),
            id("assignee_id", "has 129 characters"),
        ));
    }
    for tool in ["list_users", "list_tickets"] {
        for (value, shown) in [
            (json!(0), "0"),
            (json!(101), "101"),
            (json!(-1), "-1"),
            (json!(10.5), "10.5"),
            (json!(1e300), "1e+300"),
            (json!("ten"), "a string"),
            (json!(true), "a boolean"),
            (json!([]), "an array"),
            (json!({}), "an object"),
        ] {
            calls.push((tool, json!({ "limit": value }), limit(shown, 100)));
        }
        for (value, shown) in [
            (json!(-1), "-1"),
            (json!(0.5), "0.5"),
            (json!(9_007_199_254_740_992_u64), "9007199254740992"),
            (json!(u64::MAX), "18446744073709551615"),
            (json!("zero"), "a string"),
        ] {
            calls.push((tool, json!({ "skip": value }), skip(shown)));
        }
    }
    for (value, shown) in [(json!(0), "0"), (json!(1001), "1001"), (json!(1000.5), "1000.5"), (json!("1."), "a string")]
    {
        calls.push(("query_data", json!({ "dataset": "sales", "limit": value }), limit(shown, 1000)));
    }
    for (value, shown) in [
        (json!(42.5), "a number"),
        (Value::Null, "null"),
        (json!(false), "a boolean"),
        (json!(["42"]), "an array"),
        (json!({}), "an object"),
    ] {
        calls.push(("get_user_profile", json!({ "user_id": value }), id("user_id", &format!("is {shown}"))));
        calls.push(("query_data", json!({ "dataset": value }), id("dataset", &format!("is {shown}"))));
        calls.push((
            "create_ticket",
            json!({ "title": value, "description": DESCRIPTION }),
            json!({ "title": format!("is {shown}; it must be a string of 1 to 200 characters") }),
        ));
        calls.push((
            "create_ticket",
            json!({ "title": "x", "description": value }),
            json!({ "description": format!("is {shown}; it must be a string of 10 to 5000 characters") }),
        ));
    }
    calls.push((
        "create_ticket",
        with(&ticket("x", DESCRIPTION), json!({ "assignee_id": 7.5 })),
        id("assignee_id", "is a number"),
    ));
    for (value, shown) in [(json!("yes"), "a string"), (json!(1), "a number")] {
        calls.push((
            "get_user_profile",
            json!({ "user_id": "42", "include_details": value }),
            json!({ "include_details": format!("is {shown}; it must be true or false") }),
        ));
    }
    for (value, shown) in [(json!("{"), "a string"), (json!([]), "an array"), (json!(1), "a number")] {
        calls.push((
            "query_data",
            json!({ "dataset": "sales", "filters": value }),
            json!({ "filters": format!("is {shown}; it must be an object") }),
        ));
    }
    for (value, what) in [(json!("Open"), "is none of the accepted values"), (json!(1), "is a number")] {
        calls.push((
            "list_tickets",
            json!({ "status": value }),
            json!({ "status": format!("{what}; it must be one of open, in_progress, closed") }),
        ));
    }
    for (value, what) in [(json!("urgent"), "is none of the accepted values"), (json!(1), "is a number")] {
        calls.push((
            "create_ticket",
            with(&ticket("x", DESCRIPTION), json!({ "priority": value })),
            json!({ "priority": format!("{what}; it must be one of low, medium, high, critical") }),
        ));
    }
    calls.extend([
        (
            "get_user_profile",
            json!({}),
            json!({ "user_id": "is missing; a string of 1 to 128 characters is required" }),
        ),
        ("query_data", json!({}), json!({ "dataset": "is missing; a string of 1 to 128 characters is required" })),
        (
            "create_ticket",
            json!({}),
            json!({
                "title": "is missing; a string of 1 to 200 characters is required",
                "description": "is missing; a string of 10 to 5000 characters is required",
            }),
        ),
        (
            "get_user_profile",
            json!({ "userId": "42" }),
            json!({
                "user_id": "is missing; a string of 1 to 128 characters is required",
                "userId": "is not an argument of this tool, which takes `include_details`, `user_id`",
            }),
        ),
        (
            "list_users",
            json!({ "page": 1 }),
            json!({ "page": "is not an argument of this tool, which takes `limit`, `skip`" }),
        ),
        (
            "list_tickets",
            json!({ "page": null }),
            json!({ "page": "is not an argument of this tool, which takes `limit`, `skip`, `status`" }),
        ),
        (
            "query_data",
            json!({ "dataset": "sales", "sql": "DROP" }),
            json!({ "sql": "is not an argument of this tool, which takes `dataset`, `filters`, `limit`" }),
        ),
        (
            "create_ticket",
            json!({ "title": "", "description": "short", "priority": "urgent", "assignee_id": "a/b", "colour": "red" }),
            json!({
                "title": "has 0 characters; it must be a string of 1 to 200 characters",
                "description": "has 5 characters; it must be a string of 10 to 5000 characters",
                "priority": "is none of the accepted values; it must be one of low, medium, high, critical",
                "assignee_id": "must not contain `/`, `\\`, `?`, `#`, `%` or control characters, which no identifier has",
                "colour": "is not an argument of this tool, which takes `assignee_id`, `description`, `priority`, `title`",
            }),
        ),
    ]);
    calls
}

#[tokio::test]
async fn filters_that_are_too_long_for_a_url_are_refused() {
    let app = TestApp::spawn().await;
    let empty = json!({ "region": "" }).to_string().len();
    for character in ["x", " ", "é", "😀"] {
        let most = (8_192 - empty) / character.len();
        for (times, accepted) in [(most, true), (most + 1, false)] {
            let arguments = json!({ "dataset": "sales", "filters": { "region": character.repeat(times) } });
            let (result, requests) = app.call_and_watch(Era::Modern, "query_data", arguments).await;
            assert_eq!(requests.len(), usize::from(accepted), "{character} {times}: {result:?}");
            if accepted {
                assert_eq!(result.structured()["rows"], 0);
            } else {
                let fields = json!({ "filters": "is too long; as compact JSON it may have 8192 bytes" });
                assert_eq!(result.error()["details"]["fields"], fields);
            }
        }
    }
}

#[tokio::test]
async fn an_answer_to_nonsense_stays_short() {
    let app = TestApp::spawn().await;
    let nonsense: serde_json::Map<_, _> =
        (0..200).map(|n| (format!("{n}{}", "\u{1b}x".repeat(60)), json!(1))).collect();
    let error = app.call(Era::Modern, "list_users", nonsense.into()).await.error();
    assert_eq!(error["details"]["fields"].as_object().unwrap().len(), 8);
    assert!(error.to_string().len() < 4_096 && !error.to_string().contains("\\u001b"), "{error}");
}

/// A plain call goes past rmcp; one with a header of the kind that mirrors arguments does not, and nobody can tell them apart.
#[tokio::test]
async fn the_short_way_of_a_plain_call_and_rmcps_give_the_same_answers_traces_and_figures() {
    let app = TestApp::spawn().await;
    app.stand_ins.backend.set_fault([FaultRule::status(418).on("GET /tickets")]);
    let ended = |era: Era, outcome: &str| {
        let version = era.version();
        let labels = r#"mcp_method_name="tools/call",gen_ai_tool_name="list_tickets",network_transport="tcp""#;
        format!(r#"mcp_server_operation_duration_seconds_count{{{labels}{outcome},mcp_protocol_version="{version}"}}"#)
    };
    for era in Era::ALL {
        for (tool, arguments) in [
            ("get_user_profile", json!({ "user_id": "42", "include_details": true })),
            ("get_user_profile", json!({ "user_id": "nobody" })),
            ("list_users", json!({ "limit": 3 })),
            ("query_data", json!({ "dataset": "sales", "filters": { "region": "EMEA" } })),
            ("query_data", json!({ "dataset": "\u{0}\"\\" })),
            ("list_tickets", json!({})),
            ("create_ticket", json!({ "title": "" })),
        ] {
            let params = json!({ "name": tool, "arguments": arguments, "_meta": { "progressToken": "p" } });
            let mut answers = Vec::new();
            for mirrored in [false, true] {
                app.stand_ins.backend.forget_requests();
                let mut request = app.request(era, "tools/call", params.clone()).header("traceparent", TRACEPARENT);
                if mirrored {
                    request = request.header("mcp-param-none", "none");
                }
                let response = request.send().await.unwrap();
                let (status, mut head) = (response.status(), response.headers().clone());
                head.remove("date");
                let targets: Vec<_> = app.backend_requests().into_iter().map(|request| request.target).collect();
                answers.push((status, head, response.text().await.unwrap(), targets));
            }
            assert_eq!(answers[0], answers[1], "{era:?} {tool}");
        }
        assert_eq!(app.metric(&ended(era, r#",error_type="SERVICE_ERROR""#)).await, 2.0);
    }
}
