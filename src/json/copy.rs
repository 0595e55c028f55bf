//! Copies JSON in one pass: checked, compact, in the order in which it came, and with its numbers digit by digit. No tree is built.
//!
//! Strings are written as `serde_json` writes them, so that equal strings have equal text: escapes that are not needed are gone. Of a key
//! that stands twice in an object the last value counts.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

/// So many levels of lists and objects are read, as `serde_json` does.
const MAX_DEPTH: usize = 127;
/// Objects with more keys than this remember them in a set.
const FEW_KEYS: usize = 32;
/// A number with fewer characters than this, and no exponent, is in the range of a double.
const SURELY_IN_RANGE: usize = 300;

/// Where a text is not what it should be, and what is expected there. It quotes nothing of the text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} at line {line} column {column}")]
pub struct Malformed {
    what: String,
    line: usize,
    column: usize,
}

impl Malformed {
    /// The same, said of a part that is called like this.
    #[must_use]
    pub fn within(self, part: &str) -> Self {
        Self { what: format!("{part}: {}", self.what), ..self }
    }
}

/// A copy of an object.
///
/// # Errors
///
/// When the text is anything else.
pub fn object(text: &str) -> Result<String, Malformed> {
    let mut copy = Copier::new(text);
    copy.object()?;
    copy.end()?;
    Ok(copy.out)
}

/// A text that is read value by value, and what has been copied of it.
pub struct Copier<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
    /// The copy.
    pub out: String,
    /// The members of the objects that are being copied.
    members: Vec<Member>,
}

/// Where a member of an object stands in the copy.
struct Member {
    /// Quotes included.
    key: Range<usize>,
    /// The end of its value, which begins after a colon.
    end: usize,
}

impl<'a> Copier<'a> {
    /// Nothing is read yet.
    pub fn new(text: &'a str) -> Self {
        Self { text, at: 0, depth: 0, out: String::with_capacity(text.len()), members: Vec::new() }
    }

    /// Says what is wrong here.
    pub fn malformed(&self, what: impl Into<String>) -> Malformed {
        let before = self.text.as_bytes().get(..self.at).unwrap_or_default();
        let line_start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        Malformed { what: what.into(), line, column: before.len() - line_start + 1 }
    }

    /// The next byte that means something.
    pub fn peek(&mut self) -> Option<u8> {
        let bytes = self.text.as_bytes();
        while matches!(bytes.get(self.at), Some(b' ' | b'\n' | b'\t' | b'\r')) {
            self.at += 1;
        }
        bytes.get(self.at).copied()
    }

    /// Passes over this byte.
    ///
    /// # Errors
    ///
    /// When another one stands there.
    pub fn expect(&mut self, byte: u8, expected: &str) -> Result<(), Malformed> {
        if self.peek() == Some(byte) {
            self.at += 1;
            Ok(())
        } else {
            Err(self.malformed(format!("expected {expected}")))
        }
    }

    /// Whether a list or an object has another part, passing over the comma before it, or else over its end.
    ///
    /// # Errors
    ///
    /// When neither stands there.
    pub fn next_part(&mut self, is_first: bool, end: u8) -> Result<bool, Malformed> {
        match self.peek() {
            Some(byte) if byte == end => {
                self.at += 1;
                Ok(false)
            }
            Some(b',') if !is_first => {
                self.at += 1;
                Ok(true)
            }
            Some(_) if is_first => Ok(true),
            _ => Err(self.malformed(format!("expected `,` or `{}`", char::from(end)))),
        }
    }

    /// Copies any value.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn value(&mut self) -> Result<(), Malformed> {
        match self.peek() {
            Some(b'"') => self.string(),
            Some(b'-' | b'0'..=b'9') => self.number(),
            Some(b'{') => self.object(),
            Some(b'[') => self.list(),
            Some(b't') => self.word("true"),
            Some(b'f') => self.word("false"),
            Some(b'n') => self.word("null"),
            _ => Err(self.malformed("expected value")),
        }
    }

    /// Copies an object.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn object(&mut self) -> Result<(), Malformed> {
        self.expect(b'{', "an object")?;
        self.deeper()?;
        let (start, first) = (self.out.len(), self.members.len());
        let (mut keys, mut is_repeated) = (None, false);
        self.out.push('{');
        while self.next_part(self.members.len() == first, b'}')? {
            if self.members.len() > first {
                self.out.push(',');
            }
            let key = self.key()?;
            is_repeated |= self.is_known(first, &key, &mut keys);
            let member = self.members.len();
            self.members.push(Member { key, end: 0 });
            self.out.push(':');
            self.value()?;
            if let Some(member) = self.members.get_mut(member) {
                member.end = self.out.len();
            }
        }
        self.out.push('}');
        if is_repeated {
            self.keep_last_of_each(start, first);
        }
        self.members.truncate(first);
        self.depth -= 1;
        Ok(())
    }

    /// Copies a key, and passes over the colon behind it. Gives where the copy of the key stands, quotes included.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn key(&mut self) -> Result<Range<usize>, Malformed> {
        let start = self.out.len();
        match self.peek() {
            Some(b'"') => self.string()?,
            _ => return Err(self.malformed("expected a key")),
        }
        let key = start..self.out.len();
        self.expect(b':', "`:`")?;
        Ok(key)
    }

    /// Reads to the end.
    ///
    /// # Errors
    ///
    /// When there is more.
    pub fn end(&mut self) -> Result<(), Malformed> {
        match self.peek() {
            None => Ok(()),
            Some(_) => Err(self.malformed("expected the end")),
        }
    }

    /// Counts another level.
    ///
    /// # Errors
    ///
    /// When there are too many.
    fn deeper(&mut self) -> Result<(), Malformed> {
        self.depth += 1;
        if self.depth > MAX_DEPTH { Err(self.malformed("nested too deeply")) } else { Ok(()) }
    }

    fn list(&mut self) -> Result<(), Malformed> {
        self.expect(b'[', "a list")?;
        self.deeper()?;
        self.out.push('[');
        let mut is_first = true;
        while self.next_part(is_first, b']')? {
            if !is_first {
                self.out.push(',');
            }
            is_first = false;
            self.value()?;
        }
        self.out.push(']');
        self.depth -= 1;
        Ok(())
    }

    fn word(&mut self, word: &str) -> Result<(), Malformed> {
        if !self.rest().starts_with(word) {
            return Err(self.malformed("expected value"));
        }
        self.take(word.len());
        Ok(())
    }

    fn number(&mut self) -> Result<(), Malformed> {
        let bytes = self.rest().as_bytes();
        let digits = |at: usize| bytes.iter().skip(at).take_while(|byte| byte.is_ascii_digit()).count();
        let mut end = usize::from(bytes.first() == Some(&b'-'));
        let whole = digits(end);
        let mut is_number = whole == 1 || (whole > 1 && bytes.get(end) != Some(&b'0'));
        end += whole;
        if bytes.get(end) == Some(&b'.') {
            let fraction = digits(end + 1);
            is_number &= fraction > 0;
            end += 1 + fraction;
        }
        let has_exponent = matches!(bytes.get(end), Some(b'e' | b'E'));
        if has_exponent {
            end += if matches!(bytes.get(end + 1), Some(b'+' | b'-')) { 2 } else { 1 };
            let exponent = digits(end);
            is_number &= exponent > 0;
            end += exponent;
        }
        if !is_number {
            return Err(self.malformed("expected a number"));
        }
        // Most readers refuse the whole text for a number that is beyond a double; one that they round does no such harm.
        let is_endless = |text: &str| text.parse::<f64>().is_ok_and(f64::is_infinite);
        if (has_exponent || end > SURELY_IN_RANGE) && self.rest().get(..end).is_some_and(is_endless) {
            return Err(self.malformed("number out of range"));
        }
        self.take(end);
        Ok(())
    }

    fn string(&mut self) -> Result<(), Malformed> {
        let bytes = self.rest().as_bytes();
        let (mut end, mut is_shortest) = (1, true);
        loop {
            end += plain(bytes.get(end..).unwrap_or_default());
            match (bytes.get(end), bytes.get(end + 1)) {
                (Some(b'"'), _) => break,
                (Some(b'\\'), Some(b'"' | b'\\' | b'b' | b'f' | b'n' | b'r' | b't')) => end += 2,
                // Either is another way to write a character, or an error.
                (Some(b'\\'), Some(_)) => (end, is_shortest) = (end + 2, false),
                (Some(b'\\') | None, _) => return Err(self.malformed("expected the end of a string")),
                (Some(_), _) => return Err(self.malformed("expected an escape instead of a control character")),
            }
        }
        end += 1;
        if is_shortest {
            self.take(end);
            return Ok(());
        }
        let string = self.rest().get(..end).and_then(|text| serde_json::from_str::<String>(text).ok());
        let shortest = string.and_then(|string| serde_json::to_string(&string).ok());
        self.out.push_str(&shortest.ok_or_else(|| self.malformed("expected a string"))?);
        self.at += end;
        Ok(())
    }

    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    /// Copies so many bytes as they are.
    fn take(&mut self, length: usize) {
        self.out.push_str(self.rest().get(..length).unwrap_or_default());
        self.at += length;
    }

    fn copied(&self, range: &Range<usize>) -> &str {
        self.out.get(range.clone()).unwrap_or_default()
    }

    /// Whether the object whose members begin there has the key already.
    fn is_known(&self, first: usize, key: &Range<usize>, keys: &mut Option<HashSet<Box<str>>>) -> bool {
        let (name, earlier) = (self.copied(key), self.members.get(first..).unwrap_or_default());
        match keys {
            None if earlier.len() < FEW_KEYS => {
                let is_same = |member: &Member| member.key.len() == key.len() && self.copied(&member.key) == name;
                earlier.iter().any(is_same)
            }
            keys => {
                let known = || earlier.iter().map(|member| self.copied(&member.key).into()).collect();
                !keys.get_or_insert_with(known).insert(name.into())
            }
        }
    }

    /// Writes the object that begins there anew: each key where it stood first, with its last value.
    fn keep_last_of_each(&mut self, start: usize, first: usize) {
        let mut kept: Vec<(&str, &str)> = Vec::new();
        let mut places = HashMap::new();
        for member in self.members.get(first..).unwrap_or_default() {
            let (key, value) = (self.copied(&member.key), self.copied(&(member.key.end + 1..member.end)));
            let place = *places.entry(key).or_insert(kept.len());
            match kept.get_mut(place) {
                Some(earlier) => earlier.1 = value,
                None => kept.push((key, value)),
            }
        }
        let mut object = String::with_capacity(self.out.len() - start);
        for (key, value) in kept {
            object.push(if object.is_empty() { '{' } else { ',' });
            object.push_str(key);
            object.push(':');
            object.push_str(value);
        }
        object.push('}');
        self.out.truncate(start);
        self.out.push_str(&object);
    }
}

/// How many bytes there are before the first quote, backslash or control character.
fn plain(bytes: &[u8]) -> usize {
    const ONES: u64 = 0x0101_0101_0101_0101;
    let has_less = |word: u64, than: u8| word.wrapping_sub(ONES * u64::from(than)) & !word;
    let has = |word: u64, byte: u8| has_less(word ^ (ONES * u64::from(byte)), 1);
    let (words, rest) = bytes.as_chunks::<8>();
    for (index, word) in words.iter().enumerate() {
        let word = u64::from_le_bytes(*word);
        // The lowest of the marked bytes is one of them; those above may be marked by a borrow.
        let marked = (has(word, b'"') | has(word, b'\\') | has_less(word, b' ')) & (ONES << 7);
        if marked != 0 {
            return index * 8 + marked.trailing_zeros() as usize / 8;
        }
    }
    let is_special = |byte: &u8| matches!(byte, b'"' | b'\\' | 0..b' ');
    words.len() * 8 + rest.iter().position(is_special).unwrap_or(rest.len())
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use serde_json::{Map, Value, json};

    use super::*;

    #[test]
    fn an_object_is_copied_compactly_with_its_numbers_as_they_came() {
        for (json, expected) in [
            ("{}", Some("{}")),
            (
                r#" { "z" : 1.50 , "a" : [ { } , [ ] , true , false , null ] } "#,
                Some(r#"{"z":1.50,"a":[{},[],true,false,null]}"#),
            ),
            (
                r#"{"a":12345678901234567890123,"b":-12345678901234567890.12,"c":1e-400,"d":1E+5,"e":-0,"f":0.10}"#,
                Some(
                    r#"{"a":12345678901234567890123,"b":-12345678901234567890.12,"c":1e-400,"d":1E+5,"e":-0,"f":0.10}"#,
                ),
            ),
            (r#"{"\u0061\/\n":"\ud83d\ude00\u200b\u0001\"\\"}"#, Some("{\"a/\\n\":\"😀\u{200b}\\u0001\\\"\\\\\"}")),
            (r#"{"a":1,"b":{"c":1,"c":2},"\u0061":3}"#, Some(r#"{"a":3,"b":{"c":2}}"#)),
            (r#"{"a":1e999}"#, None),
            (r#"{"a":-1E999}"#, None),
            (r#"{"a":01}"#, None),
            (r#"{"a":1.}"#, None),
            (r#"{"a":.5}"#, None),
            (r#"{"a":-}"#, None),
            (r#"{"a":1e}"#, None),
            (r#"{"a":+1}"#, None),
            (r#"{"a":nul}"#, None),
            (r#"{"a":"\ud800"}"#, None),
            (r#"{"a":"\x"}"#, None),
            ("{\"a\":\"\n\"}", None),
            (r#"{"a":1,}"#, None),
            (r#"{,"a":1}"#, None),
            (r#"{"a":[1,]}"#, None),
            (r#"{"a" 1}"#, None),
            (r#"{1:1}"#, None),
            (r#"{"a":1"#, None),
            (r#"{"a":"\"#, None),
            (r#"{"a":1}x"#, None),
            ("[]", None),
            ("null", None),
            ("", None),
        ] {
            assert_eq!(object(json).ok().as_deref(), expected, "{json}");
        }
        let long = format!(r#"{{"a":{}}}"#, "9".repeat(308));
        assert_eq!(object(&long).as_deref(), Ok(&*long));
        assert_eq!(object(&long.replace("{\"a\":", "{\"a\":99")).ok(), None);
    }

    #[test]
    fn an_error_names_its_place() {
        for (json, expected) in [
            ("[]", "expected an object at line 1 column 1"),
            ("{\n  \"a\": x}", "expected value at line 2 column 8"),
            (r#"{"a":1]"#, "expected `,` or `}` at line 1 column 7"),
        ] {
            assert_eq!(object(json).unwrap_err().to_string(), expected);
        }
    }

    #[test]
    fn many_keys_and_deep_nesting_are_bounded_work() {
        let wide = Value::Object((0..100_000).map(|key| (key.to_string(), json!(key))).collect()).to_string();
        assert_eq!(object(&wide).as_deref(), Ok(&*wide));
        let repeated = object(&wide.replacen(r#""5":"#, r#""99999":"#, 1)).unwrap();
        let repeated: Map<String, Value> = serde_json::from_str(&repeated).unwrap();
        assert_eq!((repeated.len(), &repeated["99999"]), (99_999, &json!(99_999)));
        for (depth, is_read) in [(126, true), (127, false), (10_000, false)] {
            let deep = format!(r#"{{"a":{}{}}}"#, "[".repeat(depth), "]".repeat(depth));
            assert_eq!(object(&deep).is_ok(), is_read, "{depth}");
            assert_eq!(serde_json::from_str::<Value>(&deep).is_ok(), is_read, "{depth}");
        }
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
            "[a-z\"\\\\\\u{0}-\\u{20}é]{0,20}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 5, |inner| {
            prop_oneof![
                vec(inner.clone(), 0..5).prop_map(Value::from),
                vec(("[a-c]{0,2}|.{0,9}", inner), 0..7)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_serde_json_writes_is_copied_as_it_is_however_it_is_spaced(members in vec((".{0,9}", value()), 0..6)) {
            let json = Value::Object(members.into_iter().collect());
            prop_assert_eq!(object(&json.to_string()), Ok(json.to_string()));
            prop_assert_eq!(object(&serde_json::to_string_pretty(&json).unwrap()), Ok(json.to_string()));
        }

        #[test]
        fn nearly_json_is_read_where_serde_json_reads_it_and_means_the_same(
            pieces in vec(prop_oneof![
                Just(r#""a":"#), Just(r#""b":"#), Just(r#""\u0061":"#), Just("{"), Just("}"), Just("["), Just("]"), Just(","), Just("1"),
                Just("-0.5"), Just("1e3"), Just("00"), Just("1."), Just("e"), Just("1e999"), Just(r#""x""#), Just(r#""\ud83d\ude00""#),
                Just(r#""\ud83d""#), Just(r#""\q""#), Just("\"\t\""), Just("true"), Just("nul"), Just("null"), Just(" "), Just("\n"), Just("\""),
                Just("\\"), Just("é"),
            ], 0..14),
        ) {
            let json = format!("{{{}}}", pieces.concat());
            let read = serde_json::from_str::<Map<String, Value>>(&json);
            let copy = object(&json);
            prop_assert_eq!(copy.is_ok(), read.is_ok(), "{}: {:?}, {:?}", json, copy, read);
            if let (Ok(copy), Ok(read)) = (copy, read) {
                prop_assert_eq!(serde_json::from_str::<Map<String, Value>>(&copy).unwrap(), read, "{}", json);
                prop_assert_eq!(object(&copy), Ok(copy.clone()));
            }
        }

        #[test]
        fn the_quick_look_finds_the_first_special_byte(bytes in vec(prop_oneof![Just(b'"'), Just(b'\\'), Just(b'!'), Just(0x1f), Just(0x20), any::<u8>()], 0..40), skip in 0usize..40) {
            let bytes = bytes.get(skip..).unwrap_or(&bytes);
            let expected = bytes.iter().position(|byte| matches!(byte, b'"' | b'\\' | 0..0x20)).unwrap_or(bytes.len());
            prop_assert_eq!(plain(bytes), expected);
        }
    }
}
