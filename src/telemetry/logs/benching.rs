//! Ways in for micro-benchmarks: the subscriber of the process, with nobody who reads the lines.

use super::*;

/// What [`install`] installs, for this thread only.
pub(crate) fn dispatch() -> anyhow::Result<(tracing::Dispatch, LogGuard)> {
    let (writer, guard) = LineWriter::start(std::io::sink(), lament)?;
    let (levels, level) = Levels::of(&LogSettings::default())?;
    let lines = tracing_subscriber::registry().with(levels).with(filter_fn(fit_to_print)).with(JsonLines { writer });
    Ok((lines.into(), LogGuard { level, _writer: guard }))
}
