//! Who may call: tokens and headers of every kind, what each role sees and may do, and where a caller's token never gets.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::StreamExt as _;
use mcp_server::demo::entra::{
    AGENT_CLIENT_ID, API_APP_ID, CLIENT_ID, DemoCaller, EntraOptions, PEOPLES_CLIENT_ID, RESOURCE_APP_ID, TENANT_ID,
    TokenVersion,
};
use mcp_server::demo::fault::FaultRule;
use mcp_server::demo::{DemoOptions, StandIns};
use mcp_server::settings::InboundAuth;
use serde_json::{Value, json};

use crate::support::callers::{METADATA_URL, PUBLIC_URL, inbound};
use crate::support::calls::TOOLS;
use crate::support::canaries;
use crate::support::{Era, TestApp, error_object};

const OTHER_TENANT: &str = "00000000-1111-4222-8333-444444444444";
const OTHER_APP: &str = "00000000-aaaa-4bbb-8ccc-dddddddddddd";
const API_URI: &str = "api://mcp-demo";

/// What a row expects of the server.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Expected {
    /// It lets the caller in.
    In,
    /// 400 `invalid_request`.
    Malformed,
    /// 401, without an error: no token was sent.
    TokenWanted,
    /// 401 `invalid_token`, with this in its description.
    Invalid(&'static str),
    /// 403 `insufficient_scope`.
    NoScope,
    /// 403 without an error that a client would act on.
    Forbidden,
    /// 431, before anybody looks at the token.
    HeadTooLarge,
}

use Expected::{Forbidden, HeadTooLarge, In, Invalid, Malformed, NoScope, TokenWanted};

const UNREADABLE: Expected = Invalid("no access token of Entra ID");
const UNSIGNED: Expected = Invalid("not signed by a key of its tenant");
const EXPIRED: Expected = Invalid("has expired");
const FOREIGN: Expected = Invalid("from another tenant");

fn now() -> i64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64
}

fn bearer(token: &str) -> Vec<String> {
    vec![format!("Bearer {token}")]
}

/// The rows: what it is, the `Authorization` fields, what is expected.
fn rows(app: &TestApp) -> Vec<(&'static str, Vec<String>, Expected)> {
    let entra = &app.stand_ins.entra;
    let (reader, agent) = (DemoCaller::Reader, DemoCaller::Agent);
    let good = app.token(reader);
    let user = |changes: Value| bearer(&app.token_with(reader, changes));
    let of_agent = |changes: Value| bearer(&app.token_with(agent, changes));
    let headed = |header: Value| bearer(&entra.sign(&header, &entra.caller_claims(reader, &json!({}))));
    let claims = |claims: &Value| bearer(&entra.sign(&json!({}), claims));
    let authority = entra.authority().as_str().trim_end_matches('/').to_owned();
    let v1 = |changes: Value| {
        let mut claims = entra.caller_claims(
            reader,
            &json!({ "ver": "1.0", "iss": format!("https://sts.windows.net/{TENANT_ID}/"), "aud": API_URI, "azp": null,
                     "azpacr": null, "appid": PEOPLES_CLIENT_ID }),
        );
        for (name, value) in changes.as_object().unwrap() {
            claims[name] = value.clone();
        }
        bearer(&entra.sign(&json!({}), &claims))
    };
    let [head, payload, signature]: [&str; 3] = good.split('.').collect::<Vec<_>>().try_into().unwrap();
    let other_payload = app.token(DemoCaller::Writer).split('.').nth(1).unwrap().to_owned();
    let flipped = if signature.starts_with('A') { "B" } else { "A" };
    let now = now();
    vec![
        // The header.
        ("nothing", vec![], TokenWanted),
        ("an empty field", vec![String::new()], TokenWanted),
        ("another scheme", vec!["Basic dXNlcjpwYXNz".to_owned()], TokenWanted),
        ("a token without a scheme", vec![good.clone()], TokenWanted),
        ("a scheme that only begins so", vec![format!("Bearers {good}")], TokenWanted),
        ("a scheme with a colon", vec![format!("Bearer: {good}")], TokenWanted),
        ("a scheme and no token", vec!["Bearer".to_owned()], Malformed),
        ("a scheme and blanks", vec!["Bearer   ".to_owned()], Malformed),
        ("two tokens in one field", vec![format!("Bearer {good} {good}")], Malformed),
        ("two tokens with a comma", vec![format!("Bearer {good}, Bearer {good}")], Malformed),
        ("two fields with the same good token", vec![format!("Bearer {good}"), format!("Bearer {good}")], Malformed),
        ("a good token behind another scheme", vec!["Basic eA==".to_owned(), format!("Bearer {good}")], Malformed),
        ("a token in quotation marks", vec![format!("Bearer \"{good}\"")], Malformed),
        ("a token with letters of no header", vec!["Bearer tökén".to_owned()], Malformed),
        ("a good token", bearer(&good), In),
        ("a good token, scheme in lower case", vec![format!("bearer {good}")], In),
        ("a good token, scheme in upper case", vec![format!("BEARER {good}")], In),
        ("a good token after two blanks", vec![format!("Bearer  {good}")], In),
        (
            "a token that is larger than a head may be",
            bearer(&format!("{good}{}", "A".repeat(16 * 1024))),
            HeadTooLarge,
        ),
        // No JWT.
        ("garbage", bearer("garbage"), UNREADABLE),
        ("dots", bearer("..."), UNREADABLE),
        ("two parts", bearer(&format!("{head}.{payload}")), UNREADABLE),
        ("four parts", bearer(&format!("{good}.x")), UNREADABLE),
        ("five parts, as of an encrypted token", bearer(&format!("{head}.a.{payload}.b.{signature}")), UNREADABLE),
        ("a header that is no JSON", bearer(&format!("AAAA.{payload}.{signature}")), UNREADABLE),
        ("claims that are no JSON", bearer(&format!("{head}.AAAA.{signature}")), UNREADABLE),
        ("claims that are a list", claims(&json!([])), UNREADABLE),
        ("padding in the middle", bearer(&format!("{head}=.{payload}.{signature}")), UNREADABLE),
        ("a large token of nothing", bearer(&"A".repeat(12 * 1024)), UNREADABLE),
        // Signatures and keys.
        ("no signature", bearer(&format!("{head}.{payload}.")), UNSIGNED),
        ("another signature", bearer(&format!("{head}.{payload}.{flipped}{}", &signature[1..])), UNSIGNED),
        ("half a signature", bearer(&format!("{head}.{payload}.{}", &signature[..256])), UNSIGNED),
        ("claims of somebody else", bearer(&format!("{head}.{other_payload}.{signature}")), UNSIGNED),
        ("alg none", headed(json!({ "alg": "none" })), UNREADABLE),
        ("alg None", headed(json!({ "alg": "None" })), UNREADABLE),
        ("no alg", headed(json!({ "alg": null })), UNREADABLE),
        ("HS256 with the public key as its secret", headed(json!({ "alg": "HS256" })), UNSIGNED),
        ("RS384", headed(json!({ "alg": "RS384" })), UNSIGNED),
        ("RS512", headed(json!({ "alg": "RS512" })), UNSIGNED),
        ("PS256", headed(json!({ "alg": "PS256" })), UNSIGNED),
        ("ES256 by name", headed(json!({ "alg": "ES256" })), UNSIGNED),
        ("no kid", headed(json!({ "kid": null })), UNSIGNED),
        ("an empty kid", headed(json!({ "kid": "" })), UNSIGNED),
        ("a kid that nobody publishes", headed(json!({ "kid": "made-up" })), UNSIGNED),
        ("a kid that is a path", headed(json!({ "kid": "../../dev/null" })), UNSIGNED),
        (
            "a key of its own in the header",
            headed(json!({ "kid": "mine", "jwk": { "kty": "RSA", "n": "AQAB", "e": "AQAB" } })),
            UNSIGNED,
        ),
        (
            "the address of a key in the header",
            headed(json!({ "kid": "mine", "jku": "https://evil.example/keys" })),
            UNSIGNED,
        ),
        ("something critical that nobody knows", headed(json!({ "crit": ["exp"] })), UNREADABLE),
        ("a service account's token", bearer(&entra.service_account_token(&json!({}))), FOREIGN),
        // Times.
        ("expired long ago", user(json!({ "exp": now - 3600 })), EXPIRED),
        ("expired just beyond the leeway", user(json!({ "exp": now - 65 })), EXPIRED),
        ("expired within the leeway", user(json!({ "exp": now - 30 })), In),
        ("no exp", user(json!({ "exp": null })), UNREADABLE),
        ("exp as text", user(json!({ "exp": (now + 3600).to_string() })), UNREADABLE),
        ("exp below zero", user(json!({ "exp": -1 })), UNREADABLE),
        ("exp beyond all time", user(json!({ "exp": 1e300 })), UNREADABLE),
        ("not yet valid", user(json!({ "nbf": now + 300 })), Invalid("not valid yet")),
        ("not yet valid, within the leeway", user(json!({ "nbf": now + 30 })), In),
        ("no nbf", user(json!({ "nbf": null })), UNREADABLE),
        // For whom, by whom.
        ("for the backend", user(json!({ "aud": RESOURCE_APP_ID })), Invalid("for another resource")),
        (
            "for Microsoft Graph",
            user(json!({ "aud": "00000003-0000-0000-c000-000000000000" })),
            Invalid("for another resource"),
        ),
        ("for the URL of this server", user(json!({ "aud": PUBLIC_URL })), Invalid("for another resource")),
        ("for us, in capitals", user(json!({ "aud": API_APP_ID.to_uppercase() })), Invalid("for another resource")),
        ("for us and others", user(json!({ "aud": [API_APP_ID, RESOURCE_APP_ID] })), UNREADABLE),
        ("for nobody", user(json!({ "aud": null })), UNREADABLE),
        (
            "by another tenant",
            user(json!({ "iss": format!("{authority}/{OTHER_TENANT}/v2.0"), "tid": OTHER_TENANT })),
            FOREIGN,
        ),
        ("by no issuer", user(json!({ "iss": null })), UNREADABLE),
        ("by several issuers", user(json!({ "iss": [format!("{authority}/{TENANT_ID}/v2.0")] })), UNREADABLE),
        ("by our issuer with a slash", user(json!({ "iss": format!("{authority}/{TENANT_ID}/v2.0/") })), FOREIGN),
        (
            "by the real Entra",
            user(json!({ "iss": format!("https://login.microsoftonline.com/{TENANT_ID}/v2.0") })),
            FOREIGN,
        ),
        ("by the template", user(json!({ "iss": format!("{authority}/{{tenantid}}/v2.0") })), FOREIGN),
        ("with the tid of another tenant", user(json!({ "tid": OTHER_TENANT })), FOREIGN),
        ("without tid", user(json!({ "tid": null })), UNREADABLE),
        ("version 1 by its word, 2 by its issuer", user(json!({ "ver": "1.0" })), FOREIGN),
        ("of a version to come", user(json!({ "ver": "3.0" })), FOREIGN),
        ("without version", user(json!({ "ver": null })), UNREADABLE),
        ("of version 1", v1(json!({})), FOREIGN),
        ("without oid", user(json!({ "oid": null })), UNREADABLE),
        ("with an oid that is no GUID", user(json!({ "oid": "root\r\nX: y" })), UNREADABLE),
        ("without sub", user(json!({ "sub": null })), UNREADABLE),
        // What kind of token.
        (
            "an ID token",
            user(json!({ "azp": null, "scp": null, "nonce": "x", "roles": ["users.read"] })),
            Invalid("ID token"),
        ),
        ("a token without a client", user(json!({ "azp": null })), Invalid("ID token")),
        (
            "a token with the client where version 1 has it",
            user(json!({ "azp": null, "appid": PEOPLES_CLIENT_ID })),
            Invalid("ID token"),
        ),
        ("a client that is no GUID", user(json!({ "azp": "vscode" })), UNREADABLE),
        ("of any client of the tenant", user(json!({ "azp": OTHER_APP })), In),
        // What it allows.
        ("a person without scopes", user(json!({ "scp": "" })), NoScope),
        ("a person with scopes of something else", user(json!({ "scp": "openid profile email User.Read" })), NoScope),
        (
            "a scope that only begins like ours",
            user(json!({ "scp": "users.readwrite xusers.read users.read/" })),
            NoScope,
        ),
        ("a scope in capitals", user(json!({ "scp": "USERS.READ" })), NoScope),
        ("a scope in its qualified form", user(json!({ "scp": format!("{PUBLIC_URL}/users.read") })), NoScope),
        ("scopes as a list", user(json!({ "scp": ["users.read"] })), UNREADABLE),
        ("one of our scopes among others", user(json!({ "scp": "openid users.read" })), In),
        ("a person with a role and no scope", user(json!({ "scp": null, "roles": ["users.read"] })), NoScope),
        ("a person with a role and an empty scope", user(json!({ "scp": "", "roles": ["users.read"] })), NoScope),
        ("a person by idtyp, with a role", of_agent(json!({ "idtyp": "user" })), NoScope),
        ("an app with its roles", of_agent(json!({})), In),
        ("an app that says so", of_agent(json!({ "idtyp": "app" })), In),
        ("an app that says so, with another sub", of_agent(json!({ "idtyp": "app", "sub": "other" })), In),
        ("an app without roles", of_agent(json!({ "roles": null })), NoScope),
        ("an app with no roles in the list", of_agent(json!({ "roles": [] })), NoScope),
        (
            "an app with roles of something else",
            of_agent(json!({ "roles": ["Backend.Access", "Users.Read"] })),
            NoScope,
        ),
        ("an app with a role as text", of_agent(json!({ "roles": "tickets.read" })), UNREADABLE),
        ("an app with a scope too", of_agent(json!({ "idtyp": "app", "scp": "users.read" })), UNREADABLE),
        (
            "the server's own token for the backend",
            bearer(&entra.access_token(&json!({}))),
            Invalid("for another resource"),
        ),
        ("the server's own app, with a token for us", of_agent(json!({ "azp": CLIENT_ID })), In),
    ]
}

/// Sends one call and holds the answer against what is expected of it.
async fn hold(app: &TestApp, era: Era, name: &str, fields: &[String], expected: Expected) {
    let before = app.backend_requests().len();
    // A tool that the reader and the agent may both call.
    let mut request = app.request(era, "tools/call", json!({ "name": "list_tickets", "arguments": {} }));
    for field in fields {
        request = request.header("authorization", reqwest::header::HeaderValue::from_bytes(field.as_bytes()).unwrap());
    }
    let answer = request.send().await.unwrap();
    let status = answer.status().as_u16();
    let challenge = answer.headers().get("www-authenticate").map(|value| value.to_str().unwrap().to_owned());
    let body: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
    let calls = app.backend_requests().len() - before;
    let context = format!("{name}, {era:?}: {status} {challenge:?} {body}");
    if expected == In {
        // One of our scopes may be the wrong one for this tool: it is let in all the same, and told so.
        let scoped = status == 403 && challenge.as_deref().is_some_and(|text| text.contains("/tickets.read\""));
        assert!(scoped || (status == 200 && calls == 1), "{context}");
        return;
    }
    assert_eq!(calls, 0, "{context}");
    let (right_status, error) = match expected {
        In => unreachable!(),
        Malformed => (400, Some("invalid_request")),
        TokenWanted => (401, None),
        Invalid(_) => (401, Some("invalid_token")),
        NoScope => (403, Some("insufficient_scope")),
        Forbidden => (403, None),
        HeadTooLarge => (431, None),
    };
    assert_eq!(status, right_status, "{context}");
    let body = error_object(&body);
    assert_eq!(body["details"]["status_code"], right_status, "{context}");
    assert!(body["details"]["trace_id"].is_string() && body["error"].is_string(), "{context}");
    if expected == HeadTooLarge {
        assert_eq!(challenge, None, "{context}");
        return;
    }
    let challenge = challenge.unwrap_or_else(|| panic!("no challenge: {context}"));
    let parameters = parameters(&challenge);
    assert_eq!(parameters.get("resource_metadata").map(String::as_str), Some(METADATA_URL), "{context}");
    assert_eq!(parameters.get("error").map(String::as_str), error, "{context}");
    if let Invalid(why) = expected {
        assert!(parameters["error_description"].contains(why), "{context}");
        assert!(body["message"].as_str().unwrap().contains(why), "{context}");
    }
    if matches!(expected, TokenWanted | Invalid(_) | NoScope) {
        let all = ["users.read", "tickets.read", "tickets.write", "data.read"];
        assert_eq!(parameters["scope"], all.map(|scope| format!("{PUBLIC_URL}/{scope}")).join(" "), "{context}");
    }
}

/// The parameters of a challenge, which is one and of the right scheme.
fn parameters(challenge: &str) -> BTreeMap<String, String> {
    let list = challenge.strip_prefix("Bearer ").unwrap();
    list.split("\", ")
        .map(|parameter| {
            let (name, value) = parameter.split_once("=\"").unwrap();
            (name.to_owned(), value.trim_end_matches('"').to_owned())
        })
        .collect()
}

#[tokio::test]
async fn every_token_and_header_is_let_in_or_refused_as_the_table_says() {
    let app = TestApp::guarded().await;
    let rows = rows(&app);
    let refused = rows.iter().filter(|(_, _, expected)| *expected != In).count();
    assert!(refused >= 60, "{refused} of {} rows are refusals", rows.len());
    for (name, fields, expected) in &rows {
        for era in Era::ALL {
            hold(&app, era, name, fields, *expected).await;
        }
    }
}

#[tokio::test]
async fn version_1_tokens_are_accepted_only_where_an_app_id_uri_is_an_audience() {
    let app = TestApp::guarded_with(|inbound| inbound.app_id_uris = vec![API_URI.to_owned()], |_| {}).await;
    let v1 = |changes: Value| {
        let mut claims = json!({ "ver": "1.0", "iss": format!("https://sts.windows.net/{TENANT_ID}/"), "aud": API_URI,
                                 "azp": null, "appid": PEOPLES_CLIENT_ID });
        claims.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        bearer(&app.token_with(DemoCaller::Reader, claims))
    };
    for (name, fields, expected) in [
        ("for the App ID URI", v1(json!({})), true),
        ("for the client id", v1(json!({ "aud": API_APP_ID })), true),
        (
            "an app's",
            bearer(&app.token_with(
                DemoCaller::Agent,
                json!({ "ver": "1.0", "azp": null, "appid": AGENT_CLIENT_ID,
            "iss": format!("https://sts.windows.net/{TENANT_ID}/"), "aud": API_URI }),
            )),
            true,
        ),
        ("version 2 beside them", bearer(&app.token(DemoCaller::Reader)), true),
        ("version 2 for the URI", bearer(&app.token_with(DemoCaller::Reader, json!({ "aud": API_URI }))), false),
        ("for another URI", v1(json!({ "aud": "api://other" })), false),
        ("with the client where version 2 has it", v1(json!({ "appid": null, "azp": PEOPLES_CLIENT_ID })), false),
        ("without its version", v1(json!({ "ver": "2.0" })), false),
        ("of another tenant", v1(json!({ "iss": format!("https://sts.windows.net/{OTHER_TENANT}/") })), false),
    ] {
        let answer = app.request(Era::Modern, "tools/list", json!({})).header("authorization", &fields[0]).send().await;
        assert_eq!(answer.unwrap().status() == 200, expected, "{name}");
    }
    // The scopes that clients ask for are those of the App ID URI.
    let answer = app.send(Era::Modern, "tools/list", json!({})).await;
    let challenge = answer.headers()["www-authenticate"].to_str().unwrap().to_owned();
    assert!(parameters(&challenge)["scope"].starts_with("api://mcp-demo/users.read "), "{challenge}");
}

#[tokio::test]
async fn callers_of_a_cloud_whose_issuers_are_elsewhere_are_let_in_and_sent_to_its_issuer() {
    let entra = EntraOptions {
        issuer_origin: Some("https://login.partner.example".to_owned()),
        v1_issuer_origin: "https://sts.partner.example".to_owned(),
        ..EntraOptions::default()
    };
    let stand_ins = StandIns::start(DemoOptions { entra, ..DemoOptions::default() }).await.unwrap();
    let app = TestApp::spawn_against(stand_ins, |settings| {
        let mut inbound = inbound(&settings.identity.tenant_id);
        inbound.app_id_uris = vec![API_URI.to_owned()];
        settings.inbound = InboundAuth::Entra(Box::new(inbound));
    })
    .await;
    app.until_ready().await;
    let [v1, v2] = [TokenVersion::V1, TokenVersion::V2].map(|version| app.stand_ins.entra.issuer(version));
    let of_v1 = |issuer: &str| json!({ "ver": "1.0", "iss": issuer, "aud": API_URI, "azp": null, "azpacr": null, "appid": PEOPLES_CLIENT_ID });
    let derived = format!("{}{TENANT_ID}/v2.0", app.stand_ins.entra.authority());
    for (name, claims, expected) in [
        ("version 2", json!({}), 200),
        ("version 1", of_v1(&v1), 200),
        ("the authority's own host", json!({ "iss": derived }), 401),
        ("the public cloud's version 1", of_v1(&format!("https://sts.windows.net/{TENANT_ID}/")), 401),
    ] {
        let token = app.token_with(DemoCaller::Reader, claims);
        assert_eq!(app.send_as(&token, Era::Modern, "tools/list", json!({})).await.status(), expected, "{name}");
    }
    let metadata = app.http.get(app.url("/.well-known/oauth-protected-resource")).send().await.unwrap();
    let metadata: Value = serde_json::from_str(&metadata.text().await.unwrap()).unwrap();
    assert_eq!(metadata["authorization_servers"], json!([v2]));
}

#[tokio::test]
async fn one_thin_answer_about_keys_takes_nobodys_token_away() {
    let app = TestApp::guarded().await;
    let (entra, era) = (&app.stand_ins.entra, Era::Modern);
    let old = app.token(DemoCaller::Reader);
    let status = async |token: &str| app.send_as(token, era, "tools/list", json!({})).await.status().as_u16();
    assert_eq!(status(&old).await, 200);
    // What is published now has another key, and lacks the one that was good a moment ago.
    entra.replace_keys().await.unwrap();
    assert_eq!((status(&app.token(DemoCaller::Reader)).await, entra.key_request_count().get()), (200, 2));
    assert_eq!(status(&old).await, 200);
}

#[tokio::test]
async fn only_listed_clients_may_call_where_there_is_a_list() {
    let app = TestApp::guarded_with(|inbound| inbound.clients = vec![PEOPLES_CLIENT_ID.to_owned()], |_| {}).await;
    for era in Era::ALL {
        hold(&app, era, "the listed client", &bearer(&app.token(DemoCaller::Reader)), In).await;
        let capitals = app.token_with(DemoCaller::Reader, json!({ "azp": PEOPLES_CLIENT_ID.to_uppercase() }));
        hold(&app, era, "the listed client in capitals", &bearer(&capitals), In).await;
        hold(&app, era, "the agent", &bearer(&app.token(DemoCaller::Agent)), Forbidden).await;
        let other = app.token_with(DemoCaller::Writer, json!({ "azp": OTHER_APP }));
        hold(&app, era, "another client", &bearer(&other), Forbidden).await;
    }
}

#[tokio::test]
async fn permissions_may_have_other_names_in_tokens() {
    let mut reads = [("INBOUND_AUTH", "entra"), ("INBOUND_AUDIENCE", API_APP_ID), ("PUBLIC_URL", PUBLIC_URL)].to_vec();
    reads.extend([
        ("INBOUND_SCOPE_NAMES", "users.read=mcp.tools,tickets.read=mcp.tools"),
        ("INBOUND_ROLE_NAMES", "tickets.read=Tickets.Read.All"),
        ("AZURE_TENANT_ID", TENANT_ID),
        ("AZURE_CLIENT_ID", CLIENT_ID),
        ("AZURE_CLIENT_SECRET", "x"),
        ("BACKEND_API_URL", "http://localhost"),
    ]);
    let vars: BTreeMap<_, _> = reads.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let read = mcp_server::settings::Settings::read(&vars).unwrap().inbound;
    let InboundAuth::Entra(named) = read else { panic!("no door") };
    let app = TestApp::guarded_with(|inbound| *inbound = *named, |_| {}).await;
    let tools = async |token: String| {
        names(&app.send_as(&token, Era::Legacy, "tools/list", json!({})).await.text().await.unwrap())
    };
    assert_eq!(
        tools(app.token_with(DemoCaller::Reader, json!({ "scp": "mcp.tools users.read" }))).await,
        ["get_user_profile", "list_tickets", "list_users"],
    );
    assert_eq!(
        tools(app.token_with(DemoCaller::Agent, json!({ "roles": ["Tickets.Read.All", "mcp.tools"] }))).await,
        ["list_tickets"],
    );
    let challenge = app.send(Era::Modern, "tools/list", json!({})).await.headers()["www-authenticate"].clone();
    let scopes = format!("{PUBLIC_URL}/mcp.tools {PUBLIC_URL}/tickets.write {PUBLIC_URL}/data.read");
    assert_eq!(parameters(challenge.to_str().unwrap())["scope"], scopes);
}

fn names(body: &str) -> Vec<String> {
    let body: Value = serde_json::from_str(body).unwrap();
    let tools = body["result"]["tools"].as_array().unwrap_or_else(|| panic!("{body}"));
    tools.iter().map(|tool| tool["name"].as_str().unwrap().to_owned()).collect()
}

/// Arguments that each tool takes.
fn arguments(tool: &str) -> Value {
    match tool {
        "create_ticket" => json!({ "title": "Cooling failed", "description": "The rack is too warm." }),
        "get_user_profile" => json!({ "user_id": "42" }),
        "query_data" => json!({ "dataset": "sales", "limit": 1 }),
        _ => json!({}),
    }
}

#[tokio::test]
async fn each_role_sees_and_may_call_exactly_its_tools() {
    let app = TestApp::guarded().await;
    let needs = BTreeMap::from([
        ("create_ticket", "tickets.write"),
        ("get_user_profile", "users.read"),
        ("list_tickets", "tickets.read"),
        ("list_users", "users.read"),
        ("query_data", "data.read"),
    ]);
    let only_data = json!({ "scp": "data.read" });
    let callers = [
        ("reader", app.token(DemoCaller::Reader), vec!["get_user_profile", "list_tickets", "list_users", "query_data"]),
        ("writer", app.token(DemoCaller::Writer), TOOLS.to_vec()),
        ("agent", app.token(DemoCaller::Agent), vec!["create_ticket", "list_tickets"]),
        ("analyst", app.token_with(DemoCaller::Reader, only_data), vec!["query_data"]),
    ];
    for (role, token, may) in callers {
        for era in Era::ALL {
            let list = app.send_as(&token, era, "tools/list", json!({})).await.text().await.unwrap();
            assert_eq!(names(&list), may, "{role} {era:?}");
            if era == Era::Modern {
                let list: Value = serde_json::from_str(&list).unwrap();
                assert_eq!((&list["result"]["ttlMs"], &list["result"]["cacheScope"]), (&json!(0), &json!("private")));
            }
            for tool in TOOLS {
                let before = app.backend_requests().len();
                let params = json!({ "name": tool, "arguments": arguments(tool) });
                let answer = app.send_as(&token, era, "tools/call", params).await;
                let (status, challenge) = (answer.status(), answer.headers().get("www-authenticate").cloned());
                let body: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
                let calls = app.backend_requests().len() - before;
                let context = format!("{role} {era:?} {tool}: {status} {challenge:?} {body}");
                if may.contains(&tool) {
                    assert_eq!(
                        (status.as_u16(), calls, &body["result"]["isError"]),
                        (200, 1, &json!(false)),
                        "{context}"
                    );
                    continue;
                }
                assert_eq!((status.as_u16(), calls), (403, 0), "{context}");
                assert_eq!(
                    (&error_object(&body)["error"], &body["id"]),
                    (&json!("AUTHENTICATION_ERROR"), &json!(7)),
                    "{context}"
                );
                let parameters = parameters(challenge.unwrap().to_str().unwrap());
                assert_eq!(parameters["error"], "insufficient_scope", "{context}");
                assert_eq!(parameters["scope"], format!("{PUBLIC_URL}/{}", needs[tool]), "{context}");
                assert_eq!(parameters["resource_metadata"], METADATA_URL, "{context}");
            }
            let unknown =
                app.send_as(&token, era, "tools/call", json!({ "name": "no_such_tool", "arguments": {} })).await;
            let unknown: Value = serde_json::from_str(&unknown.text().await.unwrap()).unwrap();
            assert_eq!(unknown["error"]["code"], -32602, "{role} {era:?}");
        }
    }
}

#[tokio::test]
async fn every_method_of_the_endpoint_is_behind_the_door_and_nothing_else_is() {
    let app = TestApp::guarded().await;
    for era in Era::ALL {
        for method in ["initialize", "server/discover", "tools/list", "tools/call", "ping", "no/such/method"] {
            assert_eq!(app.send(era, method, json!({})).await.status(), 401, "{era:?} {method}");
        }
    }
    for body in ["", "{", "[]", r#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#] {
        assert_eq!(app.post(body).send().await.unwrap().status(), 401, "{body}");
    }
    let slash = app.http.post(app.url("/mcp/")).body("{}").send().await.unwrap();
    assert_eq!(slash.status(), 401);
    let in_the_url = app.http.post(app.url(&format!("/mcp?access_token={}", app.token(DemoCaller::Writer)))).body("{}");
    assert_eq!(in_the_url.send().await.unwrap().status(), 401);
    for (path, status) in [("/", 200), ("/health/live", 200), ("/health/ready", 200), ("/nothing", 404), ("/mcp", 405)]
    {
        assert_eq!(app.http.get(app.url(path)).send().await.unwrap().status(), status, "{path}");
    }
    // Two fields of what must stand there once are refused before anybody looks at tokens.
    let twice =
        app.post("{}").header("mcp-protocol-version", "2025-11-25").header("mcp-protocol-version", "2026-07-28");
    assert_eq!(twice.bearer_auth(app.token(DemoCaller::Reader)).send().await.unwrap().status(), 400);
}

#[tokio::test]
async fn the_metadata_of_the_resource_are_where_clients_look_for_them() {
    let app = TestApp::guarded_with(
        |inbound| inbound.public_url = "https://mcp.contoso.example/tools/mcp".parse().unwrap(),
        |settings| settings.tools.read_only = true,
    )
    .await;
    let issuer = app.stand_ins.entra.issuer(TokenVersion::V2);
    let scopes =
        ["users.read", "tickets.read", "data.read"].map(|name| format!("https://mcp.contoso.example/tools/mcp/{name}"));
    let expected = json!({
        "resource": "https://mcp.contoso.example/tools/mcp",
        "authorization_servers": [issuer],
        "scopes_supported": scopes,
        "bearer_methods_supported": ["header"],
        "resource_name": "MCP server",
    });
    for path in ["", "/mcp", "/tools/mcp"] {
        let answer =
            app.http.get(app.url(&format!("/.well-known/oauth-protected-resource{path}"))).send().await.unwrap();
        assert_eq!(
            (answer.status().as_u16(), &answer.headers()["content-type"]),
            (200, &"application/json".parse().unwrap())
        );
        assert_eq!(serde_json::from_str::<Value>(&answer.text().await.unwrap()).unwrap(), expected, "{path}");
    }
    let challenge = app.send(Era::Modern, "tools/list", json!({})).await.headers()["www-authenticate"].clone();
    let metadata = "https://mcp.contoso.example/.well-known/oauth-protected-resource/tools/mcp";
    assert_eq!(parameters(challenge.to_str().unwrap())["resource_metadata"], metadata);
    assert!(!challenge.to_str().unwrap().contains("offline_access"));
    let posted = app.http.post(app.url("/.well-known/oauth-protected-resource")).send().await.unwrap();
    assert_eq!((posted.status().as_u16(), posted.headers().get("allow").is_some()), (405, true));

    let open = TestApp::spawn().await;
    let answer = open.http.get(open.url("/.well-known/oauth-protected-resource")).send().await.unwrap();
    assert_eq!(answer.status(), 404, "nobody is asked for a token there");
}

#[tokio::test]
async fn tools_that_are_switched_off_exist_for_nobody_with_or_without_entra() {
    let only = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
    for (enabled, read_only, left) in [
        (None, true, &TOOLS[1..]),
        (only(&["create_ticket", "list_users"]), false, &["create_ticket", "list_users"][..]),
        (only(&["create_ticket", "list_users"]), true, &["list_users"][..]),
    ] {
        let (one, other) = (enabled.clone(), enabled.clone());
        let open = TestApp::spawn_with(|settings| {
            settings.tools.enabled = one;
            settings.tools.read_only = read_only;
        })
        .await;
        let guarded = TestApp::guarded_with(
            |_| {},
            |settings| {
                settings.tools.enabled = other;
                settings.tools.read_only = read_only;
            },
        )
        .await;
        for app in [open, guarded] {
            let token = app.token(DemoCaller::Writer);
            for era in Era::ALL {
                let list = app.send_as(&token, era, "tools/list", json!({})).await.text().await.unwrap();
                assert_eq!(names(&list), left, "{era:?}");
                for tool in TOOLS {
                    app.stand_ins.backend.forget_requests();
                    let params = json!({ "name": tool, "arguments": arguments(tool) });
                    let answer = app.send_as(&token, era, "tools/call", params).await.text().await.unwrap();
                    let answer: Value = serde_json::from_str(&answer).unwrap();
                    let calls = app.backend_requests().len();
                    if left.contains(&tool) {
                        assert_eq!((&answer["result"]["isError"], calls), (&json!(false), 1), "{tool}: {answer}");
                    } else {
                        assert_eq!((&answer["error"]["code"], calls), (&json!(-32602), 0), "{tool}: {answer}");
                        let text = answer["error"]["message"].as_str().unwrap();
                        assert!(text.contains(left[0]) && !text.contains(tool), "{text}");
                    }
                }
            }
        }
    }
}

#[tokio::test]
async fn a_callers_token_gets_nowhere() {
    let token = {
        // Signed, good, and recognisable: the claims hold the word that every leak is found by, in base64 and out of it.
        let app = TestApp::guarded().await;
        let token = app.token_with(DemoCaller::Writer, json!({ "name": canaries::INBOUND, "aio": canaries::INBOUND }));
        for era in Era::ALL {
            for tool in TOOLS {
                let params = json!({ "name": tool, "arguments": arguments(tool) });
                let answer = app.send_as(&token, era, "tools/call", params).await;
                assert_eq!(answer.status(), 200);
                assert!(!format!("{:?}", answer.headers()).contains("eyJ"));
                canaries::assert_clean(&answer.text().await.unwrap());
            }
            for bad in [
                format!("{token}x"),
                token.replace('.', ".."),
                canaries::INBOUND.to_owned(),
                token.clone() + " " + &token,
            ] {
                let answer = app.send_as(&bad, era, "tools/list", json!({})).await;
                assert!([400, 401].contains(&answer.status().as_u16()));
                canaries::assert_clean(&format!("{:?}", answer.headers()));
                canaries::assert_clean(&answer.text().await.unwrap());
            }
        }
        for request in app.backend_requests() {
            let heard = format!("{request:?}");
            assert!(!heard.contains(&token) && !heard.contains("canary"), "{heard}");
        }
        for request in app.stand_ins.entra.token_requests() {
            assert!(!format!("{request:?}").contains(&token));
        }
        canaries::assert_clean(&app.metrics().await);
        token
    };
    // Where nobody asks for a token, one that comes is taken off all the same.
    let open = TestApp::spawn().await;
    for era in Era::ALL {
        let params = json!({ "name": "get_user_profile", "arguments": arguments("get_user_profile") });
        assert_eq!(open.send_as(&token, era, "tools/call", params).await.status(), 200);
    }
    for request in open.backend_requests() {
        let authorization = request.headers.get("authorization").map(|value| format!("{value:?}")).unwrap_or_default();
        assert!(!authorization.contains(&token), "the server's own token is the only one");
    }
}

#[tokio::test]
async fn without_keys_callers_are_told_to_wait_and_the_server_is_not_ready() {
    let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
    stand_ins.entra.set_fault([FaultRule::status(503).on(&format!("GET /{TENANT_ID}/discovery"))]);
    let app = TestApp::spawn_against(stand_ins, |settings| {
        settings.inbound = InboundAuth::Entra(Box::new(inbound(&settings.identity.tenant_id)));
    })
    .await;
    app.stand_ins.entra.key_request_count().reaches(1).await;
    app.stand_ins.entra.token_request_count().reaches(1).await;
    for era in Era::ALL {
        let answer = app.send_as(&app.token(DemoCaller::Reader), era, "tools/list", json!({})).await;
        assert_eq!((answer.status().as_u16(), &answer.headers()["retry-after"]), (503, &"2".parse().unwrap()));
        assert!(answer.headers().get("www-authenticate").is_none());
        let body: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
        let body = error_object(&body);
        assert_eq!((&body["error"], &body["details"]["retryable"]), (&json!("SERVICE_ERROR"), &json!(true)));
        // Whoever has no token at all is told so: that needs no key.
        assert_eq!(app.send(era, "tools/list", json!({})).await.status(), 401);
    }
    let ready = app.http.get(app.url("/health/ready")).send().await.unwrap();
    assert_eq!(ready.status(), 503);
    assert!(ready.text().await.unwrap().contains(r#""azure_auth":"unhealthy""#));
}

#[tokio::test]
async fn a_rotated_key_counts_at_once_and_made_up_ones_cause_no_fetches() {
    let app = TestApp::guarded_with(|_| {}, |settings| settings.web.rate_limit.refused_tokens = 0.0).await;
    let (entra, era) = (&app.stand_ins.entra, Era::Modern);
    let old = app.token(DemoCaller::Reader);
    let status = async |token: &str| app.send_as(token, era, "tools/list", json!({})).await.status().as_u16();
    assert_eq!((status(&old).await, entra.key_request_count().get()), (200, 1));
    entra.rotate_keys().await.unwrap();
    let new = app.token(DemoCaller::Reader);
    let calls = futures_util::future::join_all((0..20).map(|_| status(&new))).await;
    assert_eq!((calls, entra.key_request_count().get()), (vec![200; 20], 2), "one fetch for all who wait");
    assert_eq!(status(&old).await, 200, "the key before it is still published");
    for number in 0..200 {
        let header = json!({ "kid": format!("made-up-{number}") });
        let token = entra.sign(&header, &entra.caller_claims(DemoCaller::Reader, &json!({})));
        assert_eq!(status(&token).await, 401);
    }
    entra.replace_keys().await.unwrap();
    assert_eq!(status(&app.token(DemoCaller::Reader)).await, 401, "not again within five minutes");
    assert_eq!((status(&new).await, entra.key_request_count().get()), (200, 2));
}

#[tokio::test]
async fn few_wait_for_keys_that_do_not_come_and_known_ones_need_not() {
    let app = TestApp::guarded().await;
    let (entra, era) = (&app.stand_ins.entra, Era::Modern);
    let good = app.token(DemoCaller::Reader);
    let made_up = entra.sign(&json!({ "kid": "made-up" }), &entra.caller_claims(DemoCaller::Reader, &json!({})));
    entra.set_fault([FaultRule::hang().on(&format!("GET /{TENANT_ID}/discovery"))]);
    let asks = (0..100).map(|_| app.send_as(&made_up, era, "tools/list", json!({})));
    let asks: futures_util::stream::FuturesUnordered<_> = asks.collect();
    // Those that do not wait are the first to be answered.
    let at_once: Vec<_> = asks.take(36).collect().await;
    for answer in at_once {
        assert_eq!((answer.status().as_u16(), &answer.headers()["retry-after"]), (503, &"2".parse().unwrap()));
        assert!(answer.headers().get("www-authenticate").is_none());
        let body: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
        let body = error_object(&body);
        assert_eq!((&body["error"], &body["details"]["retryable"]), (&json!("SERVICE_ERROR"), &json!(true)));
    }
    assert_eq!(app.send_as(&good, era, "tools/list", json!({})).await.status(), 200);
    assert_eq!(app.metric(r#"mcp_server_callers_refused_total{reason="keys_awaited"}"#).await, 36.0);
    assert_eq!(entra.key_request_count().get(), 2);
}

#[tokio::test]
async fn a_key_for_another_issuer_signs_nothing_here_and_odd_keys_spoil_nothing() {
    let genuine = {
        let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
        let app = TestApp::spawn_against(stand_ins, |_| {}).await;
        app.stand_ins.clone()
    };
    let authority = genuine.entra.authority();
    let http = reqwest::Client::builder()
        .tls_certs_merge(reqwest::Certificate::from_pem_bundle(genuine.entra.ca_pem().as_bytes()).unwrap())
        .no_proxy()
        .build()
        .unwrap();
    let keys = authority.join(&format!("{TENANT_ID}/discovery/v2.0/keys")).unwrap();
    let document: Value = serde_json::from_str(&http.get(keys).send().await.unwrap().text().await.unwrap()).unwrap();
    let key = &document["keys"][0];
    let with = |name: &str, value: Value| {
        let mut key = key.clone();
        key[name] = value;
        if key[name].is_null() {
            key.as_object_mut().unwrap().remove(name);
        }
        key
    };
    let template = format!("{}{{tenantid}}/v2.0", authority);
    let odd = [
        json!(null),
        json!({}),
        json!({ "kty": "EC", "crv": "P-256", "x": "AA", "y": "AA", "kid": "ec" }),
        json!({ "kty": "oct", "k": "AAAA", "kid": key["kid"] }),
        json!({ "kty": "RSA", "n": 7, "e": [], "kid": "numbers" }),
        with("n", json!("AQAB")),
        with("use", json!("enc")),
        with("alg", json!("RS512")),
        with("kid", json!(null)),
    ];
    for (name, entries, status) in [
        ("as it is", vec![key.clone()], 200),
        ("for the template", vec![with("issuer", json!(template))], 200),
        ("for nobody in particular", vec![with("issuer", json!(null))], 200),
        ("for another tenant", vec![with("issuer", json!(format!("{authority}{OTHER_TENANT}/v2.0")))], 401),
        ("for the real Entra", vec![with("issuer", json!("https://login.microsoftonline.com/{tenantid}/v2.0"))], 401),
        ("among odd ones", [&odd[..], std::slice::from_ref(key)].concat(), 200),
        ("only odd ones", odd.to_vec(), 503),
        ("an empty list", vec![], 503),
    ] {
        let body = json!({ "keys": entries }).to_string();
        let rule = FaultRule::status(200).header("content-type", "application/json").body(body);
        genuine.entra.set_fault([rule.on(&format!("GET /{TENANT_ID}/discovery"))]);
        let fetched = genuine.entra.key_request_count().get();
        let app = TestApp::spawn_against(genuine.clone(), |settings| {
            settings.inbound = InboundAuth::Entra(Box::new(inbound(&settings.identity.tenant_id)));
        })
        .await;
        genuine.entra.key_request_count().reaches(fetched + 1).await;
        if status != 503 {
            app.until_ready().await;
        }
        let answer = app.send_as(&app.token(DemoCaller::Reader), Era::Modern, "tools/list", json!({})).await;
        assert_eq!(answer.status(), status, "{name}");
    }
}

#[tokio::test]
async fn a_refused_request_leaves_its_connection_to_the_next_one() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    let app = TestApp::guarded().await;
    let body = r#"{"jsonrpc":"2.0","id":1,"method":"tools/list"}"#;
    let head = |connection: &str| {
        format!(
            "POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: {connection}\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        )
    };
    let mut stream = tokio::net::TcpStream::connect(app.address).await.unwrap();
    stream.write_all(head("keep-alive").as_bytes()).await.unwrap();
    // As clients do that write head and body one after the other. An answer before the body is there would end the connection
    // when the body comes, under the client's next request.
    let early = tokio::time::timeout(Duration::from_millis(100), stream.readable()).await;
    assert!(early.is_err(), "nothing is answered before the body has come");
    stream.write_all(body.as_bytes()).await.unwrap();
    let mut first = [0; 12];
    stream.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1 401");
    stream.write_all(format!("{}{body}", head("close")).as_bytes()).await.unwrap();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest.matches("HTTP/1.1 401").count(), 1, "{rest}");

    // What never comes is not waited for, and what is too much is not read: then the connection ends with the answer.
    let slow = app.raw(head("keep-alive")).await;
    assert!(slow.status == 401 && slow.head.to_lowercase().contains("connection: close"), "{slow:?}");
    let much = format!("{}{}", head("keep-alive").replace(&body.len().to_string(), "200000"), "x".repeat(150_000));
    let much = app.raw(much).await;
    assert!(much.status == 401 && much.head.to_lowercase().contains("connection: close"), "{much:?}");
}
