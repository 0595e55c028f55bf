// The TypeScript SDKs, npm `@modelcontextprotocol/client` (2.x) and `@modelcontextprotocol/sdk` (1.x): walks the plan
// and prints what it saw. Judges nothing: `scripts/interop` does.
//
//     mcp_typescript.mjs URL MODE < plan.json      MODE: auto, legacy, a version to pin, or sdk-v1
//
// The packages are looked up from the folder it is run in.

import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';

const require = createRequire(join(process.cwd(), 'package.json'));
const me = { name: 'interop', version: '1.0.0' };

async function connect(url, mode) {
  if (mode === 'sdk-v1') {
    const { Client } = require('@modelcontextprotocol/sdk/client/index.js');
    const { StreamableHTTPClientTransport } = require('@modelcontextprotocol/sdk/client/streamableHttp.js');
    const client = new Client(me);
    const transport = new StreamableHTTPClientTransport(new URL(url));
    await client.connect(transport);
    return { client, version: transport.protocolVersion };
  }
  const { Client, StreamableHTTPClientTransport } = require('@modelcontextprotocol/client');
  const negotiation = ['auto', 'legacy'].includes(mode) ? mode : { pin: mode };
  const client = new Client(me, { versionNegotiation: { mode: negotiation } });
  await client.connect(new StreamableHTTPClientTransport(new URL(url)));
  return { client, version: client.getNegotiatedProtocolVersion() };
}

async function seen(client, { tool, arguments: args }) {
  try {
    return { result: await client.callTool({ name: tool, arguments: args }) };
  } catch (error) {
    if (error.code === undefined) return { threw: `${error.name}: ${error.message}` }; // the client itself did not like the answer
    return { error: { code: error.code, message: error.message } };
  }
}

// Stops waiting for a call, stays for a while, and leaves.
async function giveUp(mode, slow) {
  const { client } = await connect(slow.url, mode);
  const request = { name: slow.tool, arguments: slow.arguments };
  const options = { signal: AbortSignal.timeout(slow.patience_s * 1000), timeout: 60_000 };
  const call = mode === 'sdk-v1' ? client.callTool(request, undefined, options) : client.callTool(request, options);
  const outcome = await call.then(
    () => 'was answered',
    () => (options.signal.aborted ? 'gave up' : 'failed'),
  );
  await new Promise((later) => setTimeout(later, slow.linger_s * 1000));
  await client.close();
  return outcome;
}

const [url, mode] = process.argv.slice(2);
const plan = JSON.parse(readFileSync(0, 'utf8'));
const { client, version } = await connect(url, mode);
const { tools } = await client.listTools(); // also teaches the client the output schemas that it then checks results against
const steps = {};
for (const step of plan.steps) steps[step.name] = await seen(client, step);
const parallel = await Promise.all(plan.parallel.map((call) => seen(client, call)));
await client.close();
const slow = plan.slow && (await giveUp(mode, plan.slow));
console.log(JSON.stringify({ version, tools: tools.map((tool) => tool.name), steps, parallel, slow }));
