//! What may show nowhere: credentials, and what callers and the backend say. Every test that starts a server looks for it at the
//! most talkative level, in what the binary prints and in what the server in this process would print.

use std::fmt::{Debug, Write as _};
use std::sync::{Mutex, Once};

use mcp_server::demo::entra::{CLIENT_SECRET, EXPIRED_CLIENT_SECRET};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt as _};

/// What tests put where it must not leak from. All of them hold the word that every leak is found by.
pub const TITLE: &str = "canary-title-of-a-ticket";
pub const DESCRIPTION: &str = "canary-description-of-a-ticket";
pub const FILTER: &str = "canary-value-of-a-filter";
pub const UNKNOWN: &str = "canary-of-an-argument-nobody-knows";
pub const INBOUND: &str = "canary-of-the-callers-own-token";
pub const ROW: &str = "canary-of-what-the-backend-says";

/// The word; the secrets; and how every token and assertion begins.
const TRACES: [&str; 4] = ["canary", CLIENT_SECRET, EXPIRED_CLIENT_SECRET, "eyJ"];

/// What should not be in the text.
pub fn leak(text: &str) -> Option<&'static str> {
    TRACES.into_iter().find(|trace| text.contains(trace))
}

pub fn assert_clean(text: &str) {
    assert_eq!(leak(text), None, "in {text}");
}

static LEAKS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Looks at every event and span of the servers in this process. Dropped with a server, it fails the test if anything has leaked.
pub struct Watch(());

impl Watch {
    pub fn begin() -> Self {
        static INSTALLED: Once = Once::new();
        INSTALLED.call_once(|| {
            let watching = tracing_subscriber::registry().with(FindLeaks);
            tracing::subscriber::set_global_default(watching).expect("no other subscriber");
        });
        Self(())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let leaks = LEAKS.lock().unwrap();
            assert!(leaks.is_empty(), "these would have been logged: {leaks:#?}");
        }
    }
}

struct FindLeaks;

impl<S: Subscriber> Layer<S> for FindLeaks {
    fn enabled(&self, metadata: &tracing::Metadata<'_>, _: Context<'_, S>) -> bool {
        metadata.target().starts_with("mcp_server") || metadata.target() == "audit"
    }

    fn on_new_span(&self, attributes: &Attributes<'_>, _: &Id, _: Context<'_, S>) {
        look(|fields| attributes.record(fields));
    }

    fn on_record(&self, _: &Id, values: &Record<'_>, _: Context<'_, S>) {
        look(|fields| values.record(fields));
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        look(|fields| event.record(fields));
    }
}

fn look(record: impl FnOnce(&mut Fields)) {
    let mut fields = Fields(String::new());
    record(&mut fields);
    if leak(&fields.0).is_some() {
        LEAKS.lock().unwrap().push(fields.0);
    }
}

struct Fields(String);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let _ = write!(self.0, "{field}={value:?} ");
    }
}

#[test]
fn a_leak_is_seen() {
    assert_clean("tool `list_users` succeeded");
    for leaking in ["a canary", CLIENT_SECRET, "Bearer eyJ0eXAi"] {
        assert!(leak(leaking).is_some());
    }
}
