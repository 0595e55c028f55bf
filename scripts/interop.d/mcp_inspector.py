"""The MCP Inspector's command line, npm `@modelcontextprotocol/inspector`: walks the plan and prints what it saw.

    mcp_inspector.py URL ERA < plan.json      ERA: legacy, auto or modern

One process a request, as a person would type it. Judges nothing but the Inspector's own exit codes.
The package is looked up in the folder it is run in.
"""

import json
import re
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

LAUNCHER = "node_modules/@modelcontextprotocol/inspector/clients/launcher/build/index.js"
AT_ONCE = 10  # processes of it; each takes a tenth of a gigabyte
IN_BAND_ERROR = 5  # isError, or a tool that the server does not list


def command(url, era, *flags):
    return ["node", LAUNCHER, "--cli", url, "--transport", "http", "--protocol-era", era, "--format", "json", *flags]


def inspect(url, era, *flags):
    return subprocess.run(command(url, era, *flags), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)


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


def call(step):
    return "--method", "tools/call", "--tool-name", step["tool"], "--tool-args-json", json.dumps(step["arguments"])


def seen(url, era, step):
    done = inspect(url, era, *call(step))
    if done.returncode not in (0, IN_BAND_ERROR):
        return {"threw": f"exit {done.returncode}: {done.stderr.strip()}"}
    if not done.stdout.strip():
        return {"error": json.loads(done.stderr)["error"]}
    result = json.loads(done.stdout)["result"]
    if result.get("isError", False) != (done.returncode == IN_BAND_ERROR):
        return {"threw": f"exit {done.returncode} for {done.stdout.strip()}"}
    return {"result": result}


def give_up(era, slow):
    """Ends the process in the middle of the call, as a person would. How long it takes to get there is the machine's affair."""
    began = None
    with subprocess.Popen(command(slow["url"], era, *call(slow)), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            # Only the slow call is in flight for longer than a moment.
            began = (began or time.monotonic()) if in_flight(slow["metrics"]) else None
            if began and time.monotonic() - began > slow["patience_s"]:
                process.kill()
                return "gave up"
            time.sleep(0.05)
    return "was answered"


def in_flight(metrics):
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(metrics, timeout=10) as answer:
        return float(re.search(r"^http_server_active_requests (\S+)", answer.read().decode(), re.MULTILINE)[1]) > 0


def main(url, era):
    plan = json.load(sys.stdin)
    version = answer(inspect(url, era, "--method", "initialize"))["protocolVersion"]
    tools = answer(lint(inspect(url, era, "--method", "tools/list", "--strict")))["tools"]
    steps = {step["name"]: seen(url, era, step) for step in plan["steps"]}
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        parallel = list(pool.map(lambda step: seen(url, era, step), plan["parallel"]))
    slow = plan["slow"] and give_up(era, plan["slow"])
    names = [tool["name"] for tool in tools]
    seen_all = {"steps": steps, "parallel": parallel, "at_once": AT_ONCE, "slow": slow}
    print(json.dumps({"version": version, "tools": names} | seen_all))


main(*sys.argv[1:])
