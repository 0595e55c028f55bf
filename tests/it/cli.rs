//! The commands of the real binary: what they print where, and how they end.

use std::collections::BTreeSet;

use mcp_server::demo::{DemoOptions, StandIns};
use serde_json::Value;

use crate::support::process::{Program, parsed};

#[tokio::test]
async fn help_and_version_are_answers_on_stdout() {
    for (arguments, told) in [
        (vec!["--version"], concat!("mcp-server ", env!("CARGO_PKG_VERSION"))),
        (vec!["-V"], concat!("mcp-server ", env!("CARGO_PKG_VERSION"))),
        (vec!["--help"], "healthcheck"),
        (vec!["-h"], "demo"),
        (vec!["help"], "serve"),
        (vec!["demo", "--help"], "--fault"),
        (vec!["check", "--help"], "--json"),
    ] {
        let finished = Program::new(&arguments).run().await;
        assert_eq!((finished.code, finished.stderr.len()), (Some(0), 0), "{arguments:?}: {finished:#?}");
        let stdout = finished.stdout.join("\n");
        assert!(stdout.contains(told), "{arguments:?}: {stdout}");
    }
}

#[tokio::test]
async fn bad_usage_is_a_complaint_on_stderr() {
    for (arguments, told) in [
        (vec!["frobnicate"], "frobnicate"),
        (vec!["--nope"], "--nope"),
        (vec!["serve", "extra"], "extra"),
        (vec!["healthcheck", "dead"], "ready"),
        (vec!["check", "--yaml"], "--yaml"),
        (vec!["demo", "--fault"], "--fault"),
        (vec!["demo", "--fault", "backend=sluggish"], "sluggish"),
        (vec!["demo", "--fault", "redis=down"], "backend=slow:1.5"),
    ] {
        let finished = Program::new(&arguments).run().await;
        assert_eq!((finished.code, finished.stdout.len()), (Some(64), 0), "{arguments:?}: {finished:#?}");
        assert!(finished.stderr.join("\n").contains(told), "{arguments:?}: {finished:#?}");
    }
}

#[tokio::test]
async fn a_port_that_is_taken_ends_the_start_with_the_variable_to_change() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let number = taken.local_addr().unwrap().port().to_string();
    let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
    for variable in ["PORT", "METRICS_PORT"] {
        for program in [Program::demo(&[]), Program::serve(&stand_ins)] {
            let finished = program.env(variable, &number).run().await;
            assert_eq!(finished.code, Some(1), "{finished:#?}");
            let said = finished.stderr.join("\n") + &finished.stdout.join("\n");
            let told =
                format!("cannot listen on 127.0.0.1:{number}, as HOST and {variable} ask: Address already in use");
            assert!(said.contains(&told), "{told}: {finished:#?}");
        }
    }
}

#[tokio::test]
async fn a_health_check_tells_by_its_exit_code_how_the_server_is() {
    let check = async |arguments: &[&str], port: &str| {
        let finished = Program::new(&[&["healthcheck"], arguments].concat()).env("PORT", port).run().await;
        (finished.code, finished.stderr.join("\n"))
    };
    let healthy = Program::demo(&[]).start();
    healthy.stdout.line("Ctrl-C stops it").await;
    let port = healthy.address().await.port().to_string();
    for probe in [&["live"][..], &["ready"], &[]] {
        assert_eq!(check(probe, &port).await, (Some(0), String::new()));
    }

    let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
    stand_ins.entra.set_down(true).await.unwrap();
    let without_entra = Program::serve(&stand_ins).start();
    let port = without_entra.address().await.port().to_string();
    assert_eq!(check(&["live"], &port).await.0, Some(0));
    let (code, complaint) = check(&["ready"], &port).await;
    assert_eq!(code, Some(1));
    assert!(complaint.contains("503") && complaint.contains(&port), "{complaint}");

    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    assert_eq!(check(&["live"], &nobody).await.0, Some(1));
    assert_eq!(check(&["live"], "0").await.0, Some(78));
}

#[tokio::test]
async fn the_demo_does_not_run_in_kubernetes() {
    let finished = Program::demo(&[]).env("KUBERNETES_SERVICE_HOST", "10.0.0.1").run().await;
    assert_eq!((finished.code, finished.stdout.len()), (Some(64), 0), "{finished:#?}");
    assert!(finished.stderr.join("\n").contains("does not run in Kubernetes"), "{finished:#?}");
}

#[tokio::test]
async fn the_demo_makes_its_call_shows_how_to_make_more_and_stays_on_loopback() {
    let demo = Program::demo(&["--fault", "backend=slow:0.1"]).env("HOST", "0.0.0.0").start();
    demo.stdout.line("From now on: backend=slow:0.1").await;
    let client = demo.client().await;
    let printed = demo.stdout.so_far();
    let after = |beginning: &str| {
        let line = printed.iter().find(|line| line.trim_start().starts_with(beginning));
        line.unwrap_or_else(|| panic!("no `{beginning}` in {printed:#?}")).trim()
    };

    let result = parsed(after("<-").trim_start_matches("<- "));
    assert_eq!(result["id"], "42");
    assert!(after("->").contains("get_user_profile"));
    let url = format!("http://{}/mcp", client.address);
    assert_eq!(after("MCP endpoint").split_whitespace().last(), Some(&*url));
    assert_eq!(parsed(after("{\"servers\"")).pointer("/servers/mcp-server-demo/url"), Some(&Value::from(&*url)));
    let claude = parsed(after("{\"mcpServers\""));
    assert!(claude.pointer("/mcpServers/mcp-server-demo/args").unwrap().to_string().contains(&url));

    assert!(after("curl -s").contains(&url));
    let body = after("-d '").trim_start_matches("-d '").trim_end_matches('\'');
    let request = client.http.post(&url).header("content-type", "application/json");
    let request = request.header("accept", "application/json, text/event-stream").body(body.to_owned());
    let answer = request.send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let answer = parsed(&answer.text().await.unwrap());
    assert_eq!(answer["result"]["structuredContent"]["items"].as_array().map(Vec::len), Some(3), "{answer}");

    assert_eq!(addresses_listened_on(demo.id()), BTreeSet::from(["0100007F".to_owned()]));
    demo.signal("INT");
    assert_eq!(demo.ended().await.code, Some(0));
}

/// The addresses of the process's listening sockets, as Linux writes them.
fn addresses_listened_on(process: u32) -> BTreeSet<String> {
    let sockets: BTreeSet<_> = std::fs::read_dir(format!("/proc/{process}/fd"))
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok()?.to_str().map(str::to_owned))
        .collect();
    let table = |name| std::fs::read_to_string(format!("/proc/{process}/net/{name}")).unwrap_or_default();
    let (tcp, tcp6) = (table("tcp"), table("tcp6"));
    let rows = tcp.lines().chain(tcp6.lines()).map(|row| row.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row.get(3) == Some(&"0A") && sockets.contains(&format!("socket:[{}]", row[9])))
        .map(|row| row[1].split(':').next().unwrap().to_owned())
        .collect()
}
