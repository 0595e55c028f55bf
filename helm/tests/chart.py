"""The chart, rendered by the real Helm engine, and what a kubelet would make of it."""

import copy
import json
import re
import sys
from pathlib import Path

import helm_python
import yaml
from helm_python import _native

REPOSITORY = Path(__file__).resolve().parents[2]
CHART = REPOSITORY / "helm" / "mcp-server-chart"
VALUE_SETS = sorted((CHART / "ci").glob("*-values.yaml"))
MUST_FAIL = sorted((Path(__file__).parent / "must-fail").glob("*.yaml"))

RELEASE, NAMESPACE = "mcp-server", "mcp-system"
TENANT, CLIENT = "11111111-2222-3333-4444-555555555555", "66666666-7777-8888-9999-000000000000"
# What `--set azure.clientId=… --set azure.tenantId=… --set image.tag=1.0.0` passes.
INSTALL = {"azure": {"clientId": CLIENT, "tenantId": TENANT}, "image": {"tag": "1.0.0"}}

# The kinds that the custom resources of the chart belong to, for `Capabilities.APIVersions`.
CUSTOM_KINDS = (
    "monitoring.coreos.com/v1/PodMonitor",
    "monitoring.coreos.com/v1/ServiceMonitor",
    "monitoring.coreos.com/v1/PrometheusRule",
    "azmonitoring.coreos.com/v1/PodMonitor",
    "azmonitoring.coreos.com/v1/ServiceMonitor",
)
WEBHOOK_VARIABLES = {"AZURE_CLIENT_ID", "AZURE_TENANT_ID", "AZURE_AUTHORITY_HOST", "AZURE_FEDERATED_TOKEN_FILE"}


def merge(*maps):
    """Maps laid over one another, as Helm lays values."""
    result = {}
    for layer in maps:
        for key, value in layer.items():
            both_maps = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merge(result[key], value) if both_maps else copy.deepcopy(value)
    return result


def load(path):
    return yaml.safe_load(Path(path).read_text()) or {}


def expected_message(path):
    """The `# expect:` line of a value set that must fail."""
    return re.search(r"^# expect: (.+)$", Path(path).read_text(), re.MULTILINE).group(1)


def render_texts(values, chart=CHART, kube="v1.35.0", apis=(), name=RELEASE, namespace=NAMESPACE):
    """Template path → text, of those that rendered to anything."""
    options = {"name": name, "namespace": namespace, "kube_version": kube, "api_versions": list(apis)}
    with helm_python.Chart.load(str(chart)) as loaded:
        texts = json.loads(_native.call_string("helm_render", loaded._raw(), json.dumps(values), json.dumps(options)))
    return {path: text for path, text in texts.items() if path.endswith(".yaml") and text.strip()}


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in a map, as the API server's strict decoding does."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        assert not twice, f"twice in one map: {twice}, near {node.start_mark}"
        return super().construct_mapping(node, deep)


def render(values, **options):
    """Every object of the release."""
    texts = render_texts(values, **options)
    return [item for text in texts.values() for item in yaml.load_all(text, StrictLoader) if item]


def only(objects, kind):
    found = [item for item in objects if item["kind"] == kind]
    assert len(found) == 1, f"{len(found)} of kind {kind}"
    return found[0]


def none_of(objects, kind):
    return not any(item["kind"] == kind for item in objects)


def notes(values):
    config = helm_python.Config(storage_driver="memory", namespace=NAMESPACE)
    return config.install(str(CHART), RELEASE, values, namespace=NAMESPACE, dry_run="client")["notes"]


def pods(objects):
    """Name → (labels, spec) of every pod that the release makes or has made."""
    found = {}
    for item in objects:
        template = item if item["kind"] == "Pod" else item.get("spec", {}).get("template")
        if isinstance(template, dict) and "spec" in template:
            found[f"{item['kind']}/{item['metadata']['name']}"] = (template["metadata"]["labels"], template["spec"])
    return found


def process(objects, kind="Deployment", secrets=None, webhook=None):
    """What a kubelet runs: `env`, `args`, `ports`, `probes`, `pre_stop_seconds` and `termination_grace_seconds`.

    `secrets` maps a Secret's name to its data. `webhook` holds the variables that depend on the cluster
    (AZURE_AUTHORITY_HOST, AZURE_FEDERATED_TOKEN_FILE): they and those of the service account's annotations are injected
    as the workload identity webhook does it: into labelled pods only, and only where `env` lacks the name.
    """
    owner = only(objects, kind)
    pod = owner if kind == "Pod" else owner["spec"]["template"]
    spec = pod["spec"]
    (container,) = spec["containers"]
    maps = {item["metadata"]["name"]: item["data"] for item in objects if item["kind"] == "ConfigMap"}

    env = {}
    for source in container.get("envFrom", []):
        env.update(maps[source["configMapRef"]["name"]])
    explicit = {}
    for entry in container.get("env", []):
        if "value" in entry:
            explicit[entry["name"]] = entry["value"]
        else:
            reference = entry["valueFrom"]["secretKeyRef"]
            explicit[entry["name"]] = (secrets or {})[reference["name"]][reference["key"]]
    if pod["metadata"]["labels"].get("azure.workload.identity/use") == "true":
        account = next(
            item for item in objects
            if item["kind"] == "ServiceAccount" and item["metadata"]["name"] == spec["serviceAccountName"]
        )
        annotations = account["metadata"]["annotations"]
        injected = {
            "AZURE_CLIENT_ID": annotations["azure.workload.identity/client-id"],
            "AZURE_TENANT_ID": annotations["azure.workload.identity/tenant-id"],
            **(webhook or {}),
        }
        explicit = {**injected, **explicit}
    env.update(explicit)

    ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
    probes = {name: container[f"{name}Probe"] for name in ("startup", "liveness", "readiness") if f"{name}Probe" in container}
    return {
        "args": container.get("args", []),
        "env": env,
        "ports": ports,
        "probes": probes,
        "pre_stop_seconds": container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0),
        "termination_grace_seconds": spec.get("terminationGracePeriodSeconds", 30),
    }


# The settings table and the chart.

_ENTRY = re.compile(r'\b(required|optional|without_default|secret)\(\s*((?:"(?:[^"\\]|\\.)*"\s*,?\s*)+)\)')
_TEXT = re.compile(r'"((?:[^"\\]|\\.)*)"')


def settings():
    """Every variable of the program: name → {meaning, default, secret}."""
    source = (REPOSITORY / "src" / "settings" / "variables.rs").read_text()
    table = {}
    for kind, arguments in _ENTRY.findall(source):
        texts = [json.loads(f'"{text}"') for text in _TEXT.findall(arguments)]
        default = texts[1] if kind == "optional" else None
        table[texts[0]] = {"meaning": texts[-1], "default": default, "secret": kind == "secret"}
    return table


def value_path(variable):
    """Where the chart keeps a variable: AZURE_TENANT_ID → azure.tenantId, LOG_LEVEL → app.logLevel."""
    section, name = ("azure", variable.removeprefix("AZURE_")) if variable.startswith("AZURE_") else ("app", variable)
    first, *rest = name.lower().split("_")
    return section, first + "".join(word.capitalize() for word in rest)


# values.yaml with its comments.


class Value:
    """One key of values.yaml."""

    def __init__(self, path, comment, default, described, is_map):
        self.path, self.comment, self.default, self.described, self.is_map = path, comment, default, described, is_map

    @property
    def name(self):
        return ".".join(self.path)


def documented_values():
    """Every key of values.yaml down to those that a `# --` comment describes, in order."""
    text = (CHART / "values.yaml").read_text()
    lines = text.splitlines()

    def comment_above(line):
        above = []
        while line > 0 and lines[line - 1].strip().startswith("#"):
            line -= 1
            above.insert(0, lines[line].strip().removeprefix("#").strip())
        return " ".join(above)

    def walk(node, path):
        for key, value in node.value:
            comment = comment_above(key.start_mark.line)
            described = comment.startswith("-- ")
            default = yaml.safe_load(yaml.serialize(value))
            is_map = isinstance(value, yaml.MappingNode)
            yield Value(path + (key.value,), comment.removeprefix("-- "), default, described, is_map)
            if is_map and not described:
                yield from walk(value, path + (key.value,))

    yield from walk(yaml.compose(text), ())


def main():
    """Prints the process of the chart's server as JSON, for tests in other languages: `chart.py [values file]…`."""
    layers = [load(path) for path in sys.argv[1:]] or [INSTALL]
    print(json.dumps(process(render(merge(*layers))), indent=2))


if __name__ == "__main__":
    main()
