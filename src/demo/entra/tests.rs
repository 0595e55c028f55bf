use azure_core::cloud::CustomConfiguration;
use azure_core::credentials::TokenCredential;
use azure_core::http::{ClientOptions, RetryOptions, Transport};
use azure_identity::{
    ClientAssertionCredentialOptions, ClientSecretCredential, ClientSecretCredentialOptions,
    WorkloadIdentityCredential, WorkloadIdentityCredentialOptions,
};
use reqwest::Certificate;

use super::super::wire::unix_now;
use super::*;

/// A client that trusts the stand-in alone.
struct Client<'a>(&'a StandInEntra, reqwest::Client);

impl<'a> Client<'a> {
    fn new(entra: &'a StandInEntra) -> Self {
        let ca = Certificate::from_pem(entra.ca_pem().as_bytes()).unwrap();
        let client = reqwest::Client::builder().tls_certs_only([ca]).no_proxy();
        Self(entra, client.timeout(Duration::from_secs(20)).build().unwrap())
    }

    async fn ask(&self, form: &[(&str, &str)]) -> (u16, Value) {
        let response = self.post(TENANT_ID, form).await.unwrap();
        (response.status().as_u16(), serde_json::from_slice(&response.bytes().await.unwrap()).unwrap())
    }

    async fn post(&self, tenant: &str, form: &[(&str, &str)]) -> reqwest::Result<reqwest::Response> {
        let url = self.0.authority().join(&format!("{tenant}/oauth2/v2.0/token?unknown=1")).unwrap();
        let body = form_urlencoded::Serializer::new(String::new()).extend_pairs(form).finish();
        let request = self.1.post(url).header(CONTENT_TYPE, "application/x-www-form-urlencoded;charset=utf-8");
        request.header("client-request-id", "11111111-2222-4333-8444-555555555555").body(body).send().await
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        let response = self.1.get(self.0.authority().join(path).unwrap()).send().await.unwrap();
        (response.status().as_u16(), serde_json::from_slice(&response.bytes().await.unwrap()).unwrap())
    }
}

fn with_secret<'a>(changes: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let form = [
        ("client_id", CLIENT_ID),
        ("client_secret", CLIENT_SECRET),
        ("grant_type", "client_credentials"),
        ("scope", SCOPE),
        ("client_info", "1"),
    ];
    changed(&form, changes)
}

fn with_assertion(assertion: &str) -> Vec<(&str, &str)> {
    let proof = [
        ("client_assertion", assertion),
        ("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"),
    ];
    let mut form = with_secret(&proof);
    form.retain(|(name, _)| *name != "client_secret");
    form
}

/// The form with some fields set to another value; `-` takes a field away.
fn changed<'a>(form: &[(&'a str, &'a str)], changes: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let kept = form.iter().filter(|(name, _)| !changes.iter().any(|(changed, _)| changed == name));
    kept.chain(changes.iter().filter(|(_, value)| *value != "-")).copied().collect()
}

async fn start() -> StandInEntra {
    StandInEntra::start(EntraOptions::default()).await.unwrap()
}

#[tokio::test]
async fn a_secret_and_an_assertion_each_buy_a_token_that_the_published_keys_verify() {
    let entra = start().await;
    let client = Client::new(&entra);
    let assertion = entra.service_account_token(&json!({}));
    for (form, acr) in [(with_secret(&[]), "1"), (with_assertion(&assertion), "2")] {
        let (status, answer) = client.ask(&form).await;
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["token_type"], "Bearer");
        assert_eq!(answer["expires_in"], 3599);

        let (_, configuration) = client.get(&format!("{TENANT_ID}/v2.0/.well-known/openid-configuration")).await;
        let keys = configuration["jwks_uri"].as_str().unwrap().strip_prefix(entra.authority().as_str()).unwrap();
        let (_, keys) = client.get(keys).await;
        assert!(keys["keys"][0].get("alg").is_none());
        let keys: jsonwebtoken::jwk::JwkSet = serde_json::from_value(keys).unwrap();
        let token = answer["access_token"].as_str().unwrap();
        let header = jsonwebtoken::decode_header(token).unwrap();
        let key = jsonwebtoken::DecodingKey::from_jwk(keys.find(&header.kid.unwrap()).unwrap()).unwrap();
        let mut rules = jsonwebtoken::Validation::new(jsonwebtoken::Algorithm::RS256);
        rules.set_audience(&[RESOURCE_APP_ID]);
        rules.set_issuer(&[configuration["issuer"].as_str().unwrap()]);
        let claims = jsonwebtoken::decode::<Value>(token, &key, &rules).unwrap().claims;
        for (claim, value) in [
            ("ver", "2.0"),
            ("tid", TENANT_ID),
            ("azp", CLIENT_ID),
            ("azpacr", acr),
            ("oid", claims["sub"].as_str().unwrap()),
        ] {
            assert_eq!(claims[claim], value, "{claim}");
        }
        assert_eq!(claims["roles"], json!([ROLE]));
        assert!(claims.get("scp").is_none());
        assert_eq!(serde_json::to_value(entra.verifier().verify(token).unwrap()).unwrap(), claims);
    }
    let (_, cluster) = client.get("cluster/.well-known/openid-configuration").await;
    assert!(cluster["issuer"].as_str().unwrap().ends_with("/cluster/"));
    assert_eq!(client.get("cluster/openid/v1/jwks").await.1["keys"][0]["alg"], "RS256");
}

#[tokio::test]
async fn the_official_client_for_rust_gets_tokens() {
    let entra = start().await;
    let mut cloud = CustomConfiguration::default();
    cloud.authority_host = entra.authority().to_string();
    let options = ClientOptions {
        transport: Some(Transport::new(Arc::new(Client::new(&entra).1))),
        retry: RetryOptions::none(),
        cloud: Some(Arc::new(cloud.into())),
        ..ClientOptions::default()
    };
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), entra.service_account_token(&json!({}))).unwrap();
    let workload_identity = WorkloadIdentityCredentialOptions {
        credential_options: ClientAssertionCredentialOptions { client_options: options.clone() },
        client_id: Some(CLIENT_ID.into()),
        tenant_id: Some(TENANT_ID.into()),
        token_file_path: Some(file.path().to_owned()),
    };
    let secret = |secret: &str| {
        let options = ClientSecretCredentialOptions { client_options: options.clone() };
        ClientSecretCredential::new(TENANT_ID, CLIENT_ID.into(), secret.to_owned().into(), Some(options)).unwrap()
    };
    let credentials: [Arc<dyn TokenCredential>; 2] =
        [secret(CLIENT_SECRET), WorkloadIdentityCredential::new(Some(workload_identity)).unwrap()];
    for credential in credentials {
        let token = credential.get_token(&[SCOPE], None).await.unwrap();
        assert!(entra.verifier().verify(token.token.secret()).is_ok());
    }
    let error = secret("wrong").get_token(&[SCOPE], None).await.unwrap_err();
    assert!(error.to_string().contains("AADSTS7000215"), "{error}");
}

#[tokio::test]
async fn a_version_1_resource_gets_version_1_tokens() {
    let entra = start().await;
    let scope = [("scope", "https://management.azure.com/.default")];
    let (_, answer) = Client::new(&entra).ask(&with_secret(&scope)).await;
    let token = answer["access_token"].as_str().unwrap();
    let claims = keys::Jws::parse(token).unwrap().claims;
    for (claim, value) in
        [("aud", "https://management.azure.com"), ("ver", "1.0"), ("appid", CLIENT_ID), ("appidacr", "1")]
    {
        assert_eq!(claims[claim], value, "{claim}");
    }
    assert_eq!(claims["iss"], format!("https://sts.windows.net/{TENANT_ID}/"));
    assert_eq!(entra.verifier().verify(token), Err(TokenRejected::Audience));
}

#[tokio::test]
async fn every_mistake_in_a_request_gets_entras_answer() {
    let entra = start().await;
    let client = Client::new(&entra);
    for (changes, status, error, aadsts) in [
        ([("grant_type", "-")], 400, "invalid_request", 900_144),
        ([("grant_type", "password")], 400, "unsupported_grant_type", 70003),
        ([("client_id", "-")], 400, "invalid_request", 900_144),
        ([("client_id", TENANT_ID)], 400, "unauthorized_client", 700_016),
        ([("client_secret", "-")], 401, "invalid_client", 7_000_216),
        ([("client_secret", "")], 401, "invalid_client", 7_000_218),
        ([("client_secret", "wrong")], 401, "invalid_client", 7_000_215),
        ([("client_secret", EXPIRED_CLIENT_SECRET)], 401, "invalid_client", 7_000_222),
        ([("scope", "-")], 400, "invalid_request", 900_144),
        ([("scope", "api://mcp-demo-backend/read\"")], 400, "invalid_scope", 70011),
        ([("scope", RESOURCE)], 400, "invalid_scope", 1_002_012),
        ([("scope", "/.default")], 400, "invalid_scope", 1_002_012),
        (
            [("scope", "api://mcp-demo-backend/.default https://management.azure.com/.default")],
            400,
            "invalid_scope",
            700_022,
        ),
        ([("scope", "api://nobody/.default")], 400, "invalid_resource", 500_011),
    ] {
        let response = client.post(TENANT_ID, &with_secret(&changes)).await.unwrap();
        expect_refusal(response, status, error, aadsts, &format!("{changes:?}")).await;
    }
    let response = client.post("contoso.example", &with_secret(&[])).await.unwrap();
    expect_refusal(response, 400, "invalid_request", 90002, "tenant").await;
    let (status, answer) = client.get("contoso.example/v2.0/.well-known/openid-configuration").await;
    assert_eq!((status, &answer["error"], &answer["error_codes"][0]), (400, &json!("invalid_tenant"), &json!(90002)));
}

#[tokio::test]
async fn every_mistake_in_an_assertion_gets_entras_answer() {
    let entra = start().await;
    let client = Client::new(&entra);
    let now = unix_now();
    let good = entra.service_account_token(&json!({}));
    let token = |changes: Value| entra.service_account_token(&changes);
    let stranger = entra.sign(&json!({}), &Value::Object(keys::Jws::parse(&good).unwrap().claims));
    let mut tampered = good.clone();
    tampered.replace_range(tampered.len() - 8..tampered.len() - 4, "AAAA");
    for (assertion, status, error, aadsts) in [
        ("no token".into(), 400, "invalid_request", 50027),
        (format!("{good}\n"), 400, "invalid_request", 50013),
        (tampered, 400, "invalid_request", 50013),
        (stranger, 400, "invalid_request", 5_000_811),
        (token(json!({ "exp": null })), 400, "invalid_request", 50027),
        (token(json!({ "iss": entra.authority().as_str() })), 401, "invalid_client", 700_211),
        (token(json!({ "aud": ["https://kubernetes.default.svc"] })), 401, "invalid_client", 700_212),
        (token(json!({ "sub": "system:serviceaccount:default:default" })), 401, "invalid_client", 700_213),
        (token(json!({ "sub": SERVICE_ACCOUNT.to_uppercase() })), 401, "invalid_client", 7_002_138),
        (token(json!({ "iat": null })), 401, "invalid_client", 70023),
        (token(json!({ "exp": now + 26 * 3600 })), 401, "invalid_client", 70023),
        (token(json!({ "iat": now - 4000, "exp": now - 400 })), 401, "invalid_client", 700_024),
        (token(json!({ "nbf": now + 400 })), 401, "invalid_client", 700_024),
    ] {
        let response = client.post(TENANT_ID, &with_assertion(&assertion)).await.unwrap();
        expect_refusal(response, status, error, aadsts, &assertion).await;
    }
    let within_skew = token(json!({ "iat": now - 4000, "nbf": now + 100, "exp": now - 200 }));
    assert_eq!(client.ask(&with_assertion(&within_skew)).await.0, 200);
}

async fn expect_refusal(response: reqwest::Response, status: u16, error: &str, aadsts: u32, case: &str) {
    assert_eq!(response.status().as_u16(), status, "{case}");
    let headers = response.headers().clone();
    let body: Value = serde_json::from_slice(&response.bytes().await.unwrap()).unwrap();
    assert_eq!((&body["error"], &body["error_codes"]), (&json!(error), &json!([aadsts])), "{case}: {body}");
    assert_eq!(body["correlation_id"], "11111111-2222-4333-8444-555555555555");
    assert_eq!(headers["client-request-id"], "11111111-2222-4333-8444-555555555555");
    assert_eq!(headers["x-ms-request-id"], body["trace_id"].as_str().unwrap());
    assert!(headers[CACHE_CONTROL].to_str().unwrap().contains("no-store"));
    let description = body["error_description"].as_str().unwrap();
    assert!(description.starts_with(&format!("AADSTS{aadsts}: ")), "{description}");
    let ids = format!(
        " Trace ID: {} Correlation ID: {} Timestamp: {}",
        body["trace_id"].as_str().unwrap(),
        body["correlation_id"].as_str().unwrap(),
        body["timestamp"].as_str().unwrap()
    );
    assert!(description.ends_with(&ids), "{description}");
}

#[tokio::test]
async fn rotation_keeps_the_old_key_and_replacement_does_not() {
    let entra = start().await;
    let client = Client::new(&entra);
    let verifier = entra.verifier();
    let old = entra.access_token(&json!({}));
    entra.rotate_keys().await.unwrap();
    let new = entra.access_token(&json!({}));
    assert!(verifier.verify(&old).is_ok() && verifier.verify(&new).is_ok());
    assert_eq!(client.get("common/discovery/keys").await.1["keys"].as_array().unwrap().len(), 2);
    entra.replace_keys().await.unwrap();
    assert_eq!(verifier.verify(&old), Err(TokenRejected::UnknownKey));
    assert_eq!(verifier.verify(&new), Err(TokenRejected::UnknownKey));
    assert_eq!(client.get(&format!("{TENANT_ID}/discovery/v2.0/keys")).await.1["keys"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn the_verifier_tells_why() {
    let entra = start().await;
    let verifier = entra.verifier();
    let claims = Value::Object(keys::Jws::parse(&entra.access_token(&json!({}))).unwrap().claims);
    let good = entra.sign(&json!({}), &claims);
    for (token, why) in [
        ("x.y".to_owned(), TokenRejected::Malformed),
        (good.replacen("eyJ", "eyK", 1), TokenRejected::Malformed),
        (format!("{}AAAA", &good[..good.len() - 4]), TokenRejected::Signature),
        (entra.sign(&json!({ "alg": "none" }), &claims), TokenRejected::UnknownKey),
        (entra.sign(&json!({ "alg": "HS256" }), &claims), TokenRejected::UnknownKey),
        (entra.sign(&json!({ "kid": "other" }), &claims), TokenRejected::UnknownKey),
        (entra.access_token(&json!({ "iss": "https://login.example" })), TokenRejected::Issuer),
        (entra.access_token(&json!({ "aud": "api://other" })), TokenRejected::Audience),
        (entra.access_token(&json!({ "exp": unix_now() - 1 })), TokenRejected::Expired),
        (entra.access_token(&json!({ "exp": null })), TokenRejected::Expired),
        (entra.access_token(&json!({ "nbf": unix_now() + 60 })), TokenRejected::NotYetValid),
    ] {
        assert_eq!(verifier.verify(&token), Err(why), "{token}");
    }
}

#[tokio::test]
async fn requests_are_logged_without_their_secrets() {
    let entra = start().await;
    let client = Client::new(&entra);
    let assertion = entra.service_account_token(&json!({}));
    client.ask(&with_secret(&[])).await;
    client.ask(&with_assertion(&assertion)).await;
    let log = entra.token_requests();
    assert_eq!((log.len(), entra.token_request_count().get()), (2, 2));
    assert_eq!(log[0].target, format!("/{TENANT_ID}/oauth2/v2.0/token?unknown=1"));
    assert_eq!(log[0].status, Some(StatusCode::OK));
    assert_eq!(log[0].field("scope"), Some(SCOPE));
    assert_eq!(log[1].field("client_assertion"), Some(digest(&assertion).as_str()));
    let shown = format!("{log:?}");
    assert!(!shown.contains(CLIENT_SECRET) && !shown.contains(&assertion));
}

#[tokio::test]
async fn it_can_be_throttled_slow_dead_or_down() {
    let entra = start().await;
    let client = Client::new(&entra);
    let form = with_secret(&[]);

    entra.set_fault([FaultRule::status(429).times(1)]);
    let throttled = client.post(TENANT_ID, &form).await.unwrap();
    assert_eq!(
        (throttled.status().as_u16(), &throttled.headers()[RETRY_AFTER]),
        (429, &HeaderValue::from_static("60"))
    );
    assert_eq!(throttled.text().await.unwrap(), "Too Many Requests");
    assert_eq!(client.ask(&form).await.0, 200);

    entra.set_fault([FaultRule::status(503)]);
    let (status, body) = client.ask(&form).await;
    assert_eq!((status, &body["error_codes"][0]), (503, &json!(90033)));

    entra.set_fault([FaultRule::status(502).header("content-type", "text/html").body("<html>")]);
    assert_eq!(client.post(TENANT_ID, &form).await.unwrap().text().await.unwrap(), "<html>");

    entra.set_fault([FaultRule::hang()]);
    let waiting = tokio::time::timeout(Duration::from_millis(300), client.post(TENANT_ID, &form));
    assert!(waiting.await.is_err());
    entra.cancelled_count().reaches(1).await;

    entra.set_fault(None);
    entra.set_line_breaks(true);
    let (_, body) = client.ask(&with_secret(&[("client_secret", "wrong")])).await;
    assert!(body["error_description"].as_str().unwrap().contains("\r\nTrace ID"));

    entra.set_down(true).await.unwrap();
    assert!(client.post(TENANT_ID, &form).await.unwrap_err().is_connect());
    entra.set_down(false).await.unwrap();
    entra.set_token_lifetime(Duration::from_secs(86_400));
    let (_, body) = client.ask(&form).await;
    assert_eq!((&body["expires_in"], &body["refresh_in"]), (&json!(86_400), &json!(43_200)));
}

const API: &str = "https://mcp.contoso.example/mcp";
const VERIFIER: &str = "a-verifier-of-forty-three-characters-or-more-0";
const CALLBACK: &str = "http://localhost:1234/callback";

/// The parameters of an honest `/authorize`, with some changed; `-` takes one away.
async fn authorize(client: &Client<'_>, changes: &[(&str, &str)]) -> (u16, Form) {
    use base64::Engine as _;
    use sha2::Digest as _;
    let challenge = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(sha2::Sha256::digest(VERIFIER));
    let scope = format!("{API}/users.read {API}/tickets.write openid offline_access");
    let honest = [
        ("client_id", PEOPLES_CLIENT_ID),
        ("response_type", "code"),
        ("redirect_uri", CALLBACK),
        ("state", "xyz"),
        ("scope", &*scope),
        ("resource", API),
        ("code_challenge", &*challenge),
        ("code_challenge_method", "S256"),
    ];
    let url = client.0.authority().join(&format!("{TENANT_ID}/oauth2/v2.0/authorize")).unwrap();
    let url = Url::parse_with_params(url.as_str(), changed(&honest, changes)).unwrap();
    let ca = Certificate::from_pem(client.0.ca_pem().as_bytes()).unwrap();
    let browser =
        reqwest::Client::builder().tls_certs_only([ca]).no_proxy().redirect(reqwest::redirect::Policy::none());
    let answer = browser.build().unwrap().get(url).send().await.unwrap();
    let to = answer.headers().get("location").map(|to| Url::parse(to.to_str().unwrap()).unwrap());
    let pairs = to.map(|to| to.query_pairs().into_owned().collect()).unwrap_or_default();
    (answer.status().as_u16(), pairs)
}

fn of<'a>(form: &'a Form, name: &str) -> &'a str {
    form.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str()).unwrap_or_default()
}

fn claims_of(token: &Value) -> Value {
    use base64::Engine as _;
    let claims = token.as_str().unwrap().split('.').nth(1).unwrap();
    serde_json::from_slice(&base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(claims).unwrap()).unwrap()
}

#[tokio::test]
async fn a_person_signs_in_with_a_code_that_is_good_once_and_for_whoever_asked() {
    let entra = start().await;
    entra.publish_api([API.to_owned()]);
    let client = Client::new(&entra);
    let (status, to) = authorize(&client, &[("login_hint", "reader@mcp-demo.onmicrosoft.com")]).await;
    assert_eq!((status, of(&to, "state")), (302, "xyz"));
    let code = of(&to, "code").to_owned();
    let form = [
        ("grant_type", "authorization_code"),
        ("client_id", PEOPLES_CLIENT_ID),
        ("code", &*code),
        ("redirect_uri", CALLBACK),
        ("code_verifier", VERIFIER),
        ("resource", API),
    ];
    let (status, answer) = client.ask(&form).await;
    assert_eq!(status, 200, "{answer}");
    // The reader may not write, whatever was asked for.
    assert_eq!(answer["scope"], format!("{API}/users.read"));
    let claims = claims_of(&answer["access_token"]);
    assert_eq!(
        (&claims["scp"], &claims["aud"], &claims["azp"]),
        (&json!("users.read"), &json!(API_APP_ID), &json!(PEOPLES_CLIENT_ID))
    );
    assert_eq!(claims["oid"], DemoCaller::Reader.object_id());
    let id = claims_of(&answer["id_token"]);
    assert_eq!((&id["aud"], id.get("azp"), id.get("scp")), (&json!(PEOPLES_CLIENT_ID), None, None));
    assert_eq!(client.ask(&form).await.1["error_codes"], json!([70008]), "a code is good once");

    let refresh = answer["refresh_token"].as_str().unwrap();
    let again = [("grant_type", "refresh_token"), ("client_id", PEOPLES_CLIENT_ID), ("refresh_token", refresh)];
    let (status, answer) = client.ask(&again).await;
    assert_eq!((status, claims_of(&answer["access_token"])["scp"].clone()), (200, json!("users.read")), "{answer}");

    for (changes, aadsts) in [
        (&[("code_verifier", "another")][..], 501_481),
        (&[("code_verifier", "-")], 501_481),
        (&[("redirect_uri", "http://localhost:1/")], 500_112),
        (&[("client_id", "aebc6443-996d-45c2-90f0-388ff96faa56")], 70008),
        (&[("client_id", "00000000-0000-0000-0000-000000000000")], 700_016),
        (&[("resource", "https://mcp.contoso.example/mcp/")], 9_010_010),
        (&[("code", "made-up")], 70008),
    ] {
        let code = of(&authorize(&client, &[]).await.1, "code").to_owned();
        let honest = changed(&form, &[("code", &code)]);
        let (status, answer) = client.ask(&changed(&honest, changes)).await;
        assert_eq!((status, &answer["error_codes"]), (400, &json!([aadsts])), "{changes:?}: {answer}");
    }
}

#[tokio::test]
async fn who_asks_wrongly_is_told_as_entra_tells_it() {
    let entra = start().await;
    entra.publish_api([API.to_owned()]);
    let client = Client::new(&entra);
    for (changes, aadsts) in [
        (&[("scope", "users.read")][..], "AADSTS650053"),
        (&[("scope", "https://mcp.contoso.example/mcp/users.fly")], "AADSTS650053"),
        (&[("scope", "api://other/users.read")], "AADSTS500011"),
        (&[("resource", "https://mcp.contoso.example/mcp/")], "AADSTS9010010"),
        (&[("resource", "https://mcp.contoso.example")], "AADSTS9010010"),
        (&[("response_type", "token")], "AADSTS700051"),
        (&[("code_challenge_method", "plain")], "AADSTS501491"),
    ] {
        let (status, to) = authorize(&client, changes).await;
        assert!(status == 302 && of(&to, "error_description").starts_with(aadsts), "{changes:?}: {to:?}");
        assert_eq!(of(&to, "state"), "xyz");
    }
    // Nobody is sent to an address that the client did not register, nor by a client that does not exist.
    for changes in [[("redirect_uri", "https://evil.example/")], [("client_id", "x")]] {
        assert_eq!(authorize(&client, &changes).await, (400, Vec::new()));
    }
    let (status, metadata) = client.get(&format!("{TENANT_ID}/v2.0/.well-known/openid-configuration")).await;
    assert_eq!(status, 200);
    assert_eq!(metadata.get("registration_endpoint").or(metadata.get("code_challenge_methods_supported")), None);
}

/// A user's token for the server, as a client of theirs got it.
fn users_token(entra: &StandInEntra, changes: &Value) -> String {
    let mut claims = json!({
        "aud": CLIENT_ID, "oid": "11111111-aaaa-4bbb-8ccc-dddddddddddd", "sub": "pairwise", "scp": "users.read", "roles": null,
        "azp": "22222222-aaaa-4bbb-8ccc-dddddddddddd", "name": "A user",
    });
    keys::overlay(&mut claims, changes);
    entra.access_token(&claims)
}

fn on_behalf_of<'a>(assertion: &'a str, changes: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let form = with_secret(&[
        ("grant_type", "urn:ietf:params:oauth:grant-type:jwt-bearer"),
        ("requested_token_use", "on_behalf_of"),
        ("assertion", assertion),
    ]);
    changed(&form, changes)
}

#[tokio::test]
async fn a_users_token_buys_one_in_the_users_name_for_the_app_that_it_is_for() {
    let entra = start().await;
    let client = Client::new(&entra);
    let (token, federated) = (users_token(&entra, &json!({})), entra.service_account_token(&json!({})));
    let with_file: Vec<_> =
        with_assertion(&federated).into_iter().filter(|(name, _)| name.contains("client_ass")).collect();
    for changes in [
        &[][..],
        &[("client_secret", "-"), with_file[0], with_file[1]],
        &[("scope", "openid profile offline_access api://mcp-demo-backend/access_as_user")],
    ] {
        let (status, answer) = client.ask(&on_behalf_of(&token, changes)).await;
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["scope"], "api://mcp-demo-backend/access_as_user");
        let claims = entra.verifier().verify(answer["access_token"].as_str().unwrap()).unwrap();
        assert_eq!(
            (&claims["oid"], &claims["name"]),
            (&json!("11111111-aaaa-4bbb-8ccc-dddddddddddd"), &json!("A user"))
        );
        assert_eq!((&claims["azp"], &claims["scp"]), (&json!(CLIENT_ID), &json!(USER_SCOPE)));
        assert!(claims.get("roles").is_none());
        assert_eq!(
            answer.get("id_token").is_some(),
            changes.first().is_some_and(|(name, _)| *name == "scope"),
            "{answer}"
        );
    }
    let logged = entra.token_requests();
    assert!(!format!("{logged:?}").contains(&token), "the log holds digests only");
}

#[tokio::test]
async fn what_cannot_be_exchanged_is_refused_as_entra_refuses_it() {
    let entra = start().await;
    let client = Client::new(&entra);
    let good = users_token(&entra, &json!({}));
    let token = |changes: Value| users_token(&entra, &changes);
    let (head, _) = good.rsplit_once('.').unwrap();
    let forged = format!("{head}.{}", "A".repeat(342));
    let hour_ago = unix_now() - 3_600;
    for (form, status, error, code) in [
        (on_behalf_of(&good, &[("assertion", "-")]), 400, "invalid_request", 900_144),
        (on_behalf_of(&good, &[("requested_token_use", "-")]), 400, "invalid_request", 900_144),
        (on_behalf_of(&good, &[("requested_token_use", "else")]), 400, "invalid_request", 90_014),
        (on_behalf_of(&good, &[("client_secret", "wrong")]), 401, "invalid_client", 7_000_215),
        (on_behalf_of(&good, &[("scope", "-")]), 400, "invalid_request", 900_144),
        (on_behalf_of(&good, &[("scope", "api://mcp-demo-backend/everything")]), 400, "invalid_grant", 65_001),
        (on_behalf_of(&good, &[("scope", "api://a/.default api://b/.default")]), 400, "invalid_scope", 700_022),
        (on_behalf_of(&good, &[("scope", "api://nobody/.default")]), 400, "invalid_resource", 500_011),
        (on_behalf_of("garbage", &[]), 400, "invalid_request", 50_027),
        (on_behalf_of(&forged, &[]), 400, "invalid_grant", 50_013),
        (on_behalf_of(&token(json!({ "iss": "https://else.example" })), &[]), 400, "invalid_grant", 50_013),
        (on_behalf_of(&token(json!({ "aud": RESOURCE_APP_ID })), &[]), 400, "invalid_grant", 500_131),
        (on_behalf_of(&token(json!({ "exp": hour_ago })), &[]), 400, "invalid_grant", 500_133),
        (
            on_behalf_of(&token(json!({ "scp": null, "roles": ["users.read"] })), &[]),
            400,
            "unauthorized_client",
            7_000_114,
        ),
    ] {
        let (answered, answer) = client.ask(&form).await;
        assert_eq!((answered, &answer["error"]), (status, &json!(error)), "{answer}");
        assert_eq!(answer["error_codes"], json!([code]), "{answer}");
        assert!(answer.get("claims").is_none());
    }
}

#[tokio::test]
async fn a_demanded_context_is_asked_of_the_user_in_claims() {
    let entra = start().await;
    let client = Client::new(&entra);
    entra.demand_context(Some("c1"));
    let (status, answer) = client.ask(&on_behalf_of(&users_token(&entra, &json!({})), &[])).await;
    assert_eq!((status, &answer["error"]), (400, &json!("interaction_required")), "{answer}");
    let claims: Value = serde_json::from_str(answer["claims"].as_str().unwrap()).unwrap();
    assert_eq!(claims["access_token"]["acrs"], json!({ "essential": true, "value": "c1" }));
    let met = users_token(&entra, &json!({ "acrs": ["c1"] }));
    assert_eq!(client.ask(&on_behalf_of(&met, &[])).await.0, 200);
}
