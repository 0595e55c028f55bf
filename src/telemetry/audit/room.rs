//! Room on the disk for audit events, where no call may begin without it.
//!
//! The audit's thread keeps a part of the disk allocated ahead of the end of the file, and says here for how many events that is enough.
//! A call claims room for its event before it begins; the claim ends when the event is in the file, or when there will be none.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// No record is larger, chain and line break included.
pub(super) const EVENT_BYTES: u64 = 2_048;
/// Kept free of claims, for the records about the file itself.
const NOTE_BYTES: u64 = 16 * 1024;
/// How much is allocated ahead: this part of the file system, within these limits.
const PART_OF_DISK: u64 = 64;
const LEAST_AHEAD: u64 = 1 << 20;
const MOST_AHEAD: u64 = 16 << 20;
/// Where there is less room, allocations get smaller, down to this.
const LEAST_STEP: u64 = 64 * 1024;

/// For how many events there is room, and how many have claimed it.
#[derive(Debug, Default)]
pub(super) struct Room {
    events: AtomicU64,
    claimed: AtomicU64,
}

impl Room {
    /// Room for one event, if there is any left.
    pub(super) fn claim(self: &Arc<Self>) -> Option<Claim> {
        let events = self.events.load(Relaxed);
        let claim = |claimed| (claimed < events).then_some(claimed + 1);
        self.claimed.fetch_update(Relaxed, Relaxed, claim).ok()?;
        Some(Claim(Arc::clone(self)))
    }

    /// For how many more events there is room.
    pub(super) fn left(&self) -> u64 {
        self.events.load(Relaxed).saturating_sub(self.claimed.load(Relaxed))
    }

    /// So many bytes are allocated ahead of whatever was claimed; all there are where they cannot be counted.
    pub(super) fn set(&self, ahead: Ahead) {
        let events = match ahead {
            Ahead::Bytes(bytes) => bytes.saturating_sub(NOTE_BYTES) / EVENT_BYTES,
            Ahead::Unknown => u64::MAX,
        };
        self.events.store(events, Relaxed);
    }
}

/// Room for one event, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Claim(Arc<Room>);

impl Drop for Claim {
    fn drop(&mut self) {
        self.0.claimed.fetch_sub(1, Relaxed);
    }
}

/// How much is allocated ahead of the end of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ahead {
    Bytes(u64),
    /// The file system cannot allocate ahead.
    Unknown,
}

/// What came of an allocation.
#[derive(Debug)]
pub(super) struct Reservation {
    pub(super) ahead: Ahead,
    /// Less than this many events of room are too few to wait with the next allocation.
    pub(super) low_events: u64,
    /// Why it is less than it should be.
    pub(super) failure: Option<io::Error>,
}

impl Reservation {
    fn unknown(cause: io::Error) -> Self {
        Self { ahead: Ahead::Unknown, low_events: 0, failure: Some(cause) }
    }
}

/// Room for so many events that came back makes a full disk one that is not.
pub(super) const ROOM_AGAIN: u64 = LEAST_STEP / EVENT_BYTES;

/// Allocates what is missing ahead of the end of a file. `allocated` is the end of what was allocated before.
pub(super) fn reserve(file: &File, allocated: &mut u64) -> Reservation {
    match system::reserve(file, allocated) {
        Ok(reservation) => reservation,
        Err(cause) => Reservation::unknown(cause),
    }
}

/// Gives back what was allocated beyond the end of a file.
pub(super) fn release(file: &File, allocated: &mut u64) {
    if std::mem::take(allocated) > 0 {
        let _ = file.metadata().and_then(|metadata| file.set_len(metadata.len()));
    }
}

#[cfg(target_os = "linux")]
mod system {
    use std::os::unix::fs::MetadataExt as _;

    use rustix::fs::{FallocateFlags, fallocate, fstatvfs};
    use rustix::io::Errno;
    use rustix::process::{Resource, getrlimit};

    use super::*;

    /// # Errors
    ///
    /// Where the file system cannot do it.
    pub(super) fn reserve(file: &File, allocated: &mut u64) -> io::Result<Reservation> {
        let metadata = file.metadata()?;
        let length = metadata.len();
        let is_first = *allocated == 0;
        let disk = fstatvfs(file)?;
        let wanted = (disk.f_blocks.saturating_mul(disk.f_frsize) / PART_OF_DISK).clamp(LEAST_AHEAD, MOST_AHEAD);
        // The limit of the process counts written bytes only: what is allocated beyond it is no room.
        let limit = getrlimit(Resource::Fsize).current.unwrap_or(u64::MAX);
        let goal = (length + wanted).min(limit);
        let mut failure = (goal < length + wanted).then(|| Errno::FBIG.into());
        let mut end = length.max(*allocated);
        let mut step = goal.saturating_sub(end);
        while end < goal {
            step = step.min(goal - end);
            match fallocate(file, FallocateFlags::KEEP_SIZE, end, step) {
                Ok(()) => end += step,
                Err(Errno::INTR) => {}
                Err(error @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG)) => {
                    failure = Some(error.into());
                    step /= 2;
                    if step < LEAST_STEP {
                        break;
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        // SMB says yes and allocates nothing.
        if is_first && end > length {
            let blocks = file.metadata()?.blocks();
            let grown = blocks.saturating_sub(metadata.blocks()) * 512;
            if blocks * 512 < end && grown < (end - length) / 2 {
                return Err(Errno::OPNOTSUPP.into());
            }
        }
        *allocated = end;
        let low_events = wanted / EVENT_BYTES / 2;
        Ok(Reservation { ahead: Ahead::Bytes(end.min(limit).saturating_sub(length)), low_events, failure })
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use super::*;

    pub(super) fn reserve(_: &File, _: &mut u64) -> io::Result<Reservation> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn no_more_events_claim_room_than_there_is_and_it_comes_back() {
        let room = Arc::new(Room::default());
        assert!(room.claim().is_none());
        room.set(Ahead::Bytes(NOTE_BYTES + 3 * EVENT_BYTES - 1));
        let claims = [room.claim().unwrap(), room.claim().unwrap()];
        assert!(room.claim().is_none() && room.left() == 0);
        room.set(Ahead::Bytes(NOTE_BYTES + EVENT_BYTES));
        assert!(room.claim().is_none());
        drop(claims);
        assert!(room.claim().is_some() && room.left() == 1);
        room.set(Ahead::Unknown);
        assert!(room.claim().is_some());
    }

    #[test]
    fn what_is_allocated_ahead_is_on_the_disk_and_is_given_back() {
        let file = tempfile::tempfile().unwrap();
        let mut allocated = 0;
        let reservation = reserve(&file, &mut allocated);
        assert!(matches!(reservation.ahead, Ahead::Bytes(bytes) if bytes >= LEAST_AHEAD), "{reservation:?}");
        assert!(reservation.failure.is_none(), "{reservation:?}");
        let metadata = file.metadata().unwrap();
        assert!(metadata.len() == 0 && metadata.blocks() * 512 >= LEAST_AHEAD);
        release(&file, &mut allocated);
        assert_eq!((file.metadata().unwrap().blocks(), allocated), (0, 0));
    }

    #[test]
    fn a_file_that_cannot_be_allocated_has_unknown_room() {
        let file = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let reservation = reserve(&file, &mut 0);
        assert!(reservation.ahead == Ahead::Unknown && reservation.failure.is_some(), "{reservation:?}");
    }
}
