//! What was measured, and the one table that shows it: medians, ratios, and the targets beside them.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::candidates::Name;
use crate::plan::{Care, Growth, Pace, SCENARIOS, Scenario, Window, median};

/// Everything that a run has measured.
#[derive(Debug, Serialize, Deserialize)]
pub struct Results {
    pub machine: String,
    pub load_cores: usize,
    pub rounds: u32,
    pub care: Care,
    /// By the candidate's name.
    pub candidates: BTreeMap<String, Measured>,
}

/// What was measured of one candidate.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Measured {
    /// Milliseconds from the start to the first answer, in each round.
    pub starts: Vec<f64>,
    /// Resident KiB a second after the first call, in each round.
    pub idle: Vec<u64>,
    pub binary_bytes: u64,
    /// By the scenario's name, one for each round.
    pub windows: BTreeMap<String, Vec<Window>>,
    pub growth: Option<Growth>,
}

/// Windows above this count only where there is no other.
const QUIET: f64 = 0.15;
/// Growth below this is what an allocator does by itself.
const NO_GROWTH_KIB: f64 = 1_024.0;
const MIB: f64 = 1024.0;

impl Measured {
    /// The windows that count: the quiet ones, or else the quietest.
    fn windows(&self, scenario: &str) -> Vec<&Window> {
        let mut windows: Vec<_> = self.windows.get(scenario).into_iter().flatten().collect();
        windows.sort_by(|a, b| a.used.noise.total_cmp(&b.used.noise));
        let quiet = windows.iter().filter(|window| window.used.noise <= QUIET).count();
        windows.truncate(quiet.max(1));
        windows
    }

    fn median(&self, scenario: &str, figure: impl Fn(&Window) -> Option<f64>) -> Option<f64> {
        median(self.windows(scenario).into_iter().filter_map(figure))
    }

    /// The sum over all windows of a scenario.
    fn total(&self, scenario: &str, figure: impl Fn(&Window) -> f64) -> f64 {
        self.windows.get(scenario).into_iter().flatten().map(figure).sum()
    }

    /// Calls a second, as a share of another candidate's in the same round; of rounds that were quiet for both.
    fn ratios_to(&self, other: &Self, scenario: &str) -> Vec<f64> {
        let [ours, theirs] = [self, other].map(|of| of.windows.get(scenario).into_iter().flatten());
        let is_quiet = |window: &Window| window.used.noise <= QUIET;
        ours.zip(theirs)
            .filter(|(ours, theirs)| is_quiet(ours) && is_quiet(theirs))
            .map(|(ours, theirs)| ours.calls_per_second() / theirs.calls_per_second())
            .collect()
    }

    fn idle_kib(&self) -> Option<f64> {
        median(self.idle.iter().map(|kib| *kib as f64))
    }

    fn all_windows(&self) -> impl Iterator<Item = &Window> {
        self.windows.values().flatten()
    }

    fn wrong(&self) -> u64 {
        let grown = self.growth.iter().map(|growth| growth.tally.wrong);
        self.all_windows().map(|window| window.tally.wrong).chain(grown).sum()
    }

    /// What was wrong first, if anything was.
    pub fn first_mistake(&self) -> Option<&str> {
        let tallies = self.all_windows().map(|window| &window.tally);
        tallies.chain(self.growth.iter().map(|growth| &growth.tally)).find_map(|tally| tally.first_mistake.as_deref())
    }

    /// The right answers to each scenario.
    pub fn right(&self) -> impl Iterator<Item = (&str, u64)> {
        self.windows.iter().map(|(name, windows)| (&**name, windows.iter().map(|window| window.tally.right).sum()))
    }
}

/// What a figure is held to.
#[derive(Clone, Copy)]
enum Target {
    AtLeast(f64, Against),
    AtMost(f64, Against),
}

#[derive(Clone, Copy)]
enum Against {
    Itself(&'static str),
    Times(Name),
    Beyond(Name, &'static str),
}

impl Target {
    fn show(self) -> String {
        let (sign, limit, against) = match self {
            Self::AtLeast(limit, against) => ("≥", limit, against),
            Self::AtMost(limit, against) => ("≤", limit, against),
        };
        match against {
            Against::Itself(unit) => format!("{sign} {limit} {unit}"),
            Against::Times(name) => format!("{sign} {limit} × {}", name.as_str()),
            Against::Beyond(name, unit) => format!("{sign} {limit} {unit} above {}", name.as_str()),
        }
    }

    fn is_reached(self, row: &Row) -> Option<bool> {
        let (Self::AtLeast(limit, against) | Self::AtMost(limit, against)) = self;
        let figure = match against {
            Against::Itself(_) => row.of(Name::Server)?,
            Against::Times(name) => row.of(Name::Server)? / row.of(name)?,
            Against::Beyond(name, _) => row.of(Name::Server)? - row.of(name)?,
        };
        Some(if matches!(self, Self::AtLeast(..)) { figure >= limit } else { figure <= limit })
    }
}

/// A line of the table.
struct Row {
    what: String,
    figures: [Option<f64>; Name::ALL.len()],
    targets: Vec<Target>,
    has_ratio: bool,
}

impl Row {
    fn of(&self, name: Name) -> Option<f64> {
        self.figures.get(name as usize).copied().flatten()
    }

    fn ratio_to(&self, name: Name) -> Option<f64> {
        if self.has_ratio {
            Some(self.of(Name::Server)? / self.of(name)?).filter(|ratio| ratio.is_finite())
        } else {
            None
        }
    }

    fn show(&self) -> String {
        let reached = |target: &Target| match target.is_reached(self) {
            Some(true) => "yes",
            Some(false) => "**no**",
            None => "–",
        };
        let list = |words: Vec<String>| words.join("; ");
        format!(
            "| {} | {} | {} | {} | {} | {} | {} | {} |\n",
            self.what,
            show(self.of(Name::Server)),
            show(self.of(Name::RmcpRaw)),
            show(self.of(Name::Floor)),
            show(self.ratio_to(Name::Floor)),
            show(self.ratio_to(Name::RmcpRaw)),
            list(self.targets.iter().map(|target| target.show()).collect()),
            list(self.targets.iter().map(|target| reached(target).to_owned()).collect()),
        )
    }
}

impl Results {
    fn row(&self, what: impl Into<String>, figure: impl Fn(&Measured) -> Option<f64>, targets: &[Target]) -> Row {
        let figures = Name::ALL.map(|name| self.candidates.get(name.as_str()).and_then(&figure));
        Row { what: what.into(), figures, targets: targets.to_vec(), has_ratio: true }
    }

    fn rows(&self) -> Vec<Row> {
        use Against::{Beyond, Itself, Times};
        use Name::{Floor, RmcpRaw};
        use Target::{AtLeast, AtMost};

        let mut rows = Vec::new();
        let closed = || SCENARIOS.iter().filter(|scenario| scenario.pace == Pace::Closed);
        for scenario in closed() {
            let targets: &[_] = match scenario.name {
                "c64" => &[AtLeast(0.45, Times(Floor)), AtLeast(1.7, Times(RmcpRaw))],
                _ => &[],
            };
            let figure = |of: &Measured| of.median(scenario.name, |window| Some(window.calls_per_second()));
            rows.push(self.row(format!("calls/s, {}", scenario.what), figure, targets));
        }
        for scenario in closed() {
            let targets: &[_] = match scenario.name {
                "c512" => &[AtMost(2.2, Times(Floor))],
                "q100" | "q1000" => &[AtMost(4.0, Times(Floor))],
                _ => &[],
            };
            let figure = |of: &Measured| of.median(scenario.name, Window::cpu_per_call);
            rows.push(self.row(format!("CPU µs per call, {}", scenario.what), figure, targets));
        }
        for scenario in SCENARIOS
            .iter()
            .filter(|scenario| !matches!(scenario.name, "q1" | "q10" | "q100" | "q1000" | "e404" | "e503"))
        {
            type Time = fn(&Window) -> Option<f64>;
            let times: [(&str, Time); 3] = [
                ("p50", |window| Some(window.tally.p50)),
                ("p99", |window| Some(window.tally.p99)),
                ("p99.9", |window| Some(window.tally.p999)),
            ];
            for (quantile, time) in times {
                // Of a closed loop one line is enough: its times follow from its rate.
                if scenario.pace == Pace::Closed && (quantile != "p99" || !matches!(scenario.name, "c64" | "c512")) {
                    continue;
                }
                let targets: &[_] = match (scenario.name, quantile) {
                    ("half", "p99") => &[AtMost(1.0, Beyond(Floor, "ms"))],
                    _ => &[],
                };
                let figure = |of: &Measured| of.median(scenario.name, time);
                rows.push(self.row(format!("{quantile} ms, {}", scenario.what), figure, targets));
            }
        }
        let idle = |of: &Measured| Some(of.idle_kib()? / MIB);
        rows.push(self.row("memory MiB, idle", idle, &[AtMost(14.0, Itself("MiB"))]));
        for (scenario, targets) in [("c512", &[AtMost(1.3, Times(Floor))][..]), ("q1000", &[])] {
            let Some(what) = SCENARIOS.iter().find(|known| known.name == scenario).map(|known| known.what) else {
                continue;
            };
            let peak = |of: &Measured| of.median(scenario, |window| Some(window.memory.peak as f64 / MIB));
            rows.push(self.row(format!("memory MiB, peak with {what}"), peak, targets));
        }
        let per_connection = |of: &Measured| of.kib_per_connection();
        rows.push(self.row("memory KiB per connection, 512 that are all busy", per_connection, &[]));
        let start = |of: &Measured| median(of.starts.iter().copied());
        rows.push(self.row("start ms, to the first 200", start, &[AtMost(30.0, Itself("ms"))]));
        let size = |of: &Measured| Some(of.binary_bytes as f64 / MIB / MIB);
        rows.push(self.row("binary MiB", size, &[AtMost(16.0, Itself("MiB"))]));
        let grown = |of: &Measured| of.growth.as_ref()?.kib();
        let calls = self.candidates.values().find_map(|of| Some(of.growth.as_ref()?.tally.right)).unwrap_or_default();
        let what = format!("memory growth KiB, over {} calls after warm-up", thousands(calls as f64));
        let target = [AtMost(NO_GROWTH_KIB, Itself("KiB (none)"))];
        rows.push(Row { has_ratio: false, ..self.row(what, grown, &target) });
        rows.retain(|row| row.figures.iter().any(Option::is_some));
        rows
    }

    /// The table in Markdown, with what one has to know to read it.
    pub fn markdown(&self) -> String {
        let windows = || self.candidates.values().flat_map(|of| of.windows.keys().flat_map(|name| of.windows(name)));
        let noise = median(windows().map(|window| window.used.noise)).unwrap_or_default();
        let noisiest = windows().map(|window| window.used.noise).fold(0.0, f64::max);
        let compared: u64 = windows().map(|window| window.tally.compared).sum();
        let (wrong, unanswered) = (
            self.candidates.values().map(Measured::wrong).sum::<u64>(),
            windows().map(|window| window.tally.unanswered).sum::<u64>(),
        );
        let mut out = format!(
            "{}. {} rounds of {} s for each scenario; medians. Others used {:.0} % of the machine (median), {:.0} % at most. \
             Wrong answers: {wrong}; unanswered calls: {unanswered}; answers compared as a whole: {}.\n\n",
            self.machine,
            self.rounds,
            self.care.seconds,
            noise * 100.0,
            noisiest * 100.0,
            thousands(compared as f64),
        );
        out.push_str("| What | server | rmcp-raw | floor | ÷ floor | ÷ rmcp-raw | Target | Reached |\n");
        out.push_str("|---|---:|---:|---:|---:|---:|---|---|\n");
        out.extend(self.rows().iter().map(Row::show));
        let full = self.full();
        if !full.is_empty() {
            let _ = write!(
                out,
                "\nGenerator and backend had their cores nearly full, so that calls/s are a lower bound and CPU per call is \
                 what to trust: {}.\n",
                full.join(", ")
            );
        }
        out.push_str(&self.sizing().unwrap_or_default());
        out.push_str(&self.settings());
        out
    }

    /// What it costs to switch things on or off, if that was measured. The ratio is the median of the rounds' ratios: what the
    /// machine did to a whole round cancels out.
    fn settings(&self) -> String {
        let settings = [Name::ServerQuiet, Name::Server, Name::ServerObserved, Name::ServerGuarded];
        let measured = settings.map(|name| Some((name, self.candidates.get(name.as_str())?)));
        let measured: Vec<_> = measured.into_iter().flatten().collect();
        let [base, _, ..] = measured[..] else { return String::new() };
        let scenarios = SCENARIOS.iter().filter(|scenario| scenario.pace == Pace::Closed);
        let scenarios = scenarios.filter(|scenario| base.1.windows.contains_key(scenario.name));
        scenarios.map(|scenario| settings_in(scenario, base, &measured)).collect()
    }

    /// Where the candidate was not what bounded the rate.
    fn full(&self) -> Vec<String> {
        let mut full = Vec::new();
        for (scenario, (name, of)) in
            SCENARIOS.iter().flat_map(|scenario| self.candidates.iter().map(move |candidate| (scenario, candidate)))
        {
            let share = of.median(scenario.name, |window| Some(window.used.load / window.used.seconds));
            if share.is_some_and(|share| share > 0.95 * self.load_cores as f64) {
                full.push(format!("{name} with {}", scenario.what));
            }
        }
        full
    }

    /// What the figures mean for someone who has to order machines.
    fn sizing(&self) -> Option<String> {
        let server = self.candidates.get(Name::Server.as_str())?;
        let per_core = |scenario| Some(thousands(1e6 / server.median(scenario, Window::cpu_per_call)?));
        Some(format!(
            "\nSizing, from the figures above. One core of this kind is full at {} calls/s of `get_user_profile` (64 connections), \
             {} of all tools mixed, {} of `query_data` with 100 rows and {} with 1,000 rows. Memory: {} MiB idle, and {} KiB for each \
             connection that is busy with a small call.\n",
            per_core("c64")?,
            per_core("mix64")?,
            per_core("q100")?,
            per_core("q1000")?,
            show(Some(server.idle_kib()? / MIB)),
            show(Some(server.kib_per_connection()?)),
        ))
    }
}

/// What settings cost in one scenario, beside the first of them.
fn settings_in(
    Scenario { name: scenario, what, .. }: &Scenario,
    (first, base): (Name, &Measured),
    measured: &[(Name, &Measured)],
) -> String {
    let mut out = format!(
        "\n| Setting, {what} | calls/s | CPU µs per call | calls/s ÷ `{}` | in the middle half of the rounds |\n\
         |---|---:|---:|---:|---|\n",
        first.as_str()
    );
    for (name, of) in measured {
        let Some(rate) = of.median(scenario, |window| Some(window.calls_per_second())) else { continue };
        let cpu = of.total(scenario, |window| window.used.candidate * 1e6)
            / of.total(scenario, |window| window.tally.right as f64);
        let mut ratios = of.ratios_to(base, scenario);
        ratios.sort_by(f64::total_cmp);
        let [low, high] = [ratios.len() / 4, ratios.len() * 3 / 4].map(|at| ratios.get(at).copied());
        let ratio = show(median(ratios.iter().copied()));
        let _ = writeln!(
            out,
            "| `{}` | {} | {cpu:.1} | {ratio} | {} to {} |",
            name.as_str(),
            thousands(rate),
            show(low),
            show(high)
        );
    }
    out
}

impl Measured {
    fn kib_per_connection(&self) -> Option<f64> {
        let peak = self.median("c512", |window| Some(window.memory.peak as f64))?;
        Some((peak - self.idle_kib()?) / 512.0)
    }
}

/// Three digits that matter, or a whole number.
fn show(figure: Option<f64>) -> String {
    match figure {
        None => "–".to_owned(),
        Some(0.0) => "0".to_owned(),
        Some(figure) if figure.abs() >= 1_000.0 => thousands(figure),
        Some(figure) if figure.abs() >= 100.0 => format!("{figure:.0}"),
        Some(figure) if figure.abs() >= 10.0 => format!("{figure:.1}"),
        Some(figure) if figure.abs() >= 1.0 => format!("{figure:.2}"),
        Some(figure) => format!("{figure:.3}"),
    }
}

fn thousands(figure: f64) -> String {
    let digits = format!("{:.0}", figure.abs());
    let grouped = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect::<Vec<_>>().join(",");
    if figure < 0.0 { format!("-{grouped}") } else { grouped }
}

/// A document with something else between its marks.
pub fn write_between_marks(document: &str, measured: &str) -> anyhow::Result<String> {
    const BEGIN: &str = "<!-- measured:begin -->";
    const END: &str = "<!-- measured:end -->";
    let parts = document.split_once(BEGIN).and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
    let (before, after) = parts.ok_or_else(|| anyhow::anyhow!("the document has no {BEGIN} … {END}"))?;
    Ok(format!("{before}{BEGIN}\n{measured}{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short_and_a_document_keeps_what_stands_around_its_marks() {
        let shown = [0.123_4, 1.234, 12.34, 123.4, 1_234.5, -1_234_567.0].map(|figure| show(Some(figure)));
        assert_eq!(shown, ["0.123", "1.23", "12.3", "123", "1,234", "-1,234,567"]);
        let document = "a\n<!-- measured:begin -->\nold\n<!-- measured:end -->\nb";
        let written = write_between_marks(document, "new\n").unwrap_or_default();
        assert_eq!(written, "a\n<!-- measured:begin -->\nnew\n<!-- measured:end -->\nb");
        assert!(write_between_marks("a", "new").is_err());
    }
}
