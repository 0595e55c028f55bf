//! Who is calling us.
//!
//! Today every caller is anonymous: whoever reaches the port acts with the server's rights, and the network decides who may.
//! The type stands here so that whatever needs an identity takes a [`Caller`], which nobody outside this room can make up.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// The caller of one request. Placed in the request's extensions by the HTTP layer; private, so that it cannot be forged.
#[derive(Debug, Clone)]
pub struct Caller {
    address: IpAddr,
    identity: Option<Arc<Identity>>,
}

impl Caller {
    /// A caller of whom only the address of the connection is known.
    pub fn unauthenticated(peer: SocketAddr) -> Self {
        Self { address: peer.ip().to_canonical(), identity: None }
    }

    /// The other end of the connection: the client, or the nearest proxy.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Who proved to be calling; `None` when nobody was asked to.
    pub fn identity(&self) -> Option<&Identity> {
        self.identity.as_deref()
    }
}

/// Who a checked token says is calling: in Entra a person or an app is the pair of its tenant and its object id, never a name.
#[derive(Debug)]
pub struct Identity {
    tenant: String,
    object: String,
    app: String,
}

impl Identity {
    /// `tid`: the tenant that vouches for the rest.
    pub fn tenant(&self) -> &str {
        &self.tenant
    }

    /// `oid`: the user, or the service principal of an app that calls by itself.
    pub fn object(&self) -> &str {
        &self.object
    }

    /// `azp` or `appid`: the client that the token was issued to.
    pub fn app(&self) -> &str {
        &self.app
    }
}
