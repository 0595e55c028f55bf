//! Who may call, whether what their tokens are checked with can be had, and whether Entra will give clients such tokens.

use super::{CALLERS, DEPLOYER, SIGN_IN, Step, counted};
use crate::auth::inspect;
use crate::settings::{InboundAuth, Settings};

pub(super) async fn step(settings: &Settings) -> Step {
    let InboundAuth::Entra(inbound) = &settings.inbound else {
        return Step::ok(
            CALLERS,
            "nobody is asked for a token (INBOUND_AUTH is `none`): whoever reaches the port may call",
        );
    };
    let identity = &settings.identity;
    let audiences = [&inbound.client_ids[..], &inbound.app_id_uris[..]].concat().join("`, `");
    let found = format!("callers of `{}` need a token for `{audiences}`", inbound.public_url);
    let tenants = match inspect(inbound, &identity.authority, identity.extra_ca_pem.as_deref()).await {
        Ok(tenants) => tenants,
        Err(error) => {
            return Step::fail(CALLERS, found).wrong(error.to_string()).mend(DEPLOYER, "SSL_CERT_FILE can name them");
        }
    };
    let mut wrong = Vec::new();
    let mut good = Vec::new();
    for (tenant, published) in tenants {
        match published {
            Ok(published) if published.fitting_keys == 0 => wrong.push(format!(
                "none of the {} that tenant `{tenant}` publishes is for its issuer `{}`: no token of its callers will be accepted",
                counted(published.keys, "key"),
                published.issuers.join("`, `"),
            )),
            Ok(published) => good.push(format!(
                "tenant `{tenant}` publishes {}, and its tokens have the issuer `{}`",
                counted(published.fitting_keys, "key"),
                published.issuers.join("` or `"),
            )),
            Err(why) => wrong.push(format!("the keys of tenant `{tenant}` cannot be had: {why}")),
        }
    }
    let found = [vec![found], good].concat().join("; ");
    if wrong.is_empty() {
        return Step::ok(CALLERS, found);
    }
    Step::fail(CALLERS, found).wrong(wrong.join("; ")).mend(
        DEPLOYER,
        "compare INBOUND_TENANTS (or AZURE_TENANT_ID) and AZURE_AUTHORITY_HOST with the tenant that callers sign in to; where nothing \
         answers at all, see the steps before",
    )
}

/// Entra takes the scopes and the `resource` that clients send only where both are of one App ID URI.
pub(super) fn sign_in(inbound: &InboundAuth) -> Step {
    let InboundAuth::Entra(inbound) = inbound else {
        return Step::ok(SIGN_IN, "clients need not sign in");
    };
    let (owner, resource) = (inbound.scope_owner(), &inbound.public_url);
    let found = format!("clients ask Entra for the scopes of `{owner}`, for the resource `{resource}`");
    if inbound.scopes_fit_resource() {
        return Step::ok(SIGN_IN, found);
    }
    Step::warn(SIGN_IN, found)
        .wrong("The App ID URI in INBOUND_AUDIENCE is not PUBLIC_URL: Entra answers AADSTS9010010 to clients that send `resource`, as MCP has it")
        .mend(
            DEPLOYER,
            format!(
                "add `{resource}`, to the letter, to the App ID URIs of the app registration, and set INBOUND_AUDIENCE to its client id, \
                 beside it no App ID URI but that one"
            ),
        )
}
