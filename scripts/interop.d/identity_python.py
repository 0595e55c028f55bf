"""PyPI `azure-identity` asks the stand-in Entra for tokens and prints what it got. Judges nothing: `scripts/interop` does.

    identity_python.py < asks.json      {"authority": …, "scope": …, "asks": [{"name", "tenant", "client", "secret" or "token_file"}]}

An ask with a `user_assertion` is made on behalf of the user whose token that is.
"""

import json
import sys
from pathlib import Path

from azure.core.exceptions import ClientAuthenticationError
from azure.identity import ClientSecretCredential, OnBehalfOfCredential, WorkloadIdentityCredential


def credential(authority, ask):
    options = {"authority": authority, "disable_instance_discovery": True}
    if "user_assertion" in ask:
        if "secret" in ask:
            proof = {"client_secret": ask["secret"]}
        else:
            proof = {"client_assertion_func": lambda: Path(ask["token_file"]).read_text().strip()}
        return OnBehalfOfCredential(ask["tenant"], ask["client"], user_assertion=ask["user_assertion"], **proof, **options)
    if "secret" in ask:
        return ClientSecretCredential(ask["tenant"], ask["client"], ask["secret"], **options)
    return WorkloadIdentityCredential(
        tenant_id=ask["tenant"], client_id=ask["client"], token_file_path=ask["token_file"], **options
    )


def seen(authority, scope, ask):
    try:
        token = credential(authority, ask).get_token(scope)
    except ClientAuthenticationError as error:
        return {"error": str(error)}
    return {"token": token.token, "expires_on": token.expires_on}


todo = json.load(sys.stdin)
print(json.dumps({ask["name"]: seen(todo["authority"], todo["scope"], ask) for ask in todo["asks"]}))
