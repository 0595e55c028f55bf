"""What the scripts that run other people's programs against the real binary share: starting and ending it, and installing them.

A module, not a command. Nothing of it decides whether an outcome is right.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import select
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target").resolve()

NODE_WANTED = (22, 19)  # the Inspector's `engines`; the conformance suite is content with 22
NODE_FALLBACK = "22.23.3"  # from npm, where the machine's is missing or older


def debian_package(package, *commands):
    """Installs a program that no registry for developers has, where one of its commands is missing; ends the script where it cannot."""
    missing = [command for command in commands if not shutil.which(command)]
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise SystemExit(f"{', '.join(missing)} is missing: install Debian's package `{package}`, or run this as root on Debian")
    print(f"        installing Debian's package `{package}`", flush=True)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", package]):
        done = subprocess.run(["apt-get", *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            raise SystemExit(f"`apt-get {' '.join(command)}` failed:\n{done.stdout[-2000:]}")


# ---------------------------------------------------------------- the server and the stand-ins


@contextlib.contextmanager
def server(executable, log, *arguments, **settings):
    """`mcp-server demo` on free ports, from ready to a good end: where its MCP and its metrics are. Its log goes to the file `log`."""
    port, metrics = free_port(), free_port()
    environment = clean_environment() | {"PORT": str(port), "METRICS_PORT": str(metrics)}
    environment |= {name: value.format(port=port) for name, value in settings.items()}
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(log.open("w"))
        command = [executable, "demo", *arguments]
        process = stack.enter_context(tidy(command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out))
        start = time.monotonic()
        while not is_ready(f"http://127.0.0.1:{port}/health/ready"):
            if process.poll() is not None or time.monotonic() - start > 30:
                raise SystemExit(f"the server is not ready (exit {process.poll()}):\n{tail(log)}")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/mcp", f"http://127.0.0.1:{metrics}/metrics"
        process.terminate()
        try:
            code = process.wait(40)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"the server does not stop on SIGTERM:\n{tail(log)}") from None
        if code != 0:
            raise SystemExit(f"the server stopped with exit {code}:\n{tail(log)}")


@contextlib.contextmanager
def stand_ins(executable):
    """The stand-in Entra and backend alone: one line of JSON says where they are; they go when their stdin closes."""
    with tidy([executable], env=clean_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        heard, _, _ = select.select([process.stdout], [], [], 30)
        line = process.stdout.readline().decode() if heard else "nothing within 30 s"
        try:
            where = json.loads(line)
        except ValueError:
            raise SystemExit(f"the stand-ins said {line!r}, not where they are") from None
        yield where
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            raise SystemExit("the stand-ins outlive their stdin") from None


@contextlib.contextmanager
def tidy(command, **options):
    """A process whose whole group is gone afterwards, however this ends."""
    process = subprocess.Popen([str(part) for part in command], cwd=TARGET, start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(log, words):
    """Until the server has introduced itself: its log is where it prints."""
    start = time.monotonic()
    while words not in log.read_text():
        if time.monotonic() - start > 20:
            raise SystemExit(f"the server never said `{words}`:\n{tail(log)}")
        time.sleep(0.05)


def is_ready(url):
    try:
        with ask(url, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def ask(url, headers=None, timeout=20):
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return direct.open(urllib.request.Request(url, headers=headers or {}), timeout=timeout)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def tail(path):
    return "\n".join(path.read_text(errors="replace").splitlines()[-40:])


def clean_environment():
    """Ours less what would steer a server or a client elsewhere: the outcome must not depend on who runs it."""
    steering = re.compile(
        r"(AZURE_|BACKEND_|ALLOWED_|INBOUND_|PUBLIC_URL$|ENABLED_TOOLS$|READ_ONLY$|RATE_LIMIT_|AUDIT_|OTEL_|MSI_|IDENTITY_|READINESS_|MAX_REQUEST_|SHUTDOWN_|SSL_CERT_|REQUESTS_CA_|NODE_|"
        r".*_PROXY$|(METRICS_)?PORT$|HOST$|LOG_LEVEL$|DEBUG$)", re.IGNORECASE)
    return {name: value for name, value in os.environ.items() if not steering.match(name)}



# ---------------------------------------------------------------- installing and building


def install(home, pins, *installers):
    """Runs the installers into the folder `home`, unless what the files `pins` name is what was installed there last."""
    if not shutil.which("npm"):
        raise SystemExit("this needs npm; any Node.js brings one")
    home.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(b"".join(pin.read_bytes() for pin in pins)).hexdigest()
    stamp = f"{digest} node {NODE_FALLBACK} python {platform.python_version()} {platform.machine()}"
    stamped = home / "installed"
    if not (stamped.exists() and stamped.read_text() == stamp):
        start = time.monotonic()
        stamped.unlink(missing_ok=True)
        for installer in installers:
            installer()
        stamped.write_text(stamp)
        print(f"installed into {home} in {time.monotonic() - start:.1f} s", flush=True)
    use_new_node()


def install_npm(pinned, home):
    """The packages that the lock file in the folder `pinned` names."""
    for name in ("package.json", "package-lock.json"):
        shutil.copy(pinned / name, home / name)
    run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], cwd=home)


def use_new_node():
    """Puts a Node that is new enough first on the PATH: the machine's, or npm's package of one."""
    if node_version("node") >= NODE_WANTED:
        return
    system = {"Linux": "linux", "Darwin": "darwin"}.get(platform.system(), "unknown")
    machine = {"x86_64": "x64", "aarch64": "arm64", "arm64": "arm64"}.get(platform.machine(), "unknown")
    package = f"node-{system}-{machine}"
    folder = TARGET / "tools/node/node_modules" / package / "bin"
    if node_version(str(folder / "node")) < NODE_WANTED:
        (TARGET / "tools/node").mkdir(parents=True, exist_ok=True)
        run(["npm", "install", "--no-save", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error",
             "--prefix", str(TARGET / "tools/node"), f"{package}@{NODE_FALLBACK}"])
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


def node_version(node):
    try:
        text = subprocess.run([node, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return (0, 0)
    return tuple(int(part) for part in text.strip().lstrip("v").split(".")[:2]) if text else (0, 0)


def build(*targets):
    """Executables by name, as cargo has just built them or found them fresh. Both at once: the features are then the tests'."""
    command = ["cargo", "build", "--locked", "--message-format=json-render-diagnostics", *targets]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed")
    built = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return {item["target"]["name"]: item["executable"] for item in built if item.get("executable")}


def run(command, **options):
    if subprocess.run(command, stdin=subprocess.DEVNULL, **options).returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed")


def succeeds(command):
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
