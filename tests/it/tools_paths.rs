//! Ids are data, not paths: whatever they hold, the backend sees the one route with the one segment, or nothing.

use mcp_server::demo::backend::RecordedRequest;
use mcp_server::demo::{DemoOptions, StandIns};
use serde_json::{Value, json};

use crate::support::{CallResult, Era, TestApp};

/// Each value with the one segment that it may be sent as; `None` where it has to be refused.
const CORPUS: [(&str, Option<&str>); 52] = [
    ("u1", Some("u1")),
    ("..", None),
    (".", None),
    ("", None),
    ("../admin", None),
    ("../../admin", None),
    ("..;/admin", None),
    ("..;", None),
    ("..;a", None),
    (".;x=1", None),
    (";a", None),
    ("%2e%2e;", None),
    ("..%3b", None),
    ("%2e%2e", None),
    ("%2E%2E", None),
    ("%2e%2e%2fadmin", None),
    ("%252e%252e", None),
    ("%", None),
    ("a%00", None),
    ("a/b", None),
    ("/etc/passwd", None),
    ("a?x=1", None),
    ("?limit=1000", None),
    ("a#f", None),
    ("a\\b", None),
    ("..\\admin", None),
    ("\t..", None),
    (".\t.", None),
    ("..\n", None),
    ("a\r\nX: y", None),
    ("a\0b", None),
    ("\u{7f}", None),
    ("\u{85}", None),
    ("//evil.com", None),
    ("https://evil.com/", None),
    ("https:evil.com", Some("https:evil.com")),
    ("@evil.com", Some("@evil.com")),
    ("user:pass@evil.com", Some("user:pass@evil.com")),
    ("....//", None),
    ("...", Some("...")),
    (" ", Some("%20")),
    (" ..", Some("%20..")),
    ("a;b=c", Some("a%3Bb=c")),
    ("a b+c&d", Some("a%20b+c&d")),
    ("ü", Some("%C3%BC")),
    ("日本", Some("%E6%97%A5%E6%9C%AC")),
    ("．．", Some("%EF%BC%8E%EF%BC%8E")),
    ("a\u{2028}b\u{202e}", Some("a%E2%80%A8b%E2%80%AE")),
    ("<script>\"{}|^`", Some("%3Cscript%3E%22%7B%7D%7C%5E%60")),
    ("[::1]", Some("%5B::1%5D")),
    ("a|b^c", Some("a%7Cb%5Ec")),
    ("' OR 1=1 --", Some("'%20OR%201=1%20--")),
];

#[tokio::test]
async fn hostile_ids_are_refused_or_sent_as_one_segment_of_the_one_route() {
    for prefix in ["", "/api/v1"] {
        let stand_ins =
            StandIns::start(DemoOptions { backend_path_prefix: prefix.to_owned(), ..DemoOptions::default() });
        let app = TestApp::spawn_against(stand_ins.await.unwrap(), |_| {}).await;
        for (id, segment) in CORPUS {
            for era in Era::ALL {
                let call = app.call_and_watch(era, "get_user_profile", json!({ "user_id": id })).await;
                assert_one_segment(call, "user_id", segment.map(|segment| format!("{prefix}/users/{segment}")));
                let call = app.call_and_watch(era, "query_data", json!({ "dataset": id })).await;
                assert_one_segment(
                    call,
                    "dataset",
                    segment.map(|segment| format!("{prefix}/query/{segment}?limit=100")),
                );
            }
        }
    }
}

#[tokio::test]
async fn hostile_assignees_are_refused_or_stay_in_the_body() {
    let app = TestApp::spawn().await;
    for (id, segment) in CORPUS {
        let ticket = json!({ "title": "x", "description": "long enough", "assignee_id": id });
        for era in Era::ALL {
            let call = app.call_and_watch(era, "create_ticket", ticket.clone()).await;
            if segment.is_some() {
                let body: Value = serde_json::from_slice(&call.1[0].body).unwrap();
                assert_eq!(body["assignee_id"], id);
            }
            assert_one_segment(call, "assignee_id", segment.map(|_| "/tickets".to_owned()));
        }
    }
}

fn assert_one_segment((result, requests): (CallResult, Vec<RecordedRequest>), field: &str, target: Option<String>) {
    let targets: Vec<_> = requests.iter().map(|request| request.target.clone()).collect();
    assert_eq!(targets, Vec::from_iter(target.clone()), "{result:?}");
    if target.is_none() {
        let error = result.error();
        assert_eq!(error["error"], "VALIDATION_ERROR");
        assert_eq!(error["details"]["fields"].as_object().unwrap().keys().collect::<Vec<_>>(), [field]);
    }
}
