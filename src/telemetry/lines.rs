//! The way of lines to a thread of their own, so that whoever writes one never waits for a disk or a pipe.
//!
//! Lines wait in one piece of memory, bounded by their number, and the thread takes all of them at once. A line costs a copy under a
//! lock that is held for nothing else. The first wakes the thread; then it lets more gather, for a while and not beyond what the
//! processor's cache has room for beside everything else.

use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// So many bytes are worth being written at once; more would drive out of the processor's cache what calls need.
const ENOUGH_BYTES: usize = 64 * 1024;
/// Memory that one burst needed and the next will not is given back.
const KEPT_BYTES: usize = 1 << 20;

/// Lines that wait. `E` is how whoever closes them is told of the end.
#[derive(Debug)]
pub(super) struct Lines<E> {
    waiting: Mutex<Waiting<E>>,
    arrived: Condvar,
    room: usize,
}

#[derive(Debug)]
struct Waiting<E> {
    text: Vec<u8>,
    lines: usize,
    /// Room that is promised to lines to come.
    reserved: usize,
    /// How many bytes the thread waits for, if it does.
    awaited: Option<usize>,
    closed: bool,
    end: Option<E>,
}

impl<E> Lines<E> {
    /// Room for so many lines.
    pub(super) fn new(room: usize) -> Self {
        let waiting = Waiting { text: Vec::new(), lines: 0, reserved: 0, awaited: None, closed: false, end: None };
        Self { waiting: Mutex::new(waiting), arrived: Condvar::new(), room }
    }

    /// Adds a line, which ends with its line break; false when there is no room.
    pub(super) fn add(&self, line: &[u8]) -> bool {
        let waiting = self.lock();
        let has_room = !waiting.closed && waiting.lines + waiting.reserved < self.room;
        if has_room {
            self.push(waiting, line);
        }
        has_room
    }

    /// Keeps room for a line, if there is any.
    pub(super) fn reserve(self: &Arc<Self>) -> Option<Reserved<E>> {
        let mut waiting = self.lock();
        let has_room = !waiting.closed && waiting.lines + waiting.reserved < self.room;
        has_room.then(|| {
            waiting.reserved += 1;
            Reserved(Arc::clone(self))
        })
    }

    /// Takes no more lines; the thread gets those that wait, and `end` with them.
    pub(super) fn close(&self, end: E) {
        let mut waiting = self.lock();
        waiting.closed = true;
        waiting.end = Some(end);
        self.wake(waiting);
    }

    /// Waits for lines, for so long at most, and puts all of them into `text`, which is empty. When nothing more will come, that is who
    /// waits to be told that everything is done.
    pub(super) fn take(&self, text: &mut Vec<u8>, patience: Duration) -> Option<E> {
        text.shrink_to(KEPT_BYTES);
        let mut waiting = self.wait_for(1, patience);
        mem::swap(&mut waiting.text, text);
        waiting.lines = 0;
        waiting.end.take()
    }

    /// Lets lines gather, for so long at most: a wake-up for each would cost more than the line.
    pub(super) fn gather(&self, patience: Duration) {
        drop(self.wait_for(ENOUGH_BYTES, patience));
    }

    /// Waits for so many bytes, or the end.
    fn wait_for(&self, bytes: usize, patience: Duration) -> MutexGuard<'_, Waiting<E>> {
        let mut waiting = self.lock();
        if waiting.text.len() < bytes && !waiting.closed {
            waiting.awaited = Some(bytes);
            let unanswered = |waiting: &mut Waiting<E>| waiting.awaited.is_some();
            let waited = self.arrived.wait_timeout_while(waiting, patience, unanswered);
            waiting = waited.unwrap_or_else(PoisonError::into_inner).0;
            waiting.awaited = None;
        }
        waiting
    }

    fn push(&self, mut waiting: MutexGuard<'_, Waiting<E>>, line: &[u8]) {
        waiting.text.extend_from_slice(line);
        waiting.lines += 1;
        if waiting.awaited.is_some_and(|bytes| waiting.text.len() >= bytes) {
            self.wake(waiting);
        }
    }

    fn wake(&self, mut waiting: MutexGuard<'_, Waiting<E>>) {
        waiting.awaited = None;
        drop(waiting);
        self.arrived.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Waiting<E>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Room for one line, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Reserved<E>(Arc<Lines<E>>);

impl<E> Reserved<E> {
    /// Adds the line.
    pub(super) fn add(self, line: &[u8]) {
        self.0.push(self.0.lock(), line);
    }
}

impl<E> Drop for Reserved<E> {
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
        let lines = Arc::new(Lines::<()>::new(3));
        let promised = lines.reserve().unwrap();
        assert_eq!([lines.add(b"1\n"), lines.add(b"2\n"), lines.add(b"3\n")], [true, true, false]);
        assert!(lines.reserve().is_none());
        promised.add(b"promised\n");
        let mut text = Vec::new();
        assert!(lines.take(&mut text, SOON).is_none());
        assert_eq!(text, b"1\n2\npromised\n");

        drop(lines.reserve());
        assert!((0..3).all(|_| lines.add(b"again\n")));
    }

    #[test]
    fn a_thread_that_lets_lines_gather_is_woken_when_they_are_many() {
        let lines = Arc::new(Lines::<()>::new(10));
        let gathering = std::thread::spawn({
            let lines = Arc::clone(&lines);
            move || lines.gather(Duration::from_secs(60))
        });
        while lines.lock().awaited.is_none() {
            std::thread::yield_now();
        }
        assert!(lines.add(b"line\n"));
        assert_eq!(lines.lock().awaited, Some(ENOUGH_BYTES));
        assert!(lines.add(&[b'\n'; ENOUGH_BYTES]));
        gathering.join().unwrap();
        // Many are there already.
        lines.gather(Duration::from_secs(60));
    }

    #[test]
    fn a_thread_that_waits_is_woken_by_a_line_and_by_the_end() {
        let lines = Arc::new(Lines::new(10));
        let (seen, taken) = std::sync::mpsc::channel();
        let waiting = std::thread::spawn({
            let lines = Arc::clone(&lines);
            move || {
                loop {
                    let mut text = Vec::new();
                    let end = lines.take(&mut text, Duration::from_secs(60));
                    seen.send(text).unwrap();
                    if end.is_some() {
                        return;
                    }
                }
            }
        });
        assert!(lines.add(b"line\n"));
        assert_eq!(taken.recv().unwrap(), b"line\n");
        lines.close(());
        assert!(taken.recv().unwrap().is_empty());
        waiting.join().unwrap();
        assert!(!lines.add(b"too late\n"));
        assert!(lines.reserve().is_none());
    }
}
