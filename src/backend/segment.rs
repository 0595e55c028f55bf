//! One segment of a backend path: data that can never become a path, a query or another host.

use std::fmt;

/// An id that is safe to place in a path as exactly one segment.
///
/// What it refuses is what URL parsers, proxies or backends may read as structure, once or twice decoded: the dot segments,
/// separators, `%`, and control characters (the URL standard drops TAB, CR and LF silently, which would ask for another id).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment(String);

/// Why a text cannot be a [`Segment`]; its `Display` says what would be accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// There is nothing to ask for.
    #[error("must not be empty")]
    Empty,
    /// `.` and `..` would climb.
    #[error("must not be `.` or `..`, which are steps in a path and no identifiers")]
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
        match text {
            "" => Err(SegmentError::Empty),
            "." | ".." => Err(SegmentError::Dots),
            text if text.chars().any(structural) => Err(SegmentError::Structure),
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
        ] {
            assert!(Segment::check(hostile).is_err(), "{hostile:?}");
        }
        for harmless in ["42", "u-1", "@evil.com", "ü", "a;b=c", "a b", "...", "ann@example.com", "a&b", "a+b", "日本"]
        {
            assert_eq!(Segment::check(harmless), Ok(()), "{harmless:?}");
        }
    }
}
