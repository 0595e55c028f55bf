//! What a forger could make up: never accepted, and nothing panics.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::Recalled;
use super::tests::{inbound, verifier};
use crate::demo::entra::DemoCaller;

/// What a forger could think of: good tokens with something changed, parts put together anew, and noise.
fn forgeries(good: Vec<String>) -> impl Strategy<Value = String> {
    let one = proptest::sample::select(good);
    let part = prop_oneof![
        one.clone().prop_map(|token| token.split('.').next().unwrap_or_default().to_owned()),
        one.clone().prop_map(|token| token.split('.').nth(1).unwrap_or_default().to_owned()),
        "[A-Za-z0-9_-]{0,40}",
        any_json().prop_map(|value| URL_SAFE_NO_PAD.encode(value)),
    ];
    prop_oneof![
        1 => "\\PC{0,200}",
        1 => "[A-Za-z0-9._=-]{0,300}",
        3 => (one.clone(), any::<proptest::sample::Index>(), any::<char>()).prop_map(|(token, at, new)| {
            let at = at.index(token.len());
            token.char_indices().map(|(index, old)| if index == at { new } else { old }).collect()
        }),
        2 => (one.clone(), any::<proptest::sample::Index>()).prop_map(|(token, at)| {
            token[..at.index(token.len())].to_owned()
        }),
        2 => (one, "[A-Za-z0-9._=-]{1,20}").prop_map(|(token, tail)| token + &tail),
        3 => (part.clone(), part.clone(), part).prop_map(|(head, claims, end)| format!("{head}.{claims}.{end}")),
    ]
}

fn any_json() -> impl Strategy<Value = String> {
    let claim = proptest::sample::select(vec![
        "alg", "kid", "crit", "iss", "aud", "tid", "oid", "sub", "ver", "azp", "scp", "roles", "exp", "nbf",
    ]);
    let value = prop_oneof![
        Just(json!(null)),
        any::<i64>().prop_map(|number| json!(number)),
        any::<f64>().prop_map(|number| json!(number)),
        "\\PC{0,20}".prop_map(|text| json!(text)),
        Just(json!("RS256")),
        Just(json!("none")),
        Just(json!([])),
        Just(json!({ "a": [1] })),
    ];
    proptest::collection::vec((claim, value), 0..12).prop_map(|entries| {
        Value::Object(entries.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()).to_string()
    })
}

#[test]
fn no_token_that_entra_did_not_make_is_ever_accepted() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (entra, verifier) = runtime.block_on(verifier(&inbound(), false));
    let good: Vec<_> = DemoCaller::ALL.iter().map(|caller| entra.caller_token(*caller, &json!({}))).collect();
    for token in &good {
        runtime.block_on(verifier.verify(token)).unwrap();
    }
    // The one fetch that an unknown key may cause is spent, so that no case waits.
    let unknown = entra.sign(&json!({ "kid": "x" }), &entra.caller_claims(DemoCaller::Reader, &json!({})));
    runtime.block_on(verifier.verify(&unknown)).unwrap_err();
    proptest!(|(forged in forgeries(good.clone()))| {
        prop_assume!(!good.contains(&forged));
        let verdict = runtime.block_on(verifier.verify(&forged)).map(|identity| identity.object().to_string());
        prop_assert!(verdict.is_err(), "{:?}", forged);
        prop_assert!(matches!(verifier.recall(&forged), Recalled::Unknown), "{:?}", forged);
    });
}
