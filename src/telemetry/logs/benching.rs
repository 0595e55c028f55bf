//! Ways in for micro-benchmarks: the subscriber of the process, with nobody who reads the lines.

use super::*;

/// What [`install`] installs, for this thread only.
pub(crate) fn dispatch() -> (tracing::Dispatch, LogGuard) {
    let (writer, guard) =
        NonBlockingBuilder::default().buffered_lines_limit(QUEUED_LINES).finish(Collected::new(std::io::sink()));
    let filter = EnvFilter::new("info");
    let lines = tracing_subscriber::registry().with(filter).with(filter_fn(fit_to_print)).with(JsonLines { writer });
    (lines.into(), LogGuard { _writer: guard })
}
