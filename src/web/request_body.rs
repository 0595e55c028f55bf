//! Reading the body of a request: within a time, a size and a budget of memory. Or throwing it away, where nobody needs it.
//!
//! While a body is read, its request takes no place from others: a body may come as slowly as its sender likes. What it may cost is
//! memory, and that has a budget of its own here, so that slow senders take none from the answers, the writes and the requests
//! that are being parsed.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http_body::Body as _;
use http_body_util::BodyExt as _;

use crate::memory::{ByteBudget, Full, Lease};

/// Of each body, so many bytes are not counted: the number of bodies is bounded by MAX_CONNECTIONS. Only the longest legal calls are
/// larger, so that all others find room whatever is being sent beside them.
const UNCOUNTED: usize = 32 << 10;

/// How long a body may take that is thrown away.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// Throws a body away, up to so many bytes. Whether it was read to its end, so that another request can follow it.
pub(super) async fn drain(mut body: Body, max_bytes: usize) -> bool {
    if body.size_hint().lower() > max_bytes as u64 {
        return false;
    }
    let read = async {
        let mut bytes = 0;
        while let Some(frame) = body.frame().await {
            let Ok(frame) = frame else { return false };
            bytes += frame.data_ref().map_or(0, Bytes::len);
            if bytes > max_bytes {
                return false;
            }
        }
        true
    };
    tokio::time::timeout(DRAIN_TIMEOUT, read).await.unwrap_or(false)
}

/// Why there is no body.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ReadError {
    /// It was not complete in time.
    TooSlow(Duration),
    /// It is larger than may be read.
    TooLarge,
    /// The bodies that are being read take all the memory that they may.
    NoMemory,
    /// The connection broke, or what came is no body.
    Incomplete,
}

/// Reads bodies within these limits.
pub(super) struct BodyReader {
    timeout: Duration,
    max_bytes: usize,
    memory: Arc<ByteBudget>,
}

impl BodyReader {
    /// `answers` is MAX_BUFFERED_BYTES: all bodies together may take half as much beside it. By default that is enough for a largest
    /// body on each connection, so that none is refused for the sake of another.
    pub(super) fn new(timeout: Duration, max_bytes: usize, answers: usize) -> Self {
        Self { timeout, max_bytes, memory: ByteBudget::new(answers / 2) }
    }

    /// The whole body, which holds its memory until it is dropped.
    ///
    /// # Errors
    ///
    /// What was read is lost then; what is left of the body has not been read.
    pub(super) async fn read(&self, body: &mut Body) -> Result<Bytes, ReadError> {
        let whole = tokio::time::timeout(self.timeout, self.collect(body)).await;
        whole.unwrap_or(Err(ReadError::TooSlow(self.timeout)))
    }

    async fn collect(&self, body: &mut Body) -> Result<Bytes, ReadError> {
        let announced = body.size_hint().exact().and_then(|bytes| usize::try_from(bytes).ok());
        let largest = announced.unwrap_or(usize::MAX).min(self.max_bytes);
        // The usual body takes nothing from the budget, and does not touch its counters.
        let lease = if largest <= UNCOUNTED { Lease::default() } else { self.memory.lease_reserved(UNCOUNTED) };
        let (mut only, mut whole) = (Bytes::new(), Vec::new());
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| ReadError::Incomplete)?;
            let Ok(data) = frame.into_data() else { continue };
            let length = only.len() + whole.len() + data.len();
            if length > self.max_bytes {
                return Err(ReadError::TooLarge);
            }
            // A body that arrives in one piece is not copied.
            if length == data.len() {
                lease.grow(length).map_err(|Full| ReadError::NoMemory)?;
                only = data;
                continue;
            }
            if length > whole.capacity() {
                // As it comes, not as it was announced; and one buffer for all pieces, however small they are.
                let most = if length > UNCOUNTED { largest } else { UNCOUNTED };
                let capacity = (2 * length).min(most).max(length);
                lease.grow(capacity - whole.capacity().max(only.len())).map_err(|Full| ReadError::NoMemory)?;
                whole.reserve_exact(capacity - whole.len());
            }
            whole.extend_from_slice(&std::mem::take(&mut only));
            whole.extend_from_slice(&data);
        }
        Ok(if whole.is_empty() { lease.attach(only) } else { lease.attach(whole) })
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;

    use super::*;

    const LARGEST: usize = 96 << 10;

    fn in_pieces(of: usize, count: usize) -> Body {
        let pieces = (0..count).map(move |number| Ok::<_, std::io::Error>(Bytes::from(vec![number as u8; of])));
        Body::from_stream(stream::iter(pieces))
    }

    fn reader(answers: usize) -> BodyReader {
        BodyReader::new(Duration::from_secs(1), LARGEST, answers)
    }

    #[tokio::test]
    async fn a_body_is_the_same_in_any_pieces_and_gives_its_memory_back_with_its_last_byte() {
        let reader = reader(1 << 20);
        for (of, count, counted) in [
            (5, 0, 0..=0),
            (0, 7, 0..=0),
            (5, 1, 0..=0),
            (UNCOUNTED, 1, 0..=0),
            (1, 10_000, 0..=0),
            (1, 50_000, 50_000 - UNCOUNTED..=LARGEST - UNCOUNTED),
            (LARGEST, 1, LARGEST - UNCOUNTED..=LARGEST - UNCOUNTED),
            (LARGEST / 96, 96, LARGEST - UNCOUNTED..=LARGEST - UNCOUNTED),
        ] {
            let body = reader.read(&mut in_pieces(of, count)).await.unwrap();
            let expected: Vec<_> = (0..count).flat_map(|number| vec![number as u8; of]).collect();
            assert!(*body == *expected, "{count} of {of}");
            assert!(counted.contains(&reader.memory.used()), "{count} of {of}: {}", reader.memory.used());
            drop(body);
            assert_eq!(reader.memory.used(), 0, "{count} of {of}");
        }
        assert_eq!(reader.read(&mut in_pieces(LARGEST / 96, 97)).await, Err(ReadError::TooLarge));
        let broken = stream::iter([Ok(Bytes::from_static(b"{")), Err(std::io::Error::other("reset"))]);
        assert_eq!(reader.read(&mut Body::from_stream(broken)).await, Err(ReadError::Incomplete));
        assert_eq!(reader.memory.used(), 0);
    }

    #[tokio::test]
    async fn what_is_uncounted_is_read_when_all_memory_for_bodies_is_taken() {
        let reader = reader(4 * (LARGEST - UNCOUNTED));
        let held: Vec<_> =
            [reader.read(&mut in_pieces(LARGEST, 1)).await, reader.read(&mut in_pieces(LARGEST, 1)).await].into();
        assert!(held.iter().all(Result::is_ok));
        assert_eq!(reader.read(&mut in_pieces(1_024, 33)).await, Err(ReadError::NoMemory));
        assert_eq!(reader.read(&mut in_pieces(1_024, 32)).await.map(|body| body.len()), Ok(UNCOUNTED));
        drop(held);
        assert_eq!(reader.read(&mut in_pieces(1_024, 33)).await.map(|body| body.len()), Ok(33 << 10));
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_has_its_time_as_a_whole_and_what_was_held_is_given_back() {
        let reader = reader(1 << 20);
        let dripping = stream::unfold((), |()| async {
            tokio::time::sleep(Duration::from_millis(10)).await;
            Some((Ok::<_, std::io::Error>(Bytes::from(vec![b'x'; 900])), ()))
        });
        let started = tokio::time::Instant::now();
        let read = reader.read(&mut Body::from_stream(dripping)).await;
        assert_eq!((read, started.elapsed()), (Err(ReadError::TooSlow(reader.timeout)), Duration::from_secs(1)));
        assert_eq!(reader.memory.used(), 0);
    }
}
