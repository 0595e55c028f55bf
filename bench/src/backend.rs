//! The backend of the benchmark: one thread, one epoll loop and no runtime, so that it costs less than anything it is measured
//! with. HTTP/1.1, one request after the other on a connection. 401 without a bearer token.
//!
//! The user ids `status-404`, `status-503` and the like are answered with that status.

use std::collections::HashMap;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;

use anyhow::Context as _;
use rustix::event::epoll::EventFlags;
use serde::Deserialize;

use crate::answers;
use crate::poller::Poller;

/// The listener's place in the poller; connections have the numbers below it.
const LISTENER: u64 = u64::MAX;

/// Starts the backend on a thread of its own, which lasts as long as the process.
pub fn start() -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    // The standard library asks for a queue of 128, too short for 512 connections at once.
    rustix::net::listen(&listener, 4_096)?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let poller = Poller::new()?;
    poller.add(&listener, LISTENER)?;
    let backend = Backend { listener, poller, connections: Vec::new(), free: Vec::new(), known: HashMap::new() };
    std::thread::Builder::new().name("backend".to_owned()).spawn(|| backend.serve())?;
    Ok(address)
}

struct Backend {
    listener: TcpListener,
    poller: Poller,
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    /// Answers that are the same each time, by what was asked.
    known: HashMap<String, Arc<[u8]>>,
}

struct Connection {
    stream: TcpStream,
    input: Vec<u8>,
    /// What is being sent, and how much of it was.
    output: Option<(Arc<[u8]>, usize)>,
    /// Whether the poller tells when more can be sent, instead of what has come.
    is_full: bool,
}

impl Backend {
    fn serve(mut self) {
        let mut events = Vec::with_capacity(512);
        let mut buffer = vec![0; 64 * 1024];
        loop {
            if self.poller.wait(&mut events, None).is_err() {
                return;
            }
            for event in events.drain(..) {
                match event.data.u64() {
                    LISTENER => self.accept(),
                    place => self.advance(place as usize, &mut buffer),
                }
            }
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            let _ = (stream.set_nonblocking(true), stream.set_nodelay(true));
            let place = self.free.pop().unwrap_or(self.connections.len());
            if self.poller.add(&stream, place as u64).is_err() {
                continue;
            }
            if place == self.connections.len() {
                self.connections.push(None);
            }
            self.connections[place] = Some(Connection { stream, input: Vec::new(), output: None, is_full: false });
        }
    }

    /// Takes what has come, and answers what is whole.
    fn advance(&mut self, place: usize, buffer: &mut [u8]) {
        let Some(mut connection) = self.connections[place].take() else { return };
        match self.converse(place, &mut connection, buffer) {
            Ok(()) => self.connections[place] = Some(connection),
            Err(_) => self.free.push(place),
        }
    }

    fn converse(&mut self, place: usize, connection: &mut Connection, buffer: &mut [u8]) -> anyhow::Result<()> {
        if connection.output.is_none() {
            match connection.stream.read(buffer) {
                Ok(0) => anyhow::bail!("closed"),
                Ok(read) => connection.input.extend_from_slice(&buffer[..read]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        loop {
            if let Some((answer, sent)) = &mut connection.output {
                while *sent < answer.len() {
                    match connection.stream.write(&answer[*sent..]) {
                        Ok(written) => *sent += written,
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            connection.is_full = true;
                            return Ok(self.poller.wants(&connection.stream, place as u64, EventFlags::OUT)?);
                        }
                        Err(error) => return Err(error.into()),
                    }
                }
                if std::mem::take(&mut connection.is_full) {
                    self.poller.wants(&connection.stream, place as u64, EventFlags::IN)?;
                }
                connection.output = None;
            }
            match self.answer(&mut connection.input)? {
                Some(answer) => connection.output = Some((answer, 0)),
                None => return Ok(()),
            }
        }
    }

    /// Takes one whole request off the input, and gives the answer.
    fn answer(&mut self, input: &mut Vec<u8>) -> anyhow::Result<Option<Arc<[u8]>>> {
        let mut headers = [httparse::EMPTY_HEADER; 32];
        let mut request = httparse::Request::new(&mut headers);
        let httparse::Status::Complete(head) = request.parse(input)? else { return Ok(None) };
        let value = |name: &str| request.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
        let length = match value("content-length") {
            Some(header) => str::from_utf8(header.value)?.parse()?,
            None => 0,
        };
        let Some(body) = input.get(head..head + length) else { return Ok(None) };
        let authorized = value("authorization").is_some_and(|header| header.value.starts_with(b"Bearer "));
        let (method, target) = (request.method.unwrap_or_default(), request.path.unwrap_or_default());
        let answer = match authorized || target == "/v1/traces" {
            true => respond(&mut self.known, method, target, body)?,
            false => http(401, "{}"),
        };
        input.drain(..head + length);
        Ok(Some(answer))
    }
}

fn respond(
    known: &mut HashMap<String, Arc<[u8]>>,
    method: &str,
    target: &str,
    body: &[u8],
) -> anyhow::Result<Arc<[u8]>> {
    #[derive(Deserialize)]
    struct NewTicket<'a> {
        title: &'a str,
        description: &'a str,
        priority: &'a str,
        assignee_id: Option<&'a str>,
    }
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let parameter = |name: &str| {
        let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        pairs.into_iter().find(|(key, _)| *key == name).map(|(_, value)| value)
    };
    if method == "POST" && path == "/tickets" {
        let ticket: NewTicket = serde_json::from_slice(body)?;
        let NewTicket { title, description, priority, assignee_id } = ticket;
        return Ok(http(201, &answers::created_ticket(title, description, priority, assignee_id)));
    }
    if let Some(id) = path.strip_prefix("/users/") {
        return Ok(match id.strip_prefix("status-") {
            Some(status) => http(status.parse()?, r#"{"title":"as you wish"}"#),
            None => http(200, &answers::user(id, true)),
        });
    }
    if let Some(answer) = known.get(target) {
        return Ok(Arc::clone(answer));
    }
    let limit = parameter("limit").map_or(Ok(10), str::parse)?;
    let answer = match path {
        // A collector of traces that takes everything.
        "/v1/traces" => http(200, "{}"),
        "/health" => http(200, r#"{"status":"healthy"}"#),
        "/users" => http(200, &answers::users(limit)),
        "/tickets" => http(200, &answers::tickets(parameter("status").context("no status")?, limit)),
        path if path.starts_with("/query/") => http(200, &answers::rows(limit)),
        _ => http(404, r#"{"title":"Not Found"}"#),
    };
    known.insert(target.to_owned(), Arc::clone(&answer));
    Ok(answer)
}

fn http(status: u16, body: &str) -> Arc<[u8]> {
    let kind = if status < 300 { "application/json" } else { "application/problem+json" };
    let length = body.len();
    let head = format!("HTTP/1.1 {status} -\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n{body}");
    head.into_bytes().into()
}
