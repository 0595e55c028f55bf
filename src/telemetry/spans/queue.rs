//! Where the spans of requests wait to be laid out and sent: bounded.
//!
//! A request costs a copy under a lock that is held for nothing else. The task that sends is woken by the first spans of a batch, then for
//! every so many, which it lays out while they are in the processor's cache, and when the batch is full.

use std::collections::VecDeque;
use std::mem;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, timeout_at};

/// So many spans are laid out in a row.
const PIECE: usize = 64;

/// What comes next.
#[derive(Debug)]
pub(super) enum Next<T> {
    /// Some requests, to be sent as soon as a batch is full.
    Requests(Piece<T>),
    /// It is time to send whatever there is.
    Send,
    /// Everything before is sent: say so.
    Flushed(oneshot::Sender<()>),
}

/// Requests that are laid out in a row.
#[derive(Debug)]
pub(super) struct Piece<T> {
    pub(super) requests: Vec<T>,
    spans: usize,
}

/// The way from whoever ends a request to the task that sends its spans.
#[derive(Debug)]
pub(super) struct Queue<T> {
    waiting: Mutex<Waiting<T>>,
    changed: Notify,
    max_queue: usize,
    max_batch: usize,
    delay: Duration,
}

#[derive(Debug)]
struct Waiting<T> {
    ready: VecDeque<Next<T>>,
    gathering: Piece<T>,
    /// How many spans there are in all of it.
    spans: usize,
    /// How many spans the batch has that is not full yet.
    batch: usize,
    /// When that is sent all the same.
    due: Option<Instant>,
    /// Nobody is left to end a request.
    closed: bool,
}

impl<T> Waiting<T> {
    fn end_piece(&mut self) {
        let usual = self.gathering.requests.len();
        if usual > 0 {
            let next = Piece { requests: Vec::with_capacity(usual), spans: 0 };
            self.ready.push_back(Next::Requests(mem::replace(&mut self.gathering, next)));
        }
    }

    fn end_batch(&mut self) {
        self.end_piece();
        if mem::take(&mut self.batch) > 0 {
            self.ready.push_back(Next::Send);
        }
        self.due = None;
    }
}

impl<T> Queue<T> {
    pub(super) fn new(max_queue: usize, max_batch: usize, delay: Duration) -> Self {
        let gathering = Piece { requests: Vec::new(), spans: 0 };
        let waiting = Waiting { ready: VecDeque::new(), gathering, spans: 0, batch: 0, due: None, closed: false };
        Self { waiting: Mutex::new(waiting), changed: Notify::new(), max_queue, max_batch, delay }
    }

    /// Adds a request that has so many spans; false when there is no room for all of them.
    pub(super) fn add(&self, request: T, spans: usize) -> bool {
        let mut waiting = self.lock();
        if waiting.spans + spans > self.max_queue {
            return false;
        }
        waiting.gathering.requests.push(request);
        waiting.gathering.spans += spans;
        waiting.spans += spans;
        waiting.batch += spans;
        let is_batch = waiting.batch >= self.max_batch;
        if is_batch {
            // What is too much for it is in the next.
            waiting.batch = waiting.batch.checked_rem(self.max_batch).unwrap_or_default();
        }
        let begins_batch = waiting.batch > 0 && waiting.batch <= spans;
        if is_batch || begins_batch {
            waiting.due = begins_batch.then(|| Instant::now() + self.delay);
        }
        let is_piece = is_batch || waiting.gathering.spans >= PIECE;
        if is_piece {
            waiting.end_piece();
        }
        drop(waiting);
        if is_piece || begins_batch {
            self.changed.notify_one();
        }
        true
    }

    /// Asks to be told when everything that waits now is sent.
    pub(super) fn flush(&self) -> oneshot::Receiver<()> {
        let (done, flushed) = oneshot::channel();
        let mut waiting = self.lock();
        waiting.end_batch();
        waiting.ready.push_back(Next::Flushed(done));
        drop(waiting);
        self.changed.notify_one();
        flushed
    }

    /// Nothing more will come.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_one();
    }

    /// Waits for what comes next; `None` at the end.
    pub(super) async fn next(&self) -> Option<Next<T>> {
        loop {
            let due = {
                let mut waiting = self.lock();
                if waiting.closed || waiting.due.is_some_and(|due| due <= Instant::now()) {
                    waiting.end_batch();
                }
                match waiting.ready.pop_front() {
                    Some(next) => {
                        if let Next::Requests(piece) = &next {
                            waiting.spans -= piece.spans;
                        }
                        return Some(next);
                    }
                    None if waiting.closed => return None,
                    None => waiting.due,
                }
            };
            match due {
                // Whichever it was, the next look tells.
                Some(due) => _ = timeout_at(due, self.changed.notified()).await,
                None => self.changed.notified().await,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting<T>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DELAY: Duration = Duration::from_secs(5);

    /// Adds so many requests, each with so many spans; gives how many found room.
    fn add(queue: &Queue<()>, requests: usize, spans: usize) -> usize {
        (0..requests).filter(|_| queue.add((), spans)).count()
    }

    /// The sizes in spans of the pieces until it is time to send.
    async fn pieces(queue: &Queue<()>) -> Vec<usize> {
        let mut pieces = Vec::new();
        loop {
            match queue.next().await {
                Some(Next::Requests(piece)) => pieces.push(piece.spans),
                Some(Next::Send) => return pieces,
                other => panic!("{other:?}"),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_batch_comes_at_once_and_a_rest_when_it_is_due_and_what_finds_no_room_is_refused() {
        let queue = Queue::new(10, 4, DELAY);
        assert_eq!(add(&queue, 12, 1), 10);
        let begun = Instant::now();
        for _ in 0..2 {
            let Some(Next::Requests(Piece { spans: 4, .. })) = queue.next().await else { panic!() };
        }
        assert_eq!(begun.elapsed(), Duration::ZERO);
        assert_eq!(pieces(&queue).await, [2]);
        assert_eq!(begun.elapsed(), DELAY);
        assert_eq!((add(&queue, 20, 3), add(&queue, 20, 2), add(&queue, 20, 1)), (3, 0, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_too_much_for_one_batch_waits_with_the_next() {
        let queue = Queue::new(100, 4, DELAY);
        let begun = Instant::now();
        assert_eq!(add(&queue, 1, 3), 1);
        tokio::time::advance(DELAY / 2).await;
        assert_eq!(add(&queue, 1, 3), 1);
        let Some(Next::Requests(Piece { spans: 6, .. })) = queue.next().await else { panic!() };
        assert_eq!(begun.elapsed(), DELAY / 2);
        assert!(pieces(&queue).await.is_empty());
        assert_eq!(begun.elapsed(), DELAY / 2 + DELAY, "the two that are left wait since they came");
        // Several batches at once, and nothing left.
        assert_eq!(add(&queue, 1, 12), 1);
        let Some(Next::Requests(Piece { spans: 12, .. })) = queue.next().await else { panic!() };
        assert!(tokio::time::timeout(10 * DELAY, queue.next()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn the_task_is_woken_by_what_it_waits_for_and_sends_all_before_it_ends() {
        let queue = std::sync::Arc::new(Queue::new(10, 4, DELAY));
        let waiting = tokio::spawn({
            let queue = std::sync::Arc::clone(&queue);
            async move { (pieces(&queue).await, queue.next().await, pieces(&queue).await, queue.next().await) }
        });
        tokio::task::yield_now().await;
        assert_eq!(add(&queue, 5, 1), 5);
        let flushed = queue.flush();
        tokio::task::yield_now().await;
        assert_eq!(add(&queue, 1, 1), 1);
        queue.close();
        let (before, next, after, end) = waiting.await.unwrap();
        assert_eq!((before, after), (vec![4, 1], vec![1]));
        let Some(Next::Flushed(done)) = next else { panic!("{next:?}") };
        done.send(()).unwrap();
        flushed.await.unwrap();
        assert!(end.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_batch_comes_in_pieces_of_which_each_makes_room() {
        let queue = Queue::new(4 * PIECE, 3 * PIECE - 1, DELAY);
        assert_eq!(add(&queue, 5 * PIECE, 1), 4 * PIECE);
        assert!(matches!(queue.next().await, Some(Next::Requests(_))));
        assert_eq!(add(&queue, 2 * PIECE, 1), PIECE);
        assert_eq!(pieces(&queue).await, [PIECE, PIECE - 1, PIECE, PIECE, 1]);
    }
}
