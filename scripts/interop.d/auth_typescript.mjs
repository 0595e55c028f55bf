// The TypeScript SDKs, npm `@modelcontextprotocol/client` (2.x) and `@modelcontextprotocol/sdk` (1.x), with their own OAuth
// support: find the authorization server from the 401, sign a person in there, and call tools.
//
//     auth_typescript.mjs URL MODE < todo.json      MODE: auto, legacy, a version to pin, or sdk-v1
//
//     {"client_id", "person", "calls": [{"name", "tool", "arguments"}]}   a person signs in
//     {"token", "calls": …}                                              an app that has its token already
//     with "narrow": "SCOPE"                                             the first sign-in asks for this scope alone
//
// Prints what it saw and judges nothing: `scripts/interop` does. The one thing done by hand is what a person's browser would
// do: follow the authorization URL, as the person, to the code. The packages are looked up from the folder it is run in.

import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';

const require = createRequire(join(process.cwd(), 'package.json'));
const me = { name: 'interop', version: '1.0.0' };
const callback = 'http://localhost:3030/callback';

class Provider {
  constructor({ client_id, person, narrow }) {
    Object.assign(this, { client: { client_id }, person, narrow, asked: [] });
  }
  get redirectUrl() { return callback; }
  get clientMetadata() {
    return { redirect_uris: [callback], client_name: 'interop', grant_types: ['authorization_code'], token_endpoint_auth_method: 'none' };
  }
  clientInformation() { return this.client; } // typed in: nobody registers clients at Entra
  saveClientInformation(client) { this.client = client; }
  tokens() { return this.saved; }
  saveTokens(tokens) { this.saved = tokens; }
  saveCodeVerifier(verifier) { this.verifier = verifier; }
  codeVerifier() { return this.verifier; }
  async redirectToAuthorization(url) {
    const query = url.searchParams;
    this.asked.push({ scope: query.get('scope'), resource: query.get('resource'), client_id: query.get('client_id') });
    const to = new URL(url);
    to.searchParams.set('login_hint', this.person);
    if (this.narrow && this.asked.length === 1) to.searchParams.set('scope', this.narrow);
    const answer = await fetch(to, { redirect: 'manual' });
    if (answer.status !== 302) throw new Error(`${answer.status}: ${await answer.text()}`);
    const landed = new URL(answer.headers.get('location')).searchParams;
    if (!landed.get('code')) throw new Error(`${landed}`);
    this.landed = landed;
  }
}

function sdk(mode) {
  if (mode === 'sdk-v1') {
    return {
      ...require('@modelcontextprotocol/sdk/client/index.js'),
      ...require('@modelcontextprotocol/sdk/client/streamableHttp.js'),
      ...require('@modelcontextprotocol/sdk/client/auth.js'),
    };
  }
  return require('@modelcontextprotocol/client');
}

const [url, mode] = process.argv.slice(2);
const todo = JSON.parse(readFileSync(0, 'utf8'));
const { Client, StreamableHTTPClientTransport, UnauthorizedError } = sdk(mode);
const provider = todo.token ? undefined : new Provider(todo);
const newTransport = () => new StreamableHTTPClientTransport(new URL(url), todo.token
  ? { requestInit: { headers: { Authorization: `Bearer ${todo.token}` } } }
  : { authProvider: provider });
let transport;

async function connect() {
  const negotiation = ['auto', 'legacy'].includes(mode) ? mode : { pin: mode };
  const client = mode === 'sdk-v1' ? new Client(me) : new Client(me, { versionNegotiation: { mode: negotiation } });
  transport = newTransport();
  await client.connect(transport);
  return client;
}

/// Comes back from the browser with the code, as often as the client sent the person there, and tries again.
async function signedIn(work) {
  for (let visits = 0; ; visits += 1) {
    try {
      return await work();
    } catch (error) {
      if (!(error instanceof UnauthorizedError) || visits === 2) throw error;
      const code = provider.landed.get('code');
      await transport.finishAuth(mode === 'sdk-v1' ? code : provider.landed);
    }
  }
}

async function seen(client, { tool, arguments: args }) {
  try {
    return { result: await signedIn(() => client.callTool({ name: tool, arguments: args })) };
  } catch (error) {
    if (typeof error.code !== 'number' || error.code > 0) return { threw: `${error.name}: ${error.message}` };
    return { error: { code: error.code, message: error.message } };
  }
}

const client = await signedIn(connect);
const version = mode === 'sdk-v1' ? transport.protocolVersion : client.getNegotiatedProtocolVersion();
const { tools } = await client.listTools();
const steps = {};
for (const call of todo.calls) steps[call.name] = await seen(client, call);
await client.close();
console.log(JSON.stringify({ version, tools: tools.map((tool) => tool.name), steps, asked: provider?.asked ?? [] }));
