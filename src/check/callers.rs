//! Who may call, and whether what their tokens are checked with can be had.

use super::{CALLERS, DEPLOYER, Step, counted};
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
    for (tenant, keys) in tenants {
        match keys {
            Ok(keys) => good.push(format!("tenant `{tenant}` publishes {}", counted(keys, "key"))),
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
