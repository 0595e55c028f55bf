//! What may go wrong on purpose: rules by which a stand-in errs, stalls, lies or hangs up.
//!
//! Being down (no listener at all) is not a rule; each stand-in has `set_down` for that.

use std::sync::Mutex;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};

use super::wire::{Answer, Hangup, InFlight, lock};

/// One rule: what happens, on which requests, how often.
///
/// ```
/// # use std::time::Duration;
/// # use mcp_server::demo::fault::FaultRule;
/// let throttled_twice = FaultRule::status(429).header("retry-after", "1").on("GET /users").times(2);
/// let flaky = FaultRule::status(503).probability(0.2);
/// let slow = FaultRule::delay(Duration::from_secs(2));
/// ```
#[derive(Debug, Clone)]
pub struct FaultRule {
    effect: Option<Effect>,
    delay: Duration,
    on: String,
    probability: f64,
    remaining: Option<u32>,
}

#[derive(Debug, Clone)]
enum Effect {
    Answer { status: StatusCode, headers: HeaderMap, body: Option<Bytes>, stalls: bool },
    Hang,
    CloseBeforeHead,
    CloseMidBody,
    DelayMidBody(Duration),
    EndlessBody,
    HugeBody(usize),
}

impl FaultRule {
    fn new(effect: Option<Effect>) -> Self {
        Self { effect, delay: Duration::ZERO, on: String::new(), probability: 1.0, remaining: None }
    }

    /// Answers with this status in the stand-in's own error format, without doing anything. A number that is no HTTP
    /// status is sent as 500.
    #[must_use]
    pub fn status(status: u16) -> Self {
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self::new(Some(Effect::Answer { status, headers: HeaderMap::new(), body: None, stalls: false }))
    }

    /// Answers 200 with a body that stops in the middle of a JSON string.
    #[must_use]
    pub fn broken_json() -> Self {
        Self::status(200).body(r#"{"id": "1", "name": "Ada L"#)
    }

    /// Answers 200 with JSON whose every field has the wrong type.
    #[must_use]
    pub fn wrong_types() -> Self {
        Self::status(200).body(
            r#"{"id":7,"name":["x"],"email":null,"title":1,"created_at":{},"total":"many","items":{},"data":"none",
                "status":0,"access_token":7,"expires_in":"soon"}"#,
        )
    }

    /// Answers 307 and points to another place.
    #[must_use]
    pub fn redirect(location: &str) -> Self {
        Self::status(307).header("location", location).body("")
    }

    /// Takes the request and never answers it.
    #[must_use]
    pub fn hang() -> Self {
        Self::new(Some(Effect::Hang))
    }

    /// Does what was asked, then closes the connection without a word.
    #[must_use]
    pub fn close_before_head() -> Self {
        Self::new(Some(Effect::CloseBeforeHead))
    }

    /// Does what was asked, promises the whole body, sends half of it and closes the connection.
    #[must_use]
    pub fn close_mid_body() -> Self {
        Self::new(Some(Effect::CloseMidBody))
    }

    /// Does what was asked, sends the head and half of the body at once, and the rest after this time.
    #[must_use]
    pub fn delay_mid_body(delay: Duration) -> Self {
        Self::new(Some(Effect::DelayMidBody(delay)))
    }

    /// Answers 200 with JSON in chunks that never end.
    #[must_use]
    pub fn endless_body() -> Self {
        Self::new(Some(Effect::EndlessBody))
    }

    /// Answers 200 with valid JSON of about so many bytes and an honest `Content-Length`.
    #[must_use]
    pub fn huge_body(bytes: usize) -> Self {
        Self::new(Some(Effect::HugeBody(bytes)))
    }

    /// Answers as usual, but not before this time has passed.
    #[must_use]
    pub fn delay(delay: Duration) -> Self {
        Self::new(None).after(delay)
    }

    /// Waits so long before anything else of this rule.
    #[must_use]
    pub fn after(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    /// Adds a header to an answer of [`FaultRule::status`]; what HTTP cannot carry is left out.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        if let (Some(Effect::Answer { headers, .. }), Ok(name), Ok(value)) =
            (&mut self.effect, HeaderName::try_from(name), HeaderValue::try_from(value))
        {
            headers.append(name, value);
        }
        self
    }

    /// The body of an answer of [`FaultRule::status`]: JSON, unless a header says otherwise.
    #[must_use]
    pub fn body(mut self, text: impl Into<Bytes>) -> Self {
        if let Some(Effect::Answer { body, .. }) = &mut self.effect {
            *body = Some(text.into());
        }
        self
    }

    /// Never ends the body of an answer of [`FaultRule::status`], of which 100 bytes more are announced than are sent.
    #[must_use]
    pub fn stalled(mut self) -> Self {
        if let Some(Effect::Answer { stalls, .. }) = &mut self.effect {
            *stalls = true;
        }
        self
    }

    /// Only on requests that begin so, written as `METHOD /path` (without the server's path prefix).
    #[must_use]
    pub fn on(mut self, beginning: &str) -> Self {
        beginning.clone_into(&mut self.on);
        self
    }

    /// Only so many times, then never again.
    #[must_use]
    pub fn times(mut self, times: u32) -> Self {
        self.remaining = Some(times);
        self
    }

    /// Only on this share of the requests, drawn at random.
    #[must_use]
    pub fn probability(mut self, probability: f64) -> Self {
        self.probability = probability;
        self
    }
}

/// The rules in force.
#[derive(Debug, Default)]
pub(super) struct Faults(Mutex<Vec<FaultRule>>);

impl Faults {
    pub(super) fn set(&self, rules: impl IntoIterator<Item = FaultRule>) {
        *lock(&self.0) = rules.into_iter().collect();
    }

    pub(super) fn add(&self, rule: FaultRule) {
        lock(&self.0).push(rule);
    }

    /// What happens to this request: the delays of all rules that apply add up, the first effect wins.
    fn draw(&self, request: &str) -> (Duration, Option<Effect>) {
        let (mut delay, mut effect) = (Duration::ZERO, None);
        let mut rules = lock(&self.0);
        for rule in rules.iter_mut() {
            let superseded = effect.is_some() && rule.effect.is_some();
            if superseded || !request.starts_with(&rule.on) || fastrand::f64() >= rule.probability {
                continue;
            }
            match &mut rule.remaining {
                Some(0) => continue,
                Some(times) => *times -= 1,
                None => {}
            }
            delay += rule.delay;
            effect = effect.or_else(|| rule.effect.clone());
        }
        rules.retain(|rule| rule.remaining != Some(0));
        (delay, effect)
    }

    /// Answers one request by the rules: `honest` does what was asked, `refuse` makes an error of the stand-in's kind.
    pub(super) async fn answer(
        &self,
        request: &str,
        in_flight: InFlight,
        refuse: impl FnOnce(StatusCode) -> Response<Bytes>,
        honest: impl FnOnce() -> Response<Bytes>,
    ) -> Answer {
        let (delay, effect) = self.draw(request);
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        let Some(effect) = effect else {
            let answer = honest().map(Body::from);
            in_flight.finish();
            return Ok(answer);
        };
        match effect {
            Effect::Hang => std::future::pending().await,
            Effect::CloseBeforeHead => {
                honest();
                in_flight.finish();
                Err(Hangup)
            }
            Effect::CloseMidBody => {
                let (mut parts, body) = honest().into_parts();
                parts.headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len().max(2)));
                in_flight.finish();
                Ok(Response::from_parts(parts, cut_short(body.slice(..body.len() / 2))))
            }
            Effect::DelayMidBody(pause) => {
                let (mut parts, body) = honest().into_parts();
                parts.headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
                let half = body.len() / 2;
                Ok(Response::from_parts(parts, in_two(body.slice(..half), pause, body.slice(half..), in_flight)))
            }
            Effect::EndlessBody => Ok(json(endless(in_flight))),
            Effect::HugeBody(bytes) => {
                in_flight.finish();
                let mut answer = json(huge(bytes));
                answer
                    .headers_mut()
                    .insert(CONTENT_LENGTH, HeaderValue::from(HUGE_HEAD.len() + bytes + HUGE_TAIL.len()));
                Ok(answer)
            }
            Effect::Answer { status, headers, body, stalls } => {
                let mut answer = match body {
                    Some(body) => json(body),
                    None => refuse(status),
                };
                *answer.status_mut() = status;
                for (name, value) in &headers {
                    answer.headers_mut().insert(name, value.clone());
                }
                if stalls {
                    let (mut parts, body) = answer.into_parts();
                    parts.headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len() + 100));
                    return Ok(Response::from_parts(parts, without_end(body, in_flight)));
                }
                in_flight.finish();
                Ok(answer.map(Body::from))
            }
        }
    }
}

fn json<B>(body: B) -> Response<B> {
    let mut answer = Response::new(body);
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

fn cut_short(beginning: Bytes) -> Body {
    Body::from_stream(stream::unfold(Some(beginning), |beginning| async move {
        if let Some(beginning) = beginning {
            return Some((Ok(beginning), None));
        }
        // Hyper sends what it holds only when the body pauses; without that not even the head would arrive.
        tokio::task::yield_now().await;
        Some((Err(Hangup), None))
    }))
}

fn in_two(first: Bytes, pause: Duration, second: Bytes, in_flight: InFlight) -> Body {
    Body::from_stream(stream::unfold(Some((Some(first), second, in_flight)), move |state| async move {
        let (first, second, in_flight) = state?;
        if let Some(first) = first {
            return Some((Ok::<_, Hangup>(first), Some((None, second, in_flight))));
        }
        tokio::time::sleep(pause).await;
        in_flight.finish();
        Some((Ok(second), None))
    }))
}

fn without_end(beginning: Bytes, in_flight: InFlight) -> Body {
    let beginning = stream::once(std::future::ready(Ok::<_, Hangup>(beginning)));
    Body::from_stream(beginning.chain(stream::once(async move {
        let _until_the_client_leaves = in_flight;
        std::future::pending().await
    })))
}

fn endless(in_flight: InFlight) -> Body {
    let chunk = Bytes::from(r#"{"row":"and another one"},"#.repeat(320));
    Body::from_stream(stream::unfold((true, in_flight), move |(first, in_flight)| {
        let chunk = if first { Bytes::from_static(br#"{"data":["#) } else { chunk.clone() };
        // Hyper would gladly copy for ever within one poll: the yield lets others have the thread.
        async move {
            tokio::task::yield_now().await;
            Some((Ok::<_, Hangup>(chunk), (false, in_flight)))
        }
    }))
}

const HUGE_HEAD: &str = r#"{"data":[{"filler":""#;
const HUGE_TAIL: &str = r#""}]}"#;

fn huge(bytes: usize) -> Body {
    let chunk = Bytes::from(vec![b'x'; 64 * 1024]);
    let full = std::iter::repeat_n(chunk.clone(), bytes / chunk.len());
    let pieces = std::iter::once(Bytes::from_static(HUGE_HEAD.as_bytes()))
        .chain(full)
        .chain([chunk.slice(..bytes % chunk.len()), Bytes::from_static(HUGE_TAIL.as_bytes())]);
    Body::from_stream(stream::iter(pieces.map(Ok::<_, Hangup>)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_apply_where_and_as_often_as_they_say() {
        let faults = Faults::default();
        let status = |request| match faults.draw(request).1 {
            Some(Effect::Answer { status, .. }) => status.as_u16(),
            _ => 0,
        };
        faults.set([FaultRule::status(503).on("GET /users").times(2), FaultRule::status(500).on("POST /")]);
        assert_eq!(["GET /health", "GET /users/1", "POST /tickets"].map(status), [0, 503, 500]);
        assert_eq!(["GET /users", "GET /users", "POST /tickets"].map(status), [503, 0, 500]);
        faults.set([FaultRule::status(503).probability(0.0)]);
        assert_eq!(status("GET /users"), 0);
    }

    #[test]
    fn delays_add_to_the_first_effect() {
        let faults = Faults::default();
        let second = Duration::from_secs(1);
        faults.set([FaultRule::delay(second), FaultRule::hang().after(second), FaultRule::status(500)]);
        let (delay, effect) = faults.draw("GET /users");
        assert_eq!(delay, 2 * second);
        assert!(matches!(effect, Some(Effect::Hang)));
    }
}
