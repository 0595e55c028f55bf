//! Requests as real clients send them: what they leave out, turn into text or send to the wrong place, and what they can show of our errors.

use mcp_server::demo::fault::FaultRule;
use mcp_server::demo::{DemoOptions, StandIns};
use reqwest::RequestBuilder;
use serde_json::{Value, json};

use crate::support::process::Program;
use crate::support::{Era, TestApp, message, until};

const BOTH: &str = "application/json, text/event-stream";
const JSON: &str = "application/json";

/// Status, headers and JSON of an answer.
async fn answer(request: RequestBuilder) -> (u16, reqwest::header::HeaderMap, Value) {
    let response = request.send().await.unwrap();
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let text = response.text().await.unwrap();
    (status, headers, serde_json::from_str(&text).unwrap_or_else(|error| panic!("{status} {error}: {text}")))
}

fn bare(app: &TestApp, body: impl Into<reqwest::Body>) -> RequestBuilder {
    app.http.post(app.url("/mcp")).header("content-type", JSON).body(body)
}

fn initialize(version: &str) -> Value {
    let client = json!({ "name": "test", "version": "1" });
    message(Era::Legacy, "initialize", json!({ "protocolVersion": version, "capabilities": {}, "clientInfo": client }))
}

#[tokio::test]
async fn accept_is_read_as_media_ranges_of_which_the_most_specific_one_decides() {
    let app = TestApp::spawn().await;
    let list = message(Era::Legacy, "tools/list", json!({})).to_string();
    let call = message(Era::Legacy, "tools/call", json!({ "name": "list_users", "arguments": {} })).to_string();
    for (accept, status) in [
        (None, 200),
        (Some(""), 200),
        (Some("*/*"), 200),
        (Some("*"), 200),
        (Some("application/*"), 200),
        (Some("APPLICATION/JSON"), 200),
        (Some("application/json"), 200),
        (Some("application/json;q=0.1"), 200),
        (Some("application/json; charset=utf-8"), 200),
        (Some("application/*, text/*"), 200),
        (Some("application/json, text/plain, */*"), 200),
        (Some("text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2"), 200),
        (Some("*/*;q=0, application/json"), 200),
        (Some("application/*;q=0, application/json;q=0.001"), 200),
        (Some(BOTH), 200),
        (Some("text/event-stream"), 406),
        (Some("text/*"), 406),
        (Some("application/jsonp"), 406),
        (Some("application/json;q=0"), 406),
        (Some("application/json;q=0.000, */*"), 406),
        (Some("application/json; q=0 , text/event-stream"), 406),
        (Some("*/*, application/*;q=0"), 406),
        (Some("text/plain;a=\", application/json\""), 406),
    ] {
        for (body, version) in [(&list, "2025-11-25"), (&call, "2025-11-25"), (&call, "2025-03-26")] {
            let request = bare(&app, body.clone()).header("mcp-protocol-version", version);
            let request = accept.map_or(request.try_clone().unwrap(), |accept| request.header("accept", accept));
            let (answered, headers, body) = answer(request).await;
            assert_eq!((answered, &headers["content-type"]), (status, &JSON.parse().unwrap()), "{accept:?}: {body}");
            assert_eq!(body["id"], 7, "{accept:?}: {body}");
            assert_eq!(body["result"].is_object(), status == 200, "{accept:?}: {body}");
        }
        let modern = app.request(Era::Modern, "server/discover", json!({})).build().unwrap();
        let mut modern = modern;
        modern.headers_mut().remove("accept");
        if let Some(accept) = accept {
            modern.headers_mut().insert("accept", accept.parse().unwrap());
        }
        assert_eq!(app.http.execute(modern).await.unwrap().status().as_u16(), status, "{accept:?}");
    }
    let two_lines = bare(&app, list.clone()).header("accept", "text/html").header("accept", "application/json");
    assert_eq!(answer(two_lines).await.0, 200);
    // hyper and curl add `Accept: */*`; a client that sends no such field at all is answered too.
    let head = "POST /mcp HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n";
    let raw = app.raw(format!("{head}Content-Length: {}\r\n\r\n{list}", list.len())).await;
    assert_eq!(raw.status, 200, "{raw:?}");
}

#[tokio::test]
async fn initialize_is_negotiated_by_its_body_whatever_its_header_says() {
    let app = TestApp::spawn().await;
    for header in ["2025-11-25", "2025-03-26", "2024-11-05", "2026-07-28", "1999-01-01", "nonsense"] {
        for (asked, answered) in [("2025-06-18", "2025-06-18"), ("2026-07-28", "2025-11-25"), ("x", "2025-11-25")] {
            let request = app.post(initialize(asked).to_string()).header("mcp-protocol-version", header);
            let (status, _, body) = answer(request).await;
            assert_eq!(
                (status, &body["result"]["protocolVersion"]),
                (200, &json!(answered)),
                "{header} {asked}: {body}"
            );
        }
    }
}

#[tokio::test]
async fn parameters_that_do_not_fit_their_method_are_named() {
    let app = TestApp::spawn().await;
    let client = json!({ "name": "x", "version": "1" });
    let version = "2025-11-25";
    for (method, params, named) in [
        ("initialize", json!({}), &["`protocolVersion`", "`capabilities`", "`clientInfo`"][..]),
        ("initialize", json!({ "protocolVersion": version, "capabilities": {} }), &["`clientInfo` is missing"]),
        (
            "initialize",
            json!({ "protocolVersion": version, "capabilities": { "roots": true }, "clientInfo": client }),
            &["`capabilities.roots` is a boolean", "an object"],
        ),
        (
            "initialize",
            json!({ "protocolVersion": version, "capabilities": [], "clientInfo": client }),
            &["`capabilities` is an array"],
        ),
        (
            "initialize",
            json!({ "protocolVersion": 20251125, "capabilities": {}, "clientInfo": client }),
            &["`protocolVersion` is a number", "a string"],
        ),
        (
            "initialize",
            json!({ "protocolVersion": version, "capabilities": {}, "clientInfo": { "name": "x" } }),
            &["`clientInfo.version` is missing"],
        ),
        (
            "initialize",
            json!({ "protocolVersion": version, "capabilities": {}, "clientInfo": { "name": 7, "version": "1" } }),
            &["`clientInfo.name` is a number"],
        ),
        (
            "tools/call",
            json!({ "name": "list_users", "arguments": "{\"limit\":1}" }),
            &["`arguments` is a string", "object"],
        ),
        ("tools/call", json!({ "name": "list_users", "arguments": [] }), &["`arguments` is an array"]),
        ("tools/call", json!({ "arguments": {} }), &["`name` is missing"]),
        ("tools/call", json!({ "name": 7 }), &["`name` is a number"]),
    ] {
        for era in Era::ALL {
            let (status, _, body) = answer(app.request(era, method, params.clone())).await;
            // `initialize` does not exist in 2026-07-28.
            let (expected, code) =
                if (method, era) == ("initialize", Era::Modern) { (404, -32601) } else { (200, -32602) };
            assert_eq!(
                (status, &body["error"]["code"], &body["id"]),
                (expected, &json!(code), &json!(7)),
                "{era:?} {body}"
            );
            let text = body["error"]["message"].as_str().unwrap();
            if code == -32602 {
                assert!(named.iter().all(|name| text.contains(name)), "{era:?} {named:?}: {text}");
            }
        }
    }
    assert!(app.backend_requests().is_empty());
}

#[tokio::test]
async fn a_message_that_is_wrong_is_answered_under_its_id_and_told_what_is_wrong() {
    let app = TestApp::spawn().await;
    let ping = r#"{"jsonrpc":"2.0","id":1,"method":"ping"}"#;
    let deep = "[".repeat(200);
    let deep = format!(r#"{{"jsonrpc":"2.0","id":1,"method":"x","params":{{"a":{deep}{}}}}}"#, "]".repeat(200));
    for (body, id, code, word) in [
        (r#"{"jsonrpc":"2.0","id":1,"method":"tools/list","params":[]}"#, json!(1), -32600, "`params`"),
        (r#"{"jsonrpc":"2.0","id":1,"method":"tools/list","params":"x"}"#, json!(1), -32600, "`params`"),
        (
            r#"{"jsonrpc":"2.0","id":"a","method":"tools/list","params":{"_meta":[]}}"#,
            json!("a"),
            -32600,
            "`params._meta`",
        ),
        (r#"{"jsonrpc":"2.0","id":1,"method":5}"#, json!(1), -32600, "`method`"),
        (r#"{"jsonrpc":"2.0","id":1}"#, json!(1), -32600, "`method`"),
        (r#"{"jsonrpc":"1.0","id":-7,"method":"ping"}"#, json!(-7), -32600, "`jsonrpc`"),
        (r#"{"jsonrpc":2.0,"id":1,"method":"ping"}"#, json!(1), -32600, "`jsonrpc`"),
        (r#"{"id":1,"method":"ping"}"#, json!(1), -32600, "`jsonrpc`"),
        (r#"{"jsonrpc":"2.0","id":1,"method":"ping","method":"ping"}"#, json!(1), -32600, "`method`"),
        (r#"{"jsonrpc":"2.0","id":1,"id":2,"method":"ping"}"#, json!(null), -32600, "`id`"),
        (r#"{"jsonrpc":"2.0","id":null,"method":"ping"}"#, json!(null), -32600, "`id`"),
        (r#"{"jsonrpc":"2.0","id":1.5,"method":"ping"}"#, json!(null), -32600, "`id`"),
        (r#"{"jsonrpc":"2.0","id":{},"method":"ping"}"#, json!(null), -32600, "`id`"),
        (r#"{"jsonrpc":"2.0","id":1,"result":{}}"#, json!(1), -32600, "response"),
        (r#"{"jsonrpc":"2.0","id":1,"method":"ping","result":{}}"#, json!(1), -32600, "`result`"),
        (&format!("[{ping}]"), json!(null), -32600, "batch"),
        ("[]", json!(null), -32600, "batch"),
        ("7", json!(null), -32600, "object"),
        ("null", json!(null), -32600, "object"),
        ("{}", json!(null), -32600, "`jsonrpc`"),
        ("{", json!(null), -32700, "JSON"),
        ("", json!(null), -32700, "JSON"),
        (&format!("{ping}x"), json!(null), -32700, "JSON"),
        (&deep, json!(1), -32700, "nested"),
    ] {
        for version in [None, Some("2025-11-25")] {
            let request = app.post(body.to_owned());
            let request = version.map_or(request.try_clone().unwrap(), |v| request.header("mcp-protocol-version", v));
            let (status, _, answer) = answer(request).await;
            let shown: String = body.chars().take(80).collect();
            assert_eq!(
                (status, &answer["jsonrpc"], &answer["error"]["code"]),
                (400, &json!("2.0"), &json!(code)),
                "{shown}: {answer}"
            );
            assert_eq!(answer.get("id"), Some(&id), "{shown}: {answer}");
            let text = answer["error"]["message"].as_str().unwrap();
            assert!(text.contains(word), "{shown}: {text}");
            assert_eq!(text.contains("batch"), word == "batch", "{shown}: {text}");
        }
    }
}

#[tokio::test]
async fn a_byte_order_mark_and_halves_of_characters_are_no_reason_to_refuse_a_message() {
    let app = TestApp::spawn().await;
    let create = |title: &str| {
        format!(
            r#"{{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{{"name":"create_ticket","arguments":{{"title":"{title}","description":"long enough"}}}}}}"#
        )
    };
    for (sent, stored) in [
        (r"cut \ud83d", "cut \u{fffd}"),
        (r"cut \uDE00", "cut \u{fffd}"),
        (r"\ud83d\ud83d\ude00", "\u{fffd}😀"),
        (r"\ud83d\u0041", "\u{fffd}A"),
        (r"\ud83d\\ude00", "\u{fffd}\\ude00"),
        (r"\\ud83d", "\\ud83d"),
        (r"\\\ud83d", "\\\u{fffd}"),
        (r"\ud83d\ude00", "😀"),
    ] {
        for version in [None, Some("2025-11-25")] {
            app.stand_ins.backend.forget_requests();
            let request = app.post(create(sent));
            let request = version.map_or(request.try_clone().unwrap(), |v| request.header("mcp-protocol-version", v));
            let (status, _, body) = answer(request).await;
            assert_eq!(
                (status, &body["result"]["structuredContent"]["title"]),
                (200, &json!(stored)),
                "{sent}: {body}"
            );
            let asked: Value = serde_json::from_slice(&app.backend_requests()[0].body).unwrap();
            assert_eq!(asked["title"], stored, "{sent}");
        }
    }
    let key = create("x").replace(r#""title""#, r#""\ud83d":1,"title""#);
    let (_, _, refused) = answer(app.post(key)).await;
    let text = refused["result"]["content"][0]["text"].as_str().unwrap();
    assert!(text.contains("VALIDATION_ERROR") && text.contains('\u{fffd}'), "{refused}");
    let (_, _, named) = answer(app.post(r#"{"jsonrpc":"2.0","id":"\udc00","method":"ping"}"#)).await;
    assert_eq!((&named["id"], &named["result"]), (&json!("\u{fffd}"), &json!({})));

    let list = message(Era::Legacy, "tools/list", json!({})).to_string();
    for (body, field) in [(list, "tools"), (create("marked"), "structuredContent")] {
        let marked = [b"\xef\xbb\xbf".as_slice(), body.as_bytes()].concat();
        for version in ["2025-03-26", "2025-11-25"] {
            let request = app.post(marked.clone()).header("mcp-protocol-version", version);
            let (status, _, body) = answer(request).await;
            assert!(status == 200 && !body["result"][field].is_null(), "{body}");
        }
        assert_eq!(answer(app.post([b"\xef\xbb\xbf".as_slice(), &marked].concat())).await.0, 400, "one mark, not two");
    }
}

#[tokio::test]
async fn a_revision_that_is_not_served_is_refused_and_those_that_are_get_named() {
    let app = TestApp::spawn().await;
    let call = json!({ "name": "list_users", "arguments": {} });
    for (method, params) in [("tools/list", json!({})), ("tools/call", call), ("ping", json!({}))] {
        for version in ["2024-11-05", "1999-01-01", "2025-11-25, 2025-06-18"] {
            let body = message(Era::Legacy, method, params.clone()).to_string();
            let request = app.post(body).header("mcp-protocol-version", version);
            let (status, _, body) = answer(request).await;
            assert_eq!((status, &body["id"]), (400, &json!(7)), "{version} {method}: {body}");
            let text = body["error"]["message"].as_str().unwrap();
            for served in ["2025-03-26", "2025-06-18", "2025-11-25", "2026-07-28"] {
                assert!(text.contains(served), "{text}");
            }
            assert_eq!(body["error"]["data"]["error"], "VALIDATION_ERROR");
        }
    }
    assert!(app.backend_requests().is_empty());
}

#[tokio::test]
async fn a_method_that_is_not_served_is_refused_in_a_sentence() {
    let app = TestApp::spawn().await;
    for method in [
        "resources/list",
        "resources/templates/list",
        "prompts/list",
        "tasks/list",
        "skills/list",
        "subscriptions/listen",
        "no/such/method",
    ] {
        for era in Era::ALL {
            let (_, _, body) = answer(app.request(era, method, json!({}))).await;
            assert_eq!(body["error"]["code"], -32601, "{era:?} {method}: {body}");
            let text = body["error"]["message"].as_str().unwrap();
            assert!(text.contains(method) && text.contains("tools/list") && text.ends_with('.'), "{era:?}: {text}");
        }
    }
    let (status, _, body) = answer(app.request(Era::Modern, "ping", json!({}))).await;
    assert_eq!((status, &body["error"]["code"]), (404, &json!(-32601)));
    assert!(body["error"]["message"].as_str().unwrap().contains("2026-07-28"), "{body}");
    // What a caller makes up is not repeated.
    let (_, _, body) = answer(app.request(Era::Legacy, "\u{202e}\u{1b}[31m", json!({}))).await;
    let text = body["error"]["message"].as_str().unwrap();
    assert!(text.ends_with('.') && text.is_ascii() && !text.contains("31m"), "{text}");
}

#[tokio::test]
async fn a_host_is_a_name_with_or_without_its_final_dot_and_a_port_and_nothing_else() {
    let list = message(Era::Legacy, "tools/list", json!({})).to_string();
    let call = message(Era::Legacy, "tools/call", json!({ "name": "list_users" })).to_string();
    let app = TestApp::spawn_with(|settings| {
        settings.web.allowed_hosts = Some(["localhost", "mcp.example:8443", "[::1]"].map(str::to_owned).to_vec());
    })
    .await;
    let anywhere = TestApp::spawn_with(|settings| settings.web.allowed_hosts = None).await;
    for (host, status, status_anywhere) in [
        ("localhost", 200, 200),
        ("localhost.", 200, 200),
        ("LOCALHOST.:8000", 200, 200),
        ("localhost:", 200, 200),
        ("mcp.example.:8443", 200, 200),
        ("mcp.example:8443", 200, 200),
        ("mcp.example:8444", 403, 200),
        ("mcp.example", 403, 200),
        ("[::1]", 200, 200),
        ("[::1]:1", 200, 200),
        ("[0:0:0:0:0:0:0:1]", 200, 200),
        ("[::2]", 403, 200),
        ("localhost..", 403, 200),
        ("[::1]evil", 400, 400),
        ("[::1]evil:80", 400, 400),
        ("[::1", 400, 400),
        ("[localhost]", 400, 400),
        ("::1", 400, 400),
        ("localhost:8a", 400, 400),
        ("localhost:-1", 400, 400),
        ("localhost:65536", 400, 400),
        ("localhost:80:80", 400, 400),
        ("localhost@evil.example", 400, 400),
        ("localhost/x", 400, 400),
        (".", 400, 400),
        ("", 400, 400),
    ] {
        for (body, version) in [(&list, ""), (&call, "MCP-Protocol-Version: 2025-11-25\r\n")] {
            let request = format!(
                "POST /mcp HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: {JSON}\r\nAccept: {BOTH}\r\n{version}\
                 Content-Length: {}\r\n\r\n{body}",
                body.len()
            );
            assert_eq!(app.raw(&request).await.status, status, "{host}");
            assert_eq!(anywhere.raw(&request).await.status, status_anywhere, "{host}");
        }
    }
}

#[tokio::test]
async fn an_http_error_of_the_endpoint_is_a_json_rpc_error_that_holds_the_error_object() {
    let app = TestApp::spawn().await;
    let list = || message(Era::Legacy, "tools/list", json!({})).to_string();
    let http = &app.http;
    let big = reqwest::Body::from(vec![b' '; (96 << 10) + 1]);
    for (name, request, status, id) in [
        ("GET", http.get(app.url("/mcp")), 405, json!(null)),
        ("DELETE", http.delete(app.url("/mcp/")), 405, json!(null)),
        ("too large", app.post(big), 413, json!(null)),
        ("host", app.post(list()).header("host", "evil.example"), 403, json!(7)),
        ("origin", app.post(list()).header("origin", "https://evil.example"), 403, json!(7)),
        ("accept", bare(&app, list()).header("accept", "text/html"), 406, json!(7)),
        ("type", http.post(app.url("/mcp")).body(list()), 415, json!(7)),
        ("two types", app.post(list()).header("content-type", "text/plain"), 400, json!(null)),
        ("long head", app.post(list()).header("x-long", "x".repeat(17_000)), 431, json!(null)),
    ] {
        let (answered, headers, body) = answer(request).await;
        assert_eq!((answered, &headers["content-type"]), (status, &JSON.parse().unwrap()), "{name}: {body}");
        assert_eq!(headers.contains_key("allow"), status == 405, "{name}");
        assert_eq!((&body["jsonrpc"], body.get("id")), (&json!("2.0"), Some(&id)), "{name}: {body}");
        let (error, data) = (&body["error"], &body["error"]["data"]);
        assert!(error["code"].is_i64() && error["message"].is_string(), "{name}: {body}");
        assert_eq!(
            (&data["message"], &data["error"]),
            (&error["message"], &json!("VALIDATION_ERROR")),
            "{name}: {body}"
        );
        assert_eq!(data["details"]["status_code"], status, "{name}: {body}");
        assert_eq!(data["details"]["trace_id"], headers["traceparent"].to_str().unwrap()[3..35], "{name}: {body}");
    }
    let (status, _, body) = answer(http.get(app.url("/nowhere"))).await;
    assert_eq!((status, &body["error"], body.get("jsonrpc")), (404, &json!("VALIDATION_ERROR"), None));
}

#[tokio::test]
async fn a_wrong_address_is_told_the_right_one() {
    let app = TestApp::spawn().await;
    let management = |path: &str| app.http.get(format!("http://{}{path}", app.metrics_address));
    let list = message(Era::Legacy, "tools/list", json!({})).to_string();
    for (request, status, words, without) in [
        (app.http.post(app.url("/")).body(list.clone()), 405, "/mcp", "`Allow`"),
        (app.http.put(app.url("/")), 405, "/mcp", "`Allow`"),
        (app.http.get(app.url("/metrics")), 404, "METRICS_PORT", "MCP is served"),
        (app.http.get(app.url("/sse")), 404, "/mcp", "METRICS_PORT"),
        (app.http.post(app.url("/mcp/x")), 404, "/mcp", "METRICS_PORT"),
        (management("/mcp"), 404, "PORT", "served at /mcp"),
        (management("/"), 404, "/metrics", "served at /mcp"),
        (management("/health/live"), 404, "/metrics", "served at /mcp"),
        (app.http.post(format!("http://{}/metrics", app.metrics_address)), 405, "GET", "/mcp"),
    ] {
        let shown = format!("{request:?}");
        let (answered, _, body) = answer(request).await;
        assert_eq!((answered, &body["error"]), (status, &json!("VALIDATION_ERROR")), "{shown}: {body}");
        let text = body["message"].as_str().unwrap();
        assert!(text.contains(words) && !text.contains(without), "{shown}: {text}");
    }
}

#[tokio::test]
async fn arguments_that_a_client_has_turned_into_text_are_read_as_meant() {
    let app = TestApp::spawn().await;
    for era in Era::ALL {
        for (tool, arguments, target) in [
            ("list_users", json!({ "limit": "10", "skip": "5" }), "/users?skip=5&limit=10"),
            ("list_users", json!({ "limit": 10.0, "skip": 0.0 }), "/users?skip=0&limit=10"),
            ("list_users", json!({ "skip": "9007199254740991" }), "/users?skip=9007199254740991&limit=10"),
            ("get_user_profile", json!({ "user_id": 42 }), "/users/42"),
            ("get_user_profile", json!({ "user_id": -7, "include_details": "False" }), "/users/-7"),
            ("get_user_profile", json!({ "user_id": u64::MAX }), "/users/18446744073709551615"),
            (
                "get_user_profile",
                json!({ "user_id": "42", "include_details": "true" }),
                "/users/42?include_details=true",
            ),
            ("query_data", json!({ "dataset": 7, "limit": "1000" }), "/query/7?limit=1000"),
            (
                "query_data",
                json!({ "dataset": "sales", "filters": "{ \"region\": \"EMEA\" }" }),
                "/query/sales?limit=100&filters={\"region\":\"EMEA\"}",
            ),
            ("list_tickets", json!({ "limit": "1" }), "/tickets?skip=0&limit=1"),
        ] {
            let (result, requests) = app.call_and_watch(era, tool, arguments.clone()).await;
            let decoded =
                |target: &str| percent_encoding::percent_decode_str(target).decode_utf8().unwrap().into_owned();
            let targets: Vec<_> = requests.iter().map(|request| decoded(&request.target)).collect();
            assert_eq!(targets, [target], "{era:?} {tool} {arguments}: {result:?}");
        }
        let ticket = json!({ "title": "x", "description": "long enough", "assignee_id": 42 });
        let (result, requests) = app.call_and_watch(era, "create_ticket", ticket).await;
        let body: Value = serde_json::from_slice(&requests[0].body).unwrap();
        assert_eq!((&body["assignee_id"], &result.structured()["assignee_id"]), (&json!("42"), &json!("42")));
    }
}

#[tokio::test]
async fn arguments_that_could_mean_several_things_are_refused_with_their_type_and_what_is_accepted() {
    let app = TestApp::spawn().await;
    let skip = "an integer from 0 to 9007199254740991";
    let id = "a string of 1 to 128 characters";
    for (tool, arguments, field, words) in [
        ("list_users", json!({ "skip": 9_007_199_254_740_992_u64 }), "skip", ["9007199254740992", skip]),
        ("list_users", json!({ "skip": "9007199254740992" }), "skip", ["9007199254740992", skip]),
        ("list_users", json!({ "skip": "99999999999999999999" }), "skip", ["a string", skip]),
        ("list_users", json!({ "skip": "-1" }), "skip", ["is -1", skip]),
        ("list_users", json!({ "limit": "101" }), "limit", ["is 101", "from 1 to 100"]),
        ("list_users", json!({ "limit": "10.0" }), "limit", ["a string", "from 1 to 100"]),
        ("list_users", json!({ "limit": "1e1" }), "limit", ["a string", "from 1 to 100"]),
        ("list_users", json!({ "limit": "0x10" }), "limit", ["a string", "from 1 to 100"]),
        ("list_users", json!({ "limit": "010" }), "limit", ["a string", "from 1 to 100"]),
        ("list_users", json!({ "limit": " 10" }), "limit", ["a string", "from 1 to 100"]),
        ("list_users", json!({ "limit": "+10" }), "limit", ["a string", "from 1 to 100"]),
        ("list_users", json!({ "limit": "１０" }), "limit", ["a string", "from 1 to 100"]),
        ("list_users", json!({ "limit": "" }), "limit", ["a string", "from 1 to 100"]),
        ("list_users", json!({ "limit": 10.5 }), "limit", ["is 10.5", "from 1 to 100"]),
        ("list_users", json!({ "limit": 0 }), "limit", ["is 0", "from 1 to 100"]),
        ("list_users", json!({ "limit": true }), "limit", ["a boolean", "from 1 to 100"]),
        (
            "get_user_profile",
            json!({ "user_id": "42", "include_details": 1 }),
            "include_details",
            ["a number", "true or false"],
        ),
        (
            "get_user_profile",
            json!({ "user_id": "42", "include_details": "yes" }),
            "include_details",
            ["a string", "true or false"],
        ),
        (
            "get_user_profile",
            json!({ "user_id": "42", "include_details": "" }),
            "include_details",
            ["a string", "true or false"],
        ),
        ("get_user_profile", json!({ "user_id": 42.5 }), "user_id", ["a number", id]),
        ("get_user_profile", json!({ "user_id": 42.0 }), "user_id", ["a number", id]),
        ("get_user_profile", json!({ "user_id": 1e30 }), "user_id", ["a number", id]),
        ("get_user_profile", json!({ "user_id": true }), "user_id", ["a boolean", id]),
        ("query_data", json!({ "dataset": "sales", "filters": "region=EMEA" }), "filters", ["a string", "an object"]),
        ("query_data", json!({ "dataset": "sales", "filters": "[]" }), "filters", ["a string", "an object"]),
        ("query_data", json!({ "dataset": "sales", "filters": "\"{}\"" }), "filters", ["a string", "an object"]),
        ("query_data", json!({ "dataset": "sales", "filters": ["{}"] }), "filters", ["an array", "an object"]),
        ("create_ticket", json!({ "title": 7, "description": "long enough" }), "title", ["a number", "1 to 200"]),
        ("list_tickets", json!({ "status": 1 }), "status", ["a number", "open, in_progress, closed"]),
    ] {
        let (result, requests) = app.call_and_watch(Era::Modern, tool, arguments.clone()).await;
        let error = result.error();
        assert_eq!((&error["error"], requests.len()), (&json!("VALIDATION_ERROR"), 0), "{tool} {arguments}");
        let told = error["details"]["fields"][field].as_str().unwrap_or_else(|| panic!("{arguments}: {error}"));
        assert!(words.iter().all(|word| told.contains(word)), "{tool} {arguments}: {told}");
    }
}

#[tokio::test]
async fn what_clients_send_makes_no_line_of_a_library_and_no_long_one_of_ours() {
    let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
    let server = Program::serve(&stand_ins).env("LOG_LEVEL", "INFO").start();
    let client = server.client().await;
    client.until_ready().await;
    let post = |body: String| {
        let request = client.http.post(format!("http://{}/mcp", client.address));
        request.header("content-type", JSON).header("accept", BOTH).body(body)
    };
    let long = format!("{}\u{202e}", "1".repeat(90_000));
    let mut header = long.clone();
    header.truncate(12_000);
    post(initialize(&long).to_string()).header("mcp-protocol-version", &header).send().await.unwrap();
    let list = message(Era::Legacy, "tools/list", json!({})).to_string();
    for (name, value) in
        [("host", header.clone()), ("origin", format!("https://{header}.example")), ("host", "a b".to_owned())]
    {
        let answer = post(list.clone()).header(name, value).send().await.unwrap();
        assert!(answer.status().is_client_error(), "{name}");
    }
    post(message(Era::Legacy, &header, json!({ "cursor": long })).to_string()).send().await.unwrap();
    // A client that leaves its call, which is not a plain one.
    stand_ins.backend.set_fault([FaultRule::hang()]);
    let call = message(Era::Legacy, "tools/call", json!({ "name": "list_users", "arguments": {} })).to_string();
    let call = tokio::spawn(post(call).send());
    until(async || stand_ins.backend.requests().iter().any(|request| request.target.starts_with("/users"))).await;
    call.abort();
    server.stdout.line("its client left").await;
    server.signal("TERM");
    let finished = server.ended().await;
    assert!(
        finished.stdout.iter().all(|line| line.len() < 2_048),
        "{:?}",
        finished.stdout.iter().map(String::len).max()
    );
    for line in finished.log() {
        let logger = line["logger"].as_str().unwrap();
        assert!(logger.starts_with("mcp_server") || logger == "audit", "{line}");
        assert_ne!(line["level"], "ERROR", "{line}");
    }
    let refusals: Vec<_> =
        finished.log().into_iter().filter(|line| line["logger"] == "mcp_server::web::plain").collect();
    assert_eq!(refusals.len(), 2, "one for the operator to see for the host and one for the origin: {refusals:?}");
}
