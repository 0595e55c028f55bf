//! What the attempts of the last ten seconds say about one route: how many worked and how many failed, for which callers and which
//! resources.
//!
//! Everything is an atomic number in a cell for each second: to record an attempt takes no lock. Two threads that begin a cell at the
//! same time may lose an attempt, which changes no decision. Callers and resources are told apart by one bit of 64 each: two that
//! share a bit count as one.

use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher, Hash};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use tokio::time::Instant;

/// The window is a ring of so many seconds.
pub(super) const WINDOW_SECONDS: u64 = 10;

/// So many failures in a row are too many.
pub(super) const FAILURES_IN_A_ROW: u32 = 8;
/// With at least so many attempts in the window, fewer successes than failures are too few.
pub(super) const LEAST_ATTEMPTS: u32 = 20;

/// Who asks for what.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::backend) struct Source {
    caller: u64,
    resource: u64,
}

impl Source {
    pub(in crate::backend) fn new(caller: CallerBit, resource: &str) -> Self {
        Self { caller: caller.0, resource: bit_of(resource) }
    }

    /// Whether this caller is among those.
    pub(super) fn has_caller(self, other: Self) -> bool {
        self.caller & other.caller != 0
    }

    /// Whether both the caller and the resource are among those.
    pub(super) fn has(self, other: Self) -> bool {
        self.has_caller(other) && self.resource & other.resource != 0
    }

    #[must_use]
    pub(super) fn with(self, other: Self) -> Self {
        Self { caller: self.caller | other.caller, resource: self.resource | other.resource }
    }
}

/// What tells callers apart: a bit for the checked identity, or for the address of a caller without one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::backend) struct CallerBit(u64);

impl CallerBit {
    /// The server itself, which calls for nobody.
    pub(in crate::backend) const SERVER: Self = Self(1);

    pub(in crate::backend) fn of_identity(tenant: &str, object: &str) -> Self {
        Self(bit_of((tenant, object)))
    }

    /// A client has one IPv4 address, and of IPv6 a whole network of 64 bits to choose from.
    pub(in crate::backend) fn of_address(address: IpAddr) -> Self {
        Self(match address {
            IpAddr::V4(address) => bit_of(address.to_bits()),
            IpAddr::V6(address) => bit_of(address.to_bits() >> 64),
        })
    }
}

fn bit_of(what: impl Hash) -> u64 {
    1 << (BuildHasherDefault::<DefaultHasher>::new().hash_one(what) % 64)
}

/// The last seconds of one route.
#[derive(Default)]
pub(super) struct Recent {
    cells: [Cell; WINDOW_SECONDS as usize],
    failures_in_a_row: AtomicU32,
}

#[derive(Default)]
struct Cell {
    second: AtomicU64,
    good: AtomicU32,
    bad: AtomicU32,
    callers: Bits,
    resources: Bits,
}

/// Callers, or resources, by how their last attempt went: a bit is in one of the two at most.
#[derive(Default)]
struct Bits {
    good: AtomicU64,
    bad: AtomicU64,
}

impl Bits {
    fn record(&self, bit: u64, good: bool) {
        let (now, before) = if good { (&self.good, &self.bad) } else { (&self.bad, &self.good) };
        // Mostly both are so already: reading alone leaves the cache line shared.
        if now.load(Relaxed) & bit == 0 {
            now.fetch_or(bit, Relaxed);
        }
        if before.load(Relaxed) & bit != 0 {
            before.fetch_and(!bit, Relaxed);
        }
    }

    fn clear(&self) {
        self.good.store(0, Relaxed);
        self.bad.store(0, Relaxed);
    }
}

impl Recent {
    /// `second` is counted from any fixed moment.
    pub(super) fn record(&self, source: Source, good: bool, second: u64) {
        if !good {
            self.failures_in_a_row.fetch_add(1, Relaxed);
        } else if self.failures_in_a_row.load(Relaxed) != 0 {
            self.failures_in_a_row.store(0, Relaxed);
        }
        let Some(cell) = self.cell(second) else { return };
        let seen = cell.second.load(Relaxed);
        if seen != second && cell.second.compare_exchange(seen, second, Relaxed, Relaxed).is_ok() {
            cell.clear();
        }
        if good { &cell.good } else { &cell.bad }.fetch_add(1, Relaxed);
        cell.callers.record(source.caller, good);
        cell.resources.record(source.resource, good);
    }

    /// Forgets everything.
    pub(super) fn clear(&self) {
        self.failures_in_a_row.store(0, Relaxed);
        self.cells.iter().for_each(Cell::clear);
    }

    pub(super) fn summary(&self, second: u64) -> Summary {
        let mut summary = Summary { failures_in_a_row: self.failures_in_a_row.load(Relaxed), ..Summary::default() };
        // From the newest on: the last attempt of a caller counts.
        for second in (0..WINDOW_SECONDS).map_while(|back| second.checked_sub(back)) {
            let Some(cell) = self.cell(second).filter(|cell| cell.second.load(Relaxed) == second) else { continue };
            summary.good = summary.good.saturating_add(cell.good.load(Relaxed));
            summary.bad = summary.bad.saturating_add(cell.bad.load(Relaxed));
            summary.callers.add_older(&cell.callers);
            summary.resources.add_older(&cell.resources);
        }
        summary
    }

    fn cell(&self, second: u64) -> Option<&Cell> {
        self.cells.get((second % WINDOW_SECONDS) as usize)
    }
}

impl Cell {
    fn clear(&self) {
        self.good.store(0, Relaxed);
        self.bad.store(0, Relaxed);
        self.callers.clear();
        self.resources.clear();
    }
}

/// The window as a whole.
#[derive(Debug, Default)]
pub(super) struct Summary {
    good: u32,
    bad: u32,
    failures_in_a_row: u32,
    callers: Split,
    resources: Split,
}

#[derive(Debug, Default)]
struct Split {
    good: u64,
    bad: u64,
}

impl Split {
    fn add_older(&mut self, bits: &Bits) {
        let newer = self.good | self.bad;
        self.good |= bits.good.load(Relaxed) & !newer;
        self.bad |= bits.bad.load(Relaxed) & !newer;
    }

    fn most_fail(&self) -> bool {
        self.bad.count_ones() > self.good.count_ones()
    }
}

impl Summary {
    /// Whether too many attempts fail, and that for most callers and for most resources: one that fails often must not
    /// outweigh all the others.
    pub(super) fn is_failing(&self) -> bool {
        let in_a_row = self.bad > 0 && self.failures_in_a_row >= FAILURES_IN_A_ROW;
        let mostly = self.good.saturating_add(self.bad) >= LEAST_ATTEMPTS && self.good < self.bad;
        (in_a_row || mostly) && self.callers.most_fail() && self.resources.most_fail()
    }

    /// Whether that is so for more than one caller, or for more than one resource.
    pub(super) fn is_shared(&self) -> bool {
        self.callers.bad.count_ones() > 1 || self.resources.bad.count_ones() > 1
    }
}

/// Seconds since a fixed moment.
pub(super) fn second(start: Instant, now: Instant) -> u64 {
    now.saturating_duration_since(start).as_secs()
}
