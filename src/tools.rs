//! What a model can ask us to do: the five tools, their schemas, and the one way every call takes through them.
//!
//! A tool is a struct of its arguments that knows how to run (`Tool`); the table of them is built once. [`ToolServer`] is the
//! MCP side: it decodes, runs, measures and renders, and sees to it that a panic, a client that leaves and a server that stops
//! each end as the contract says. It knows no axum, and the backend knows no MCP.

mod answer;
mod args;
#[cfg(feature = "benches")]
pub(crate) mod benching;
mod call;
#[cfg(feature = "conformance")]
mod conformance;
mod data;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod plain;
#[cfg(test)]
mod properties;
mod tickets;
mod unfit;
mod unserved;
mod users;

use std::borrow::Cow;
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use futures_util::future::BoxFuture;
use rmcp::model::{
    CacheScope, CallToolRequestParams, CallToolResponse, CallToolResult, ContentBlock, CustomRequest, CustomResult,
    DiscoverResult, ErrorCode as RpcErrorCode, Implementation, InitializeRequestParams, InitializeResult, JsonObject,
    ListToolsResult, MetaObject, PaginatedRequestParams, ProtocolVersion, ServerCapabilities, ServerConfig,
    Tool as ToolDefinition, ToolAnnotations,
};
use rmcp::service::RequestContext;
use rmcp::{ErrorData, RoleServer, ServerHandler};
use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use validator::Validate;

use crate::auth::{Caller, Permission};
use crate::backend::{BackendClient, Call};
use crate::memory::ByteBudget;
use crate::problem::Problem;
use crate::telemetry::audit::{self, Audit};
use crate::telemetry::metrics::{Metrics, Operation};
use crate::telemetry::spans::{Description, Spans};
use crate::visible;
pub use answer::ResponseBody;
use args::Rules;
pub use call::Permits;
use call::{Ended, Origin, subject};
pub use plain::{Head, PlainCall, Written};
use unserved::unserved_methods;

/// The protocol revisions that we serve. 2024-11-05 knew another transport.
const PROTOCOL_VERSIONS: &[ProtocolVersion] = &[
    ProtocolVersion::V_2025_03_26,
    ProtocolVersion::V_2025_06_18,
    ProtocolVersion::V_2025_11_25,
    ProtocolVersion::V_2026_07_28,
];
/// What we can do changes with a release or a restart only: where it is the same for everyone, clients may keep it for a while.
const LIST_TTL_MS: u64 = 300_000;
/// The outcome, in the audit, of a call of a tool that does not exist.
const UNKNOWN_TOOL: &str = "UNKNOWN_TOOL";
/// And of one that the caller may not call.
const INSUFFICIENT_SCOPE: &str = "INSUFFICIENT_SCOPE";
const SERVER_INFO_KEY: &str = "io.modelcontextprotocol/serverInfo";
const INSTRUCTIONS: &str = "Users, support tickets and datasets of the organisation's internal service. \
    Failed calls return a JSON object with `error`, `message` and `details`; `message` says what to do next.";

/// A tool: the arguments it takes, which are what runs. The struct's doc comment is its description, written for the model.
trait Tool: DeserializeOwned + JsonSchema + Validate + Send + 'static {
    /// The name on the wire.
    const NAME: &'static str;
    /// The name for people.
    const TITLE: &'static str;
    /// What a call changes.
    const EFFECT: Effect;
    /// What a successful call gives.
    type Output: Output;

    fn run(self, backend: &BackendClient, call: &Call) -> impl Future<Output = Result<Self::Output, Problem>> + Send;
}

/// What a call changes in the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Effect {
    /// Nothing.
    Reads,
    /// It adds something, each time it is called.
    Adds,
}

impl Effect {
    fn annotations(self) -> ToolAnnotations {
        let reads = self == Self::Reads;
        ToolAnnotations::from_raw(None, Some(reads), Some(false), Some(reads), Some(false))
    }
}

/// A tool's result: an object that matches its published schema.
trait Output: JsonSchema {
    /// The object as compact JSON.
    fn to_json(&self) -> Result<String, serde_json::Error>;
}

impl<T: Serialize + JsonSchema> Output for T {
    fn to_json(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string(self)
    }
}

/// One row of the table: a tool with everything that can be known before it is called.
struct Entry {
    definition: ToolDefinition,
    rules: Rules,
    effect: Effect,
    /// What a caller needs to see and to call it.
    permission: Permission,
    index: usize,
    /// How the audit names it.
    audited: audit::Tool,
    span_description: Description,
    run: fn(&'static Entry, ToolServer, Arc<Call>, JsonObject) -> Running,
}

/// A call that runs, and gives its result as compact JSON.
type Running = BoxFuture<'static, Result<String, Problem>>;

/// The tools, sorted by name, and what a caller needs for each. The order is the same for everyone and on every replica.
static TOOLS: LazyLock<[Entry; 5]> = LazyLock::new(|| {
    [
        entry::<tickets::CreateTicket>(0, Permission::TicketsWrite),
        entry::<users::GetUserProfile>(1, Permission::UsersRead),
        entry::<tickets::ListTickets>(2, Permission::TicketsRead),
        entry::<users::ListUsers>(3, Permission::UsersRead),
        entry::<data::QueryData>(4, Permission::DataRead),
    ]
});

/// The names of the tools, in the order of the table: the closed set of values that metrics may use.
pub const TOOL_NAMES: [&str; 5] = [
    tickets::CreateTicket::NAME,
    users::GetUserProfile::NAME,
    tickets::ListTickets::NAME,
    users::ListUsers::NAME,
    data::QueryData::NAME,
];

fn entry<T: Tool>(index: usize, permission: Permission) -> Entry {
    let (description, input) = args::input_schema::<T>();
    let rules = Rules::of(&input);
    let audited = audit::Tool::new(T::NAME, &input);
    let definition = ToolDefinition::new(T::NAME, description, Arc::new(input))
        .with_title(T::TITLE)
        .with_raw_output_schema(Arc::new(args::output_schema::<T::Output>()))
        .with_annotations(T::EFFECT.annotations());
    let span_description = Description::of_operation("tools/call", Some(T::NAME));
    Entry { definition, rules, effect: T::EFFECT, permission, index, audited, span_description, run: run::<T> }
}

/// Decodes, runs and renders one tool.
fn run<T: Tool>(entry: &'static Entry, server: ToolServer, call: Arc<Call>, arguments: JsonObject) -> Running {
    Box::pin(async move {
        let tool: T = args::decode(&entry.rules, arguments)?;
        let output = tool.run(&server.shared.backend, &call).await?;
        render(&output).map_err(|_| Problem::internal())
    })
}

/// A result as text that holds only what a person can see.
fn render(output: &impl Output) -> Result<String, serde_json::Error> {
    Ok(visible::json(output.to_json()?))
}

/// The MCP server: what rmcp calls. Made for every request, so it is one pointer.
#[derive(Clone)]
pub struct ToolServer {
    shared: Arc<Shared>,
}

struct Shared {
    backend: Arc<BackendClient>,
    metrics: Arc<Metrics>,
    /// Which tools there are for anybody (`ENABLED_TOOLS`, `READ_ONLY`), in the order of the table.
    switched_on: [bool; TOOL_NAMES.len()],
    audit: Arc<Audit>,
    /// Where requests are traced, if they are.
    spans: Option<Spans>,
    /// Room for calls of each tool, so that one tool cannot take all of it.
    room: [Semaphore; TOOL_NAMES.len()],
    /// Whether failures tell their technical cause (`DEBUG=true`).
    tell_causes: bool,
    /// Cancelled when the grace of a shutdown is over: what still runs is answered as TIMEOUT_ERROR.
    out_of_time: CancellationToken,
    /// What the stop waits for: calls until their end is recorded, and the tasks of writes.
    tracker: TaskTracker,
    info: ServerConfig,
    /// `_meta` of every result in the 2026-07-28 era.
    result_meta: MetaObject,
    /// The same as text.
    result_meta_json: String,
}

/// What a [`ToolServer`] is connected to.
pub struct Wiring {
    /// Whom the tools ask.
    pub backend: Arc<BackendClient>,
    /// Where calls are counted.
    pub metrics: Arc<Metrics>,
    /// Where they are written down.
    pub audit: Arc<Audit>,
    /// Where they are traced, if they are.
    pub spans: Option<Spans>,
    /// How many calls of one tool run at the same time.
    pub max_in_flight_per_tool: usize,
    /// Whether failures tell their technical cause (`DEBUG=true`).
    pub tell_causes: bool,
    /// Cancelled when the grace of a shutdown is over: what still runs is answered as TIMEOUT_ERROR.
    pub out_of_time: CancellationToken,
    /// What the stop waits for, before the audit file is closed.
    pub tracker: TaskTracker,
}

impl ToolServer {
    /// Builds what every call shares, the table of tools included: a schema that cannot be used shows here, at start.
    /// `switched_on` tells of a tool, by its name and whether it changes something, whether it exists for anybody.
    pub fn new(wiring: Wiring, switched_on: impl Fn(&str, bool) -> bool) -> Self {
        let Wiring { backend, metrics, audit, spans, max_in_flight_per_tool, tell_causes, out_of_time, tracker } =
            wiring;
        LazyLock::force(&TOOLS);
        let switched_on =
            TOOLS.each_ref().map(|entry| switched_on(&entry.definition.name, entry.effect != Effect::Reads));
        let implementation = Implementation::new("mcp-server", env!("CARGO_PKG_VERSION")).with_title("MCP server");
        let mut result_meta = MetaObject::new();
        result_meta.insert(
            SERVER_INFO_KEY.to_owned(),
            serde_json::json!({ "name": implementation.name, "version": implementation.version }),
        );
        let info = ServerConfig::new(ServerCapabilities::builder().enable_tools().build())
            .with_server_info(implementation)
            .with_instructions(INSTRUCTIONS)
            .with_protocol_version(ProtocolVersion::V_2025_11_25);
        let room = std::array::from_fn(|_| Semaphore::new(max_in_flight_per_tool));
        let result_meta_json = Value::from(result_meta.0.clone()).to_string();
        let shared = Shared {
            backend,
            metrics,
            switched_on,
            audit,
            spans,
            room,
            tell_causes,
            out_of_time,
            tracker,
            info,
            result_meta,
            result_meta_json,
        };
        Self { shared: Arc::new(shared) }
    }

    /// What callers can need here, each once: the permissions of the tools that are switched on.
    pub fn permissions(&self) -> impl Iterator<Item = Permission> {
        let wanted = |permission| self.entries().any(|entry| entry.permission == permission);
        Permission::ALL.into_iter().filter(move |permission| wanted(*permission))
    }

    /// What bounds the memory of answers and requests.
    pub fn memory(&self) -> &Arc<ByteBudget> {
        self.shared.backend.memory()
    }

    /// The tools that are switched on.
    fn entries(&self) -> impl Iterator<Item = &'static Entry> {
        TOOLS.iter().filter(|entry| self.shared.switched_on.get(entry.index).copied().unwrap_or(false))
    }

    fn find(&self, name: &str) -> Option<&'static Entry> {
        self.entries().find(|entry| entry.definition.name == name)
    }

    /// Counts and traces a request that is answered at once.
    fn answered<T>(
        &self,
        operation: Operation,
        protocol: Option<ProtocolVersion>,
        context: &RequestContext<RoleServer>,
        answer: impl FnOnce() -> Result<T, ErrorData>,
    ) -> Result<T, ErrorData> {
        let started = Instant::now();
        let answer = answer();
        let (error, took) = (answer.as_ref().err().map(|error| error.code.0), started.elapsed());
        if let Some(spans) = &self.shared.spans {
            let origin = Origin::of(context);
            if let Some(recording) = spans.begin(&origin.trace, started).1 {
                let description = Description::of_operation(operation.method(), None);
                recording.end_request(origin.operation(&description, took), error);
            }
        }
        let protocol = protocol.as_ref().map_or("", ProtocolVersion::as_str);
        self.shared.metrics.operation_ended(operation, protocol, error, took);
        answer
    }

    /// A call that never begins leaves its trace. The name of a tool that does not exist is the caller's text, and not repeated.
    fn refuse(
        &self,
        entry: Option<&'static Entry>,
        outcome: &'static str,
        request: &CallToolRequestParams,
        context: &RequestContext<RoleServer>,
    ) {
        let Origin { trace, caller, .. } = Origin::of(context);
        let _inside = trace.span().enter();
        let no_arguments = JsonObject::new();
        let arguments = audit::digest_of_json(request.arguments.as_ref().unwrap_or(&no_arguments));
        let address = caller.as_ref().map(Caller::address);
        self.shared.audit.record(audit::Event {
            name: audit::Name::ToolCall,
            caller: caller.as_ref().and_then(subject),
            tool: entry.map(|entry| &entry.audited),
            arguments: Some(arguments),
            ..audit::Event::refused_caller(trace.context().trace_id(), address, outcome)
        });
    }
}

/// The result of a call for those who use this without an HTTP side.
fn result(ended: Ended, meta: Option<MetaObject>) -> CallToolResult {
    // Results are compact JSON of ours, and an object: text and structure are the same.
    let ended = ended.and_then(|result| match serde_json::from_str::<Value>(result.as_str()) {
        Ok(value) => Ok((result.as_str().to_owned(), value)),
        Err(_) => Err(Problem::internal()),
    });
    let mut result = match ended {
        Ok((json, value)) => {
            let mut result = CallToolResult::success(vec![ContentBlock::text(json)]);
            result.structured_content = Some(value);
            result
        }
        Err(problem) => CallToolResult::error(vec![ContentBlock::text(problem.to_json())]),
    };
    result.meta = meta;
    result
}

impl ServerHandler for ToolServer {
    fn get_info(&self) -> ServerConfig {
        self.shared.info.clone()
    }

    fn supported_protocol_versions(&self) -> Cow<'static, [ProtocolVersion]> {
        Cow::Borrowed(PROTOCOL_VERSIONS)
    }

    async fn initialize(
        &self,
        request: InitializeRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<InitializeResult, ErrorData> {
        context.peer.set_peer_info(request.clone());
        let result = self.negotiate_initialize(&request);
        let protocol = result.as_ref().map_or(request.protocol_version, |result| result.protocol_version.clone());
        self.answered(Operation::Initialize, Some(protocol), &context, || result)
    }

    async fn ping(&self, context: RequestContext<RoleServer>) -> Result<(), ErrorData> {
        self.answered(Operation::Ping, context.protocol_version(), &context, || Ok(()))
    }

    async fn discover(&self, context: RequestContext<RoleServer>) -> Result<DiscoverResult, ErrorData> {
        self.answered(Operation::Discover, context.protocol_version(), &context, || {
            let mut result = DiscoverResult::from_server_info(PROTOCOL_VERSIONS.to_vec(), self.get_info());
            (result.ttl_ms, result.cache_scope) = cache_hints(&context);
            Ok(result)
        })
    }

    async fn list_tools(
        &self,
        request: Option<PaginatedRequestParams>,
        context: RequestContext<RoleServer>,
    ) -> Result<ListToolsResult, ErrorData> {
        let protocol = context.protocol_version();
        let modern = is_modern(protocol.as_ref());
        self.answered(Operation::ListTools, protocol, &context, || {
            if request.is_some_and(|page| page.cursor.is_some()) {
                return Err(ErrorData::invalid_params("the list of tools has one page: send no cursor", None));
            }
            let caller = caller(&context);
            let visible = self.entries().filter(|entry| caller.is_some_and(|caller| caller.may(entry.permission)));
            let tools = visible.map(|entry| entry.definition.clone());
            #[cfg(feature = "conformance")]
            let tools = tools.chain(conformance::definitions());
            let mut list = ListToolsResult::with_all_items(tools.collect());
            if modern {
                let (ttl_ms, cache_scope) = cache_hints(&context);
                list = list.with_ttl_ms(ttl_ms).with_cache_scope(cache_scope);
                list.meta = Some(self.shared.result_meta.clone());
            }
            Ok(list)
        })
    }

    fn get_tool(&self, name: &str) -> Option<ToolDefinition> {
        #[cfg(feature = "conformance")]
        if let Some(fixture) = conformance::definitions().find(|fixture| fixture.name == name) {
            return Some(fixture);
        }
        self.find(name).map(|entry| entry.definition.clone())
    }

    async fn call_tool(
        &self,
        request: CallToolRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<CallToolResponse, ErrorData> {
        #[cfg(feature = "conformance")]
        if conformance::definitions().any(|fixture| fixture.name == request.name) {
            return conformance::call(&request, &context).await.map(Into::into);
        }
        let Some(entry) = self.find(&request.name) else {
            self.refuse(None, UNKNOWN_TOOL, &request, &context);
            let names: Vec<_> = self.entries().map(|entry| &*entry.definition.name).collect();
            return self.answered(Operation::CallUnknownTool, context.protocol_version(), &context, || {
                Err(ErrorData::invalid_params(
                    format!("there is no such tool; the tools are {}", names.join(", ")),
                    None,
                ))
            });
        };
        let name = TOOL_NAMES.get(entry.index).copied().unwrap_or_default();
        if !caller(&context).is_some_and(|caller| caller.may_call(name, entry.permission)) {
            self.refuse(Some(entry), INSUFFICIENT_SCOPE, &request, &context);
            // The HTTP layer answers in place of this, with a status and a challenge that clients act on.
            let needed = entry.permission.as_str();
            return Err(ErrorData::invalid_request(format!("the caller lacks the permission `{needed}`"), None));
        }
        let origin = Origin::of(&context);
        let protocol = origin.protocol.clone();
        let (mut arguments, written) = (request.arguments.unwrap_or_default(), extension::<Written>(&context));
        if let Some(written) = written {
            entry.rules.keep_digits(&mut arguments, written.message());
        }
        // rmcp moves the future of a request several times: a box keeps that cheap.
        let call = Box::pin(self.finish(entry, arguments, origin));
        let Some(ended) = context.ct.run_until_cancelled(call).await else {
            return Err(ErrorData::internal_error("the client has left", None));
        };
        let Some(written) = written else {
            let meta = is_modern(protocol.as_ref()).then(|| self.shared.result_meta.clone());
            return Ok(result(ended, meta).into());
        };
        written.leave(plain::response(&context.id, ended, self.meta(protocol.as_ref())));
        Ok(CallToolResult::success(Vec::new()).into())
    }

    async fn on_custom_request(
        &self,
        request: CustomRequest,
        context: RequestContext<RoleServer>,
    ) -> Result<CustomResult, ErrorData> {
        // Known methods arrive here when their parameters have the wrong shape.
        let operation = match request.method.as_str() {
            "tools/call" => Some(Operation::CallUnknownTool),
            "tools/list" => Some(Operation::ListTools),
            "server/discover" => Some(Operation::Discover),
            // 2026-07-28 has no such method.
            "initialize" if !is_modern(context.protocol_version().as_ref()) => Some(Operation::Initialize),
            _ => None,
        };
        let error = match operation {
            Some(_) => ErrorData::invalid_params(unfit::unfit(&request.method, request.params.as_ref()), None),
            None => ErrorData::new(RpcErrorCode::METHOD_NOT_FOUND, "this server has no such method", None),
        };
        let operation = operation.unwrap_or(Operation::Other);
        self.answered(operation, context.protocol_version(), &context, || Err(error))
    }

    unserved_methods!();
}

#[cfg(any(test, feature = "benches", feature = "fuzzing"))]
fn find(name: &str) -> Option<&'static Entry> {
    TOOLS.iter().find(|entry| entry.definition.name == name)
}

fn caller(context: &RequestContext<RoleServer>) -> Option<&Caller> {
    extension(context)
}

/// What the HTTP side has left in its request.
fn extension<T: Clone + Send + Sync + 'static>(context: &RequestContext<RoleServer>) -> Option<&T> {
    context.extensions.get::<http::request::Parts>()?.extensions.get()
}

/// How long, and for whom, what we say about our tools may be kept. What depends on the caller is theirs alone, and changes with
/// their next token.
fn cache_hints(context: &RequestContext<RoleServer>) -> (u64, CacheScope) {
    match caller(context).and_then(Caller::identity) {
        None => (LIST_TTL_MS, CacheScope::Public),
        Some(_) => (0, CacheScope::Private),
    }
}

fn is_modern(protocol: Option<&ProtocolVersion>) -> bool {
    protocol.is_some_and(|version| version.as_str() >= ProtocolVersion::V_2026_07_28.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_settings_know_the_tools_and_which_of_them_write() {
        assert_eq!(TOOL_NAMES, crate::settings::TOOLS);
        let writing: Vec<_> = TOOLS.iter().filter(|entry| entry.effect != Effect::Reads).collect();
        assert_eq!(
            writing.iter().map(|entry| &*entry.definition.name).collect::<Vec<_>>(),
            crate::settings::WRITING_TOOLS
        );
    }

    #[test]
    fn the_revisions_that_are_served_are_those_that_are_counted() {
        let served: Vec<_> = PROTOCOL_VERSIONS.iter().map(ProtocolVersion::as_str).collect();
        assert_eq!(served, crate::telemetry::metrics::PROTOCOL_VERSIONS);
    }
}
