//! What the stand-in backend answers: the routes of `api/backend.openapi.yaml`, over data in memory.

use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;
use std::time::SystemTime;

use bytes::Bytes;
use http::header::{ALLOW, AUTHORIZATION, CONTENT_TYPE, LOCATION, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, Uri};
use serde_json::{Map, Value, json};
use url::form_urlencoded;

use super::super::entra::{USER_SCOPE, Verifier};
use super::super::wire::{digest, lock, rfc3339};
use super::data::{self, Dataset, object};

/// How many tickets and idempotency keys are remembered beside the seeded tickets.
const REMEMBERED: usize = 10_000;

type Object = Map<String, Value>;
type Reply = Result<Response<Bytes>, Problem>;

/// The backend without its HTTP server.
pub(super) struct Service {
    verifier: Verifier,
    required_role: Option<String>,
    users: Vec<Object>,
    seeded_tickets: Vec<Object>,
    datasets: Vec<Dataset>,
    created: Mutex<Created>,
    pub(super) healthy: std::sync::atomic::AtomicBool,
}

/// The tickets that clients made.
#[derive(Default)]
struct Created {
    /// Newest first.
    tickets: VecDeque<Object>,
    ever: usize,
    by_key: HashMap<String, Kept>,
    keys: VecDeque<String>,
}

/// What an idempotency key brought about.
struct Kept {
    /// The digest of the request's body.
    body: String,
    ticket: Object,
}

/// An error answer, as RFC 9457 has it.
#[derive(Debug)]
struct Problem {
    status: StatusCode,
    detail: String,
    errors: Vec<(String, String)>,
    header: Option<(http::HeaderName, String)>,
}

impl Problem {
    fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self { status, detail: detail.into(), errors: Vec::new(), header: None }
    }

    fn bad_parameter(name: &str, wanted: &str) -> Self {
        let mut problem = Self::new(StatusCode::BAD_REQUEST, format!("The parameter `{name}` must be {wanted}."));
        problem.errors.push((name.to_owned(), format!("must be {wanted}")));
        problem
    }

    fn unauthorized(detail: &str, error: Option<&str>) -> Self {
        let mut challenge = String::from(r#"Bearer realm="backend""#);
        if let Some(error) = error {
            challenge.push_str(&format!(r#", error="{error}", error_description="{detail}""#));
        }
        let status = if error == Some("insufficient_scope") { StatusCode::FORBIDDEN } else { StatusCode::UNAUTHORIZED };
        Self { header: Some((WWW_AUTHENTICATE, challenge)), ..Self::new(status, detail) }
    }

    fn into_response(self, path: &str) -> Response<Bytes> {
        let mut body = object(json!({
            "type": "about:blank",
            "title": self.status.canonical_reason().unwrap_or("Error"),
            "status": self.status.as_u16(),
            "detail": self.detail,
            "instance": path,
        }));
        if !self.errors.is_empty() {
            let errors = self.errors.into_iter().map(|(name, why)| (name, json!(why))).collect();
            body.insert("errors".into(), Value::Object(errors));
        }
        let mut response = json_response(self.status, &Value::Object(body));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some((name, Ok(value))) = self.header.map(|(name, value)| (name, HeaderValue::try_from(value))) {
            response.headers_mut().insert(name, value);
        }
        response
    }
}

/// The error answer to a fault that names only a status.
pub(super) fn refuse(status: StatusCode, path: &str) -> Response<Bytes> {
    match status {
        StatusCode::UNAUTHORIZED => Problem::unauthorized("The token is not accepted.", Some("invalid_token")),
        _ => Problem::new(status, "This answer was asked for by a fault rule of the stand-in."),
    }
    .into_response(path)
}

impl Service {
    pub(super) fn new(verifier: Verifier, required_role: Option<String>) -> Self {
        Self {
            verifier,
            required_role,
            users: data::users(),
            seeded_tickets: data::tickets(),
            datasets: data::datasets(),
            created: Mutex::default(),
            healthy: true.into(),
        }
    }

    /// Answers one request. `path` is the part of the URI's path below the prefix, `None` when it is not below it.
    pub(super) fn answer(
        &self,
        method: &Method,
        uri: &Uri,
        path: Option<&str>,
        headers: &HeaderMap,
        body: Option<&Bytes>,
    ) -> Response<Bytes> {
        self.reply(method, uri, path, headers, body).unwrap_or_else(|problem| problem.into_response(uri.path()))
    }

    fn reply(
        &self,
        method: &Method,
        uri: &Uri,
        path: Option<&str>,
        headers: &HeaderMap,
        body: Option<&Bytes>,
    ) -> Reply {
        self.authorize(headers)?;
        let no_route = || Problem::new(StatusCode::NOT_FOUND, format!("There is no route `{}`.", uri.path()));
        let path = path.and_then(|path| path.strip_prefix('/')).ok_or_else(no_route)?;
        let segments: Option<Vec<String>> = path.split('/').map(decoded).collect();
        let segments = segments.ok_or_else(|| Problem::new(StatusCode::BAD_REQUEST, "The path is not valid UTF-8."))?;
        let query = Query::parse(uri);
        let (get, post) = (method == Method::GET, method == Method::POST);
        match segments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
            ["health"] if get => Ok(self.health()),
            ["users"] if get => self.list_users(&query),
            ["users", id] if get && !id.is_empty() => self.user(id, &query),
            ["tickets"] if get => self.list_tickets(&query),
            ["tickets"] if post => self.create_ticket(headers, body, uri.path()),
            ["query", dataset] if get && !dataset.is_empty() => self.query(dataset, &query),
            ["tickets"] => Err(wrong_method(method, "GET, POST")),
            ["health" | "users"] => Err(wrong_method(method, "GET")),
            ["users" | "query", name] if !name.is_empty() => Err(wrong_method(method, "GET")),
            _ => Err(no_route()),
        }
    }

    fn authorize(&self, headers: &HeaderMap) -> Result<(), Problem> {
        let mut values = headers.get_all(AUTHORIZATION).iter();
        let (Some(credentials), None) = (values.next(), values.next()) else {
            return Err(Problem::unauthorized("A bearer token is required.", None));
        };
        let token = credentials.to_str().ok().and_then(|text| text.split_once(' '));
        let Some((_, token)) = token.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")) else {
            return Err(Problem::unauthorized("A bearer token is required.", None));
        };
        let claims = self
            .verifier
            .verify(token)
            .map_err(|why| Problem::unauthorized(&format!("{why}."), Some("invalid_token")))?;
        let granted =
            |role| claims.get("roles").and_then(Value::as_array).is_some_and(|all| all.iter().any(|one| one == role));
        // Of a user's token the role is the scope: what the app that shows it may do for users.
        let scopes = claims.get("scp").and_then(Value::as_str).unwrap_or_default();
        let for_a_user = scopes.split(' ').any(|scope| scope == USER_SCOPE);
        match &self.required_role {
            Some(role) if !(granted(role) || for_a_user) => {
                let detail = format!("The app role {role} is not granted to this caller.");
                Err(Problem::unauthorized(&detail, Some("insufficient_scope")))
            }
            _ => Ok(()),
        }
    }

    fn health(&self) -> Response<Bytes> {
        if self.healthy.load(std::sync::atomic::Ordering::Relaxed) {
            json_response(StatusCode::OK, &json!({ "status": "healthy" }))
        } else {
            json_response(StatusCode::SERVICE_UNAVAILABLE, &json!({ "status": "unhealthy" }))
        }
    }

    fn user(&self, id: &str, query: &Query) -> Reply {
        let include_details = match query.get("include_details") {
            None | Some("false") => false,
            Some("true") => true,
            Some(_) => return Err(Problem::bad_parameter("include_details", "`true` or `false`")),
        };
        let user = self.users.iter().find(|user| user.get("id").is_some_and(|known| known == id));
        let mut user =
            user.cloned().ok_or_else(|| Problem::new(StatusCode::NOT_FOUND, format!("There is no user `{id}`.")))?;
        if !include_details {
            user.remove("details");
        }
        Ok(json_response(StatusCode::OK, &Value::Object(user)))
    }

    fn list_users(&self, query: &Query) -> Reply {
        let without_details = |user: &Object| {
            let mut user = user.clone();
            user.remove("details");
            user
        };
        let (skip, limit) = query.page()?;
        let items: Vec<Object> = self.users.iter().skip(skip).take(limit).map(without_details).collect();
        Ok(json_response(StatusCode::OK, &json!({ "total": self.users.len(), "items": items })))
    }

    fn list_tickets(&self, query: &Query) -> Reply {
        let (skip, limit) = query.page()?;
        let status = query.get("status");
        if status.is_some_and(|status| !["open", "in_progress", "closed"].contains(&status)) {
            return Err(Problem::bad_parameter("status", "`open`, `in_progress` or `closed`"));
        }
        let created = lock(&self.created);
        let all = created.tickets.iter().chain(&self.seeded_tickets);
        let wanted = || {
            all.clone().filter(|ticket| status.is_none_or(|status| ticket.get("status").is_some_and(|is| is == status)))
        };
        let items: Vec<&Object> = wanted().skip(skip).take(limit).collect();
        Ok(json_response(StatusCode::OK, &json!({ "total": wanted().count(), "items": items })))
    }

    fn create_ticket(&self, headers: &HeaderMap, body: Option<&Bytes>, path: &str) -> Reply {
        let body = body.ok_or_else(|| Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "The request body is too large."))?;
        let media_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        if media_type.split(';').next().is_none_or(|essence| essence.trim() != "application/json") {
            return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "The body must be `application/json`."));
        }
        let key = match headers.get("idempotency-key").map(|key| key.to_str().unwrap_or_default()) {
            None => None,
            Some(key) if (1..=255).contains(&key.len()) => Some(key.to_owned()),
            Some(_) => return Err(Problem::bad_parameter("Idempotency-Key", "1 to 255 visible characters")),
        };
        let ticket: Value = serde_json::from_slice(body)
            .map_err(|e| Problem::new(StatusCode::BAD_REQUEST, format!("The body is not JSON: {e}.")))?;
        let mut ticket = checked_ticket(ticket)?;

        let mut created = lock(&self.created);
        if let Some(kept) = key.as_ref().and_then(|key| created.by_key.get(key)) {
            if kept.body != digest(body) {
                let detail = "This `Idempotency-Key` was used before, with another body.";
                return Err(Problem::new(StatusCode::CONFLICT, detail));
            }
            return Ok(created_response(path, &kept.ticket));
        }
        created.ever += 1;
        let now = json!(rfc3339(SystemTime::now()));
        ticket.insert("id".into(), json!(format!("T-{}", 1000 + self.seeded_tickets.len() + created.ever)));
        ticket.insert("status".into(), json!("open"));
        ticket.insert("channel".into(), json!("api"));
        ticket.insert("created_at".into(), now.clone());
        ticket.insert("updated_at".into(), now);
        created.tickets.push_front(ticket.clone());
        created.tickets.truncate(REMEMBERED);
        let response = created_response(path, &ticket);
        if let Some(key) = key {
            created.keys.push_back(key.clone());
            created.by_key.insert(key, Kept { body: digest(body), ticket });
            if created.keys.len() > REMEMBERED
                && let Some(oldest) = created.keys.pop_front()
            {
                created.by_key.remove(&oldest);
            }
        }
        Ok(response)
    }

    fn query(&self, name: &str, query: &Query) -> Reply {
        let limit = query.number("limit", 100, 1..=1000)?;
        let dataset = self.datasets.iter().find(|dataset| dataset.name == name).ok_or_else(|| {
            let known: Vec<_> = self.datasets.iter().map(|dataset| dataset.name).collect();
            let detail = format!("There is no dataset `{name}`. The datasets are {}.", known.join(", "));
            Problem::new(StatusCode::NOT_FOUND, detail)
        })?;
        let filters: Object = match query.get("filters") {
            None => Object::new(),
            Some(text) => serde_json::from_str(text).map_err(|_| Problem::bad_parameter("filters", "a JSON object"))?,
        };
        let columns = dataset.rows.first();
        for (field, wanted) in &filters {
            if columns.is_some_and(|row| !row.contains_key(field)) {
                let columns =
                    columns.into_iter().flatten().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
                let problem = Problem::bad_parameter("filters", &format!("about the dataset's columns, {columns}"));
                return Err(Problem {
                    detail: format!("`{name}` has no column `{field}`; it has {columns}."),
                    ..problem
                });
            }
            if wanted.is_object() {
                return Err(Problem::bad_parameter("filters", "made of values and lists of values"));
            }
        }
        let matches =
            |row: &&Object| filters.iter().all(|(field, wanted)| row.get(field).is_some_and(|is| fits(is, wanted)));
        let data: Vec<&Object> = dataset.rows.iter().filter(matches).take(limit).collect();
        Ok(json_response(StatusCode::OK, &json!({ "data": data })))
    }
}

/// A filter's value: equal, or one of a list. Numbers are compared as numbers, everything else exactly.
fn fits(is: &Value, wanted: &Value) -> bool {
    match (is, wanted) {
        (_, Value::Array(any)) => any.iter().any(|one| fits(is, one)),
        (Value::Number(is), Value::Number(wanted)) => is.as_f64() == wanted.as_f64(),
        _ => is == wanted,
    }
}

/// The fields of a new ticket, or everything that is wrong with them.
fn checked_ticket(ticket: Value) -> Result<Object, Problem> {
    let Value::Object(mut ticket) = ticket else {
        return Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "The body must be a JSON object."));
    };
    ticket.entry("priority").or_insert_with(|| json!("medium"));
    let mut errors = Vec::new();
    for (field, bounds, required) in
        [("title", 1..=200, true), ("description", 10..=5000, true), ("assignee_id", 1..=128, false)]
    {
        let fine = match ticket.get(field) {
            None => !required,
            Some(Value::String(text)) => bounds.contains(&text.chars().count()),
            Some(_) => false,
        };
        if !fine {
            let wanted = format!("must be a string of {} to {} characters", bounds.start(), bounds.end());
            errors.push((field.to_owned(), wanted));
        }
    }
    let priorities = ["low", "medium", "high", "critical"];
    if !ticket.get("priority").and_then(Value::as_str).is_some_and(|priority| priorities.contains(&priority)) {
        errors.push(("priority".to_owned(), "must be `low`, `medium`, `high` or `critical`".to_owned()));
    }
    let known = ["title", "description", "priority", "assignee_id"];
    errors.extend(
        ticket.keys().filter(|key| !known.contains(&key.as_str())).map(|key| (key.clone(), "is unknown".into())),
    );
    if errors.is_empty() {
        return Ok(ticket);
    }
    let problem = Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "The ticket cannot be created as it is.");
    Err(Problem { errors, ..problem })
}

fn created_response(path: &str, ticket: &Object) -> Response<Bytes> {
    let mut response = json_response(StatusCode::CREATED, &json!(ticket));
    let id = ticket.get("id").and_then(Value::as_str).unwrap_or_default();
    if let Ok(location) = HeaderValue::try_from(format!("{path}/{id}")) {
        response.headers_mut().insert(LOCATION, location);
    }
    response
}

fn wrong_method(method: &Method, allow: &str) -> Problem {
    let problem = Problem::new(StatusCode::METHOD_NOT_ALLOWED, format!("`{method}` is not possible here."));
    Problem { header: Some((ALLOW, allow.to_owned())), ..problem }
}

fn json_response(status: StatusCode, body: &Value) -> Response<Bytes> {
    let mut response = Response::new(Bytes::from(body.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// The decoded query parameters; of a repeated one the first counts.
struct Query(Vec<(String, String)>);

impl Query {
    fn parse(uri: &Uri) -> Self {
        Self(form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes()).into_owned().collect())
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    fn number(&self, name: &str, default: usize, bounds: std::ops::RangeInclusive<usize>) -> Result<usize, Problem> {
        match self.get(name).map(str::parse) {
            None => Ok(default),
            Some(Ok(number)) if bounds.contains(&number) => Ok(number),
            Some(_) if *bounds.end() == usize::MAX => {
                Err(Problem::bad_parameter(name, &format!("a whole number of {} or more", bounds.start())))
            }
            Some(_) => {
                let wanted = format!("a whole number from {} to {}", bounds.start(), bounds.end());
                Err(Problem::bad_parameter(name, &wanted))
            }
        }
    }

    fn page(&self) -> Result<(usize, usize), Problem> {
        Ok((self.number("skip", 0, 0..=usize::MAX)?, self.number("limit", 10, 1..=100)?))
    }
}

/// A path segment without its percent-encoding.
fn decoded(segment: &str) -> Option<String> {
    let mut bytes = segment.bytes();
    let mut decoded = Vec::with_capacity(segment.len());
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let digits = [bytes.next()?, bytes.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            other => other,
        });
    }
    String::from_utf8(decoded).ok()
}
