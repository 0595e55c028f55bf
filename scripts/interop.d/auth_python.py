"""PyPI `mcp` with its own OAuth support: finds the authorization server from the 401, signs a person in there, and calls tools.

    auth_python.py URL MODE < todo.json      MODE: auto, legacy, or a version to pin

    {"client_id", "person", "calls": [{"name", "tool", "arguments"}]}   a person signs in
    {"token", "calls": …}                                              an app that has its token already
    with "narrow": "SCOPE"                                             the first sign-in asks for this scope alone

Prints what it saw and judges nothing: `scripts/interop` does. The one thing done by hand is what a person's browser would do:
follow the authorization URL, as the person, to the code.
"""

import asyncio
import json
import os
import ssl
import sys
from urllib.parse import parse_qs, urlparse

import httpx2
from mcp import Client
from mcp.client.auth import OAuthClientProvider
from mcp.client.auth.oauth2 import AuthorizationCodeResult
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.auth import OAuthClientInformationFull, OAuthClientMetadata
from mcp.shared.exceptions import MCPError

CALLBACK = "http://localhost:3030/callback"
TRUST = ssl.create_default_context(cafile=os.environ["STAND_IN_CA"])


class Memory:
    """The client id was typed in: nobody registers clients at Entra."""

    def __init__(self, client_id):
        self.tokens = None
        self.client = OAuthClientInformationFull(
            client_id=client_id, redirect_uris=[CALLBACK], token_endpoint_auth_method="none"
        )

    async def get_tokens(self):
        return self.tokens

    async def set_tokens(self, tokens):
        self.tokens = tokens

    async def get_client_info(self):
        return self.client

    async def set_client_info(self, client):
        self.client = client


class Browser:
    def __init__(self, person, narrow):
        self.person, self.narrow, self.asked, self.landed = person, narrow, [], None

    async def open(self, url):
        query = parse_qs(urlparse(url).query)
        self.asked.append({name: values[0] for name, values in query.items() if name in ("scope", "resource", "client_id")})
        url = httpx2.URL(url).copy_merge_params({"login_hint": self.person})
        if self.narrow and len(self.asked) == 1:
            url = url.copy_set_param("scope", self.narrow)
        async with httpx2.AsyncClient(verify=TRUST) as http:
            answer = await http.get(url)
        if answer.status_code != 302:
            raise RuntimeError(f"{answer.status_code}: {answer.text}")
        self.landed = {name: values[0] for name, values in parse_qs(urlparse(answer.headers["location"]).query).items()}

    async def come_back(self):
        if "code" not in self.landed:
            raise RuntimeError(f"{self.landed}")
        return AuthorizationCodeResult(code=self.landed["code"], state=self.landed.get("state"), iss=self.landed.get("iss"))


async def walk(url, mode, todo):
    browser = Browser(todo.get("person"), todo.get("narrow"))
    if "token" in todo:
        options = {"headers": {"Authorization": f"Bearer {todo['token']}"}}
    else:
        metadata = OAuthClientMetadata(
            redirect_uris=[CALLBACK], client_name="interop", grant_types=["authorization_code"],
            token_endpoint_auth_method="none",
        )
        memory = Memory(todo["client_id"])
        options = {"auth": OAuthClientProvider(url, metadata, memory, browser.open, browser.come_back)}
    async with httpx2.AsyncClient(verify=TRUST, timeout=20, **options) as http:
        async with Client(streamable_http_client(url, http_client=http), mode=mode, read_timeout_seconds=20) as client:
            tools = (await client.list_tools()).tools
            return {
                "version": client.protocol_version,
                "tools": [tool.name for tool in tools],
                "steps": {call["name"]: await seen(client, call) for call in todo["calls"]},
                "asked": browser.asked,
            }


async def seen(client, call):
    try:
        result = await client.call_tool(call["tool"], call["arguments"])
    except MCPError as error:
        return {"error": {"code": error.code, "message": error.message}}
    except Exception as error:  # a refusal that the client raises as it likes
        return {"threw": f"{type(error).__name__}: {error}"}
    return {"result": result.model_dump(mode="json", by_alias=True, exclude_none=True)}


print(json.dumps(asyncio.run(walk(sys.argv[1], sys.argv[2], json.load(sys.stdin)))))
