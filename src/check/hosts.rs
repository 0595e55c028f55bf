//! Which `Host` values `/mcp` accepts, and whether those are the names that clients will use.

use super::{DEPLOYER, HOSTS, Step, listed};
use crate::settings::WebSettings;

/// The chart's name for the service.
const SERVICE: &str = "mcp-server";

pub(super) fn step(web: &WebSettings, in_kubernetes: bool, namespace: Option<&str>) -> Step {
    let Some(hosts) = &web.allowed_hosts else {
        return Step::ok(HOSTS, "`/mcp` accepts any `Host`: the guard against DNS rebinding is off");
    };
    let found = format!("`/mcp` accepts the `Host` {}, and answers 403 to any other", listed(hosts));
    if !in_kubernetes || !hosts.iter().all(|host| is_loopback(host)) {
        return Step::ok(HOSTS, found);
    }
    let namespace = namespace.unwrap_or("<namespace>");
    Step::warn(HOSTS, found)
        .wrong("This runs in Kubernetes, but only names of this very machine are accepted: calls through a service or a route get 403")
        .mend(
            DEPLOYER,
            format!(
                "set ALLOWED_HOSTS to the names that clients use, such as `{SERVICE},{SERVICE}.{namespace},\
                 {SERVICE}.{namespace}.svc,{SERVICE}.{namespace}.svc.cluster.local` for the service `{SERVICE}`, and the host names of your routes"
            ),
        )
}

/// With or without a port.
fn is_loopback(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') => name,
        _ => host,
    };
    name == "localhost" || name == "[::1]" || name.starts_with("127.")
}

#[cfg(test)]
mod tests {
    use super::super::Outcome;
    use super::*;

    #[test]
    fn names_of_this_machine_alone_are_too_few_in_a_cluster() {
        let step = |hosts: Option<&[&str]>, in_kubernetes| {
            let allowed_hosts = hosts.map(|hosts| hosts.iter().map(|&host| host.to_owned()).collect());
            step(&WebSettings { allowed_hosts, ..WebSettings::default() }, in_kubernetes, Some("mcp-system"))
        };
        let loopback: &[&str] = &["localhost:8000", "127.0.0.1", "[::1]", "[::1]:80"];
        for (hosts, in_kubernetes, outcome) in [
            (Some(loopback), false, Outcome::Ok),
            (Some(loopback), true, Outcome::Warn),
            (Some(&["localhost", "mcp-server.mcp-system.svc"]), true, Outcome::Ok),
            (None, true, Outcome::Ok),
        ] {
            assert_eq!(step(hosts, in_kubernetes).outcome, outcome, "{hosts:?}");
        }
        let remedy = step(Some(loopback), true).remedy.unwrap();
        assert!(remedy.contains("mcp-server.mcp-system.svc.cluster.local"), "{remedy}");
    }
}
