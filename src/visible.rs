//! Text that holds what a person can see and nothing else, for everything that a model reads.
//!
//! Invisible characters can carry orders to a model past the person who looks on. What is invisible is decided by Unicode's properties:
//! `Default_Ignorable_Code_Point`, `Bidi_Control` and the format controls (general category `Cf`). Such a character stays only where it
//! belongs to visible text: joiners in emoji and in scripts that use them, a variation selector after a base that has one, the tags of
//! the three flags that have tags. Visible text is data and stays, whatever it says.

use std::borrow::Cow;
use std::collections::HashSet;
use std::iter;

use icu_properties::props::{
    BidiControl, CanonicalCombiningClass, DefaultIgnorableCodePoint, Emoji, ExtendedPictographic, GeneralCategory,
    JoiningType, Script, UnifiedIdeograph,
};
use icu_properties::{CodePointMapData, CodePointMapDataBorrowed, CodePointSetData, CodePointSetDataBorrowed};

static DEFAULT_IGNORABLE: CodePointSetDataBorrowed<'static> = CodePointSetData::new::<DefaultIgnorableCodePoint>();
static BIDI_CONTROL: CodePointSetDataBorrowed<'static> = CodePointSetData::new::<BidiControl>();
static EMOJI: CodePointSetDataBorrowed<'static> = CodePointSetData::new::<Emoji>();
static PICTOGRAPHIC: CodePointSetDataBorrowed<'static> = CodePointSetData::new::<ExtendedPictographic>();
static IDEOGRAPH: CodePointSetDataBorrowed<'static> = CodePointSetData::new::<UnifiedIdeograph>();
static CATEGORY: CodePointMapDataBorrowed<'static, GeneralCategory> = CodePointMapData::<GeneralCategory>::new();
static COMBINING: CodePointMapDataBorrowed<'static, CanonicalCombiningClass> =
    CodePointMapData::<CanonicalCombiningClass>::new();
static JOINING: CodePointMapDataBorrowed<'static, JoiningType> = CodePointMapData::<JoiningType>::new();
static SCRIPT: CodePointMapDataBorrowed<'static, Script> = CodePointMapData::<Script>::new();

const BLACK_FLAG: char = '\u{1F3F4}';
/// The flags of England, Scotland and Wales: the only tag sequences that Unicode recommends (RGI).
const FLAG_TAGS: [&str; 3] = ["gbeng", "gbsct", "gbwls"];
const CANCEL_TAG: char = '\u{E007F}';
const ZERO_WIDTH_NON_JOINER: char = '\u{200C}';
const ZERO_WIDTH_JOINER: char = '\u{200D}';
const KEYCAP: char = '\u{20E3}';

/// The text without its invisible characters.
pub fn text(text: &str) -> Cow<'_, str> {
    if !may_hold_invisible(text.as_bytes()) {
        return Cow::Borrowed(text);
    }
    let mut pieces = Pieces { rest: text, before: None, base: None, ahead: None };
    let mut unchanged = 0;
    loop {
        match pieces.next() {
            None => return Cow::Borrowed(text),
            Some((piece, true)) => unchanged += piece.len(),
            Some((_, false)) => break,
        }
    }
    let mut shown = String::with_capacity(text.len());
    shown.push_str(text.get(..unchanged).unwrap_or_default());
    shown.extend(pieces.filter(|(_, stays)| *stays).map(|(piece, _)| piece));
    Cow::Owned(shown)
}

/// JSON text of which every string holds only what can be seen. In keys an invisible character becomes U+FFFD instead, and keys of one
/// object that would be equal after that get more of them: no member is lost.
pub fn json(json: String) -> String {
    if !may_hold_invisible(json.as_bytes()) {
        return json;
    }
    let mut seen = Keys::Forgotten;
    match cleaned_json(&json, &mut seen) {
        Cow::Borrowed(_) => json,
        Cow::Owned(clean) if matches!(seen, Keys::Forgotten) => clean,
        Cow::Owned(_) => cleaned_json(&json, &mut Keys::Kept(Vec::new())).into_owned(),
    }
}

/// Whether keys are compared with others of their object, which costs a set for each: only once it is known that one changes.
enum Keys<'a> {
    Forgotten,
    Changed,
    /// Of each object, or array, that is open.
    Kept(Vec<HashSet<Cow<'a, str>>>),
}

fn cleaned_json<'a>(json: &'a str, keys: &mut Keys<'a>) -> Cow<'a, str> {
    let mut clean = String::new();
    let mut changed = false;
    let mut rest = json;
    while let Some(quote) = rest.find('"') {
        let (before, string) = rest.split_at(quote);
        track(before, keys);
        let end = string_end(string);
        let (string, after) = string.split_at(end);
        let is_key = after.trim_start().starts_with(':');
        let mut shown = if is_key { key(string) } else { text(string) };
        if is_key {
            match keys {
                Keys::Forgotten if matches!(shown, Cow::Owned(_)) => *keys = Keys::Changed,
                Keys::Forgotten | Keys::Changed => {}
                Keys::Kept(open) => {
                    if let Some(object) = open.last_mut() {
                        while !object.insert(shown.clone()) {
                            // Before the closing quote.
                            let mut longer = shown.strip_suffix('"').unwrap_or(&shown).to_owned();
                            longer.push_str("\u{FFFD}\"");
                            shown = Cow::Owned(longer);
                        }
                    }
                }
            }
        }
        if !changed && matches!(shown, Cow::Owned(_)) {
            changed = true;
            clean.reserve(json.len());
            clean.push_str(json.get(..json.len() - rest.len()).unwrap_or_default());
        }
        if changed {
            clean.push_str(before);
            clean.push_str(&shown);
        }
        rest = after;
    }
    if changed {
        clean.push_str(rest);
        Cow::Owned(clean)
    } else {
        Cow::Borrowed(json)
    }
}

/// Opens and closes what the text between two strings opens and closes.
fn track(between: &str, keys: &mut Keys<'_>) {
    let Keys::Kept(open) = keys else { return };
    for byte in between.bytes() {
        match byte {
            b'{' | b'[' => open.push(HashSet::new()),
            b'}' | b']' => _ = open.pop(),
            _ => {}
        }
    }
}

/// Where the string ends that begins with this quote.
fn string_end(string: &str) -> usize {
    let mut escaped = false;
    for (at, byte) in string.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return at + 1,
            _ => {}
        }
    }
    string.len()
}

/// A key as it is, where all of it can be seen; else with U+FFFD for every invisible character.
fn key(key: &str) -> Cow<'_, str> {
    match text(key) {
        Cow::Borrowed(_) => Cow::Borrowed(key),
        Cow::Owned(_) => Cow::Owned(
            key.chars().map(|character| if is_invisible(character) { '\u{FFFD}' } else { character }).collect(),
        ),
    }
}

/// Whether there is a byte that an invisible character begins with. Plain text passes here, at the speed of memory.
fn may_hold_invisible(text: &[u8]) -> bool {
    const CHUNK: usize = 64;
    let begins = |byte: &u8| matches!(byte, 0xC2 | 0xCD | 0xD8 | 0xE1 | 0xE2 | 0xE3 | 0xEF | 0xF0 | 0xF3);
    text.chunks(CHUNK).any(|chunk| chunk.iter().fold(false, |found, byte| found | begins(byte)))
}

/// Characters that are known to be visible without a look at the tables: nearly all that are written.
fn is_plain(character: char) -> bool {
    matches!(
        character,
        '\0'..='\u{AC}' | '\u{AE}'..='\u{34E}' | '\u{350}'..='\u{5FF}' | '\u{2070}'..='\u{3163}' | '\u{3165}'..='\u{D7FF}'
    )
}

/// Whether the character shows nothing by itself, or changes the order in which others are shown.
pub fn is_invisible(character: char) -> bool {
    // Prepended_Concatenation_Mark: format controls that are drawn, around the digits that follow.
    let is_drawn = || {
        matches!(
            character,
            '\u{600}'
                ..='\u{605}' | '\u{6DD}' | '\u{70F}' | '\u{890}' | '\u{891}' | '\u{8E2}' | '\u{110BD}' | '\u{110CD}'
        )
    };
    !is_plain(character)
        && (DEFAULT_IGNORABLE.contains(character)
            || BIDI_CONTROL.contains(character)
            || (CATEGORY.get(character) == GeneralCategory::Format && !is_drawn()))
}

/// The characters of a text, and the sequences of flags with tags, each with whether it stays.
struct Pieces<'a> {
    rest: &'a str,
    /// The last character that stays.
    before: Option<char>,
    /// The last one of them that is visible and no mark on another.
    base: Option<char>,
    /// The next visible character, and how much text begins with it: found once for a row of invisible ones.
    ahead: Option<(usize, Option<char>)>,
}

impl<'a> Iterator for Pieces<'a> {
    type Item = (&'a str, bool);

    fn next(&mut self) -> Option<(&'a str, bool)> {
        let mut characters = self.rest.chars();
        let character = characters.next()?;
        let after = characters.as_str();
        let tags = if character == BLACK_FLAG { length_of_flag_tags(after) } else { 0 };
        let stays = is_plain(character) || self.stays(character, after);
        if stays {
            self.before = Some(if tags > 0 { CANCEL_TAG } else { character });
            if is_plain(character) || (!is_invisible(character) && !is_mark(character)) {
                self.base = Some(character);
            }
        }
        let (piece, rest) = self.rest.split_at(character.len_utf8() + tags);
        self.rest = rest;
        Some((piece, stays))
    }
}

impl Pieces<'_> {
    fn stays(&mut self, character: char, after: &str) -> bool {
        match character {
            ZERO_WIDTH_JOINER | ZERO_WIDTH_NON_JOINER => self.joins(character, after),
            '\u{FE00}'..='\u{FE0F}' | '\u{180B}'..='\u{180D}' | '\u{180F}' | '\u{E0100}'..='\u{E01EF}' => {
                self.varies(character, after)
            }
            _ => !is_invisible(character),
        }
    }

    /// Whether a joiner changes what is seen: in an emoji, at a virama, or where Arabic letters and their like are joined.
    fn joins(&mut self, joiner: char, after: &str) -> bool {
        let Some(before) = self.before else { return false };
        let base = self.base.unwrap_or_default();
        if before == ZERO_WIDTH_JOINER || before == ZERO_WIDTH_NON_JOINER {
            return false;
        }
        let next = self.next_visible(after);
        let is_virama = |character| COMBINING.get(character) == CanonicalCombiningClass::Virama;
        if is_virama(before) {
            return true;
        }
        let is_joined = |character| {
            matches!(
                JOINING.get(character),
                JoiningType::DualJoining
                    | JoiningType::LeftJoining
                    | JoiningType::RightJoining
                    | JoiningType::JoinCausing
            )
        };
        if joiner == ZERO_WIDTH_NON_JOINER {
            return is_joined(base) && next.is_some_and(is_joined);
        }
        let in_emoji = (before == base || before == '\u{FE0F}') && (PICTOGRAPHIC.contains(base) || is_skin_tone(base));
        (in_emoji && next.is_some_and(|next| PICTOGRAPHIC.contains(next)))
            // Bengali and Kannada RA keeps its form before a virama.
            || next.is_some_and(|next| is_virama(next) && SCRIPT.get(next) == SCRIPT.get(before))
            || (is_joined(base) && !next.is_some_and(is_joined))
    }

    /// Whether the character before it has a variation that this selects. Of a row of selectors only the first can: there are 256 of them,
    /// and a row is a message.
    fn varies(&mut self, selector: char, after: &str) -> bool {
        let Some(before) = self.before.filter(|before| !is_invisible(*before)) else { return false };
        let script = || SCRIPT.get(before);
        match selector {
            '\u{FE0F}' if matches!(before, '0'..='9' | '#' | '*') => self.next_visible(after) == Some(KEYCAP),
            '\u{FE0E}' | '\u{FE0F}' => !before.is_ascii() && EMOJI.contains(before),
            // StandardizedVariants.txt: mathematical symbols, three scripts, fullwidth punctuation, ideographs, hieroglyphs.
            '\u{FE00}' if !before.is_ascii() && CATEGORY.get(before) == GeneralCategory::MathSymbol => true,
            '\u{FE00}' if matches!(script(), Script::Myanmar | Script::PhagsPa | Script::Manichaean) => true,
            '\u{FE00}' | '\u{FE01}'
                if matches!(
                    before,
                    '\u{3001}'
                        | '\u{3002}'
                        | '\u{FF01}'
                        | '\u{FF0C}'
                        | '\u{FF0E}'
                        | '\u{FF1A}'
                        | '\u{FF1B}'
                        | '\u{FF1F}'
                ) =>
            {
                true
            }
            '\u{FE00}'..='\u{FE02}' if IDEOGRAPH.contains(before) => true,
            '\u{FE00}'..='\u{FE06}' => script() == Script::EgyptianHieroglyphs,
            '\u{180B}'..='\u{180F}' => script() == Script::Mongolian && CATEGORY.get(before) != GeneralCategory::Format,
            // The Ideographic Variation Database uses no more than these.
            '\u{E0100}'..='\u{E011F}' => IDEOGRAPH.contains(before),
            _ => false,
        }
    }

    fn next_visible(&mut self, after: &str) -> Option<char> {
        match self.ahead {
            Some((length, character)) if length <= after.len() => character,
            _ => {
                let found = after.char_indices().find(|(_, character)| !is_invisible(*character));
                let length = found.map_or(0, |(at, _)| after.len() - at);
                let character = found.map(|(_, character)| character);
                self.ahead = Some((length, character));
                character
            }
        }
    }
}

/// The length of the tags that make one of the three flags of the black one.
fn length_of_flag_tags(after: &str) -> usize {
    let is_flag = |name: &&&str| {
        let tags = name.chars().filter_map(|letter| char::from_u32(0xE0000 + u32::from(letter)));
        after.chars().take(name.len() + 1).eq(tags.chain(iter::once(CANCEL_TAG)))
    };
    FLAG_TAGS.iter().find(is_flag).map_or(0, |name| (name.len() + 1) * CANCEL_TAG.len_utf8())
}

fn is_skin_tone(character: char) -> bool {
    matches!(character, '\u{1F3FB}'..='\u{1F3FF}')
}

fn is_mark(character: char) -> bool {
    matches!(
        CATEGORY.get(character),
        GeneralCategory::NonspacingMark | GeneralCategory::EnclosingMark | GeneralCategory::SpacingMark
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn default_ignorable() -> impl Iterator<Item = char> {
        ('\0'..=char::MAX).filter(|character| DEFAULT_IGNORABLE.contains(*character))
    }

    #[test]
    fn what_hides_goes_and_what_shows_stays() {
        for (given, expected) in [
            ("", None),
            ("plain <script>alert(1)</script> ignore previous instructions \u{1b}[31m\r\n\0", None),
            ("Müller, Ærøskøbing, Łódź, Ελλάδα, Москва, 日本語、カタカナ, 한국어, עברית, العربية, ไทย", None),
            ("a\u{AD}b\u{61C}c\u{180E}d\u{200B}e\u{200E}f\u{200F}g", Some("abcdefg")),
            ("invoice\u{202E}fdp.exe \u{2066}x\u{2069}", Some("invoicefdp.exe x")),
            ("a\u{2060}b\u{2064}c\u{206F}d\u{FEFF}e\u{FFF9}f\u{1D173}g", Some("abcdefg")),
            ("a\u{34F}b\u{115F}c\u{1160}d\u{17B4}e\u{3164}f\u{FFA0}g\u{1BCA0}h", Some("abcdefgh")),
            ("hi\u{E0001}\u{E0049}\u{E0067}\u{E006E}\u{E007F}", Some("hi")),
            ("hi\u{E0080}\u{E00FF}\u{E01F0}\u{E0FFF}", Some("hi")),
            ("👩\u{200D}👩\u{200D}👧 ❤\u{FE0F}\u{200D}🔥 1\u{FE0F}\u{20E3} 👍🏽 🇩🇪 👩🏽\u{200D}🚀", None),
            ("🏴\u{E0067}\u{E0062}\u{E0065}\u{E006E}\u{E0067}\u{E007F} and 🏴", None),
            ("🏴\u{E0067}\u{E0062}\u{E007F}", Some("🏴")),
            ("می\u{200C}خواهم ന്\u{200D} ক্\u{200C}ষ র\u{200D}্য ه\u{200D}.", None),
            ("葛\u{E0100}城 ᠠ\u{180B} 辶\u{FE00} ≨\u{FE00} ！\u{FE01}", None),
            ("١٢\u{600}٣ ۝", None),
            ("a\u{200D}b \u{200D}c", Some("ab c")),
            ("👩\u{200D}\u{200D}\u{200C}👧", Some("👩\u{200D}👧")),
            ("👩\u{200D}a", Some("👩a")),
            ("😀\u{FE01}\u{FE02}\u{E0101}", Some("😀")),
            ("😀\u{E0120}\u{E0121} a\u{FE0F} a\u{E0100} 1\u{FE0F} 0\u{FE00}", Some("😀 a a 1 0")),
            ("葛\u{E0100}\u{E0101}\u{E01EF}", Some("葛\u{E0100}")),
            ("\u{FE0F}\u{200D}", Some("")),
        ] {
            let shown = text(given);
            assert_eq!(shown, expected.unwrap_or(given), "{given:?}");
            assert_eq!(matches!(shown, Cow::Borrowed(_)), expected.is_none(), "{given:?}");
        }
    }

    #[test]
    fn no_default_ignorable_character_survives_between_letters_digits_or_blanks() {
        assert_eq!(default_ignorable().count(), 4_174);
        for character in default_ignorable() {
            for between in ["ab", "12", "éü", "  ", "語a", "😀😀"] {
                let mut sides = between.chars();
                let (left, right) = (sides.next().unwrap(), sides.next().unwrap());
                let given = format!("{left}{character}{right}");
                let shown = text(&given);
                let has_one = match left {
                    '語' => matches!(character, '\u{FE00}'..='\u{FE02}' | '\u{E0100}'..='\u{E011F}'),
                    '😀' => matches!(character, '\u{200D}' | '\u{FE0E}' | '\u{FE0F}'),
                    _ => false,
                };
                assert_eq!(shown, if has_one { given.clone() } else { between.to_owned() }, "{given:?}");
            }
        }
    }

    #[test]
    fn a_selector_after_each_letter_or_digit_carries_no_message() {
        let message: String = "the balance is 1024 EUR"
            .chars()
            .zip(0..)
            .flat_map(|(c, bit)| [c, if bit % 3 == 0 { '\u{FE0E}' } else { '\u{FE0F}' }])
            .collect();
        assert_eq!(text(&message), "the balance is 1024 EUR");
    }

    #[test]
    fn a_long_row_of_invisible_characters_costs_no_more_than_its_length() {
        for row in ["\u{200D}", "\u{FE0F}", "\u{200C}"] {
            for before in ["👩", "1", "م"] {
                let given = format!("{before}{}x", row.repeat(400_000));
                assert!(text(&given).chars().count() <= 3);
            }
        }
    }

    #[test]
    fn what_passes_the_quick_looks_is_visible() {
        for character in '\0'..=char::MAX {
            let ignorable = DEFAULT_IGNORABLE.contains(character)
                || BIDI_CONTROL.contains(character)
                || CATEGORY.get(character) == GeneralCategory::Format;
            assert!(!(ignorable && is_plain(character)), "{character:?}");
            assert!(may_hold_invisible(character.to_string().as_bytes()) || !is_invisible(character), "{character:?}");
        }
    }

    #[test]
    fn keys_never_become_one_and_values_lose_what_hides() {
        for (given, expected) in [
            (r#"{"a":1}"#, r#"{"a":1}"#),
            ("{\"k\u{200b}y\":2,\"ky\":1}", "{\"k\u{fffd}y\":2,\"ky\":1}"),
            (
                "{\"k\u{200b}\":1,\"k\u{200c}\":2,\"k\u{fffd}\":3}",
                "{\"k\u{fffd}\":1,\"k\u{fffd}\u{fffd}\":2,\"k\u{fffd}\u{fffd}\u{fffd}\":3}",
            ),
            (
                "{\"k\u{200b}\":{\"k\u{200b}\":[\"\u{202e}x\",{\"k\u{200b}\":\"k\u{200b}\"}]}}",
                "{\"k\u{fffd}\":{\"k\u{fffd}\":[\"x\",{\"k\u{fffd}\":\"k\"}]}}",
            ),
            ("[\"a\\\"\u{200b}:\", {\"b\\\\\u{200b}\" : \"\u{200b}\"}]", "[\"a\\\":\", {\"b\\\\\u{fffd}\" : \"\"}]"),
        ] {
            assert_eq!(json(given.to_owned()), expected);
        }
    }

    /// Strings of characters from everywhere, of which many are the ones in question.
    fn texts() -> impl Strategy<Value = String> {
        let telling = vec![
            'a',
            '1',
            '#',
            ' ',
            '\n',
            '"',
            '\\',
            'é',
            'ي',
            'ക',
            '്',
            '語',
            '葛',
            '😀',
            '👩',
            '🏽',
            '🏴',
            '\u{20E3}',
            '\u{AD}',
            '\u{34F}',
            '\u{61C}',
            '\u{180B}',
            '\u{180E}',
            '\u{200B}',
            '\u{200C}',
            '\u{200D}',
            '\u{202E}',
            '\u{3164}',
            '\u{FE00}',
            '\u{FE0F}',
            '\u{FEFF}',
            '\u{E0067}',
            '\u{E0062}',
            '\u{E007F}',
            '\u{E0100}',
            '\u{1D173}',
        ];
        proptest::collection::vec(prop_oneof![4 => proptest::sample::select(telling), 1 => any::<char>()], 0..40)
            .prop_map(String::from_iter)
    }

    fn values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![texts().prop_map(Value::from), any::<i64>().prop_map(Value::from), Just(Value::Null)];
        leaf.prop_recursive(3, 24, 6, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                proptest::collection::vec((texts(), inner), 0..6)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    fn count(value: &Value) -> usize {
        match value {
            Value::Array(items) => 1 + items.iter().map(count).sum::<usize>(),
            Value::Object(members) => 1 + members.values().map(count).sum::<usize>(),
            _ => 1,
        }
    }

    proptest! {
        #[test]
        fn doing_it_twice_is_doing_it_once_and_everything_visible_survives_in_its_order(given in texts()) {
            let shown = text(&given).into_owned();
            prop_assert_eq!(text(&shown), shown.as_str());
            let visible = |text: &str| text.chars().filter(|c| !is_invisible(*c)).collect::<String>();
            prop_assert_eq!(visible(&shown), visible(&given));
            let mut rest = given.chars();
            prop_assert!(shown.chars().all(|character| rest.any(|other| other == character)));
        }

        #[test]
        fn json_stays_the_same_tree_with_every_string_cleaned(value in values()) {
            let shown = json(value.to_string());
            let read: Value = serde_json::from_str(&shown).unwrap();
            prop_assert_eq!(count(&read), count(&value), "nothing is lost");
            prop_assert_eq!(json(shown.clone()), shown.clone());
            if let Value::String(string) = &value {
                prop_assert_eq!(read.as_str(), Some(&*text(string)));
            }
            if let (Value::Object(before), Value::Object(after)) = (&value, &read) {
                prop_assert_eq!(before.len(), after.len());
                for key in after.keys() {
                    prop_assert_eq!(&*text(key), key.as_str());
                }
            }
        }
    }
}
