//! The floor for a server on axum and reqwest: no MCP. The body of `POST /mcp` is parsed as JSON, one request is made to the
//! backend, and the backend's bytes go unparsed into an answer of the same shape and size as an MCP server's.
//!
//! Nobody could use it: it checks nothing, limits nothing and logs nothing. It says what the transport alone costs.

use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use axum::routing::{get, post};
use axum::serve::ListenerExt as _;
use serde::Deserialize;
use serde_json::value::RawValue;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

#[derive(Deserialize)]
struct Rpc<'a> {
    #[serde(borrow)]
    id: &'a RawValue,
    #[serde(borrow)]
    params: Params<'a>,
}

#[derive(Deserialize)]
struct Params<'a> {
    name: &'a str,
    #[serde(borrow)]
    arguments: &'a RawValue,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Arguments<'a> {
    user_id: &'a str,
    skip: u64,
    limit: u64,
    status: &'a str,
    dataset: &'a str,
}

struct PassThrough {
    client: reqwest::Client,
    base: String,
    bearer: HeaderValue,
}

async fn call(State(server): State<Arc<PassThrough>>, body: Bytes) -> Response {
    let Ok(rpc) = serde_json::from_slice::<Rpc>(&body) else { return answer(StatusCode::BAD_REQUEST, "{}") };
    let raw = rpc.params.arguments.get();
    let Arguments { user_id, skip, limit, status, dataset } = serde_json::from_str(raw).unwrap_or_default();
    let (client, base) = (&server.client, &server.base);
    let request = match rpc.params.name {
        "get_user_profile" => client.get(format!("{base}/users/{user_id}")),
        "list_users" => client.get(format!("{base}/users?skip={skip}&limit={limit}")),
        "list_tickets" => client.get(format!("{base}/tickets?status={status}&skip={skip}&limit={limit}")),
        "query_data" => client.get(format!("{base}/query/{dataset}?limit={limit}")),
        "create_ticket" => {
            let json = HeaderValue::from_static("application/json");
            client.post(format!("{base}/tickets")).header(header::CONTENT_TYPE, json).body(raw.to_owned())
        }
        _ => return answer(StatusCode::BAD_REQUEST, "{}"),
    };
    let (ok, data) = match request.header(header::AUTHORIZATION, server.bearer.clone()).send().await {
        Ok(response) => (response.status().is_success(), response.bytes().await.unwrap_or_default()),
        Err(_) => (false, Bytes::from_static(b"{}")),
    };
    let mut out = Vec::with_capacity(data.len() * 5 / 2 + 160);
    out.extend_from_slice(b"{\"jsonrpc\":\"2.0\",\"id\":");
    out.extend_from_slice(rpc.id.get().as_bytes());
    out.extend_from_slice(b",\"result\":{\"content\":[{\"type\":\"text\",\"text\":");
    if serde_json::to_writer(&mut out, str::from_utf8(&data).unwrap_or_default()).is_err() {
        return answer(StatusCode::INTERNAL_SERVER_ERROR, "{}");
    }
    out.extend_from_slice(b"}],\"structuredContent\":");
    out.extend_from_slice(&data);
    out.extend_from_slice(if ok { b",\"isError\":false}}" } else { b",\"isError\":true}}" });
    answer(StatusCode::OK, out)
}

fn answer(status: StatusCode, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

async fn serve() -> Fallible<()> {
    let variable = |name| std::env::var(name);
    let client = reqwest::Client::builder().no_proxy().pool_max_idle_per_host(usize::MAX).tcp_nodelay(true).build()?;
    let bearer = HeaderValue::try_from(format!("Bearer {}", variable("BEARER_TOKEN")?))?;
    let server = Arc::new(PassThrough { client, base: variable("BACKEND_API_URL")?, bearer });
    let router = Router::new()
        .route("/mcp", post(call))
        .route("/health/live", get(|| async { "{\"status\":\"alive\"}" }))
        .with_state(server);
    let socket = tokio::net::TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(([127, 0, 0, 1], variable("PORT")?.parse()?).into())?;
    let listener = socket.listen(4096)?.tap_io(|connection| {
        let _ = connection.set_nodelay(true);
    });
    Ok(axum::serve(listener, router).await?)
}

fn main() -> Fallible<()> {
    // On one core, threads would only be in each other's way.
    let mut runtime = match std::thread::available_parallelism()?.get() {
        1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    runtime.enable_all().build()?.block_on(serve())
}
