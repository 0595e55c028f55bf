//! How a line of the log is written: as JSON, straight into text, by field.
//!
//! Whatever is written stays inside of its line. Most of it is printable ASCII, for which the checks are made all at once.

use std::cell::Cell;
use std::fmt::{self, Write as _};
use std::net::IpAddr;
use std::time::Duration;

use time::OffsetDateTime;
use tracing::field::{Field, Visit};
use tracing::{Event, Level};
use tracing_log::NormalizeEvent as _;

use crate::telemetry::trace::TraceId;

/// Writes an event. `function` is the name of the span that it happened in, and `trace_id` writes what is known of its trace.
pub(super) fn write_line(
    line: &mut String,
    event: &Event<'_>,
    now: OffsetDateTime,
    function: &str,
    trace_id: impl FnOnce(&mut String),
) {
    // Lines that come through the `log` crate carry their real origin in fields.
    let normalized = event.normalized_metadata();
    let metadata = normalized.as_ref().unwrap_or_else(|| event.metadata());
    line.push_str("{\"timestamp\":\"");
    write_time(line, now);
    line.push_str("\",\"level\":\"");
    line.push_str(level_word(metadata.level()));
    line.push_str("\",\"logger\":");
    write_json_string(line, metadata.target());
    line.push_str(",\"message\":\"");
    event.record(&mut WriteMessage(line));
    line.push_str("\",\"module\":");
    write_json_string(line, metadata.module_path().unwrap_or_else(|| metadata.target()));
    line.push_str(",\"function\":");
    write_json_string(line, function);
    line.push_str(",\"line\":");
    write_number(line, metadata.line().unwrap_or(0).into());
    line.push_str(",\"trace_id\":\"");
    trace_id(line);
    line.push('"');
    event.record(&mut WriteFields(line));
    line.push_str("}\n");
}

/// A line of ours that is written without an event, whose machinery would cost more than the line.
pub(in crate::telemetry) struct OurLine {
    pub(in crate::telemetry) at: OffsetDateTime,
    pub(in crate::telemetry) level: Level,
    pub(in crate::telemetry) logger: &'static str,
    /// What stands between the message and the trace id: [`our_place`].
    pub(in crate::telemetry) place: &'static str,
    pub(in crate::telemetry) trace_id: TraceId,
}

impl OurLine {
    /// Writes what stands before the message, which has to be written next, escaped.
    pub(in crate::telemetry) fn begin(&self, line: &mut String) {
        line.push_str("{\"timestamp\":\"");
        write_time(line, self.at);
        for part in ["\",\"level\":\"", level_word(&self.level), "\",\"logger\":\"", self.logger, "\",\"message\":\""] {
            line.push_str(part);
        }
    }

    /// Writes what stands behind the message, but for the fields of its own and the end.
    pub(in crate::telemetry) fn go_on(&self, line: &mut String) {
        line.push_str(self.place);
        self.trace_id.write_to(line);
        line.push('"');
    }
}

/// This place in the code, in a request, as the middle of an [`OurLine`].
macro_rules! our_place {
    () => {
        concat!(r#"","module":""#, module_path!(), r#"","function":"request","line":"#, line!(), r#","trace_id":""#)
    };
}
pub(in crate::telemetry) use our_place;

/// The contract's words: TRACE counts as DEBUG.
fn level_word(level: &Level) -> &'static str {
    match *level {
        Level::ERROR => "ERROR",
        Level::WARN => "WARNING",
        Level::INFO => "INFO",
        Level::DEBUG | Level::TRACE => "DEBUG",
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

/// Writes the time like [`Rfc3339`]. The calendar is asked once a second.
pub(in crate::telemetry) fn write_time(line: &mut String, now: OffsetDateTime) {
    thread_local! {
        static SECOND: Cell<(i64, [u8; 27])> = const { Cell::new((i64::MIN, [0; 27])) };
    }
    let timestamp = now.unix_timestamp();
    let (second, mut text) = SECOND.get();
    if second != timestamp {
        text = second_of(now);
        SECOND.set((timestamp, text));
    }
    write_digits(text.get_mut(20..26), now.microsecond());
    line.push_str(str::from_utf8(&text).unwrap_or_default());
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

/// Writes a number without the machinery of formatting.
pub(in crate::telemetry) fn write_number(line: &mut String, number: u64) {
    line.push_str(Digits::of(number).as_str());
}

/// The decimal digits of a number.
pub(in crate::telemetry) struct Digits {
    digits: [u8; 20],
    from: usize,
}

impl Digits {
    pub(in crate::telemetry) fn of(mut number: u64) -> Self {
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

    pub(in crate::telemetry) fn as_str(&self) -> &str {
        self.digits.get(self.from..).and_then(|digits| str::from_utf8(digits).ok()).unwrap_or_default()
    }
}

/// Displays a time in milliseconds, to the microsecond.
#[derive(Debug, Clone, Copy)]
pub(super) struct Milliseconds(pub(super) Duration);

impl fmt::Display for Milliseconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::with_capacity(24);
        write_milliseconds(&mut text, self.0);
        f.write_str(&text)
    }
}

/// Writes a time in milliseconds, to the microsecond.
pub(in crate::telemetry) fn write_milliseconds(line: &mut String, took: Duration) {
    let micros = took.as_micros() as u64;
    write_number(line, micros / 1_000);
    let rest = (micros % 1_000) as u32;
    let length = match rest {
        0 => return,
        _ if rest.is_multiple_of(100) => 2,
        _ if rest.is_multiple_of(10) => 3,
        _ => 4,
    };
    let mut fraction = *b".000";
    write_digits(fraction.get_mut(1..), rest);
    line.push_str(fraction.get(..length).and_then(|fraction| str::from_utf8(fraction).ok()).unwrap_or_default());
}

/// Writes an address. Nearly all are IPv4.
pub(in crate::telemetry) fn write_address(line: &mut String, address: IpAddr) {
    let IpAddr::V4(address) = address else {
        let _ = write!(line, "{address}");
        return;
    };
    let (mut text, mut length) = (*b"255.255.255.255", 0);
    let mut places = text.iter_mut();
    let mut put = |character| {
        if let Some(place) = places.next() {
            *place = character;
            length += 1;
        }
    };
    for (number, octet) in address.octets().into_iter().enumerate() {
        if number > 0 {
            put(b'.');
        }
        if octet >= 100 {
            put(b'0' + octet / 100);
        }
        if octet >= 10 {
            put(b'0' + octet / 10 % 10);
        }
        put(b'0' + octet % 10);
    }
    line.push_str(text.get(..length).and_then(|text| str::from_utf8(text).ok()).unwrap_or_default());
}

/// Writes `,"name":"text"`. The name is one of ours, and needs no escaping.
pub(in crate::telemetry) fn write_text(line: &mut String, name: &str, text: &str) {
    write_name(line, name);
    write_json_string(line, text);
}

/// Writes `,"name":`.
pub(in crate::telemetry) fn write_name(line: &mut String, name: &str) {
    line.push_str(",\"");
    line.push_str(name);
    line.push_str("\":");
}

pub(in crate::telemetry) fn write_json_string(line: &mut String, text: &str) {
    line.push('"');
    Escaped(line).push(text);
    line.push('"');
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

/// Writes text as the inside of a JSON string, so that nothing that is logged can break out of its line.
pub(in crate::telemetry) struct Escaped<'a>(pub(in crate::telemetry) &'a mut String);

impl Escaped<'_> {
    pub(in crate::telemetry) fn push(&mut self, text: &str) {
        // Nearly all text is.
        if is_plain(text.as_bytes()) {
            self.0.push_str(text);
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
                _ => continue,
            };
            self.0.push_str(text.get(clean..at).unwrap_or_default());
            if escape.is_empty() {
                let _ = write!(self.0, "\\u{:04x}", u32::from(character));
            } else {
                self.0.push_str(escape);
            }
            clean = at + character.len_utf8();
        }
        self.0.push_str(text.get(clean..).unwrap_or_default());
    }
}

impl fmt::Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.push(text);
        Ok(())
    }
}

/// Finds the trace id among the fields of a span, as it stands in a JSON string.
#[derive(Default)]
pub(super) struct FindTraceId(pub(super) Option<String>);

impl Visit for FindTraceId {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "trace_id" {
            let mut text = String::new();
            let _ = write!(Escaped(&mut text), "{value:?}");
            self.0 = Some(text);
        }
    }
}

struct WriteMessage<'a>(&'a mut String);

impl Visit for WriteMessage<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            Escaped(self.0).push(value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            let _ = write!(Escaped(self.0), "{value:?}");
        }
    }
}

struct WriteFields<'a>(&'a mut String);

impl WriteFields<'_> {
    /// Writes `,"name":` and says whether a value should follow. Names that every line has already are the line's own.
    fn key(&mut self, field: &Field) -> bool {
        let name = field.name();
        match name {
            "timestamp" | "level" | "logger" | "message" | "module" | "function" | "line" | "trace_id" => return false,
            _ if name.starts_with("log.") => return false,
            _ => {}
        }
        self.0.push(',');
        write_json_string(self.0, name);
        self.0.push(':');
        true
    }
}

impl Visit for WriteFields<'_> {
    fn record_bool(&mut self, field: &Field, value: bool) {
        if self.key(field) {
            self.0.push_str(if value { "true" } else { "false" });
        }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        if self.key(field) {
            if value < 0 {
                self.0.push('-');
            }
            write_number(self.0, value.unsigned_abs());
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        if self.key(field) {
            write_number(self.0, value);
        }
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        if self.key(field) {
            // Thousandths, as most are, need no search for the shortest digits that mean this number.
            let thousandths = value * 1_000.0;
            let rounded = thousandths as u64;
            if value.is_sign_positive() && thousandths < 1e12 && rounded as f64 / 1_000.0 == value {
                return write_milliseconds(self.0, Duration::from_micros(rounded));
            }
            // JSON has no NaN and no infinities.
            let _ = if value.is_finite() { write!(self.0, "{value}") } else { write!(self.0, "\"{value}\"") };
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if self.key(field) {
            write_json_string(self.0, value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if self.key(field) {
            self.0.push('"');
            let _ = write!(Escaped(self.0), "{value:?}");
            self.0.push('"');
        }
    }
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
    fn numbers_and_times_are_written_as_they_are_displayed() {
        for number in [0, 7, 10, 4_294_967_296, u64::MAX] {
            let mut line = String::new();
            write_number(&mut line, number);
            assert_eq!(line, number.to_string());
        }
        for micros in [0, 1, 10, 100, 120, 999, 1_000, 1_100, 1_010, 1_500, 123_456, 60_000_000] {
            let mut line = String::new();
            write_milliseconds(&mut line, Duration::from_micros(micros));
            assert_eq!(line, (micros as f64 / 1_000.0).to_string());
        }
        for address in ["0.0.0.0", "127.0.0.1", "255.10.100.99", "::1", "2001:db8::a:b"] {
            let mut line = String::new();
            write_address(&mut line, address.parse().unwrap());
            assert_eq!(line, address);
        }
        let mut time = OffsetDateTime::UNIX_EPOCH;
        for step in [0, 999_999, 1, 1_000_000, 86_400_000_000, 31_622_400_000_007] {
            time += Duration::from_micros(step);
            let mut line = String::new();
            write_time(&mut line, time);
            assert_eq!(line, Rfc3339(time).to_string());
        }
        assert_eq!(Rfc3339(time).to_string(), "1971-01-03T00:00:02.000007Z");
    }
}
