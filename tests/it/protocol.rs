//! The endpoint as a client meets it: lifecycle, lists, broken messages, and HTTP around them.

use reqwest::{RequestBuilder, StatusCode};
use serde_json::{Value, json};

use crate::support::calls::{RawAnswer, TOOLS};
use crate::support::{Era, TestApp, error_object, message};

const VERSIONS: [&str; 4] = ["2025-03-26", "2025-06-18", "2025-11-25", "2026-07-28"];

/// Sends a request and reads status and JSON of its answer.
async fn json_answer(request: RequestBuilder) -> (u16, Value) {
    let response = request.send().await.unwrap();
    let status = response.status().as_u16();
    assert_eq!(response.headers()["content-type"], "application/json", "{status}");
    let text = response.text().await.unwrap();
    (status, serde_json::from_str(&text).unwrap_or_else(|error| panic!("{status} {error}: {text}")))
}

/// Sends a request that HTTP itself refuses, and checks the error object in its answer.
async fn refusal(request: RequestBuilder) -> (u16, Value) {
    let response = request.send().await.unwrap();
    let status = response.status().as_u16();
    let traceparent = response.headers()["traceparent"].to_str().unwrap().to_owned();
    assert_eq!(response.headers()["content-type"], "application/json", "{status}");
    let is_mcp = matches!(response.url().path(), "/mcp" | "/mcp/");
    let text = response.text().await.unwrap();
    let body: Value = serde_json::from_str(&text).unwrap();
    assert!(is_mcp || text.starts_with(r#"{"error":""#), "{text}");
    assert!(!is_mcp || text.contains(r#","data":{"error":""#), "{text}");
    let error = if is_mcp { error_object(&body).clone() } else { body };
    assert_eq!(error["details"]["trace_id"], traceparent[3..35], "{text}");
    assert_eq!(error["details"]["status_code"], status, "{text}");
    assert_eq!(error["details"]["retryable"], false, "{text}");
    assert_eq!(error.as_object().unwrap().keys().collect::<Vec<_>>(), ["details", "error", "message"]);
    (status, error)
}

fn initialize(version: &str) -> String {
    let params =
        json!({ "protocolVersion": version, "capabilities": {}, "clientInfo": { "name": "test", "version": "1" } });
    message(Era::Legacy, "initialize", params).to_string()
}

#[tokio::test]
async fn initialize_is_answered_in_the_clients_revision_or_the_newest_that_has_it_and_opens_no_session() {
    let app = TestApp::spawn().await;
    for (asked, answered) in [
        ("2025-03-26", "2025-03-26"),
        ("2025-06-18", "2025-06-18"),
        ("2025-11-25", "2025-11-25"),
        ("2024-11-05", "2025-11-25"),
        ("2026-07-28", "2025-11-25"),
        ("1999-01-01", "2025-11-25"),
        ("", "2025-11-25"),
    ] {
        let response = app.post(initialize(asked)).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert!(response.headers().get("mcp-session-id").is_none());
        let answer: Value = serde_json::from_str(&response.text().await.unwrap()).unwrap();
        assert_eq!(answer["result"]["protocolVersion"], answered, "{asked}");
        assert_eq!(answer["result"]["serverInfo"]["name"], "mcp-server");
        assert_eq!(answer["result"]["serverInfo"]["version"], env!("CARGO_PKG_VERSION"));
        assert_eq!(answer["result"]["capabilities"], json!({ "tools": {} }));
    }
}

#[tokio::test]
async fn a_session_id_of_the_clients_own_is_ignored() {
    let app = TestApp::spawn().await;
    for era in Era::ALL {
        let request = app.request(era, "tools/list", json!({})).header("mcp-session-id", "made-up");
        let response = request.header("last-event-id", "7").send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert!(response.headers().get("mcp-session-id").is_none());
    }
}

#[tokio::test]
async fn every_legacy_revision_calls_tools_with_and_without_its_header() {
    let app = TestApp::spawn().await;
    let call = message(Era::Legacy, "tools/call", json!({ "name": "list_users", "arguments": {} })).to_string();
    for version in [None, Some("2025-03-26"), Some("2025-06-18"), Some("2025-11-25")] {
        let request = app.post(call.clone());
        let request = version.map_or(request.try_clone().unwrap(), |v| request.header("mcp-protocol-version", v));
        let (status, answer) = json_answer(request).await;
        assert_eq!((status, &answer["result"]["structuredContent"]["total"]), (200, &json!(250)), "{version:?}");
        assert_eq!(answer["result"].get("_meta"), None);
    }
}

#[tokio::test]
async fn discovery_tells_who_we_are_and_what_we_speak() {
    let app = TestApp::spawn().await;
    let discovery = without_version(app.result(Era::Modern, "server/discover", json!({})).await);
    insta::assert_json_snapshot!("discovery", discovery);
}

/// The result as every release gives it.
fn without_version(mut result: Value) -> Value {
    let version = &mut result["_meta"]["io.modelcontextprotocol/serverInfo"]["version"];
    assert_eq!(version.take(), env!("CARGO_PKG_VERSION"));
    *version = "the package's".into();
    result
}

#[tokio::test]
async fn the_list_of_tools_changes_only_on_purpose() {
    let app = TestApp::spawn().await;
    let legacy = app.result(Era::Legacy, "tools/list", json!({})).await;
    let modern = without_version(app.result(Era::Modern, "tools/list", json!({})).await);
    let names: Vec<_> = modern["tools"].as_array().unwrap().iter().map(|tool| tool["name"].clone()).collect();
    assert_eq!(names, TOOLS);
    insta::assert_json_snapshot!("tools_list_legacy", legacy);
    insta::assert_json_snapshot!("tools_list_modern", modern);
}

/// What a model pays, in tokens, for knowing the five tools: in every conversation, before anything is asked.
const TOKENS_FOR_THE_TOOLS: usize = 1_100;
/// The same with what stays with the client: output schemas, titles, annotations.
const TOKENS_FOR_THE_ANSWER: usize = 1_500;

#[tokio::test]
#[expect(clippy::print_stdout, reason = "the figures, for who asks with --nocapture")]
async fn the_five_tools_cost_a_model_little() {
    let app = TestApp::spawn().await;
    let tokens = |value: &Value| tiktoken_rs::o200k_base_singleton().encode_ordinary(&value.to_string()).len();
    for era in Era::ALL {
        let list = app.result(era, "tools/list", json!({})).await;
        let tools = list["tools"].as_array().unwrap();
        // What clients hand to a model.
        let told = tools.iter().map(|tool| {
            json!({ "name": tool["name"], "description": tool["description"], "input_schema": tool["inputSchema"] })
        });
        let told: Vec<Value> = told.collect();
        for tool in &told {
            println!("{era:?} {:>5} tokens  {}", tokens(tool), tool["name"].as_str().unwrap());
        }
        let (told, whole) = (tokens(&told.into()), tokens(&list));
        println!("{era:?} {told:>5} tokens for what a model is told, {whole} for the whole answer");
        assert!(told < TOKENS_FOR_THE_TOOLS, "{era:?}: {told} tokens, not fewer than {TOKENS_FOR_THE_TOOLS}");
        assert!(whole < TOKENS_FOR_THE_ANSWER, "{era:?}: {whole} tokens, not fewer than {TOKENS_FOR_THE_ANSWER}");
    }
}

#[tokio::test]
async fn modern_results_say_who_answered_and_lists_how_long_they_keep() {
    let app = TestApp::spawn().await;
    let info = json!({ "name": "mcp-server", "version": env!("CARGO_PKG_VERSION") });
    for (method, params) in [
        ("tools/list", json!({})),
        ("tools/call", json!({ "name": "list_users", "arguments": {} })),
        ("tools/call", json!({ "name": "list_users", "arguments": { "limit": 0 } })),
    ] {
        let result = app.result(Era::Modern, method, params).await;
        assert_eq!(result["_meta"]["io.modelcontextprotocol/serverInfo"], info, "{method}");
        assert_eq!(result["resultType"], "complete");
    }
    for method in ["tools/list", "server/discover"] {
        let result = app.result(Era::Modern, method, json!({})).await;
        assert_eq!((&result["ttlMs"], &result["cacheScope"]), (&json!(300_000), &json!("public")), "{method}");
    }
}

#[tokio::test]
async fn requests_that_cannot_be_served_are_json_rpc_errors_of_their_era() {
    let app = TestApp::spawn().await;
    for (method, params, code, legacy_status, modern_status) in [
        ("tools/call", json!({ "name": "delete_user", "arguments": {} }), -32602, 200, 200),
        ("tools/call", json!({ "name": "", "arguments": {} }), -32602, 200, 200),
        ("tools/call", json!({ "name": "list_users", "arguments": [] }), -32602, 200, 200),
        ("tools/call", json!({ "name": "list_users", "arguments": "{}" }), -32602, 200, 200),
        ("tools/call", json!({ "arguments": {} }), -32602, 200, 200),
        ("tools/list", json!({ "cursor": "2" }), -32602, 200, 200),
        ("tools/delete", json!({}), -32601, 200, 404),
        ("", json!({}), -32601, 200, 404),
        ("logging/setLevel", json!({ "level": "debug" }), -32601, 200, 404),
        ("subscriptions/listen", json!({}), -32601, 200, 404),
        ("subscriptions/listen", json!({ "notifications": { "toolsListChanged": true } }), -32601, 200, 404),
        ("tasks/list", json!({}), -32601, 200, 404),
        ("prompts/list", json!({}), -32601, 200, 404),
        ("prompts/get", json!({ "name": "x" }), -32601, 200, 404),
        ("resources/list", json!({}), -32601, 200, 404),
        ("resources/templates/list", json!({}), -32601, 200, 404),
        (
            "completion/complete",
            json!({ "ref": { "type": "ref/prompt", "name": "x" }, "argument": { "name": "a", "value": "" } }),
            -32601,
            200,
            404,
        ),
    ] {
        for (era, expected) in [(Era::Legacy, legacy_status), (Era::Modern, modern_status)] {
            let (status, answer) = json_answer(app.request(era, method, params.clone())).await;
            assert_eq!(
                (status, &answer["error"]["code"]),
                (expected, &json!(code)),
                "{era:?} {method} {params}: {answer}"
            );
        }
    }
    assert!(app.backend_requests().is_empty());
}

#[tokio::test]
async fn ping_is_answered_in_the_era_that_has_it() {
    let app = TestApp::spawn().await;
    assert_eq!(app.result(Era::Legacy, "ping", json!({})).await, json!({}));
    let (status, answer) = json_answer(app.request(Era::Modern, "ping", json!({}))).await;
    assert_eq!((status, &answer["error"]["code"]), (404, &json!(-32601)));
}

#[tokio::test]
async fn an_unknown_tool_is_told_which_tools_there_are() {
    let app = TestApp::spawn().await;
    let call = app.request(Era::Legacy, "tools/call", json!({ "name": "x\u{1b}[31m", "arguments": {} }));
    let (_, answer) = json_answer(call).await;
    let expected =
        "there is no such tool; the tools are create_ticket, get_user_profile, list_tickets, list_users, query_data";
    assert_eq!(answer["error"], json!({ "code": -32602, "message": expected }));
    assert_eq!(answer["id"], 7);
}

#[tokio::test]
async fn messages_that_cannot_be_read_are_parse_errors_or_invalid_requests() {
    let app = TestApp::spawn().await;
    let ping = |id: &str| format!(r#"{{"jsonrpc":"2.0","id":{id},"method":"ping"}}"#).into_bytes();
    let nested = |open: &str, close: &str, depth: usize| {
        format!(
            r#"{{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{{"name":"x","arguments":{{"a":{}1{}}}}}}}"#,
            open.repeat(depth),
            close.repeat(depth)
        )
        .into_bytes()
    };
    for (body, code) in [
        (b"".to_vec(), -32700),
        (b"{".to_vec(), -32700),
        (b"not JSON".to_vec(), -32700),
        (b"\xef\xbb\xbf{}".to_vec(), -32600),
        (b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"\xff\xfe\"}".to_vec(), -32700),
        (nested("[", "]", 200), -32700),
        (nested(r#"{"a":"#, "}", 200), -32700),
        (nested("[", "]", 20_000), -32700),
        (b"null".to_vec(), -32600),
        (b"7".to_vec(), -32600),
        (b"{}".to_vec(), -32600),
        (b"[]".to_vec(), -32600),
        ([b"[".as_slice(), &ping("1"), b"]"].concat(), -32600),
        (br#"{"jsonrpc":"1.0","id":1,"method":"ping"}"#.to_vec(), -32600),
        (br#"{"id":1,"method":"ping"}"#.to_vec(), -32600),
        (br#"{"jsonrpc":"2.0","id":1,"method":7}"#.to_vec(), -32600),
        (ping("null"), -32600),
        (ping("1.5"), -32600),
        (ping("{}"), -32600),
    ] {
        let (status, answer) = json_answer(app.post(body.clone())).await;
        assert_eq!((status, &answer["error"]["code"]), (400, &json!(code)), "{}", String::from_utf8_lossy(&body));
        assert_eq!((&answer["jsonrpc"], answer.get("id").is_some()), (&json!("2.0"), true));
    }
}

#[tokio::test]
async fn every_legal_id_comes_back_as_it_was() {
    let app = TestApp::spawn().await;
    for id in [json!(0), json!(-1), json!(9_007_199_254_740_991_i64), json!(""), json!("ü 😀")] {
        let call = json!({ "jsonrpc": "2.0", "id": id, "method": "tools/list" });
        assert_eq!(json_answer(app.post(call.to_string())).await.1["id"], id);
    }
}

#[tokio::test]
async fn notifications_are_accepted_without_a_body() {
    let app = TestApp::spawn().await;
    for method in ["notifications/initialized", "notifications/cancelled", "notifications/made-up", "tools/list"] {
        for era in Era::ALL {
            let mut notification = message(era, method, json!({ "requestId": 1 }));
            notification.as_object_mut().unwrap().remove("id");
            let request = app.post(notification.to_string()).header("mcp-protocol-version", era.version());
            let response = request.header("mcp-method", method).send().await.unwrap();
            assert_eq!(response.status(), StatusCode::ACCEPTED, "{era:?} {method}");
            assert_eq!(response.bytes().await.unwrap(), "");
        }
    }
}

#[tokio::test]
async fn headers_and_body_of_a_modern_request_have_to_agree() {
    let app = TestApp::spawn().await;
    let call = message(Era::Modern, "tools/call", json!({ "name": "list_users", "arguments": {} })).to_string();
    let plain = message(Era::Legacy, "tools/list", json!({})).to_string();
    let strange = call.replace("2026-07-28", "2030-01-01");
    let [version, method, name] = ["mcp-protocol-version", "mcp-method", "mcp-name"];
    let agreed = [(version, "2026-07-28"), (method, "tools/call"), (name, "list_users")];
    for (body, headers, status, code) in [
        (&call, agreed.to_vec(), 200, json!(null)),
        (&call, vec![(version, "2025-11-25"), (method, "tools/call"), (name, "list_users")], 400, json!(-32020)),
        (&call, vec![(version, "2026-07-28"), (method, "tools/list"), (name, "list_users")], 400, json!(-32020)),
        (&call, vec![(version, "2026-07-28"), (method, "tools/call"), (name, "list_tickets")], 400, json!(-32020)),
        (&call, vec![(version, "2026-07-28"), (name, "list_users")], 400, json!(-32020)),
        (&call, vec![(version, "2026-07-28"), (method, "tools/call")], 400, json!(-32020)),
        (&call, [agreed.as_slice(), &[(name, "list_users")]].concat(), 400, json!(-32020)),
        (&strange, vec![(version, "2030-01-01"), (method, "tools/call"), (name, "list_users")], 400, json!(-32022)),
        (&plain, vec![(version, "2026-07-28"), (method, "tools/list")], 400, json!(-32602)),
    ] {
        let request = headers.iter().fold(app.post(body.clone()), |request, (key, value)| request.header(*key, *value));
        let (answered, answer) = json_answer(request).await;
        assert_eq!((answered, &answer["error"]["code"]), (status, &code), "{headers:?}: {answer}");
        if code == -32022 {
            assert_eq!(answer["error"]["data"], json!({ "supported": VERSIONS, "requested": "2030-01-01" }));
        }
    }
}

#[tokio::test]
async fn http_around_the_message_is_refused_in_our_own_words() {
    let app = TestApp::spawn().await;
    let list = message(Era::Legacy, "tools/list", json!({})).to_string();
    let bare = || app.http.post(app.url("/mcp")).body(list.clone());
    let (json_type, both) = ("application/json", "application/json, text/event-stream");
    for (request, status, words) in [
        (bare().header("content-type", json_type).header("accept", "text/event-stream"), 406, "Accept"),
        (bare().header("accept", both), 415, "send `Content-Type: application/json`"),
        (bare().header("accept", both).header("content-type", "text/plain"), 415, "Content-Type"),
        (app.post(list.clone()).header("host", "evil.example"), 403, "ALLOWED_HOSTS"),
        (app.post(list.clone()).header("host", "localhost.evil.example:80"), 403, "ALLOWED_HOSTS"),
        (app.post(list.clone()).header("origin", "https://evil.example"), 403, "ALLOWED_ORIGINS"),
        (app.post(list.clone()).header("origin", "null"), 403, "ALLOWED_ORIGINS"),
        (app.post(list.clone()).header("mcp-protocol-version", "1999-01-01"), 400, "2025-03-26, 2025-06-18"),
        (app.post(vec![b' '; (96 << 10) + 1]), 413, "MAX_REQUEST_BYTES"),
        (app.post(reqwest::Body::wrap(chunked((96 << 10) + 1))), 413, "MAX_REQUEST_BYTES"),
    ] {
        let shown = format!("{request:?}");
        let (answered, error) = refusal(request).await;
        assert_eq!((answered, &error["error"]), (status, &json!("VALIDATION_ERROR")), "{shown}");
        assert!(error["message"].as_str().unwrap().contains(words), "{shown}: {error}");
    }
}

/// A body without a `Content-Length`.
fn chunked(length: usize) -> impl http_body::Body<Data = bytes::Bytes, Error = std::convert::Infallible> {
    let piece = bytes::Bytes::from(vec![b' '; length / 3 + 1]);
    let frames = (0..3).map(move |_| Ok(http_body::Frame::data(piece.clone())));
    http_body_util::StreamBody::new(futures_util::stream::iter(frames))
}

#[tokio::test]
async fn methods_and_paths_that_do_not_exist_are_refused_in_our_own_words() {
    let app = TestApp::spawn().await;
    for (method, path, status, allow) in [
        ("GET", "/mcp", 405, Some("POST")),
        ("DELETE", "/mcp", 405, Some("POST")),
        ("PUT", "/mcp", 405, Some("POST")),
        ("PATCH", "/mcp/", 405, Some("POST")),
        ("OPTIONS", "/mcp", 405, Some("POST")),
        ("POST", "/", 405, Some("GET,HEAD")),
        ("POST", "/health/live", 405, Some("GET,HEAD")),
        ("DELETE", "/health/ready", 405, Some("GET,HEAD")),
        ("GET", "/metrics", 404, None),
        ("GET", "/nowhere", 404, None),
        ("POST", "/mcp/x", 404, None),
        ("POST", "//mcp", 404, None),
        ("GET", "/health", 404, None),
        ("GET", "/.env", 404, None),
        ("GET", "/%ff%00?q=1", 404, None),
    ] {
        let request = || app.http.request(method.parse().unwrap(), app.url(path));
        let (answered, error) = refusal(request()).await;
        assert_eq!((answered, &error["error"]), (status, &json!("VALIDATION_ERROR")), "{method} {path}");
        let response = request().send().await.unwrap();
        assert_eq!(response.headers().get("allow").map(|allow| allow.to_str().unwrap()), allow, "{method} {path}");
        if status == 404 {
            assert_eq!(error["details"]["path"], path.split('?').next().unwrap());
        }
    }
    let long = refusal(app.http.get(app.url(&format!("/{}", "x".repeat(8_000))))).await.1;
    assert_eq!(long["details"]["path"].as_str().unwrap().len(), 256);
}

#[tokio::test]
async fn the_endpoint_also_answers_with_a_slash_at_its_end() {
    let app = TestApp::spawn().await;
    let list = message(Era::Legacy, "tools/list", json!({})).to_string();
    let request = app.http.post(app.url("/mcp/")).header("content-type", "application/json; charset=utf-8");
    let (status, answer) =
        json_answer(request.header("accept", "text/event-stream, application/json").body(list)).await;
    assert_eq!((status, answer["result"]["tools"].as_array().unwrap().len()), (200, 5));
}

#[tokio::test]
async fn hosts_that_are_allowed_pass_with_any_port() {
    let app = TestApp::spawn().await;
    let list = message(Era::Legacy, "tools/list", json!({})).to_string();
    for (host, expected) in [
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("127.0.0.2", 403),
        ("localhost.", 200),
    ] {
        let answer = app.raw(post_with("", &list).replace("Host: localhost", &format!("Host: {host}"))).await;
        assert_eq!(answer.status, expected, "{host}: {answer:?}");
    }
    let anywhere = TestApp::spawn_with(|settings| settings.web.allowed_hosts = None).await;
    assert_eq!(anywhere.post(list).header("host", "mcp.example").send().await.unwrap().status(), StatusCode::OK);
}

/// A request as written by hand, which asks for the connection to be closed.
fn post_with(headers: &str, body: &str) -> String {
    format!(
        "POST /mcp HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Accept: application/json, text/event-stream\r\n{headers}Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[tokio::test]
async fn requests_that_no_honest_client_writes_are_refused() {
    let app = TestApp::spawn().await;
    let list = message(Era::Legacy, "tools/list", json!({})).to_string();
    assert_eq!(app.raw(post_with("", &list)).await.status, 200);
    for (request, status) in [
        (post_with("Host: evil.example\r\n", &list), 400),
        (post_with("Host: localhost\r\n", &list), 400),
        (post_with("Content-Length: 5\r\n", &list), 400),
        (post_with("Bad Header: x\r\n", &list), 400),
        (post_with(&"X-More: x\r\n".repeat(100), &list), 431),
        (post_with(&format!("X-Long: {}\r\n", "x".repeat(32 << 10)), &list), 431),
        (post_with("", &list).replace("Host: localhost\r\n", ""), 400),
        (post_with("", &list).replace("HTTP/1.1", "HTTP/3.0"), 400),
    ] {
        let RawAnswer { status: answered, head, .. } = app.raw(&request).await;
        assert_eq!(answered, status, "{head}\n\nto {}", request.chars().take(300).collect::<String>());
    }
    let truncated = post_with("", &list).replace("Content-Length: ", "Transfer-Encoding: chunked\r\nX-Was: ");
    let RawAnswer { status, body, .. } = app.raw(&truncated).await;
    assert_eq!(status, 400, "{body}");
    assert_eq!(error_object(&serde_json::from_str(&body).unwrap())["error"], "VALIDATION_ERROR", "{body}");
}

#[tokio::test]
async fn pages_of_allowed_origins_may_call_and_no_others() {
    let origin = "https://app.example";
    let app = TestApp::spawn_with(|settings| settings.web.allowed_origins = vec![origin.to_owned()]).await;
    let list = message(Era::Legacy, "tools/list", json!({})).to_string();
    let preflight = |origin: &'static str| {
        let request = app.http.request(reqwest::Method::OPTIONS, app.url("/mcp")).header("origin", origin);
        let request = request.header("access-control-request-method", "POST");
        request.header("access-control-request-headers", "content-type,mcp-protocol-version,mcp-method").send()
    };
    let allowed = preflight("https://app.example").await.unwrap();
    assert_eq!(allowed.status(), StatusCode::OK);
    for (name, value) in [
        ("access-control-allow-origin", origin),
        ("access-control-allow-methods", "POST,GET,DELETE"),
        ("access-control-allow-headers", "content-type,mcp-protocol-version,mcp-method"),
        ("access-control-max-age", "3600"),
    ] {
        assert_eq!(allowed.headers()[name], value);
    }
    let call = app.post(list.clone()).header("origin", origin).send().await.unwrap();
    assert_eq!(
        (call.status(), &call.headers()["access-control-allow-origin"]),
        (StatusCode::OK, &origin.parse().unwrap())
    );
    assert!(call.headers()["access-control-expose-headers"].to_str().unwrap().contains("traceparent"));
    assert_eq!(app.post(list.clone()).send().await.unwrap().status(), StatusCode::OK);

    for foreign in
        ["https://evil.example", "http://app.example", "https://app.example:444", "https://app.example.evil", "null"]
    {
        assert!(preflight(foreign).await.unwrap().headers().get("access-control-allow-origin").is_none(), "{foreign}");
        let (status, _) = refusal(app.post(list.clone()).header("origin", foreign)).await;
        assert_eq!(status, 403, "{foreign}");
    }
}

#[tokio::test]
async fn the_largest_legal_ticket_in_its_most_wasteful_escaping_fits() {
    let app = TestApp::spawn().await;
    let (title, description, assignee) = ("😀".repeat(200), "𝕏".repeat(5000), "🦀".repeat(128));
    for era in Era::ALL {
        let arguments =
            json!({ "title": title, "description": description, "priority": "critical", "assignee_id": assignee });
        let body = message(era, "tools/call", json!({ "name": "create_ticket", "arguments": arguments }));
        let request = app.post(escaped(&body)).header("mcp-protocol-version", era.version());
        let request = request.header("mcp-method", "tools/call").header("mcp-name", "create_ticket");
        let (status, answer) = json_answer(request).await;
        let ticket = &answer["result"]["structuredContent"];
        assert_eq!(status, 200, "{answer}");
        assert_eq!(
            (ticket["title"].as_str(), ticket["description"].as_str(), ticket["assignee_id"].as_str()),
            (Some(title.as_str()), Some(description.as_str()), Some(assignee.as_str()))
        );
    }
}

/// The same JSON with every character of every string written as `\uXXXX`.
fn escaped(value: &Value) -> String {
    let text = |text: &str| {
        let units: String = text.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect();
        format!("\"{units}\"")
    };
    match value {
        Value::String(string) => text(string),
        Value::Object(object) => {
            let fields: Vec<_> =
                object.iter().map(|(key, value)| format!("{}:{}", text(key), escaped(value))).collect();
            format!("{{{}}}", fields.join(","))
        }
        other => other.to_string(),
    }
}

#[tokio::test]
async fn the_root_says_who_we_are_to_programs_and_to_people() {
    let app = TestApp::spawn().await;
    let (status, answer) = json_answer(app.http.get(app.url("/"))).await;
    let expected = json!({
        "service": "mcp-server",
        "version": env!("CARGO_PKG_VERSION"),
        "mcp_endpoint": "/mcp",
        "docs": "https://modelcontextprotocol.io/specification/2026-07-28",
    });
    assert_eq!((status, answer), (200, expected));
    let accept = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8";
    let page = app.http.get(app.url("/")).header("accept", accept).send().await.unwrap();
    assert_eq!(page.headers()["content-type"], "text/html; charset=utf-8");
    assert!(page.text().await.unwrap().contains("/mcp"));
}
