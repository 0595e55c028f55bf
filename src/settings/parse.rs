//! From text to types, one function per kind of value.
//!
//! Each gets a trimmed text that is not empty. Its error says what is wrong and what would be accepted, and never repeats
//! the value: whether that may be shown is not for a parser to decide.

use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;
use tracing_subscriber::filter::Targets;
use url::Url;
use uuid::Uuid;

use super::without_trailing_slash;

/// A day: longer is a slip of the keyboard.
const MOST_SECONDS: f64 = 86_400.0;

pub(super) fn tenant_id(value: &str) -> Result<String, String> {
    let name = value.to_ascii_lowercase();
    if ["common", "organizations", "consumers"].contains(&name.as_str()) {
        return Err("is no single tenant; expected the tenant's GUID or domain name".to_owned());
    }
    let is_domain = || name.contains('.') && is_host_name(&name) && !name.contains('_') && !is_credential(value);
    if is_guid(&name) || is_domain() {
        return Ok(name);
    }
    Err("is not a tenant; expected a GUID, or a domain name such as contoso.onmicrosoft.com".to_owned())
}

pub(super) fn client_id(value: &str) -> Result<String, String> {
    if is_guid(value) {
        return Ok(value.to_ascii_lowercase());
    }
    Err("is not a client id; expected a GUID".to_owned())
}

pub(super) fn authority(value: &str) -> Result<Url, String> {
    let url = absolute_url(value, &["https"])?;
    if url.path() != "/" {
        return Err("has a path, which would be ignored; expected `https://host`".to_owned());
    }
    Ok(url)
}

/// A token in place of the path to it must not end up in a message about a missing file.
pub(super) fn token_file(value: &str) -> Result<PathBuf, String> {
    if is_credential(value) || value.contains(char::is_control) {
        return Err("is not a path; expected the path of the file that holds the federated token".to_owned());
    }
    Ok(value.into())
}

/// The characters are those of an OAuth scope token (RFC 6749, section 3.3).
pub(super) fn scope(value: &str) -> Result<String, String> {
    let resource = value.strip_suffix("/.default").unwrap_or_default();
    let legal = |char: char| char.is_ascii_graphic() && !['"', '\\'].contains(&char);
    if resource.is_empty() || !resource.chars().all(legal) || is_credential(resource) {
        return Err(
            "is not a scope; expected `<resource>/.default` such as `api://<backend-app-id>/.default`".to_owned()
        );
    }
    Ok(value.to_owned())
}

pub(super) fn base_url(value: &str) -> Result<Url, String> {
    absolute_url(value, &["http", "https"]).map(without_trailing_slash)
}

pub(super) fn boolean(value: &str) -> Result<bool, String> {
    match value.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" => Ok(true),
        "false" | "0" | "no" => Ok(false),
        _ => Err("is neither true nor false; expected true, false, 1, 0, yes or no".to_owned()),
    }
}

pub(super) fn seconds(value: &str) -> Result<Duration, String> {
    seconds_or_zero(value)
        .ok()
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| format!("is not a number of seconds above 0 and up to {MOST_SECONDS}"))
}

pub(super) fn seconds_or_zero(value: &str) -> Result<Duration, String> {
    value
        .parse()
        .ok()
        .filter(|seconds| (0.0..=MOST_SECONDS).contains(seconds))
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| format!("is not a number of seconds from 0 to {MOST_SECONDS}"))
}

pub(super) fn bytes(value: &str) -> Result<usize, String> {
    whole_number(value, 1 << 10..=64 << 20)
}

pub(super) fn buffered_bytes(value: &str) -> Result<usize, String> {
    whole_number(value, 1 << 20..=64 << 30)
}

/// How many of something may exist at the same time.
pub(super) fn count(value: &str) -> Result<usize, String> {
    whole_number(value, 1..=65_536)
}

pub(super) fn attempts(value: &str) -> Result<u32, String> {
    whole_number(value, 1..=10)
}

pub(super) fn percent(value: &str) -> Result<u32, String> {
    whole_number(value, 0..=100)
}

pub(super) fn per_second(value: &str) -> Result<u32, String> {
    whole_number(value, 0..=10_000)
}

/// Requests a second; one in a quarter of an hour is the least that is one.
pub(super) fn rate(value: &str) -> Result<f64, String> {
    let rate = value.parse().ok().filter(|rate| *rate == 0.0 || (0.001..=10_000.0).contains(rate));
    rate.ok_or_else(|| "is neither 0 nor a number from 0.001 to 10000".to_owned())
}

/// Requests that may come at once.
pub(super) fn burst(value: &str) -> Result<u32, String> {
    whole_number(value, 1..=65_536)
}

/// Requests of one caller at the same time.
pub(super) fn in_flight(value: &str) -> Result<u32, String> {
    whole_number(value, 0..=65_536)
}

pub(super) fn milliseconds(value: &str) -> Result<Duration, String> {
    whole_number(value, 1..=86_400_000).map(Duration::from_millis)
}

pub(super) fn share(value: &str) -> Result<f64, String> {
    value
        .parse()
        .ok()
        .filter(|share| (0.0..=1.0).contains(share))
        .ok_or_else(|| "is not a number from 0 to 1".to_owned())
}

pub(super) fn otlp_protocol(value: &str) -> Result<(), String> {
    match value {
        "http/protobuf" => Ok(()),
        _ => {
            Err("is not spoken by this server; expected `http/protobuf`, and the collector's port for it, usually 4318"
                .to_owned())
        }
    }
}

/// The standard's names; the second half of each says what happens to a trace that begins here.
pub(super) fn sampler(value: &str) -> Result<(bool, &'static str), String> {
    let (parent_based, root) = match value.strip_prefix("parentbased_") {
        Some(root) => (true, root),
        None => (false, value),
    };
    let root = ["always_on", "always_off", "traceidratio"].into_iter().find(|known| *known == root);
    root.map(|root| (parent_based, root)).ok_or_else(|| {
        "is no sampler; expected always_on, always_off or traceidratio, each with or without `parentbased_` before it"
            .to_owned()
    })
}

/// One `name=value` of a list, in the form of W3C Baggage: the value is percent-encoded.
pub(super) fn name_and_value(value: &str) -> Result<(String, String), String> {
    let refused = || "is not `name=value` with a percent-encoded value".to_owned();
    let (name, value) = value.split_once('=').ok_or_else(refused)?;
    let (name, value) = (name.trim(), value.trim());
    let decoded = percent_encoding::percent_decode_str(value).decode_utf8().map_err(|_| refused())?;
    if name.is_empty() || decoded.contains(char::is_control) {
        return Err(refused());
    }
    Ok((name.to_owned(), decoded.into_owned()))
}

/// The same as a header.
pub(super) fn header(value: &str) -> Result<(http::HeaderName, http::HeaderValue), String> {
    let (name, value) = name_and_value(value)?;
    let refused = || "is not `name=value` with the name and the value of a header".to_owned();
    let name = http::HeaderName::try_from(name).map_err(|_| refused())?;
    let mut value = http::HeaderValue::try_from(value).map_err(|_| refused())?;
    value.set_sensitive(true);
    Ok((name, value))
}

/// A file that is written: its folder has to be there.
pub(super) fn written_file(value: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(value);
    if value.contains(char::is_control) || path.file_name().is_none() {
        return Err("is not the path of a file".to_owned());
    }
    Ok(path)
}

pub(super) fn host(value: &str) -> Result<IpAddr, String> {
    if value.eq_ignore_ascii_case("localhost") {
        return Ok(Ipv4Addr::LOCALHOST.into());
    }
    value.parse().map_err(|_| "is not an address to bind; expected an IP address or `localhost`".to_owned())
}

pub(super) fn port(value: &str) -> Result<u16, String> {
    value.parse().map_err(|_| "is not a port number from 0 to 65535".to_owned())
}

/// The contract's words become tracing's. Any other bare word would be taken for a module path and silence all the rest,
/// so it is refused.
pub(super) fn log_filter(value: &str) -> Result<String, String> {
    let refused = || {
        "is no log level; expected DEBUG, INFO, WARNING, ERROR or CRITICAL, or a tracing filter directive \
         such as `info,mcp_server=debug`"
            .to_owned()
    };
    let directives: Option<Vec<&str>> = value.split(',').map(str::trim).map(directive).collect();
    let filter = directives.ok_or_else(refused)?.join(",");
    filter.parse::<Targets>().map_err(|_| refused())?;
    Ok(filter)
}

fn directive(text: &str) -> Option<&str> {
    match text.to_ascii_lowercase().as_str() {
        "trace" => Some("trace"),
        "debug" => Some("debug"),
        "info" => Some("info"),
        "warn" | "warning" => Some("warn"),
        "error" | "critical" => Some("error"),
        "off" => Some("off"),
        // Directives about spans would need what every span says of itself, and ours say a trace id.
        _ => text
            .split_once('=')
            .filter(|(target, level)| !target.is_empty() && !target.contains('[') && !level.is_empty())
            .map(|_| text),
    }
}

/// `*` is let through: whether it stands alone is seen by the caller only.
pub(super) fn allowed_host(value: &str) -> Result<String, String> {
    if value == "*" {
        return Ok(value.to_owned());
    }
    let value = without_final_dot(&value.to_ascii_lowercase());
    host_and_port(&value).ok_or_else(|| {
        "is not a host; expected `host`, `host:port`, `[IPv6]` or `[IPv6]:port`, or `*` alone".to_owned()
    })
}

/// `host.` and `host.:port` without the dot, which only says that the name is complete.
pub(super) fn without_final_dot(value: &str) -> String {
    match value.split_once(".:") {
        Some((name, port)) => format!("{name}:{port}"),
        None => value.strip_suffix('.').unwrap_or(value).to_owned(),
    }
}

pub(super) fn allowed_origin(value: &str) -> Result<String, String> {
    if value == "*" {
        return Err("would let any web site that a user visits call the tools; expected a list of origins".to_owned());
    }
    if value.eq_ignore_ascii_case("null") {
        return Err("is what every local file and sandboxed frame sends, so it identifies nobody; expected an origin \
                    such as `https://app.example.com`"
            .to_owned());
    }
    let refused =
        || "is not an origin; expected `scheme://host` or `scheme://host:port`, and nothing after it".to_owned();
    let value = value.to_ascii_lowercase();
    let (scheme, host) = value.split_once("://").ok_or_else(refused)?;
    let host = host.strip_suffix('/').unwrap_or(host);
    if matches!(scheme, "http" | "https") {
        let url = absolute_url(&value, &["http", "https"]).map_err(|_| refused())?;
        let has_host = url.host_str().is_some_and(|host| host_and_port(host).is_some());
        return if has_host && url.path() == "/" { Ok(url.origin().ascii_serialization()) } else { Err(refused()) };
    }
    let is_scheme = scheme.starts_with(|char: char| char.is_ascii_alphabetic())
        && scheme.chars().all(|char| char.is_ascii_alphanumeric() || "+-.".contains(char));
    let host = host_and_port(host).filter(|_| is_scheme).ok_or_else(refused)?;
    Ok(format!("{scheme}://{host}"))
}

pub(super) fn backend_auth(value: &str) -> Result<bool, String> {
    match value.to_ascii_lowercase().as_str() {
        "server" => Ok(false),
        "on-behalf-of" => Ok(true),
        _ => Err("is no way to sign in to the backend; expected `server` or `on-behalf-of`".to_owned()),
    }
}

/// A network, or one address. A whole address family would let every client choose its own address.
pub(super) fn network(value: &str) -> Result<IpNet, String> {
    let refused = || "is not a network; expected an IP address or a CIDR such as `10.0.0.0/8`".to_owned();
    let network = match value.parse::<IpNet>() {
        Ok(network) => network.trunc(),
        Err(_) => value.parse::<IpAddr>().map_err(|_| refused())?.into(),
    };
    if network.prefix_len() == 0 {
        return Err("would believe every client; expected the networks of the proxies alone".to_owned());
    }
    Ok(network)
}

/// `Url` follows the browsers and forgives a lot: blanks, backslashes, missing or surplus slashes, an `@` with nothing
/// before it. A setting that needs such mercy is a mistake.
pub(super) fn absolute_url(value: &str, schemes: &[&str]) -> Result<Url, String> {
    let accepted = schemes.join(" or ");
    let refused = || format!("is not an absolute {accepted} URL");
    let (scheme, rest) = value.split_once("://").ok_or_else(refused)?;
    if !schemes.iter().any(|known| known.eq_ignore_ascii_case(scheme)) {
        return Err(refused());
    }
    if rest.starts_with('/') || rest.chars().any(|char| char.is_whitespace() || char.is_control() || char == '\\') {
        return Err(refused());
    }
    if rest.split(['/', '?', '#']).next().is_some_and(|authority| authority.contains('@')) {
        return Err(format!("has user info in it; expected an {accepted} URL without credentials"));
    }
    if rest.contains(['?', '#']) {
        return Err(format!("has a query or a fragment; expected an {accepted} URL without"));
    }
    Url::parse(value).ok().filter(Url::has_host).ok_or_else(refused)
}

/// Whether this is a credential and nothing else: client secrets of Entra have `Q~` in them and are 37 to 40 characters long; a JWT
/// opens with `{"`, encoded.
pub(super) fn is_credential(value: &str) -> bool {
    let has_entras_mark = value.split(['/', ':']).any(|part| part.len() >= 32 && part.contains("Q~"));
    has_entras_mark || (value.starts_with("eyJ") && value.len() >= 20)
}

/// Whether this may be a credential, so that it is better not shown: a run of letters of both cases and digits as names, addresses
/// and paths hardly ever have.
pub(super) fn may_be_credential(value: &str) -> bool {
    let is_path = value.starts_with('/') || value.contains("://");
    let belongs = |char: char| char.is_ascii_alphanumeric() || "+_-.~=".contains(char) || (char == '/' && !is_path);
    let is_random = |run: &str| {
        let has = |kind: fn(&u8) -> bool| run.as_bytes().iter().any(kind);
        run.len() >= 20
            && !run.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-') // a GUID, right or wrong
            && has(u8::is_ascii_digit)
            && (run.contains('~') || (has(u8::is_ascii_lowercase) && has(u8::is_ascii_uppercase)))
    };
    is_credential(value) || value.split(|char| !belongs(char)).any(is_random)
}

/// Only the form with hyphens: it is the one that Entra writes.
pub(super) fn is_guid(value: &str) -> bool {
    value.len() == 36 && Uuid::try_parse(value).is_ok()
}

/// Lower case in, canonical out: `[::1]:8000` for any spelling of that address. A bare IPv6 address gets its brackets.
fn host_and_port(value: &str) -> Option<String> {
    if let Ok(address) = value.parse::<Ipv6Addr>() {
        return Some(format!("[{address}]"));
    }
    let (host, port) = match value.strip_prefix('[') {
        Some(rest) => {
            let (address, rest) = rest.split_once(']')?;
            let port = if rest.is_empty() { None } else { Some(rest.strip_prefix(':')?) };
            (format!("[{}]", address.parse::<Ipv6Addr>().ok()?), port)
        }
        None => {
            let (host, port) = value.split_once(':').map_or((value, None), |(host, port)| (host, Some(port)));
            if !is_host_name(host) && host.parse::<Ipv4Addr>().is_err() {
                return None;
            }
            (host.to_owned(), port)
        }
    };
    match port {
        None => Some(host),
        Some(port) => port.parse::<u16>().ok().filter(|&port| port > 0).map(|port| format!("{host}:{port}")),
    }
}

/// Underscores are no host name by the book, but Docker's service names have them. A last label of digits is an IPv4
/// address gone wrong.
fn is_host_name(value: &str) -> bool {
    let legal = |char: char| char.is_ascii_alphanumeric() || char == '-' || char == '_';
    let is_label = |label: &str| {
        (1..=63).contains(&label.len()) && label.chars().all(legal) && !label.starts_with('-') && !label.ends_with('-')
    };
    let last = value.rsplit('.').next().unwrap_or_default();
    value.len() <= 253 && value.split('.').all(is_label) && !last.chars().all(|char| char.is_ascii_digit())
}

fn whole_number<N: FromStr + PartialOrd + Display>(value: &str, range: RangeInclusive<N>) -> Result<N, String> {
    value
        .parse()
        .ok()
        .filter(|number| range.contains(number))
        .ok_or_else(|| format!("is not a whole number from {} to {}", range.start(), range.end()))
}
