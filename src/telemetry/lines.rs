//! The way of lines to a thread of their own, so that whoever writes one never waits for a disk or a pipe.
//!
//! Lines wait as what they will say, bounded by their number, and the thread takes all of them at once and writes them: the code that does
//! finds itself in the processor's cache like this, where in the middle of a call it never is. A line costs a copy under a lock that is
//! held for nothing else. The first wakes the thread; then it lets more gather, for a while and not beyond what that cache has room for.

use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// So many lines are worth being written at once; more would drive out of the processor's cache what calls need.
const ENOUGH: usize = 512;
/// Memory that one burst needed and the next will not is given back.
const KEPT: usize = 2 * ENOUGH;

/// Lines that wait. `E` is how whoever closes them is told of the end.
#[derive(Debug)]
pub(super) struct Lines<T, E> {
    waiting: Mutex<Waiting<T, E>>,
    arrived: Condvar,
    room: usize,
}

#[derive(Debug)]
struct Waiting<T, E> {
    lines: Vec<T>,
    /// Room that is promised to lines to come.
    reserved: usize,
    /// How many lines the thread waits for, if it does.
    awaited: Option<usize>,
    closed: bool,
    end: Option<E>,
}

impl<T, E> Lines<T, E> {
    /// Room for so many lines.
    pub(super) fn new(room: usize) -> Self {
        let waiting = Waiting { lines: Vec::new(), reserved: 0, awaited: None, closed: false, end: None };
        Self { waiting: Mutex::new(waiting), arrived: Condvar::new(), room }
    }

    /// Adds a line; false when there is no room.
    pub(super) fn add(&self, line: T) -> bool {
        let waiting = self.lock();
        let has_room = self.has_room(&waiting);
        if has_room {
            self.push(waiting, line);
        }
        has_room
    }

    /// Keeps room for a line, if there is any.
    pub(super) fn reserve(self: &Arc<Self>) -> Option<Reserved<T, E>> {
        let mut waiting = self.lock();
        self.has_room(&waiting).then(|| {
            waiting.reserved += 1;
            Reserved(Arc::clone(self))
        })
    }

    /// How many lines wait.
    pub(super) fn waiting(&self) -> usize {
        self.lock().lines.len()
    }

    /// Takes no more lines; the thread gets those that wait, and `end` with them.
    pub(super) fn close(&self, end: E) {
        let mut waiting = self.lock();
        waiting.closed = true;
        waiting.end = Some(end);
        self.wake(waiting);
    }

    /// Waits for lines, for so long at most, and puts all of them into `lines`, which is empty. When nothing more will come, that is who
    /// waits to be told that everything is done.
    pub(super) fn take(&self, lines: &mut Vec<T>, patience: Duration) -> Option<E> {
        lines.shrink_to(KEPT);
        let mut waiting = self.wait_for(1, patience);
        mem::swap(&mut waiting.lines, lines);
        waiting.end.take()
    }

    /// Lets lines gather, for so long at most: a wake-up for each would cost more than the line.
    pub(super) fn gather(&self, patience: Duration) {
        drop(self.wait_for(ENOUGH, patience));
    }

    /// Waits for so many lines, or the end.
    fn wait_for(&self, lines: usize, patience: Duration) -> MutexGuard<'_, Waiting<T, E>> {
        let mut waiting = self.lock();
        if waiting.lines.len() < lines && !waiting.closed {
            waiting.awaited = Some(lines);
            let unanswered = |waiting: &mut Waiting<T, E>| waiting.awaited.is_some();
            let waited = self.arrived.wait_timeout_while(waiting, patience, unanswered);
            waiting = waited.unwrap_or_else(PoisonError::into_inner).0;
            waiting.awaited = None;
        }
        waiting
    }

    fn has_room(&self, waiting: &Waiting<T, E>) -> bool {
        !waiting.closed && waiting.lines.len() + waiting.reserved < self.room
    }

    fn push(&self, mut waiting: MutexGuard<'_, Waiting<T, E>>, line: T) {
        waiting.lines.push(line);
        if waiting.awaited.is_some_and(|lines| waiting.lines.len() >= lines) {
            self.wake(waiting);
        }
    }

    fn wake(&self, mut waiting: MutexGuard<'_, Waiting<T, E>>) {
        waiting.awaited = None;
        drop(waiting);
        self.arrived.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Waiting<T, E>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Room for one line, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Reserved<T, E>(Arc<Lines<T, E>>);

impl<T, E> Reserved<T, E> {
    /// Adds the line.
    pub(super) fn add(self, line: T) {
        self.0.push(self.0.lock(), line);
    }
}

impl<T, E> Drop for Reserved<T, E> {
    fn drop(&mut self) {
        self.0.lock().reserved -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(1);

    #[test]
    fn what_finds_no_room_is_refused_and_promised_room_is_kept() {
        let lines = Arc::new(Lines::<_, ()>::new(3));
        let promised = lines.reserve().unwrap();
        assert_eq!([lines.add(1), lines.add(2), lines.add(3)], [true, true, false]);
        assert!(lines.reserve().is_none());
        promised.add(4);
        let mut taken = Vec::new();
        assert!(lines.take(&mut taken, SOON).is_none());
        assert_eq!(taken, [1, 2, 4]);

        drop(lines.reserve());
        assert!((0..3).all(|_| lines.add(5)));
    }

    #[test]
    fn a_thread_that_lets_lines_gather_is_woken_when_they_are_many() {
        let lines = Arc::new(Lines::<_, ()>::new(2 * ENOUGH));
        let gathering = std::thread::spawn({
            let lines = Arc::clone(&lines);
            move || lines.gather(Duration::from_secs(60))
        });
        while lines.lock().awaited.is_none() {
            std::thread::yield_now();
        }
        for line in 1..=ENOUGH {
            assert_eq!(lines.lock().awaited, Some(ENOUGH));
            assert!(lines.add(line));
        }
        gathering.join().unwrap();
        // Many are there already.
        lines.gather(Duration::from_secs(60));
    }

    #[test]
    fn few_lines_gather_no_longer_than_they_may() {
        let lines = Lines::<_, ()>::new(ENOUGH);
        let begun = std::time::Instant::now();
        assert!(lines.add(1));
        lines.gather(SOON);
        let gathered = begun.elapsed();
        assert!(gathered >= SOON && gathered < Duration::from_secs(10), "{gathered:?}");
        let mut taken = Vec::new();
        assert!(lines.take(&mut taken, SOON).is_none());
        assert_eq!(taken, [1]);
    }

    #[test]
    fn a_thread_that_waits_is_woken_by_a_line_and_by_the_end() {
        let lines = Arc::new(Lines::new(10));
        let (seen, taken) = std::sync::mpsc::channel();
        let waiting = std::thread::spawn({
            let lines = Arc::clone(&lines);
            move || {
                loop {
                    let mut some = Vec::new();
                    let end = lines.take(&mut some, Duration::from_secs(60));
                    seen.send(some).unwrap();
                    if end.is_some() {
                        return;
                    }
                }
            }
        });
        assert!(lines.add(1));
        assert_eq!(taken.recv().unwrap(), [1]);
        lines.close(());
        assert!(taken.recv().unwrap().is_empty());
        waiting.join().unwrap();
        assert!(!lines.add(2));
        assert!(lines.reserve().is_none());
    }
}
