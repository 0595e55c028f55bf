// npm `@azure/identity` asks the stand-in Entra for tokens and prints what it got. Judges nothing: `scripts/interop` does.
//
//     identity_javascript.mjs < asks.json      {"authority": …, "scope": …, "asks": [{"name", "tenant", "client", "secret" or "token_file"}]}
//
// An ask with a `user_assertion` is made on behalf of the user whose token that is. The package is looked up from the folder it is run in.

import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';

const require = createRequire(join(process.cwd(), 'package.json'));
const { ClientSecretCredential, OnBehalfOfCredential, WorkloadIdentityCredential } = require('@azure/identity');

function credential(authority, ask) {
  const options = { authorityHost: authority, disableInstanceDiscovery: true };
  if (ask.user_assertion !== undefined) {
    const proof = ask.secret !== undefined
      ? { clientSecret: ask.secret }
      : { getAssertion: async () => readFileSync(ask.token_file, 'utf8').trim() };
    return new OnBehalfOfCredential({
      tenantId: ask.tenant, clientId: ask.client, userAssertionToken: ask.user_assertion, ...proof, ...options,
    });
  }
  if (ask.secret !== undefined) return new ClientSecretCredential(ask.tenant, ask.client, ask.secret, options);
  return new WorkloadIdentityCredential({
    tenantId: ask.tenant, clientId: ask.client, tokenFilePath: ask.token_file, ...options,
  });
}

const { authority, scope, asks } = JSON.parse(readFileSync(0, 'utf8'));
const seen = {};
for (const ask of asks) {
  try {
    const { token, expiresOnTimestamp } = await credential(authority, ask).getToken(scope);
    seen[ask.name] = { token, expires_on: expiresOnTimestamp / 1000 };
  } catch (error) {
    seen[ask.name] = { error: `${error.name}: ${error.message}` };
  }
}
console.log(JSON.stringify(seen));
