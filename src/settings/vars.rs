//! Where values come from: the process environment over `.env`, or a map in a test.
//!
//! The process is only ever read: `.env` fills the gaps of a lookup and is never written into the environment.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{ErrorKind, Read};
use std::path::Path;

use super::reader::Mistake;
use super::variables::LIBRARY_VARIABLES;

/// A source of variables.
pub trait Vars {
    /// The raw value, if there is one; it may be empty, blank or not Unicode.
    fn get(&self, name: &str) -> Option<OsString>;

    /// The raw value in the environment of the process, which is all that libraries see.
    fn of_process(&self, name: &str) -> Option<OsString> {
        self.get(name)
    }

    /// What is wrong with the source itself, such as a broken line in a file.
    fn mistakes(&self) -> Vec<Mistake> {
        Vec::new()
    }
}

impl Vars for BTreeMap<String, String> {
    fn get(&self, name: &str) -> Option<OsString> {
        BTreeMap::get(self, name).map(OsString::from)
    }
}

/// The process environment over `.env` in the working directory. An empty variable counts as unset here too.
#[derive(Debug)]
pub struct Environment {
    process: fn(&str) -> Option<OsString>,
    file: EnvFile,
}

impl Environment {
    /// Reads `.env`, if there is one. Its mistakes are reported together with all others, by whoever reads the variables.
    pub fn load() -> Environment {
        Environment { process: process_variable, file: EnvFile::open(Path::new(".env")) }
    }

    #[cfg(test)]
    pub(super) fn new(process: fn(&str) -> Option<OsString>, file: EnvFile) -> Environment {
        Environment { process, file }
    }

    fn process_value(&self, name: &str) -> Option<OsString> {
        (self.process)(name).filter(|value| value.to_str().is_none_or(|text| !text.trim().is_empty()))
    }
}

impl Vars for Environment {
    fn get(&self, name: &str) -> Option<OsString> {
        self.process_value(name).or_else(|| self.file.values.get(name).map(OsString::from))
    }

    fn of_process(&self, name: &str) -> Option<OsString> {
        (self.process)(name)
    }

    fn mistakes(&self) -> Vec<Mistake> {
        let mut mistakes = self.file.mistakes.clone();
        for name in LIBRARY_VARIABLES.iter().map(|variable| variable.name) {
            let in_file = self.file.values.get(name).is_some_and(|value| !value.trim().is_empty());
            if in_file && self.process_value(name).is_none() {
                mistakes.push(Mistake::new(
                    name,
                    "stands in `.env`, but the libraries that read it see the process environment only; export it instead",
                ));
            }
        }
        mistakes
    }
}

#[expect(clippy::disallowed_methods, reason = "this is the place that the lint sends everybody else to")]
fn process_variable(name: &str) -> Option<OsString> {
    std::env::var_os(name)
}

/// The variables of a `.env` file. `Debug` shows their names only: one value may be the secret.
#[derive(Default)]
pub(super) struct EnvFile {
    values: BTreeMap<String, String>,
    mistakes: Vec<Mistake>,
}

impl std::fmt::Debug for EnvFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.values.keys()).finish()
    }
}

impl EnvFile {
    pub(super) fn open(path: &Path) -> EnvFile {
        match std::fs::read(path) {
            Ok(bytes) => EnvFile::parse(&bytes),
            Err(error) if error.kind() == ErrorKind::NotFound => EnvFile::default(),
            Err(error) => EnvFile::unreadable(&format!("cannot be read: {error}")),
        }
    }

    pub(super) fn parse(bytes: &[u8]) -> EnvFile {
        let Ok(text) = str::from_utf8(bytes) else {
            return EnvFile::unreadable("is not UTF-8 text");
        };
        // dotenvy skips a byte order mark only when it loads into the process, and trips over blanks before a missing
        // final line break.
        let text = format!("{}\n", text.trim_start_matches('\u{feff}'));

        let mut file = EnvFile::default();
        let lines_read = Cell::new(0);
        for item in dotenvy::from_read_iter(LineByLine { rest: text.as_bytes(), lines_read: &lines_read }) {
            match item {
                Ok((name, value)) => {
                    file.values.insert(name, value);
                }
                // The error holds the line, which may hold the secret: only its number leaves this function.
                Err(dotenvy::Error::LineParse(broken, _)) => {
                    let line = lines_read.get() + 1 - broken.trim_end().lines().count().max(1);
                    file.mistakes.push(Mistake::new(
                        format!(".env line {line}"),
                        "is not NAME=value; a value with blanks, `#` or `$` goes in single quotes",
                    ));
                }
                Err(_) => return EnvFile::unreadable("cannot be read"),
            }
        }
        file
    }

    fn unreadable(problem: &str) -> EnvFile {
        EnvFile { mistakes: vec![Mistake::new(".env", problem)], ..EnvFile::default() }
    }
}

/// Hands out one line per `read`, and so knows which line the parser behind it has reached.
struct LineByLine<'a> {
    rest: &'a [u8],
    lines_read: &'a Cell<usize>,
}

impl Read for LineByLine<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let end = self.rest.iter().position(|&byte| byte == b'\n').map_or(self.rest.len(), |index| index + 1);
        let (line, rest) = self.rest.split_at(end.min(buffer.len()));
        if line.ends_with(b"\n") {
            self.lines_read.set(self.lines_read.get() + 1);
        }
        self.rest = rest;
        (&mut { line }).read(buffer)
    }
}
