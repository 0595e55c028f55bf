//! A backend that fails below HTTP: it resets connections, or does not even take them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_util::task::AbortOnDropHandle;
use url::Url;

/// What it does with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WireFault {
    /// Reads it and resets the connection.
    ResetBeforeHead,
    /// Reads it, answers with a head and resets the connection.
    ResetAfterHead,
    /// Never completes the connection.
    HangAtConnect,
}

pub struct WireBackend {
    address: SocketAddr,
    requests: Arc<AtomicUsize>,
    _task: AbortOnDropHandle<()>,
}

impl WireBackend {
    pub async fn start(fault: WireFault) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
        let listener = socket.listen(if fault == WireFault::HangAtConnect { 1 } else { 64 }).unwrap();
        let (address, requests) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
        let task = match fault {
            WireFault::HangAtConnect => {
                // A full queue of connections that nobody takes: the kernel drops whoever comes next.
                let crowd = [TcpStream::connect(address).await.unwrap(), TcpStream::connect(address).await.unwrap()];
                tokio::spawn(async move {
                    let _held = (listener, crowd);
                    std::future::pending().await
                })
            }
            _ => tokio::spawn(reset_all(listener, fault, Arc::clone(&requests))),
        };
        Self { address, requests, _task: AbortOnDropHandle::new(task) }
    }

    pub fn base_url(&self) -> Url {
        Url::parse(&format!("http://{}", self.address)).unwrap()
    }

    /// How many requests came since this was last asked.
    pub fn take_requests(&self) -> usize {
        self.requests.swap(0, Relaxed)
    }
}

async fn reset_all(listener: TcpListener, fault: WireFault, requests: Arc<AtomicUsize>) {
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        let requests = Arc::clone(&requests);
        tokio::spawn(async move {
            if read_request(&mut stream).await.is_none() {
                return;
            }
            requests.fetch_add(1, Relaxed);
            if fault == WireFault::ResetAfterHead {
                let head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n";
                let _ = stream.write_all(head).await;
                // The head has to be read before the reset throws it away.
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
            let _ = stream.set_zero_linger();
        });
    }
}

/// Reads a head and as much of a body as it announces.
async fn read_request(stream: &mut TcpStream) -> Option<()> {
    let mut text = Vec::new();
    loop {
        if let Some(at) = text.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&text[..at]).to_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
            if text.len() >= at + 4 + length {
                return Some(());
            }
        }
        if stream.read_buf(&mut text).await.ok()? == 0 {
            return None;
        }
    }
}
