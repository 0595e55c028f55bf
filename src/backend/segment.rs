//! One segment of a backend path: data that can never become a path, a query or another host.

use std::borrow::Cow;
use std::fmt;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

/// All bytes but those of `pchar` (RFC 3986 section 3.3). `;` is one of them, but servers cut a segment there: what follows would be
/// lost, and `%3B` is read as part of the name.
const NOT_IN_SEGMENT: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~')
    .remove(b'!')
    .remove(b'$')
    .remove(b'&')
    .remove(b'\'')
    .remove(b'(')
    .remove(b')')
    .remove(b'*')
    .remove(b'+')
    .remove(b',')
    .remove(b'=')
    .remove(b':')
    .remove(b'@');

/// A segment as it stands in a path, percent-encoded.
pub(super) fn encoded(segment: &str) -> Cow<'_, str> {
    utf8_percent_encode(segment, NOT_IN_SEGMENT).into()
}

/// An id that is safe to place in a path as exactly one segment.
///
/// What it refuses is what URL parsers, proxies or backends may read as structure, once or twice decoded: the dot segments,
/// separators, `%`, and control characters (the URL standard drops TAB, CR and LF silently, which would ask for another id). A dot
/// segment stays one with path parameters: servlet containers drop `;` and what follows before they resolve `..`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment(String);

/// Why a text cannot be a [`Segment`]; its `Display` says what would be accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// There is nothing to ask for.
    #[error("must not be empty")]
    Empty,
    /// `.` and `..` would climb, and nothing before a `;` would be the place above.
    #[error("must not be `.` or `..`, nor begin with `;`, `.;` or `..;`: these are steps in a path and no identifiers")]
    Dots,
    /// `/ \ ? # %` or a control character.
    #[error("must not contain `/`, `\\`, `?`, `#`, `%` or control characters, which no identifier has")]
    Structure,
}

impl Segment {
    /// Checks a text without keeping it.
    ///
    /// # Errors
    ///
    /// When the text could change the path or the query.
    pub fn check(text: &str) -> Result<(), SegmentError> {
        let structural = |character: char| matches!(character, '/' | '\\' | '?' | '#' | '%') || character.is_control();
        let name = text.split_once(';').map_or(text, |(name, _parameters)| name);
        match name {
            "" if text.is_empty() => Err(SegmentError::Empty),
            "" | "." | ".." => Err(SegmentError::Dots),
            _ if text.chars().any(structural) => Err(SegmentError::Structure),
            _ => Ok(()),
        }
    }

    /// The text, unencoded.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Segment {
    type Error = SegmentError;

    fn try_from(text: String) -> Result<Self, SegmentError> {
        Self::check(&text)?;
        Ok(Self(text))
    }
}

impl fmt::Display for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_change_the_path_is_refused() {
        for hostile in [
            "",
            ".",
            "..",
            "../admin",
            "%2e%2e",
            "%2e%2e%2fadmin",
            "a/b",
            "a?x=1",
            "a#f",
            "a\\b",
            "..\\admin",
            "\t..",
            "a\r\nX: y",
            "//evil.com",
            "https://evil.com/",
            "a%00",
            "%",
            "....//",
            "a\u{0}",
            "a\u{7f}",
            "a\u{85}",
            "..;",
            "..;a",
            ".;x=1",
            ";x",
            "%2e%2e;",
            "..%3b",
            ".%2e;a",
        ] {
            assert!(Segment::check(hostile).is_err(), "{hostile:?}");
        }
        for harmless in
            ["42", "u-1", "@evil.com", "ü", "a;b=c", "a;..", "...;", "a b", "...", "ann@example.com", "a&b", "a+b"]
        {
            assert_eq!(Segment::check(harmless), Ok(()), "{harmless:?}");
        }
    }

    #[test]
    fn whatever_is_no_pchar_is_percent_encoded() {
        let is_pchar = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,=:@".contains(&byte);
        for byte in 0..=u8::MAX {
            let text = char::from(byte).to_string();
            let expected = match text.as_bytes() {
                [byte] if is_pchar(*byte) => text.clone(),
                bytes => bytes.iter().map(|byte| format!("%{byte:02X}")).collect(),
            };
            assert_eq!(encoded(&text), expected);
        }
    }
}
