//! JSON as others write it: text that `serde_json` refuses although it can be read in one way only, and values copied as they came.

mod copy;
mod digits;

use std::borrow::Cow;
use std::iter;

use bytes::Bytes;

pub use copy::{Copier, Malformed, object};
pub use digits::loses_digits;

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The body as it is meant: without a byte order mark (RFC 8259 section 8.1), and with U+FFFD for each half of a surrogate pair that
/// stands alone, as programs write that cut text between two UTF-16 units. Both are rare, and a body without them is not copied.
pub fn repaired(body: &[u8]) -> Cow<'_, [u8]> {
    let body = body.strip_prefix(BYTE_ORDER_MARK).unwrap_or(body);
    let mut halves = unpaired_surrogates(body);
    let Some(first) = halves.next() else { return Cow::Borrowed(body) };
    let mut repaired = body.to_vec();
    for at in iter::once(first).chain(halves) {
        if let Some(escape) = repaired.get_mut(at..at + 6) {
            escape.copy_from_slice(br"\ufffd");
        }
    }
    Cow::Owned(repaired)
}

/// The same, shared with the body where nothing has to be replaced.
pub fn repaired_bytes(body: Bytes) -> Bytes {
    match repaired(&body) {
        Cow::Borrowed(rest) => body.slice_ref(rest),
        Cow::Owned(repaired) => repaired.into(),
    }
}

/// Where escapes of unpaired surrogates begin. A backslash is legal in JSON's strings only, so strings need not be told from the rest.
fn unpaired_surrogates(body: &[u8]) -> impl Iterator<Item = usize> {
    let mut at = 0;
    iter::from_fn(move || {
        loop {
            at += body.get(at..)?.iter().position(|byte| *byte == b'\\')?;
            let here = at;
            match unit(body, here) {
                Some(0xd800..=0xdbff) if matches!(unit(body, here + 6), Some(0xdc00..=0xdfff)) => at += 12,
                Some(0xd800..=0xdfff) => {
                    at += 6;
                    return Some(here);
                }
                Some(_) => at += 6,
                // Another escape, of which the second byte may be a backslash too.
                None => at += 2,
            }
        }
    })
}

/// The UTF-16 unit that is escaped there.
fn unit(body: &[u8], at: usize) -> Option<u16> {
    let digits = body.get(at..at + 6)?.strip_prefix(br"\u")?;
    let digits = digits.iter().all(u8::is_ascii_hexdigit).then_some(digits)?;
    u16::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn repair(text: &str) -> String {
        String::from_utf8(repaired_bytes(Bytes::copy_from_slice(text.as_bytes())).to_vec()).unwrap()
    }

    #[test]
    fn a_whole_body_is_not_copied() {
        for body in [r#"{"a":"\ud83d\ude00\\ud83d\n\u0041"}"#, "", r"\", r"\u", r"\ud8"] {
            let body = Bytes::from_static(body.as_bytes());
            assert_eq!(repaired_bytes(body.clone()).as_ptr(), body.as_ptr());
        }
        let marked = Bytes::from_static(b"\xef\xbb\xbf{}");
        assert_eq!(repaired_bytes(marked.clone()).as_ptr(), marked[3..].as_ptr());
    }

    proptest! {
        /// As `String::from_utf16_lossy` reads the same units.
        #[test]
        fn every_half_of_a_character_becomes_u_fffd_and_nothing_else_changes(
            units in proptest::collection::vec(prop_oneof![
                2 => 0xd800u16..=0xdbff,
                2 => 0xdc00u16..=0xdfff,
                1 => prop_oneof![Just(u16::from(b'\\')), Just(u16::from(b'"')), 0x20u16..0x7f, any::<u16>()],
            ], 0..12),
            escaped in any::<[bool; 12]>(),
        ) {
            let lossy = String::from_utf16_lossy(&units);
            let mut text = String::new();
            for (unit, escaped) in units.iter().zip(escaped) {
                match char::from_u32((*unit).into()).filter(|_| !escaped) {
                    Some('\\') => text.push_str(r"\\"),
                    Some('"') => text.push_str("\\\""),
                    Some(character) if !character.is_control() => text.push(character),
                    _ => text.push_str(&format!("\\u{unit:04x}")),
                }
            }
            let read: String = serde_json::from_str(&format!("\"{}\"", repair(&text))).unwrap();
            prop_assert_eq!(read, lossy, "{}", text);
        }
    }
}
