//! Who may call, and what they may do: `INBOUND_AUTH` and what belongs to it, and the tools that are switched on at all.
//!
//! Half a configuration is a mistake, never a door left open: what only makes sense with `entra` is refused without it.

use std::net::{IpAddr, SocketAddr};

use url::Url;

use super::reader::Reader;
use super::vars::Vars;
use super::{BackendAuth, is_loopback, parse};

/// The names of the tools, as `ENABLED_TOOLS` may list them; a test holds them to be the server's.
pub(crate) const TOOLS: [&str; 5] = ["create_ticket", "get_user_profile", "list_tickets", "list_users", "query_data"];
/// The one tool that changes something, which `READ_ONLY` switches off; a test holds that too.
pub(crate) const WRITING_TOOLS: [&str; 1] = ["create_ticket"];

/// Whether callers have to prove who they are.
#[derive(Debug, Clone)]
pub enum InboundAuth {
    /// Whoever reaches the port may call: the network decides.
    None,
    /// A token of Entra ID decides.
    Entra(Box<EntraInbound>),
}

/// Which tokens are accepted, and what their scopes and roles are called.
#[derive(Debug, Clone)]
pub struct EntraInbound {
    /// `INBOUND_AUDIENCE`, the client ids: lower case. Each is the audience of version 2 tokens.
    pub client_ids: Vec<String>,
    /// `INBOUND_AUDIENCE`, the App ID URIs, to the letter. Version 1 tokens are accepted only where there is one.
    pub app_id_uris: Vec<String>,
    /// `INBOUND_TENANTS`: GUIDs in lower case, at least one.
    pub tenants: Vec<String>,
    /// `INBOUND_CLIENTS`: client ids in lower case; empty when any client of the tenants may call.
    pub clients: Vec<String>,
    /// `PUBLIC_URL`: the URL that clients use, to the letter.
    pub public_url: Url,
    /// `INBOUND_SCOPE_NAMES`: what the permissions are called as scopes.
    pub scopes: PermissionNames,
    /// `INBOUND_ROLE_NAMES`: what the permissions are called as app roles.
    pub roles: PermissionNames,
}

impl EntraInbound {
    /// The App ID URI by which clients ask for scopes: the one that is the resource too, for Entra takes no other beside it
    /// (AADSTS9010010); else the first; without any, the resource itself.
    pub fn scope_owner(&self) -> &str {
        let resource = self.public_url.as_str();
        let first = self.app_id_uris.first().filter(|_| !self.app_id_uris.iter().any(|uri| uri == resource));
        first.map_or(resource, String::as_str)
    }

    /// Whether Entra will take the resource and the scopes that clients are told for those of one app.
    pub fn scopes_fit_resource(&self) -> bool {
        self.scope_owner() == self.public_url.as_str()
    }
}

/// What a caller may be allowed to do: a closed set. Which tool wants which is the table in `tools.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permission {
    /// See users.
    UsersRead,
    /// See tickets.
    TicketsRead,
    /// Create tickets.
    TicketsWrite,
    /// Query datasets.
    DataRead,
}

impl Permission {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::UsersRead, Self::TicketsRead, Self::TicketsWrite, Self::DataRead];

    /// The name in the settings, in logs and, unless it is given another, in tokens.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UsersRead => "users.read",
            Self::TicketsRead => "tickets.read",
            Self::TicketsWrite => "tickets.write",
            Self::DataRead => "data.read",
        }
    }

    fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|permission| permission.as_str() == name)
    }
}

/// What each permission is called in tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PermissionNames([(Permission, String); 4]);

impl Default for PermissionNames {
    fn default() -> Self {
        Self(Permission::ALL.map(|permission| (permission, permission.as_str().to_owned())))
    }
}

impl PermissionNames {
    /// The permissions with their names.
    pub fn iter(&self) -> impl Iterator<Item = (Permission, &str)> {
        self.0.iter().map(|(permission, name)| (*permission, &**name))
    }

    /// What one is called.
    pub fn of(&self, permission: Permission) -> &str {
        self.iter().find(|(one, _)| *one == permission).map_or(permission.as_str(), |(_, name)| name)
    }

    fn rename(&mut self, permission: Permission, name: String) {
        for (one, current) in &mut self.0 {
            if *one == permission {
                name.clone_into(current);
            }
        }
    }
}

/// Which tools are switched on, whoever calls.
#[derive(Debug, Clone, Default)]
pub struct ToolSettings {
    /// `ENABLED_TOOLS`; `None` means all of them.
    pub enabled: Option<Vec<String>>,
    /// `READ_ONLY`: no tool that changes anything.
    pub read_only: bool,
}

impl ToolSettings {
    /// Whether the tool may be listed and called at all.
    pub fn allows(&self, tool: &str, writes: bool) -> bool {
        !(self.read_only && writes)
            && self.enabled.as_ref().is_none_or(|enabled| enabled.iter().any(|name| name == tool))
    }
}

/// What stands in a token as its audience.
enum Audience {
    ClientId(String),
    AppIdUri(String),
}

/// Reads all of it. `tenant` is `AZURE_TENANT_ID`, where that is good; `None` comes back only where a mistake was noted.
pub(super) fn inbound(
    reader: &mut Reader<'_, impl Vars>,
    tenant: Option<&str>,
    host: IpAddr,
    allowed_hosts: Option<&[String]>,
) -> Option<InboundAuth> {
    let with_tokens = reader.optional("INBOUND_AUTH", inbound_auth, false);
    let audiences = reader.list("INBOUND_AUDIENCE", audience);
    let tenants = reader.list("INBOUND_TENANTS", inbound_tenant);
    let clients = reader.list("INBOUND_CLIENTS", parse::client_id);
    let public_url = reader.some("PUBLIC_URL", public_url);
    let scopes = names(reader, "INBOUND_SCOPE_NAMES");
    let roles = names(reader, "INBOUND_ROLE_NAMES");
    if reader.has_mistake(&["INBOUND_AUTH"]) {
        return None;
    }
    if !with_tokens {
        for name in
            ["INBOUND_AUDIENCE", "INBOUND_TENANTS", "INBOUND_CLIENTS", "INBOUND_SCOPE_NAMES", "INBOUND_ROLE_NAMES"]
        {
            if reader.text(name).is_some() && !reader.has_mistake(&[name]) {
                reader.mistake(
                    name,
                    "is set, but INBOUND_AUTH is not `entra`, so no token would be checked; set INBOUND_AUTH=entra, or \
                     leave the variable out",
                );
            }
        }
        if !host.is_loopback() {
            reader.warn(format!(
                "INBOUND_AUTH is `none` and the server listens on {host}: whoever reaches the port acts with this server's \
                 rights in the backend, and nobody can tell who it was. Set INBOUND_AUTH=entra, or see to it that only a \
                 gateway that checks its callers reaches the port."
            ));
        }
        return Some(InboundAuth::None);
    }
    if audiences.as_ref().is_none_or(Vec::is_empty) && !reader.has_mistake(&["INBOUND_AUDIENCE"]) {
        reader.mistake(
            "INBOUND_AUDIENCE",
            "is required with INBOUND_AUTH=entra, but not set; expected the client id of this server's app registration",
        );
    }
    if public_url.is_none() && !reader.has_mistake(&["PUBLIC_URL"]) {
        reader.mistake(
            "PUBLIC_URL",
            "is required with INBOUND_AUTH=entra, but not set; expected the URL that clients use, such as \
             `https://mcp.example.com/mcp`",
        );
    }
    let tenants = tenants.unwrap_or_else(|| tenant.map(str::to_owned).into_iter().collect());
    if tenants.iter().any(|tenant| !parse::is_guid(tenant)) {
        reader.mistake(
            "INBOUND_TENANTS",
            "is required when AZURE_TENANT_ID is a domain name, for tokens name tenants by their GUID; expected the tenant's GUID",
        );
    }
    let mut inbound = EntraInbound {
        client_ids: Vec::new(),
        app_id_uris: Vec::new(),
        tenants,
        clients: clients.unwrap_or_default(),
        public_url: public_url?,
        scopes,
        roles,
    };
    for audience in audiences? {
        match audience {
            Audience::ClientId(id) => inbound.client_ids.push(id),
            Audience::AppIdUri(uri) => inbound.app_id_uris.push(uri),
        }
    }
    if inbound.client_ids.is_empty() {
        reader.warn(
            "INBOUND_AUDIENCE names no client id, so only version 1 tokens are accepted: the audience of version 2 tokens is \
             always the client id. Add it, and set `requestedAccessTokenVersion` of the app registration to 2.",
        );
    }
    if !inbound.scopes_fit_resource() {
        reader.warn(format!(
            "INBOUND_AUDIENCE names the App ID URI `{}`, and PUBLIC_URL is `{}`: clients ask for the scopes of one and send the other \
             as `resource`, which Entra refuses with AADSTS9010010. Add PUBLIC_URL, to the letter, to the App ID URIs of the app \
             registration, and set INBOUND_AUDIENCE to its client id, beside it no App ID URI but PUBLIC_URL.",
            inbound.scope_owner(),
            inbound.public_url,
        ));
    }
    let public_host = parse::without_final_dot(inbound.public_url.host_str().unwrap_or_default());
    if let Some(hosts) = allowed_hosts
        && !hosts.iter().any(|host| *host == public_host || host.starts_with(&format!("{public_host}:")))
    {
        reader.warn(format!(
            "PUBLIC_URL is on `{public_host}`, which ALLOWED_HOSTS does not list: requests that keep that name as their Host \
             are refused with 403."
        ));
    }
    Some(InboundAuth::Entra(Box::new(inbound)))
}

/// For a demo whose callers need tokens of its own tenant: its API is `client_id`, and its URL that of its listener, unless
/// `PUBLIC_URL` names another.
pub(super) fn of_demo(
    reader: &mut Reader<'_, impl Vars>,
    client_id: &str,
    tenant: &str,
    listener: SocketAddr,
) -> Option<InboundAuth> {
    let url = reader.some("PUBLIC_URL", public_url);
    if listener.port() == 0 && url.is_none() && !reader.has_mistake(&["PORT", "PUBLIC_URL"]) {
        reader
            .mistake("PORT", "`0` lets the system choose, but clients ask for tokens by the server's URL: choose one");
    }
    Some(InboundAuth::Entra(Box::new(EntraInbound {
        client_ids: vec![client_id.to_owned()],
        app_id_uris: Vec::new(),
        tenants: vec![tenant.to_owned()],
        clients: Vec::new(),
        public_url: url.or_else(|| Url::parse(&format!("http://{listener}/mcp")).ok())?,
        scopes: PermissionNames::default(),
        roles: PermissionNames::default(),
    })))
}

/// Entra lets a token be exchanged by the one app that it is for.
pub(super) fn exchangeable(
    reader: &mut Reader<'_, impl Vars>,
    auth: BackendAuth,
    inbound: &InboundAuth,
    client_id: &str,
) {
    let (BackendAuth::OnBehalfOf { .. }, InboundAuth::Entra(inbound)) = (auth, inbound) else { return };
    let is_audience = inbound.client_ids.iter().any(|id| id == client_id);
    // An App ID URI may be that of the same app.
    if !is_audience && inbound.app_id_uris.is_empty() {
        reader.mistake(
            "BACKEND_AUTH",
            "`on-behalf-of` exchanges tokens as the app in AZURE_CLIENT_ID, and INBOUND_AUDIENCE names another: Entra lets a token be \
             exchanged only by the app that it is for; expected the same client id in both",
        );
    }
}

/// Reads `ENABLED_TOOLS` and `READ_ONLY`.
pub(super) fn tools(reader: &mut Reader<'_, impl Vars>) -> ToolSettings {
    let enabled = reader.list("ENABLED_TOOLS", tool);
    let tools = ToolSettings { enabled, read_only: reader.optional("READ_ONLY", parse::boolean, false) };
    let none_left = !TOOLS.iter().any(|tool| tools.allows(tool, WRITING_TOOLS.contains(tool)));
    if none_left && !reader.has_mistake(&["ENABLED_TOOLS", "READ_ONLY"]) {
        reader.mistake("ENABLED_TOOLS", "lists only tools that READ_ONLY switches off; expected at least one other");
    }
    tools
}

fn names(reader: &mut Reader<'_, impl Vars>, variable: &str) -> PermissionNames {
    let mut names = PermissionNames::default();
    for (permission, name) in reader.list(variable, permission_name).unwrap_or_default() {
        names.rename(permission, name);
    }
    names
}

fn inbound_auth(value: &str) -> Result<bool, String> {
    match value.to_ascii_lowercase().as_str() {
        "none" => Ok(false),
        "entra" => Ok(true),
        _ => Err("is no kind of inbound authorization; expected none or entra".to_owned()),
    }
}

fn audience(value: &str) -> Result<Audience, String> {
    if let Ok(id) = parse::client_id(value) {
        return Ok(Audience::ClientId(id));
    }
    let is_uri = value.split_once("://").is_some_and(|(scheme, rest)| {
        !rest.is_empty()
            && !scheme.is_empty()
            && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
    });
    // It becomes a part of the scopes in the challenge, between quotation marks.
    if is_uri && value.bytes().all(|byte| byte.is_ascii_graphic() && !b"\"\\".contains(&byte)) {
        return Ok(Audience::AppIdUri(value.to_owned()));
    }
    Err("is no audience; expected the API's client id (a GUID), or an App ID URI such as `https://mcp.example.com/mcp`"
        .to_owned())
}

fn inbound_tenant(value: &str) -> Result<String, String> {
    parse::client_id(value)
        .map_err(|_| "is not a tenant's GUID; tokens name tenants by their GUID, never by a domain".to_owned())
}

/// To the letter what clients send as `resource`, for Entra compares it so.
fn public_url(value: &str) -> Result<Url, String> {
    let url = parse::absolute_url(value, &["https", "http"])?;
    if url.scheme() == "http" && !is_loopback(&url) {
        return Err(
            "is plain http: tokens would cross the network unencrypted; expected an https URL (http for loopback only)"
                .to_owned(),
        );
    }
    if url.path() == "/" || url.path().ends_with('/') {
        return Err(
            "has no path, or one that ends in a slash, which clients write in two ways; expected a URL with a \
                    path, such as `https://mcp.example.com/mcp`"
                .to_owned(),
        );
    }
    if url.as_str() != value {
        return Err(
            "is not in its normal form; expected the host in lower case, no default port, and nothing to decode"
                .to_owned(),
        );
    }
    // It becomes a route, and stands between quotation marks in the challenge.
    if !url.path().bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte)) {
        return Err(
            "has a path with unusual characters; expected letters, digits, `-`, `.`, `_`, `~` and `/`".to_owned()
        );
    }
    Ok(url)
}

fn permission_name(value: &str) -> Result<(Permission, String), String> {
    let refused = || {
        let known = Permission::ALL.map(Permission::as_str).join(", ");
        format!("is not `permission=name`; expected one of {known}, `=`, and what it is called in tokens")
    };
    let (permission, name) = value.split_once('=').ok_or_else(refused)?;
    let permission = Permission::named(permission.trim()).ok_or_else(refused)?;
    let name = name.trim();
    // What Entra allows in the value of a scope, less what is none in a scope token of OAuth.
    let legal = (1..=120).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-:/".contains(&byte));
    if legal { Ok((permission, name.to_owned())) } else { Err(refused()) }
}

fn tool(value: &str) -> Result<String, String> {
    if TOOLS.contains(&value) {
        return Ok(value.to_owned());
    }
    Err(format!("is no tool; expected some of {}", TOOLS.join(", ")))
}
