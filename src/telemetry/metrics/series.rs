//! The shapes that figures come in, beside those of the library: histograms that appear with their first value, and figures that
//! are read when somebody asks.
//!
//! Both know every label value beforehand. Recording finds its histogram by index: an atomic load, no map, no allocation.

use std::fmt;
use std::sync::{Arc, OnceLock};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// Labels with their values, all of them known when the program was built.
pub type Labels = Vec<(&'static str, &'static str)>;

/// Name, help and unit of a figure. The name comes without the suffixes of its unit and type, which the encoder adds.
#[derive(Debug)]
pub struct Figure {
    pub(super) name: &'static str,
    pub(super) help: &'static str,
    pub(super) unit: Option<Unit>,
}

impl Figure {
    /// A figure without a unit: it counts things, or is a state.
    pub const fn new(name: &'static str, help: &'static str) -> Self {
        Self { name, help, unit: None }
    }

    /// The same in seconds.
    pub const fn seconds(name: &'static str, help: &'static str) -> Self {
        Self { name, help, unit: Some(Unit::Seconds) }
    }

    /// The same in bytes.
    pub const fn bytes(name: &'static str, help: &'static str) -> Self {
        Self { name, help, unit: Some(Unit::Bytes) }
    }

    fn begin<'e>(
        &'e self,
        encoder: &'e mut DescriptorEncoder<'_>,
        kind: MetricType,
    ) -> Result<MetricEncoder<'e>, fmt::Error> {
        // The registry ends the help of its own figures with a full stop.
        encoder.encode_descriptor(self.name, &format!("{}.", self.help), self.unit.as_ref(), kind)
    }
}

/// A histogram of seconds for each combination of some axes. One that has no value yet takes no room and is not printed: most
/// combinations never occur.
pub(super) struct Grid(Arc<Cells>);

struct Cells {
    figure: Figure,
    bounds: &'static [f64],
    axes: Vec<Vec<Labels>>,
    cells: Vec<OnceLock<Histogram>>,
}

impl Grid {
    /// Registers the grid. Each axis is a list of the labels that a place on it has; a label without a value is left out.
    pub(super) fn register(
        registry: &mut Registry,
        figure: Figure,
        bounds: &'static [f64],
        axes: Vec<Vec<Labels>>,
    ) -> Self {
        let size = axes.iter().map(Vec::len).product();
        let cells = std::iter::repeat_with(OnceLock::new).take(size).collect();
        let cells = Arc::new(Cells { figure, bounds, axes, cells });
        registry.register_collector(Box::new(Arc::clone(&cells)));
        Self(cells)
    }

    /// Records a value at a place on each axis. A place that does not exist records nothing.
    pub(super) fn observe(&self, places: &[usize], seconds: f64) {
        let index = places.iter().zip(&self.0.axes).try_fold(0, |index, (place, axis)| {
            let exists = *place < axis.len();
            exists.then(|| index * axis.len() + place)
        });
        if let Some(cell) = index.and_then(|index| self.0.cells.get(index)) {
            cell.get_or_init(|| Histogram::new(self.0.bounds.iter().copied())).observe(seconds);
        }
    }
}

#[cfg(test)]
impl Grid {
    /// Gives every combination a value.
    pub(super) fn observe_everywhere(&self) {
        for cell in &self.0.cells {
            cell.get_or_init(|| Histogram::new(self.0.bounds.iter().copied())).observe(1.0);
        }
    }
}

impl Cells {
    fn labels(&self, mut index: usize) -> Labels {
        let mut parts: Vec<&Labels> = Vec::with_capacity(self.axes.len());
        for axis in self.axes.iter().rev() {
            parts.extend(axis.get(index % axis.len()));
            index /= axis.len();
        }
        parts.into_iter().rev().flatten().copied().filter(|(_, value)| !value.is_empty()).collect()
    }
}

impl fmt::Debug for Cells {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.figure.name)
    }
}

impl Collector for Cells {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut family = self.figure.begin(&mut encoder, MetricType::Histogram)?;
        for (index, cell) in self.cells.iter().enumerate() {
            if let Some(histogram) = cell.get() {
                let labels = self.labels(index);
                histogram.encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

/// What an observed figure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It only grows.
    Counter,
    /// It comes and goes.
    Gauge,
}

/// A value without labels.
pub(super) fn unlabelled(value: f64) -> (Labels, f64) {
    (Labels::new(), value)
}

type Read = Box<dyn Fn() -> Vec<(Labels, f64)> + Send + Sync>;

/// A figure that somebody else keeps, read when it is printed.
pub(super) struct Observed {
    pub(super) kind: Kind,
    pub(super) figure: Figure,
    pub(super) read: Read,
}

impl fmt::Debug for Observed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.figure.name)
    }
}

impl Collector for Observed {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let kind = match self.kind {
            Kind::Counter => MetricType::Counter,
            Kind::Gauge => MetricType::Gauge,
        };
        let mut family = self.figure.begin(&mut encoder, kind)?;
        let print = |place: MetricEncoder<'_>, value| match self.kind {
            Kind::Counter => ConstCounter::new(value).encode(place),
            Kind::Gauge => ConstGauge::new(value).encode(place),
        };
        for (labels, value) in (self.read)() {
            if labels.is_empty() {
                return print(family, value);
            }
            print(family.encode_family(&labels)?, value)?;
        }
        Ok(())
    }
}
