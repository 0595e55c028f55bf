//! Which requests have nothing in their heads that rmcp would have to judge.
//!
//! What rmcp checks of a head is checked here for the one case that nearly all requests are, and never more leniently: a head that
//! is not plain is rmcp's to judge. The message in the body is judged by the tools (`tools::PlainCall`).

use http::{HeaderMap, HeaderName, HeaderValue, header};

use super::MCP_PROTOCOL_VERSION;
use crate::tools::Head;

const MCP_METHOD: HeaderName = HeaderName::from_static("mcp-method");
const MCP_NAME: HeaderName = HeaderName::from_static("mcp-name");
/// As nearly all clients write it.
const ACCEPT: &str = "application/json, text/event-stream";
/// How the headers begin in which 2026-07-28 lets gateways see arguments. No tool of ours has any.
const MCP_PARAM: &str = "mcp-param-";

/// The host names that requests may be for; none lets all through.
pub(super) struct Hosts(Option<Vec<String>>);

impl Hosts {
    pub(super) fn new(allowed: Option<&[String]>) -> Self {
        // An empty list says the same to rmcp as none.
        Self(allowed.filter(|hosts| !hosts.is_empty()).map(<[String]>::to_vec))
    }

    /// Whether this is a plain name that may be asked. A name without a port in the list stands for all its ports.
    fn allow(&self, host: &str) -> bool {
        let (name, port) = host.split_once(':').map_or((host, None), |(name, port)| (name, Some(port)));
        let is_name =
            !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-.".contains(&byte));
        let is_port = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok();
        let is_allowed = |allowed: &String| allowed.eq_ignore_ascii_case(host) || allowed.eq_ignore_ascii_case(name);
        is_name && port.is_none_or(is_port) && self.0.as_ref().is_none_or(|hosts| hosts.iter().any(is_allowed))
    }
}

/// What a plain head says of the message. Headers that may stand once are known to stand once, but for the two read here.
pub(super) fn head<'a>(headers: &'a HeaderMap, hosts: &Hosts) -> Option<Head<'a>> {
    let text = |name: &HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let is_plain = text(&header::HOST).is_some_and(|host| hosts.allow(host))
        && !headers.contains_key(header::ORIGIN)
        && text(&header::CONTENT_TYPE).is_some_and(is_json)
        && accepts_both(headers)
        && headers.keys().all(|name| !name.as_str().starts_with(MCP_PARAM));
    if !is_plain {
        return None;
    }
    Some(Head {
        protocol: text(&MCP_PROTOCOL_VERSION)?,
        method: once(headers, &MCP_METHOD),
        name: once(headers, &MCP_NAME),
    })
}

fn is_json(content_type: &str) -> bool {
    let essence = content_type.split_once(';').map_or(content_type, |(essence, _)| essence);
    essence.trim().eq_ignore_ascii_case("application/json")
}

/// Whether the client takes both kinds of answers, and says so without weights and parameters.
fn accepts_both(headers: &HeaderMap) -> bool {
    let Some(accept) = once(headers, &header::ACCEPT) else { return false };
    if accept == ACCEPT {
        return true;
    }
    let names = |kind: &str| accept.split(',').any(|accepted| accepted.trim().eq_ignore_ascii_case(kind));
    !accept.contains([';', '"']) && names("application/json") && names("text/event-stream")
}

fn once<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    let value = values.next().map(HeaderValue::to_str)?.ok()?;
    values.next().is_none().then_some(value)
}
