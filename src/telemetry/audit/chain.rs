//! The chain of hashes in an audit file: how a record is appended, and how the first broken link is found.
//!
//! A record is one line: `{"sequence":7,"previous":"…","event":{…},"hash":"…"}`. `hash` is the SHA-256 of the line up to the
//! comma before it, and `previous` is the hash of the record before, so that nobody changes, removes or moves a line without
//! showing. Lines missing at the end show in the head, a file beside it that names the last record. Whoever can write both
//! files can forge both: the log holds the same events, and hashes to compare with.

use std::collections::VecDeque;
use std::io::{self, BufRead};

use aws_lc_rs::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

use crate::telemetry::text::Text;
use crate::telemetry::trace::write_hex;

/// What ends each line, hash included.
const SEAL_BYTES: usize = r#","hash":""}"#.len() + Digest::HEX;
/// How many records a head may be behind after a crash: more than ever wait to be named.
const REMEMBERED: usize = 32_768;
/// A crash tears no more than what was being written.
pub(super) const MOST_TORN_BYTES: usize = 1 << 20;

/// A SHA-256.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Digest([u8; 32]);

impl Digest {
    /// How many hexadecimal digits it has.
    const HEX: usize = 64;
    /// What the first record follows.
    const NONE: Self = Self([0; 32]);

    /// The hash of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        let mut hash = Self::NONE;
        for (to, from) in hash.0.iter_mut().zip(digest(&SHA256, bytes).as_ref()) {
            *to = *from;
        }
        hash
    }

    /// As 64 lower-case hexadecimal digits.
    pub fn hex(&self) -> HexDigest {
        let mut text = [b'0'; Self::HEX];
        write_hex(&mut text, &self.0);
        HexDigest(text)
    }

    pub(super) fn write_to(&self, text: &mut Text) {
        text.hex::<{ Self::HEX }>(&self.0);
    }
}

/// A SHA-256 as text.
#[derive(Debug, Clone, Copy)]
pub struct HexDigest([u8; Digest::HEX]);

impl HexDigest {
    /// The digits.
    pub fn as_str(&self) -> &str {
        str::from_utf8(&self.0).unwrap_or_default()
    }
}

/// Where a chain ends, or is said to end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Head {
    pub(super) sequence: u64,
    pub(super) hash: String,
}

impl Head {
    /// The end of a chain that has no record yet.
    pub(super) fn start() -> Self {
        Self { sequence: 0, hash: Digest::NONE.hex().as_str().to_owned() }
    }

    /// Appends a record with the event that `write` writes, a JSON object on one line, and becomes its end.
    pub(super) fn append(&mut self, lines: &mut Text, write: impl FnOnce(&mut Text)) {
        let start = lines.len();
        self.sequence += 1;
        lines.push(r#"{"sequence":"#);
        lines.number(self.sequence);
        lines.push_all(&[r#","previous":""#, &self.hash, r#"","event":"#]);
        write(lines);
        let hash = Digest::of(lines.as_bytes().get(start..).unwrap_or_default()).hex();
        lines.push_all(&[r#","hash":""#, hash.as_str(), "\"}\n"]);
        hash.as_str().clone_into(&mut self.hash);
    }
}

/// What the head of a file says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HeadFile {
    #[serde(flatten)]
    pub(super) end: Head,
    /// Events that are lost, and of which no record tells yet.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(super) lost: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// One line, taken apart; its hash is right for what stands before it.
#[derive(Debug)]
pub(super) struct Record<'a> {
    pub(super) sequence: u64,
    pub(super) previous: &'a str,
    pub(super) event: &'a str,
    pub(super) hash: &'a str,
}

impl<'a> Record<'a> {
    /// Reads a line without its line break.
    ///
    /// # Errors
    ///
    /// What is wrong with it, as the predicate of "the record".
    pub(super) fn read(line: &'a [u8]) -> Result<Self, &'static str> {
        const NOT_ONE: &str = "is not a record of an audit file";
        let text = str::from_utf8(line).map_err(|_| NOT_ONE)?;
        let (content, seal) =
            text.len().checked_sub(SEAL_BYTES).and_then(|at| text.split_at_checked(at)).ok_or(NOT_ONE)?;
        let hash = seal.strip_prefix(r#","hash":""#).and_then(|seal| seal.strip_suffix(r#""}"#)).ok_or(NOT_ONE)?;
        if Digest::of(content.as_bytes()).hex().as_str() != hash {
            return Err("has another content than its hash says");
        }
        let rest = content.strip_prefix(r#"{"sequence":"#).ok_or(NOT_ONE)?;
        let (sequence, rest) = rest.split_once(r#","previous":""#).ok_or(NOT_ONE)?;
        let (previous, event) = rest.split_once(r#"","event":"#).ok_or(NOT_ONE)?;
        Ok(Self { sequence: sequence.parse().map_err(|_| NOT_ONE)?, previous, event, hash })
    }

    pub(super) fn head(&self) -> Head {
        Head { sequence: self.sequence, hash: self.hash.to_owned() }
    }
}

/// Records about the file itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event.name", rename_all = "snake_case")]
pub(super) enum Note {
    /// The server has opened the file; the head as it found it.
    Started { head: Option<Head> },
    /// The line before was not finished: the server was killed, or the machine.
    Sealed { torn_bytes: u64, torn_sha256: String },
    /// So many events could not be written.
    Lost { events: u64 },
    /// The file before, which ended there, was lost from its path while the server was running.
    Reopened { previous: Head, cause: String },
    /// The head was lost from its path, or changed, while the server was running.
    HeadLost,
    /// The server has closed the file in good order.
    Stopped,
}

impl Note {
    pub(super) fn sealing(torn: &[u8]) -> Self {
        Self::Sealed { torn_bytes: torn.len() as u64, torn_sha256: Digest::of(torn).hex().as_str().to_owned() }
    }

    /// Writes it as the event of a record; `time` is RFC 3339.
    pub(super) fn write(&self, text: &mut Text, time: &str) {
        let note = serde_json::to_string(self).unwrap_or_default();
        text.push_all(&[r#"{"timestamp":""#, time, r#"","#, note.strip_prefix('{').unwrap_or("}")]);
    }

    pub(super) fn read(event: &str) -> Option<Self> {
        serde_json::from_str(event).ok()
    }
}

/// A chain that is whole.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Whole {
    /// How many records it has.
    pub records: u64,
    /// The hash of the last: whoever has noted it knows that nothing before it was changed.
    pub last_hash: String,
    /// Events that the server says it could not write.
    pub lost_events: u64,
    /// Lines that a crash has cut off, each followed by a record that says so.
    pub torn_lines: u64,
    /// What was done to the file or its head while the server was running.
    pub incidents: Vec<Incident>,
}

/// The file or its head was moved, removed, replaced or truncated while the server was running, and the chain says so.
#[derive(Debug, PartialEq, Eq)]
pub struct Incident {
    /// The number of the line that says so, from 1.
    pub line: u64,
    /// What it says.
    pub what: String,
}

/// Why a chain is not whole.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The first broken link.
    #[error("line {line}: {what}")]
    Link {
        /// The number of the line, from 1.
        line: u64,
        /// What is wrong there.
        what: String,
    },
    /// The file cannot be read.
    #[error("cannot be read: {0}")]
    Unreadable(#[from] io::Error),
}

/// Follows the chain from its start to its end, and compares that with the head.
///
/// # Errors
///
/// At the first link that is broken.
pub(super) fn verify(mut file: impl BufRead, head: Option<&Head>) -> Result<Whole, Broken> {
    let mut chain =
        Follower { line: 0, end: Head::start(), torn: None, recent: VecDeque::new(), whole: Whole::default() };
    let mut line = Vec::new();
    loop {
        line.clear();
        if file.read_until(b'\n', &mut line)? == 0 {
            break;
        }
        chain.line += 1;
        match line.strip_suffix(b"\n") {
            Some(line) => chain.follow(line)?,
            None => return Err(chain.broken("the file ends in the middle of this line")),
        }
    }
    chain.finish(head)
}

struct Follower {
    line: u64,
    end: Head,
    /// Lines that are no records: allowed where the next record says that a crash has torn them.
    torn: Option<Torn>,
    recent: VecDeque<Head>,
    whole: Whole,
}

struct Torn {
    bytes: Vec<u8>,
    first_line: u64,
    wrong: &'static str,
}

impl Torn {
    fn broken(&self) -> Broken {
        Broken::Link { line: self.first_line, what: format!("the record {}", self.wrong) }
    }
}

impl Follower {
    fn broken(&self, what: impl Into<String>) -> Broken {
        Broken::Link { line: self.line, what: what.into() }
    }

    fn follow(&mut self, line: &[u8]) -> Result<(), Broken> {
        let record = match (Record::read(line), &mut self.torn) {
            (Ok(record), _) => record,
            (Err(wrong), None) => {
                self.torn = Some(Torn { bytes: line.to_vec(), first_line: self.line, wrong });
                return Ok(());
            }
            (Err(_), Some(torn)) if torn.bytes.len() + line.len() < MOST_TORN_BYTES => {
                torn.bytes.push(b'\n');
                torn.bytes.extend_from_slice(line);
                return Ok(());
            }
            (Err(_), Some(torn)) => return Err(torn.broken()),
        };
        let note = Note::read(record.event);
        if let Some(torn) = self.torn.take() {
            if note.as_ref() != Some(&Note::sealing(&torn.bytes)) {
                return Err(torn.broken());
            }
            self.whole.torn_lines += 1;
        } else if matches!(note, Some(Note::Sealed { .. })) {
            return Err(self.broken("the record tells of an unfinished line before it, and that line is not there"));
        }
        if record.sequence != self.end.sequence + 1 {
            let (expected, found) = (self.end.sequence + 1, record.sequence);
            return Err(self.broken(format!(
                "record {expected} should stand here, and this is record {found}: lines are missing, moved or added"
            )));
        }
        if record.previous != self.end.hash {
            return Err(self.broken("the record does not follow the one before it, which was changed or replaced"));
        }
        match note {
            Some(Note::Started { head }) => self.compare(head.as_ref(), "when the server started here, ")?,
            Some(Note::Lost { events }) => self.whole.lost_events += events,
            Some(Note::Reopened { previous, cause }) => self.reopened(&previous, &cause)?,
            Some(Note::HeadLost) => {
                self.incident("the head was moved, removed or changed while the server was running".to_owned());
            }
            _ => {}
        }
        self.end = record.head();
        if self.recent.len() == REMEMBERED {
            self.recent.pop_front();
        }
        self.recent.push_back(self.end.clone());
        Ok(())
    }

    /// The file goes on after another one that was lost: as a new chain, or as a copy that must not lack records.
    fn reopened(&mut self, previous: &Head, cause: &str) -> Result<(), Broken> {
        let Head { sequence, hash } = previous;
        if self.end.sequence > 0 {
            self.compare(Some(previous), "when the server opened the file again here, ")?;
            self.incident(format!(
                "the file was {cause} while the server was running; this file has all records up to {sequence} as well"
            ));
        } else {
            self.incident(format!(
                "the file before this one was {cause} while the server was running; it ended with record {sequence} and the hash {hash}"
            ));
        }
        Ok(())
    }

    fn incident(&mut self, what: String) {
        self.whole.incidents.push(Incident { line: self.line, what });
    }

    fn finish(mut self, head: Option<&Head>) -> Result<Whole, Broken> {
        if let Some(torn) = self.torn {
            return Err(torn.broken());
        }
        if self.end.sequence == 0 && head.is_none() {
            return Err(self.broken("the file is empty"));
        }
        self.compare(head, "")?;
        self.whole.records = self.end.sequence;
        self.whole.last_hash = std::mem::take(&mut self.end.hash);
        Ok(self.whole)
    }

    /// The head is written after the records: it may be behind by what a crash has cut off, and never ahead.
    fn compare(&self, head: Option<&Head>, when: &str) -> Result<(), Broken> {
        let end = &self.end;
        let Some(head) = head else {
            return match end.sequence {
                0 => Ok(()),
                _ => Err(self.broken(format!("{when}the head was missing, so lines may be missing before this one"))),
            };
        };
        if head.sequence > end.sequence {
            let (said, found) = (head.sequence, end.sequence);
            return Err(self.broken(format!(
                "{when}the head named record {said} as the last, and the file ended with record {found}: lines are missing"
            )));
        }
        let start = Head::start();
        let known = self.recent.iter().rev().chain([&start]).find(|record| record.sequence == head.sequence);
        if known != Some(head) {
            return Err(self.broken(format!("{when}the head named another record {} than the file has", head.sequence)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A file of these events, as a server writes it that starts, and its head.
    fn chain(events: &[String]) -> (String, Head) {
        let (mut end, mut text) = (Head::start(), String::new());
        note(&mut end, &mut text, &Note::Started { head: None });
        for event in events {
            append(&mut end, &mut text, |text| text.push(event));
        }
        (text, end)
    }

    fn append(end: &mut Head, text: &mut String, write: impl FnOnce(&mut Text)) {
        let mut line = Text::default();
        end.append(&mut line, write);
        text.push_str(&line.to_string());
    }

    fn note(end: &mut Head, text: &mut String, note: &Note) {
        append(end, text, |text| note.write(text, "then"));
    }

    fn events(count: usize) -> Vec<String> {
        (0..count).map(|number| format!(r#"{{"event.name":"tool_call","n":{number}}}"#)).collect()
    }

    fn broken_at(text: &str, head: Option<&Head>) -> (u64, String) {
        match verify(text.as_bytes(), head).unwrap_err() {
            Broken::Link { line, what } => (line, what),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn the_first_broken_link_is_named() {
        let (text, head) = chain(&events(5));
        assert_eq!(verify(text.as_bytes(), Some(&head)).unwrap().records, 6);
        let lines: Vec<&str> = text.lines().collect();
        let file = |order: &[usize]| order.iter().map(|at| format!("{}\n", lines[*at])).collect::<String>();

        let (line, what) = broken_at(&text.replace("\"n\":2", "\"n\":7"), Some(&head));
        assert_eq!((line, what.as_str()), (4, "the record has another content than its hash says"));
        for (order, line, what) in [
            (&[0, 1, 3, 4, 5][..], 3, "record 3 should stand here, and this is record 4"),
            (&[0, 2, 1, 3, 4, 5], 2, "record 2 should stand here"),
            (&[0, 1, 1, 2, 3, 4, 5], 3, "record 3 should stand here, and this is record 2"),
            (&[1, 2, 3, 4, 5], 1, "record 1 should stand here"),
            (&[0, 1, 2, 3, 4], 5, "the head named record 6 as the last"),
            (&[], 0, "the head named record 6 as the last"),
        ] {
            let (found, told) = broken_at(&file(order), Some(&head));
            assert!(found == line && told.contains(what), "{order:?}: line {found}: {told}");
        }
        assert!(broken_at(&text, None).1.contains("the head was missing"));
        assert!(broken_at(text.trim_end(), Some(&head)).1.contains("in the middle of this line"));

        // A line whose own hash was made to fit is given away by the next.
        let mut forged = Head { sequence: 2, hash: Record::read(lines[1].as_bytes()).unwrap().hash.to_owned() };
        let mut line = String::new();
        append(&mut forged, &mut line, |line| line.push(r#"{"n":"forged"}"#));
        let (found, told) = broken_at(&text.replace(&format!("{}\n", lines[2]), &line), Some(&head));
        assert_eq!((found, told.contains("changed or replaced")), (4, true), "{told}");
    }

    #[test]
    fn a_crash_leaves_a_chain_that_is_whole_and_tells_of_it() {
        let (text, head) = chain(&events(2));
        // Killed before the head was written, and in the middle of a line.
        let behind =
            Head { sequence: 2, hash: Record::read(text.lines().nth(1).unwrap().as_bytes()).unwrap().hash.to_owned() };
        assert!(verify(text.as_bytes(), Some(&behind)).is_ok());
        let torn = r#"{"sequence":4,"previous":"0123456789ab"#;
        let (mut resumed, mut end) = (format!("{text}{torn}\n"), head);
        note(&mut end, &mut resumed, &Note::sealing(torn.as_bytes()));
        note(&mut end, &mut resumed, &Note::Started { head: Some(behind) });
        note(&mut end, &mut resumed, &Note::Lost { events: 3 });
        let whole = verify(resumed.as_bytes(), Some(&end)).unwrap();
        assert_eq!((whole.records, whole.torn_lines, whole.lost_events), (6, 1, 3));
        assert_eq!(broken_at(&resumed.replacen(torn, &torn[1..], 1), Some(&end)).0, 4);
        assert_eq!(broken_at(&resumed.replacen(&format!("{torn}\n"), "", 1), Some(&end)).0, 4);
    }

    #[test]
    fn what_was_cut_off_between_two_runs_shows_for_ever() {
        let (text, head) = chain(&events(3));
        let kept: String = text.lines().take(2).map(|line| format!("{line}\n")).collect();
        let end = Record::read(kept.lines().last().unwrap().as_bytes()).unwrap().head();
        for (found, told) in [(Some(head), "named record 4 as the last"), (None, "the head was missing")] {
            let mut resumed = kept.clone();
            let mut end = end.clone();
            note(&mut end, &mut resumed, &Note::Started { head: found });
            let (line, what) = broken_at(&resumed, Some(&end));
            assert!(line == 3 && what.contains(told), "{line}: {what}");
        }
    }

    proptest! {
        #[test]
        fn no_change_to_a_chain_stays_unseen(
            words in prop::collection::vec("[ -~ü\u{2028}]{0,30}", 1..12),
            way in 0..7_usize,
            (at, other) in (any::<prop::sample::Index>(), any::<prop::sample::Index>()),
            byte in any::<u8>(),
        ) {
            let events: Vec<_> = words.iter().map(|word| serde_json::json!({ "word": word }).to_string()).collect();
            let (text, head) = chain(&events);
            prop_assert_eq!(verify(text.as_bytes(), Some(&head)).unwrap().records, words.len() as u64 + 1);
            let mut lines: Vec<&str> = text.split_inclusive('\n').collect();
            let (line, second) = (at.index(lines.len()), other.index(lines.len()));
            let changed = match way {
                0 => {
                    let mut bytes = text.clone().into_bytes();
                    bytes[at.index(text.len())] = byte;
                    bytes
                }
                1 => { lines.remove(line); lines.concat().into_bytes() }
                2 => { lines.swap(line, second); lines.concat().into_bytes() }
                3 => { lines.truncate(line); lines.concat().into_bytes() }
                4 => { lines.insert(line, lines[second]); lines.concat().into_bytes() }
                5 => text.as_bytes()[..at.index(text.len())].to_vec(),
                _ => {
                    let mut bytes = text.clone().into_bytes();
                    bytes.insert(at.index(text.len()), byte);
                    bytes
                }
            };
            prop_assume!(changed != text.as_bytes());
            prop_assert!(verify(changed.as_slice(), Some(&head)).is_err());
            prop_assert!(verify(text.as_bytes(), None).is_err());
        }
    }
}
