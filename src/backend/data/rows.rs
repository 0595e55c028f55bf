//! `{"data": [objects]}` as it comes from the backend, to a compact array of the same objects: parsed, checked and written in one
//! pass, in the order of the backend.
//!
//! An object with the same key twice means something else to each reader; such an answer takes the slow way, where the last of
//! them counts.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::QueryRows;
use crate::backend::record::at;

/// Objects with more keys than this remember them in a set.
const FEW_KEYS: usize = 32;

/// Reads the answer, and keeps so many rows at most.
pub(super) fn read(body: &[u8], limit: usize) -> Result<QueryRows, serde_json::Error> {
    let mut rows = Rows { out: Vec::with_capacity(body.len()), limit, ..Rows::default() };
    let mut input = serde_json::Deserializer::from_slice(body);
    let read = Answer(&mut rows).deserialize(&mut input).and_then(|()| input.end());
    if rows.repeated {
        return read_slowly(body, limit);
    }
    read?;
    let json = String::from_utf8(rows.out).map_err(serde_json::Error::custom)?;
    Ok(QueryRows { count: rows.count.min(limit), truncated: rows.count > limit, json })
}

fn read_slowly(body: &[u8], limit: usize) -> Result<QueryRows, serde_json::Error> {
    #[derive(Deserialize)]
    struct Answer {
        data: Vec<Map<String, Value>>,
    }
    let mut answer: Answer = serde_json::from_slice(body)?;
    let truncated = answer.data.len() > limit;
    answer.data.truncate(limit);
    Ok(QueryRows { count: answer.data.len(), truncated, json: serde_json::to_string(&answer.data)? })
}

/// One object, written the same way.
pub(in crate::backend) fn object(json: &str) -> Result<String, serde_json::Error> {
    let mut rows = Rows { out: Vec::with_capacity(json.len()), ..Rows::default() };
    let read = Row(&mut rows).deserialize(&mut serde_json::Deserializer::from_str(json));
    if rows.repeated {
        return serde_json::to_string(&serde_json::from_str::<Map<String, Value>>(json)?);
    }
    read?;
    String::from_utf8(rows.out).map_err(serde_json::Error::custom)
}

#[derive(Default)]
struct Rows {
    out: Vec<u8>,
    /// How many rows there were so far.
    count: usize,
    /// How many of them are kept.
    limit: usize,
    /// Whether some object had a key twice, which ends the fast way.
    repeated: bool,
    /// Where the keys of the objects that are being written stand in `out`, quotes included.
    keys: Vec<Range<usize>>,
}

impl Rows {
    fn scalar<E: Error>(&mut self, value: impl Serialize) -> Result<(), E> {
        serde_json::to_writer(&mut self.out, &value).map_err(E::custom)
    }
}

/// The answer as a whole.
struct Answer<'a>(&'a mut Rows);

impl<'de> DeserializeSeed<'de> for Answer<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<(), D::Error> {
        input.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Answer<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with `data`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        #[derive(Deserialize)]
        #[serde(field_identifier, rename_all = "snake_case")]
        enum Field {
            Data,
            #[serde(other)]
            Other,
        }
        let mut found = false;
        while let Some(field) = map.next_key()? {
            match field {
                Field::Data if found => return Err(A::Error::duplicate_field("data")),
                Field::Data => map.next_value_seed(Data(self.0))?,
                Field::Other => drop(map.next_value::<IgnoredAny>()?),
            }
            found |= matches!(field, Field::Data);
        }
        if found { Ok(()) } else { Err(A::Error::missing_field("data")) }
    }
}

/// The rows.
struct Data<'a>(&'a mut Rows);

impl<'de> DeserializeSeed<'de> for Data<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<(), D::Error> {
        input.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Data<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut rows: A) -> Result<(), A::Error> {
        self.0.out.push(b'[');
        loop {
            let start = self.0.out.len();
            if self.0.count > 0 {
                self.0.out.push(b',');
            }
            let row = rows.next_element_seed(Row(self.0));
            let row = row.map_err(|error| A::Error::custom(at(format_args!("data[{}]", self.0.count), error)))?;
            if row.is_none() || self.0.count >= self.0.limit {
                self.0.out.truncate(start);
            }
            if row.is_none() {
                break;
            }
            self.0.count += 1;
        }
        self.0.out.push(b']');
        Ok(())
    }
}

/// One row, which is an object.
struct Row<'a>(&'a mut Rows);

impl<'de> DeserializeSeed<'de> for Row<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<(), D::Error> {
        input.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Row<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<(), A::Error> {
        Anything(self.0).visit_map(map)
    }
}

/// Any value inside a row.
struct Anything<'a>(&'a mut Rows);

impl<'de> DeserializeSeed<'de> for Anything<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<(), D::Error> {
        input.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Anything<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        self.0.out.extend_from_slice(b"null");
        Ok(())
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<(), E> {
        self.0.scalar(value)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<(), E> {
        self.0.scalar(value)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<(), E> {
        self.0.scalar(value)
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<(), E> {
        self.0.scalar(value)
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<(), E> {
        self.0.scalar(value)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<(), A::Error> {
        self.0.out.push(b'[');
        let first = self.0.out.len();
        loop {
            let start = self.0.out.len();
            if start > first {
                self.0.out.push(b',');
            }
            if values.next_element_seed(Anything(self.0))?.is_none() {
                self.0.out.truncate(start);
                break;
            }
        }
        self.0.out.push(b']');
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let rows = self.0;
        rows.out.push(b'{');
        let mut keys = Keys { begin: rows.keys.len(), many: None };
        loop {
            let comma = rows.out.len();
            if rows.keys.len() > keys.begin {
                rows.out.push(b',');
            }
            if map.next_key_seed(Key { rows: &mut *rows, keys: &mut keys })?.is_none() {
                rows.out.truncate(comma);
                break;
            }
            rows.out.push(b':');
            map.next_value_seed(Anything(&mut *rows))?;
        }
        rows.keys.truncate(keys.begin);
        rows.out.push(b'}');
        Ok(())
    }
}

/// The keys of one object so far.
struct Keys {
    /// Where they begin in the list of all.
    begin: usize,
    many: Option<HashSet<Box<[u8]>>>,
}

/// A key, which its object must not have yet.
struct Key<'a> {
    rows: &'a mut Rows,
    keys: &'a mut Keys,
}

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<(), D::Error> {
        input.deserialize_str(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: Error>(self, key: &str) -> Result<(), E> {
        let Self { rows, keys } = self;
        let start = rows.out.len();
        rows.scalar(key)?;
        let here = start..rows.out.len();
        let written = |range: &Range<usize>| rows.out.get(range.clone()).unwrap_or_default();
        let earlier = rows.keys.get(keys.begin..).unwrap_or_default();
        let repeated = match &mut keys.many {
            None if earlier.len() < FEW_KEYS => earlier.iter().any(|other| written(other) == written(&here)),
            many => {
                let many = many.get_or_insert_with(|| earlier.iter().map(|other| written(other).into()).collect());
                !many.insert(written(&here).into())
            }
        };
        if repeated {
            rows.repeated = true;
            return Err(E::custom("a key stands twice in an object"));
        }
        rows.keys.push(here);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rows(body: &str) -> Option<(usize, String)> {
        read(body.as_bytes(), 1_000).ok().map(|rows| (rows.count, rows.json))
    }

    #[test]
    fn rows_are_written_compactly_in_the_order_of_the_backend() {
        for (body, expected) in [
            (r#"{"data":[]}"#, Some((0, "[]"))),
            (r#" { "more" : [ { } ] , "data" : [ { } ] , "x" : null } "#, Some((1, "[{}]"))),
            (
                r#"{"data": [ {"z": 1, "a": [ ], "b": [ -1.50, 1e3, true, null ]}, {"a": {"z": {}, "a": "x"}} ]}"#,
                Some((2, r#"[{"z":1,"a":[],"b":[-1.5,1000.0,true,null]},{"a":{"z":{},"a":"x"}}]"#)),
            ),
            (r#"{"data":[{"\u0061\n":"\ud83d\ude00\/\\\"\u0001"}]}"#, Some((1, "[{\"a\\n\":\"😀/\\\\\\\"\\u0001\"}]"))),
            (
                r#"{"data":[{"n":18446744073709551615,"i":-9223372036854775808}]}"#,
                Some((1, r#"[{"n":18446744073709551615,"i":-9223372036854775808}]"#)),
            ),
            (r#"{"data":[{"a":1,"b":2,"a":3}]}"#, Some((1, r#"[{"a":3,"b":2}]"#))),
            (r#"{"data":[{"x":[{"k":1,"\u006b":2}]},{"k":0}]}"#, Some((2, r#"[{"x":[{"k":2}]},{"k":0}]"#))),
            (r#"{"data":[{"a":{"k":1},"b":{"k":1},"k":1}]}"#, Some((1, r#"[{"a":{"k":1},"b":{"k":1},"k":1}]"#))),
            ("", None),
            ("[]", None),
            ("{}", None),
            (r#"{"data":{}}"#, None),
            (r#"{"data":[1]}"#, None),
            (r#"{"data":[[]]}"#, None),
            (r#"{"data":[null]}"#, None),
            (r#"{"data":[{}],"data":[]}"#, None),
            (r#"{"data":[{}]"#, None),
            (r#"{"data":[{}]}x"#, None),
            (r#"{"data":[{"a":"\ud800"}]}"#, None),
            (r#"{"data":[{"a":1e999}]}"#, None),
            (r#"{"data":[{"a":1,"a":2},1]}"#, None),
        ] {
            assert_eq!(rows(body), expected.map(|(count, json)| (count, json.to_owned())), "{body}");
        }
    }

    #[test]
    fn an_object_by_itself_is_written_the_same_way() {
        for (json, expected) in [
            (r#"{ "z" : 1.50 , "a" : [ { } ] }"#, Some(r#"{"z":1.5,"a":[{}]}"#)),
            (r#"{"a":1,"b":{"c":1,"c":2},"a":3}"#, Some(r#"{"a":3,"b":{"c":2}}"#)),
            ("[]", None),
            ("null", None),
            (r#"{"a":1,"a":1e999}"#, None),
        ] {
            assert_eq!(super::object(json).ok().as_deref(), expected, "{json}");
        }
    }

    #[test]
    fn many_keys_and_deep_nesting_are_bounded_work() {
        let wide: Map<_, _> = (0..100_000).map(|key| (key.to_string(), json!(key))).collect();
        let wide = json!({ "data": [wide, { "0": 0 }] }).to_string();
        let (count, json) = rows(&wide).unwrap();
        assert_eq!((count, format!(r#"{{"data":{json}}}"#)), (2, wide.clone()));
        let repeated = wide.replacen(r#""5":"#, r#""99999":"#, 1);
        let last_counts: Value = serde_json::from_str(&rows(&repeated).unwrap().1).unwrap();
        assert_eq!((last_counts[0].as_object().unwrap().len(), &last_counts[0]["99999"]), (99_999, &json!(99_999)));
        let deep = format!(r#"{{"data":[{{"a":{}{}}}]}}"#, "[".repeat(10_000), "]".repeat(10_000));
        assert_eq!(rows(&deep), None);
    }

    #[test]
    fn the_fast_way_and_the_slow_way_mean_the_same() {
        let mut random = fastrand::Rng::with_seed(11);
        for _ in 0..2_000 {
            let data: Vec<_> = (0..random.usize(..4)).map(|_| Value::Object(object(&mut random, 3))).collect();
            let body = serde_json::to_string_pretty(&json!({ "data": data })).unwrap();
            let (fast, slow) = (read(body.as_bytes(), 2).unwrap(), read_slowly(body.as_bytes(), 2).unwrap());
            let kept = json!(data.get(..2).unwrap_or(&data));
            assert_eq!((fast.count, serde_json::from_str::<Value>(&fast.json).unwrap()), (slow.count, kept));
            assert_eq!((fast.truncated, slow.truncated), (data.len() > 2, data.len() > 2));
            assert_eq!(fast.json, slow.json, "keys that were sorted stay so");
        }
    }

    fn object(random: &mut fastrand::Rng, depth: u8) -> Map<String, Value> {
        (0..random.usize(..5)).map(|_| (text(random), value(random, depth))).collect()
    }

    fn value(random: &mut fastrand::Rng, depth: u8) -> Value {
        match random.u8(..if depth == 0 { 6 } else { 8 }) {
            0 => Value::Null,
            1 => random.bool().into(),
            2 => random.i64(..).into(),
            3 => random.u64(..).into(),
            4 => (random.f64() * 1e9 - 5e8).into(),
            5 => text(random).into(),
            6 => (0..random.usize(..4)).map(|_| value(random, depth - 1)).collect(),
            _ => object(random, depth - 1).into(),
        }
    }

    fn text(random: &mut fastrand::Rng) -> String {
        (0..random.usize(..6)).map(|_| if random.bool() { random.alphanumeric() } else { random.char(..) }).collect()
    }
}
