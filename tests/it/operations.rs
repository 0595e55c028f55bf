//! What operators are given, held against the server and each other: alert rules, their tests, the dashboard and the runbook. The
//! expressions themselves are `promtool`'s and a Prometheus' to judge: `scripts/observe`.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use crate::support::TestApp;

fn read(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

fn rules() -> Vec<Value> {
    let rules: Value = serde_yaml_ng::from_str(&read("helm/mcp-server-chart/files/rules/mcp-server.yaml")).unwrap();
    let groups = rules["groups"].as_array().unwrap();
    groups.iter().flat_map(|group| group["rules"].as_array().unwrap().clone()).collect()
}

fn names(rules: &[Value], key: &str) -> BTreeSet<String> {
    rules.iter().filter_map(|rule| rule[key].as_str()).map(str::to_owned).collect()
}

fn dashboard() -> Value {
    serde_json::from_str(&read("helm/mcp-server-chart/files/dashboards/mcp-server.json")).unwrap()
}

fn panels(dashboard: &Value) -> Vec<&Value> {
    dashboard["panels"].as_array().unwrap().iter().filter(|panel| panel["type"] != "row").collect()
}

/// Every word of a text that looks like a metric of ours.
fn metrics_in(text: &str) -> BTreeSet<String> {
    const OURS: [&str; 6] = ["mcp_server_", "mcp_server:", "http_server_", "http_client_", "process_", "tokio_"];
    text.split(|c: char| !c.is_ascii_alphanumeric() && !matches!(c, '_' | ':'))
        .filter(|word| OURS.iter().any(|ours| word.starts_with(ours)) && !word.contains("::"))
        .map(str::to_owned)
        .collect()
}

#[tokio::test]
async fn every_metric_that_operators_read_of_is_exported_and_every_one_exported_is_explained() {
    let scrape = TestApp::spawn().await.scrape().await;
    let exported = scrape.names();
    let rules = rules();
    let known: BTreeSet<String> = exported.union(&names(&rules, "record")).cloned().collect();

    let dashboard = dashboard();
    let queries = panels(&dashboard).into_iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    let runbook = read("docs/operations.md");
    for (place, text) in [
        ("the rules", rules.iter().map(|rule| rule["expr"].as_str().unwrap()).collect::<Vec<_>>().join("\n")),
        ("the dashboard", queries.map(|query| query["expr"].as_str().unwrap()).collect::<Vec<_>>().join("\n")),
        ("the dashboard's variables", dashboard["templating"].to_string()),
    ] {
        let found = metrics_in(&text);
        assert!(!found.is_empty(), "{place}");
        let unknown: Vec<_> = found.difference(&known).collect();
        assert!(unknown.is_empty(), "{place} ask for {unknown:?}, which nothing exports");
    }
    // A text may call a histogram by the name that its series have in common.
    let explained = metrics_in(&runbook);
    let explainable: BTreeSet<_> = known.iter().chain(scrape.types.keys()).cloned().collect();
    let unknown: Vec<_> = explained.difference(&explainable).collect();
    assert!(unknown.is_empty(), "docs/operations.md speaks of {unknown:?}, which nothing exports");
    for (family, kind) in &scrape.types {
        let name = if kind == "counter" { format!("{family}_total") } else { family.clone() };
        assert!(explained.contains(&name), "docs/operations.md does not explain `{name}`");
    }
}

#[test]
fn every_alert_says_what_is_wrong_and_has_its_section_and_its_test() {
    let rules = rules();
    let runbook = read("docs/operations.md");
    let sections: BTreeSet<String> =
        runbook.lines().filter_map(|line| line.strip_prefix("### Mcp")).map(|rest| format!("Mcp{rest}")).collect();
    let alerts = names(&rules, "alert");
    assert_eq!(alerts, sections, "alerts, and the sections of docs/operations.md");
    for rule in rules.iter().filter(|rule| rule["alert"].is_string()) {
        let alert = rule["alert"].as_str().unwrap();
        let anchor = format!("docs/operations.md#{}", alert.to_lowercase());
        assert_eq!(rule["annotations"]["runbook_url"], *anchor, "{alert}");
        assert!(["critical", "warning"].contains(&rule["labels"]["severity"].as_str().unwrap()), "{alert}");
        for annotation in ["summary", "description"] {
            assert!(rule["annotations"][annotation].as_str().unwrap().len() > 10, "{alert}: {annotation}");
        }
        let section = runbook.split(&format!("\n### {alert}\n")).nth(1).unwrap();
        let section = section.split("\n#").next().unwrap();
        for part in ["**Means**", "**Look at**", "**do", "."] {
            let has = section.to_lowercase().contains(&part.to_lowercase());
            assert!(has, "the section of {alert} has no {part}");
        }
    }
    let tests = read("helm/tests/rules.yaml");
    for alert in &alerts {
        let raised = format!(r#"ALERTS{{alertname="{alert}", alertstate="firing""#);
        assert!(tests.contains(&raised), "no test raises {alert}");
    }
}

#[test]
fn every_panel_says_what_it_shows_in_which_unit_from_the_chosen_source() {
    let dashboard = dashboard();
    let panels = panels(&dashboard);
    let mut ids = BTreeSet::new();
    for panel in &panels {
        let title = panel["title"].as_str().unwrap();
        assert!(panel["description"].as_str().unwrap().len() > 10, "{title}");
        assert!(!panel["fieldConfig"]["defaults"]["unit"].as_str().unwrap().is_empty(), "{title}");
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title}: an id that another panel has");
        for target in panel["targets"].as_array().unwrap() {
            assert_eq!(target["datasource"]["uid"], "${datasource}", "{title}");
            assert!(target["expr"].as_str().unwrap().contains("$namespace"), "{title}: not of the chosen namespace");
        }
    }
    assert!(panels.len() > 30, "{}", panels.len());
}
