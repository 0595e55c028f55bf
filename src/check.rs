//! `mcp-server check`: is everything right between here and the backend, and if not, what mends it?
//!
//! Walks the whole chain once, through the same settings, exchange and client as the server. A step that fails is told apart
//! from those that merely depend on it, and comes with what is wrong, in whose hands that is, and what mends it. Tokens and
//! secrets never get into a step; of tokens only claims do.

mod backend;
mod callers;
mod entra;
mod hosts;
mod report;

use std::io::{self, Write};

use serde::Serialize;

use crate::settings::{Settings, SettingsError, Vars, in_kubernetes};
use report::Report;

/// The remedy is a setting, or another part of the deployment.
const DEPLOYER: &str = "whoever deploys this server";

/// The steps, in their order.
const SETTINGS: &str = "settings";
const CREDENTIAL: &str = "credential";
const TOKEN_FILE: &str = "token_file";
const DNS: &str = "dns";
const TCP: &str = "tcp";
const TLS: &str = "tls";
const CLOCK: &str = "clock";
const TOKEN: &str = "token";
const SCOPE: &str = "scope";
const BACKEND: &str = "backend";
const HEALTH: &str = "health";
const HOSTS: &str = "hosts";
const CALLERS: &str = "callers";
const SIGN_IN: &str = "sign_in";

/// How the check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// No step failed.
    Well,
    /// A step failed.
    Failed,
    /// The settings cannot be read, so nothing was tried.
    BadSettings,
}

/// How one step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Ok,
    Warn,
    Fail,
    Skipped,
}

/// One step, and what came of it.
#[derive(Debug, Serialize)]
struct Step {
    name: &'static str,
    outcome: Outcome,
    found: String,
    wrong: Option<String>,
    hands: Option<&'static str>,
    remedy: Option<String>,
    /// Ready to be pasted into a shell, but for what stands in `<…>`.
    command: Option<String>,
}

impl Step {
    fn new(name: &'static str, outcome: Outcome, found: impl Into<String>) -> Self {
        Self { name, outcome, found: found.into(), wrong: None, hands: None, remedy: None, command: None }
    }

    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self::new(name, Outcome::Ok, found)
    }

    fn warn(name: &'static str, found: impl Into<String>) -> Self {
        Self::new(name, Outcome::Warn, found)
    }

    fn fail(name: &'static str, found: impl Into<String>) -> Self {
        Self::new(name, Outcome::Fail, found)
    }

    fn skipped(name: &'static str, reason: impl Into<String>) -> Self {
        Self::new(name, Outcome::Skipped, reason)
    }

    /// Not tried, because an earlier step failed.
    fn needs(name: &'static str, failed: &'static str) -> Self {
        Self::skipped(name, format!("not tried: needs `{failed}`"))
    }

    fn wrong(self, wrong: impl Into<String>) -> Self {
        Self { wrong: Some(wrong.into()), ..self }
    }

    fn mend(self, hands: &'static str, remedy: impl Into<String>) -> Self {
        Self { hands: Some(hands), remedy: Some(remedy.into()), ..self }
    }

    fn command(self, command: impl Into<Option<String>>) -> Self {
        Self { command: command.into(), ..self }
    }
}

/// Walks the chain and writes the answer: a line or more for each step as soon as it is done, or one JSON object at the end.
/// Ends within half a minute, whoever hangs.
///
/// # Errors
///
/// When the answer cannot be written.
pub async fn run(vars: &impl Vars, json: bool, out: &mut impl Write) -> io::Result<Verdict> {
    let mut report = Report::new(json, out);
    let bad_settings = match Settings::read(vars) {
        Ok(settings) => {
            walk(&settings, in_kubernetes(vars), &mut report).await?;
            false
        }
        Err(error) => {
            report.add(mistakes(&error))?;
            for name in
                [CREDENTIAL, TOKEN_FILE, DNS, TCP, TLS, CLOCK, TOKEN, SCOPE, BACKEND, HEALTH, HOSTS, CALLERS, SIGN_IN]
            {
                report.add(Step::needs(name, SETTINGS))?;
            }
            true
        }
    };
    let well = report.end()?;
    Ok(match (bad_settings, well) {
        (true, _) => Verdict::BadSettings,
        (false, true) => Verdict::Well,
        (false, false) => Verdict::Failed,
    })
}

async fn walk(settings: &Settings, in_kubernetes: bool, report: &mut Report<'_, impl Write>) -> io::Result<()> {
    report.add(read(settings))?;
    let way = entra::walk(settings, report).await?;
    match way.token {
        Some(token) => {
            let claims = way.claims;
            report.add(entra::scope(settings, claims.as_ref()))?;
            let (backend, health) = backend::ask(settings, token, claims.as_ref()).await;
            report.add(backend)?;
            report.add(health)?;
        }
        None => {
            for name in [SCOPE, BACKEND, HEALTH] {
                report.add(Step::needs(name, TOKEN))?;
            }
        }
    }
    report.add(hosts::step(&settings.web, in_kubernetes, way.namespace.as_deref()))?;
    report.add(callers::step(settings).await)?;
    report.add(callers::sign_in(&settings.inbound))
}

fn mistakes(error: &SettingsError) -> Step {
    let mistakes = error.mistakes();
    let lines: Vec<_> = mistakes.iter().map(ToString::to_string).collect();
    let mut variables: Vec<_> = mistakes.iter().map(|mistake| mistake.variable.as_str()).collect();
    variables.dedup();
    let step = Step::fail(SETTINGS, counted(mistakes.len(), "mistake")).wrong(lines.join("\n"));
    let correct = format!("correct {} in the environment of the server", variables.join(", "));
    match error.likely_cause() {
        None => step.mend(DEPLOYER, correct),
        Some(cause) => step
            .mend(DEPLOYER, format!("{correct}; the likely cause: {cause}"))
            .command("kubectl get deployment azure-wi-webhook-controller-manager --namespace kube-system".to_owned()),
    }
}

fn read(settings: &Settings) -> Step {
    let (backend, scopes) = (&settings.backend.base_url, settings.identity.scopes.join(" "));
    let found = format!("backend `{backend}`, scope `{scopes}`, MCP on {}:{}", settings.web.host, settings.web.port);
    if settings.warnings.is_empty() {
        return Step::ok(SETTINGS, found);
    }
    Step::warn(SETTINGS, found).mend(DEPLOYER, settings.warnings.join("\n"))
}

fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// One word of a shell command, whatever is in it.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// A list in words: `` `a`, `b` ``.
fn listed(words: &[String]) -> String {
    words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn a_word_stays_one_word_in_a_shell() {
        assert_eq!(quoted("system:serviceaccount:a:b"), "'system:serviceaccount:a:b'");
        assert_eq!(quoted("it's $(x)"), r"'it'\''s $(x)'");
    }

    #[tokio::test]
    async fn every_step_has_its_line_even_when_nothing_was_tried() {
        let mut out = Vec::new();
        let verdict = run(&BTreeMap::<String, String>::new(), true, &mut out).await.unwrap();
        assert_eq!(verdict, Verdict::BadSettings);
        let answer: serde_json::Value = serde_json::from_slice(&out).unwrap();
        let steps = answer["steps"].as_array().unwrap();
        assert_eq!((steps.len(), &steps[0]["outcome"], &steps[0]["found"]), (14, &"fail".into(), &"4 mistakes".into()));
        assert!(steps[1..].iter().all(|step| step["outcome"] == "skipped"), "{answer:#}");
    }
}
