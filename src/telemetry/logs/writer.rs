//! The thread that writes lines, so that a slow terminal or pipe never slows a call.
//!
//! Lines wait in a bounded queue. What finds no room there is dropped and counted, and the log itself says how many lines it lacks.
//! At the end everything that waits is written, unless nobody reads for seconds; then stderr is told.

use std::io::{self, BufWriter, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

/// How many lines may wait for stdout.
const QUEUED_LINES: usize = 8_192;
/// How long the thread collects lines before it writes them in one go: a wake-up and a system call for each line would cost more
/// than the line.
const COLLECTING: Duration = Duration::from_millis(5);
/// How long the end of the process waits for somebody to read the last lines.
const LAST_LINES: Duration = Duration::from_secs(3);

enum Message {
    Line(Vec<u8>),
    /// Nothing more will come that matters.
    Finish(SyncSender<()>),
}

/// The way to the thread; each write is one line.
#[derive(Clone)]
pub(super) struct LineWriter {
    queue: SyncSender<Message>,
    dropped: Arc<AtomicU64>,
}

impl LineWriter {
    /// Starts the thread. `lament` is the line that tells of so many dropped ones.
    pub(super) fn start(
        out: impl Write + Send + 'static,
        lament: fn(u64) -> String,
    ) -> io::Result<(Self, WriterGuard)> {
        let (queue, lines) = sync_channel(QUEUED_LINES);
        let dropped = Arc::new(AtomicU64::new(0));
        let out = BufWriter::with_capacity(64 * 1024, out);
        let writer = Writer { out, lament, dropped: Arc::clone(&dropped), told: 0 };
        std::thread::Builder::new().name("logs".to_owned()).spawn(move || writer.run(&lines))?;
        let guard = WriterGuard { queue: queue.clone() };
        Ok((Self { queue, dropped }, guard))
    }

    /// How many lines were dropped so far, for whoever counts them.
    pub(super) fn dropped(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.dropped)
    }
}

impl Write for LineWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.queue.try_send(Message::Line(line.to_vec())).is_err() {
            self.dropped.fetch_add(1, Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Dropping it writes what is still queued.
pub(super) struct WriterGuard {
    queue: SyncSender<Message>,
}

impl Drop for WriterGuard {
    #[expect(clippy::disallowed_methods, reason = "the process ends: there is no other work to keep waiting")]
    #[expect(clippy::print_stderr, reason = "stdout is what does not work")]
    fn drop(&mut self) {
        let deadline = Instant::now() + LAST_LINES;
        let (finished, end) = sync_channel(1);
        let mut message = Message::Finish(finished);
        let finished = loop {
            match self.queue.try_send(message) {
                Ok(()) => break end.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_ok(),
                Err(TrySendError::Full(unsent)) if Instant::now() < deadline => message = unsent,
                Err(_) => break false,
            }
            std::thread::sleep(COLLECTING);
        };
        if !finished {
            eprintln!("mcp-server: the last log lines are lost, for stdout takes none");
        }
    }
}

struct Writer<W: Write> {
    out: BufWriter<W>,
    lament: fn(u64) -> String,
    dropped: Arc<AtomicU64>,
    told: u64,
}

impl<W: Write> Writer<W> {
    #[expect(clippy::disallowed_methods, reason = "the writer's own thread, which serves nobody else, may sleep")]
    fn run(mut self, lines: &Receiver<Message>) {
        let mut waiting: Option<Message> = lines.recv().ok();
        let mut finished = None;
        while let Some(message) = waiting.take() {
            match message {
                Message::Line(line) => self.write(&line),
                Message::Finish(end) => finished = Some(end),
            }
            waiting = lines.try_recv().ok();
            if waiting.is_some() {
                continue;
            }
            self.tell_of_dropped_lines();
            if self.out.flush().is_err() {
                // Whatever it was, the lines that come may fare better.
                self.dropped.fetch_add(1, Relaxed);
            }
            if let Some(end) = finished.take() {
                let _ = end.send(());
            }
            std::thread::sleep(COLLECTING);
            waiting = loop {
                match lines.recv_timeout(Duration::from_secs(3_600)) {
                    Ok(message) => break Some(message),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => break None,
                }
            };
        }
    }

    fn write(&mut self, line: &[u8]) {
        if self.out.write_all(line).is_err() {
            self.dropped.fetch_add(1, Relaxed);
        }
    }

    fn tell_of_dropped_lines(&mut self) {
        let dropped = self.dropped.load(Relaxed);
        if dropped > self.told {
            let lament = (self.lament)(dropped - self.told);
            self.told = dropped;
            self.write(lament.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc;

    use super::*;

    /// A terminal that takes nothing until it is told to.
    struct Stuck {
        released: Receiver<()>,
        text: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.released.recv();
            self.text.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_finds_no_room_is_counted_and_told_and_what_waits_is_written_at_the_end() {
        let text = Arc::new(Mutex::new(Vec::new()));
        let (release, released) = mpsc::channel();
        let stuck = Stuck { released, text: Arc::clone(&text) };
        let (mut writer, guard) = LineWriter::start(stuck, |lines| format!("{lines} lost\n")).unwrap();
        writer.write_all(b"first\n").unwrap();
        // The thread has the first line, or will have; the queue takes the rest up to its bound.
        while writer.dropped.load(Relaxed) < 10 {
            writer.write_all(b"more\n").unwrap();
        }
        let dropped = writer.dropped.load(Relaxed);
        drop(release);
        drop(guard);
        let text = String::from_utf8(text.lock().unwrap().clone()).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.first(), Some(&"first"));
        assert!(lines.contains(&format!("{dropped} lost").as_str()), "{}", lines.last().unwrap());
        assert!(lines.iter().filter(|line| **line == "more").count() >= QUEUED_LINES - 1);
    }

    #[test]
    fn a_stdout_that_nobody_reads_does_not_keep_the_process() {
        let (_release, released) = mpsc::channel();
        let (mut writer, guard) =
            LineWriter::start(Stuck { released, text: Arc::default() }, |_| String::new()).unwrap();
        writer.write_all(b"never read\n").unwrap();
        let begun = Instant::now();
        drop(guard);
        assert!(begun.elapsed() < LAST_LINES + Duration::from_secs(2));
    }
}
