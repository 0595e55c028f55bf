//! `mcp-server check`, by the real binary, against set-ups that are right and set-ups that are wrong in one way each: the right
//! step fails with the right advice, what depends on it is skipped, and nothing else is called wrong.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use mcp_server::demo::entra::{
    API_APP_ID, CLIENT_ID, CLIENT_SECRET, EXPIRED_CLIENT_SECRET, EntraOptions, RESOURCE_APP_ID, ROLE, SCOPE, TENANT_ID,
};
use mcp_server::demo::fault::FaultRule;
use mcp_server::demo::{DemoOptions, StandIns};
use serde_json::{Value, json};
use tempfile::TempDir;

const TOKEN_REQUESTS: &str = "POST /";
const STEPS: [&str; 14] = [
    "settings",
    "credential",
    "token_file",
    "dns",
    "tcp",
    "tls",
    "clock",
    "token",
    "scope",
    "backend",
    "health",
    "hosts",
    "callers",
    "sign_in",
];

/// What is skipped when this step fails.
fn dependents(failed: &str) -> &'static [&'static str] {
    match failed {
        "settings" => &STEPS[1..],
        "token_file" => &["token", "scope", "backend", "health"],
        "dns" => &["tcp", "tls", "clock", "token", "scope", "backend", "health"],
        "tcp" => &["tls", "clock", "token", "scope", "backend", "health"],
        "tls" => &["clock", "token", "scope", "backend", "health"],
        "token" => &["scope", "backend", "health"],
        "backend" => &["health"],
        _ => &[],
    }
}

/// A machine where all is well, until a test changes something.
struct Machine {
    stand_ins: StandIns,
    folder: TempDir,
    env: BTreeMap<String, String>,
    /// What must never be printed.
    canaries: Vec<String>,
}

impl Machine {
    async fn with_secret() -> Self {
        Self::with_options(DemoOptions::default()).await
    }

    async fn with_workload_identity() -> Self {
        let machine = Self::with_secret().await.without("AZURE_CLIENT_SECRET");
        machine.assertion(&json!({}))
    }

    async fn with_options(options: DemoOptions) -> Self {
        let stand_ins = StandIns::start(options).await.unwrap();
        let (authority, backend) = (stand_ins.entra.authority(), stand_ins.backend.base_url());
        let authorities = stand_ins.entra.ca_pem().to_owned();
        let machine = Self { stand_ins, folder: tempfile::tempdir().unwrap(), env: BTreeMap::new(), canaries: vec![] };
        let machine = machine.file("ca.pem", &authorities);
        let authorities = machine.path("ca.pem");
        machine
            .set("SSL_CERT_FILE", authorities.to_str().unwrap())
            .set("AZURE_AUTHORITY_HOST", authority.as_str())
            .set("AZURE_TENANT_ID", TENANT_ID)
            .set("HOST", "127.0.0.1")
            .set("AZURE_CLIENT_ID", CLIENT_ID)
            .set("AZURE_CLIENT_SECRET", CLIENT_SECRET)
            .set("AZURE_SCOPES", SCOPE)
            .set("BACKEND_API_URL", backend.as_str())
    }

    fn set(mut self, name: &str, value: &str) -> Self {
        if name == "AZURE_CLIENT_SECRET" {
            self.canaries.push(value.to_owned());
        }
        self.env.insert(name.to_owned(), value.to_owned());
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.env.remove(name);
        self
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn file(self, name: &str, content: &str) -> Self {
        std::fs::write(self.path(name), content).unwrap();
        self
    }

    /// A token file with this content, and the variable that names it.
    fn token_file(mut self, content: &str) -> Self {
        self.canaries.extend(content.split('.').filter(|piece| piece.len() > 8).map(str::to_owned));
        let path = self.path("token");
        self.file("token", content).set("AZURE_FEDERATED_TOKEN_FILE", path.to_str().unwrap())
    }

    /// A token file as the kubelet writes it, but for these claims.
    fn assertion(self, changes: &Value) -> Self {
        let token = self.stand_ins.entra.service_account_token(changes);
        self.token_file(&token)
    }

    async fn run(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mcp-server"));
        command.arg("check").args(arguments).env_clear().envs(&self.env).current_dir(self.folder.path());
        let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
        let (stdout, stderr) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
        assert_eq!(stderr, "", "{stdout}");
        let sent = self.stand_ins.backend.requests().into_iter().filter_map(|request| request.authorization_raw);
        let tokens: Vec<_> =
            sent.flat_map(|sent| sent.split(['.', ' ']).map(str::to_owned).collect::<Vec<_>>()).collect();
        for canary in self.canaries.iter().chain(&tokens).filter(|canary| canary.len() > 8) {
            assert!(!stdout.contains(canary.as_str()), "`{canary}` in {stdout}");
        }
        assert!(!stdout.contains("eyJ"), "a piece of a token in {stdout}");
        (output.status.code(), stdout)
    }

    async fn check(&self) -> Answer {
        let (code, stdout) = self.run(&["--json"]).await;
        assert_eq!(stdout.lines().count(), 1, "{stdout}");
        let answer = Answer { code, json: serde_json::from_str(&stdout).unwrap() };
        assert_eq!(answer.steps().iter().map(|step| step["name"].as_str().unwrap()).collect::<Vec<_>>(), STEPS);
        answer
    }
}

#[derive(Debug)]
struct Answer {
    code: Option<i32>,
    json: Value,
}

impl Answer {
    fn steps(&self) -> &[Value] {
        self.json["steps"].as_array().unwrap()
    }

    fn step(&self, name: &str) -> &Value {
        self.steps().iter().find(|step| step["name"] == name).unwrap()
    }

    /// Only this step fails; it says all of these words somewhere, and in whose hands the remedy is.
    #[track_caller]
    fn blames(&self, case: &str, failed: &str, words: &[&str], warned: &[&str]) {
        let with_a_file = self.step("credential")["found"].as_str().unwrap().contains("token file `");
        for name in STEPS {
            let expected = match name {
                _ if name == failed => "fail",
                _ if warned.contains(&name) => "warn",
                _ if dependents(failed).contains(&name) => "skipped",
                "token_file" if !with_a_file => "skipped",
                _ => "ok",
            };
            assert_eq!(self.step(name)["outcome"], expected, "{case}, {name}: {self:#?}");
        }
        let step = self.step(failed);
        for word in words {
            let said =
                ["found", "wrong", "hands", "remedy", "command"].map(|part| step[part].as_str().unwrap_or_default());
            assert!(said.iter().any(|text| text.contains(word)), "{case}: no `{word}` in {step:#?}");
        }
        assert!(step["hands"].is_string() && step["remedy"].is_string(), "{case}: {step:#?}");
        assert_eq!((self.code, &self.json["well"]), (Some(if failed == "settings" { 78 } else { 1 }), &json!(false)));
    }

    #[track_caller]
    fn is_well(&self, warned: &[&str], skipped: &[&str]) {
        for step in self.steps() {
            let name = step["name"].as_str().unwrap();
            let expected = match name {
                _ if warned.contains(&name) => "warn",
                _ if skipped.contains(&name) => "skipped",
                _ => "ok",
            };
            assert_eq!(step["outcome"], expected, "{name}: {self:#?}");
        }
        assert_eq!((self.code, &self.json["well"]), (Some(0), &json!(true)));
    }
}

#[tokio::test]
async fn all_is_well_with_a_client_secret() {
    let machine = Machine::with_secret().await;
    let answer = machine.check().await;
    answer.is_well(&[], &["token_file"]);
    let token = answer.step("token")["found"].as_str().unwrap();
    for shown in ["59 min", RESOURCE_APP_ID, CLIENT_ID, ROLE, "2.0"] {
        assert!(token.contains(shown), "{token}");
    }
    let (code, lines) = machine.run(&[]).await;
    assert_eq!(code, Some(0), "{lines}");
    assert!(
        lines.contains("\nok       health      `GET /health` says healthy") && lines.ends_with("\nAll is well.\n"),
        "{lines}"
    );
}

#[tokio::test]
async fn all_is_well_with_workload_identity_and_its_federated_credential_is_shown() {
    let machine = Machine::with_workload_identity().await;
    let answer = machine.check().await;
    answer.is_well(&[], &[]);
    let step = answer.step("token_file");
    let issuer = format!("{}cluster/", machine.stand_ins.entra.authority());
    for shown in [&*issuer, "system:serviceaccount:mcp-system:mcp-server", "api://AzureADTokenExchange"] {
        assert!(step["found"].as_str().unwrap().contains(&format!("`{shown}`")), "{step:#?}");
        assert!(step["command"].as_str().unwrap().contains(&format!(" '{shown}'")), "{step:#?}");
    }
    let command = step["command"].as_str().unwrap();
    assert!(command.contains("--name 'mcp-server-<cluster>-mcp-system'") && command.contains("replaces"), "{command}");
    // Some seconds ago, where the machine has much to do.
    let found = step["found"].as_str().unwrap();
    let issued = found.split_once("issued ").and_then(|(_, rest)| rest.split_once(", expires in ")).unwrap().0;
    assert!(issued == "just now" || issued.ends_with(" s ago"), "{step:#?}");
    assert!(step["command"].as_str().unwrap().contains("az identity federated-credential create"), "{step:#?}");
}

#[tokio::test]
async fn what_deserves_a_word_is_a_warning_and_no_failure() {
    let machine = Machine::with_secret().await.set("KUBERNETES_SERVICE_HOST", "10.0.0.1");
    let missing = machine.path("missing");
    let machine = machine.set("AZURE_FEDERATED_TOKEN_FILE", missing.to_str().unwrap());
    let answer = machine.check().await;
    answer.is_well(&["settings", "hosts"], &["token_file"]);
    assert!(answer.step("hosts")["remedy"].as_str().unwrap().contains("mcp-server.<namespace>.svc.cluster.local"));
    assert!(answer.step("settings")["remedy"].as_str().unwrap().contains("does not exist"));

    let machine = machine.assertion(&json!({ "exp": unix_now() - 60 })).set("ALLOWED_HOSTS", "mcp.example.com");
    let answer = machine.check().await;
    answer.is_well(&["token_file"], &[]);
    assert!(answer.step("hosts")["found"].as_str().unwrap().contains("`mcp.example.com`"));
}

#[tokio::test]
async fn the_keys_of_callers_are_fetched_and_their_issuer_is_compared() {
    let open = Machine::with_secret().await.check().await;
    assert!(open.step("callers")["found"].as_str().unwrap().contains("INBOUND_AUTH is `none`"));

    let machine = Machine::with_secret()
        .await
        .set("INBOUND_AUTH", "entra")
        .set("INBOUND_AUDIENCE", API_APP_ID)
        .set("PUBLIC_URL", "https://localhost/mcp");
    let answer = machine.check().await;
    answer.is_well(&[], &["token_file"]);
    let found = answer.step("callers")["found"].as_str().unwrap();
    assert!(found.contains(API_APP_ID) && found.contains(&format!("tenant `{TENANT_ID}` publishes 1 key")), "{found}");

    let other = "00000000-1111-4222-8333-444444444444";
    let machine = machine.set("INBOUND_TENANTS", &format!("{TENANT_ID},{other}"));
    machine.check().await.blames("an unknown tenant", "callers", &[other, "HTTP 400", "INBOUND_TENANTS"], &[]);

    let machine = machine.set("INBOUND_TENANTS", TENANT_ID);
    let document = FaultRule::status(200).on(&format!("GET /{TENANT_ID}/v2.0"));
    for (issuer, words) in [
        ("https://login.contoso.example/v2.0", &["`https://login.contoso.example/v2.0`", "AZURE_AUTHORITY_HOST"][..]),
        ("an\u{7}odd one", &["does not say which issuer"]),
    ] {
        machine.stand_ins.entra.set_fault([document.clone().body(json!({ "issuer": issuer }).to_string())]);
        machine.check().await.blames("another issuer", "callers", words, &[]);
    }
    machine.stand_ins.entra.set_fault([FaultRule::status(200).on(&format!("GET /{TENANT_ID}/discovery")).body("{}")]);
    machine.check().await.blames("no keys", "callers", &["has no list of keys"], &[]);
}

/// Whose callers need tokens of the stand-in's tenant.
async fn guarded(entra: EntraOptions) -> Machine {
    Machine::with_options(DemoOptions { entra, ..DemoOptions::default() })
        .await
        .set("INBOUND_AUTH", "entra")
        .set("INBOUND_AUDIENCE", API_APP_ID)
        .set("PUBLIC_URL", "https://localhost/mcp")
}

#[tokio::test]
async fn a_cloud_whose_issuer_is_elsewhere_is_well_and_keys_for_another_issuer_are_not() {
    let origin = "https://login.partner.example";
    let machine = guarded(EntraOptions { issuer_origin: Some(origin.to_owned()), ..EntraOptions::default() }).await;
    let answer = machine.check().await;
    answer.is_well(&[], &["token_file"]);
    let issuer = format!("`{origin}/{TENANT_ID}/v2.0`");
    assert!(answer.step("callers")["found"].as_str().unwrap().contains(&issuer), "{answer:#?}");

    // The metadata name another issuer than the keys do.
    let authority = machine.stand_ins.entra.authority();
    let keys = format!("{authority}{TENANT_ID}/discovery/v2.0/keys");
    let issuer = format!("https://elsewhere.example/{TENANT_ID}/v2.0");
    let document = FaultRule::status(200).body(json!({ "issuer": issuer, "jwks_uri": keys }).to_string());
    machine.stand_ins.entra.set_fault([document.on(&format!("GET /{TENANT_ID}/v2.0"))]);
    machine.check().await.blames("no key fits", "callers", &["none of the 1 key", &issuer], &[]);
}

#[tokio::test]
async fn scopes_and_resource_of_two_app_id_uris_are_warned_of_with_entras_code() {
    let machine = guarded(EntraOptions::default()).await;
    assert_eq!(machine.check().await.step("sign_in")["outcome"], "ok");
    let resource = "https://localhost/mcp";
    for (audience, fits) in [
        (format!("{API_APP_ID},{resource}"), true),
        (format!("{API_APP_ID},api://mcp-demo,{resource}"), true),
        (format!("{API_APP_ID},api://mcp-demo"), false),
        (format!("{API_APP_ID},{resource}/"), false),
    ] {
        let machine = guarded(EntraOptions::default()).await.set("INBOUND_AUDIENCE", &audience);
        let answer = machine.check().await;
        answer.is_well(if fits { &[] } else { &["settings", "sign_in"] }, &["token_file"]);
        for (step, part) in [("settings", "remedy"), ("sign_in", "wrong")] {
            let text = answer.step(step)[part].as_str().unwrap_or_default();
            assert_eq!(text.contains("AADSTS9010010"), !fits, "{audience}: {answer:#?}");
        }
    }
}

#[tokio::test]
async fn a_pod_without_what_the_webhook_injects_is_told_of_the_webhook() {
    let machine = Machine::with_secret().await.without("AZURE_CLIENT_SECRET").without("AZURE_TENANT_ID");
    let machine = machine.without("AZURE_CLIENT_ID").set("KUBERNETES_SERVICE_HOST", "10.0.0.1");
    let words = ["workload identity webhook", "azure.workload.identity/use", "azure-wi-webhook-controller-manager"];
    machine.check().await.blames("no webhook", "settings", &words, &[]);
    let elsewhere = machine.without("KUBERNETES_SERVICE_HOST").check().await;
    assert!(!elsewhere.json.to_string().contains("webhook"), "{elsewhere:#?}");
}

#[tokio::test]
async fn mistakes_in_the_settings_are_listed_and_nothing_else_is_tried() {
    let machine = Machine::with_secret().await;
    let authority = machine.stand_ins.entra.authority();
    let (all, nothing) = (machine.env.clone(), BTreeMap::new());
    type Change = (&'static str, &'static str);
    let cases: &[(&str, bool, &[Change], &[&str])] = &[
        (
            "nothing set",
            false,
            &[],
            &[
                "4 mistakes",
                "AZURE_TENANT_ID: is required",
                "AZURE_CLIENT_ID",
                "BACKEND_API_URL",
                "AZURE_CLIENT_SECRET",
            ],
        ),
        ("bad URL", true, &[("BACKEND_API_URL", "ftp://x")], &["1 mistake", "BACKEND_API_URL: `ftp://x` is not"]),
        (
            "no credential",
            true,
            &[("AZURE_CLIENT_SECRET", "")],
            &["there is no credential", "AZURE_FEDERATED_TOKEN_FILE"],
        ),
        (
            "token file missing",
            true,
            &[("AZURE_CLIENT_SECRET", ""), ("AZURE_FEDERATED_TOKEN_FILE", "/nowhere/token")],
            &["`/nowhere/token` does not exist"],
        ),
        ("two resources", true, &[("AZURE_SCOPES", "api://a/.default,api://b/.default")], &["different resources"]),
    ];
    let mut machine = machine;
    for (case, complete, changes, words) in cases {
        machine.env = if *complete { all.clone() } else { nothing.clone() };
        machine.env.extend(changes.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        let answer = machine.check().await;
        answer.blames(case, "settings", words, &[]);
    }
    assert_eq!(machine.stand_ins.entra.token_request_count().get(), 0, "{authority}");
    let (code, lines) = machine.run(&[]).await;
    assert_eq!(code, Some(78), "{lines}");
    assert!(lines.contains("FAIL     settings    1 mistake\n") && lines.contains("wrong  AZURE_SCOPES: "), "{lines}");
}

#[tokio::test]
async fn a_token_file_that_cannot_work_is_never_sent() {
    let mut machine = Machine::with_workload_identity().await;
    for (case, content, words) in [
        ("empty", String::new(), &["empty", "must exist, be readable and hold a token"][..]),
        (
            "garbage",
            "canary-canary-canary".to_owned(),
            &["no JWT", "point AZURE_FEDERATED_TOKEN_FILE at the projected"],
        ),
        ("dots", "canary-one.canary-two.canary-three".to_owned(), &["no JWT", "well-formed"]),
    ] {
        machine = machine.token_file(&content);
        machine.check().await.blames(case, "token_file", words, &[]);
    }
    machine = machine.assertion(&json!({ "exp": unix_now() - 3600 }));
    machine.check().await.blames(
        "expired",
        "token_file",
        &["expires 1 h 0 min ago", "kubelet rotates", "cluster"],
        &[],
    );
    let folder = machine.folder.path().to_str().unwrap().to_owned();
    let machine = machine.set("AZURE_FEDERATED_TOKEN_FILE", &folder);
    machine.check().await.blames("a folder", "token_file", &["directory", "be readable"], &[]);
    assert_eq!(machine.stand_ins.entra.token_request_count().get(), 0);
}

#[tokio::test]
async fn a_federation_that_does_not_fit_comes_with_the_one_that_would() {
    let mut machine = Machine::with_workload_identity().await;
    let create = "az identity federated-credential create";
    for (case, claims, words) in [
        (
            "subject",
            json!({ "sub": "system:serviceaccount:other:account" }),
            &["AADSTS700213", "subject", create, "--subject 'system:serviceaccount:other:account'", "administers"][..],
        ),
        (
            "case",
            json!({ "sub": "system:serviceaccount:MCP-system:mcp-server" }),
            &["AADSTS7002138", "compares case", "--subject 'system:serviceaccount:MCP-system:mcp-server'"],
        ),
        (
            "issuer",
            json!({ "iss": "https://oidc.example.com/it's/" }),
            &["AADSTS700211", "OIDC issuer", create, r"--issuer 'https://oidc.example.com/it'\''s/'"],
        ),
        (
            "audience",
            json!({ "aud": ["https://kubernetes.default.svc"] }),
            &["AADSTS700212", "api://AzureADTokenExchange", "--audiences 'api://AzureADTokenExchange'"],
        ),
        ("no iat", json!({ "iat": null }), &["AADSTS70023", "not at the default service account's"]),
        ("not yet valid", json!({ "nbf": unix_now() + 3000 }), &["AADSTS700024", "node's clock"]),
    ] {
        machine = machine.assertion(&claims);
        machine.check().await.blames(case, "token", words, &[]);
    }
    let stranger = StandIns::start(DemoOptions::default()).await.unwrap();
    let issuer = format!("{}cluster/", machine.stand_ins.entra.authority());
    let machine = machine.token_file(&stranger.entra.service_account_token(&json!({ "iss": issuer })));
    machine.check().await.blames("another cluster", "token", &["AADSTS5000811", "this very cluster", "list"], &[]);
}

#[tokio::test]
async fn what_entra_refuses_is_explained() {
    let machine = Machine::with_secret().await;
    let all = machine.env.clone();
    let mut machine = machine;
    for (case, name, value, words) in [
        (
            "wrong secret",
            "AZURE_CLIENT_SECRET",
            "canary-secret-canary",
            &["AADSTS7000215", "the secret's value (not to its id)", "az ad app credential reset", CLIENT_ID][..],
        ),
        (
            "expired secret",
            "AZURE_CLIENT_SECRET",
            EXPIRED_CLIENT_SECRET,
            &["AADSTS7000222", "create a new secret", "az ad app credential reset"],
        ),
        (
            "unknown app",
            "AZURE_CLIENT_ID",
            "00000000-1111-2222-3333-444444444444",
            &["AADSTS700016", "correct AZURE_CLIENT_ID or AZURE_TENANT_ID", "correlation id"],
        ),
        (
            "unknown tenant",
            "AZURE_TENANT_ID",
            "nowhere.example.com",
            &["AADSTS90002", "correct AZURE_TENANT_ID", "az account show"],
        ),
        (
            "unknown resource",
            "AZURE_SCOPES",
            "api://nobody/.default",
            &["AADSTS500011", "correct AZURE_SCOPES", "App ID URI"],
        ),
    ] {
        machine.env = all.clone();
        machine = machine.set(name, value);
        machine.check().await.blames(case, "token", words, &[]);
    }
}

#[tokio::test]
async fn every_code_of_the_reference_has_advice_of_its_own() {
    let machine = Machine::with_secret().await;
    for code in [
        7_000_215, 7_000_222, 7_000_218, 7_000_216, 700_016, 90_002, 70_021, 700_211, 700_212, 700_213, 7_002_138,
        700_024, 70_023, 50_027, 50_013, 5_000_811, 70_011, 1_002_012, 700_022, 500_011, 90_033, 90_024, 90_006,
    ] {
        let body =
            json!({ "error": "invalid_client", "error_codes": [code], "error_description": "canary" }).to_string();
        machine.stand_ins.entra.set_fault([FaultRule::status(401).body(body).on(TOKEN_REQUESTS)]);
        let advice = mcp_server::identity::advice(code).unwrap();
        let words = [&*format!("AADSTS{code}"), advice.means, advice.remedy, advice.hands];
        machine.check().await.blames("code", "token", &words, &[]);
    }
    let body = json!({ "error": "invalid_grant", "error_codes": [50_105], "error_description": "canary" }).to_string();
    machine.stand_ins.entra.set_fault([FaultRule::status(400).body(body).on(TOKEN_REQUESTS)]);
    let words = ["AADSTS50105", "https://login.microsoftonline.com/error?code=50105"];
    machine.check().await.blames("another code", "token", &words, &[]);
}

#[tokio::test]
async fn an_authority_that_is_not_there_is_told_from_one_that_refuses() {
    let machine = Machine::with_secret().await;
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let stranger = StandIns::start(DemoOptions::default()).await.unwrap();
    let real = machine.env["AZURE_AUTHORITY_HOST"].clone();
    let mut machine = machine.file("stranger.pem", stranger.entra.ca_pem()).file("empty.pem", "");
    let real_ca = machine.env["SSL_CERT_FILE"].clone();
    let file = |machine: &Machine, name| machine.path(name).to_str().unwrap().to_owned();
    let (stranger, empty) = (file(&machine, "stranger.pem"), file(&machine, "empty.pem"));
    for (case, authority, authorities, failed, words) in [
        (
            "nobody listens",
            &*format!("https://{nobody}"),
            &real_ca,
            "tcp",
            &["Connection refused", "port 443", "HTTPS_PROXY", "network"][..],
        ),
        ("unknown host", "https://nowhere.invalid", &real_ca, "dns", &["AZURE_AUTHORITY_HOST", "DNS", "nslookup"]),
        ("untrusted", &*real, &stranger, "tls", &["invalid peer certificate", "SSL_CERT_FILE", "openssl s_client"]),
    ] {
        machine = machine.set("AZURE_AUTHORITY_HOST", authority).set("SSL_CERT_FILE", authorities);
        machine.check().await.blames(case, failed, words, &[]);
    }

    let machine = machine.set("SSL_CERT_FILE", &empty);
    machine.check().await.blames(
        "no authority",
        "settings",
        &["SSL_CERT_FILE", "at least one certificate authority"],
        &[],
    );

    let machine = machine.set("SSL_CERT_FILE", &real_ca);
    let entra = &machine.stand_ins.entra;
    entra.set_fault([FaultRule::status(429)]);
    machine.check().await.blames("throttled", "token", &["429", "throttles", "wait 1 min, as Entra asks"], &[]);
    entra.set_fault([FaultRule::status(503)]);
    machine.check().await.blames("unwell", "token", &["AADSTS90033", "wait a little", "Microsoft"], &[]);
    entra.set_fault([FaultRule::status(200).body("<html>Sign in").on(TOKEN_REQUESTS)]);
    machine.check().await.blames("portal", "token", &["no usable token", "AZURE_AUTHORITY_HOST is Entra"], &[]);
    entra.set_fault([FaultRule::redirect("https://example.com/").on(TOKEN_REQUESTS)]);
    machine.check().await.blames("redirect", "token", &["redirects", "AZURE_AUTHORITY_HOST"], &[]);
}

#[tokio::test]
async fn a_clock_that_is_wrong_is_noticed() {
    let machine = Machine::with_secret().await;
    let at = |date: &str| FaultRule::status(200).header("date", date).on("GET /");
    machine.stand_ins.entra.set_fault([at("Mon, 02 Nov 2020 10:00:00 GMT")]);
    machine.check().await.blames("clock", "clock", &["ahead of", "NTP", "timedatectl"], &[]);
    let two_minutes = std::time::SystemTime::now() + Duration::from_secs(120);
    machine.stand_ins.entra.set_fault([at(&httpdate(two_minutes))]);
    machine.check().await.is_well(&["clock"], &["token_file"]);
}

#[tokio::test]
async fn what_the_backend_says_is_explained() {
    let machine = Machine::with_secret().await;
    let backend = &machine.stand_ins.backend;
    for (case, rule, words) in [
        (
            "redirect",
            FaultRule::redirect("https://elsewhere.example/"),
            &["307", "BACKEND_API_URL", "curl", "--head"][..],
        ),
        ("not JSON", FaultRule::status(200).body("<html>canary"), &["cannot be read", "correct BACKEND_API_URL"]),
        ("other JSON", FaultRule::status(200).body("{}"), &["cannot be read", "correct BACKEND_API_URL"]),
        (
            "says so",
            FaultRule::status(200).body(r#"{"status":"degraded"}"#),
            &["`degraded`", r#"`{"status":"healthy"}`"#, "whoever runs the backend"],
        ),
        (
            "another word",
            FaultRule::status(200).body(r#"{"status":"UP"}"#),
            &["`UP`", r#"`{"status":"healthy"}`"#, "whoever runs the backend"],
        ),
        (
            "a JSON string",
            FaultRule::status(200).body(r#""Healthy""#),
            &["`Healthy`", r#"`{"status":"healthy"}`"#, "whoever runs the backend"],
        ),
        (
            "plain text",
            FaultRule::status(200).header("content-type", "text/plain").body("Healthy\n"),
            &["`Healthy`", r#"`{"status":"healthy"}`"#, "whoever runs the backend"],
        ),
        (
            "a long and hidden word",
            FaultRule::status(200).body(json!({ "status": "\u{202e}PU".repeat(50) }).to_string()),
            &["`\\u{202e}PU", "…`", r#"`{"status":"healthy"}`"#],
        ),
        ("no route", FaultRule::status(404), &["no `/health`", "READINESS_CHECK_BACKEND=false"]),
        ("throttles", FaultRule::status(429), &["429", "whoever runs the backend"]),
        ("gateway", FaultRule::status(502), &["502", "gateway", "whoever runs the backend"]),
        ("hangs up", FaultRule::close_before_head(), &["broke the connection off", "scheme and port"]),
    ] {
        backend.set_fault([rule]);
        machine.check().await.blames(case, "health", words, &[]);
    }
    backend.set_fault([]);
    backend.set_healthy(false);
    machine.check().await.blames("unhealthy", "health", &["503", "unwell", "the backend's own log"], &[]);
    backend.set_healthy(true);

    backend.set_fault([FaultRule::status(404)]);
    let machine = machine.set("READINESS_CHECK_BACKEND", "false");
    machine.check().await.is_well(&["health"], &["token_file"]);
}

#[tokio::test]
async fn a_backend_that_is_not_there_is_told_from_one_that_hangs() {
    let machine = Machine::with_secret().await.set("BACKEND_API_TIMEOUT", "1.5");
    machine.stand_ins.backend.set_fault([FaultRule::hang()]);
    let words = ["no answer within 1.5s", "BACKEND_API_TIMEOUT", "whoever runs the backend"];
    machine.check().await.blames("hangs", "health", &words, &[]);

    let machine = machine.without("BACKEND_API_TIMEOUT");
    machine.stand_ins.backend.set_down(true).await.unwrap();
    let words = ["Connection refused", "start the backend", "whoever runs the backend"];
    machine.check().await.blames("down", "backend", &words, &[]);

    let machine = machine.set("BACKEND_API_URL", "https://nowhere.invalid");
    machine.check().await.blames("unknown host", "backend", &["`nowhere.invalid`", "BACKEND_API_URL"], &[]);

    let stranger = StandIns::start(DemoOptions::default()).await.unwrap();
    let machine = machine.set("BACKEND_API_URL", stranger.entra.authority().as_str());
    machine.check().await.blames("untrusted", "backend", &["invalid peer certificate", "SSL_CERT_FILE"], &[]);
}

#[tokio::test]
async fn a_token_that_the_backend_refuses_is_told_from_a_role_that_is_missing() {
    let machine = Machine::with_secret().await.set("AZURE_SCOPES", "https://management.azure.com/.default");
    let answer = machine.check().await;
    let words = ["refused the token", "`https://management.azure.com`", "set AZURE_SCOPES", "az ad sp show"];
    answer.blames("another resource", "health", &words, &["settings", "scope"]);
    assert!(answer.step("scope")["wrong"].as_str().unwrap().contains("Azure Resource Manager"), "{answer:#?}");

    let mut entra = EntraOptions::default();
    entra.resources[0].granted_roles.clear();
    let machine = Machine::with_options(DemoOptions { entra, ..DemoOptions::default() }).await;
    let words = ["403", "carries no app role", "grant the app role", "appRoleAssignedTo", RESOURCE_APP_ID];
    machine.check().await.blames("no role", "health", &words, &[]);
}

#[tokio::test]
async fn whoever_hangs_the_answer_comes_within_half_a_minute() {
    let machine = Machine::with_secret().await.set("BACKEND_API_TIMEOUT", "2");
    machine.stand_ins.entra.set_fault([FaultRule::hang()]);
    // A check that waits for whoever hangs ends no test in time: the runner stops it.
    let answer = tokio::time::timeout(Duration::from_secs(300), machine.check()).await.expect("no answer");
    assert_eq!(answer.step("clock")["outcome"], "skipped", "{answer:#?}");
    let token = answer.step("token");
    assert_eq!(token["outcome"], "fail");
    assert!(token["remedy"].as_str().unwrap().contains("firewall"), "{token:#?}");
}

#[tokio::test]
async fn nothing_that_others_write_is_repeated() {
    let secret = "canary8Q~secret-that-nobody-may-see_0001";
    let machine =
        Machine::with_secret().await.set("AZURE_CLIENT_SECRET", secret).set("LOG_LEVEL", "trace").set("DEBUG", "true");
    let echo = json!({ "error": "invalid_client", "error_codes": [7_000_215], "error_description": format!("AADSTS7000215: {secret}") });
    machine.stand_ins.entra.set_fault([FaultRule::status(401).body(echo.to_string()).on(TOKEN_REQUESTS)]);
    let (code, lines) = machine.run(&[]).await;
    assert_eq!(code, Some(1), "{lines}");
    assert!(lines.contains("FAIL     token ") && lines.ends_with("\n1 step failed: token.\n"), "{lines}");
    // `run` looks for the secret; beside the answer there is nothing at all.
    assert!(lines.lines().all(|line| line.is_empty() || line.starts_with(['o', 'F', 's', ' ', '1'])), "{lines}");
    machine.check().await;
    let machine = machine.set("AZURE_TENANT_ID", secret).set("AZURE_FEDERATED_TOKEN_FILE", secret);
    machine.check().await.blames("secret in the wrong place", "settings", &["not shown"], &[]);
    let scope = format!("api://{secret}/.default");
    for (name, value) in [("AZURE_SCOPES", &*scope), ("AZURE_CLIENT_ID", secret), ("AZURE_TENANT_ID", secret)] {
        let machine = Machine::with_secret().await.set("AZURE_CLIENT_SECRET", secret).set(name, value);
        machine.check().await.blames("secret elsewhere", "settings", &["1 mistake", name, "not shown"], &[]);
    }
    // Nothing tells that this is one but its look.
    let mut machine = Machine::with_secret().await.set("AZURE_CLIENT_ID", "kEx.8_3hKq9LmNoPqRsTuVwXyZ012345ab");
    machine.canaries.push("kEx.8_3hKq9Lm".to_owned());
    machine.check().await.blames("old secret", "settings", &["not shown", "34 characters, letters, digits"], &[]);
}

fn unix_now() -> u64 {
    std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs()
}

fn httpdate(time: std::time::SystemTime) -> String {
    ::httpdate::fmt_http_date(time)
}
