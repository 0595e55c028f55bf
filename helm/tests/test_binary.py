"""The real program, started with exactly the environment, arguments and probes that the chart renders.

MCP_SERVER_BIN is the program, built with the stand-ins; STAND_INS_BIN is the example `stand_ins` (by default the one that
cargo puts beside it).
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import chart
import pytest
from chart import merge, render


def programs():
    named = os.environ.get("MCP_SERVER_BIN")
    assert named, (
        "MCP_SERVER_BIN is not set. Run `cargo build && cargo build --example stand_ins`, then "
        "`MCP_SERVER_BIN=target/debug/mcp-server scripts/chart-test`; or say `scripts/chart-test --without-binary`."
    )
    server = Path(named).resolve()
    stand_ins = Path(os.environ.get("STAND_INS_BIN") or server.parent / "examples" / "stand_ins").resolve()
    for program in (server, stand_ins):
        assert os.access(program, os.X_OK), f"{program} cannot be run"
    return server, stand_ins


@pytest.fixture(scope="module")
def stand_ins():
    with subprocess.Popen([programs()[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        yield json.loads(running.stdout.readline())
        running.stdin.close()


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [opened.getsockname()[1] for opened in sockets]


MODES = {
    # What the webhook does, `chart.process` does.
    "webhook": lambda at: {},
    "client secret": lambda at: {"azure": {"existingSecret": "entra", "authorityHost": at["authority"]}},
    "own projection": lambda at: {
        "azure": {"authorityHost": at["authority"], "federatedTokenFile": at["federated_token_file"]},
        "workloadIdentity": {"webhook": False},
    },
}


def rendered_for(at, mode="webhook", extra=None):
    """The release that leads to the stand-ins; all else is the chart's default."""
    port, metrics_port = free_ports(2)
    values = {
        "azure": {"clientId": at["client_id"], "tenantId": at["tenant_id"], "scopes": at["scope"]},
        "app": {
            "backendApiUrl": at["backend_url"],
            "sslCertFile": at["ca_file"],
            "port": port,
            "metricsPort": metrics_port,
        },
    }
    return render(merge(values, MODES[mode](at), extra or {}))


def process_of(objects, at, kind="Deployment"):
    webhook = {"AZURE_AUTHORITY_HOST": at["authority"], "AZURE_FEDERATED_TOKEN_FILE": at["federated_token_file"]}
    return chart.process(objects, kind, secrets={"entra": {"client-secret": at["client_secret"]}}, webhook=webhook)


@contextlib.contextmanager
def started(process, directory):
    """Runs with the container's environment and nothing else, in an empty directory."""
    output = (directory / "output").open("w+")
    running = subprocess.Popen([programs()[0], *process["args"]], env=process["env"], cwd=directory, stdout=output, stderr=output)
    try:
        yield running
    except BaseException:
        output.seek(0)
        print(output.read())
        raise
    finally:
        if running.poll() is None:
            running.kill()
        running.wait()
        output.close()


def pod_ip():
    """An address that is not loopback, where this machine has one: probes come from outside the pod."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def ask(port, method, path, host=None, body=None, timeout=3):
    connection = http.client.HTTPConnection(pod_ip(), port, timeout=timeout)
    headers = {"Host": host or f"{pod_ip()}:{port}"}
    if body is not None:
        body = json.dumps(body)
        headers |= {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
        headers |= {"MCP-Protocol-Version": "2025-11-25"}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def succeeds(process, name):
    """One probe, as the kubelet asks it."""
    probe = process["probes"][name]
    port = process["ports"][probe["httpGet"]["port"]]
    try:
        status, _ = ask(port, "GET", probe["httpGet"]["path"], timeout=probe["timeoutSeconds"])
    except OSError:
        return False
    return 200 <= status < 400


def until(question, seconds, message):
    """The seconds it took."""
    start = time.monotonic()
    while not question():
        assert time.monotonic() - start < seconds, message
        time.sleep(0.05)
    return time.monotonic() - start


def call_list_users(port, host):
    request = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "list_users", "arguments": {}}}
    return ask(port, "POST", "/mcp", host=host, body=request, timeout=15)


@pytest.mark.parametrize("mode", MODES)
def test_the_rendered_environment_starts_the_program(mode, stand_ins, tmp_path):
    process = process_of(rendered_for(stand_ins, mode), stand_ins)
    probes, ports = process["probes"], process["ports"]
    with started(process, tmp_path) as running:
        startup = probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"]
        until(lambda: succeeds(process, "startup"), startup, "the startup probe would have the container killed")
        assert succeeds(process, "liveness")
        first_asked = probes["readiness"]["initialDelaySeconds"]
        until(lambda: succeeds(process, "readiness"), first_asked, "unready when the kubelet asks for the first time")
        assert json.loads(ask(ports["http"], "GET", "/health/ready")[1])["dependencies"]["backend_service"] == "healthy"

        status, text = ask(ports["metrics"], "GET", "/metrics")
        assert status == 200 and text.startswith("#")
        assert ask(ports["http"], "GET", "/metrics")[0] == 404

        for host in ("mcp-server", "mcp-server.mcp-system.svc.cluster.local:8000", f"localhost:{ports['http']}"):
            status, text = call_list_users(ports["http"], host)
            assert status == 200 and '"isError":true' not in text and '"items"' in text, text
        assert call_list_users(ports["http"], "rebound.example")[0] == 403

        # preStop has passed. SIGTERM: unready at once, alive, still answering while endpoint lists catch up, and gone in time.
        running.send_signal(signal.SIGTERM)
        until(lambda: not succeeds(process, "readiness"), 2, "still ready after SIGTERM")
        assert json.loads(ask(ports["http"], "GET", "/health/ready")[1])["status"] == "draining"
        assert succeeds(process, "liveness")
        assert call_list_users(ports["http"], "mcp-server")[0] == 200
        left = process["termination_grace_seconds"] - process["pre_stop_seconds"]
        assert running.wait(timeout=left) == 0


def test_the_address_for_dual_stack_serves_ipv4_and_ipv6(stand_ins, tmp_path):
    process = process_of(rendered_for(stand_ins, extra={"app": {"host": "::", "drainDelay": 0}}), stand_ins)
    port = process["ports"]["http"]
    with started(process, tmp_path):
        until(lambda: succeeds(process, "startup"), 10, "not alive over IPv4")
        connection = http.client.HTTPConnection("::1", port, timeout=3)
        connection.request("GET", "/health/live")
        assert connection.getresponse().status == 200
        connection.close()


def test_pods_that_the_webhook_has_not_changed_say_what_they_lack(stand_ins, tmp_path):
    process = chart.process(rendered_for(stand_ins))
    for name in chart.WEBHOOK_VARIABLES:
        process["env"].pop(name, None)
    with started(process, tmp_path) as running:
        assert running.wait(timeout=10) == 78
    output = (tmp_path / "output").read_text()
    assert "AZURE_TENANT_ID" in output and "AZURE_CLIENT_ID" in output


def test_the_placeholder_of_the_install_command_starts_alive_and_unready(stand_ins, tmp_path):
    """`https://api.example.com` is nobody's backend: no crash loop, no readiness."""
    extra = {"app": {"backendApiUrl": "https://api.example.com", "drainDelay": 0}}
    process = process_of(rendered_for(stand_ins, extra=extra), stand_ins)
    with started(process, tmp_path) as running:
        until(lambda: succeeds(process, "startup"), 10, "not alive")
        time.sleep(process["probes"]["readiness"]["initialDelaySeconds"])
        assert succeeds(process, "liveness") and not succeeds(process, "readiness")
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=40) == 0


def test_helm_test_succeeds_with_the_environment_of_its_pod(stand_ins, tmp_path):
    commands = subprocess.run([programs()[0], "--help"], capture_output=True, text=True, check=True).stdout
    if "\n  check " not in commands:
        pytest.xfail("this program has no command `check` yet")
    process = process_of(rendered_for(stand_ins), stand_ins, kind="Pod")
    assert process["args"] == ["check"]
    with started(process, tmp_path) as running:
        code = running.wait(timeout=60)
    assert code == 0, (tmp_path / "output").read_text()


def test_the_probes_of_the_pod_of_helm_test_succeed():
    (container,) = chart.only(render(chart.INSTALL), "Pod")["spec"]["containers"]
    for probe in ("livenessProbe", "readinessProbe"):
        name, *arguments = container[probe]["exec"]["command"]
        assert name == "mcp-server"
        run = subprocess.run([programs()[0], *arguments], capture_output=True, env={}, check=False)
        assert run.returncode == 0
