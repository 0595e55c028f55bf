//! Pages in browsers: the preflight needs no token, a refusal can be read, and no other origin gets either.

use mcp_server::demo::entra::DemoCaller;
use reqwest::Response;
use reqwest::header::HeaderMap;
use serde_json::json;

use crate::support::{Era, TestApp};

const PAGE: &str = "http://localhost:6274";
const FOREIGN: [&str; 6] = [
    "http://localhost:6275",
    "https://localhost:6274",
    "http://localhost",
    "http://localhost:6274.evil.example",
    "http://evil.example",
    "null",
];

async fn app() -> TestApp {
    TestApp::guarded_with(|_| {}, |settings| settings.web.allowed_origins = vec![PAGE.to_owned()]).await
}

async fn preflight(app: &TestApp, path: &str, origin: &str, headers: &str) -> Response {
    let request = app.http.request(reqwest::Method::OPTIONS, app.url(path)).header("origin", origin);
    let request = request.header("access-control-request-method", "POST");
    request.header("access-control-request-headers", headers).send().await.unwrap()
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).map_or("", |value| value.to_str().unwrap())
}

#[tokio::test]
async fn a_preflight_is_answered_without_a_token_and_reaches_nobody() {
    let app = app().await;
    let wanted = "authorization,content-type,mcp-protocol-version,mcp-method,mcp-name,traceparent";
    for path in ["/mcp", "/mcp/"] {
        let answer = preflight(&app, path, PAGE, wanted).await;
        assert_eq!(answer.status(), 200, "{path}");
        let headers = answer.headers();
        assert_eq!(text(headers, "access-control-allow-origin"), PAGE);
        assert_eq!(text(headers, "access-control-allow-headers"), wanted);
        assert!(text(headers, "access-control-allow-methods").contains("POST"));
        assert!(headers.get("access-control-allow-credentials").is_none(), "tokens, never cookies");
        assert!(text(headers, "vary").to_ascii_lowercase().contains("origin"));
    }
    assert_eq!(app.backend_requests().len(), 0);
    for origin in FOREIGN {
        let answer = preflight(&app, "/mcp", origin, wanted).await;
        assert!(answer.headers().get("access-control-allow-origin").is_none(), "{origin}");
        assert!(text(answer.headers(), "vary").to_ascii_lowercase().contains("origin"), "{origin}");
    }
}

#[tokio::test]
async fn a_page_can_read_the_challenge_the_metadata_and_the_answer() {
    let app = app().await;
    let list = || app.request(Era::Modern, "tools/list", json!({})).header("origin", PAGE);
    let refused = list().send().await.unwrap();
    assert_eq!(refused.status(), 401);
    assert!(text(refused.headers(), "www-authenticate").starts_with("Bearer resource_metadata="));
    let answered = list().bearer_auth(app.token(DemoCaller::Reader)).send().await.unwrap();
    assert_eq!(answered.status(), 200);
    let metadata = app.http.get(app.url("/.well-known/oauth-protected-resource/mcp")).header("origin", PAGE);
    let metadata = metadata.send().await.unwrap();
    assert_eq!(metadata.status(), 200);
    for answer in [refused, answered, metadata] {
        let headers = answer.headers();
        assert_eq!(text(headers, "access-control-allow-origin"), PAGE, "{}", answer.url());
        assert!(text(headers, "vary").to_ascii_lowercase().contains("origin"));
        let exposed = text(headers, "access-control-expose-headers");
        for name in ["mcp-session-id", "mcp-protocol-version", "www-authenticate", "retry-after", "traceparent"] {
            assert!(exposed.split(',').any(|one| one.trim() == name), "{name} in {exposed}");
        }
    }
}

#[tokio::test]
async fn a_page_of_another_origin_is_refused_even_with_a_good_token_and_reads_nothing() {
    let app = app().await;
    let token = app.token(DemoCaller::Writer);
    let call = json!({ "name": "list_users", "arguments": {} });
    for origin in FOREIGN {
        for era in Era::ALL {
            let request = app.request(era, "tools/call", call.clone()).header("origin", origin).bearer_auth(&token);
            let answer = request.send().await.unwrap();
            assert_eq!(answer.status(), 403, "{origin}");
            assert!(answer.headers().get("access-control-allow-origin").is_none(), "{origin}");
        }
    }
    assert_eq!(app.backend_requests().len(), 0);
}
