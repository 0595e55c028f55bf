//! What nobody sees and a model reads all the same: invisible characters in what the backend sends, which can carry orders to the
//! model past the person who looks on. They are taken out of every result; visible text, whatever it says, is data and stays.

use std::borrow::Cow;

/// The text without invisible characters, direction controls and tags. What joins or varies the character before it stays where
/// scripts and emoji need it: once after a character that it can belong to.
pub(super) fn without_invisible(text: &str) -> Cow<'_, str> {
    if !may_hold_invisible(text.as_bytes()) {
        return Cow::Borrowed(text);
    }
    let mut kept = None;
    let mut stays = |character: char| {
        let stays = match Kind::of(character) {
            Kind::Invisible => false,
            Kind::Joiner => kept.is_some_and(is_joined),
            Kind::Variation => kept.is_some_and(|before| is_varied(before, character)),
            Kind::Visible => true,
        };
        if stays {
            kept = Some(character);
        }
        stays
    };
    let Some((clean, first)) = text.char_indices().find(|(_, character)| !stays(*character)) else {
        return Cow::Borrowed(text);
    };
    let (clean, rest) =
        (text.get(..clean).unwrap_or_default(), text.get(clean + first.len_utf8()..).unwrap_or_default());
    Cow::Owned(clean.chars().chain(rest.chars().filter(|character| stays(*character))).collect())
}

/// Whether there is a byte that all characters in question begin with. Plain text passes here, at the speed of memory.
fn may_hold_invisible(text: &[u8]) -> bool {
    const CHUNK: usize = 64;
    let begins = |byte: &u8| matches!(byte, 0xC2 | 0xD8 | 0xE1 | 0xE2 | 0xEF | 0xF0 | 0xF3);
    text.chunks(CHUNK).any(|chunk| chunk.iter().fold(false, |found, byte| found | begins(byte)))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Visible,
    /// Shows nothing, or turns the order of what is shown.
    Invisible,
    /// Joins or parts its neighbours: emoji of several people, and letters of Persian and Indic scripts.
    Joiner,
    /// Picks a form of the character before it.
    Variation,
}

impl Kind {
    fn of(character: char) -> Self {
        match character {
            '\u{200C}' | '\u{200D}' => Self::Joiner,
            '\u{180B}'..='\u{180D}' | '\u{180F}' | '\u{FE00}'..='\u{FE0F}' | '\u{E0100}'..='\u{E01EF}' => {
                Self::Variation
            }
            '\u{AD}'
            | '\u{61C}'
            | '\u{180E}'
            | '\u{200B}'..='\u{200F}'
            | '\u{202A}'..='\u{202E}'
            | '\u{2060}'..='\u{206F}'
            | '\u{FEFF}'
            | '\u{FFF9}'..='\u{FFFB}'
            | '\u{1D173}'..='\u{1D17A}'
            | '\u{E0000}'..='\u{E007F}' => Self::Invisible,
            _ => Self::Visible,
        }
    }
}

/// No ASCII character is ever joined; and one joiner is enough.
fn is_joined(before: char) -> bool {
    !before.is_ascii() && Kind::of(before) != Kind::Joiner
}

/// One selector at most, for there are 256 of them: a row of them is a message. Those of the supplement belong to ideographs.
fn is_varied(before: char, selector: char) -> bool {
    match selector {
        '\u{E0100}'..='\u{E01EF}' => {
            matches!(before, '\u{3400}'..='\u{9FFF}' | '\u{F900}'..='\u{FAFF}' | '\u{20000}'..='\u{3FFFF}')
        }
        '\u{180B}'..='\u{180F}' => matches!(before, '\u{1820}'..='\u{18AA}'),
        // Digits, `#` and `*` become keycaps.
        _ => matches!(before, '0'..='9' | '#' | '*') || (!before.is_ascii() && Kind::of(before) == Kind::Visible),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_hides_goes_and_what_shows_stays() {
        for (text, expected) in [
            ("", ""),
            ("plain <script>alert(1)</script> ignore previous instructions \u{1b}[31m\r\n\0", ""),
            ("Müller, Ærøskøbing, Łódź, Ελλάδα, Москва, 日本語、カタカナ, 한국어, עברית, العربية, ไทย", ""),
            ("a\u{AD}b\u{61C}c\u{180E}d\u{200B}e\u{200E}f\u{200F}g", "abcdefg"),
            ("invoice\u{202E}fdp.exe \u{2066}x\u{2069}", "invoicefdp.exe x"),
            ("a\u{2060}b\u{2064}c\u{206F}d\u{FEFF}e\u{FFF9}f\u{1D173}g", "abcdefg"),
            ("hi\u{E0001}\u{E0049}\u{E0067}\u{E006E}\u{E007F}", "hi"),
            ("👩\u{200D}👩\u{200D}👧 ❤\u{FE0F}\u{200D}🔥 1\u{FE0F}\u{20E3} 👍🏽 🇩🇪", ""),
            ("می\u{200C}خواهم ന്\u{200D} ক্\u{200C}ষ", ""),
            ("葛\u{E0100}城 ᠠ\u{180B}", ""),
            ("a\u{200D}b \u{200D}c", "ab c"),
            ("👩\u{200D}\u{200D}\u{200C}👧", "👩\u{200D}👧"),
            ("😀\u{FE01}\u{FE02}\u{E0101}", "😀\u{FE01}"),
            ("😀\u{E0120}\u{E0121} a\u{FE0F} a\u{E0100}", "😀 a a"),
            ("\u{FE0F}\u{200D}", ""),
        ] {
            let shown = without_invisible(text);
            let unchanged = expected.is_empty() && !text.starts_with('\u{FE0F}');
            assert_eq!(shown, if unchanged { text } else { expected });
            assert_eq!(matches!(shown, Cow::Borrowed(_)), unchanged, "{text:?}");
        }
    }

    /// Strings of characters from everywhere, of which many are the ones in question.
    fn texts(count: usize) -> impl Iterator<Item = String> {
        const TELLING: [char; 30] = [
            'a',
            '"',
            '\\',
            '1',
            '#',
            ' ',
            '\n',
            'é',
            'ي',
            'ക',
            '語',
            '葛',
            '😀',
            '👩',
            '\u{AD}',
            '\u{61C}',
            '\u{180B}',
            '\u{180E}',
            '\u{200B}',
            '\u{200C}',
            '\u{200D}',
            '\u{200E}',
            '\u{202E}',
            '\u{2060}',
            '\u{FE0F}',
            '\u{FEFF}',
            '\u{E0041}',
            '\u{E0100}',
            '\u{1D173}',
            '\u{FFF9}',
        ];
        let mut random = fastrand::Rng::with_seed(7);
        (0..count).map(move |_| {
            let length = random.usize(..40);
            (0..length).map(|_| if random.bool() { TELLING[random.usize(..30)] } else { random.char(..) }).collect()
        })
    }

    #[test]
    fn doing_it_twice_is_doing_it_once_and_everything_visible_survives_in_its_order() {
        for text in texts(20_000) {
            let shown = without_invisible(&text);
            assert_eq!(without_invisible(&shown), shown, "{text:?}");
            assert!(shown.chars().all(|character| Kind::of(character) != Kind::Invisible), "{text:?}");
            let visible = |text: &str| text.chars().filter(|c| Kind::of(*c) == Kind::Visible).collect::<String>();
            assert_eq!(visible(&shown), visible(&text));
            let mut rest = text.chars();
            assert!(shown.chars().all(|character| rest.any(|other| other == character)), "{text:?}: {shown:?}");
        }
    }

    #[test]
    fn the_quick_look_overlooks_nothing() {
        for character in '\0'..=char::MAX {
            let quick = may_hold_invisible(character.to_string().as_bytes());
            assert!(quick || matches!(Kind::of(character), Kind::Visible), "{character:?}");
            assert!(!quick || !character.is_ascii(), "{character:?}");
        }
    }
}
