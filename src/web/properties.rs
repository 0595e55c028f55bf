//! Origins, and the bodies of HTTP errors, whatever they are made of.

use http_body_util::BodyExt as _;
use proptest::prelude::*;
use serde_json::Value;
use url::Url;

use super::*;
use crate::problem::check::assert_well_formed;

thread_local! {
    static RUNTIME: tokio::runtime::Runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
}

/// A message that is nearly a plain call, or is one. The first byte is for the head, as `json_rpc` takes it.
fn nearly_a_plain_call() -> impl Strategy<Value = Vec<u8>> {
    const META: &str = r#""_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{},"traceparent":"00-1af7651916cd43dd8448eb211c80319c-c7ad6b7169203331-01"}"#;
    let mostly = |common: &'static str, others: &'static [&'static str]| prop_oneof![6 => Just(common), 1 => proptest::sample::select(others)];
    let id = mostly(
        r#""id":1"#,
        &[
            r#""id":"a""#,
            r#""id":"\u0041\"\n/\u007f""#,
            r#""id":"""#,
            r#""id":-7"#,
            r#""id":1.0"#,
            r#""id":1e3"#,
            r#""id":1.5"#,
            r#""id":null"#,
            r#""id":[]"#,
            r#""id":9223372036854775807"#,
            r#""id":9223372036854775808"#,
            r#""id":1,"id":2"#,
            r#""ID":1"#,
        ],
    );
    let version = mostly(
        r#""jsonrpc":"2.0""#,
        &[
            r#""jsonrpc":"1.0""#,
            r#""jsonrpc":2.0"#,
            r#""jsonrpc":"2\u002e0""#,
            r#""more":1,"jsonrpc":"2.0""#,
            r#""result":{}"#,
        ],
    );
    let method = mostly(
        r#""method":"tools/call""#,
        &[r#""method":"tools\/call""#, r#""method":"tools/list""#, r#""method":"ping""#, r#""method":"tools/Call""#],
    );
    let name = mostly(
        r#""name":"list_users""#,
        &[
            r#""name":"get_user_profile""#,
            r#""name":"create_ticket""#,
            r#""name":"query_data""#,
            r#""name":"list\u005fusers""#,
            r#""name":"LIST_USERS""#,
            r#""name":"nothing""#,
            r#""name":7"#,
            r#""name":"list_users","name":"list_tickets""#,
            r#""task":{}"#,
        ],
    );
    let arguments = mostly(
        r#""arguments":{"limit":5}"#,
        &[
            r#""arguments":{}"#,
            r#""arguments":null"#,
            r#""arguments":[]"#,
            r#""arguments":{"user_id":"42"}"#,
            r#""arguments":{"limit":0,"skip":-1,"more":"\u200b"}"#,
            r#""arguments":{"limit":1,"limit":2}"#,
            r#""arguments":{"subject":"s","description":"d","priority":"high"}"#,
            r#""arguments":{"dataset":"d","filters":{"n":12345678901234567890123,"m":1.50}}"#,
            r#""arguments":{"dataset":"d","filters":{"n":1e-400},"filters":{"n":[0.1]}}"#,
            r#""inputResponses":{}"#,
            r#""requestState":"s""#,
        ],
    );
    let meta = prop_oneof![
        4 => Just(META),
        4 => Just(r#""_meta":{"progressToken":3}"#),
        1 => proptest::sample::select(&[
            r#""_meta":{}"#,
            r#""_meta":null"#,
            r#""_meta":7"#,
            r#""_meta":{"io.modelcontextprotocol/protocolVersion":"2025-11-25"}"#,
            r#""_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28"}"#,
            r#""_meta":{"io.modelcontextprotocol/protocolVersion":7}"#,
            r#""_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":7}"#,
            r#""_meta":{"traceparent":"nonsense"}"#,
        ]),
    ];
    let space = mostly("", &[" ", "\n", "\u{feff}"]);
    (0u8..6, id, version, method, name, arguments, meta, space, 0u8..40).prop_map(
        |(head, id, version, method, name, arguments, meta, space, break_at)| {
            let mut message = format!(
                "{space}{{{version},{id},{space}{method},\"params\":{{{name},{arguments},{meta}}}{space}}}{space}"
            );
            if break_at == 0 {
                message.pop();
            }
            [&[head], message.as_bytes()].concat()
        },
    )
}

/// Mostly what clients send, and otherwise something near it.
fn header_value(usual: &'static str, near: &'static str) -> impl Strategy<Value = String> {
    prop_oneof![4 => Just(usual.to_owned()), 1 => near]
}

proptest! {
    #[test]
    fn the_short_way_of_a_plain_call_answers_as_rmcp_does(message in nearly_a_plain_call()) {
        crate::fuzzing::json_rpc(&message);
    }

    #[test]
    fn a_head_is_judged_alike_whichever_way_its_message_takes(
        host in header_value("localhost", "(LOCALHOST|localhost:[0-9]{0,6}|mcp\\.example(:8443|:8444)?|evil\\.example|\\[::1\\](evil|:1)?|localhost\\.(:1)?|a@localhost|[!-~]{0,8})"),
        content_type in header_value("application/json", "(Application/JSON ?; ?charset=utf-8|application/jsonp|text/plain|;application/json|[ -~]{0,12})"),
        accept in header_value("application/json, text/event-stream", "(text/event-stream ?,APPLICATION/json|application/json|\\*/\\*|application/json;q=0,text/event-stream|\"application/json,text/event-stream\"|[ -~]{0,30})"),
        version in header_value("2025-11-25", "(2025-06-18|2025-03-26|2024-11-05|2025-11-26|[ -~]{0,10})"),
        origin in proptest::option::weighted(0.2, "(https://app\\.example|https://evil\\.example|null|[ -~]{0,8})"),
        twice in proptest::option::weighted(0.1, 0usize..4),
    ) {
        let mut fields =
            vec![(header::HOST, host), (header::CONTENT_TYPE, content_type), (header::ACCEPT, accept), (MCP_PROTOCOL_VERSION, version)];
        fields.extend(twice.and_then(|which| fields.get(which).cloned()));
        fields.extend(origin.map(|origin| (header::ORIGIN, origin)));
        let fields: Vec<_> = fields
            .into_iter()
            .filter_map(|(name, value)| Some((name, HeaderValue::from_str(value.trim()).ok()?)))
            .collect();
        crate::fuzzing::head(&fields);
    }

    #[test]
    fn an_origin_gets_the_port_that_browsers_leave_out_and_keeps_every_other(
        scheme in "(http|https)", host in "([a-z][a-z0-9-]{0,10}(\\.[a-z]{2,5}){0,2}|127\\.0\\.0\\.1|\\[::1\\]|\\[2001:db8::17\\])",
        port in proptest::option::of(1u16..),
    ) {
        let origin = match port {
            Some(port) => format!("{scheme}://{host}:{port}"),
            None => format!("{scheme}://{host}"),
        };
        // Settings let no host through that is none, such as one that begins like punycode and goes on otherwise.
        let Ok(url) = Url::parse(&origin) else { return Ok(()) };
        let with = plain::with_port(&origin);
        let known = port.or_else(|| url.port_or_known_default()).unwrap();
        prop_assert_eq!(&with, &format!("{scheme}://{host}:{known}"));
        prop_assert_eq!(plain::with_port(&with), with);
    }

    #[test]
    fn any_text_in_an_origins_place_is_left_as_it_is_or_only_grows(origin in "(https?://|vscode-webview://)?.{0,20}") {
        let with = plain::with_port(&origin);
        prop_assert!([origin.clone(), format!("{origin}:80"), format!("{origin}:443")].contains(&with), "{}", with);
        prop_assert_eq!(plain::with_port(&with), with);
    }

    #[test]
    fn every_http_error_has_an_error_object_for_a_body_and_the_endpoint_has_it_in_a_json_rpc_error(
        status in 400u16..=599,
        text in prop_oneof![any::<String>(), (4_000usize..4_200).prop_map(|length| "x".repeat(length))],
        kind in proptest::option::of("(text/plain|text/html|[a-z]{1,4})"),
        is_mcp: bool,
        id in proptest::option::of(prop_oneof![any::<i64>().prop_map(Value::from), any::<String>().prop_map(Value::from)]),
    ) {
        let mut response = Response::new(Body::from(text));
        *response.status_mut() = StatusCode::from_u16(status).unwrap();
        if let Some(kind) = kind {
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::try_from(kind).unwrap());
        }
        let raw = id.as_ref().map(|id| serde_json::value::to_raw_value(id).unwrap());
        let mut response = problem::to_request(response, raw);
        let trace = RequestTrace::new(&HeaderMap::new());
        let body = RUNTIME.with(|runtime| runtime.block_on(async {
            problem::speak_plainly(&mut response, &trace, is_mcp).await;
            std::mem::take(response.body_mut()).collect().await.unwrap().to_bytes()
        }));
        prop_assert_eq!(&response.headers()[header::CONTENT_TYPE], "application/json");
        let body = str::from_utf8(&body).unwrap();
        let mut read: Value = serde_json::from_str(body).unwrap();
        if is_mcp {
            prop_assert_eq!((&read["jsonrpc"], &read["id"]), (&"2.0".into(), &id.into()));
            prop_assert_eq!(&read["error"]["code"], status);
            fuzzing::assert_wrapped(body.as_bytes());
            read = read["error"]["data"].take();
        } else {
            assert_well_formed(body);
        }
        prop_assert_eq!(response.status().as_u16(), status);
        prop_assert_eq!(read["details"]["status_code"].as_u64(), Some(status.into()));
        prop_assert_eq!(read["details"]["trace_id"].as_str(), Some(&*trace.context().trace_id().to_string()));
        prop_assert_eq!(read["error"] == "INTERNAL_ERROR", response.status().is_server_error());
    }

    /// The `url` crate has read hosts for browsers for years.
    #[test]
    fn a_host_is_admitted_as_the_name_that_a_url_would_have_or_refused(
        host in "(localhost|LOCALHOST|mcp\\.example|\\[::1\\]|\\[[0-9a-f:]{1,9}\\]|[a-z0-9.-]{1,12}|[!-~]{0,8})",
        dot in "\\.?", port in "(|:|:[0-9]{1,6}|:[!-~]{0,3})",
    ) {
        let settings = WebSettings {
            allowed_hosts: Some(["localhost", "mcp.example:8443", "[::1]"].map(str::to_owned).to_vec()),
            ..WebSettings::default()
        };
        let value = format!("{host}{dot}{port}");
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, HeaderValue::from_str(&value).unwrap());
        headers.insert(header::CONTENT_TYPE, problem::JSON);
        let judged = plain::head(&headers, &plain::Allowed::new(&settings));
        if judged.is_ok() {
            let url = Url::parse(&format!("http://{value}/mcp"));
            prop_assert!(url.is_ok(), "{} is no host", value);
            let url = url.unwrap();
            let name = url.host_str().unwrap().trim_end_matches('.').to_owned();
            prop_assert!(["localhost", "mcp.example", "[::1]"].contains(&&*name), "{} is {}", value, name);
            prop_assert!(name != "mcp.example" || url.port() == Some(8443), "{}", value);
            prop_assert_eq!(url.username(), "");
        }
    }

    #[test]
    fn no_path_that_leads_nowhere_makes_the_answer_grow(path in "/[!-~]{0,40}", times in 1usize..200) {
        let Ok(uri) = path.repeat(times).parse::<http::Uri>() else { return Ok(()) };
        let trace = RequestTrace::new(&HeaderMap::new());
        let body = RUNTIME.with(|runtime| runtime.block_on(async {
            let mut response = problem::not_found(uri).await;
            problem::speak_plainly(&mut response, &trace, false).await;
            std::mem::take(response.body_mut()).collect().await.unwrap().to_bytes()
        }));
        prop_assert!(body.len() < 1_024);
        assert_well_formed(str::from_utf8(&body).unwrap());
    }
}
