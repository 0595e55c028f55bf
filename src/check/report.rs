//! How the answer looks: lines for a person, or one JSON object for a program.

use std::io::{self, Write};

use serde::Serialize;

use super::{Outcome, Step, counted};

/// Where the columns begin: the outcome has 9 characters, the name 12.
const INDENT: &str = "                     ";

/// The answer, as far as it is known.
pub(super) struct Report<'a, W> {
    json: bool,
    out: &'a mut W,
    steps: Vec<Step>,
}

/// The answer for a program.
#[derive(Serialize)]
struct Answer<'a> {
    version: &'static str,
    well: bool,
    steps: &'a [Step],
}

impl<'a, W: Write> Report<'a, W> {
    pub(super) fn new(json: bool, out: &'a mut W) -> Self {
        Self { json, out, steps: Vec::new() }
    }

    /// Adds a step, and shows it at once to a person.
    pub(super) fn add(&mut self, step: Step) -> io::Result<()> {
        if !self.json {
            self.out.write_all(lines(&step).as_bytes())?;
            self.out.flush()?;
        }
        self.steps.push(step);
        Ok(())
    }

    /// Ends the answer; returns whether all is well.
    pub(super) fn end(self) -> io::Result<bool> {
        let named = |outcome| {
            let steps = self.steps.iter().filter(|step| step.outcome == outcome);
            steps.map(|step| step.name).collect::<Vec<_>>()
        };
        let (failed, warned) = (named(Outcome::Fail), named(Outcome::Warn));
        let well = failed.is_empty();
        if self.json {
            let answer = Answer { version: env!("CARGO_PKG_VERSION"), well, steps: &self.steps };
            serde_json::to_writer(&mut *self.out, &answer)?;
            writeln!(self.out)?;
        } else {
            let warnings = match warned.len() {
                0 => String::new(),
                count => format!("; {}: {}", counted(count, "warning"), warned.join(", ")),
            };
            match failed.len() {
                0 => writeln!(self.out, "\nAll is well{warnings}.")?,
                count => writeln!(self.out, "\n{} failed: {}{warnings}.", counted(count, "step"), failed.join(", "))?,
            }
        }
        self.out.flush()?;
        Ok(well)
    }
}

fn lines(step: &Step) -> String {
    let outcome = match step.outcome {
        Outcome::Ok => "ok",
        Outcome::Warn => "warn",
        Outcome::Fail => "FAIL",
        Outcome::Skipped => "skipped",
    };
    let mut text = format!("{outcome:<9}{:<12}{}\n", step.name, step.found);
    let command = if step.outcome == Outcome::Ok { "needs" } else { "run" };
    for (label, part) in [
        ("wrong", step.wrong.as_deref()),
        ("hands", step.hands),
        ("mend", step.remedy.as_deref()),
        (command, step.command.as_deref()),
    ] {
        let mut label = label;
        for line in part.into_iter().flat_map(str::lines) {
            text += &format!("{INDENT}{label:<7}{line}\n");
            label = "";
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_a_line_and_its_advice_stands_below() {
        let step = Step::fail("token", "no token").wrong("a\nb").mend("whoever", "do x").command("az x".to_owned());
        let expected = "FAIL     token       no token\n\
                        \x20                    wrong  a\n\
                        \x20                           b\n\
                        \x20                    hands  whoever\n\
                        \x20                    mend   do x\n\
                        \x20                    run    az x\n";
        assert_eq!(lines(&step), expected);
        assert_eq!(lines(&Step::ok("clock", "right")), "ok       clock       right\n");
    }

    #[test]
    fn a_warning_is_no_failure() {
        let mut out = Vec::new();
        let mut report = Report::new(false, &mut out);
        report.add(Step::warn("hosts", "narrow")).unwrap();
        assert!(report.end().unwrap());
        assert!(String::from_utf8(out).unwrap().ends_with("\nAll is well; 1 warning: hosts.\n"));
    }
}
