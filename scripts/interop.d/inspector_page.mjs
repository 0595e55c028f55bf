// Drives the MCP Inspector's web page in Chromium: connects, lists the tools, calls one, and takes a picture. Then calls the
// server straight from the page, as a web application would, once from an allowed origin and once from another.
// Prints what it saw and judges nothing: `scripts/inspector-page` does.
//
//     inspector_page.mjs CHROMIUM PAGE SERVER SCREENSHOT
//
// The packages are looked up from the folder it is run in.

import { createRequire } from 'node:module';
import { join } from 'node:path';

const { chromium } = createRequire(join(process.cwd(), 'package.json'))('playwright-core');
const [executablePath, inspector, server, screenshot] = process.argv.slice(2);

// Chromium's sandbox needs a user other than root.
const browser = await chromium.launch({ executablePath, args: process.getuid() === 0 ? ['--no-sandbox'] : [] });
const context = await browser.newContext({ viewport: { width: 1400, height: 1000 }, bypassCSP: true });
context.setDefaultTimeout(20_000);
const page = await context.newPage();
try {
  await page.goto(inspector);
  await page.getByRole('switch', { name: /^Connect/ }).click({ force: true });
  const version = await page.getByText(/^MCP \d{4}-\d{2}-\d{2}$/).innerText();
  await page.getByText('Tools', { exact: true }).first().click();
  await page.getByText(/^Tools \(\d+\)$/).waitFor();
  const tools = (await page.getByRole('button').allInnerTexts()).flatMap((text) => text.match(/\b[a-z]+(_[a-z]+)+$/)?.[0] ?? []);
  await page.getByRole('button', { name: /get_user_profile/ }).click();
  await page.getByLabel(/user_id/).first().fill('42');
  await page.getByRole('button', { name: 'Execute Tool' }).click();
  await page.getByText('42@contoso.example').first().waitFor();
  await page.screenshot({ path: screenshot });
  const direct = await call(page);
  await page.goto(inspector.replace('127.0.0.1', 'localhost'));
  const foreign = await call(page);
  console.log(JSON.stringify({ version, tools, direct, foreign }));
} catch (error) {
  await page.screenshot({ path: screenshot });
  console.error(`${error}\n${await page.locator('body').innerText()}`);
  process.exitCode = 1;
}
await browser.close();

// A call by the page's own `fetch`: the browser asks first (a preflight), sends `Origin`, and hides what it must not show.
async function call(page) {
  return page.evaluate(async (url) => {
    const params = { name: 'get_user_profile', arguments: { user_id: '42' } };
    try {
      const answer = await fetch(url, {
        method: 'POST',
        headers: { 'content-type': 'application/json', accept: 'application/json, text/event-stream', 'mcp-protocol-version': '2025-11-25' },
        body: JSON.stringify({ jsonrpc: '2.0', id: 1, method: 'tools/call', params }),
      });
      return { origin: location.origin, status: answer.status, id: (await answer.json()).result?.structuredContent?.id };
    } catch (error) {
      return { origin: location.origin, threw: String(error) };
    }
  }, server);
}
