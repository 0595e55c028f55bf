//! What stands in for Azure and the backend on a laptop and in the tests: [`entra::StandInEntra`] and
//! [`backend::StandInBackend`], real servers on loopback that can be told to misbehave.
//!
//! Nothing in the server knows them; they meet over HTTP only. The command `mcp-server demo` is in `app`.

pub mod backend;
pub mod entra;
pub mod fault;
mod wire;

use std::fmt;
use std::io;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use secrecy::SecretString;
use serde_json::json;

use self::backend::{BackendOptions, StandInBackend};
use self::entra::{EntraOptions, StandInEntra};
use self::fault::FaultRule;
pub use self::wire::{Counter, digest};
use crate::settings::{Credential, IdentitySettings};

/// How both stand-ins are set up.
#[derive(Debug, Clone, Default)]
pub struct DemoOptions {
    /// The stand-in for Entra ID.
    pub entra: EntraOptions,
    /// Where the backend's routes begin: empty, or a path such as `/api/v1`.
    pub backend_path_prefix: String,
}

/// Both stand-ins, the backend trusting the tokens of that Entra. Dropping it stops both.
pub struct StandIns {
    /// The stand-in for Entra ID.
    pub entra: StandInEntra,
    /// The stand-in for the backend.
    pub backend: StandInBackend,
}

impl StandIns {
    /// Starts both on free ports of loopback.
    ///
    /// # Errors
    /// When a port cannot be bound or a key cannot be made.
    pub async fn start(options: DemoOptions) -> io::Result<Self> {
        let entra = StandInEntra::start(options.entra).await?;
        let backend =
            BackendOptions { path_prefix: options.backend_path_prefix, ..BackendOptions::new(entra.verifier()) };
        Ok(Self { backend: StandInBackend::start(backend).await?, entra })
    }

    /// The settings by which the server gets tokens with the client secret.
    #[must_use]
    pub fn identity_settings(&self) -> IdentitySettings {
        let secret = self.entra.options().client_secrets.first().cloned().unwrap_or_default();
        self.settings_with(Credential::ClientSecret { secret: SecretString::from(secret) })
    }

    /// The settings by which the server gets tokens with a service-account token, which is written to `token_file`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn workload_identity_settings(&self, token_file: &Path) -> io::Result<IdentitySettings> {
        std::fs::write(token_file, self.entra.service_account_token(&json!({})))?;
        Ok(self.settings_with(Credential::WorkloadIdentity { token_file: token_file.to_owned() }))
    }

    fn settings_with(&self, credential: Credential) -> IdentitySettings {
        let options = self.entra.options();
        let resource = options.resources.first().and_then(|resource| resource.identifier_uris.first());
        IdentitySettings {
            tenant_id: options.tenant_id.clone(),
            client_id: options.client_id.clone(),
            authority: self.entra.authority(),
            scopes: resource.map(|uri| format!("{uri}/.default")).into_iter().collect(),
            credential,
            extra_ca_pem: Some(self.entra.ca_pem().to_owned()),
        }
    }
}

/// A fault as the command line has it: `backend=503:0.2`, `backend=slow:1.5`, `entra=down` …
#[derive(Debug, Clone)]
pub struct Fault {
    text: String,
    at_entra: bool,
    kind: FaultKind,
}

#[derive(Debug, Clone)]
enum FaultKind {
    Down,
    Rule(FaultRule),
}

impl Fault {
    /// What may be written, in one line for a help text.
    pub const SYNTAX: &str = "<backend|entra>=<down|hang|slow[:SECONDS]|close[:SHARE]|garbage[:SHARE]|STATUS[:SHARE]>";

    /// Makes the stand-in misbehave from now on, in addition to the faults it already has.
    ///
    /// # Errors
    /// When the stand-in cannot be shut.
    pub async fn apply(&self, stand_ins: &StandIns) -> io::Result<()> {
        match (&self.kind, self.at_entra) {
            (FaultKind::Down, true) => stand_ins.entra.set_down(true).await?,
            (FaultKind::Down, false) => stand_ins.backend.set_down(true).await?,
            (FaultKind::Rule(rule), true) => stand_ins.entra.add_fault(rule.clone()),
            (FaultKind::Rule(rule), false) => stand_ins.backend.add_fault(rule.clone()),
        }
        Ok(())
    }
}

/// Why a text is no [`Fault`].
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}; expected {}, for example `backend=503:0.2`, `backend=slow:1.5` or `entra=down`", Fault::SYNTAX)]
pub struct FaultError {
    why: String,
}

fn unreadable(why: String) -> FaultError {
    FaultError { why }
}

impl FromStr for Fault {
    type Err = FaultError;

    fn from_str(text: &str) -> Result<Self, FaultError> {
        let (target, what) = text.split_once('=').ok_or_else(|| unreadable(format!("`{text}` has no `=`")))?;
        let at_entra = match target {
            "entra" => true,
            "backend" => false,
            other => return Err(unreadable(format!("`{other}` is neither `backend` nor `entra`"))),
        };
        let (what, argument) = what.split_once(':').map_or((what, None), |(what, argument)| (what, Some(argument)));
        let rule = match (what, argument) {
            ("down", None) => return Ok(Self { text: text.to_owned(), at_entra, kind: FaultKind::Down }),
            ("hang", None) => FaultRule::hang(),
            ("down" | "hang", Some(_)) => return Err(unreadable(format!("`{what}` takes no argument"))),
            ("slow", seconds) => FaultRule::delay(seconds.map_or(Ok(Duration::from_secs(2)), parse_seconds)?),
            ("close", _) => with_share(FaultRule::close_before_head(), argument)?,
            ("garbage", _) => with_share(FaultRule::broken_json(), argument)?,
            (status, _) => {
                let code = status.parse().ok().filter(|code| (400..=599).contains(code));
                let code = code.ok_or_else(|| {
                    unreadable(format!("`{status}` is neither a known fault nor a status from 400 to 599"))
                })?;
                let rule = FaultRule::status(code);
                // Entra has its own idea of how long to wait.
                let rule = if code == 429 && !at_entra { rule.header("retry-after", "1") } else { rule };
                with_share(rule, argument)?
            }
        };
        Ok(Self { text: text.to_owned(), at_entra, kind: FaultKind::Rule(rule) })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

fn parse_seconds(text: &str) -> Result<Duration, FaultError> {
    let seconds = text.parse().ok().filter(|seconds| (0.0..=3600.0).contains(seconds));
    let seconds = seconds.ok_or_else(|| unreadable(format!("`{text}` is not a number of seconds from 0 to 3600")))?;
    Ok(Duration::from_secs_f64(seconds))
}

fn with_share(rule: FaultRule, share: Option<&str>) -> Result<FaultRule, FaultError> {
    let Some(text) = share else { return Ok(rule) };
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    Ok(rule.probability(share.ok_or_else(|| unreadable(format!("`{text}` is not a share from 0 to 1")))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read_or_explained() {
        for good in [
            "backend=503:0.2",
            "backend=503",
            "backend=slow:1.5",
            "backend=slow",
            "entra=down",
            "entra=429",
            "backend=hang",
            "backend=close:1",
            "entra=garbage",
        ] {
            assert_eq!(good.parse::<Fault>().unwrap().to_string(), good);
        }
        for (bad, why) in [
            ("503", "`503` has no `=`"),
            ("redis=down", "`redis` is neither `backend` nor `entra`"),
            ("entra=down:1", "`down` takes no argument"),
            ("backend=200", "`200` is neither a known fault nor a status from 400 to 599"),
            ("backend=sluggish", "`sluggish` is neither a known fault nor a status from 400 to 599"),
            ("backend=503:2", "`2` is not a share from 0 to 1"),
            ("backend=503:NaN", "`NaN` is not a share from 0 to 1"),
            ("backend=slow:-1", "`-1` is not a number of seconds from 0 to 3600"),
        ] {
            let error = bad.parse::<Fault>().unwrap_err().to_string();
            assert!(error.starts_with(why) && error.contains("backend=slow:1.5"), "{error}");
        }
    }

    #[tokio::test]
    async fn faults_reach_the_stand_in_they_name() {
        let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
        let health = stand_ins.backend.base_url().join("health").unwrap();
        let client = reqwest::Client::new();
        let ask = || client.get(health.clone()).send();
        assert_eq!(ask().await.unwrap().status(), 401);
        "backend=429".parse::<Fault>().unwrap().apply(&stand_ins).await.unwrap();
        let throttled = ask().await.unwrap();
        assert_eq!((throttled.status().as_u16(), &throttled.headers()["retry-after"]), (429, &"1".parse().unwrap()));
        "backend=down".parse::<Fault>().unwrap().apply(&stand_ins).await.unwrap();
        assert!(ask().await.unwrap_err().is_connect());
    }

    #[tokio::test]
    async fn settings_fit_the_stand_in() {
        let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
        let settings = stand_ins.identity_settings();
        assert_eq!(settings.scopes, [entra::SCOPE]);
        assert_eq!(settings.authority.host_str(), Some("localhost"));
        assert!(settings.extra_ca_pem.unwrap().starts_with("-----BEGIN CERTIFICATE-----"));
        let file = tempfile::NamedTempFile::new().unwrap();
        let settings = stand_ins.workload_identity_settings(file.path()).unwrap();
        assert!(
            matches!(settings.credential, Credential::WorkloadIdentity { token_file } if token_file == file.path())
        );
        assert_eq!(std::fs::read_to_string(file.path()).unwrap().matches('.').count(), 2);
    }
}
