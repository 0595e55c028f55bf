//! The house stays as `ARCHITECTURE.md` draws it: which room may use which, and who may speak with the world outside.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Which rooms each room may use, and needs. The leaves are at the end.
const ARROWS: &[(&str, &[&str])] = &[
    ("main", &["app", "check", "settings", "telemetry", "web"]),
    ("app", &["auth", "backend", "demo", "identity", "settings", "telemetry", "tools", "web"]),
    ("web", &["auth", "json", "memory", "problem", "settings", "telemetry", "tools", "visible"]),
    ("tools", &["auth", "backend", "json", "memory", "problem", "telemetry", "visible"]),
    ("check", &["auth", "backend", "identity", "settings", "telemetry"]),
    ("auth", &["problem", "settings", "telemetry"]),
    ("backend", &["identity", "json", "memory", "settings", "telemetry", "visible"]),
    ("identity", &["settings"]),
    ("demo", &["settings"]),
    ("settings", &[]),
    ("telemetry", &["problem", "settings", "visible"]),
    ("json", &[]),
    ("memory", &[]),
    ("problem", &["telemetry", "visible"]),
    ("visible", &[]),
];

/// Arrows that reach no further than these paths.
const NARROW: &[(&str, &str, &[&str])] = &[
    ("main", "web", &["healthcheck"]),
    ("check", "telemetry", &["metrics::Metrics"]),
    ("check", "auth", &["inspect"]),
    ("auth", "problem", &["Problem"]),
    ("auth", "telemetry", &["audit::Subject"]),
    ("tools", "auth", &["Caller", "Permission", "StepUp"]),
    ("web", "tools", &["Head", "Permits", "ToolServer", "Written"]),
    ("telemetry", "problem", &["ErrorCode"]),
    ("telemetry", "settings", &["AuditSettings", "LogSettings", "RootSampler", "Sampling", "TraceSettings"]),
    ("problem", "telemetry", &["trace::TraceId"]),
    ("backend", "visible", &["is_invisible"]),
    ("telemetry", "visible", &["is_invisible"]),
];

/// Crates that are the affair of some rooms only.
const CRATES: &[(&[&str], &[&str])] = &[
    (&["axum", "hyper", "hyper_util", "tower_http"], &["src/web", "src/demo"]),
    (&["tower"], &["src/backend.rs", "src/web"]),
    (&["rmcp"], &["src/tools", "src/web.rs"]),
    (&["reqwest"], &["src/app", "src/auth", "src/backend", "src/identity", "src/demo", "src/telemetry/spans"]),
    (&["azure_core", "azure_identity"], &["src/identity"]),
    (&["backoff"], &["src/backend/retry.rs"]),
    (&["prometheus_client"], &["src/telemetry/metrics"]),
    (&["procfs"], &["src/telemetry/metrics/process.rs"]),
    (&["rustix"], &["src/app/descriptors.rs", "src/telemetry/audit/room.rs", "src/web/listener.rs"]),
    (&["tracing_subscriber"], &["src/telemetry/logs", "src/settings/parse.rs"]),
    (&["tracing_core", "tracing_log"], &["src/telemetry/logs"]),
    (&["opentelemetry", "opentelemetry_http", "opentelemetry_otlp", "opentelemetry_sdk"], &["src/telemetry/spans"]),
    (&["aws_lc_rs"], &["src/demo", "src/telemetry/audit"]),
    (&["percent_encoding"], &["src/backend/segment.rs", "src/settings/parse.rs"]),
    (&["dotenvy"], &["src/settings"]),
    (&["icu_properties"], &["src/visible.rs"]),
    (&["validator"], &["src/tools"]),
    (&["schemars"], &["src/backend", "src/tools"]),
    (&["clap"], &["src/main.rs", "src/app/demo.rs", "src/web/healthcheck.rs"]),
    (&["jsonwebtoken"], &["src/auth", "src/demo"]),
    (&["rcgen", "tokio_rustls"], &["src/demo"]),
    (&["sha2"], &["src/auth/proven.rs", "src/demo", "src/identity/on_behalf_of.rs"]),
    (&["base64"], &["src/demo", "src/web/guard.rs"]),
    (&["quick_cache"], &["src/auth/proven.rs", "src/identity/on_behalf_of.rs", "src/web/rate.rs"]),
    (&["ipnet"], &["src/settings", "src/web"]),
    (&["std::env", "env"], &["src/settings"]),
];

/// Files that are tests as a whole, or help them: no release holds them.
const UNSHIPPED: &[&str] = &["benching", "check", "fuzzing", "properties", "simulated", "simulation", "tests"];

/// A file of `src/`, without its tests and comments.
struct Source {
    path: String,
    code: String,
}

impl Source {
    fn all() -> Vec<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut files = Vec::new();
        collect(&root.join("src"), &mut files);
        let sources: Vec<_> = files
            .into_iter()
            .map(|file| {
                let path = file.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
                Self { code: code_of(&std::fs::read_to_string(&file).unwrap()), path }
            })
            .filter(|source| !UNSHIPPED.iter().any(|name| source.path.ends_with(&format!("/{name}.rs"))))
            .collect();
        assert!(sources.len() > 30, "the sources are where they should be");
        sources
    }

    fn room(&self) -> &str {
        self.path["src/".len()..].split(['/', '.']).next().unwrap()
    }

    /// What follows each `root::` in the code, as far as it is a path; lists in braces are taken apart.
    fn paths_from(&self, root: &str) -> Vec<String> {
        let start = format!("{root}::");
        let inside = |c: char| c.is_alphanumeric() || matches!(c, '_' | ':' | '"');
        let begins_a_path = |at: usize| !self.code[..at].ends_with(inside);
        self.code
            .match_indices(&start)
            .filter(|(at, _)| begins_a_path(*at))
            .flat_map(|(at, _)| branches(&self.code[at + start.len()..]))
            .collect()
    }
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// Up to the test modules, which come last, and without comments.
fn code_of(text: &str) -> String {
    let tests = text.match_indices("#[cfg(test)]\n").find(|(at, mark)| {
        let declaration = text[at + mark.len()..].lines().find(|line| !line.starts_with("#["));
        declaration.is_some_and(|line| line.ends_with('{'))
    });
    let code = tests.map_or(text, |(at, _)| &text[..at]);
    code.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// The paths that a `use` tree, or a path in code, stands for.
fn branches(text: &str) -> Vec<String> {
    if let Some(list) = text.strip_prefix('{') {
        return list_items(list).iter().flat_map(|item| branches(item)).collect();
    }
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    match rest.strip_prefix("::") {
        Some(rest) => branches(rest).into_iter().map(|branch| format!("{name}::{branch}")).collect(),
        None => vec![name.to_owned()],
    }
}

/// The items of a list in braces whose first brace is already read.
fn list_items(list: &str) -> Vec<String> {
    let (mut items, mut depth) = (vec![String::new()], 0);
    for character in list.chars() {
        match character {
            '}' if depth == 0 => break,
            ',' if depth == 0 => items.push(String::new()),
            _ => {
                depth += i32::from(character == '{') - i32::from(character == '}');
                items.last_mut().unwrap().push(character);
            }
        }
    }
    items.iter().map(|item| item.trim().to_owned()).filter(|item| !item.is_empty()).collect()
}

#[test]
fn rooms_use_only_the_rooms_below_them() {
    let mut used = BTreeSet::new();
    for source in Source::all() {
        let room = source.room().to_owned();
        let paths = source.paths_from("crate").into_iter().chain(source.paths_from("mcp_server"));
        for path in paths.filter(|_| room != "lib") {
            let (target, inner) = path.split_once("::").unwrap_or((&path, ""));
            if target == room {
                continue;
            }
            let allowed = ARROWS.iter().find(|(from, _)| *from == room).map_or(&[][..], |(_, to)| to);
            assert!(allowed.contains(&target), "{}: `{room}` may not use `{target}` (`{path}`)", source.path);
            for (_, _, reach) in NARROW.iter().filter(|(from, to, _)| (*from, *to) == (&*room, target)) {
                assert!(
                    reach.iter().any(|reached| inner.starts_with(reached)),
                    "{}: `{room}` may use of `{target}` no more than {reach:?} (`{path}`)",
                    source.path
                );
            }
            used.insert((room.clone(), target.to_owned()));
        }
    }
    for (from, to) in ARROWS.iter().flat_map(|(from, to)| to.iter().map(move |to| (*from, *to))) {
        assert!(used.contains(&(from.to_owned(), to.to_owned())), "nobody needs the arrow from `{from}` to `{to}`");
    }
}

#[test]
fn crates_stay_in_their_rooms() {
    for source in Source::all() {
        for (crates, places) in CRATES {
            for name in crates.iter().filter(|_| !places.iter().any(|place| source.path.starts_with(place))) {
                let found = source.paths_from(name);
                assert!(found.is_empty(), "{}: `{name}` belongs to {places:?} only ({found:?})", source.path);
            }
        }
    }
}

#[test]
fn the_scan_sees_what_it_should() {
    let code = "use crate::{auth::Caller, web::{self, Health}};\n// crate::comment\nlet x = crate::demo::run();\nnot_crate::x\n\"crate::text\"\n\
                use std::env;\n#[cfg(test)]\n#[cfg(feature = \"demo\")]\nmod tests {\n    use crate::unseen;\n}";
    let source = Source { path: "src/room/file.rs".to_owned(), code: code_of(code) };
    assert_eq!(source.room(), "room");
    assert_eq!(source.paths_from("crate"), ["auth::Caller", "web::self", "web::Health", "demo::run"]);
    assert_eq!(source.paths_from("std"), ["env"]);
}

#[test]
fn no_release_has_the_fixtures_of_the_conformance_suite() {
    let read = |path: &str| std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
    let manifest = read("Cargo.toml");
    let (_, features) = manifest.split_once("\n[features]\n").unwrap();
    let features = features.split("\n[").next().unwrap();
    let asks = features.lines().filter(|line| !line.starts_with('#') && line.contains("conformance"));
    assert_eq!(asks.collect::<Vec<_>>(), ["conformance = []"], "another feature brings the fixtures along");

    let dockerfile = read("Dockerfile");
    let builds: Vec<_> = dockerfile.lines().filter(|line| line.contains("cargo auditable build")).collect();
    assert!(!builds.is_empty(), "the image is built");
    for build in builds {
        assert!(build.contains("--no-default-features") && !build.contains("--features"), "{build}");
    }
    // Whoever asks for both gets no binary.
    let refuses = "#[cfg(not(debug_assertions))]\ncompile_error!";
    assert!(code_of(&read("src/tools/conformance.rs")).contains(refuses), "a release with fixtures compiles");
}
