//! The thread that writes lines, so that a slow terminal or pipe never slows a call.
//!
//! Lines wait in a bounded queue. What finds no room there is dropped and counted, and the log itself says how many lines it lacks.
//! At the end everything that waits is written, unless nobody reads for seconds; then stderr is told.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use super::Told;
use crate::telemetry::audit;
use crate::telemetry::lines::Lines;
use crate::telemetry::text::Text;

/// How many lines may wait for stdout; the two that end a call wait as one.
const QUEUED_LINES: usize = 8_192;
/// How long the thread lets lines gather before it writes them in one go.
const COLLECTING: Duration = Duration::from_millis(50);
/// How long the end of the process waits for somebody to read the last lines.
const LAST_LINES: Duration = Duration::from_millis(1_500);
/// Lines are written in pieces of about this size.
const WRITTEN_AT_ONCE: usize = 64 * 1024;
/// Most lines fit.
const USUAL_BYTES: usize = 512;

/// Told when the last line is written.
type End = SyncSender<()>;

/// A line that waits: what every call says is not written before its turn.
#[derive(Debug)]
pub(in crate::telemetry) enum Line {
    /// As it will stand in the log, with its line break.
    Written(Text),
    /// What stands in the audit; and how a call ended, if it was one and that is heard.
    Audit(audit::Record, Option<Told>),
}

impl Line {
    fn write(&self, text: &mut Text) {
        match self {
            Self::Written(line) => text.append(line),
            Self::Audit(record, told) => {
                record.write_to_log(text);
                if let Some(told) = told {
                    told.write(record, text);
                }
            }
        }
    }

    /// How many lines of the log it will be.
    fn count(&self) -> u64 {
        if matches!(self, Self::Audit(_, Some(_))) { 2 } else { 1 }
    }
}

/// The way to the thread; each write is one line.
#[derive(Clone)]
pub(in crate::telemetry) struct LineWriter {
    lines: Arc<Lines<Line, End>>,
    dropped: Arc<AtomicU64>,
}

impl LineWriter {
    /// Starts the thread. `lament` is the line that tells of so many dropped ones.
    pub(super) fn start(
        out: impl Write + Send + 'static,
        lament: fn(u64) -> String,
    ) -> io::Result<(Self, WriterGuard)> {
        let (lines, dropped) = (Arc::new(Lines::new(QUEUED_LINES)), Arc::new(AtomicU64::new(0)));
        let writer = Writer { out, lament, dropped: Arc::clone(&dropped), told: 0 };
        let arriving = Arc::clone(&lines);
        std::thread::Builder::new().name("logs".to_owned()).spawn(move || writer.run(&arriving))?;
        Ok((Self { lines: Arc::clone(&lines), dropped }, WriterGuard { lines }))
    }

    /// How many lines were dropped so far, for whoever counts them.
    pub(super) fn dropped(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.dropped)
    }

    /// Hands over the line that `write` writes, or counts it as dropped.
    pub(super) fn write_line(&self, write: impl FnOnce(&mut Text)) {
        let mut line = Text::with_capacity(USUAL_BYTES);
        write(&mut line);
        self.hand_over(Line::Written(line));
    }

    /// Hands over a line, or counts it as dropped.
    pub(super) fn hand_over(&self, line: Line) {
        let lines = line.count();
        if !self.lines.add(line) {
            self.dropped.fetch_add(lines, Relaxed);
        }
    }
}

impl Write for LineWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.write_line(|text| text.push(&String::from_utf8_lossy(line)));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Dropping it writes what is still queued.
pub(super) struct WriterGuard {
    lines: Arc<Lines<Line, End>>,
}

impl Drop for WriterGuard {
    #[expect(clippy::print_stderr, reason = "stdout is what does not work")]
    fn drop(&mut self) {
        let (finished, end) = sync_channel(1);
        self.lines.close(finished);
        if end.recv_timeout(LAST_LINES).is_err() {
            eprintln!("mcp-server: the last log lines are lost, for stdout takes none");
        }
    }
}

struct Writer<W: Write> {
    out: W,
    lament: fn(u64) -> String,
    dropped: Arc<AtomicU64>,
    told: u64,
}

impl<W: Write> Writer<W> {
    fn run(mut self, arriving: &Lines<Line, End>) {
        let (mut lines, mut text) = (Vec::new(), Text::default());
        loop {
            let end = arriving.take(&mut lines, Duration::from_secs(3_600));
            for line in lines.drain(..) {
                line.write(&mut text);
                if text.len() >= WRITTEN_AT_ONCE {
                    self.write_out(&mut text);
                }
            }
            self.write_out(&mut text);
            self.tell_of_dropped_lines();
            if let Some(end) = end {
                let _ = end.send(());
                return;
            }
            arriving.gather(COLLECTING);
        }
    }

    fn write_out(&mut self, text: &mut Text) {
        self.write(text.as_bytes());
        text.clear(2 * WRITTEN_AT_ONCE);
    }

    fn write(&mut self, mut text: &[u8]) {
        while !text.is_empty() {
            match self.out.write(text) {
                Ok(written @ 1..) => text = text.get(written..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Whatever it was, the lines that come may fare better.
                Ok(_) | Err(_) => return self.drop_lines(text),
            }
        }
        if self.out.flush().is_err() {
            self.drop_lines(b"\n");
        }
    }

    fn drop_lines(&self, text: &[u8]) {
        let lines = text.iter().filter(|byte| **byte == b'\n').count();
        self.dropped.fetch_add(lines as u64, Relaxed);
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
    use std::sync::mpsc::{self, Receiver};
    use std::time::Instant;

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
        // A process that waited for its reader would never end; how late this machine is besides is no matter.
        assert!(begun.elapsed() < LAST_LINES + Duration::from_secs(60));
    }
}
