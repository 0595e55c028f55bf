//! Where spans wait to be sent: bounded, and in the batches in which they are sent.
//!
//! A span costs a pointer under a lock that is held for nothing else. The task that sends is woken by the first span of a batch and by
//! the last, not by each.

use std::collections::VecDeque;
use std::mem;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, timeout_at};

/// What comes next.
#[derive(Debug)]
pub(super) enum Next<T> {
    /// Spans that are sent together.
    Send(Vec<T>),
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
    /// What is full, or shall be sent at once.
    ready: VecDeque<Next<T>>,
    gathering: Vec<T>,
    /// When that is sent, though it is not full.
    due: Option<Instant>,
    /// How many spans there are in all of it.
    spans: usize,
    /// Nobody is left to end a span.
    closed: bool,
}

impl<T> Waiting<T> {
    fn seal(&mut self) {
        self.due = None;
        if !self.gathering.is_empty() {
            let next = Vec::with_capacity(self.gathering.len());
            self.ready.push_back(Next::Send(mem::replace(&mut self.gathering, next)));
        }
    }
}

impl<T> Queue<T> {
    pub(super) fn new(max_queue: usize, max_batch: usize, delay: Duration) -> Self {
        let waiting = Waiting { ready: VecDeque::new(), gathering: Vec::new(), due: None, spans: 0, closed: false };
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
        let (is_first, is_full) = (waiting.gathering.len() == 1, waiting.gathering.len() >= self.max_batch);
        if is_first {
            waiting.due = Some(Instant::now() + self.delay);
        }
        if is_full {
            waiting.seal();
        }
        drop(waiting);
        if is_first || is_full {
            self.changed.notify_one();
        }
        true
    }

    /// Asks to be told when everything that waits now is sent.
    pub(super) fn flush(&self) -> oneshot::Receiver<()> {
        let (done, flushed) = oneshot::channel();
        let mut waiting = self.lock();
        waiting.seal();
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
                    waiting.seal();
                }
                match waiting.ready.pop_front() {
                    Some(next) => {
                        if let Next::Send(batch) = &next {
                            waiting.spans -= batch.len();
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

    async fn batch(queue: &Queue<()>) -> usize {
        match queue.next().await {
            Some(Next::Send(batch)) => batch.len(),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_is_sent_when_it_is_full_or_due_and_what_finds_no_room_is_refused() {
        let queue = Queue::new(10, 4, DELAY);
        assert_eq!(add(&queue, 12), 10);
        let begun = Instant::now();
        assert_eq!((batch(&queue).await, batch(&queue).await), (4, 4));
        assert_eq!(begun.elapsed(), Duration::ZERO);
        assert_eq!(batch(&queue).await, 2);
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
        assert_eq!((full, rest), (4, 1));
        let Some(Next::Flushed(done)) = next else { panic!("{next:?}") };
        done.send(()).unwrap();
        flushed.await.unwrap();

        assert_eq!(add(&queue, 1), 1);
        queue.close();
        assert_eq!(batch(&queue).await, 1);
        assert!(queue.next().await.is_none());
    }
}
