//! What HTTP says of a request to `/mcp`, before its message is read: for whom it is, from which page, in which form, and which answer
//! its client takes.
//!
//! rmcp would judge some of it otherwise than clients and RFC 9110 mean it, so it gets heads that it has nothing to say against. The
//! message in the body is judged by the tools (`tools::PlainCall`), by `web::message` and by rmcp.

use std::borrow::Cow;
use std::net::Ipv6Addr;

use axum::response::Response;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use tracing::warn;

use super::{MCP_PROTOCOL_VERSION, problem};
use crate::settings::WebSettings;
use crate::tools::Head;

const MCP_METHOD: HeaderName = HeaderName::from_static("mcp-method");
const MCP_NAME: HeaderName = HeaderName::from_static("mcp-name");
/// As nearly all clients write it, and as rmcp wants it.
pub(super) const ACCEPT: HeaderValue = HeaderValue::from_static("application/json, text/event-stream");
/// How the headers begin in which 2026-07-28 lets gateways see arguments. No tool of ours has any.
const MCP_PARAM: &str = "mcp-param-";
/// So much of a header that was refused stands in the log.
const SHOWN_BYTES: usize = 128;

/// Why a request is refused for its head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// `Host` is missing, or no host (RFC 9110 section 7.2).
    MalformedHost,
    /// A host that is not ours: DNS rebinding looks like this.
    ForeignHost,
    /// A page that may not call us.
    ForeignOrigin,
    /// A client that does not take JSON.
    NotAcceptable,
    /// A body that says it is not JSON.
    NotJson,
}

impl Refused {
    pub(super) fn response(self) -> Response {
        match self {
            Self::MalformedHost => problem::malformed_host(),
            Self::ForeignHost => problem::foreign_host(),
            Self::ForeignOrigin => problem::foreign_origin(),
            Self::NotAcceptable => problem::not_acceptable(),
            Self::NotJson => problem::not_json(),
        }
    }
}

/// Which hosts and pages requests may name.
pub(super) struct Allowed {
    /// Names, each with the port that it is allowed with; a name without one is allowed with any. `None` lets all through.
    hosts: Option<Vec<(String, Option<u16>)>>,
    /// With their ports.
    origins: Vec<String>,
}

impl Allowed {
    pub(super) fn new(settings: &WebSettings) -> Self {
        let hosts = settings.allowed_hosts.as_ref().map(|hosts| {
            let hosts = hosts.iter().filter_map(|host| authority(host));
            hosts.map(|(name, port)| (name.into_owned(), port)).collect()
        });
        let origins = settings.allowed_origins.iter().map(|origin| with_port(origin)).collect();
        Self { hosts, origins }
    }

    fn judge_host(&self, headers: &HeaderMap) -> Result<(), Refused> {
        let value = headers.get(header::HOST).ok_or(Refused::MalformedHost)?;
        let (name, port) = value.to_str().ok().and_then(authority).ok_or(Refused::MalformedHost)?;
        let is_allowed = |(allowed, with): &(String, Option<u16>)| {
            allowed.eq_ignore_ascii_case(&name) && with.is_none_or(|with| port == Some(with))
        };
        if self.hosts.as_ref().is_none_or(|hosts| hosts.iter().any(is_allowed)) {
            return Ok(());
        }
        let host = shown(value);
        warn!(host, "refused a request for the `Host` {host}: ALLOWED_HOSTS does not list it");
        Err(Refused::ForeignHost)
    }

    fn judge_origin(&self, headers: &HeaderMap) -> Result<(), Refused> {
        let Some(value) = headers.get(header::ORIGIN) else { return Ok(()) };
        let origin = value.to_str().map(with_port).unwrap_or_default();
        if self.origins.iter().any(|allowed| allowed.eq_ignore_ascii_case(&origin)) {
            return Ok(());
        }
        let origin = shown(value);
        warn!(origin, "refused a request from a page of the `Origin` {origin}: ALLOWED_ORIGINS does not list it");
        Err(Refused::ForeignOrigin)
    }
}

/// A header's value for the log: bounded, and without anything that could break its line or hide in it.
fn shown(value: &HeaderValue) -> String {
    let bytes = value.as_bytes();
    let more = if bytes.len() > SHOWN_BYTES { "…" } else { "" };
    format!("{}{more}", bytes.get(..SHOWN_BYTES).unwrap_or(bytes).escape_ascii())
}

/// What a head says of the message, or why the request is refused. `None` leaves the message to rmcp. Headers that may stand once are
/// known to stand once, but for the ones read here.
pub(super) fn head<'a>(headers: &'a HeaderMap, allowed: &Allowed) -> Result<Option<Head<'a>>, Refused> {
    allowed.judge_host(headers)?;
    allowed.judge_origin(headers)?;
    if !accepts_json(headers) {
        return Err(Refused::NotAcceptable);
    }
    let text = |name: &HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    if !text(&header::CONTENT_TYPE).is_some_and(is_json) {
        return Err(Refused::NotJson);
    }
    if headers.keys().any(|name| name.as_str().starts_with(MCP_PARAM)) {
        return Ok(None);
    }
    let head = |protocol| Head { protocol, method: once(headers, &MCP_METHOD), name: once(headers, &MCP_NAME) };
    Ok(text(&MCP_PROTOCOL_VERSION).map(head))
}

/// `uri-host [ ":" port ]` (RFC 9110 section 7.2): the name without the final dot that says that it is complete, and the port.
/// An IPv6 address is written in one way, whatever way it came in.
fn authority(value: &str) -> Option<(Cow<'_, str>, Option<u16>)> {
    let (name, port) = match value.strip_prefix('[') {
        Some(rest) => {
            let (address, rest) = rest.split_once(']')?;
            let address: Ipv6Addr = address.parse().ok()?;
            let port = if rest.is_empty() { None } else { Some(rest.strip_prefix(':')?) };
            (format!("[{address}]").into(), port)
        }
        None => {
            let (name, port) = value.split_once(':').map_or((value, None), |(name, port)| (name, Some(port)));
            let name = name.strip_suffix('.').unwrap_or(name);
            let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
            (Some(name).filter(|name| !name.is_empty() && name.bytes().all(is_name))?.into(), port)
        }
    };
    match port {
        None | Some("") => Some((name, None)),
        Some(port) => Some((name, Some(port.parse().ok().filter(|_| port.bytes().all(|byte| byte.is_ascii_digit()))?))),
    }
}

/// Browsers leave the default port out of an origin.
pub(super) fn with_port(origin: &str) -> String {
    let authority = origin.split_once("://").map_or(origin, |(_, authority)| authority);
    let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| port.bytes().all(|byte| byte.is_ascii_digit()));
    match origin {
        _ if has_port => origin.to_owned(),
        _ if origin.starts_with("https://") => format!("{origin}:443"),
        _ if origin.starts_with("http://") => format!("{origin}:80"),
        _ => origin.to_owned(),
    }
}

fn is_json(content_type: &str) -> bool {
    let essence = content_type.split_once(';').map_or(content_type, |(essence, _)| essence);
    essence.trim().eq_ignore_ascii_case("application/json")
}

/// Whether the client takes JSON (RFC 9110 section 12.5.1): without the field it takes everything; otherwise the most specific of the
/// ranges that match decides, and a weight of zero excludes. Parameters of a range but its weight are passed over.
fn accepts_json(headers: &HeaderMap) -> bool {
    let values = || headers.get_all(header::ACCEPT).iter();
    if values().all(|value| value == ACCEPT || value.is_empty()) {
        return true;
    }
    let ranges = values().filter_map(|value| value.to_str().ok()).flat_map(|value| split(value, ','));
    let matches = ranges.filter_map(|range| {
        let mut parts = split(range, ';').map(str::trim);
        let specificity = match parts.next()? {
            "*/*" | "*" => 0,
            range if range.eq_ignore_ascii_case("application/*") => 1,
            range if range.eq_ignore_ascii_case("application/json") => 2,
            _ => return None,
        };
        let excludes = |parameter: &str| {
            let (name, weight) = parameter.split_once('=').unwrap_or_default();
            name.trim().eq_ignore_ascii_case("q") && weight.trim().parse::<f32>().is_ok_and(|weight| weight <= 0.0)
        };
        Some((specificity, !parts.any(excludes)))
    });
    matches.max().is_some_and(|(_, admits)| admits)
}

/// Whether the client asks for OpenMetrics by its name, and does not like Prometheus' text format better. A range with another version
/// of either asks for something else.
pub(super) fn prefers_open_metrics(headers: &HeaderMap) -> bool {
    let values = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let (mut open_metrics, mut text) = (0.0, (0, 0.0));
    for range in values.flat_map(|value| split(value, ',')) {
        let mut parts = split(range, ';').map(str::trim);
        let name = parts.next().unwrap_or_default().to_ascii_lowercase();
        let (mut weight, mut version) = (1.0, None);
        for (name, value) in parts.filter_map(|parameter| parameter.split_once('=')) {
            match name.trim() {
                "q" | "Q" => weight = value.trim().parse().ok().filter(|q| (0.0..=1.0_f32).contains(q)).unwrap_or(0.0),
                name if name.eq_ignore_ascii_case("version") => version = Some(value.trim().trim_matches('"')),
                _ => {}
            }
        }
        let specificity = match (&*name, version) {
            ("application/openmetrics-text", None | Some("1.0.0" | "0.0.1")) => {
                open_metrics = f32::max(open_metrics, weight);
                continue;
            }
            ("text/plain", None | Some("0.0.4")) => 3,
            ("text/*", _) => 2,
            ("*/*", _) => 1,
            _ => continue,
        };
        if (specificity, weight) > text {
            text = (specificity, weight);
        }
    }
    open_metrics > 0.0 && open_metrics >= text.1
}

/// Splits a list outside of its quoted strings.
fn split(value: &str, delimiter: char) -> impl Iterator<Item = &str> {
    let (mut is_quoted, mut is_escaped) = (false, false);
    value.split(move |character| {
        match character {
            _ if is_escaped => is_escaped = false,
            '\\' if is_quoted => is_escaped = true,
            '"' => is_quoted = !is_quoted,
            _ => return !is_quoted && character == delimiter,
        }
        false
    })
}

fn once<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    let value = values.next().map(HeaderValue::to_str)?.ok()?;
    values.next().is_none().then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_get_the_port_that_browsers_leave_out() {
        for (origin, expected) in [
            ("https://app.example.com", "https://app.example.com:443"),
            ("http://localhost", "http://localhost:80"),
            ("http://localhost:6274", "http://localhost:6274"),
            ("http://[::1]", "http://[::1]:80"),
            ("http://[::1]:6274", "http://[::1]:6274"),
            ("vscode-webview://id", "vscode-webview://id"),
        ] {
            assert_eq!(with_port(origin), expected);
        }
    }

    #[test]
    fn open_metrics_is_for_those_that_ask_for_it_and_like_nothing_better() {
        for (accept, expected) in [
            (None, false),
            (Some(""), false),
            (Some("*/*"), false),
            (Some("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"), false),
            (Some("application/json"), false),
            (Some("application/openmetrics-text"), true),
            (Some("Application/OpenMetrics-Text; Version=1.0.0; charset=utf-8"), true),
            (Some("application/openmetrics-text;version=2.0.0"), false),
            (Some("application/openmetrics-text;q=0"), false),
            (Some("application/openmetrics-text;q=0.5,text/plain;q=0.9"), false),
            (Some("application/openmetrics-text;q=0.5,*/*"), false),
            (Some("application/openmetrics-text;q=0.5,text/plain;q=0.4,*/*"), true),
            // Prometheus 2 and 3.
            (
                Some(
                    "application/openmetrics-text;version=1.0.0;q=0.75,application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=0.0.4;q=0.25,*/*;q=0.1",
                ),
                true,
            ),
            (
                Some(
                    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
                ),
                true,
            ),
            // The same with `PrometheusText0.0.4` first among its `scrape_protocols`.
            (
                Some(
                    "text/plain;version=0.0.4;q=0.6,application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,*/*;q=0.2",
                ),
                false,
            ),
        ] {
            let value = accept.map(|accept| (header::ACCEPT, HeaderValue::from_static(accept)));
            assert_eq!(prefers_open_metrics(&value.into_iter().collect()), expected, "{accept:?}");
        }
    }

    #[test]
    fn a_header_in_the_log_is_one_short_line() {
        let long = HeaderValue::from_bytes(&[0xe2, 0x80, 0xae].repeat(1_000)).unwrap();
        let shown = shown(&long);
        assert!(shown.starts_with(r"\xe2\x80\xae") && shown.len() < 600, "{shown}");
    }
}
