"""FastMCP's client, PyPI `fastmcp`: walks the plan and prints what it saw. Judges nothing: `scripts/interop` does.

    mcp_fastmcp.py URL MODE < plan.json      MODE: auto, legacy, or a version to pin
"""

import asyncio
import json
import sys

from fastmcp import Client
from mcp.shared.exceptions import MCPError


async def walk(url, mode, plan):
    async with Client(url, mode=mode, timeout=20) as client:
        tools = await client.list_tools()
        return {
            "version": client.protocol_version,
            "tools": [tool.name for tool in tools],
            "steps": {step["name"]: await seen(client, step) for step in plan["steps"]},
            "parallel": await asyncio.gather(*(seen(client, call) for call in plan["parallel"])),
            "slow": plan["slow"] and await give_up(mode, plan["slow"]),
        }


async def seen(client, step):
    try:
        await client.call_tool(step["tool"], step["arguments"], raise_on_error=False)  # reads the result by its schema
        result = await client.call_tool_mcp(step["tool"], step["arguments"])
    except MCPError as error:
        return {"error": {"code": error.code, "message": error.message}}
    except Exception as error:  # the client itself did not like the answer
        return {"threw": f"{type(error).__name__}: {error}"}
    return {"result": result.model_dump(mode="json", by_alias=True, exclude_none=True)}


async def give_up(mode, slow):
    async with Client(slow["url"], mode=mode, timeout=60) as client:
        try:
            await asyncio.wait_for(client.call_tool_mcp(slow["tool"], slow["arguments"]), slow["patience_s"])
        except asyncio.TimeoutError:
            await asyncio.sleep(slow["linger_s"])
            return "gave up"
        return "was answered"


print(json.dumps(asyncio.run(walk(sys.argv[1], sys.argv[2], json.load(sys.stdin)))))
