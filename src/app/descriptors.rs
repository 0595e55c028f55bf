//! File descriptors: as many as the system lets us have, and a warning where the configured limits can need more.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

use crate::settings::Settings;
use crate::web::Listener;

/// What is open beside connections of clients and to the backend: listeners, the runtime, log, audit file, connections to Entra and to a
/// collector.
const OTHERS: usize = 128;

/// Raises the soft limit of open files to the hard one.
pub(super) fn raise_limit(settings: &Settings) {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = current == maximum || setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).is_ok();
    // `None` is no limit.
    let Some(limit) = (if raised { maximum } else { current }) else { return };
    let (clients, backend) = (settings.web.max_connections, settings.backend.max_concurrency);
    let needed = Listener::most_connections(clients) + backend + OTHERS;
    if limit < needed as u64 {
        warn!(
            process.max_fds = limit,
            process.needed_fds = needed,
            "the process may open {limit} files and connections, but its limits allow {needed}: MAX_CONNECTIONS is {clients}, \
             BACKEND_MAX_CONCURRENCY {backend}, and up to {} more are connections that have no place yet, the management port's, \
             and files. Raise the `nofile` limit of the container runtime or of the service manager to {needed}, or lower those two.",
            needed - clients - backend
        );
    }
}
