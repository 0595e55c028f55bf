//! Arguments: one declaration is the schema that a model sees and the check that a call passes.
//!
//! The `validate` attributes of a tool's struct become its JSON schema; [`Rules`] are read from that schema once and find every
//! mistake of a call at once, under the names that the caller used. serde alone would stop at the first.

use std::collections::{BTreeMap, HashMap};

use rmcp::model::JsonObject;
use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema};
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use serde_json::{Map, Number, Value};
use validator::Validate;

use crate::backend::{Segment, SegmentError};
use crate::json;
use crate::problem::{ErrorCode, Problem};

/// The `pattern` of identifiers that become part of a path, as the schema shows it. [`Segment`] is the full rule.
pub(super) const SEGMENT_PATTERN: &str = r"^[^/\\?#%\x00-\x1f\x7f-\x9f]+$";
/// The largest integer that every JSON implementation keeps exactly (RFC 8259 section 6).
pub(super) const MAX_SAFE_INTEGER: u64 = 9_007_199_254_740_991;
/// The longest that filters may be as compact JSON. They travel in a URL, where percent-encoding triples a byte and the HTTP
/// client takes 65,534 bytes in all.
const MAX_FILTERS_BYTES: usize = 8_192;
/// Of unknown arguments so many are named, each cut to so many characters: the answer must not grow with the mistake.
const NAMED_UNKNOWN: usize = 8;
const NAMED_CHARACTERS: usize = 64;

/// The schema of a tool's arguments, and apart from it the doc comment that describes the tool.
pub(super) fn input_schema<T: JsonSchema>() -> (String, JsonObject) {
    let mut schema = object(
        SchemaSettings::draft2020_12()
            .with(|s| s.inline_subschemas = true)
            .into_generator()
            .into_root_schema_for::<T>(),
    );
    let description = match schema.remove("description") {
        Some(Value::String(text)) => text,
        _ => String::new(),
    };
    (description, schema)
}

/// The schema of a tool's result.
pub(super) fn output_schema<T: JsonSchema>() -> JsonObject {
    let settings = SchemaSettings::draft2020_12().for_serialize().with(|s| s.inline_subschemas = true);
    let mut schema = Value::Object(object(settings.into_generator().into_root_schema_for::<T>()));
    // The names of the fields speak for themselves; every word here is paid for in each conversation.
    remove_descriptions(&mut schema);
    match schema {
        Value::Object(schema) => schema,
        _ => Map::new(),
    }
}

/// Takes out the descriptions of schemas, and leaves properties that happen to be called `description`. What a value usually is no
/// name tells: that stays, as the description.
fn remove_descriptions(schema: &mut Value) {
    if let Value::Object(object) = schema {
        if object.get("description").is_some_and(Value::is_string) {
            object.remove("description");
        }
        if let Some(usually) = object.remove("usually") {
            object.insert("description".to_owned(), usually);
        }
        object.values_mut().for_each(remove_descriptions);
    }
}

fn object(schema: Schema) -> JsonObject {
    let mut value = schema.to_value();
    tidy(&mut value);
    match value {
        Value::Object(object) => object,
        _ => Map::new(),
    }
}

/// Takes out what only costs tokens or confuses clients: generated titles, and `format`s like `uint32` that nobody knows.
fn tidy(value: &mut Value) {
    match value {
        Value::Object(object) => {
            object.remove("$schema");
            object.remove("format");
            if object.get("readOnly").is_some_and(Value::is_boolean) {
                object.remove("readOnly");
            }
            if object.get("title").is_some_and(Value::is_string) {
                object.remove("title");
            }
            object.values_mut().for_each(tidy);
        }
        Value::Array(items) => items.iter_mut().for_each(tidy),
        _ => {}
    }
}

/// What a schema asks of each argument, in a form that is quick to walk.
pub(super) struct Rules {
    fields: Vec<FieldRule>,
}

struct FieldRule {
    name: String,
    required: bool,
    kind: Kind,
}

enum Kind {
    Text { min: usize, max: usize, segment: bool },
    Choice(Vec<String>),
    Integer { min: u64, max: u64 },
    Boolean,
    Object,
}

impl Rules {
    /// Reads the rules from a schema. Whatever it does not understand would go unchecked, so a tool that uses it cannot start.
    #[expect(clippy::panic, reason = "runs once at start, on schemas that are part of the program")]
    pub(super) fn of(schema: &JsonObject) -> Self {
        let required = |name: &str| {
            let names = schema.get("required").and_then(Value::as_array);
            names.is_some_and(|names| names.iter().any(|required| required == name))
        };
        assert!(
            schema.get("additionalProperties") == Some(&Value::Bool(false)),
            "a tool must refuse unknown arguments"
        );
        let properties = schema.get("properties").and_then(Value::as_object).into_iter().flatten();
        let fields = properties.map(|(name, rule)| {
            let number = |key: &str| rule.get(key).and_then(Value::as_u64);
            let length = |key: &str| number(key).and_then(|length| usize::try_from(length).ok());
            let kind = match rule.get("type").and_then(Value::as_str) {
                Some("string") => match rule.get("enum").and_then(Value::as_array) {
                    Some(choices) => {
                        Kind::Choice(choices.iter().filter_map(Value::as_str).map(str::to_owned).collect())
                    }
                    None => Kind::Text {
                        min: length("minLength").unwrap_or(0),
                        max: length("maxLength").unwrap_or(usize::MAX),
                        segment: rule.get("pattern").is_some_and(|pattern| pattern == SEGMENT_PATTERN),
                    },
                },
                Some("integer") => Kind::Integer {
                    min: number("minimum").unwrap_or(0),
                    max: number("maximum").unwrap_or(MAX_SAFE_INTEGER),
                },
                Some("boolean") => Kind::Boolean,
                Some("object") => Kind::Object,
                other => panic!("no rule for an argument `{name}` of type {other:?}"),
            };
            FieldRule { name: name.clone(), required: required(name), kind }
        });
        Self { fields: fields.collect() }
    }

    /// Objects hold numbers as `serde_json` does, and it rounds. An object that has lost digits so is replaced by its text in the message
    /// that it came in, compact and as a string, which is read as the same object.
    pub(super) fn keep_digits(&self, arguments: &mut JsonObject, message: &[u8]) {
        for field in self.fields.iter().filter(|field| matches!(field.kind, Kind::Object)) {
            let value = arguments.get_mut(&field.name).filter(|value| value.is_object() && has_double(value));
            let Some(value) = value else { continue };
            let text = argument(message, &field.name).and_then(|text| json::object(text).ok());
            if let Some(text) = text.filter(|text| json::loses_digits(text)) {
                *value = Value::String(text);
            }
        }
    }

    /// Everything that is wrong with these arguments. `null` counts as absent where the argument may be absent: models write it.
    pub(super) fn check(&self, arguments: &mut JsonObject) -> BTreeMap<String, String> {
        let mut wrong = BTreeMap::new();
        let mut known = 0;
        for field in &self.fields {
            let Some(value) = arguments.get_mut(&field.name) else {
                if field.required {
                    wrong.insert(field.name.clone(), format!("is missing; {} is required", field.kind.accepted()));
                }
                continue;
            };
            if value.is_null() && !field.required {
                arguments.remove(&field.name);
                continue;
            }
            known += 1;
            if let Err(what) = field.kind.check(value) {
                wrong.insert(field.name.clone(), what);
            }
        }
        if arguments.len() > known {
            let is_known = |name: &str| self.fields.iter().any(|field| field.name == name);
            let names: Vec<_> = self.fields.iter().map(|field| format!("`{}`", field.name)).collect();
            let unknown = arguments.keys().filter(|name| !is_known(name)).take(NAMED_UNKNOWN);
            wrong.extend(unknown.map(|name| {
                // Shown, not dropped: `limit` with a NUL behind it must not stand in the place of `limit`.
                let shown = |character: char| if character.is_control() { '\u{fffd}' } else { character };
                let printable = name.chars().map(shown).take(NAMED_CHARACTERS).collect();
                (printable, format!("is not an argument of this tool, which takes {}", names.join(", ")))
            }));
        }
        wrong
    }
}

impl Kind {
    /// What would be accepted, to follow "must be".
    fn accepted(&self) -> String {
        match self {
            Self::Text { min, max: usize::MAX, .. } => format!("a string of at least {min} characters"),
            Self::Text { min, max, .. } => format!("a string of {min} to {max} characters"),
            Self::Choice(choices) => format!("one of {}", choices.join(", ")),
            Self::Integer { min, max } => format!("an integer from {min} to {max}"),
            Self::Boolean => "true or false".to_owned(),
            Self::Object => "an object".to_owned(),
        }
    }

    /// Clients and models turn values into text, and identifiers into numbers: what has one meaning is read as that.
    fn read_as_meant(&self, value: &mut Value) {
        let meant = match (self, &*value) {
            (Self::Integer { .. }, Value::String(text)) => integer(text).map(Value::Number),
            (Self::Boolean, Value::String(text)) if text.eq_ignore_ascii_case("true") => Some(Value::Bool(true)),
            (Self::Boolean, Value::String(text)) if text.eq_ignore_ascii_case("false") => Some(Value::Bool(false)),
            (Self::Text { segment: true, .. }, Value::Number(number)) if is_integer(number) => {
                Some(Value::String(number.to_string()))
            }
            _ => None,
        };
        if let Some(meant) = meant {
            *value = meant;
        }
    }

    fn check(&self, value: &mut Value) -> Result<(), String> {
        self.read_as_meant(value);
        let refused = |what: &str| Err(format!("{what}; it must be {}", self.accepted()));
        match (self, &*value) {
            (Self::Text { min, max, segment }, Value::String(text)) => {
                // A character has one to four bytes: most texts need not be counted.
                let surely_fits = text.len() >= 4 * min && text.len() <= *max;
                if !surely_fits {
                    let length = text.chars().count();
                    if length < *min || length > *max {
                        return refused(&format!("has {length} characters"));
                    }
                }
                if *segment {
                    return Segment::check(text).map_err(|wrong: SegmentError| wrong.to_string());
                }
                Ok(())
            }
            (Self::Choice(choices), Value::String(text)) if choices.contains(text) => Ok(()),
            (Self::Choice(_), Value::String(_)) => refused("is none of the accepted values"),
            (Self::Integer { min, max }, Value::Number(number)) => {
                // JSON schema counts 10.0 among the integers; serde does not.
                let float = number
                    .as_f64()
                    .filter(|float| float.fract() == 0.0 && (0.0..=MAX_SAFE_INTEGER as f64).contains(float));
                match number.as_u64().or_else(|| float.map(|float| float as u64)) {
                    Some(integer) if (min..=max).contains(&&integer) => {
                        *value = Value::from(integer);
                        Ok(())
                    }
                    _ => refused(&format!("is {number}")),
                }
            }
            (Self::Boolean, Value::Bool(_)) => Ok(()),
            (Self::Object, Value::Object(object)) => {
                fits_a_url(serde_json::to_string(object).map_or(usize::MAX, |text| text.len()))
            }
            // It stays text, which keeps the digits of its numbers.
            (Self::Object, Value::String(text)) => match json::object(text) {
                Ok(compact) => {
                    let fits = fits_a_url(compact.len());
                    *value = Value::String(compact);
                    fits
                }
                Err(_) => refused("is a string"),
            },
            (_, value) => refused(&format!("is {}", type_of(value))),
        }
    }
}

fn fits_a_url(length: usize) -> Result<(), String> {
    if length > MAX_FILTERS_BYTES {
        return Err(format!("is too long; as compact JSON it may have {MAX_FILTERS_BYTES} bytes"));
    }
    Ok(())
}

/// Whether there is a number that is held as a double, and may have been rounded.
fn has_double(value: &Value) -> bool {
    match value {
        Value::Number(number) => number.is_f64(),
        Value::Array(values) => values.iter().any(has_double),
        Value::Object(members) => members.values().any(has_double),
        _ => false,
    }
}

/// An argument as it stands in the message of its call.
fn argument<'a>(message: &'a [u8], name: &str) -> Option<&'a str> {
    let mut json: &RawValue = serde_json::from_slice(message).ok()?;
    for name in ["params", "arguments", name] {
        json = serde_json::from_str::<HashMap<String, &RawValue>>(json.get()).ok()?.remove(name)?;
    }
    Some(json.get())
}

/// A whole number as JSON writes it: without a sign that says nothing, zeros before it, a fraction or an exponent.
fn integer(text: &str) -> Option<Number> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-');
    serde_json::from_str(text).ok().filter(|number| is_plain && is_integer(number))
}

fn is_integer(number: &Number) -> bool {
    number.is_i64() || number.is_u64()
}

/// What a value is, in words.
pub(super) fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// Checks and decodes the arguments of a call.
pub(super) fn decode<T: DeserializeOwned + Validate>(rules: &Rules, mut arguments: JsonObject) -> Result<T, Problem> {
    let wrong = rules.check(&mut arguments);
    if !wrong.is_empty() {
        return Err(Problem::fields(wrong));
    }
    // What the schema accepts, serde and `validator` accept: the same attributes made all three. Should they ever disagree, the
    // stricter one wins, without echoing the input.
    let tool: T = serde_json::from_value(Value::Object(arguments)).map_err(|_| disagreement())?;
    tool.validate().map_err(|_| disagreement())?;
    Ok(tool)
}

fn disagreement() -> Problem {
    Problem::new(
        ErrorCode::ValidationError,
        "The arguments do not fit the tool's input schema. Compare them with it and call again; nothing was sent to the backend.",
    )
}
