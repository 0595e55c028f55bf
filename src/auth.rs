//! Who is calling us.
//!
//! Today every caller is anonymous: whoever reaches the port acts with the server's rights, and the network decides who may.
//! The type stands here so that whatever needs an identity takes a [`Caller`], which nobody outside this room can make up.

use std::net::{IpAddr, SocketAddr};

/// The caller of one request. Placed in the request's extensions by the HTTP layer; private, so that it cannot be forged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    address: IpAddr,
}

impl Caller {
    /// A caller of whom only the address of the connection is known.
    pub fn unauthenticated(peer: SocketAddr) -> Self {
        Self { address: peer.ip().to_canonical() }
    }

    /// The other end of the connection: the client, or the nearest proxy.
    pub fn address(&self) -> IpAddr {
        self.address
    }
}
