//! A scrape, taken apart: what the tests ask of it. Whether the text is OpenMetrics is held by `scripts/observe`, with the
//! parser of Prometheus' own Python client.

use std::collections::{BTreeMap, BTreeSet};

use super::TestApp;

/// One line of a scrape.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

/// All lines of a scrape.
#[derive(Debug)]
pub struct Scrape {
    pub text: String,
    /// Family to type.
    pub types: BTreeMap<String, String>,
    pub samples: Vec<Sample>,
}

impl TestApp {
    /// What the management listener prints, taken apart.
    pub async fn scrape(&self) -> Scrape {
        Scrape::parse(self.metrics().await)
    }
}

impl Scrape {
    fn parse(text: String) -> Self {
        let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
        let types = types.map(|(name, kind)| (name.to_owned(), kind.to_owned())).collect();
        let samples = text.lines().filter(|line| !line.starts_with('#')).map(Sample::parse).collect();
        Self { types, samples, text }
    }

    /// The sum of the samples of this name that have these labels.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let fits = |sample: &&Sample| {
            sample.name == name
                && labels.iter().all(|(label, value)| sample.labels.get(*label).map_or("", String::as_str) == *value)
        };
        self.samples.iter().filter(fits).map(|sample| sample.value).sum()
    }

    /// Every name under which a sample may stand, whether it does so now or not.
    pub fn names(&self) -> BTreeSet<String> {
        let suffixes = |kind: &str| match kind {
            "counter" => &["_total"][..],
            "histogram" => &["_bucket", "_count", "_sum"],
            _ => &[""],
        };
        let names =
            self.types.iter().flat_map(|(name, kind)| suffixes(kind).iter().map(move |end| format!("{name}{end}")));
        names.collect()
    }

    /// What identifies each series.
    pub fn series(&self) -> BTreeSet<(String, BTreeMap<String, String>)> {
        self.samples.iter().map(|sample| (sample.name.clone(), sample.labels.clone())).collect()
    }
}

impl Sample {
    fn parse(line: &str) -> Self {
        let (series, value) = line.rsplit_once(' ').unwrap();
        let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
        // No label value of ours holds a quotation mark.
        let labels = labels.strip_suffix('}').unwrap().split_terminator("\",").map(|label| {
            let (label, value) = label.split_once("=\"").unwrap();
            (label.to_owned(), value.trim_end_matches('"').to_owned())
        });
        Self { name: name.to_owned(), labels: labels.collect(), value: value.parse().unwrap() }
    }
}
