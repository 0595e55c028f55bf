//! The places of a listener: how many connections may be open, and which one is closed when another needs its place.
//!
//! A connection keeps its own account of what it is doing in one atomic word. Only a listener without a free place reads the words of
//! all of them, so serving a request takes no lock that connections share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How long a request waits for the connection that is closed for it to be gone.
const ROOM_TIMEOUT: Duration = Duration::from_secs(1);

/// The places of one listener.
pub(super) struct Room {
    places: Arc<Semaphore>,
    /// The connections that have a place, and some that are closed since.
    connections: Mutex<Vec<Arc<Activity>>>,
    capacity: usize,
}

impl Room {
    pub(super) fn new(capacity: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(capacity)), connections: Mutex::default(), capacity }
    }

    /// Gives the connection a place if one is free.
    pub(super) fn admit(&self, activity: &Arc<Activity>) -> Option<OwnedSemaphorePermit> {
        let place = Arc::clone(&self.places).try_acquire_owned().ok()?;
        self.enlist(activity);
        Some(place)
    }

    /// Gives the connection a place, and closes the one that has been idle for longest if none is free. There is none to close where
    /// all are receiving or answering requests.
    pub(super) async fn admit_in_place_of_idle(&self, activity: &Arc<Activity>) -> Option<OwnedSemaphorePermit> {
        if let Some(place) = self.admit(activity) {
            return Some(place);
        }
        if !self.close_longest_idle() {
            return None;
        }
        let place = tokio::time::timeout(ROOM_TIMEOUT, Arc::clone(&self.places).acquire_owned()).await;
        let place = place.ok()?.ok()?;
        self.enlist(activity);
        Some(place)
    }

    /// Closes the connection that has been idle for longest, if one is idle.
    pub(super) fn close_longest_idle(&self) -> bool {
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        connections.retain(is_open);
        let idle = connections.iter().enumerate();
        let idle = idle.filter_map(|(index, activity)| Some((activity.idle_since()?, index)));
        let Some((_, index)) = idle.min() else { return false };
        // It is off the list: no other connection waits for the same place.
        connections.swap_remove(index).close();
        true
    }

    fn enlist(&self, activity: &Arc<Activity>) {
        activity.admit();
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        if connections.len() >= 2 * self.capacity {
            connections.retain(is_open);
        }
        connections.push(Arc::clone(activity));
    }
}

/// A connection's task holds its `Activity` until it ends.
fn is_open(activity: &Arc<Activity>) -> bool {
    Arc::strong_count(activity) > 1
}

/// What a connection is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing has arrived yet.
    Silent,
    /// The head of a request is arriving.
    Receiving,
    /// A request is being answered.
    Answering,
    /// The answer is being written, and there is more of its body to come.
    Writing,
    /// The last bytes of the answer are being written.
    Flushing,
    /// Nothing has arrived since the last answer was written.
    Idle,
}

impl Phase {
    const BITS: u32 = 3;

    fn of(word: u64) -> Self {
        match word & ((1 << Self::BITS) - 1) {
            0 => Self::Silent,
            1 => Self::Receiving,
            2 => Self::Answering,
            3 => Self::Writing,
            4 => Self::Flushing,
            _ => Self::Idle,
        }
    }
}

/// What one connection is doing and since when. The connection writes it; a listener that needs its place reads it.
pub(super) struct Activity {
    accepted: Instant,
    /// A `Phase`, and above it the microseconds from `accepted` to its beginning.
    word: AtomicU64,
    is_admitted: AtomicBool,
    is_closing: AtomicBool,
    /// Cancelled when the connection should answer what it has been asked, and close.
    close: CancellationToken,
}

impl Activity {
    /// A connection that has been accepted now, and closes when `stop` is cancelled.
    pub(super) fn new(stop: &CancellationToken) -> Arc<Self> {
        Arc::new(Self {
            accepted: Instant::now(),
            word: AtomicU64::default(),
            is_admitted: AtomicBool::default(),
            is_closing: AtomicBool::default(),
            close: stop.child_token(),
        })
    }

    pub(super) fn accepted(&self) -> Instant {
        self.accepted
    }

    pub(super) fn phase(&self) -> Phase {
        Phase::of(self.word.load(Relaxed))
    }

    /// Begins a phase. Returns when that was.
    pub(super) fn enter(&self, phase: Phase) -> Instant {
        let now = Instant::now();
        let micros = now.duration_since(self.accepted).as_micros() as u64;
        self.word.store(micros << Phase::BITS | phase as u64, Relaxed);
        now
    }

    /// Since when nothing is being asked or answered on the connection, if that is so.
    fn idle_since(&self) -> Option<Instant> {
        let word = self.word.load(Relaxed);
        matches!(Phase::of(word), Phase::Silent | Phase::Idle).then(|| self.since(word))
    }

    /// The phase, and when it began.
    pub(super) fn phase_since(&self) -> (Phase, Instant) {
        let word = self.word.load(Relaxed);
        (Phase::of(word), self.since(word))
    }

    fn since(&self, word: u64) -> Instant {
        self.accepted + Duration::from_micros(word >> Phase::BITS)
    }

    /// Notes that the connection has a place.
    pub(super) fn admit(&self) {
        self.is_admitted.store(true, Relaxed);
    }

    /// Whether the connection has a place of the listener's.
    pub(super) fn is_admitted(&self) -> bool {
        self.is_admitted.load(Relaxed)
    }

    /// Closes the connection, unless a request has arrived: then after its answer.
    pub(super) fn close(&self) {
        self.announce_close();
        self.close.cancel();
    }

    /// Makes the next answer on the connection the last.
    pub(super) fn announce_close(&self) {
        self.is_closing.store(true, Relaxed);
    }

    /// Whether the next answer on the connection has to be the last.
    pub(super) fn is_closing(&self) -> bool {
        self.is_closing.load(Relaxed)
    }

    /// Completes when the connection should close.
    pub(super) async fn closing(&self) {
        self.close.cancelled().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection() -> Arc<Activity> {
        Activity::new(&CancellationToken::new())
    }

    #[tokio::test(start_paused = true)]
    async fn the_longest_idle_is_closed_and_never_one_that_is_busy() {
        let room = Room::new(5);
        let connections: Vec<_> = std::iter::repeat_with(connection).take(5).collect();
        let _places: Vec<_> = connections.iter().map(|connection| room.admit(connection).unwrap()).collect();
        for (index, phase) in [(3, Phase::Idle), (1, Phase::Idle), (0, Phase::Answering), (2, Phase::Receiving)] {
            tokio::time::advance(Duration::from_secs(1)).await;
            connections[index].enter(phase);
        }
        let closed = || connections.iter().map(|connection| connection.close.is_cancelled()).collect::<Vec<_>>();
        assert!(room.admit(&connection()).is_none());
        // The fourth has been idle for longer than the second, and the fifth has never sent anything.
        assert!(room.close_longest_idle());
        assert_eq!(closed(), [false, false, false, false, true]);
        assert!(room.close_longest_idle());
        assert_eq!(closed(), [false, false, false, true, true]);
        for phase in [Phase::Receiving, Phase::Answering, Phase::Writing, Phase::Flushing] {
            connections[1].enter(phase);
            assert!(!room.close_longest_idle(), "{phase:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_is_waited_for_no_longer_than_its_time() {
        let room = Room::new(1);
        let idle = connection();
        let _place = room.admit(&idle).unwrap();
        let begin = Instant::now();
        // The idle one does not leave.
        assert!(room.admit_in_place_of_idle(&connection()).await.is_none());
        assert_eq!(begin.elapsed(), ROOM_TIMEOUT);
    }

    #[test]
    fn connections_that_ended_are_forgotten() {
        let room = Room::new(4);
        for _ in 0..1_000 {
            drop(room.admit(&connection()).unwrap());
        }
        assert!(room.connections.lock().unwrap().len() <= 8);
    }
}
