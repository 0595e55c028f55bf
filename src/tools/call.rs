//! The one way of every call through its tool, whoever decoded it; and how it ends.

use std::any::Any;
use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use futures_util::FutureExt as _;
use rmcp::RoleServer;
use rmcp::model::{JsonObject, MetaObject, ProtocolVersion, RequestId};
use rmcp::service::RequestContext;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::{Instrument as _, Level};

use super::answer::ResultText;
use super::error::{out_of_time, tool_busy, unaudited};
use super::{Effect, Entry, Shared, ToolServer};
use crate::auth::{Caller, StepUp};
use crate::backend::{Call, Principal};
use crate::problem::{Details, ErrorCode, Problem};
use crate::telemetry::audit::{self, Decision, Digest, Slot, Subject};
use crate::telemetry::logs::{Cause, Told};
use crate::telemetry::metrics::{EndedCall, Outcome, Shed};
use crate::telemetry::spans::{self, Description};
use crate::telemetry::trace::RequestTrace;

/// How a call ended: its result as compact JSON, or what its caller is told instead.
pub(super) type Ended = Result<ResultText, Problem>;

/// What a request takes from others, such as its place among those of its caller. It is given back when the last copy is dropped:
/// whoever works for the request holds one, so that a write whose client has left keeps its place until it has ended.
#[derive(Clone)]
pub struct Permits {
    _held: Arc<dyn Any + Send + Sync>,
}

impl Permits {
    /// Holds these guards. They come to the call with the extensions of its HTTP request.
    pub fn new(guards: impl Send + Sync + 'static) -> Self {
        Self { _held: Arc::new(guards) }
    }
}

/// Where an MCP request comes from, and how it is spoken.
#[derive(Clone)]
pub(super) struct Origin {
    pub(super) trace: RequestTrace,
    pub(super) caller: Option<Caller>,
    pub(super) request_id: RequestId,
    pub(super) protocol: Option<ProtocolVersion>,
    step_up: Option<StepUp>,
    _permits: Option<Permits>,
}

impl Origin {
    /// What the HTTP side has left for us in the request's extensions, and `params._meta` says.
    pub(super) fn new(
        extensions: &http::Extensions,
        meta: Option<&MetaObject>,
        request_id: RequestId,
        protocol: Option<ProtocolVersion>,
    ) -> Self {
        let trace = extensions.get::<RequestTrace>().cloned();
        let trace = trace.unwrap_or_else(|| RequestTrace::new(&http::HeaderMap::new()));
        if let Some((traceparent, meta)) = meta.and_then(|meta| Some((meta.get_traceparent()?, meta))) {
            trace.adopt(traceparent, meta.get_tracestate());
        }
        let (caller, step_up) = (extensions.get::<Caller>().cloned(), extensions.get::<StepUp>().cloned());
        let permits = extensions.get::<Permits>().cloned();
        Self { trace, caller, request_id, protocol, step_up, _permits: permits }
    }

    /// The same of a request that rmcp has decoded.
    pub(super) fn of(context: &RequestContext<RoleServer>) -> Self {
        let (id, protocol) = (context.id.clone(), context.protocol_version());
        match context.extensions.get::<http::request::Parts>() {
            Some(parts) => Self::new(&parts.extensions, Some(&context.meta), id, protocol),
            None => Self::new(&http::Extensions::new(), Some(&context.meta), id, protocol),
        }
    }

    pub(super) fn protocol(&self) -> &str {
        self.protocol.as_ref().map_or("", ProtocolVersion::as_str)
    }

    pub(super) fn address(&self) -> Option<IpAddr> {
        self.caller.as_ref().map(Caller::address)
    }

    /// What the spans of a request say that has ended.
    pub(super) fn operation<'a>(&'a self, description: &'a Description, took: Duration) -> spans::Operation<'a> {
        spans::Operation {
            request: &self.trace,
            description,
            protocol: self.protocol.as_ref().and_then(known),
            request_id: match &self.request_id {
                RequestId::Number(id) => spans::RequestId::Number(*id),
                RequestId::String(id) => spans::RequestId::Text(Arc::clone(id)),
            },
            client_address: self.address(),
            took,
        }
    }
}

impl ToolServer {
    /// Runs a call until it ends, or the server has to stop. A caller who leaves drops it.
    pub(super) async fn finish(&self, entry: &'static Entry, arguments: JsonObject, origin: Origin) -> Ended {
        let trace = origin.trace.clone();
        let ending = self.ending(entry, &arguments, origin);
        let call = Arc::clone(&ending.call);
        let running = self.clone().execute(entry, ending, arguments).instrument(trace.span().clone());
        let ended = match entry.effect {
            Effect::Reads => tokio::select! {
                biased;
                ended = running => Ok(ended),
                // Dropping the call drops its backend request; its ending is written all the same.
                () = self.shared.out_of_time.cancelled() => Err(out_of_time(false)),
            },
            Effect::Adds => self.finish_write(running, &call).await,
        };
        ended.unwrap_or_else(|problem| Err(problem.traced(trace.context().trace_id())))
    }

    /// Runs a write in a task of its own: a client that leaves does not end it, and the stop waits for it. Fails when it was given up, or
    /// panicked.
    async fn finish_write(
        &self,
        running: impl Future<Output = Ended> + Send + 'static,
        call: &Call,
    ) -> Result<Ended, Problem> {
        let gave_up = self.shared.out_of_time.clone();
        let task = self.shared.tracker.spawn(async move {
            // Nothing is sent that could not be waited for.
            if gave_up.is_cancelled() {
                return None;
            }
            tokio::select! {
                biased;
                ended = running => Some(ended),
                () = gave_up.cancelled() => None,
            }
        });
        match task.await {
            Ok(Some(ended)) => Ok(ended),
            Ok(None) => Err(out_of_time(call.may_have_written())),
            Err(_panic) => {
                self.shared.metrics.panicked();
                Err(panicked(call))
            }
        }
    }

    /// Runs one call to its end and writes down how it ended, whatever the end is.
    async fn execute(self, entry: &'static Entry, mut ending: Ending, arguments: JsonObject) -> Ended {
        let Ok(slot) = self.shared.audit.admit() else { return Err(ending.refuse(unaudited())) };
        ending.slot = slot;
        let Some(room) = self.shared.room.get(entry.index) else { return Err(ending.fail(Problem::internal())) };
        let Ok(_room) = room.try_acquire() else {
            self.shared.metrics.shed(Shed::Tool);
            return Err(ending.refuse(tool_busy()));
        };
        let _in_flight = self.shared.metrics.call_in_flight(entry.index);
        let run = (entry.run)(entry, self.clone(), Arc::clone(&ending.call), arguments);
        let result = AssertUnwindSafe(run).catch_unwind().await.unwrap_or_else(|_panic| {
            self.shared.metrics.panicked();
            Err(panicked(&ending.call))
        });
        match result {
            Ok(json) => {
                let result = ResultText::new(json, ending.call.take_memory());
                ending.record(Outcome::Ok, None);
                Ok(result)
            }
            Err(problem) => Err(ending.fail(problem)),
        }
    }

    fn ending(&self, entry: &'static Entry, arguments: &JsonObject, origin: Origin) -> Ending {
        let started = Instant::now();
        let (onward, recording) = match &self.shared.spans {
            Some(spans) => spans.begin(&origin.trace, started),
            None => (origin.trace.trace().clone(), None),
        };
        let principal = origin.caller.as_ref().and_then(principal);
        Ending {
            shared: Arc::clone(&self.shared),
            entry,
            call: Arc::new(self.shared.backend.begin_call_for(onward, recording, principal, origin.address())),
            arguments: audit::digest_of_json(arguments),
            decision: Decision::Allowed,
            slot: Slot::default(),
            backend_declared: false,
            origin,
            started,
            recorded: false,
            _tracked: self.shared.tracker.token(),
        }
    }
}

/// What a caller is told when their call has panicked.
fn panicked(call: &Call) -> Problem {
    let mut problem = Problem::internal();
    problem.details.outcome = call.may_have_written().then_some("unknown");
    problem
}

/// The name of a revision of MCP that exists.
fn known(protocol: &ProtocolVersion) -> Option<&'static str> {
    ProtocolVersion::KNOWN_VERSIONS.iter().find(|known| *known == protocol).map(ProtocolVersion::as_str)
}

/// A caller as the audit names it.
pub(super) fn subject(caller: &Caller) -> Option<Arc<Subject>> {
    caller.identity().map(|identity| Arc::clone(identity.subject()))
}

/// The caller, as the backend's room sees one.
fn principal(caller: &Caller) -> Option<Principal<'_>> {
    let identity = caller.identity()?;
    Some(Principal {
        tenant: identity.tenant(),
        object: identity.object(),
        app: identity.app(),
        delegated: identity.is_delegated(),
        assertion: identity.assertion(),
    })
}

/// How one call ends: written to the log, the audit and the metrics exactly once, also when its future is dropped half-way.
struct Ending {
    shared: Arc<Shared>,
    entry: &'static Entry,
    origin: Origin,
    /// Whether the failure, if it is one, was the backend's own answer.
    backend_declared: bool,
    call: Arc<Call>,
    /// The hash of the call's arguments.
    arguments: Digest,
    decision: Decision,
    /// Room for the audit event, where the call depends on it.
    slot: Slot,
    started: Instant,
    recorded: bool,
    /// Keeps the audit open until the end is recorded. rmcp runs calls in tasks of its own, which may outlive their connection.
    _tracked: TaskTrackerToken,
}

impl Ending {
    /// Records a failure and gives what is told of it: the caller gets what they can act on, the log gets the cause.
    fn fail(mut self, problem: Problem) -> Problem {
        self.backend_declared = problem.error == ErrorCode::ServiceError
            && problem.details.status_code.is_some_and(|status| !(200..300).contains(&status));
        let mut problem = problem.traced(self.origin.trace.context().trace_id());
        if let Some(step_up) = self.origin.step_up.as_ref().filter(|_| problem.details.claims.is_some()) {
            step_up.demand(&Problem {
                details: Box::new(Details { cause: None, ..(*problem.details).clone() }),
                ..problem.clone()
            });
        }
        let tell_cause = self.shared.tell_causes;
        let (text, backend_detail) = (problem.details.cause.clone(), problem.details.backend_detail.take());
        self.record(Outcome::Failed(problem.error), text.map(|text| Box::new(Cause { text, backend_detail })));
        if !tell_cause {
            problem.details.cause = None;
        }
        problem
    }

    /// Turns the call away: nothing of it was run.
    fn refuse(mut self, problem: Problem) -> Problem {
        self.decision = Decision::Refused;
        self.fail(problem)
    }

    fn record(mut self, outcome: Outcome, cause: Option<Box<Cause>>) {
        self.write(outcome, cause);
    }

    fn write(&mut self, outcome: Outcome, cause: Option<Box<Cause>>) {
        self.recorded = true;
        let took = self.started.elapsed();
        self.shared.metrics.tool_called(&EndedCall {
            tool: self.entry.index,
            protocol: self.origin.protocol(),
            outcome,
            backend_declared: self.backend_declared,
            took,
            at_backend: self.call.at_backend(),
            reads: self.entry.effect == Effect::Reads,
        });
        let (outcome_word, attempts, backend_status) = (outcome.as_str(), self.call.attempts(), self.call.status());
        let (now, trace_id) = (SystemTime::now(), self.origin.trace.context().trace_id());
        if let Some(recording) = self.call.recording() {
            let operation = self.origin.operation(&self.entry.span_description, took);
            recording.end_tool_call(operation, (outcome != Outcome::Ok).then_some(outcome_word));
        }
        let _inside = self.origin.trace.span().enter();
        let event = audit::Event {
            at: now.into(),
            name: audit::Name::ToolCall,
            trace_id,
            caller: self.origin.caller.as_ref().and_then(subject),
            client_address: self.origin.address(),
            tool: Some(&self.entry.audited),
            arguments: Some(self.arguments),
            decision: self.decision,
            outcome: outcome_word,
            backend_status,
            attempts,
            idempotency_key: self.call.idempotency_key().map(Box::from),
            took,
        };
        let (level, verb) = match outcome {
            Outcome::Ok => (Level::INFO, "succeeded"),
            Outcome::Cancelled => (Level::INFO, "was given up because its client left"),
            Outcome::Unknown => (Level::WARN, "was given up by the server after it was sent: its outcome is unknown"),
            Outcome::Failed(ErrorCode::ValidationError) => (Level::INFO, "was refused with VALIDATION_ERROR"),
            Outcome::Failed(ErrorCode::ServiceError) => (Level::WARN, "failed with SERVICE_ERROR"),
            Outcome::Failed(ErrorCode::AuthenticationError) => (Level::WARN, "failed with AUTHENTICATION_ERROR"),
            Outcome::Failed(ErrorCode::TimeoutError) => (Level::WARN, "failed with TIMEOUT_ERROR"),
            Outcome::Failed(ErrorCode::InternalError) => (Level::ERROR, "failed with INTERNAL_ERROR"),
        };
        let told = Told { level, verb, cause };
        self.shared.audit.record_call(std::mem::take(&mut self.slot), event, told);
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        if !self.recorded {
            let outcome = if std::thread::panicking() {
                Outcome::Failed(ErrorCode::InternalError)
            } else if self.call.may_have_written() {
                Outcome::Unknown
            } else if self.shared.out_of_time.is_cancelled() {
                Outcome::Failed(ErrorCode::TimeoutError)
            } else {
                Outcome::Cancelled
            };
            self.write(outcome, None);
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use serde_json::{Value, json};
    use tokio_util::sync::CancellationToken;
    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::backend::BackendClient;
    use crate::identity::TokenSource;
    use crate::settings::{BackendSettings, IdentitySettings};
    use crate::telemetry::metrics::Metrics;
    use crate::tools::{Rules, Running, TOOL_NAMES, TOOLS, Wiring};

    /// A server whose backend and Entra do not exist: for what goes wrong before they are asked.
    pub(in crate::tools) fn server(max_in_flight_per_tool: usize) -> ToolServer {
        let identity = IdentitySettings::nowhere();
        let metrics = Arc::new(Metrics::new(&TOOL_NAMES, &crate::backend::Route::TEMPLATES));
        let identity = TokenSource::start(&identity, Duration::from_secs(1)).unwrap();
        let backend = BackendSettings::new("http://127.0.0.1:1".parse().unwrap());
        let backend = BackendClient::new(&backend, identity, Arc::clone(&metrics)).unwrap();
        let wiring = Wiring {
            backend: Arc::new(backend),
            metrics,
            audit: Arc::default(),
            spans: None,
            max_in_flight_per_tool,
            tell_causes: false,
            out_of_time: CancellationToken::new(),
            tracker: TaskTracker::new(),
        };
        ToolServer::new(wiring, |_, _| true)
    }

    fn ending(server: &ToolServer, tool: usize) -> Ending {
        let origin =
            Origin::new(&http::Extensions::new(), None, RequestId::Number(1), Some(ProtocolVersion::V_2025_11_25));
        Ending {
            shared: Arc::clone(&server.shared),
            entry: &TOOLS[tool],
            backend_declared: false,
            call: Arc::new(server.shared.backend.begin_call(origin.trace.trace().clone())),
            arguments: Digest::of(b"{}"),
            decision: Decision::Allowed,
            slot: Slot::default(),
            origin,
            started: Instant::now(),
            recorded: false,
            _tracked: server.shared.tracker.token(),
        }
    }

    fn error_of(ended: Ended) -> Value {
        serde_json::from_str(&ended.unwrap_err().to_json()).unwrap()
    }

    /// The tool's row of the table with something else to run.
    fn running(tool: usize, run: fn(&'static Entry, ToolServer, Arc<Call>, JsonObject) -> Running) -> &'static Entry {
        let Entry { definition, effect, permission, audited, .. } = &TOOLS[tool];
        let rules = Rules::of(&definition.input_schema);
        Box::leak(Box::new(Entry {
            definition: definition.clone(),
            rules,
            effect: *effect,
            permission: *permission,
            index: tool,
            audited: audited.clone(),
            span_description: Description::of_operation("tools/call", None),
            run,
        }))
    }

    #[tokio::test]
    async fn a_panic_in_any_tool_is_our_fault_says_so_at_once_and_hurts_no_other_call() {
        const TIMES: usize = 20;
        let server = server(TIMES * 2);
        for (tool, name) in TOOL_NAMES.into_iter().enumerate() {
            let panics = running(tool, |_, _, _, _| {
                Box::pin(async {
                    tokio::task::yield_now().await;
                    panic!("a bug, with a secret in its message")
                })
            });
            let works = running(tool, |_, _, _, _| {
                Box::pin(async {
                    // Still at work when the others have panicked.
                    for _ in 0..20 {
                        tokio::task::yield_now().await;
                    }
                    Ok("{}".to_owned())
                })
            });
            let calls = (0..TIMES * 2).map(|number| {
                let ending = ending(&server, tool);
                let trace_id = ending.origin.trace.context().trace_id().to_string();
                let entry = if number % 2 == 0 { panics } else { works };
                let call = server.clone().execute(entry, ending, JsonObject::new());
                async move {
                    (number % 2 == 0, trace_id, tokio::time::timeout(Duration::from_secs(60), call).await.unwrap())
                }
            });
            for (panicked, trace_id, result) in futures_util::future::join_all(calls).await {
                if !panicked {
                    assert!(result.is_ok(), "{name}");
                    continue;
                }
                let error = error_of(result);
                assert_eq!(error["error"], "INTERNAL_ERROR");
                assert_eq!(error["details"], json!({ "retryable": false, "trace_id": trace_id }));
                assert!(!error.to_string().contains("secret"), "{error}");
            }
            assert_eq!(server.shared.room[tool].available_permits(), TIMES * 2);
        }
        let figures = server.shared.metrics.encode().unwrap();
        assert!(figures.contains("mcp_server_panics_total 100"), "{figures}");
        for tool in TOOL_NAMES {
            for outcome in ["", r#",error_type="INTERNAL_ERROR""#] {
                let ended = format!(
                    r#"_count{{mcp_method_name="tools/call",gen_ai_tool_name="{tool}",network_transport="tcp"{outcome},mcp_protocol_version="2025-11-25"}} 20"#
                );
                assert!(figures.contains(&ended), "{ended}: {figures}");
            }
        }
    }

    #[tokio::test]
    async fn a_panic_in_the_task_of_a_write_is_our_fault_and_the_call_is_recorded_before_the_stop_goes_on() {
        let server = server(1);
        let ending = ending(&server, 0);
        let call = Arc::clone(&ending.call);
        server.shared.tracker.close();
        assert!(server.shared.tracker.wait().now_or_never().is_none(), "a call is waited for");
        let result = server
            .finish_write(
                async move {
                    let _ending = ending;
                    panic!("a bug beside the tool")
                },
                &call,
            )
            .await;
        assert_eq!(result.unwrap_err().error, ErrorCode::InternalError);
        assert!(server.shared.tracker.wait().now_or_never().is_some(), "the call has ended");
        let figures = server.shared.metrics.encode().unwrap();
        let ended =
            r#"mcp_server_calls_total{gen_ai_tool_name="create_ticket",outcome="INTERNAL_ERROR",fault="server"} 1"#;
        assert!(figures.contains(ended) && figures.contains("mcp_server_panics_total 1"), "{figures}");
    }

    #[tokio::test]
    async fn a_tool_that_is_full_refuses_at_once() {
        let server = server(1);
        let _only_seat = server.shared.room[0].try_acquire().unwrap();
        let result = server.clone().execute(&TOOLS[0], ending(&server, 0), JsonObject::new()).await;
        let error = error_of(result);
        assert_eq!(error["error"], "SERVICE_ERROR");
        assert_eq!(
            (&error["details"]["retryable"], &error["details"]["retry_after_seconds"]),
            (&json!(true), &json!(1))
        );
    }
}
