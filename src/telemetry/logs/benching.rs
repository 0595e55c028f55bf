//! Ways in for micro-benchmarks: the subscriber of the process, with nobody who reads the lines.

use super::*;

/// What [`install`] installs, for this thread only.
pub(crate) fn dispatch() -> anyhow::Result<(Dispatch, LogGuard)> {
    let (writer, guard) = LineWriter::start(std::io::sink(), lament)?;
    let settings = LogSettings::default();
    let level = LevelSwitch { filter: settings.filter.clone(), raised: Arc::default() };
    let dispatch = Dispatch::new(LineSubscriber::new(Heard::of(&settings, &level)?, writer));
    Ok((dispatch, LogGuard { level, _writer: guard }))
}
