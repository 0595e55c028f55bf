//! The way of lines to a thread of their own, so that whoever writes one never waits for a disk or a pipe.
//!
//! Lines wait in one piece of memory, bounded by their number, and the thread takes all of them at once. A line costs a copy under a
//! lock that is held for nothing else, and wakes the thread only where that has nothing to do.

use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

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
    /// Whether the thread waits for a line.
    idle: bool,
    closed: bool,
    end: Option<E>,
}

/// What the thread is given, beside the lines.
#[derive(Debug)]
pub(super) struct Taken<E> {
    /// How many there are.
    pub(super) lines: usize,
    /// Nothing more will come; to be told when everything is done.
    pub(super) end: Option<E>,
}

impl<E> Lines<E> {
    /// Room for so many lines.
    pub(super) fn new(room: usize) -> Self {
        let waiting = Waiting { text: Vec::new(), lines: 0, reserved: 0, idle: false, closed: false, end: None };
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

    /// Waits for lines, for so long at most, and puts all of them into `text`, which is empty.
    pub(super) fn take(&self, text: &mut Vec<u8>, patience: Duration) -> Taken<E> {
        let mut waiting = self.lock();
        if waiting.lines == 0 && !waiting.closed {
            waiting.idle = true;
            let idle = |waiting: &mut Waiting<E>| waiting.idle;
            waiting =
                self.arrived.wait_timeout_while(waiting, patience, idle).unwrap_or_else(PoisonError::into_inner).0;
            waiting.idle = false;
        }
        text.shrink_to(KEPT_BYTES);
        mem::swap(&mut waiting.text, text);
        Taken { lines: mem::take(&mut waiting.lines), end: waiting.end.take() }
    }

    fn push(&self, mut waiting: MutexGuard<'_, Waiting<E>>, line: &[u8]) {
        waiting.text.extend_from_slice(line);
        waiting.lines += 1;
        self.wake(waiting);
    }

    fn wake(&self, mut waiting: MutexGuard<'_, Waiting<E>>) {
        let was_idle = mem::take(&mut waiting.idle);
        drop(waiting);
        if was_idle {
            self.arrived.notify_one();
        }
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
