//! Where spans wait to be laid out and sent: bounded.
//!
//! A span costs a pointer under a lock that is held for nothing else. The task that sends is woken by the first span of a batch, then for
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
    /// Some spans of a batch.
    Spans(Vec<T>),
    /// The batch is full, or it is time to send it.
    Send,
    /// Everything before is sent: say so.
    Flushed(oneshot::Sender<()>),
}

/// The way from whoever ends a span to the task that sends it.
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
    gathering: Vec<T>,
    /// How many spans there are in all of it.
    spans: usize,
    /// How many spans the batch has that is not to be sent yet.
    batch: usize,
    /// When that is sent, though it is not full.
    due: Option<Instant>,
    /// Nobody is left to end a span.
    closed: bool,
}

impl<T> Waiting<T> {
    fn end_piece(&mut self) {
        if !self.gathering.is_empty() {
            let piece = mem::replace(&mut self.gathering, Vec::with_capacity(PIECE));
            self.ready.push_back(Next::Spans(piece));
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
        let (ready, gathering) = (VecDeque::new(), Vec::new());
        let waiting = Waiting { ready, gathering, spans: 0, batch: 0, due: None, closed: false };
        let max_batch = max_batch.min(max_queue);
        Self { waiting: Mutex::new(waiting), changed: Notify::new(), max_queue, max_batch, delay }
    }

    /// Adds a span; false when there is no room.
    pub(super) fn add(&self, span: T) -> bool {
        let mut waiting = self.lock();
        if waiting.spans >= self.max_queue {
            return false;
        }
        waiting.gathering.push(span);
        waiting.spans += 1;
        waiting.batch += 1;
        let is_first = waiting.batch == 1;
        if is_first {
            waiting.due = Some(Instant::now() + self.delay);
        }
        let (is_batch, is_piece) = (waiting.batch >= self.max_batch, waiting.gathering.len() >= PIECE);
        if is_batch {
            waiting.end_batch();
        } else if is_piece {
            waiting.end_piece();
        }
        drop(waiting);
        if is_first || is_batch || is_piece {
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
                        if let Next::Spans(spans) = &next {
                            waiting.spans -= spans.len();
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

    fn add(queue: &Queue<()>, spans: usize) -> usize {
        (0..spans).filter(|_| queue.add(())).count()
    }

    /// The sizes of the pieces of the next batch.
    async fn batch(queue: &Queue<()>) -> Vec<usize> {
        let mut pieces = Vec::new();
        loop {
            match queue.next().await {
                Some(Next::Spans(spans)) => pieces.push(spans.len()),
                Some(Next::Send) => return pieces,
                other => panic!("{other:?}"),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_is_sent_when_it_is_full_or_due_and_what_finds_no_room_is_refused() {
        let queue = Queue::new(10, 4, DELAY);
        assert_eq!(add(&queue, 12), 10);
        let begun = Instant::now();
        assert_eq!([batch(&queue).await, batch(&queue).await], [[4], [4]]);
        assert_eq!(begun.elapsed(), Duration::ZERO);
        assert_eq!(batch(&queue).await, [2]);
        assert!(begun.elapsed() >= DELAY);
        assert_eq!(add(&queue, 20), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn the_task_is_woken_by_what_it_waits_for_and_sends_all_before_it_ends() {
        let queue = std::sync::Arc::new(Queue::new(10, 4, DELAY));
        let waiting = tokio::spawn({
            let queue = std::sync::Arc::clone(&queue);
            async move { (batch(&queue).await, batch(&queue).await, queue.next().await) }
        });
        tokio::task::yield_now().await;
        assert_eq!(add(&queue, 5), 5);
        let flushed = queue.flush();
        let (full, rest, next) = waiting.await.unwrap();
        assert_eq!([full, rest], [[4], [1]]);
        let Some(Next::Flushed(done)) = next else { panic!("{next:?}") };
        done.send(()).unwrap();
        flushed.await.unwrap();

        assert_eq!(add(&queue, 1), 1);
        queue.close();
        assert_eq!(batch(&queue).await, [1]);
        assert!(queue.next().await.is_none());
    }
    #[tokio::test(start_paused = true)]
    async fn a_large_batch_comes_in_pieces_of_which_each_makes_room() {
        let queue = Queue::new(4 * PIECE, 3 * PIECE - 1, DELAY);
        assert_eq!(add(&queue, 5 * PIECE), 4 * PIECE);
        assert!(matches!(queue.next().await, Some(Next::Spans(_))));
        assert_eq!(add(&queue, 2 * PIECE), PIECE);
        assert_eq!(batch(&queue).await, [PIECE, PIECE - 1]);
        assert_eq!(batch(&queue).await, [PIECE, PIECE, 1]);
    }
}
