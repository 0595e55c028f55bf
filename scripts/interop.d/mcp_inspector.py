"""The MCP Inspector's command line, npm `@modelcontextprotocol/inspector`: walks the scenario and prints what it saw.

    mcp_inspector.py URL ERA < scenario.json      ERA: legacy, auto or modern

One process a request, as a person would type it. Judges nothing but the Inspector's own exit codes.
The package is looked up in the folder it is run in.
"""

import json
import re
import subprocess
import sys

LAUNCHER = "node_modules/@modelcontextprotocol/inspector/clients/launcher/build/index.js"
IN_BAND_ERROR = 5  # isError, or a tool that the server does not list


def inspect(url, era, *flags):
    command = ["node", LAUNCHER, "--cli", url, "--transport", "http", "--protocol-era", era, "--format", "json", *flags]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)


def answer(done):
    if done.returncode != 0:
        sys.exit(f"exit {done.returncode}: {done.stderr.strip()}")
    return json.loads(done.stdout)["result"]


def lint(listing):
    """Refuses warnings too: such a schema is legal, but some model providers' clients would drop the tool."""
    found = re.findall(r"^(?:Error|Warning): (.*)\n +Path: (.*)", listing.stderr, re.MULTILINE)
    if found:
        sys.exit("tools/list --strict: " + ", ".join(" ".join(where) for where in found))
    return listing


def seen(url, era, step):
    arguments = json.dumps(step["arguments"])
    done = inspect(url, era, "--method", "tools/call", "--tool-name", step["tool"], "--tool-args-json", arguments)
    if done.returncode not in (0, IN_BAND_ERROR):
        return {"threw": f"exit {done.returncode}: {done.stderr.strip()}"}
    if not done.stdout.strip():
        return {"error": json.loads(done.stderr)["error"]}
    result = json.loads(done.stdout)["result"]
    if result.get("isError", False) != (done.returncode == IN_BAND_ERROR):
        return {"threw": f"exit {done.returncode} for {done.stdout.strip()}"}
    return {"result": result}


def main(url, era):
    scenario = json.load(sys.stdin)
    version = answer(inspect(url, era, "--method", "initialize"))["protocolVersion"]
    tools = answer(lint(inspect(url, era, "--method", "tools/list", "--strict")))["tools"]
    steps = {step["name"]: seen(url, era, step) for step in scenario}
    print(json.dumps({"version": version, "tools": [tool["name"] for tool in tools], "steps": steps}))


main(*sys.argv[1:])
