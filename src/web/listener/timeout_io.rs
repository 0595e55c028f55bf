//! The stream of a connection, with time limits: for the head of a request, for idling, and for a client that takes no answer.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use super::room::{Activity, Phase};
use super::{HEALTH_HEAD_TIMEOUT, Limits};

/// A stream that ends with `TimedOut` when a limit is reached.
pub(super) struct TimeoutIo<S> {
    stream: S,
    activity: Arc<Activity>,
    limits: Limits,
    /// Runs to the one deadline that counts in the phase.
    alarm: Pin<Box<Sleep>>,
    /// By when a write has to make progress, while one is pending.
    write_deadline: Option<Instant>,
    /// A part of the next request arrived before the last answer was written.
    has_read_ahead: bool,
}

impl<S> TimeoutIo<S> {
    pub(super) fn new(stream: S, activity: Arc<Activity>, limits: &Limits) -> Self {
        let alarm = Box::pin(tokio::time::sleep_until(activity.accepted() + limits.head_timeout));
        Self { stream, activity, limits: limits.clone(), alarm, write_deadline: None, has_read_ahead: false }
    }

    /// By when something has to arrive; there is no such time while a request is answered.
    fn read_deadline(&self) -> Option<Instant> {
        let (phase, since) = self.activity.phase_since();
        match phase {
            Phase::Silent | Phase::Receiving if self.activity.is_admitted() => Some(since + self.limits.head_timeout),
            Phase::Silent | Phase::Receiving => Some(since + self.limits.head_timeout.min(HEALTH_HEAD_TIMEOUT)),
            Phase::Idle => Some(since + self.limits.idle_timeout),
            Phase::Answering | Phase::Writing | Phase::Flushing => None,
        }
    }

    /// Pending until the deadline, and an error from then on.
    fn time_out<T>(&mut self, context: &mut Context<'_>, deadline: Instant) -> Poll<io::Result<T>> {
        if self.alarm.deadline() != deadline {
            self.alarm.as_mut().reset(deadline);
        }
        ready!(self.alarm.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    /// Bounds a write that makes no progress.
    fn wrote<T>(&mut self, context: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.write_deadline = None;
            return written;
        }
        let idle_timeout = self.limits.idle_timeout;
        let deadline = *self.write_deadline.get_or_insert_with(|| Instant::now() + idle_timeout);
        self.time_out(context, deadline)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for TimeoutIo<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if read.is_pending() {
            let Some(deadline) = self.read_deadline() else { return Poll::Pending };
            return self.time_out(context, deadline);
        }
        if buffer.filled().len() > before {
            match self.activity.phase() {
                Phase::Silent | Phase::Idle => {
                    self.activity.enter(Phase::Receiving);
                }
                Phase::Flushing => self.has_read_ahead = true,
                Phase::Receiving | Phase::Answering | Phase::Writing => {}
            }
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for TimeoutIo<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.wrote(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.wrote(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// hyper flushes when it has written all that it holds.
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_flush(context))?;
        if self.activity.phase() == Phase::Flushing {
            if std::mem::take(&mut self.has_read_ahead) {
                self.activity.enter(Phase::Receiving);
            } else {
                // hyper does not always read before it waits: the alarm has to be set here.
                let deadline = self.activity.enter(Phase::Idle) + self.limits.idle_timeout;
                let _ = self.time_out::<()>(context, deadline);
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// The body of an answer. hyper drops it when it has taken the last byte.
pub(super) struct AnswerBody {
    body: Body,
    activity: Arc<Activity>,
}

impl AnswerBody {
    pub(super) fn new(body: Body, activity: Arc<Activity>) -> Self {
        activity.enter(Phase::Writing);
        Self { body, activity }
    }
}

impl http_body::Body for AnswerBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for AnswerBody {
    fn drop(&mut self) {
        self.activity.enter(Phase::Flushing);
    }
}
