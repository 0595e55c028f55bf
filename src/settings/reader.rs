//! Reads variables one by one and remembers every mistake, so that the operator sees them all at once.

use std::fmt;

use super::parse::may_be_credential;
use super::variables::VARIABLES;
use super::vars::Vars;

/// Every mistake in the settings, one line each: made for stderr. It never holds a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettingsError {
    mistakes: Vec<Mistake>,
    likely_cause: Option<&'static str>,
}

impl SettingsError {
    /// The mistakes, in the order in which they were found.
    pub fn mistakes(&self) -> &[Mistake] {
        &self.mistakes
    }

    /// What is probably behind them, where the mistakes themselves do not tell.
    pub fn likely_cause(&self) -> Option<&'static str> {
        self.likely_cause
    }
}

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mistakes.len() {
            1 => write!(f, "1 mistake in the settings:")?,
            count => write!(f, "{count} mistakes in the settings:")?,
        }
        self.mistakes.iter().try_for_each(|mistake| write!(f, "\n  {mistake}"))?;
        self.likely_cause.iter().try_for_each(|cause| write!(f, "\nThe likely cause: {cause}."))
    }
}

impl std::error::Error for SettingsError {}

/// One variable that cannot be used, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// The variable, or the place in `.env`.
    pub variable: String,
    /// The offending value (unless it is secret) and what would be accepted, in one line.
    pub problem: String,
}

impl Mistake {
    pub(super) fn new(variable: impl Into<String>, problem: impl Into<String>) -> Mistake {
        Mistake { variable: variable.into(), problem: problem.into() }
    }
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.variable, self.problem)
    }
}

/// A shorter text may stand anywhere by chance.
const SHORTEST_SECRET: usize = 8;

/// Parsers return the value, or what is wrong with it as a predicate: "is not a port number from 0 to 65535".
pub(super) struct Reader<'a, V> {
    vars: &'a V,
    mistakes: Vec<Mistake>,
    warnings: Vec<String>,
    likely_cause: Option<&'static str>,
}

impl<'a, V: Vars> Reader<'a, V> {
    pub(super) fn new(vars: &'a V) -> Self {
        Reader { vars, mistakes: vars.mistakes(), warnings: Vec::new(), likely_cause: None }
    }

    /// The trimmed value; `None` when it is unset, blank, or not Unicode (which is noted as a mistake).
    pub(super) fn text(&mut self, name: &str) -> Option<String> {
        let Ok(value) = self.vars.get(name)?.into_string() else {
            self.mistake(name, "is not Unicode text");
            return None;
        };
        Some(value.trim()).filter(|text| !text.is_empty()).map(str::to_owned)
    }

    /// The value as a library sees it, which reads the environment of the process by itself.
    pub(super) fn of_process(&mut self, name: &str) -> Option<String> {
        let Ok(value) = self.vars.of_process(name)?.into_string() else {
            self.mistake(name, "is not Unicode text");
            return None;
        };
        Some(value)
    }

    pub(super) fn required<T>(&mut self, name: &str, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        let value = self.some(name, &parse);
        if value.is_none() && !self.has_mistake(&[name]) {
            self.mistake(name, "is required, but not set");
        }
        value
    }

    pub(super) fn optional<T>(&mut self, name: &str, parse: impl Fn(&str) -> Result<T, String>, default: T) -> T {
        self.some(name, parse).unwrap_or(default)
    }

    /// The parsed value; `None` when there is none or when it is a mistake.
    pub(super) fn some<T>(&mut self, name: &str, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        let text = self.text(name)?;
        self.parsed(name, &text, &parse)
    }

    /// The entries between commas, of which each wrong one is a mistake of its own; `None` when there is no entry.
    pub(super) fn list<T>(&mut self, name: &str, parse: impl Fn(&str) -> Result<T, String>) -> Option<Vec<T>> {
        let text = self.text(name)?;
        let entries: Vec<&str> = text.split(',').map(str::trim).filter(|entry| !entry.is_empty()).collect();
        if entries.is_empty() {
            return None;
        }
        Some(entries.into_iter().filter_map(|entry| self.parsed(name, entry, &parse)).collect())
    }

    pub(super) fn mistake(&mut self, name: &str, problem: impl Into<String>) {
        self.mistakes.push(Mistake::new(name, problem));
    }

    pub(super) fn has_mistake(&self, names: &[&str]) -> bool {
        self.mistakes.iter().any(|mistake| names.contains(&mistake.variable.as_str()))
    }

    pub(super) fn likely_cause(&mut self, cause: &'static str) {
        self.likely_cause = Some(cause);
    }

    /// A secret that stands in another variable too is about to be shown to everybody who reads logs.
    pub(super) fn refuse_secrets_elsewhere(&mut self) {
        for variable in VARIABLES.iter().filter(|variable| !variable.secret) {
            if !self.has_mistake(&[variable.name])
                && let Some(text) = self.text(variable.name)
                && let Some(secret) = self.secret_in(&text)
            {
                self.mistake(
                    variable.name,
                    format!("the value (not shown) holds that of {secret}, which belongs there alone"),
                );
            }
        }
    }

    /// The secret variable whose value this text is, or holds.
    fn secret_in(&self, text: &str) -> Option<&'static str> {
        let secrets = VARIABLES.iter().filter(|variable| variable.secret);
        let holds = |secret: &str| text == secret || (secret.len() >= SHORTEST_SECRET && text.contains(secret));
        secrets.map(|variable| variable.name).find(|name| {
            let secret = self.vars.get(name).and_then(|value| value.into_string().ok());
            secret.is_some_and(|secret| !secret.trim().is_empty() && holds(secret.trim()))
        })
    }

    pub(super) fn warn(&mut self, sentence: impl Into<String>) {
        self.warnings.push(sentence.into());
    }

    pub(super) fn take_warnings(&mut self) -> Vec<String> {
        std::mem::take(&mut self.warnings)
    }

    /// `value` is `None` only where a mistake was noted.
    pub(super) fn finish<T>(self, value: Option<T>) -> Result<T, SettingsError> {
        match value {
            Some(value) if self.mistakes.is_empty() => Ok(value),
            _ => Err(SettingsError { mistakes: self.mistakes, likely_cause: self.likely_cause }),
        }
    }

    fn parsed<T>(&mut self, name: &str, text: &str, parse: &impl Fn(&str) -> Result<T, String>) -> Option<T> {
        match parse(text) {
            Ok(value) => Some(value),
            Err(problem) => {
                let shown = self.shown(name, text);
                self.mistake(name, format!("{shown} {problem}"));
                None
            }
        }
    }

    /// The value as a message may show it: on one line, not too long, without a URL's user info and query, and not at all when it is a
    /// secret or may be one that went into the wrong variable.
    pub(super) fn shown(&self, name: &str, value: &str) -> String {
        const LONGEST: usize = 100;
        if VARIABLES.iter().any(|variable| variable.secret && variable.name == name) {
            return "the value (not shown, for it is secret)".to_owned();
        }
        if let Some(secret) = self.secret_in(value) {
            return format!("the value (not shown, for it holds that of {secret})");
        }
        if may_be_credential(value) {
            return format!("the value (not shown, for it looks like a credential: {})", shape(value));
        }
        let mut text = match value.rsplit_once('@') {
            Some((_, rest)) => format!("…@{rest}"),
            None => value.to_owned(),
        };
        if let Some(start) = text.find(['?', '#']) {
            text.truncate(start + 1);
            text.push('…');
        }
        if text.chars().count() > LONGEST {
            text = text.chars().take(LONGEST).chain(['…']).collect();
        }
        let one_line: String = text
            .chars()
            .flat_map(|char| if char.is_control() { char.escape_default().collect() } else { vec![char] })
            .collect();
        format!("`{one_line}`")
    }
}

/// What a value is made of, and nothing of the value.
fn shape(value: &str) -> String {
    let has = |is: fn(char) -> bool, kind| value.chars().any(is).then_some(kind);
    let kinds = [
        has(char::is_alphabetic, "letters"),
        has(char::is_numeric, "digits"),
        has(|char| !char.is_alphanumeric(), "other characters"),
    ];
    let kinds: Vec<_> = kinds.into_iter().flatten().collect();
    format!("{} characters, {}", value.chars().count(), kinds.join(", "))
}
