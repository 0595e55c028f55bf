//! The audit file: opened once, only ever appended to, by a thread of its own.
//!
//! Where the disk keeps up, events are written to the file within [`COLLECTING`] of when they happened, many at once, and made safe on the
//! disk within [`COMMIT_EVERY`], which is when the head names their end. A full disk, or any other failure to write, is said loudly and tried
//! again every second; calls never wait for it. A write that stopped half-way goes on where it stopped, so that the chain stays
//! whole. What finds no room in the queue meanwhile is counted, and the chain tells how many events it lacks.

use std::collections::VecDeque;
use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::mem;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use time::OffsetDateTime;
use tokio::sync::oneshot;
use tracing::{error, info, warn};

use super::chain::{self, Head, HeadFile, MOST_TORN_BYTES, Note};
use super::room::{self, Ahead, Claim, ROOM_AGAIN, Reservation, Room};
use super::{Record, head_path};
use crate::telemetry::lines::{Lines, Reserved};
use crate::telemetry::text::{Rfc3339, Text};

/// How many events may wait for the disk.
const QUEUED_EVENTS: usize = 8_192;
/// How long the thread lets events gather before it writes them in one go.
const COLLECTING: Duration = Duration::from_millis(50);
/// How often what was written is made safe, where events come all the time. The first after a pause is made safe at once.
const COMMIT_EVERY: Duration = Duration::from_secs(1);
/// How many records may be written and not safe: the head is behind by no more than these and one batch.
const MOST_UNSAFE: u64 = 8_192;
/// How often it checks that the file is still the one at its path, also when no events come.
const CHECK_EVERY: Duration = Duration::from_millis(500);
/// The head has always the same size, so that it can be overwritten where there is no room for another one.
const HEAD_BYTES: usize = 256;
/// How long it waits before it tries again after a failure.
const RETRY: Duration = Duration::from_secs(1);
/// Records are written in pieces of about this size.
const WRITTEN_AT_ONCE: usize = 64 * 1024;
/// Memory that one batch needed and the next will not is given back.
const KEPT_BYTES: usize = 1 << 20;

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The system does not let us.
    #[error("cannot open `{path}`, as AUDIT_LOG_FILE asks")]
    Io {
        /// Which file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Another process has it.
    #[error("`{0}` is in use by another server; AUDIT_LOG_FILE has to name a file for each")]
    InUse(PathBuf),
    /// It holds something else, or was tampered with at its end.
    #[error(
        "`{0}` does not end like an audit file; check it with `mcp-server audit verify`, and move it away with its `.head`"
    )]
    Foreign(PathBuf),
}

/// Told at the end how many events are not in the file.
pub(super) type End = oneshot::Sender<u64>;

/// An event on its way, with the room on the disk that was claimed for it.
#[derive(Debug)]
struct Queued {
    event: Record,
    claim: Option<Claim>,
}

/// Room for one event in the queue, and on the disk where that is required.
#[derive(Debug)]
pub(super) struct Promise {
    place: Reserved<Queued, End>,
    claim: Option<Claim>,
}

impl Promise {
    pub(super) fn keep(self, event: Record) {
        self.place.add(Queued { event, claim: self.claim });
    }
}

/// The way to the thread.
#[derive(Debug)]
pub(super) struct FileSink {
    events: Arc<Lines<Queued, End>>,
    state: Arc<State>,
    room: Option<Arc<Room>>,
    thread: Thread,
    path: PathBuf,
}

#[derive(Debug, Default)]
struct State {
    failing: AtomicBool,
    /// No room on the disk is left for events, where it is claimed.
    full: AtomicBool,
    closing: AtomicBool,
    /// Events that found no room, since the start.
    lost: AtomicU64,
}

impl FileSink {
    /// Opens the file and starts the thread, which continues the chain. With `reserving`, it keeps room on the disk for events to come.
    pub(super) fn open(path: &Path, reserving: bool) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Io { path: path.to_owned(), source };
        let (disk, Ending { mut end, torn }) = Disk::open(path)?;
        let found = read_head(&disk.head_path).map_err(failed)?;
        let lost_before = found.as_ref().map_or(0, |found| found.lost);
        let head = found.map(|found| found.end);
        report(path, head.as_ref(), &end, torn.as_deref());

        let named = head.clone().or_else(|| (end.sequence == 0).then(Head::start));
        let mut pending = Text::default();
        if let Some(torn) = torn {
            pending.push("\n");
            note(&mut end, &mut pending, &Note::sealing(&torn));
        }
        note(&mut end, &mut pending, &Note::Started { head });
        if lost_before > 0 {
            error!("{lost_before} audit events of an earlier run are not in `{}`", path.display());
            note(&mut end, &mut pending, &Note::Lost { events: lost_before });
        }

        let (events, state) = (Arc::new(Lines::new(QUEUED_EVENTS)), Arc::new(State::default()));
        let room = reserving.then(Arc::<Room>::default);
        let mut writer = Writer {
            pending,
            named,
            saved_lost: lost_before,
            room: room.clone(),
            arriving: Arc::clone(&events),
            ..Writer::new(disk, end, Arc::clone(&state))
        };
        writer.make_room();
        let thread = thread::Builder::new().name("audit".to_owned()).spawn(move || writer.run()).map_err(failed)?;
        Ok(Self { events, state, room, thread: thread.thread().clone(), path: path.to_owned() })
    }

    /// Room for one event, unless the disk fails, is full or is too slow.
    pub(super) fn reserve(&self) -> Option<Promise> {
        if !self.is_healthy() {
            return None;
        }
        let claim = match &self.room {
            Some(room) => Some(room.claim()?),
            None => None,
        };
        self.events.reserve().map(|place| Promise { place, claim })
    }

    /// Hands over an event, or counts it as lost.
    pub(super) fn send(&self, event: Record) {
        if !self.events.add(Queued { event, claim: None }) {
            self.state.lost.fetch_add(1, Relaxed);
        }
    }

    pub(super) fn lost(&self) -> u64 {
        self.state.lost.load(Relaxed)
    }

    pub(super) fn is_healthy(&self) -> bool {
        let has_room = self.room.as_ref().is_none_or(|room| room.left() > 0);
        has_room && !self.state.full.load(Relaxed) && !self.state.failing.load(Relaxed)
    }

    pub(super) async fn close(&self, patience: Duration) {
        let (done, closed) = oneshot::channel();
        // A disk that fails now gets one more try.
        self.state.closing.store(true, Relaxed);
        self.events.close(done);
        self.thread.unpark();
        match tokio::time::timeout(patience, closed).await {
            Ok(Ok(0)) => {}
            Ok(Ok(missing)) => error!("{missing} audit events are not in `{}`", self.path.display()),
            Ok(Err(_)) | Err(_) => error!("audit events may be missing in `{}`", self.path.display()),
        }
    }
}

/// Says what was found at the start.
fn report(path: &Path, head: Option<&Head>, end: &Head, torn: Option<&[u8]>) {
    let path = path.display();
    if let Some(torn) = torn {
        warn!("`{path}` ended with {} bytes of an unfinished record, as a crash leaves it; it is sealed", torn.len());
    }
    let missing = match head {
        Some(head) => head.sequence > end.sequence || (head.sequence == end.sequence && head.hash != end.hash),
        None => end.sequence > 0,
    };
    if missing {
        error!(
            "`{path}` does not end where its head says: audit records were removed, or one of the two files; \
             `mcp-server audit verify` tells more"
        );
    }
    info!("audit events go to `{path}` from record {} on", end.sequence + 1);
    anchor("file_opened", end);
}

/// Names the end of the chain in the log, under the target that no level silences: whoever keeps the log elsewhere can tell a file
/// that was forged as a whole, head and all.
fn anchor(name: &str, end: &Head) {
    info!(
        target: "audit",
        { event.name = name, audit.sequence = end.sequence, audit.hash = end.hash },
        "{name} with record {} as the last",
        end.sequence
    );
}

/// How a file ends: the end of its chain, and the unfinished record that a crash has left behind it.
struct Ending {
    end: Head,
    torn: Option<Vec<u8>>,
}

/// How a file ends; `None` when this is no audit file.
fn ending_of(file: &mut File) -> io::Result<Option<Ending>> {
    let length = file.metadata()?.len();
    // Room for the last record before whatever was torn.
    let tail = length.min(2 * MOST_TORN_BYTES as u64);
    file.seek(SeekFrom::Start(length - tail))?;
    let mut bytes = Vec::new();
    file.take(tail).read_to_end(&mut bytes)?;

    let mut end = (tail == length).then(Head::start);
    let mut torn = bytes.as_slice();
    let mut behind = 0;
    for line in bytes.split_inclusive(|byte| *byte == b'\n').rev() {
        if let Some(Ok(record)) = line.strip_suffix(b"\n").map(chain::Record::read) {
            end = Some(record.head());
            torn = bytes.get(bytes.len() - behind..).unwrap_or_default();
            break;
        }
        behind += line.len();
    }
    // A crash leaves the beginning of a record. A line that is finished, and no record, was not left by one.
    let by_a_crash = begins_like_a_record(torn) && !torn.ends_with(b"\n");
    let torn = Some(torn.to_vec()).filter(|torn| !torn.is_empty());
    Ok(end.filter(|_| by_a_crash).map(|end| Ending { end, torn }))
}

fn begins_like_a_record(torn: &[u8]) -> bool {
    const START: &[u8] = br#"{"sequence":"#;
    // Nothing at all is the beginning of one, too.
    torn.iter().zip(START).all(|(found, expected)| found == expected)
}

/// The head beside a file; `None` when there is none, or nothing that could be one.
pub(super) fn read_head(path: &Path) -> io::Result<Option<HeadFile>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Appends a note, made now.
fn note(end: &mut Head, pending: &mut Text, note: &Note) {
    let now = Rfc3339(OffsetDateTime::now_utc()).to_string();
    end.append(pending, |text| note.write(text, &now));
}

/// What the thread writes to.
trait Medium {
    fn append(&mut self, bytes: &[u8]) -> io::Result<usize>;
    /// Makes what was appended safe.
    fn sync(&mut self) -> io::Result<()>;
    /// Names the end, and how many events are lost that no record tells of.
    fn write_head(&mut self, head: &HeadFile) -> io::Result<()>;
    /// Allocates what is missing ahead of the end.
    fn reserve(&mut self) -> Reservation;
    /// What is wrong with the file at the path, seen from the file that is open.
    fn misplaced(&self) -> Option<Misplaced>;
    /// Whether the head names this end.
    fn names(&self, end: &Head) -> bool;
    /// Leaves the open file, and opens the one at the path.
    fn reopen(&mut self) -> Result<Ending, OpenError>;
}

/// How the open file differs from the one at its path.
#[derive(Debug, Clone, Copy)]
enum Misplaced {
    /// There is none at the path.
    Gone,
    /// There is another one.
    Replaced,
    /// It is shorter than what was written to it.
    Truncated,
}

impl Misplaced {
    fn as_str(self) -> &'static str {
        match self {
            Self::Gone => "moved or removed",
            Self::Replaced => "replaced by another file",
            Self::Truncated => "truncated",
        }
    }
}

struct Disk {
    path: PathBuf,
    head_path: PathBuf,
    file: File,
    /// What was found in the file and what was written to it, in bytes.
    length: u64,
    /// The end of what is allocated for it, if it is more.
    allocated: u64,
}

impl Drop for Disk {
    fn drop(&mut self) {
        room::release(&self.file, &mut self.allocated);
    }
}

impl Disk {
    fn open(path: &Path) -> Result<(Self, Ending), OpenError> {
        let failed = |source| OpenError::Io { path: path.to_owned(), source };
        let mut file =
            OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(OpenError::InUse(path.to_owned())),
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        let ending = ending_of(&mut file).map_err(failed)?.ok_or_else(|| OpenError::Foreign(path.to_owned()))?;
        let length = file.metadata().map_err(failed)?.len();
        Ok((Self { path: path.to_owned(), head_path: head_path(path), file, length, allocated: 0 }, ending))
    }
}

impl Medium for Disk {
    fn append(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.length += written as u64;
        Ok(written)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn write_head(&mut self, head: &HeadFile) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(head)?;
        bytes.resize(HEAD_BYTES.max(bytes.len() + 1) - 1, b' ');
        bytes.push(b'\n');
        // Replaced as a whole, so that a crash leaves the old one or the new one. A full disk has no room for two.
        let next = self.head_path.with_extension("head.new");
        let replace = |options: &mut OpenOptions, path: &Path| {
            let mut file = options.write(true).mode(0o600).open(path)?;
            file.write_all(&bytes)?;
            file.sync_data()
        };
        let replaced = replace(OpenOptions::new().create(true).truncate(true), &next)
            .and_then(|()| std::fs::rename(&next, &self.head_path));
        replaced.or_else(|error| {
            let _ = std::fs::remove_file(&next);
            replace(&mut OpenOptions::new(), &self.head_path).map_err(|_| error)
        })
    }

    fn reserve(&mut self) -> Reservation {
        // The head first: where all room is taken for events, it can be overwritten and not be created.
        let new_head = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&self.head_path);
        let _ = new_head.and_then(|mut head| head.write_all(&[b' '; HEAD_BYTES]).and_then(|()| head.sync_data()));
        room::reserve(&self.file, &mut self.allocated)
    }

    fn misplaced(&self) -> Option<Misplaced> {
        let identity = |metadata: &Metadata| (metadata.dev(), metadata.ino());
        match (self.file.metadata(), std::fs::metadata(&self.path)) {
            (Ok(open), Ok(at_path)) if identity(&open) != identity(&at_path) => Some(Misplaced::Replaced),
            (Ok(open), Ok(_)) if open.is_file() && open.len() < self.length => Some(Misplaced::Truncated),
            (Ok(_), Ok(_)) => None,
            _ => Some(Misplaced::Gone),
        }
    }

    fn names(&self, end: &Head) -> bool {
        read_head(&self.head_path).is_ok_and(|head| head.is_some_and(|head| head.end == *end))
    }

    fn reopen(&mut self) -> Result<Ending, OpenError> {
        // A file that was moved away is complete; one that was removed is gone.
        let _ = self.file.sync_data();
        room::release(&self.file, &mut self.allocated);
        // A truncated file is the same one, and its lock is ours.
        let _ = self.file.unlock();
        let (disk, ending) = Self::open(&self.path)?;
        *self = disk;
        Ok(ending)
    }
}

/// A record that is not in the file as a whole.
struct Unwritten<'a> {
    record: chain::Record<'a>,
    /// How many events would be lost with it.
    lost: u64,
    note: Option<Note>,
}

struct Writer<M> {
    disk: M,
    end: Head,
    /// Records that are not in the file yet, and how much of them is written.
    pending: Text,
    written: usize,
    /// The room that was claimed for them.
    claims: Vec<Claim>,
    /// Where room is claimed: for how many events there is some, and how much of the disk that is, ahead of `pending`.
    room: Option<Arc<Room>>,
    ahead: Ahead,
    low_events: u64,
    reserved_at: Option<Instant>,
    /// Whether the last allocation got less than it should.
    is_short: bool,
    /// Events without a claim that wait for room.
    waiting: VecDeque<Record>,
    arriving: Arc<Lines<Queued, End>>,
    /// The last record that is safe, and when it was made so.
    safe: u64,
    committed_at: Option<Instant>,
    /// What the head names, as we wrote it.
    head: Option<Head>,
    /// The same, or what it named at the start; and how many events it says are lost.
    named: Option<Head>,
    saved_lost: u64,
    saved_at: Option<Instant>,
    /// When the file and the head were last found at their paths, and what was wrong since.
    checked_at: Instant,
    misplaced: Option<Misplaced>,
    /// Whether the log has the cause of the present failure.
    is_failure_logged: bool,
    /// How many events are not safe.
    unsafe_events: u64,
    state: Arc<State>,
    lost_and_told: u64,
}

impl<M: Medium> Writer<M> {
    fn new(disk: M, end: Head, state: Arc<State>) -> Self {
        Self {
            disk,
            end,
            pending: Text::default(),
            written: 0,
            claims: Vec::new(),
            room: None,
            ahead: Ahead::Bytes(0),
            low_events: 0,
            reserved_at: None,
            is_short: false,
            waiting: VecDeque::new(),
            arriving: Arc::new(Lines::new(QUEUED_EVENTS)),
            safe: 0,
            committed_at: None,
            head: None,
            named: None,
            saved_lost: 0,
            saved_at: None,
            checked_at: Instant::now(),
            misplaced: None,
            is_failure_logged: false,
            unsafe_events: 0,
            state,
            lost_and_told: 0,
        }
    }

    fn run(mut self) {
        self.write_until_done();
        let arriving = Arc::clone(&self.arriving);
        let mut events = Vec::new();
        loop {
            let end = arriving.take(&mut events, self.patience());
            self.make_room();
            events.drain(..).for_each(|event| self.take(event));
            if end.is_some() {
                // No more calls begin: their room is everybody's.
                mem::take(&mut self.waiting).iter().for_each(|event| self.append(event, None));
            }
            let unwritten = self.settle();
            if let Some(done) = end {
                if !unwritten {
                    note(&mut self.end, &mut self.pending, &Note::Stopped);
                    self.write_until_done();
                    anchor("file_closed", &self.end);
                }
                let missing = self.unsafe_events + self.state.lost.load(Relaxed);
                // Whoever waits for us may want the file.
                drop(self);
                let _ = done.send(missing);
                return;
            }
            arriving.gather(COLLECTING);
        }
    }

    /// Appends an event for which room is claimed, or can be. Another one waits.
    fn take(&mut self, Queued { event, claim }: Queued) {
        match (claim, &self.room) {
            (Some(claim), _) => self.append(&event, Some(claim)),
            (None, None) => self.append(&event, None),
            (None, Some(room)) => match room.claim() {
                Some(claim) => self.append(&event, Some(claim)),
                None if self.waiting.len() < QUEUED_EVENTS => self.waiting.push_back(event),
                None => _ = self.state.lost.fetch_add(1, Relaxed),
            },
        }
    }

    /// Appends an event to the chain, and writes what is pending where that is much, while it is in the processor's cache still.
    fn append(&mut self, event: &Record, claim: Option<Claim>) {
        self.end.append(&mut self.pending, |text| event.write_to_file(text));
        self.claims.extend(claim);
        self.unsafe_events += 1;
        if self.pending.len() >= WRITTEN_AT_ONCE {
            self.write_until_done();
        }
    }

    /// Allocates room on the disk where little is left of it, and says so where there is none.
    fn make_room(&mut self) {
        let Some(room) = self.room.clone() else { return };
        let is_early = self.is_short && self.reserved_at.is_some_and(|at| at.elapsed() < CHECK_EVERY);
        if room.left() > self.low_events || self.ahead == Ahead::Unknown || is_early {
            return;
        }
        let Reservation { ahead, low_events, failure } = self.disk.reserve();
        let left_before = room.left();
        self.ahead = match ahead {
            Ahead::Bytes(bytes) => Ahead::Bytes(bytes + self.written as u64),
            Ahead::Unknown => Ahead::Unknown,
        };
        room.set(self.ahead);
        (self.low_events, self.reserved_at) = (low_events, Some(Instant::now()));
        let was_short = mem::replace(&mut self.is_short, failure.is_some());
        let left = room.left();
        if let Some(cause) = failure {
            if ahead == Ahead::Unknown {
                warn!(cause = %cause, "no room for audit events can be reserved on this file system: a call may begin though its event finds a full disk");
            } else if left == 0 {
                if !self.state.full.swap(true, Relaxed) {
                    error!(cause = %cause, "NO ROOM IS LEFT FOR AUDIT EVENTS: calls are refused until there is; trying again twice a second");
                }
            } else if !was_short {
                warn!(cause = %cause, "room for {left} more audit events is left on the disk");
            }
        }
        let is_enough = !self.is_short || left.saturating_sub(left_before) >= ROOM_AGAIN;
        if is_enough && self.state.full.swap(false, Relaxed) {
            warn!("there is room for audit events again");
        }
        while let Some(claim) = self.waiting.front().and_then(|_| room.claim()) {
            if let Some(event) = self.waiting.pop_front() {
                self.append(&event, Some(claim));
            }
        }
    }

    /// What is pending is in the file, and the room that it did not need is free again.
    fn settle_room(&mut self, bytes: usize) {
        if let (Some(room), Ahead::Bytes(ahead)) = (&self.room, &mut self.ahead) {
            *ahead = ahead.saturating_sub(bytes as u64);
            room.set(self.ahead);
        }
        self.claims.clear();
    }

    /// How many events are lost, as far as is known, and no record tells of it: all that are not in the file, while it cannot be written.
    fn untold(&self) -> u64 {
        let mut untold = self.state.lost.load(Relaxed) - self.lost_and_told + self.waiting.len() as u64;
        if self.state.failing.load(Relaxed) {
            untold += self.unwritten().map(|event| event.lost).sum::<u64>() + self.arriving.waiting() as u64;
        }
        untold
    }

    /// Keeps the number of lost events in the head, for the next start.
    fn save_lost(&mut self) {
        let lost = self.untold();
        let is_early = !self.state.closing.load(Relaxed) && self.saved_at.is_some_and(|at| at.elapsed() < CHECK_EVERY);
        let Some(end) = self.named.clone().filter(|_| lost != self.saved_lost && !is_early) else { return };
        if self.disk.write_head(&HeadFile { end, lost }).is_ok() {
            (self.saved_lost, self.saved_at) = (lost, Some(Instant::now()));
        }
    }

    /// How long there is nothing to do but wait for events.
    fn patience(&self) -> Duration {
        self.until_commit().min(CHECK_EVERY.saturating_sub(self.checked_at.elapsed()))
    }

    fn until_commit(&self) -> Duration {
        let since = self.committed_at.map_or(Duration::MAX, |at| at.elapsed());
        if self.is_safe() { Duration::MAX } else { COMMIT_EVERY.saturating_sub(since) }
    }

    fn is_safe(&self) -> bool {
        self.end.sequence == self.safe
    }

    /// Whether what is written has to be made safe now.
    fn is_due(&self) -> bool {
        let is_much = self.end.sequence - self.safe >= MOST_UNSAFE;
        let is_urgent = self.state.closing.load(Relaxed) || self.state.failing.load(Relaxed);
        !self.is_safe() && (is_much || is_urgent || self.until_commit().is_zero())
    }

    /// Writes what is pending, and how much was lost meanwhile; true when it could not, and there is no time to try again.
    fn settle(&mut self) -> bool {
        let lost = self.state.lost.load(Relaxed);
        let untold = lost - self.lost_and_told;
        let claim = self.room.as_ref().filter(|_| untold > 0).map(Room::claim);
        if untold > 0 && !matches!(claim, Some(None)) {
            self.claims.extend(claim.flatten());
            note(&mut self.end, &mut self.pending, &Note::Lost { events: untold });
            self.lost_and_told = lost;
        }
        let done = self.write_until_done();
        self.save_lost();
        !done
    }

    /// Tries until it is done; false when the server stops first.
    fn write_until_done(&mut self) -> bool {
        loop {
            let closing = self.state.closing.load(Relaxed);
            match self.write() {
                Ok(()) => {
                    self.is_failure_logged = false;
                    if self.state.failing.swap(false, Relaxed) {
                        warn!("audit events can be written again; {} were lost so far", self.state.lost.load(Relaxed));
                    }
                    return true;
                }
                Err(error) => {
                    self.state.failing.store(true, Relaxed);
                    if !mem::replace(&mut self.is_failure_logged, true) {
                        error!(cause = %error, "AUDIT EVENTS CANNOT BE WRITTEN to the file; trying again each second");
                    }
                    self.save_lost();
                }
            }
            if closing {
                return false;
            }
            // Woken by a server that stops.
            thread::park_timeout(RETRY);
        }
    }

    /// Notices a file or a head that is no longer at its path, and gets the chain back there.
    fn check_paths(&mut self) -> io::Result<()> {
        self.checked_at = Instant::now();
        if self.misplaced.is_none() {
            self.misplaced = self.disk.misplaced();
            if let Some(misplaced) = self.misplaced {
                self.state.failing.store(true, Relaxed);
                let what = misplaced.as_str();
                error!("THE AUDIT FILE WAS LOST: it was {what} while the server runs; opening it again at its path");
            }
        }
        if let Some(misplaced) = self.misplaced {
            let ending = self.disk.reopen().map_err(io::Error::other)?;
            self.go_on_in(ending, misplaced);
            self.misplaced = None;
            self.make_room();
        } else if self.head.as_ref().is_some_and(|head| !self.disk.names(head)) {
            self.state.failing.store(true, Relaxed);
            self.head = None;
            error!(
                "THE HEAD OF THE AUDIT FILE WAS LOST: it was moved, removed or changed while the server runs; writing it again"
            );
            note(&mut self.end, &mut self.pending, &Note::HeadLost);
        }
        Ok(())
    }

    /// Goes on behind the end of another file. What the file before has not got as a whole is written to this one.
    fn go_on_in(&mut self, Ending { mut end, torn }: Ending, misplaced: Misplaced) {
        let mut previous = self.end.clone();
        let mut events = Vec::new();
        for (number, Unwritten { record, note, .. }) in self.unwritten().enumerate() {
            if number == 0 {
                previous = Head { sequence: record.sequence.saturating_sub(1), hash: record.previous.to_owned() };
            }
            match note {
                // Of a file that was lost before a word was written to it.
                Some(Note::Reopened { previous: before, .. }) => previous = before,
                // They are about the other file.
                Some(Note::Started { .. } | Note::Sealed { .. } | Note::HeadLost) => {}
                Some(Note::Lost { .. } | Note::Stopped) | None => events.push(record.event.to_owned()),
            }
        }
        self.pending.clear(KEPT_BYTES);
        anchor("file_lost", &previous);
        anchor("file_opened", &end);
        (self.safe, self.head, self.named, self.written) = (end.sequence, None, None, 0);
        self.unsafe_events = events.len() as u64;
        if let Some(torn) = torn {
            self.pending.push("\n");
            note(&mut end, &mut self.pending, &Note::sealing(&torn));
        }
        note(&mut end, &mut self.pending, &Note::Reopened { previous, cause: misplaced.as_str().to_owned() });
        for event in events {
            end.append(&mut self.pending, |text| text.push(&event));
        }
        self.end = end;
        if let Some(room) = &self.room {
            // Nothing is allocated for this file yet.
            self.ahead = Ahead::Bytes(0);
            room.set(self.ahead);
            self.reserved_at = None;
        }
    }

    /// The records that are not in the file as a whole.
    fn unwritten(&self) -> impl Iterator<Item = Unwritten<'_>> {
        let mut at = 0;
        let lines = self.pending.as_bytes().split_inclusive(|byte| *byte == b'\n');
        let unwritten = lines.filter(move |line| {
            at += line.len();
            at > self.written
        });
        unwritten.filter_map(|line| {
            let record = chain::Record::read(line.strip_suffix(b"\n")?).ok()?;
            let note = Note::read(record.event);
            let lost = match &note {
                None => 1,
                Some(Note::Lost { events }) => *events,
                Some(_) => 0,
            };
            Some(Unwritten { record, lost, note })
        })
    }

    fn write(&mut self) -> io::Result<()> {
        if self.misplaced.is_some() || self.checked_at.elapsed() >= CHECK_EVERY || self.state.closing.load(Relaxed) {
            self.check_paths()?;
        }
        while let Some(rest) = self.pending.as_bytes().get(self.written..).filter(|rest| !rest.is_empty()) {
            match self.disk.append(rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => self.written += written,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.settle_room(self.pending.len());
        self.pending.clear(KEPT_BYTES);
        self.written = 0;
        if self.is_due() {
            self.disk.sync()?;
            // Nothing is pending, so that what has arrived meanwhile is not lost.
            let lost = self.state.lost.load(Relaxed) - self.lost_and_told + self.waiting.len() as u64;
            self.disk.write_head(&HeadFile { end: self.end.clone(), lost })?;
            (self.named, self.saved_lost) = (Some(self.end.clone()), lost);
            (self.safe, self.committed_at) = (self.end.sequence, Some(Instant::now()));
            self.head = Some(self.end.clone());
            self.unsafe_events = 0;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::telemetry::audit::{Broken, Event, verify};
    use crate::telemetry::trace::TraceContext;

    fn event() -> Record {
        let event = Event::refused_caller(TraceContext::begin().trace_id(), None, "no_token");
        Record::of(event)
    }

    /// Opens the file, writes so many events, and closes it.
    async fn write(path: &Path, events: usize) {
        let sink = FileSink::open(path, false).unwrap();
        for _ in 0..events {
            sink.send(event());
        }
        sink.close(Duration::from_secs(10)).await;
        assert_eq!((sink.lost(), sink.is_healthy()), (0, true));
    }

    #[tokio::test]
    async fn the_chain_goes_on_over_restarts_and_only_we_may_read_it() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        for run in 1..=3 {
            write(&path, 5).await;
            let whole = verify(&path).unwrap();
            // `started`, five events, `stopped`.
            assert_eq!((whole.records, whole.torn_lines, whole.lost_events), (run * 7, 0, 0));
        }
        for file in [&path, &head_path(&path)] {
            assert_eq!(std::fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
        }
        let _in_use = FileSink::open(&path, false).unwrap();
        assert!(matches!(FileSink::open(&path, false), Err(OpenError::InUse(_))));
    }

    #[tokio::test]
    async fn what_a_crash_leaves_is_sealed_and_what_is_no_audit_file_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        let append = |bytes: &[u8]| OpenOptions::new().append(true).open(&path).unwrap().write_all(bytes).unwrap();
        write(&path, 2).await;
        let torn = [
            br#"{"sequence":5,"previous":"ab"#.as_slice(),
            b"{\"sequence\":5,\"previous\":\"ab\n{\"sequence\":6",
            b"{",
        ];
        for (run, torn) in torn.into_iter().enumerate() {
            append(torn);
            assert!(matches!(verify(&path), Err(Broken::Link { .. })));
            write(&path, 1).await;
            assert_eq!(verify(&path).unwrap().torn_lines, run as u64 + 1);
        }
        let before = std::fs::read(&path).unwrap();
        for foreign in [b"root:x:0:0\n".as_slice(), b"{\"sequence\":1}\n", b"half a word"] {
            append(foreign);
            assert!(matches!(FileSink::open(&path, false), Err(OpenError::Foreign(_))), "{foreign:?}");
            std::fs::write(&path, &before).unwrap();
        }
        assert!(matches!(FileSink::open(&folder.path().join("no/folder"), false), Err(OpenError::Io { .. })));
    }

    #[tokio::test]
    async fn lines_that_go_missing_between_two_runs_show_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        for keep in [0, 3] {
            write(&path, 5).await;
            let text = std::fs::read_to_string(&path).unwrap();
            std::fs::write(&path, text.split_inclusive('\n').take(keep).collect::<String>()).unwrap();
            write(&path, 5).await;
            let broken = verify(&path).unwrap_err().to_string();
            assert!(broken.contains("lines are missing"), "{broken}");
            std::fs::remove_file(&path).unwrap();
            std::fs::remove_file(head_path(&path)).unwrap();
        }
        write(&path, 1).await;
        std::fs::remove_file(head_path(&path)).unwrap();
        assert!(verify(&path).unwrap_err().to_string().contains("the head was missing"));
    }

    /// A disk that is full from time to time, and takes no more than a few bytes at once.
    #[derive(Clone)]
    struct Moody(Arc<Mutex<Contents>>);

    #[derive(Default)]
    struct Contents {
        bytes: Vec<u8>,
        head: Option<Head>,
        lost: u64,
        requests: usize,
        reservations: Vec<Reservation>,
    }

    impl Medium for Moody {
        fn append(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut disk = self.0.lock().unwrap();
            disk.requests += 1;
            if disk.requests.is_multiple_of(5) {
                return Err(ErrorKind::StorageFull.into());
            }
            let taken = bytes.len().min(7 + disk.requests % 60);
            disk.bytes.extend_from_slice(&bytes[..taken]);
            Ok(taken)
        }

        fn sync(&mut self) -> io::Result<()> {
            Ok(())
        }

        fn reserve(&mut self) -> Reservation {
            self.0.lock().unwrap().reservations.pop().unwrap()
        }

        fn write_head(&mut self, head: &HeadFile) -> io::Result<()> {
            let mut disk = self.0.lock().unwrap();
            disk.requests += 1;
            if disk.requests.is_multiple_of(3) {
                return Err(ErrorKind::StorageFull.into());
            }
            (disk.head, disk.lost) = (Some(head.end.clone()), head.lost);
            Ok(())
        }

        fn misplaced(&self) -> Option<Misplaced> {
            None
        }

        fn names(&self, end: &Head) -> bool {
            self.0.lock().unwrap().head.as_ref() == Some(end)
        }

        fn reopen(&mut self) -> Result<Ending, OpenError> {
            unreachable!("it is never lost")
        }
    }

    #[test]
    fn a_write_that_failed_half_way_goes_on_where_it_stopped() {
        let disk = Moody(Arc::default());
        let (state, end) = (Arc::new(State::default()), Head::start());
        let mut writer = Writer::new(disk.clone(), end, Arc::clone(&state));
        // Nobody waits for the second between two tries.
        state.closing.store(true, Relaxed);
        let (mut tries, mut failures) = (0, 0);
        for _ in 0..50 {
            writer.end.append(&mut writer.pending, |text| event().write_to_file(text));
            state.lost.fetch_add(1, Relaxed);
            while writer.settle() {
                assert!(state.failing.load(Relaxed));
                failures += 1;
                tries += 1;
                assert!(tries < 10_000, "it never ends");
            }
            assert!(!state.failing.load(Relaxed));
        }
        let disk = disk.0.lock().unwrap();
        let whole = chain::verify(disk.bytes.as_slice(), disk.head.as_ref()).unwrap();
        assert!(failures > 50, "{failures}");
        assert_eq!((whole.records, whole.torn_lines, whole.lost_events), (100, 0, 50));
    }

    #[test]
    fn events_without_a_claim_leave_room_to_those_with_one_and_are_lost_to_the_next_start_only_if_it_stays_full() {
        let disk = Moody(Arc::default());
        let bytes = |events| Ahead::Bytes(room::EVENT_BYTES * (8 + events));
        let reservation = |ahead, failure| Reservation { ahead, low_events: 100, failure };
        let full = || Some(ErrorKind::StorageFull.into());
        let give = |reservation| disk.0.lock().unwrap().reservations.push(reservation);
        let mut writer = Writer::new(disk.clone(), Head::start(), Arc::default());
        let room = Arc::new(Room::default());
        (writer.room, writer.named) = (Some(Arc::clone(&room)), Some(Head::start()));
        let queued = |claim| Queued { event: event(), claim };
        let settle = |writer: &mut Writer<Moody>| {
            // Past the moods of the disk.
            disk.0.lock().unwrap().requests = 0;
            writer.state.closing.store(true, Relaxed);
            while writer.settle() {}
            (disk.0.lock().unwrap().lost, writer.waiting.len(), room.left())
        };

        give(reservation(bytes(2), full()));
        writer.make_room();
        let claim = room.claim();
        (0..3).for_each(|_| writer.take(queued(None)));
        // One has got the room that was left; the claimed room is still there.
        assert_eq!(settle(&mut writer).1, 2);
        assert_eq!(disk.0.lock().unwrap().lost, 2);
        writer.take(queued(claim));
        let (_, waiting, _) = settle(&mut writer);
        assert_eq!((waiting, writer.state.full.load(Relaxed)), (2, false));

        let claims: Vec<_> = std::iter::from_fn(|| room.claim()).collect();
        give(reservation(bytes(claims.len() as u64), full()));
        writer.reserved_at = None;
        writer.make_room();
        assert!(writer.state.full.load(Relaxed), "{}", room.left());
        // Somebody has made room.
        give(reservation(bytes(200), None));
        writer.reserved_at = None;
        writer.make_room();
        assert_eq!((settle(&mut writer).0, writer.waiting.len(), writer.state.full.load(Relaxed)), (0, 0, false));
        drop(claims);
        let disk = disk.0.lock().unwrap();
        let whole = chain::verify(disk.bytes.as_slice(), disk.head.as_ref()).unwrap();
        assert_eq!((whole.records, whole.lost_events), (4, 0));
    }

    #[test]
    fn the_end_is_made_safe_at_once_after_a_pause_and_then_from_time_to_time() {
        let disk = Moody(Arc::default());
        let mut writer = Writer::new(disk.clone(), Head::start(), Arc::default());
        let mut append = |records: u64, committed_before: Duration| {
            writer.committed_at = Instant::now().checked_sub(committed_before);
            // Past the moods of the disk.
            disk.0.lock().unwrap().requests = 0;
            writer.pending.push("\n");
            writer.end.sequence += records;
            writer.write().unwrap();
            (disk.0.lock().unwrap().head.as_ref().map(|head| head.sequence), writer.until_commit() > COMMIT_EVERY)
        };
        assert_eq!(append(1, COMMIT_EVERY), (Some(1), true));
        assert_eq!(append(1, Duration::ZERO), (Some(1), false));
        assert_eq!(append(1, COMMIT_EVERY / 2), (Some(1), false));
        assert_eq!(append(1, COMMIT_EVERY), (Some(4), true));
        assert_eq!(append(MOST_UNSAFE - 1, Duration::ZERO), (Some(4), false));
        assert_eq!(append(1, Duration::ZERO), (Some(4 + MOST_UNSAFE), true));
    }

    #[test]
    fn what_the_lost_file_has_not_got_as_a_whole_is_in_the_one_after_it() {
        // So much of three events got into the lost file, in bytes: a part of the first, all of it and a part of the second, all.
        for (part, whole_lines) in [(0.0, 0), (0.9, 0), (1.0, 1), (1.5, 1), (3.0, 3)] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("audit.jsonl");
            let (disk, ending) = Disk::open(&path).unwrap();
            let mut writer = Writer::new(disk, ending.end, Arc::default());
            note(&mut writer.end, &mut writer.pending, &Note::Started { head: None });
            writer.write().unwrap();
            (0..3).for_each(|_| writer.append(&event(), None));
            let line = writer.pending.len() as f64 / 3.0;
            let written = writer.pending.as_bytes()[..(line * part) as usize].to_vec();
            writer.written = writer.disk.append(&written).unwrap();
            let lost = std::fs::read_to_string(&path).unwrap();
            let last = lost.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')).next_back().unwrap();
            let last = chain::Record::read(last.as_bytes()).unwrap().head();
            assert_eq!(last.sequence, 1 + whole_lines);

            std::fs::remove_file(&path).unwrap();
            writer.state.closing.store(true, Relaxed);
            assert!(writer.write_until_done());
            assert_eq!((writer.unsafe_events, writer.state.failing.load(Relaxed)), (0, false));
            let whole = verify(&path).unwrap();
            assert_eq!(whole.records, 1 + 3 - whole_lines, "{part}");
            let [incident] = whole.incidents.as_slice() else { panic!("{whole:?}") };
            assert!(incident.line == 1 && incident.what.contains(&last.hash), "{part}: {incident:?}");
        }
    }

    #[test]
    fn the_head_has_its_place_on_the_disk_before_events_get_room() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        let (mut disk, _) = Disk::open(&path).unwrap();
        assert!(disk.reserve().failure.is_none());
        // It is there, and says nothing yet.
        assert_eq!(std::fs::metadata(head_path(&path)).unwrap().len(), HEAD_BYTES as u64);
        assert_eq!(read_head(&head_path(&path)).unwrap(), None);
        let head = HeadFile { end: Head { sequence: u64::MAX, ..Head::start() }, lost: u64::MAX };
        // Nothing can be created beside it, as on a full disk.
        std::fs::create_dir(folder.path().join("audit.jsonl.head.new")).unwrap();
        disk.write_head(&head).unwrap();
        assert_eq!(std::fs::metadata(head_path(&path)).unwrap().len(), HEAD_BYTES as u64);
        assert_eq!(read_head(&head_path(&path)).unwrap(), Some(head.clone()));
        disk.reserve();
        assert_eq!(read_head(&head_path(&path)).unwrap(), Some(head));
    }

    #[test]
    fn a_copy_in_the_place_of_the_file_must_not_lack_records() {
        for kept in [3, 2] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("audit.jsonl");
            let (disk, ending) = Disk::open(&path).unwrap();
            let mut writer = Writer::new(disk, ending.end, Arc::default());
            writer.state.closing.store(true, Relaxed);
            (0..3).for_each(|_| writer.append(&event(), None));
            assert!(writer.write_until_done());
            let lines = std::fs::read_to_string(&path).unwrap();
            std::fs::remove_file(&path).unwrap();
            std::fs::write(&path, lines.split_inclusive('\n').take(kept).collect::<String>()).unwrap();
            assert!(writer.write_until_done());
            match verify(&path) {
                Ok(whole) => assert_eq!((kept, whole.records, whole.incidents.len()), (3, 4, 1)),
                Err(broken) => assert!(kept == 2 && broken.to_string().contains("lines are missing"), "{broken}"),
            }
        }
    }

    #[tokio::test]
    async fn the_head_follows_while_the_server_runs_though_nothing_more_happens() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        let sink = FileSink::open(&path, false).unwrap();
        let begun = Instant::now();
        for record in 2..=4 {
            // The first is made safe with the start or soon after it, the next comes too early for that.
            sink.send(event());
            while read_head(&head_path(&path)).unwrap().is_none_or(|head| head.end.sequence < record) {
                assert!(begun.elapsed() < Duration::from_secs(60), "record {record} is not safe");
                tokio::task::yield_now().await;
            }
            assert_eq!(verify(&path).unwrap().records, record);
        }
        sink.close(Duration::from_secs(10)).await;
    }

    #[tokio::test]
    async fn a_full_disk_is_known_and_what_finds_no_room_is_counted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        let sink = FileSink::open(&path, false).unwrap();
        while sink.is_healthy() {
            tokio::task::yield_now().await;
        }
        assert!(sink.reserve().is_none());
        for _ in 0..QUEUED_EVENTS + 10 {
            sink.send(event());
        }
        assert_eq!(sink.lost(), 10);
        sink.close(Duration::from_secs(10)).await;
    }
}
