//! `{"data": [objects]}` as it comes from the backend, to a compact array of the same objects, in one pass.

use super::QueryRows;
use crate::json::{Copier, Malformed};

/// Reads the answer, and keeps so many rows at most.
pub(super) fn read(body: &[u8], limit: usize) -> Result<QueryRows, Malformed> {
    let text = str::from_utf8(body).map_err(|_| Copier::new("").malformed("expected UTF-8"))?;
    let mut copy = Copier::new(text);
    let (mut count, mut is_first) = (None, true);
    copy.expect(b'{', "an object with `data`")?;
    while copy.next_part(is_first, b'}')? {
        is_first = false;
        let start = copy.out.len();
        let key = copy.key()?;
        let is_data = copy.out.get(key) == Some("\"data\"");
        copy.out.truncate(start);
        if !is_data {
            copy.value()?;
            copy.out.truncate(start);
        } else if count.is_some() {
            return Err(copy.malformed("duplicate field `data`"));
        } else {
            count = Some(rows(&mut copy, limit)?);
        }
    }
    copy.end()?;
    let count = count.ok_or_else(|| copy.malformed("missing field `data`"))?;
    Ok(QueryRows { count: count.min(limit), truncated: count > limit, json: copy.out })
}

/// Copies rows up to the limit, and counts all.
fn rows(copy: &mut Copier<'_>, limit: usize) -> Result<usize, Malformed> {
    copy.expect(b'[', "a list of objects")?;
    copy.out.push('[');
    let mut count = 0;
    while copy.next_part(count == 0, b']')? {
        let start = copy.out.len();
        if count > 0 {
            copy.out.push(',');
        }
        if copy.peek() != Some(b'{') {
            return Err(copy.malformed(format!("data[{count}] is not an object")));
        }
        copy.object().map_err(|malformed| malformed.within(&format!("data[{count}]")))?;
        if count >= limit {
            copy.out.truncate(start);
        }
        count += 1;
    }
    copy.out.push(']');
    Ok(count)
}

#[cfg(test)]
mod tests {
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
                Some((2, r#"[{"z":1,"a":[],"b":[-1.50,1e3,true,null]},{"a":{"z":{},"a":"x"}}]"#)),
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
    fn rows_beyond_the_limit_are_read_and_dropped() {
        let body = r#"{"data":[{"a":1},{"a":2},{"a":3}]}"#;
        for (limit, count, json) in
            [(1, 1, r#"[{"a":1}]"#), (2, 2, r#"[{"a":1},{"a":2}]"#), (3, 3, r#"[{"a":1},{"a":2},{"a":3}]"#)]
        {
            let read = read(body.as_bytes(), limit).unwrap();
            assert_eq!(read, QueryRows { count, truncated: limit < 3, json: json.to_owned() });
        }
        assert!(read(body.replace("3}", "x}").as_bytes(), 1).is_err());
        assert!(read(b"\xff", 1).is_err());
    }
}
