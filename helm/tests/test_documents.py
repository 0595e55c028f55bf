"""The commands of the documents: run against a stand-in for `az`, or held against what the chart renders."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import chart
import pytest
from chart import INSTALL, only, render

DOCS = chart.REPOSITORY / "docs"
NOTES = chart.CHART / "templates" / "NOTES.txt"
COMMANDS = [*DOCS.glob("*.md"), chart.REPOSITORY / "README.md", chart.CHART / "README.md", NOTES]


def blocks(document, section):
    """The shell blocks of a section, in order."""
    text = (DOCS / document).read_text()
    part = re.split(r"^## ", text, flags=re.MULTILINE)
    (found,) = [one for one in part if one.startswith(section)]
    return re.findall(r"^```sh\n(.*?)^```", found, re.MULTILINE | re.DOTALL)


def flat(path):
    """A document with its continued lines joined, and text in templates without quotation marks."""
    return re.sub(r"\\\n\s*", "", path.read_text()).replace('"." "-"', "")


# docs/aks.md, step 1: names.


@pytest.mark.parametrize("number", [0, 7, 32767])
def test_the_name_of_the_registry_is_one_that_azure_accepts(number):
    (names,) = blocks("aks.md", "1. Names")
    script = f'unset RANDOM; RANDOM={number}\n{names}\necho "$REGISTRY"'
    name = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True).stdout.strip()
    assert re.fullmatch(r"[a-zA-Z0-9]{5,50}", name), name


# docs/aks.md, step 5: a role on the backend.

BACKEND = "00000000-0000-0000-0000-000000000000"
ADMIN = {"id": "1", "value": "Admin", "allowedMemberTypes": ["User", "Application"], "isEnabled": True}
READER = {"id": "2", "value": "mcp.access", "allowedMemberTypes": ["Application"], "isEnabled": True}


class Step5:
    def __init__(self, folder, uris=(), roles=(), sp=None):
        self.folder = folder
        self.state = folder / "state.json"
        app = {"appId": BACKEND, "identifierUris": list(uris), "appRoles": list(roles)}
        self.state.write_text(json.dumps({"app": app, "sp": sp, "posted": []}))
        for name, program in (("az", f'exec "{sys.executable}" "{Path(__file__).with_name("az")}" "$@"'), ("uuidgen", "echo made-id")):
            (folder / name).write_text(f"#!/bin/sh\n{program}\n")
            (folder / name).chmod(0o755)

    def run(self, principal="principal"):
        (names,) = blocks("aks.md", "1. Names")
        script = "\n".join([names, f"export PRINCIPAL_ID={principal}", *blocks("aks.md", "5. A role")])
        env = {**os.environ, "PATH": f"{self.folder}:{os.environ['PATH']}", "AZ_STATE": str(self.state)}
        done = subprocess.run(["bash", "-c", script], cwd=self.folder, env=env, capture_output=True, text=True, check=False)
        return done.stderr, json.loads(self.state.read_text())


def test_uris_and_roles_that_the_backend_has_stay(tmp_path):
    others = ["https://api.contoso.com", "api://old"]
    step = Step5(tmp_path, others, [ADMIN], sp={"id": "sp"})
    errors, state = step.run()
    assert state["app"]["identifierUris"] == [*others, f"api://{BACKEND}"], errors
    assert state["app"]["appRoles"][0] == ADMIN
    (made,) = state["app"]["appRoles"][1:]
    assert made["value"] == "mcp.access" and made["allowedMemberTypes"] == ["Application"] and made["isEnabled"] is True
    assert {"id", "displayName", "description"} <= set(made)
    uri = "https://graph.microsoft.com/v1.0/servicePrincipals/principal/appRoleAssignments"
    wanted = {"principalId": "principal", "resourceId": "sp", "appRoleId": "made-id"}
    assert state["posted"] == [[uri, wanted]]
    # Once more: nothing is added twice.
    _, again = step.run()
    assert again["app"] == state["app"]


def test_an_app_without_anything_gets_a_uri_a_service_principal_and_a_role(tmp_path):
    errors, state = Step5(tmp_path).run()
    assert state["app"]["identifierUris"] == [f"api://{BACKEND}"], errors
    assert [role["value"] for role in state["app"]["appRoles"]] == ["mcp.access"]
    assert state["posted"][0][1] == {"principalId": "principal", "resourceId": "made", "appRoleId": "made-id"}


def test_the_identity_gets_the_role_that_is_named_and_no_other(tmp_path):
    _, state = Step5(tmp_path, [f"api://{BACKEND}"], [ADMIN, READER], sp={"id": "sp"}).run()
    assert state["app"]["appRoles"] == [ADMIN, READER] and state["posted"][0][1]["appRoleId"] == READER["id"]


def test_a_role_is_not_assigned_to_nobody(tmp_path):
    errors, state = Step5(tmp_path, sp={"id": "sp"}).run(principal="")
    assert state["posted"] == [] and "PRINCIPAL_ID: is empty" in errors


# All documents.


def test_a_federated_credential_is_named_after_cluster_and_namespace():
    """`create` replaces one of the same name."""
    found = 0
    for path in COMMANDS:
        for name in re.findall(r'federated-credential create\s+--name ("[^"]*"|\S+)', flat(path)):
            found += 1
            for part in ("cluster", "namespace|mcp-system"):
                assert re.search(part, name, re.IGNORECASE), f"{path.name}: {name}"
    assert found >= 3


def test_signals_come_from_a_debug_container():
    """The image has no `kill`; scripts/image-test runs what the documents say."""
    container = only(render(INSTALL), "Deployment")["spec"]["template"]["spec"]["containers"][0]["name"]
    found = 0
    for path in COMMANDS:
        text = flat(path)
        assert not re.search(r"kubectl exec[^`\n]*kill", text), path.name
        for command in re.findall(r"kubectl debug [^`\n]*kill[^`\n]*", text):
            found += 1
            assert f"--target={container}" in command and "--profile=restricted" in command, path.name
            assert command.rstrip('"; ').endswith('sh -c "kill -USR1 1') or "kill -USR1 1" in command
    assert found >= 1


def test_the_pod_of_a_failed_test_is_removed_by_its_labels():
    labels = {kind: item for kind, (item, _) in chart.pods(render(INSTALL)).items()}
    for text in (flat(DOCS / "aks.md"), chart.notes(INSTALL)):
        (selector,) = re.findall(r"kubectl delete pod --namespace \S+ --selector (\S+)", text)
        wanted = dict(pair.split("=") for pair in selector.split(","))
        assert [kind for kind, own in labels.items() if wanted.items() <= own.items()] == ["Pod/mcp-server-check"]
