//! Ways in for fuzz targets: a connection without a socket, and a request without a connection.

use std::net::Ipv4Addr;

use bytes::Bytes;
use http_body_util::BodyExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::listener::{Connection, Stop};
use super::*;

const PEER: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 1);

/// Speaks to a connection in pieces of a size, and hangs up or waits for its end. Returns all that it answered.
pub(crate) async fn converse(web: &Arc<Web>, limits: &Limits, pieces: &[&[u8]], hang_up: bool) -> Vec<u8> {
    let (client, server) = tokio::io::duplex(16 * 1024);
    let connection = Connection { web: Arc::clone(web), lane: Lane::Main, limits: limits.clone(), peer: PEER };
    let (mut answers, mut questions) = tokio::io::split(client);
    let ask = async {
        for piece in pieces {
            if questions.write_all(piece).await.is_err() {
                break;
            }
            tokio::task::yield_now().await;
        }
        if hang_up {
            let _ = questions.shutdown().await;
        }
    };
    let listen = async {
        let mut heard = Vec::new();
        let _ = answers.read_to_end(&mut heard).await;
        heard
    };
    tokio::join!(connection.serve(server, Stop::default()), ask, listen).2
}

/// One request to the endpoint, as it comes from a connection.
pub(crate) async fn ask(web: &Web, request: http::Request<Vec<u8>>) -> http::Response<Bytes> {
    let response = web.answer(request.map(Body::from), PEER, Lane::Main).await;
    let (head, body) = response.into_parts();
    let body = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    http::Response::from_parts(head, body)
}

/// Holds the body of an error of `/mcp`: JSON-RPC's own, or one of HTTP with the error object in it.
#[allow(clippy::panic, reason = "a target fails by panicking")]
pub(crate) fn assert_wrapped(body: &[u8]) {
    #[derive(serde::Deserialize)]
    struct Failure<'a> {
        #[serde(borrow)]
        error: Error<'a>,
    }
    #[derive(serde::Deserialize)]
    struct Error<'a> {
        code: i32,
        message: String,
        #[serde(borrow)]
        data: Option<&'a serde_json::value::RawValue>,
    }
    let Ok(Failure { error }) = serde_json::from_slice(body) else { panic!("no error: {body:?}") };
    assert!(error.message.chars().any(char::is_alphanumeric), "{}", error.message);
    if error.code > 0 {
        crate::problem::check::assert_well_formed(error.data.map_or("", serde_json::value::RawValue::get));
    }
}

/// One request, once as it is and once with a header that says nothing here and leaves the message to rmcp, whatever it is. The answers
/// have to be the same.
#[allow(clippy::panic, reason = "a target fails by panicking")]
pub(crate) async fn ask_both_ways(web: &Web, request: http::Request<Vec<u8>>) -> http::Response<Bytes> {
    let mut for_rmcp = request.clone();
    for_rmcp.headers_mut().insert("mcp-param-none", HeaderValue::from_static("none"));
    let (answer, by_rmcp) = (ask(web, request.clone()).await, ask(web, for_rmcp).await);
    let same =
        answer.status() == by_rmcp.status() && answer.headers() == by_rmcp.headers() && answer.body() == by_rmcp.body();
    assert!(same, "two answers to {request:?}:\n{answer:?}\n{by_rmcp:?}");
    answer
}
