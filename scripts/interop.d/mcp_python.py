"""The Python SDK, PyPI `mcp`: walks the plan and prints what it saw. Judges nothing: `scripts/interop` does.

    mcp_python.py URL MODE < plan.json      MODE: auto, legacy, or a version to pin
"""

import json
import sys

import anyio
from mcp import Client
from mcp.shared.exceptions import MCPError


async def walk(url, mode, plan):
    async with Client(url, mode=mode, read_timeout_seconds=20) as client:
        tools = (await client.list_tools()).tools
        return {
            "version": client.protocol_version,
            "tools": [tool.name for tool in tools],
            "steps": {step["name"]: await seen(client, step) for step in plan["steps"]},
            "parallel": await at_once(client, plan["parallel"]),
            "slow": plan["slow"] and await give_up(mode, plan["slow"]),
        }


async def seen(client, step):
    try:
        result = await client.call_tool(step["tool"], step["arguments"])
    except MCPError as error:
        return {"error": {"code": error.code, "message": error.message}}
    except Exception as error:  # the client itself did not like the answer
        return {"threw": f"{type(error).__name__}: {error}"}
    return {"result": result.model_dump(mode="json", by_alias=True, exclude_none=True)}


async def at_once(client, calls):
    answers = [None] * len(calls)

    async def one(number, call):
        answers[number] = await seen(client, call)

    async with anyio.create_task_group() as group:
        for number, call in enumerate(calls):
            group.start_soon(one, number, call)
    return answers


async def give_up(mode, slow):
    async with Client(slow["url"], mode=mode, read_timeout_seconds=60) as client:
        with anyio.move_on_after(slow["patience_s"]) as patience:
            await client.call_tool(slow["tool"], slow["arguments"])
        await anyio.sleep(slow["linger_s"])
        return "gave up" if patience.cancelled_caught else "was answered"


print(json.dumps(anyio.run(walk, sys.argv[1], sys.argv[2], json.load(sys.stdin))))
