//! Text that is laid out piece by piece, straight into bytes: log lines, audit records, and parts of spans.
//!
//! Whatever is put into a JSON string stays inside of it. Most of it is printable ASCII, for which the checks are made all at once.

use std::cell::Cell;
use std::fmt::{self, Write as _};
use std::net::IpAddr;
use std::time::Duration;

use time::OffsetDateTime;

use super::trace::{TraceId, write_hex};
use crate::visible::is_invisible;

/// Text in the making. That it is UTF-8 follows from what is put in, and nobody has to look again.
#[derive(Debug, Clone, Default)]
pub(super) struct Text(Vec<u8>);

impl Text {
    /// No text, with room for so many bytes.
    pub(super) fn with_capacity(bytes: usize) -> Self {
        Self(Vec::with_capacity(bytes))
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Empties it, and keeps no more memory than this.
    pub(super) fn clear(&mut self, kept: usize) {
        self.0.clear();
        self.0.shrink_to(kept);
    }

    /// Text as it is.
    pub(super) fn push(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }

    /// The same, in parts.
    pub(super) fn push_all(&mut self, parts: &[&str]) {
        parts.iter().for_each(|part| self.push(part));
    }

    pub(super) fn append(&mut self, text: &Self) {
        self.bytes(&text.0);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// Bytes in hexadecimal, twice as many digits.
    pub(super) fn hex<const DIGITS: usize>(&mut self, bytes: &[u8]) {
        let mut digits = [b'0'; DIGITS];
        write_hex(&mut digits, bytes);
        self.bytes(&digits);
    }

    pub(super) fn trace_id(&mut self, trace_id: TraceId) {
        self.hex::<32>(&trace_id.bytes());
    }

    /// A number without the machinery of formatting.
    pub(super) fn number(&mut self, number: u64) {
        self.bytes(Digits::of(number).as_bytes());
    }

    /// A time like [`Rfc3339`]. The calendar is asked once a second.
    pub(super) fn time(&mut self, time: OffsetDateTime) {
        thread_local! {
            static SECOND: Cell<(i64, [u8; 27])> = const { Cell::new((i64::MIN, [0; 27])) };
        }
        let timestamp = time.unix_timestamp();
        let (second, mut text) = SECOND.get();
        if second != timestamp {
            text = second_of(time);
            SECOND.set((timestamp, text));
        }
        write_digits(text.get_mut(20..26), time.microsecond());
        self.bytes(&text);
    }

    /// A time in milliseconds, to the microsecond.
    pub(super) fn milliseconds(&mut self, took: Duration) {
        let micros = took.as_micros() as u64;
        self.number(micros / 1_000);
        let rest = (micros % 1_000) as u32;
        let length = match rest {
            0 => return,
            _ if rest.is_multiple_of(100) => 2,
            _ if rest.is_multiple_of(10) => 3,
            _ => 4,
        };
        let mut fraction = *b".000";
        write_digits(fraction.get_mut(1..), rest);
        self.bytes(fraction.get(..length).unwrap_or_default());
    }

    /// An address. Nearly all are IPv4.
    pub(super) fn address(&mut self, address: IpAddr) {
        let IpAddr::V4(address) = address else {
            let _ = write!(self, "{address}");
            return;
        };
        let (mut text, mut length) = ([b'.'; 15], 0);
        let mut places = text.iter_mut();
        for (number, octet) in address.octets().into_iter().enumerate() {
            let digits = [b'0' + octet / 100, b'0' + octet / 10 % 10, b'0' + octet % 10];
            let leading_zeros = usize::from(octet < 100) + usize::from(octet < 10);
            let dot = usize::from(number > 0);
            for (digit, place) in digits.iter().skip(leading_zeros).zip(places.by_ref().skip(dot)) {
                *place = *digit;
            }
            length += dot + digits.len() - leading_zeros;
        }
        self.bytes(text.get(..length).unwrap_or_default());
    }

    /// `,"name":`. The name is one of ours, and needs no escaping.
    pub(super) fn name(&mut self, name: &str) {
        self.push_all(&[",\"", name, "\":"]);
    }

    /// `,"name":"text"`.
    pub(super) fn field(&mut self, name: &str, text: &str) {
        self.name(name);
        self.json_string(text);
    }

    /// A JSON string.
    pub(super) fn json_string(&mut self, text: &str) {
        self.push("\"");
        self.escaped(text);
        self.push("\"");
    }

    /// The inside of a JSON string, so that nothing that is written can break out of its line.
    pub(super) fn escaped(&mut self, text: &str) {
        // Nearly all text is.
        if is_plain(text.as_bytes()) {
            self.push(text);
            return;
        }
        let mut clean = 0;
        for (at, character) in text.char_indices() {
            let escape = match character {
                '"' => "\\\"",
                '\\' => "\\\\",
                '\n' => "\\n",
                '\r' => "\\r",
                '\t' => "\\t",
                // C1 controls and line separators are legal JSON, and still move terminals and split lines.
                control if control.is_control() || matches!(control, '\u{2028}' | '\u{2029}') => "",
                // What is invisible hides text from whoever reads the log, or shows it in another order.
                hidden if is_invisible(hidden) => "",
                _ => continue,
            };
            self.push(text.get(clean..at).unwrap_or_default());
            if escape.is_empty() {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    let _ = write!(self, "\\u{unit:04x}");
                }
            } else {
                self.push(escape);
            }
            clean = at + character.len_utf8();
        }
        self.push(text.get(clean..).unwrap_or_default());
    }
}

impl fmt::Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.push(text);
        Ok(())
    }
}

/// The decimal digits of a number.
pub(super) struct Digits {
    digits: [u8; 20],
    from: usize,
}

impl Digits {
    pub(super) fn of(mut number: u64) -> Self {
        let mut digits = [b'0'; 20];
        let mut from = digits.len();
        for (place, digit) in digits.iter_mut().enumerate().rev() {
            *digit = b'0' + (number % 10) as u8;
            number /= 10;
            from = place;
            if number == 0 {
                break;
            }
        }
        Self { digits, from }
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        self.digits.get(self.from..).unwrap_or_default()
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.0))
    }
}

/// What is displayed into it becomes the inside of a JSON string.
pub(super) struct Escaped<'a>(pub(super) &'a mut Text);

impl fmt::Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.escaped(text);
        Ok(())
    }
}

/// Displays a UTC time as RFC 3339 with microseconds: the one form of time in logs and answers.
pub struct Rfc3339(pub OffsetDateTime);

impl fmt::Display for Rfc3339 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = second_of(self.0);
        write_digits(text.get_mut(20..26), self.0.microsecond());
        f.write_str(str::from_utf8(&text).unwrap_or_default())
    }
}

/// Displays a time in milliseconds, to the microsecond.
#[derive(Debug, Clone, Copy)]
pub(super) struct Milliseconds(pub(super) Duration);

impl fmt::Display for Milliseconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = Text::with_capacity(24);
        text.milliseconds(self.0);
        text.fmt(f)
    }
}

/// The time but for the microseconds.
fn second_of(time: OffsetDateTime) -> [u8; 27] {
    let (year, month, day) = time.to_calendar_date();
    let (hour, minute, second) = time.to_hms();
    let mut text = *b"....-..-..T..:..:.........Z";
    for (place, number) in [
        (0..4, year.unsigned_abs()),
        (5..7, u8::from(month).into()),
        (8..10, day.into()),
        (11..13, hour.into()),
        (14..16, minute.into()),
        (17..19, second.into()),
    ] {
        write_digits(text.get_mut(place), number);
    }
    text
}

fn write_digits(place: Option<&mut [u8]>, mut number: u32) {
    for digit in place.unwrap_or_default().iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
}

/// Whether this is printable ASCII without quotes and backslashes; found for eight bytes at once.
fn is_plain(text: &[u8]) -> bool {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    const HIGH: u64 = u64::from_ne_bytes([0x80; 8]);
    let is_zero = |word: u64| word.wrapping_sub(ONES) & !word;
    // The high bit of some byte is set where there is one that is not plain.
    let check = |word: u64| {
        let is_control = word.wrapping_sub(ONES * 0x20) & !word;
        let is_delete_or_more = word.wrapping_add(ONES) | word;
        let is_special = is_zero(word ^ (ONES * u64::from(b'"'))) | is_zero(word ^ (ONES * u64::from(b'\\')));
        (is_control | is_delete_or_more | is_special) & HIGH
    };
    let (words, rest) = text.as_chunks::<8>();
    let mut last = [b' '; 8];
    for (place, byte) in last.iter_mut().zip(rest) {
        *place = *byte;
    }
    words.iter().fold(check(u64::from_ne_bytes(last)), |found, word| found | check(u64::from_ne_bytes(*word))) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_is_what_needs_no_escape_wherever_it_stands() {
        for byte in 0..=u8::MAX {
            let expected = matches!(byte, b' '..=b'~') && byte != b'"' && byte != b'\\';
            for length in 1..20 {
                for place in 0..length {
                    for around in [b' ', b'a', b'~', b'!', b'#', b'[', b']'] {
                        let mut text = vec![around; length];
                        text[place] = byte;
                        assert_eq!(is_plain(&text), expected, "{byte} at {place} of {length}");
                    }
                }
            }
        }
        assert!(is_plain(b""));
    }

    #[test]
    fn numbers_times_and_addresses_are_written_as_they_are_displayed() {
        let written = |write: &dyn Fn(&mut Text)| {
            let mut text = Text::default();
            write(&mut text);
            text.to_string()
        };
        for number in [0, 7, 10, 4_294_967_296, u64::MAX] {
            assert_eq!(written(&|text| text.number(number)), number.to_string());
        }
        for micros in [0, 1, 10, 100, 120, 999, 1_000, 1_100, 1_010, 1_500, 123_456, 60_000_000] {
            let milliseconds = written(&|text| text.milliseconds(Duration::from_micros(micros)));
            assert_eq!(milliseconds, (micros as f64 / 1_000.0).to_string());
        }
        for address in ["0.0.0.0", "127.0.0.1", "255.10.100.99", "::1", "2001:db8::a:b"] {
            assert_eq!(written(&|text| text.address(address.parse().unwrap())), address);
        }
        let mut time = OffsetDateTime::UNIX_EPOCH;
        for step in [0, 999_999, 1, 1_000_000, 86_400_000_000, 31_622_400_000_007] {
            time += Duration::from_micros(step);
            assert_eq!(written(&|text| text.time(time)), Rfc3339(time).to_string());
        }
        assert_eq!(Rfc3339(time).to_string(), "1971-01-03T00:00:02.000007Z");
    }
}
