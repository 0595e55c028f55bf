//! How the real binary takes its settings: from the environment and `.env`, with every mistake told at once; and that the
//! documents say the same as the table.

use mcp_server::demo::entra::{CLIENT_ID, CLIENT_SECRET, TENANT_ID};
use mcp_server::demo::{DemoOptions, StandIns};
use mcp_server::settings::VARIABLES;
use serde_json::Value;

use crate::support::process::{Finished, Program, parsed};

/// `serve` with settings that are good, and lead nowhere.
fn offline() -> Program {
    Program::new(&["serve"])
        .env("AZURE_TENANT_ID", TENANT_ID)
        .env("AZURE_CLIENT_ID", CLIENT_ID)
        .env("AZURE_CLIENT_SECRET", CLIENT_SECRET)
        .env("AZURE_AUTHORITY_HOST", "https://127.0.0.1:1")
        .env("AZURE_SCOPES", "api://backend/.default")
        .env("BACKEND_API_URL", "http://127.0.0.1:1")
        .env("HOST", "127.0.0.1")
        .env("PORT", "0")
        .env("METRICS_PORT", "0")
        .env("DRAIN_DELAY", "0")
}

/// Runs it until it serves, then ends it.
async fn served(program: Program) -> Finished {
    let running = program.start();
    running.address().await;
    running.signal("TERM");
    let finished = running.ended().await;
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    finished
}

fn warnings(log: &[Value]) -> Vec<&str> {
    let warnings = log.iter().filter(|line| line["level"] == "WARNING" && line["logger"] == "mcp_server::app");
    warnings.map(|line| line["message"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn every_mistake_is_told_at_once_on_stderr_before_anything_is_bound() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let finished = Program::new(&[])
        .env("AZURE_TENANT_ID", "common")
        .env("AZURE_AUTHORITY_HOST", "http://login.example")
        .env("AZURE_CLIENT_SECRET", "canary-of-the-secret")
        .env("AZURE_SCOPES", "api://backend")
        .env("BACKEND_API_TIMEOUT", "-1")
        .env("LOG_LEVEL", "LOUD=9")
        .env("DEBUG", "perhaps")
        .env("HOST", "127.0.0.1")
        .env("PORT", &taken.local_addr().unwrap().port().to_string())
        .env("METRICS_PORT", "99999")
        .env("SHUTDOWN_GRACE", "soon")
        .run()
        .await;
    assert_eq!((finished.code, &finished.stdout), (Some(78), &Vec::new()), "{finished:#?}");
    let stderr = finished.stderr.join("\n");
    for name in [
        "AZURE_TENANT_ID",
        "AZURE_CLIENT_ID",
        "AZURE_AUTHORITY_HOST",
        "AZURE_SCOPES",
        "BACKEND_API_URL",
        "BACKEND_API_TIMEOUT",
        "LOG_LEVEL",
        "DEBUG",
        "METRICS_PORT",
        "SHUTDOWN_GRACE",
    ] {
        let lines = finished.stderr.iter().filter(|line| line.trim_start().starts_with(&format!("{name}: "))).count();
        assert_eq!(lines, 1, "{name} in {stderr}");
    }
    assert!(stderr.starts_with("10 mistakes in the settings:"), "{stderr}");
    assert!(!stderr.contains("canary"), "{stderr}");
}

#[tokio::test]
async fn a_dot_env_file_fills_what_the_environment_leaves_open() {
    let other = "00000000-0000-4000-8000-000000000000";
    let file = format!("# comment\nAZURE_TENANT_ID={other}\nAZURE_CLIENT_ID='{CLIENT_ID}'\nLOG_LEVEL=debug\n");
    let log = served(offline().without("AZURE_CLIENT_ID").env("LOG_LEVEL", "").file(".env", &file)).await.log();
    let choice = log.iter().find(|line| line["identity.client_id"].is_string()).unwrap();
    assert_eq!(choice["identity.client_id"], CLIENT_ID, "from the file");
    assert_eq!(choice["identity.tenant_id"], TENANT_ID, "the environment wins");
    assert!(log.iter().any(|line| line["level"] == "DEBUG"), "empty means unset: {log:#?}");
}

#[tokio::test]
async fn a_broken_dot_env_file_is_one_of_the_mistakes() {
    let finished = offline().without("AZURE_CLIENT_ID").file(".env", "DEBUG=false\nnot a setting\n").run().await;
    assert_eq!(finished.code, Some(78));
    let stderr = finished.stderr.join("\n");
    assert!(stderr.contains(".env line 2") && stderr.contains("AZURE_CLIENT_ID: "), "{stderr}");
    assert!(!stderr.contains("not a setting"), "{stderr}");
}

#[tokio::test]
async fn what_is_legal_but_unwise_is_warned_of_once_at_the_start() {
    let finished = served(
        offline()
            .without("AZURE_SCOPES")
            .env("ALLOWED_HOSTS", "*")
            .env("BACKEND_API_URL", "http://backend.invalid/api")
            .env("AZURE_FEDERATED_TOKEN_FILE", "/nowhere/token"),
    )
    .await;
    let log = finished.log();
    let warnings = warnings(&log);
    for beginning in ["AZURE_SCOPES is ", "ALLOWED_HOSTS is ", "BACKEND_API_URL is ", "AZURE_FEDERATED_TOKEN_FILE is "]
    {
        assert_eq!(warnings.iter().filter(|text| text.starts_with(beginning)).count(), 1, "{warnings:#?}");
    }
    assert_eq!(warnings.len(), 4, "{warnings:#?}");
    let sensible = served(offline()).await.log();
    assert_eq!(self::warnings(&sensible), [""; 0]);
}

#[tokio::test]
async fn the_credential_follows_the_token_file_and_is_told_once() {
    for (file_variable, file_exists, secret, expected, warns) in [
        (true, true, false, "workload identity", false),
        (true, true, true, "workload identity", false),
        (true, false, true, "client secret", true),
        (false, false, true, "client secret", false),
    ] {
        let mut program = offline();
        let path = program.path("token").to_str().unwrap().to_owned();
        if file_variable {
            program = program.env("AZURE_FEDERATED_TOKEN_FILE", &path);
        }
        if file_exists {
            program = program.file("token", "header.payload.signature");
        }
        if !secret {
            program = program.without("AZURE_CLIENT_SECRET");
        }
        let log = served(program).await.log();
        let choices: Vec<_> = log.iter().filter(|line| line["identity.authority"].is_string()).collect();
        assert_eq!(choices.len(), 1, "{log:#?}");
        let choice = choices[0];
        assert_eq!((&choice["level"], &choice["identity.credential"]), (&"INFO".into(), &expected.into()), "{choice}");
        for told in [expected, TENANT_ID, CLIENT_ID, "https://127.0.0.1:1"] {
            assert!(choice["message"].as_str().unwrap().contains(told), "{told} in {choice}");
        }
        assert_eq!(choice["identity.token_file"].as_str(), file_exists.then_some(&*path));
        assert_eq!(warnings(&log).iter().any(|text| text.contains(&path)), warns, "{log:#?}");
        assert!(!log.iter().any(|line| line.to_string().contains(CLIENT_SECRET)));
    }
}

#[tokio::test]
async fn without_any_credential_the_settings_are_refused_with_what_each_would_need() {
    for file in ["", "/nowhere/token"] {
        let finished = offline().without("AZURE_CLIENT_SECRET").env("AZURE_FEDERATED_TOKEN_FILE", file).run().await;
        assert_eq!((finished.code, finished.stdout.len()), (Some(78), 0), "{finished:#?}");
        let stderr = finished.stderr.join("\n");
        assert!(stderr.contains("AZURE_FEDERATED_TOKEN_FILE") && stderr.contains("AZURE_CLIENT_SECRET"), "{stderr}");
    }
}

#[tokio::test]
async fn a_private_authority_is_trusted_through_ssl_cert_file_and_only_then() {
    let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
    let trusting = Program::serve(&stand_ins).start();
    trusting.client().await.until_ready().await;

    let strangers = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap().cert.pem();
    let distrusting = Program::serve(&stand_ins).file("ca.pem", &strangers).start();
    let failure = parsed(&distrusting.stdout.line("calls to the backend fail").await);
    assert_eq!((&failure["level"], &failure["error.class"]), (&"ERROR".into(), &"tls".into()), "{failure}");
    assert!(failure["message"].as_str().unwrap().contains("SSL_CERT_FILE"), "{failure}");
}

#[tokio::test]
async fn what_the_libraries_could_not_use_is_a_mistake_that_names_variable_and_value() {
    let authority = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap().cert.pem();
    let path = |program: &Program, name: &str| program.path(name).to_str().unwrap().to_owned();
    for (variable, value, good) in [
        ("SSL_CERT_FILE", "ca.pem", true),
        ("SSL_CERT_FILE", "missing.pem", false),
        ("SSL_CERT_FILE", "empty.pem", false),
        ("SSL_CERT_FILE", ".", false),
        ("SSL_CERT_FILE", "", false),
        ("SSL_CERT_DIR", ".", true),
        ("SSL_CERT_DIR", "missing", false),
        ("SSL_CERT_DIR", "ca.pem", false),
        ("HTTPS_PROXY", "http://proxy.example:3128", true),
        ("HTTPS_PROXY", "proxy.example:3128", true),
        ("ALL_PROXY", "https://user:canary@proxy.example", true),
        ("HTTPS_PROXY", "http://", false),
        ("https_proxy", "http://user:canary@", false),
        ("HTTPS_PROXY", "two words", false),
        ("ALL_PROXY", "socks5://proxy.example:1080", false),
        ("all_proxy", "ftp://proxy.example", false),
    ] {
        let program = offline().file("ca.pem", &authority).file("empty.pem", "");
        let is_path = variable.starts_with("SSL") && !value.is_empty();
        let value = if is_path { path(&program, value) } else { value.to_owned() };
        let program = program.env(variable, &value);
        if good {
            served(program).await;
            continue;
        }
        let finished = program.run().await;
        assert_eq!((finished.code, finished.stdout.len()), (Some(78), 0), "{variable}={value}: {finished:#?}");
        let stderr = finished.stderr.join("\n");
        assert!(stderr.starts_with(&format!("1 mistake in the settings:\n  {variable}: ")), "{stderr}");
        assert!(stderr.contains(if value.contains("canary") { "…@" } else { &value }), "{stderr}");
        assert!(!stderr.contains("canary"), "{stderr}");
    }
}

#[tokio::test]
async fn a_pod_without_the_webhooks_variables_is_told_of_the_webhook() {
    let pod = || {
        let pod = Program::new(&["serve"]).env("KUBERNETES_SERVICE_HOST", "10.0.0.1");
        pod.env("BACKEND_API_URL", "http://127.0.0.1:1")
    };
    for (program, told) in [
        (pod(), true),
        (pod().env("AZURE_CLIENT_SECRET", CLIENT_SECRET), false),
        (pod().env("AZURE_FEDERATED_TOKEN_FILE", "/nowhere/token"), false),
        (pod().without("KUBERNETES_SERVICE_HOST"), false),
    ] {
        let finished = program.run().await;
        let stderr = finished.stderr.join("\n");
        assert_eq!((finished.code, stderr.contains("workload identity webhook")), (Some(78), told), "{stderr}");
    }
}

#[tokio::test]
async fn a_proxy_is_for_the_way_to_entra_only() {
    let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
    let nobody = "http://127.0.0.1:1";
    let proxied = |variable: &str| Program::serve(&stand_ins).env(variable, nobody);
    for program in [proxied("HTTP_PROXY"), proxied("http_proxy"), proxied("HTTPS_PROXY").env("NO_PROXY", "localhost")] {
        program.start().client().await.until_ready().await;
    }
    for variable in ["HTTPS_PROXY", "ALL_PROXY"] {
        let lost = proxied(variable).start();
        let failure = parsed(&lost.stdout.line("calls to the backend fail").await);
        assert!(failure["message"].as_str().unwrap().contains("HTTPS_PROXY"), "{failure}");
    }
    assert_eq!(stand_ins.entra.token_request_count().get(), 3);
}

#[test]
fn the_readme_lists_exactly_the_variables_that_exist() {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let (_, rest) = readme.split_once("<!-- settings:begin -->").expect("README.md has no `settings:begin`");
    let (found, _) = rest.split_once("<!-- settings:end -->").expect("README.md has no `settings:end`");
    let found: Vec<_> = found.lines().map(str::trim).filter(|line| line.starts_with("| `")).collect();
    let right: Vec<_> = VARIABLES
        .iter()
        .map(|variable| {
            let default = variable.default.map_or_else(|| "–".to_owned(), |default| format!("`{default}`"));
            let required = if variable.required { "yes" } else { "no" };
            format!("| `{}` | {} | {default} | {required} |", variable.name, variable.meaning)
        })
        .collect();
    assert!(
        found == right,
        "README.md differs from `settings::VARIABLES`; between the markers should stand:\n\n\
         | Variable | Meaning | Default | Required |\n|---|---|---|---|\n{}\n",
        right.join("\n"),
    );
}

#[test]
fn the_example_file_lists_exactly_the_variables_that_exist() {
    let example = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/.env.example")).unwrap();
    let (example, _) = example.split_once("# --- Read by libraries ---").unwrap();
    let found: Vec<_> = example.lines().filter(|line| is_setting(line)).collect();
    let right: Vec<_> = VARIABLES
        .iter()
        .map(|variable| {
            let mark = if variable.required { "" } else { "#" };
            format!("{mark}{}={}", variable.name, variable.default.unwrap_or_default())
        })
        .collect();
    assert!(
        found == right,
        ".env.example differs from `settings::VARIABLES`; its settings should be:\n\n{}\n",
        right.join("\n")
    );
}

fn is_setting(line: &str) -> bool {
    let name = line.trim_start_matches('#').split('=').next().unwrap_or_default();
    line.contains('=') && !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_')
}
