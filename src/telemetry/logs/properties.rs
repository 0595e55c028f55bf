//! Log lines, whatever is logged.

use proptest::prelude::*;
use serde_json::Value;

use super::tests::log_of;
use crate::visible::is_invisible;

/// What the contract wants in every line.
const FIELDS: [&str; 8] = ["timestamp", "level", "logger", "message", "module", "function", "line", "trace_id"];

/// Text that likes to break out: quotes, escapes, controls, separators, other planes.
fn hostile() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<String>(),
        "[\"\\\\/{}\\[\\],:\u{0}-\u{1f}\u{7f}-\u{9f}\u{2028}\u{2029}\u{1b}ü🦀a]{0,40}",
        "[a\u{ad}\u{34f}\u{61c}\u{200b}-\u{200f}\u{202a}-\u{202e}\u{2066}-\u{2069}\u{fe0f}\u{feff}\u{e0001}-\u{e01ef}]{0,20}",
        "(\\\\|\"|\r\n|\u{1b}\\[31m|\"\\}\n\\{\"level\":\"FATAL\"){0,6}",
        "[ -~]{0,60}",
    ]
}

/// The one line, read; the test fails if it is not one line of one object.
fn the_line(text: &str) -> Value {
    let line = text.strip_suffix('\n').unwrap_or_else(|| panic!("no end of line: {text:?}"));
    let splits = |c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}');
    assert!(!line.contains(splits), "something in {line:?} can move a terminal or split a line");
    assert!(!line.contains(is_invisible), "something in {line:?} is hidden, or shows text in another order");
    let read: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    for field in FIELDS {
        assert!(!read[field].is_null(), "{field} in {line}");
        assert_eq!(line.matches(&format!("\"{field}\":")).count(), 1, "{field} in {line}");
    }
    assert!(read.is_object());
    read
}

proptest! {
    #[test]
    fn a_log_line_is_one_json_object_with_the_contract_fields_whatever_is_logged(
        message in hostile(), text in hostile(), cause in proptest::option::of(hostile()),
        float in any::<f64>(), odd in prop_oneof![Just(f64::NAN), Just(f64::INFINITY), Just(f64::NEG_INFINITY), Just(-0.0), Just(f64::MIN_POSITIVE), Just(f64::MAX)],
        signed: i64, unsigned: u64, wide: i128, yes: bool,
    ) {
        let line = log_of("info", || {
            let error = std::io::Error::other(text.clone());
            tracing::info!(
                field = text, shown = %text, debugged = ?text, cause = cause.as_deref(),
                float, odd, signed, unsigned, wide, yes, error = &error as &(dyn std::error::Error + 'static),
                level = "FATAL", message_too = %message, "{message}"
            );
        });
        let line = the_line(&line);
        prop_assert_eq!(line["message"].as_str(), Some(&*message));
        prop_assert_eq!(line["level"].as_str(), Some("INFO"));
        prop_assert_eq!(line["field"].as_str(), Some(&*text));
        prop_assert_eq!(line["shown"].as_str(), Some(&*text));
        prop_assert_eq!(line["debugged"].as_str(), Some(&*format!("{text:?}")));
        prop_assert_eq!(line["cause"].as_str(), cause.as_deref());
        prop_assert_eq!((line["signed"].as_i64(), line["unsigned"].as_u64(), line["yes"].as_bool()), (Some(signed), Some(unsigned), Some(yes)));
        prop_assert_eq!(line["wide"].as_str(), Some(&*wide.to_string()));
        prop_assert!(line["float"].is_number() || !float.is_finite());
        prop_assert!(line["odd"].is_number() || line["odd"].is_string());
        prop_assert_eq!(line["trace_id"].as_str(), Some(""));
    }

    #[test]
    fn a_trace_id_cannot_break_its_line_whoever_named_it(first in hostile(), second in hostile()) {
        let line = log_of("info", || {
            let span = tracing::error_span!("request", trace_id = first, other = %second);
            span.record("trace_id", tracing::field::display(&second));
            let _inside = span.enter();
            tracing::error!("ours");
        });
        let line = the_line(&line);
        prop_assert_eq!(line["trace_id"].as_str(), Some(&*second));
        prop_assert_eq!((line["message"].as_str(), line["function"].as_str()), (Some("ours"), Some("request")));
    }
}
