//! The table: one row for each thing that was measured, and whether it kept its bound.

use std::fmt::Display;
use std::process::ExitCode;
use std::time::Duration;

/// The rows so far.
pub(crate) struct Report {
    held: u32,
    broken: u32,
}

impl Report {
    /// Prints the head of the table.
    pub(crate) fn begin() -> Self {
        println!("| Scenario | Measured | Bound | Result |\n|---|---|---|---|");
        Self { held: 0, broken: 0 }
    }

    /// A bound that decides.
    pub(crate) fn hold(&mut self, scenario: &str, measured: impl Display, bound: impl Display, holds: bool) {
        let result = if holds { "ok" } else { "**BROKEN**" };
        if holds {
            self.held += 1
        } else {
            self.broken += 1
        }
        println!("| {scenario} | {measured} | {bound} | {result} |");
    }

    /// A figure that depends on the machine.
    pub(crate) fn figure(&mut self, scenario: &str, measured: impl Display, wanted: impl Display) {
        println!("| {scenario} | {measured} | {wanted} | figure |");
    }

    /// What the whole run comes to.
    pub(crate) fn end(self, took: Duration) -> ExitCode {
        println!("\nendure: {} held, {} broken, in {:.0} s", self.held, self.broken, took.as_secs_f64());
        if self.broken == 0 && self.held > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// Milliseconds, as a table shows them.
pub(crate) fn ms(time: Duration) -> String {
    let ms = time.as_secs_f64() * 1_000.0;
    if ms < 10.0 { format!("{ms:.1} ms") } else { format!("{ms:.0} ms") }
}

/// Seconds, as a table shows them.
pub(crate) fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}
