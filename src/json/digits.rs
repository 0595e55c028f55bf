//! Which numbers `serde_json` would change: it holds what is no integer of 64 bits as a double.

/// Whether some number in this JSON has more digits than are kept of it.
pub fn loses_digits(json: &str) -> bool {
    let mut rest = json;
    while let Some(at) = rest.find(|c: char| matches!(c, '"' | '-') || c.is_ascii_digit()) {
        rest = rest.get(at..).unwrap_or_default();
        let length = match rest.strip_prefix('"') {
            Some(string) => 1 + string_length(string),
            None => {
                let is_part = |c: char| matches!(c, '0'..='9' | '+' | '-' | '.' | 'e' | 'E');
                let length = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
                if !rest.get(..length).is_some_and(is_kept) {
                    return true;
                }
                length
            }
        };
        rest = rest.get(length..).unwrap_or_default();
    }
    false
}

/// The length of a string that has begun, with its closing quote.
fn string_length(string: &str) -> usize {
    let mut is_escaped = false;
    let end = string.find(|c| {
        let ends = c == '"' && !is_escaped;
        is_escaped = c == '\\' && !is_escaped;
        ends
    });
    end.map_or(string.len(), |end| end + 1)
}

fn is_kept(number: &str) -> bool {
    if number.parse::<i64>().is_ok() || number.parse::<u64>().is_ok() {
        return true;
    }
    let kept = number.parse::<f64>().map(|double| format!("{double:e}"));
    kept.is_ok_and(|kept| decimal(&kept).is_some_and(|kept| decimal(number) == Some(kept)))
}

/// The digits of a number without zeros around them, and the power of ten of the last.
fn decimal(number: &str) -> Option<(String, i64)> {
    let (mantissa, exponent) = number.split_once(['e', 'E']).unwrap_or((number, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{}{fraction}", whole.trim_start_matches('-'));
    let significant = digits.trim_end_matches('0');
    let zeros = i64::try_from(digits.len() - significant.len()).ok()?;
    let digits = significant.trim_start_matches('0').to_owned();
    if digits.is_empty() {
        return Some((digits, 0));
    }
    let power = exponent.parse::<i64>().ok()?.checked_sub(i64::try_from(fraction.len()).ok()?)?;
    Some((digits, power.checked_add(zeros)?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn numbers_that_would_be_rounded_are_found_wherever_they_stand() {
        for (json, expected) in [
            ("{}", false),
            (r#"{"a":0,"b":-0,"c":-0.0,"d":0e5}"#, false),
            (r#"{"a":[1.5,1.50,-2.5e-3,100e-2,1e22,0.1,9223372036854775807,18446744073709551615]}"#, false),
            (r#"{"a":18446744073709551616}"#, true),
            (r#"{"a":18446744073709551617}"#, true),
            (r#"{"a":-9223372036854775809}"#, true),
            (r#"{"a":12345678901234567890123}"#, true),
            (r#"{"a":12345678901234567890.12}"#, true),
            (r#"{"a":[{"b":1e-400}]}"#, true),
            (r#"{"a":1e99999999999999999999}"#, true),
            (r#"{"a":0.1000000000000000055}"#, true),
            (r#"{"12345678901234567890123":"a\\\"12345678901234567890123","b":1}"#, false),
            (r#"{"a":"\\","b":12345678901234567890123}"#, true),
        ] {
            assert_eq!(loses_digits(json), expected, "{json}");
        }
    }

    proptest! {
        #[test]
        fn nothing_that_a_program_with_doubles_writes_is_refused(double in any::<f64>().prop_filter("JSON has no others", |d| d.is_finite())) {
            let exponential = format!("[{double:e}]");
            prop_assert!(!loses_digits(&exponential), "{}", exponential);
            prop_assert!(!loses_digits(&serde_json::to_string(&[double]).unwrap()));
        }

        #[test]
        fn what_is_kept_reads_as_the_same_number(whole in "-?(0|[1-9][0-9]{0,30})", fraction in "(\\.[0-9]{1,20})?", exponent in "([eE][+-]?[0-9]{1,3})?") {
            let number = format!("{whole}{fraction}{exponent}");
            if !loses_digits(&number) {
                let Ok(read) = serde_json::from_str::<serde_json::Number>(&number) else { return Ok(()) };
                prop_assert_eq!(decimal(&read.to_string()), decimal(&number));
            }
        }
    }
}
