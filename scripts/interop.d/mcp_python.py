"""The Python SDK, PyPI `mcp`: walks the scenario and prints what it saw. Judges nothing: `scripts/interop` does.

    mcp_python.py URL MODE < scenario.json      MODE: auto, legacy, or a version to pin
"""

import asyncio
import json
import sys

from mcp import Client
from mcp.shared.exceptions import MCPError


async def walk(url, mode, scenario):
    async with Client(url, mode=mode, read_timeout_seconds=20) as client:
        tools = (await client.list_tools()).tools
        return {
            "version": client.protocol_version,
            "tools": [tool.name for tool in tools],
            "steps": {step["name"]: await seen(client, step) for step in scenario},
        }


async def seen(client, step):
    try:
        result = await client.call_tool(step["tool"], step["arguments"])
    except MCPError as error:
        return {"error": {"code": error.code, "message": error.message}}
    except Exception as error:  # the client itself did not like the answer
        return {"threw": f"{type(error).__name__}: {error}"}
    return {"result": result.model_dump(mode="json", by_alias=True, exclude_none=True)}


print(json.dumps(asyncio.run(walk(sys.argv[1], sys.argv[2], json.load(sys.stdin)))))
