//! One trace id from the caller through the error result and the response to the backend.

use serde_json::{Value, json};

use crate::support::{Era, TestApp};

const IN_META: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const IN_HEADER: &str = "0af7651916cd43dd8448eb211c80319c";

fn traceparent(trace_id: &str) -> String {
    format!("00-{trace_id}-00f067aa0ba902b7-01")
}

fn trace_id(traceparent: &str) -> &str {
    let parts: Vec<_> = traceparent.split('-').collect();
    assert!(matches!(parts.as_slice(), ["00", id, span, _] if id.len() == 32 && span.len() == 16), "{traceparent}");
    parts[1]
}

/// Calls for a user that does not exist and gives the one trace id that everybody was told, or fails.
async fn trace_of_call(app: &TestApp, era: Era, meta: Option<Value>, header: Option<&str>) -> String {
    app.stand_ins.backend.forget_requests();
    let mut params = json!({ "name": "get_user_profile", "arguments": { "user_id": "nobody" } });
    if let Some(traceparent) = meta {
        params["_meta"] = json!({ "traceparent": traceparent });
    }
    let mut request = app.request(era, "tools/call", params);
    if let Some(header) = header {
        request = request.header("traceparent", header);
    }
    let response = request.send().await.unwrap();
    let in_response = trace_id(response.headers()["traceparent"].to_str().unwrap()).to_owned();
    let answer: Value = serde_json::from_str(&response.text().await.unwrap()).unwrap();
    let error: Value = serde_json::from_str(answer["result"]["content"][0]["text"].as_str().unwrap()).unwrap();
    assert_eq!(error["details"]["trace_id"], in_response);
    let requests = app.backend_requests();
    assert_eq!(trace_id(requests[0].header("traceparent").unwrap()), in_response);
    in_response
}

#[tokio::test]
async fn the_trace_comes_from_the_message_else_from_the_header_else_it_begins_here() {
    let app = TestApp::spawn().await;
    let (meta, header) = (json!(traceparent(IN_META)), traceparent(IN_HEADER));
    for era in Era::ALL {
        assert_eq!(trace_of_call(&app, era, Some(meta.clone()), Some(&header)).await, IN_META);
        assert_eq!(trace_of_call(&app, era, Some(meta.clone()), None).await, IN_META);
        assert_eq!(trace_of_call(&app, era, None, Some(&header)).await, IN_HEADER);
        let [one, other] = [trace_of_call(&app, era, None, None).await, trace_of_call(&app, era, None, None).await];
        assert!(one != other && one != IN_HEADER);
    }
}

#[tokio::test]
async fn a_malformed_trace_counts_as_absent() {
    let app = TestApp::spawn().await;
    let header = traceparent(IN_HEADER);
    for malformed in [
        String::new(),
        "garbage".to_owned(),
        IN_META.to_owned(),
        traceparent(&IN_META.to_uppercase()),
        traceparent(&"0".repeat(32)),
        format!("ff{}", &traceparent(IN_META)[2..]),
        format!("{}-more", traceparent(IN_META)),
        format!("{}\r\nx: y", traceparent(IN_META)),
        "0".repeat(10_000),
    ] {
        for era in Era::ALL {
            assert_eq!(trace_of_call(&app, era, Some(json!(malformed)), Some(&header)).await, IN_HEADER, "{malformed}");
            if http::HeaderValue::from_str(&malformed).is_ok() {
                assert_ne!(trace_of_call(&app, era, None, Some(&malformed)).await, IN_META, "{malformed}");
            }
        }
    }
    for wrong_type in [json!(null), json!(7), json!({}), json!([traceparent(IN_META)])] {
        for era in Era::ALL {
            assert_eq!(trace_of_call(&app, era, Some(wrong_type.clone()), Some(&header)).await, IN_HEADER);
        }
    }
}

#[tokio::test]
async fn the_backend_sees_the_callers_sampling_decision() {
    let app = TestApp::spawn().await;
    for flags in ["00", "01"] {
        let header = format!("00-{IN_HEADER}-00f067aa0ba902b7-{flags}");
        trace_of_call(&app, Era::Modern, None, Some(&header)).await;
        let requests = app.backend_requests();
        let sent = requests[0].header("traceparent").unwrap();
        assert!(sent.ends_with(flags) && sent != header, "{sent}");
    }
}

#[tokio::test]
async fn every_answer_tells_its_trace() {
    let app = TestApp::spawn().await;
    for path in ["/", "/health/live", "/health/ready", "/nowhere", "/mcp"] {
        let response = app.http.get(app.url(path)).header("traceparent", traceparent(IN_HEADER)).send().await.unwrap();
        assert_eq!(trace_id(response.headers()["traceparent"].to_str().unwrap()), IN_HEADER, "{path}");
    }
}
