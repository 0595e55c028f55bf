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
    /// By when all that has been answered has to be written, from the first write that had to wait.
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

    /// Bounds an answer that cannot be written at once, whether or not the client takes some of it now and then.
    fn wrote<T>(&mut self, context: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            return written;
        }
        let write_timeout = self.limits.write_timeout;
        let deadline = *self.write_deadline.get_or_insert_with(|| Instant::now() + write_timeout);
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
        let phase = self.activity.phase();
        if phase != Phase::Writing {
            self.write_deadline = None;
        }
        if phase == Phase::Flushing {
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use hyper::server::conn::http1;
    use hyper::service::service_fn;
    use hyper_util::rt::TokioIo;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::settings::WebSettings;

    const SECOND: Duration = Duration::from_secs(1);

    /// The bytes of an answer that a client gets that takes so many a second, and how long that took.
    async fn taken_in(answer: usize, bytes_a_second: usize) -> (usize, Duration) {
        let (mut client, server) = tokio::io::duplex(1_000);
        let settings = WebSettings { response_write_timeout: 30 * SECOND, ..WebSettings::default() };
        let activity = Activity::new(&CancellationToken::new());
        let io = TimeoutIo::new(server, Arc::clone(&activity), &Limits::from(&settings));
        let service = service_fn(move |_request| {
            activity.enter(Phase::Answering);
            let body = AnswerBody::new(Body::from(vec![b'a'; answer]), Arc::clone(&activity));
            async { Ok::<_, std::convert::Infallible>(hyper::Response::new(body)) }
        });
        let serving = tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(io), service));
        client.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let (begin, mut taken, mut chunk) = (Instant::now(), 0, vec![0; bytes_a_second]);
        loop {
            tokio::time::sleep(SECOND).await;
            let mut read = 0;
            while read < bytes_a_second {
                match client.read(&mut chunk[read..]).await.unwrap_or(0) {
                    0 => {
                        let _ = serving.await;
                        return (taken + read, begin.elapsed());
                    }
                    some => read += some,
                }
            }
            taken += read;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_has_a_time_to_be_taken_in_however_steadily_the_client_takes_some_of_it() {
        // In 25 s, with less in the pipe than the client takes at once.
        let (taken, took) = taken_in(250_000, 10_000).await;
        assert!(taken > 250_000 && took < 30 * SECOND, "{taken} bytes, {took:?}");
        // A thousand bytes a second, of an answer that hyper gets in one piece.
        let (taken, took) = taken_in(250_000, 1_000).await;
        assert!((29_000..=32_000).contains(&taken) && took <= 32 * SECOND, "{taken} bytes, {took:?}");
        // The last bytes count, too.
        let (taken, took) = taken_in(32_500, 1_000).await;
        assert!(taken < 32_500 && took <= 32 * SECOND, "{taken} bytes, {took:?}");
    }
}
