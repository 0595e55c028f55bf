//! How much memory the answers of the backend, our own unsent answers and parsed requests may take together: one budget in bytes.
//!
//! Memory is leased before, or as, it is filled, and given back by dropping the lease. What does not fit is refused at once, never
//! waited for. What is small is not counted: its number is bounded by the limits of connections and requests, and the hot path stays
//! free of shared counters.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use bytes::Bytes;

/// Of an answer, so many bytes are not counted.
pub const SMALL_ANSWER: usize = 8 << 10;
/// Of a parsed request, so many bytes are not counted.
const SMALL_REQUEST: usize = 32 << 10;

/// Answers that are read leave this part of the budget, an eighth, to writes and to requests: neither has to wait for large answers.
const RESERVED_PART: usize = 8;

/// What all leases together may hold.
#[derive(Debug)]
pub struct ByteBudget {
    limit: usize,
    used: AtomicUsize,
}

/// The budget is spent.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the memory for answers is full")]
pub struct Full;

impl ByteBudget {
    /// A budget of so many bytes.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, used: AtomicUsize::new(0) })
    }

    /// How many bytes it has.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// How many of them are leased.
    pub fn used(&self) -> usize {
        self.used.load(Relaxed)
    }

    /// A lease of nothing yet for an answer, whose first bytes are not counted.
    pub fn lease(self: &Arc<Self>, uncounted: usize) -> Lease {
        let limit = self.limit - self.limit / RESERVED_PART;
        Lease { budget: Some(Arc::clone(self)), limit, uncounted, held: AtomicUsize::new(0) }
    }

    /// The same for what may also use the reserved part.
    pub fn lease_reserved(self: &Arc<Self>, uncounted: usize) -> Lease {
        Lease { limit: self.limit, budget: Some(Arc::clone(self)), uncounted, held: AtomicUsize::new(0) }
    }

    /// A lease for what parsing this request takes at most.
    ///
    /// # Errors
    ///
    /// When there is not so much left.
    pub fn lease_parsing(self: &Arc<Self>, json: &[u8]) -> Result<Lease, Full> {
        let size = parsed_size(json);
        if size <= SMALL_REQUEST {
            return Ok(Lease::default());
        }
        let lease = self.lease_reserved(0);
        lease.grow(size)?;
        Ok(lease)
    }

    fn take(&self, bytes: usize, limit: usize) -> Result<(), Full> {
        let fits = |used: usize| used.checked_add(bytes).filter(|used| *used <= limit);
        self.used.fetch_update(Relaxed, Relaxed, fits).map(drop).map_err(|_| Full)
    }
}

/// A part of the budget, held until it is dropped. One task uses it at a time. The default is a lease of nothing, from no budget.
#[derive(Debug, Default)]
pub struct Lease {
    budget: Option<Arc<ByteBudget>>,
    /// How full the budget may be when this grows.
    limit: usize,
    uncounted: usize,
    held: AtomicUsize,
}

impl Lease {
    /// Takes so many bytes more.
    ///
    /// # Errors
    ///
    /// When there are not so many left; the lease then holds what it held.
    pub fn grow(&self, bytes: usize) -> Result<(), Full> {
        let (held, grown) = (self.held(), self.held().saturating_add(bytes));
        let more = self.counted(grown) - self.counted(held);
        if let Some(budget) = self.budget.as_ref().filter(|_| more > 0) {
            budget.take(more, self.limit)?;
        }
        self.held.store(grown, Relaxed);
        Ok(())
    }

    /// Says what is really held, which is never refused: it is there already.
    pub fn set(&self, bytes: usize) {
        let (before, after) = (self.counted(self.held()), self.counted(bytes));
        if let Some(budget) = self.budget.as_ref().filter(|_| before != after) {
            if after > before {
                budget.used.fetch_add(after - before, Relaxed);
            } else {
                budget.used.fetch_sub(before - after, Relaxed);
            }
        }
        self.held.store(bytes, Relaxed);
    }

    /// Hands over what is held.
    #[must_use]
    pub fn take(&self) -> Self {
        let held = AtomicUsize::new(self.held.swap(0, Relaxed));
        Self { budget: self.budget.clone(), limit: self.limit, uncounted: self.uncounted, held }
    }

    /// The same bytes, which hold this lease as long as they, or a part of them, exist.
    pub fn attach(self, bytes: impl AsRef<[u8]> + Into<Bytes> + Send + 'static) -> Bytes {
        struct Leased<T> {
            bytes: T,
            _lease: Lease,
        }
        impl<T: AsRef<[u8]>> AsRef<[u8]> for Leased<T> {
            fn as_ref(&self) -> &[u8] {
                self.bytes.as_ref()
            }
        }
        if self.counted(self.held()) == 0 {
            return bytes.into();
        }
        Bytes::from_owner(Leased { bytes, _lease: self })
    }

    fn held(&self) -> usize {
        self.held.load(Relaxed)
    }

    fn counted(&self, bytes: usize) -> usize {
        bytes.saturating_sub(self.uncounted)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// What a JSON text takes at most while it is parsed, by the count of its structural characters, also inside of strings:
/// `serde_json` makes a tree of it, and rmcp another one before that.
fn parsed_size(json: &[u8]) -> usize {
    /// An object of one field: a node of a B-tree in one tree, a list with room for four in the other.
    const OBJECT: usize = 1_024;
    const ARRAY: usize = 320;
    /// An element or a field more; lists grow by doubling.
    const ELEMENT: usize = 192;
    /// Strings are copied.
    const BYTE: usize = 3;
    let count = |byte: u8| json.iter().filter(|other| **other == byte).count();
    let (objects, arrays, elements) = (count(b'{'), count(b'['), count(b','));
    BYTE * json.len() + OBJECT * objects + ARRAY * arrays + ELEMENT * elements
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_takes_what_is_left_and_gives_it_back_at_its_end() {
        let budget = ByteBudget::new(100);
        let (one, other) = (budget.lease_reserved(0), budget.lease_reserved(0));
        assert_eq!((one.grow(60), other.grow(41), other.grow(40), budget.used()), (Ok(()), Err(Full), Ok(()), 100));
        assert_eq!(one.grow(1), Err(Full));
        one.set(10);
        assert_eq!((other.grow(50), budget.used()), (Ok(()), 100));
        // What is there already is counted, whatever there is room for.
        one.set(40);
        assert_eq!((other.grow(1), budget.used()), (Err(Full), 130));
        drop(other);
        let moved = one.take();
        drop(one);
        assert_eq!(budget.used(), 40);
        drop(moved);
        assert_eq!((budget.used(), budget.lease(0).grow(usize::MAX), budget.used()), (0, Err(Full), 0));
    }

    #[test]
    fn answers_leave_the_reserved_part_to_others() {
        let budget = ByteBudget::new(800);
        let (answer, write) = (budget.lease(0), budget.lease_reserved(0));
        assert_eq!((answer.grow(701), answer.grow(700)), (Err(Full), Ok(())));
        assert_eq!((write.grow(101), write.grow(100), budget.used()), (Err(Full), Ok(()), 800));
    }

    #[test]
    fn the_first_bytes_of_a_lease_are_free() {
        let budget = ByteBudget::new(10);
        let lease = budget.lease_reserved(100);
        assert_eq!((lease.grow(100), budget.used()), (Ok(()), 0));
        assert_eq!((lease.grow(7), lease.grow(4), budget.used()), (Ok(()), Err(Full), 7));
        lease.set(50);
        assert_eq!(budget.used(), 0);
        assert_eq!(Lease::default().grow(usize::MAX), Ok(()));
    }

    #[test]
    fn bytes_hold_their_lease_as_long_as_a_part_of_them_is_there() {
        let budget = ByteBudget::new(100);
        let lease = budget.lease(0);
        lease.grow(5).unwrap();
        let bytes = lease.attach(Vec::from("hello"));
        let part = bytes.slice(1..3);
        drop(bytes);
        assert_eq!((&*part, budget.used()), (&b"el"[..], 5));
        drop(part);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn parsing_is_leased_by_what_it_takes_and_small_requests_are_free() {
        let budget = ByteBudget::new(32 << 20);
        let call =
            r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"list_users","arguments":{"limit":5}}}"#;
        let lease = budget.lease_parsing(call.as_bytes()).unwrap();
        assert_eq!(budget.used(), 0);
        drop(lease);
        // As much as a request may have: text costs little, and structure much.
        let text = format!("\"{}\"", "x".repeat(98_000));
        let lease = budget.lease_parsing(text.as_bytes()).unwrap();
        assert!(budget.used() < 400 << 10, "{}", budget.used());
        drop(lease);
        let objects = format!("[{}0]", r#"{"":0},"#.repeat(14_000));
        let lease = budget.lease_parsing(objects.as_bytes()).unwrap();
        assert!(budget.used() > 14_000 * 700, "{}", budget.used());
        let others: Vec<_> = (0..9).map(|_| budget.lease_parsing(objects.as_bytes())).collect();
        assert!(others.iter().any(Result::is_err));
        drop((lease, others));
        assert_eq!(budget.used(), 0);
    }
}
