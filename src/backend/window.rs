//! Good and bad of the last seconds, counted in one cell a second.

use tokio::time::Instant;

/// The window is a ring of so many seconds.
pub(super) const WINDOW_SECONDS: usize = 10;

/// How often each of two things happened.
pub(super) struct Window {
    start: Instant,
    cells: [(u64, u32, u32); WINDOW_SECONDS],
    newest: u64,
}

impl Window {
    pub(super) fn new() -> Self {
        Self { start: Instant::now(), cells: [(0, 0, 0); WINDOW_SECONDS], newest: 0 }
    }

    pub(super) fn count(&mut self, good: bool, now: Instant) {
        let second = now.saturating_duration_since(self.start).as_secs();
        self.newest = self.newest.max(second);
        if let Some(cell) = self.cells.get_mut(second as usize % WINDOW_SECONDS) {
            if cell.0 != second {
                *cell = (second, 0, 0);
            }
            if good {
                cell.1 = cell.1.saturating_add(1);
            } else {
                cell.2 = cell.2.saturating_add(1);
            }
        }
    }

    /// So many good ones, and so many others.
    pub(super) fn sums(&self) -> (u32, u32) {
        let oldest = self.newest.saturating_sub(WINDOW_SECONDS as u64 - 1);
        let recent = self.cells.iter().filter(|cell| cell.0 >= oldest);
        recent.fold((0, 0), |(good, bad), cell| (good.saturating_add(cell.1), bad.saturating_add(cell.2)))
    }
}
