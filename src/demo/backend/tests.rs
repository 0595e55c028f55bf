use std::collections::BTreeSet;
use std::time::Duration;

use http::header::{ALLOW, CONTENT_TYPE, LOCATION, WWW_AUTHENTICATE};
use serde_json::{Value, json};

use super::super::entra::{EntraOptions, RESOURCE_APP_ID, StandInEntra};
use super::*;

/// Both stand-ins and a client that brings a good token.
struct Setup {
    entra: StandInEntra,
    backend: StandInBackend,
    client: reqwest::Client,
}

/// An answer that is still to be looked at.
struct Received {
    status: u16,
    headers: HeaderMap,
    body: Value,
}

impl Setup {
    async fn start(path_prefix: &str) -> Self {
        let entra = StandInEntra::start(EntraOptions::default()).await.unwrap();
        let options = BackendOptions { path_prefix: path_prefix.to_owned(), ..BackendOptions::new(entra.verifier()) };
        let backend = StandInBackend::start(options).await.unwrap();
        let no_redirects = reqwest::redirect::Policy::none();
        let client = reqwest::Client::builder().no_proxy().redirect(no_redirects).timeout(Duration::from_secs(20));
        Self { entra, backend, client: client.build().unwrap() }
    }

    fn request(&self, method: &str, target: &str) -> reqwest::RequestBuilder {
        let url = format!("{}{target}", self.backend.base_url().as_str().trim_end_matches('/'));
        self.client.request(method.parse().unwrap(), url)
    }

    async fn ask(&self, request: reqwest::RequestBuilder) -> Received {
        let response = request.bearer_auth(self.entra.access_token(&json!({}))).send().await.unwrap();
        received(response).await
    }

    async fn get(&self, target: &str) -> Received {
        self.ask(self.request("GET", target)).await
    }

    async fn post(&self, ticket: &Value, key: Option<&str>) -> Received {
        let mut request = self.request("POST", "/tickets").header(CONTENT_TYPE, "application/json");
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        self.ask(request.body(ticket.to_string())).await
    }
}

async fn received(response: reqwest::Response) -> Received {
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let body = response.bytes().await.unwrap();
    Received { status, headers, body: serde_json::from_slice(&body).unwrap() }
}

fn filters(filters: &Value) -> String {
    url::form_urlencoded::Serializer::new(String::new()).append_pair("filters", &filters.to_string()).finish()
}

#[tokio::test]
async fn users_are_listed_and_found() {
    let setup = Setup::start("/api/v1").await;
    let page = setup.get("/users?skip=248&limit=10").await.body;
    assert_eq!((&page["total"], page["items"].as_array().unwrap().len()), (&json!(250), 2));
    assert_eq!(setup.get("/users").await.body["items"].as_array().unwrap().len(), 10);

    let user = setup.get("/users/42").await.body;
    assert_eq!(user["id"], "42");
    assert!(user.get("details").is_none());
    let detailed = setup.get("/users/42?include_details=true").await.body;
    assert_eq!(detailed["email"], user["email"]);
    assert!(detailed["details"]["department"].is_string());
    assert_eq!(setup.get("/users/%34%32").await.body["id"], "42");
    assert_eq!(setup.get("/users/4%2F2").await.status, 404);
    assert_eq!(setup.backend.requests().last().unwrap().target, "/api/v1/users/4%2F2");
}

#[tokio::test]
async fn a_created_ticket_is_there_and_only_once_per_key() {
    let setup = Setup::start("").await;
    let ticket = json!({ "title": "Ünïcödé", "description": "ten letters", "assignee_id": "42" });
    let created = setup.post(&ticket, Some("key-1")).await;
    assert_eq!(
        (created.status, &created.body["status"], &created.body["priority"]),
        (201, &json!("open"), &json!("medium"))
    );
    assert_eq!(created.headers[LOCATION], format!("/tickets/{}", created.body["id"].as_str().unwrap()));
    let again = setup.post(&ticket, Some("key-1")).await;
    assert_eq!((again.status, &again.body), (201, &created.body));
    let other = json!({ "title": "other", "description": "ten letters" });
    assert_eq!(setup.post(&other, Some("key-1")).await.status, 409);
    assert_ne!(setup.post(&ticket, None).await.body["id"], created.body["id"]);

    let newest = setup.get("/tickets?status=open&limit=2").await.body;
    assert_eq!(newest["items"][1], created.body);
    assert_eq!(setup.get("/tickets").await.body["total"], 122);
    let times = setup.get("/tickets?limit=100").await.body;
    let times: Vec<_> =
        times["items"].as_array().unwrap().iter().map(|ticket| ticket["created_at"].to_string()).collect();
    assert!(times.is_sorted_by(|newer, older| newer >= older));
    let states = ["open", "in_progress", "closed"];
    let counts = states.map(|status| format!("/tickets?status={status}"));
    let mut total = 0;
    for target in &counts {
        let count = setup.get(target).await.body["total"].as_u64().unwrap();
        assert!(count > 10, "{target}: {count}");
        total += count;
    }
    assert_eq!(total, 122);
}

#[tokio::test]
async fn filters_really_filter() {
    let setup = Setup::start("").await;
    let rows = async |dataset: &str, wanted: Value| {
        let answer = setup.get(&format!("/query/{dataset}?limit=1000&{}", filters(&wanted))).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.body["data"].as_array().unwrap().clone()
    };
    let emea = rows("sales", json!({ "region": "EMEA", "returned": false })).await;
    assert!((100..1000).contains(&emea.len()));
    assert!(emea.iter().all(|row| row["region"] == "EMEA" && row["returned"] == false));
    let severe = rows("incidents", json!({ "severity": [1, 2.0], "minutes_to_resolve": null })).await;
    assert!(!severe.is_empty());
    assert!(severe.iter().all(|row| row["severity"].as_u64().unwrap() <= 2 && row["minutes_to_resolve"].is_null()));
    assert_eq!(rows("inventory", json!({ "sku": "SKU-00007" })).await.len(), 1);
    assert!(rows("inventory", json!({ "warehouse": "nowhere" })).await.is_empty());
    assert_eq!(setup.get("/query/sales").await.body["data"].as_array().unwrap().len(), 100);
    let unknown = setup.get(&format!("/query/sales?{}", filters(&json!({ "colour": "red" })))).await;
    assert!(unknown.body["detail"].as_str().unwrap().contains("it has order_id"), "{}", unknown.body);
}

#[tokio::test]
async fn only_good_tokens_enter() {
    let setup = Setup::start("").await;
    let token = |changes: Value| Some(format!("Bearer {}", setup.entra.access_token(&changes)));
    for (credentials, status, challenge) in [
        (None, 401, r#"Bearer realm="backend""#),
        (Some("Basic eDp5".to_owned()), 401, r#"Bearer realm="backend""#),
        (Some("Bearer x.y.z".to_owned()), 401, "malformed"),
        (token(json!({ "aud": "api://other" })), 401, "another audience"),
        (token(json!({ "exp": 1 })), 401, "expired"),
        (token(json!({ "roles": null })), 403, "insufficient_scope"),
        (token(json!({ "roles": ["Other"] })), 403, "insufficient_scope"),
        (token(json!({ "aud": RESOURCE_APP_ID })), 200, ""),
    ] {
        let mut request = setup.request("GET", "/health");
        if let Some(credentials) = &credentials {
            request = request.header(AUTHORIZATION, credentials);
        }
        let answer = received(request.send().await.unwrap()).await;
        assert_eq!(answer.status, status, "{credentials:?}: {}", answer.body);
        let challenged = answer.headers.get(WWW_AUTHENTICATE).map_or("", |value| value.to_str().unwrap());
        assert!(challenged.contains(challenge), "{challenged}");
    }
    let log = setup.backend.requests();
    assert_eq!(log[1].authorization_raw.as_deref(), Some("Basic eDp5"));
    assert!(log[1].header("authorization").unwrap().starts_with("sha256:"));
}

#[tokio::test]
async fn faults_break_what_they_say() {
    let setup = Setup::start("").await;
    let backend = &setup.backend;
    let token = setup.entra.access_token(&json!({}));
    let send = || setup.request("GET", "/users/42").bearer_auth(&token).send();

    backend.set_fault([FaultRule::status(503).header("retry-after", "7").on("GET /users").times(1)]);
    assert_eq!(setup.get("/health").await.status, 200);
    let answer = setup.get("/users/42").await;
    assert_eq!((answer.status, &answer.headers["retry-after"]), (503, &"7".parse().unwrap()));
    assert_eq!(setup.get("/users/42").await.status, 200);

    backend.set_fault([FaultRule::status(401).times(2)]);
    assert_eq!([setup.get("/users").await.status, setup.get("/users").await.status], [401, 401]);
    assert_eq!(setup.get("/users").await.status, 200);

    backend.set_fault([FaultRule::close_before_head()]);
    assert!(send().await.is_err());
    backend.set_fault([FaultRule::close_mid_body()]);
    let response = send().await.unwrap();
    assert!(response.content_length().unwrap() > 50);
    assert!(response.bytes().await.is_err());
    backend.set_fault([FaultRule::redirect("http://example.com/")]);
    assert_eq!(send().await.unwrap().headers()[LOCATION], "http://example.com/");
    backend.set_fault([FaultRule::broken_json()]);
    assert!(serde_json::from_slice::<Value>(&send().await.unwrap().bytes().await.unwrap()).is_err());
    backend.set_fault([FaultRule::wrong_types()]);
    assert_eq!(setup.get("/users/42").await.body["id"], 7);
    backend.set_fault([FaultRule::huge_body(3_000_000)]);
    let huge = send().await.unwrap();
    let length = huge.content_length().unwrap();
    let huge = huge.bytes().await.unwrap();
    assert_eq!(huge.len() as u64, length);
    assert!(serde_json::from_slice::<Value>(&huge).is_ok());

    backend.set_fault([FaultRule::delay_mid_body(Duration::from_millis(80))]);
    let began = std::time::Instant::now();
    assert_eq!(setup.get("/users/42").await.body["id"], "42");
    assert!(began.elapsed() >= Duration::from_millis(80));
    backend.set_fault([FaultRule::delay(Duration::from_millis(80))]);
    let began = std::time::Instant::now();
    assert_eq!(setup.get("/users/42").await.body["id"], "42");
    assert!(began.elapsed() >= Duration::from_millis(80));

    backend.set_fault([FaultRule::endless_body()]);
    let mut endless = send().await.unwrap();
    for _ in 0..100 {
        endless.chunk().await.unwrap().unwrap();
    }
    let cancelled = backend.cancelled_count().get();
    drop(endless);
    backend.cancelled_count().reaches(cancelled + 1).await;

    backend.set_fault([FaultRule::hang()]);
    let requests = backend.request_count().get();
    tokio::select! {
        _ = send() => panic!("it was to hang"),
        () = backend.request_count().reaches(requests + 1) => {}
    }
    backend.cancelled_count().reaches(cancelled + 2).await;

    backend.set_fault(None);
    backend.set_healthy(false);
    assert_eq!(setup.get("/health").await.status, 503);
    backend.set_down(true).await.unwrap();
    assert!(send().await.unwrap_err().is_connect());
    backend.set_down(true).await.unwrap();
    backend.set_down(false).await.unwrap();
    backend.set_down(false).await.unwrap();
    assert_eq!(setup.get("/users/42").await.status, 200);
}

/// The OpenAPI document, and which of its parts the test has seen at work.
struct Document {
    whole: Value,
    seen: BTreeSet<String>,
}

impl Document {
    fn read() -> Self {
        let text = include_str!("../../../api/backend.openapi.yaml");
        Self { whole: serde_yaml_ng::from_str(text).unwrap(), seen: BTreeSet::new() }
    }

    fn resolve<'a>(&'a self, part: &'a Value) -> &'a Value {
        match part.get("$ref").and_then(Value::as_str) {
            Some(reference) => self.whole.pointer(reference.trim_start_matches('#')).expect(reference),
            None => part,
        }
    }

    /// A schema that stands on its own: the components come along for its references.
    fn validator(&self, schema: &Value) -> jsonschema::Validator {
        let whole = json!({ "components": self.whole["components"], "allOf": [schema] });
        jsonschema::options().should_validate_formats(true).build(&whole).unwrap()
    }

    /// Checks status, content type, headers and body of an answer against what the document says of that operation.
    fn check(&mut self, method: &str, path: &str, answer: &Received) {
        let operation = &self.whole["paths"][path][method];
        let responses =
            operation["responses"].as_object().unwrap_or_else(|| panic!("{method} {path} is not documented"));
        let status = answer.status.to_string();
        let key = if responses.contains_key(&status) { status.as_str() } else { "default" };
        let at = format!("{method} {path} {key}");
        let response = self.resolve(&responses[key]).clone();
        let content_type = answer.headers[CONTENT_TYPE].to_str().unwrap();
        let schema = &response["content"][content_type]["schema"];
        assert!(schema.is_object(), "{at}: {content_type} is not documented");
        if let Err(error) = self.validator(schema).validate(&answer.body) {
            panic!("{at}: {error}: {}", answer.body);
        }
        for (name, header) in response["headers"].as_object().into_iter().flatten() {
            let header = self.resolve(header);
            match answer.headers.get(name) {
                Some(value) => {
                    assert!(
                        self.validator(&header["schema"]).is_valid(&json!(value.to_str().unwrap())),
                        "{at}: {name}"
                    );
                }
                None => assert_ne!(header["required"], true, "{at}: no {name}"),
            }
        }
        self.seen.insert(at);
    }
}

#[tokio::test]
async fn every_answer_is_as_the_openapi_document_says() {
    let setup = Setup::start("").await;
    let mut document = Document::read();
    let good = json!({ "title": "t", "description": "0123456789", "priority": "low", "assignee_id": "42" });

    for (path, targets) in [
        ("/users", &["/users", "/users?skip=5&limit=100", "/users?limit=0", "/users?skip=-1"][..]),
        (
            "/users/{user_id}",
            &["/users/1", "/users/42?include_details=true", "/users/4711", "/users/1?include_details=2"],
        ),
        (
            "/tickets",
            &["/tickets?limit=100", "/tickets?status=closed&skip=3", "/tickets?status=lost", "/tickets?limit=101"],
        ),
        (
            "/query/{dataset}",
            &[
                "/query/sales?limit=1000",
                "/query/incidents?limit=1000",
                "/query/inventory?limit=1000&filters=%7B%22discontinued%22:true%7D",
                "/query/secrets",
                "/query/sales?limit=1001",
                "/query/sales?filters=%5B%5D",
                "/query/sales?filters=%7B%22total%22:%7B%7D%7D",
            ],
        ),
        ("/health", &["/health"]),
    ] {
        for target in targets {
            document.check("get", path, &setup.get(target).await);
        }
        let target = targets[0];
        let wrong_method = setup.ask(setup.request("DELETE", target)).await;
        assert_eq!((wrong_method.status, wrong_method.headers.contains_key(ALLOW)), (405, true));
        document.check("get", path, &wrong_method);
        document.check("get", path, &received(setup.request("GET", target).send().await.unwrap()).await);
        let without_role = setup.entra.access_token(&json!({ "roles": null }));
        let forbidden = setup.request("GET", target).bearer_auth(without_role).send().await.unwrap();
        document.check("get", path, &received(forbidden).await);
        for status in [429, 500, 502, 503] {
            setup.backend.set_fault([FaultRule::status(status).header("retry-after", "2")]);
            document.check("get", path, &setup.get(target).await);
        }
        setup.backend.set_fault(None);
    }
    setup.backend.set_healthy(false);
    document.check("get", "/health", &setup.get("/health").await);

    for (ticket, status) in [
        (good.clone(), 201),
        (json!({ "title": "t" }), 422),
        (json!([]), 422),
        (json!({ "title": "", "description": "short", "priority": "urgent", "assignee_id": null, "x": 1 }), 422),
    ] {
        let answer = setup.post(&ticket, None).await;
        assert_eq!(answer.status, status);
        document.check("post", "/tickets", &answer);
        let fits = document.validator(&json!({ "$ref": "#/components/schemas/NewTicket" })).is_valid(&ticket);
        assert_eq!(fits, status == 201, "the document and the stand-in disagree on {ticket}");
    }
    let key = Some("key");
    document.check("post", "/tickets", &setup.post(&good, key).await);
    document.check("post", "/tickets", &setup.post(&json!({ "title": "u", "description": "0123456789" }), key).await);
    document.check("post", "/tickets", &setup.post(&good, Some(&"k".repeat(256))).await);
    let post = |content_type: &'static str, body: String| {
        setup.request("POST", "/tickets").header(CONTENT_TYPE, content_type).body(body)
    };
    document.check("post", "/tickets", &setup.ask(post("text/plain", good.to_string())).await);
    document.check("post", "/tickets", &setup.ask(post("application/json", "{".into())).await);
    document.check("post", "/tickets", &setup.ask(post("application/json", "x".repeat(300_000))).await);
    document.check("post", "/tickets", &received(post("application/json", "{}".into()).send().await.unwrap()).await);
    let without_role = setup.entra.access_token(&json!({ "roles": null }));
    let forbidden = post("application/json", good.to_string()).bearer_auth(without_role).send().await.unwrap();
    document.check("post", "/tickets", &received(forbidden).await);
    document.check("post", "/tickets", &setup.ask(setup.request("PUT", "/tickets")).await);
    for status in [429, 504] {
        setup.backend.set_fault([FaultRule::status(status)]);
        document.check("post", "/tickets", &setup.post(&good, None).await);
    }

    // Everything that the document promises was seen.
    let paths = document.whole["paths"].as_object().unwrap();
    for (path, item) in paths {
        for (method, operation) in item.as_object().unwrap().iter().filter(|(name, _)| *name != "parameters") {
            for status in operation["responses"].as_object().unwrap().keys() {
                assert!(
                    document.seen.contains(&format!("{method} {path} {status}")),
                    "never seen: {method} {path} {status}"
                );
            }
        }
    }
}

#[tokio::test]
async fn every_parameter_of_the_openapi_document_is_obeyed() {
    let setup = Setup::start("").await;
    let document = Document::read();
    let mut documented = BTreeSet::new();
    for (path, item) in document.whole["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap().iter().filter(|(name, _)| *name != "parameters") {
            for parameter in operation["parameters"].as_array().into_iter().flatten() {
                let parameter = document.resolve(parameter);
                documented.insert(format!("{method} {path} {}", parameter["name"].as_str().unwrap()));
            }
        }
    }
    let mut obeyed = BTreeSet::new();
    for (operation, target) in [
        ("get /users skip", "/users?skip=1"),
        ("get /users limit", "/users?limit=1"),
        ("get /users/{user_id} include_details", "/users/1?include_details=true"),
        ("get /tickets status", "/tickets?status=closed"),
        ("get /tickets skip", "/tickets?skip=1"),
        ("get /tickets limit", "/tickets?limit=1"),
        ("get /query/{dataset} limit", "/query/sales?limit=1"),
        ("get /query/{dataset} filters", "/query/sales?filters=%7B%22region%22:%22EMEA%22%7D"),
    ] {
        let (path, _) = target.split_once('?').unwrap();
        assert_ne!(setup.get(target).await.body, setup.get(path).await.body, "{target}");
        obeyed.insert(operation.to_owned());
    }
    let ticket = json!({ "title": "t", "description": "0123456789" });
    let ids = [setup.post(&ticket, Some("a")).await.body, setup.post(&ticket, Some("a")).await.body];
    assert_eq!(ids[0]["id"], ids[1]["id"]);
    obeyed.insert("post /tickets Idempotency-Key".to_owned());
    assert_eq!(documented, obeyed);
}
