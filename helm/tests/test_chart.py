"""What the chart renders, held against Kubernetes, AKS, and the program's settings."""

import functools
import json
import re
import shutil
import subprocess
import sys
import warnings

import chart
import helm_python
import kubernetes_validate
import pytest
import readme
import yaml
from chart import CLIENT, INSTALL, TENANT, merge, none_of, only, render

KUBERNETES = ["1.30", "1.35", "1.36", "1.37"]
CUSTOM = {"HTTPRoute", "PodMonitor", "ServiceMonitor", "PrometheusRule", "CiliumNetworkPolicy"}

DOCUMENTS = [
    chart.REPOSITORY / "docs" / "aks.md",
    chart.REPOSITORY / "docs" / "troubleshooting.md",
    readme.README,
    chart.CHART / "templates" / "NOTES.txt",
]

value_sets = pytest.mark.parametrize("path", chart.VALUE_SETS, ids=lambda path: path.name.removesuffix("-values.yaml"))


@functools.cache
def rendered(path, **options):
    return render(chart.load(path), apis=chart.CUSTOM_KINDS, **options)


def value_set(name):
    return rendered(chart.CHART / "ci" / f"{name}-values.yaml")


def installed(extra=None, **options):
    return render(merge(INSTALL, extra or {}), **options)


def server(objects):
    (container,) = only(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    return container


def every_pod():
    """Of every value set: (name, labels, pod spec)."""
    for path in chart.VALUE_SETS:
        for name, (labels, spec) in chart.pods(rendered(path)).items():
            yield f"{path.name}: {name}", labels, spec


def every_container():
    for name, _, spec in every_pod():
        for container in spec["containers"] + spec.get("initContainers", []):
            yield name, container


# The engine and the schemas.


def test_there_are_at_least_ten_value_sets():
    assert len(chart.VALUE_SETS) >= 10


@value_sets
def test_lints_strictly(path):
    report = helm_python.lint(str(chart.CHART), chart.load(path), strict=True)
    worse_than_a_hint = [message for message in report["messages"] if message["severity"] > 1]
    assert not report["errors"] and not worse_than_a_hint


@value_sets
def test_renders_the_same_twice_and_without_blank_ends(path):
    first = chart.render_texts(chart.load(path), apis=chart.CUSTOM_KINDS)
    assert first == chart.render_texts(chart.load(path), apis=chart.CUSTOM_KINDS)
    assert not [line for text in first.values() for line in text.splitlines() if line != line.rstrip()]


@value_sets
@pytest.mark.parametrize("version", KUBERNETES)
def test_is_valid_for_kubernetes(path, version):
    for item in rendered(path, kube=f"v{version}.0"):
        if item["kind"] in CUSTOM:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kubernetes_validate.validate(item, version, strict=True)


def test_the_validator_would_see_a_misspelt_field():
    deployment = only(installed(), "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["redinessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="redinessProbe"):
        kubernetes_validate.validate(deployment, "1.35", strict=True)


@value_sets
def test_every_object_names_its_namespace_and_release(path):
    for item in rendered(path):
        if "more" in item["metadata"]["name"] or "text" in item["metadata"]["name"]:
            continue  # extraObjects: whatever they say
        assert item["metadata"]["namespace"] == chart.NAMESPACE
        assert item["metadata"]["labels"]["app.kubernetes.io/instance"] == chart.RELEASE


def test_kubernetes_below_the_floor_is_refused():
    with helm_python.Chart.load(str(chart.CHART)) as loaded:
        assert loaded.metadata["kubeVersion"] == ">=1.30.0-0"


@pytest.mark.parametrize("path", chart.MUST_FAIL, ids=lambda path: path.stem)
def test_must_fail(path):
    with pytest.raises(helm_python.HelmError) as failure:
        render(chart.load(path))
    assert chart.expected_message(path) in str(failure.value)


def test_the_schema_is_closed_wherever_the_chart_owns_the_keys():
    schema = json.loads((chart.CHART / "values.schema.json").read_text())
    for value in chart.documented_values():
        part = schema
        for key in value.path:
            assert part["additionalProperties"] is False, value.name
            assert key in part["properties"], f"{value.name} is missing in values.schema.json"
            part = part["properties"][key]
    values = chart.load(chart.CHART / "values.yaml")
    assert set(schema["properties"]) - set(values) == {"global"}
    assert set(schema["properties"]["app"]["properties"]) == set(values["app"])


# The install command and the fixed figures.


def test_the_install_command_works_as_it_is_written():
    """Its `--set` parsed by Helm itself, into its release and namespace."""
    values = helm_python.parse_set_string(f"azure.clientId={CLIENT},azure.tenantId={TENANT},image.tag=1.0.0")
    assert values == INSTALL
    objects = render(values, name="mcp-server", namespace="mcp-system")
    deployment = only(objects, "Deployment")
    assert (deployment["metadata"]["name"], deployment["metadata"]["namespace"]) == ("mcp-server", "mcp-system")
    assert server(objects)["image"] == "mcp-server:1.0.0"
    assert server(objects)["args"] == ["serve"]
    assert chart.notes(values)


def test_the_fixed_figures():
    objects = installed()
    autoscaler = only(objects, "HorizontalPodAutoscaler")["spec"]
    assert (autoscaler["minReplicas"], autoscaler["maxReplicas"]) == (2, 10)
    targets = {metric["resource"]["name"]: metric["resource"]["target"] for metric in autoscaler["metrics"]}
    assert targets == {
        "cpu": {"type": "Utilization", "averageUtilization": 80},
        "memory": {"type": "Utilization", "averageUtilization": 85},
    }
    container = server(objects)
    assert container["resources"] == {
        "requests": {"cpu": "200m", "memory": "256Mi"},
        "limits": {"cpu": "1000m", "memory": "1Gi"},
    }
    liveness, readiness = container["livenessProbe"], container["readinessProbe"]
    assert (liveness["initialDelaySeconds"], liveness["periodSeconds"]) == (10, 30)
    assert (readiness["initialDelaySeconds"], readiness["periodSeconds"]) == (5, 10)
    assert liveness["httpGet"] == {"path": "/health/live", "port": "http"}
    assert readiness["httpGet"] == {"path": "/health/ready", "port": "http"}
    assert container["ports"][0] == {"name": "http", "containerPort": 8000, "protocol": "TCP"}
    (port,) = only(objects, "Service")["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (8000, "http")
    assert only(objects, "ServiceAccount")["metadata"]["name"] == "mcp-server"


def test_the_service_account_keeps_its_name_whatever_the_release_is_called():
    assert only(installed(name="other"), "ServiceAccount")["metadata"]["name"] == "mcp-server"


# How many pods.


def test_replicas_are_left_out_while_an_autoscaler_decides():
    assert "replicas" not in only(installed(), "Deployment")["spec"]


def test_replicas_are_rendered_without_an_autoscaler():
    objects = value_set("no-autoscaling")
    assert only(objects, "Deployment")["spec"]["replicas"] == 3
    assert none_of(objects, "HorizontalPodAutoscaler")
    assert only(objects, "PodDisruptionBudget")["spec"]["minAvailable"] == "50%"


def test_a_single_pod_has_no_disruption_budget():
    assert none_of(value_set("one-replica"), "PodDisruptionBudget")
    assert none_of(installed({"autoscaling": {"minReplicas": 1}}), "PodDisruptionBudget")


def test_the_disruption_budget_never_blocks_a_node():
    budget = only(installed(), "PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] == 1 and "minAvailable" not in budget
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_zero_may_be_unavailable_when_that_is_wanted():
    assert only(installed({"podDisruptionBudget": {"maxUnavailable": 0}}), "PodDisruptionBudget")["spec"]["maxUnavailable"] == 0


def test_the_autoscaler_scales_out_at_once_and_in_slowly():
    behavior = only(installed(), "HorizontalPodAutoscaler")["spec"]["behavior"]
    assert behavior["scaleUp"]["stabilizationWindowSeconds"] == 0
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] == 300


def test_a_rollout_never_goes_below_what_is_asked_for():
    spec = only(installed(), "Deployment")["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": "25%"}
    assert (spec["minReadySeconds"], spec["revisionHistoryLimit"], spec["progressDeadlineSeconds"]) == (10, 5, 300)


# Identity.


def test_workload_identity_labels_the_pods_and_annotates_the_account():
    objects = installed()
    account = only(objects, "ServiceAccount")["metadata"]["annotations"]
    assert account == {
        "azure.workload.identity/client-id": CLIENT,
        "azure.workload.identity/tenant-id": TENANT,
        "azure.workload.identity/service-account-token-expiration": "3600",
    }
    deployment = only(objects, "Deployment")
    assert deployment["spec"]["template"]["metadata"]["labels"]["azure.workload.identity/use"] == "true"
    assert "azure.workload.identity/use" not in json.dumps(deployment["spec"]["selector"])
    assert "azure.workload.identity/use" not in deployment["metadata"]["labels"]
    assert deployment["spec"]["template"]["spec"]["serviceAccountName"] == "mcp-server"


@value_sets
def test_with_the_webhook_no_identity_variable_is_set(path):
    """An own entry of `env`, even an empty one, would win over the webhook's."""
    objects = rendered(path)
    for _, (labels, spec) in chart.pods(objects).items():
        if "azure.workload.identity/use" not in labels:
            continue
        names = {entry["name"] for container in spec["containers"] for entry in container.get("env", [])}
        assert not [name for name in names if name.startswith("AZURE_")]
        assert "AZURE_CLIENT_SECRET" not in json.dumps(spec)
    for item in objects:
        if item["kind"] == "ConfigMap":
            assert {name for name in item["data"] if name.startswith("AZURE_")} <= {"AZURE_SCOPES"}


def test_no_variable_is_set_to_nothing():
    for path in chart.VALUE_SETS:
        objects = rendered(path)
        for item in objects:
            assert item["kind"] != "ConfigMap" or all(item["data"].values()), path.name
    for name, container in every_container():
        assert all(entry.get("value", "from elsewhere") for entry in container.get("env", [])), name


def test_a_client_secret_comes_from_a_secret_and_turns_workload_identity_off():
    objects = value_set("client-secret")
    env = {entry["name"]: entry for entry in server(objects)["env"]}
    assert env["AZURE_CLIENT_SECRET"]["valueFrom"] == {"secretKeyRef": {"name": "mcp-server-entra", "key": "secret"}}
    assert env["AZURE_CLIENT_ID"]["value"] == CLIENT and env["AZURE_TENANT_ID"]["value"] == TENANT
    assert env["AZURE_AUTHORITY_HOST"]["value"] == "https://login.microsoftonline.us/"
    assert "AZURE_FEDERATED_TOKEN_FILE" not in env
    assert "azure.workload.identity" not in json.dumps(objects)
    assert none_of(objects, "Secret")


def test_without_the_webhook_the_chart_projects_the_token():
    objects = value_set("own-projection")
    spec = only(objects, "Deployment")["spec"]["template"]["spec"]
    env = {entry["name"]: entry["value"] for entry in server(objects)["env"]}
    assert env == {
        "AZURE_TENANT_ID": TENANT,
        "AZURE_CLIENT_ID": CLIENT,
        "AZURE_AUTHORITY_HOST": "https://login.microsoftonline.com",
        "AZURE_FEDERATED_TOKEN_FILE": "/var/run/secrets/contoso/federated",
    }
    volume = next(volume for volume in spec["volumes"] if volume["name"] == "azure-identity-token")
    assert volume["projected"]["sources"] == [
        {"serviceAccountToken": {"audience": "api://AzureADTokenExchange", "expirationSeconds": 86400, "path": "federated"}}
    ]
    mount = next(mount for mount in server(objects)["volumeMounts"] if mount["name"] == "azure-identity-token")
    assert mount == {"name": "azure-identity-token", "mountPath": "/var/run/secrets/contoso", "readOnly": True}
    assert "azure.workload.identity/use" not in json.dumps(objects)


def test_the_projected_token_stands_where_the_program_looks_by_itself():
    env = chart.process(installed({"workloadIdentity": {"webhook": False}}))["env"]
    assert env["AZURE_FEDERATED_TOKEN_FILE"] == chart.settings()["AZURE_FEDERATED_TOKEN_FILE"]["default"]


def test_scopes_are_really_rendered():
    scope = "api://backend/.default"
    assert chart.process(installed({"azure": {"scopes": scope}}))["env"]["AZURE_SCOPES"] == scope
    both = ["api://backend/.default", "api://backend/.default"]
    assert chart.process(installed({"azure": {"scopes": both}}))["env"]["AZURE_SCOPES"] == ",".join(both)


def test_pods_are_renewed_when_settings_or_identity_change():
    def checksums(extra=None):
        annotations = only(installed(extra), "Deployment")["spec"]["template"]["metadata"]["annotations"]
        return annotations["checksum/config"], annotations["checksum/identity"]

    before = checksums()
    assert checksums() == before
    settings = checksums({"app": {"logLevel": "DEBUG"}})
    assert settings[0] != before[0] and settings[1] == before[1]
    identity = checksums({"azure": {"clientId": TENANT}})
    assert identity[1] != before[1]
    assert checksums({"resources": {"limits": {"cpu": "2"}}}) == before


# Hosts, grace, networks.


def test_allowed_hosts_are_those_of_the_service_and_of_the_ways_in():
    def hosts(extra=None, **options):
        return chart.process(installed(extra, **options))["env"]["ALLOWED_HOSTS"].split(",")

    inside = ["mcp-server", "mcp-server.mcp-system", "mcp-server.mcp-system.svc", "mcp-server.mcp-system.svc.cluster.local"]
    assert hosts() == ["localhost", "127.0.0.1", "[::1]", *inside]
    route = {"httpRoute": {"enabled": True, "parentRefs": [{"name": "g"}], "hostnames": ["a.example", "b.example"]}}
    ingress = {"ingress": {"enabled": True, "hosts": [{"host": "b.example"}, {"host": "c.example"}]}}
    extra = {"extraAllowedHosts": ["d.example:8443"]}
    assert hosts(merge(route, ingress, extra))[7:] == ["a.example", "b.example", "c.example", "d.example:8443"]
    assert hosts(merge(route, {"httpRoute": {"enabled": False}})) == hosts()
    assert hosts({"app": {"allowedHosts": ["x.example"]}}) == ["x.example"]
    assert "demo-mcp-server.tools.svc.corp.local" in hosts({"clusterDomain": "corp.local"}, name="demo", namespace="tools")


@pytest.mark.parametrize(
    ("extra", "grace"),
    [
        ({}, 60),  # 10 + 25 + 5, and 20 to spare; drainDelay is a part of the 25
        ({"app": {"drainDelay": 20}}, 60),
        ({"app": {"shutdownGrace": 45}}, 80),
        ({"app": {"shutdownGrace": 29.5}}, 65),
        ({"lifecycle": {"preStop": {"sleep": {"seconds": 30}}}}, 80),
        ({"lifecycle": None}, 50),
        ({"terminationGracePeriodSeconds": 40}, 40),
    ],
)
def test_the_termination_grace_follows_pre_stop_and_shutdown_grace(extra, grace):
    process = chart.process(installed(extra))
    assert process["termination_grace_seconds"] == grace
    assert grace >= process["pre_stop_seconds"] + float(process["env"]["SHUTDOWN_GRACE"]) + 5


def test_the_network_policy_lets_in_calls_and_scrapes_and_out_dns_and_https():
    policy = only(installed(), "NetworkPolicy")["spec"]
    calls, scrapes = policy["ingress"]
    assert calls == {"ports": [{"port": 8000, "protocol": "TCP"}]}
    assert scrapes["ports"] == [{"port": 9090, "protocol": "TCP"}]
    assert scrapes["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}]
    dns, https = policy["egress"]
    assert dns["ports"] == [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]
    assert {"ipBlock": {"cidr": "169.254.10.0/24"}} in dns["to"]
    assert https["ports"] == [{"port": 443, "protocol": "TCP"}]
    assert {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.169.254/32"]}} in https["to"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]


def test_the_network_policy_covers_the_pod_of_helm_test():
    objects = installed()
    selector = only(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    for labels, _ in chart.pods(objects).values():
        assert selector.items() <= labels.items()


def test_the_network_policy_can_be_widened_narrowed_and_left_out():
    assert only(value_set("network-in-cluster"), "NetworkPolicy")["spec"]["egress"][-1]["ports"] == [{"port": 8080, "protocol": "TCP"}]
    assert only(value_set("http-route"), "NetworkPolicy")["spec"]["ingress"][0]["from"]
    assert len(only(value_set("one-replica"), "NetworkPolicy")["spec"]["ingress"]) == 1
    assert none_of(value_set("network-off"), "NetworkPolicy")


def test_cilium_takes_egress_over():
    objects = value_set("network-cilium")
    assert only(objects, "NetworkPolicy")["spec"]["policyTypes"] == ["Ingress"]
    assert "egress" not in only(objects, "NetworkPolicy")["spec"]
    policy = only(objects, "CiliumNetworkPolicy")
    assert policy["apiVersion"] == "cilium.io/v2"
    dns, authority, backend = policy["spec"]["egress"]
    assert dns["toPorts"][0]["rules"] == {"dns": [{"matchPattern": "*"}]}
    assert dns["toPorts"][0]["ports"] == [{"port": "53", "protocol": "ANY"}]
    assert authority["toFQDNs"] == [
        {"matchName": "login.microsoftonline.com"},
        {"matchPattern": "*.login.microsoft.com"},
        {"matchName": "telemetry.contoso.com"},
    ]
    assert authority["toPorts"] == [{"ports": [{"port": "443", "protocol": "TCP"}]}]
    assert backend["toFQDNs"] == [{"matchName": "api.contoso.com"}]
    assert backend["toPorts"] == [{"ports": [{"port": "8443", "protocol": "TCP"}]}]
    labels = only(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert policy["spec"]["endpointSelector"]["matchLabels"].items() <= labels.items()


@pytest.mark.parametrize(("url", "port"), [("http://api.contoso.com/v1", "80"), ("https://api.contoso.com", "443")])
def test_cilium_knows_the_port_of_the_backend(url, port):
    objects = installed({"app": {"backendApiUrl": url}, "ciliumNetworkPolicy": {"enabled": True}})
    assert only(objects, "CiliumNetworkPolicy")["spec"]["egress"][-1]["toPorts"][0]["ports"][0]["port"] == port


# The ways in, and the ways to look in.


def test_the_http_route_field_by_field():
    route = only(value_set("http-route"), "HTTPRoute")
    assert route["apiVersion"] == "gateway.networking.k8s.io/v1"
    assert route["spec"] == {
        "parentRefs": [{"name": "public", "namespace": "gateways", "sectionName": "https"}],
        "hostnames": ["mcp.contoso.com", "mcp.contoso.net"],
        "rules": [
            {
                "matches": [{"path": {"type": "PathPrefix", "value": "/mcp"}}],
                "timeouts": {"request": "0s", "backendRequest": "0s"},
                "backendRefs": [{"name": "mcp-server", "port": 8000}],
            }
        ],
    }


def test_clients_without_a_token_reach_the_metadata_where_tokens_are_wanted():
    metadata = "/.well-known/oauth-protected-resource"
    route = {"httpRoute": {"enabled": True, "parentRefs": [{"name": "g"}], "hostnames": ["a.example"]}}
    ingress = {"ingress": {"enabled": True, "hosts": [{"host": "a.example"}]}}
    entra = {"inboundAuth": "entra", "inboundAudience": [CLIENT], "publicUrl": "https://a.example/mcp"}
    for app, extra in [({}, []), (entra, [metadata])]:
        objects = installed(merge(route, ingress, {"app": app}))
        matches = only(objects, "HTTPRoute")["spec"]["rules"][0]["matches"]
        assert [match["path"]["value"] for match in matches] == ["/mcp", *extra]
        paths = only(objects, "Ingress")["spec"]["rules"][0]["http"]["paths"]
        assert [path["path"] for path in paths] == ["/mcp", *extra]


def test_the_ingress_leads_to_mcp_only():
    ingress = only(value_set("ingress"), "Ingress")
    assert ingress["spec"]["ingressClassName"] == "nginx"
    assert [rule["host"] for rule in ingress["spec"]["rules"]] == ["mcp.contoso.com", "tools.contoso.com"]
    paths = [path for rule in ingress["spec"]["rules"] for path in rule["http"]["paths"]]
    assert {path["path"] for path in paths} == {"/mcp"}
    assert {path["backend"]["service"]["port"]["name"] for path in paths} == {"http"}
    assert ingress["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"


def test_the_pod_monitor_of_azure_field_by_field():
    monitor = only(value_set("pod-monitor-azure"), "PodMonitor")
    assert monitor["apiVersion"] == "azmonitoring.coreos.com/v1"
    assert monitor["spec"] == {
        "selector": {"matchLabels": server_labels()},
        "labelLimit": 63,
        "labelNameLengthLimit": 511,
        "labelValueLengthLimit": 1023,
        "podMetricsEndpoints": [{"port": "metrics", "path": "/metrics", "interval": "30s", "scrapeTimeout": "10s"}],
    }


def test_the_pod_monitor_of_the_operator_field_by_field():
    monitor = only(value_set("pod-monitor-operator"), "PodMonitor")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["spec"] == {
        "selector": {"matchLabels": server_labels()},
        "podMetricsEndpoints": [{"port": "metrics", "path": "/metrics", "interval": "30s", "scrapeTimeout": "10s"}],
    }


def test_the_service_monitor_field_by_field_and_its_port():
    objects = value_set("service-monitor")
    monitor = only(objects, "ServiceMonitor")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert monitor["spec"] == {
        "selector": {"matchLabels": {name: value for name, value in server_labels().items() if "component" not in name}},
        "endpoints": [{"port": "metrics", "path": "/metrics", "interval": "15s", "scrapeTimeout": "5s"}],
    }
    service = only(objects, "Service")
    assert [port["name"] for port in service["spec"]["ports"]] == ["http", "metrics"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()


def server_labels():
    return {
        "app.kubernetes.io/name": "mcp-server",
        "app.kubernetes.io/instance": "mcp-server",
        "app.kubernetes.io/component": "server",
    }


def test_the_prometheus_rule_field_by_field():
    rule = only(value_set("pod-monitor-operator"), "PrometheusRule")
    assert rule["apiVersion"] == "monitoring.coreos.com/v1"
    contoso = next(group for group in rule["spec"]["groups"] if group["name"] == "contoso")
    assert contoso["rules"][0]["alert"] == "McpServerAbsent"


def test_missing_kinds_are_skipped_when_asked():
    wanted = {"monitoring": {"missingCRDs": "skipIfMissing", "podMonitor": {"enabled": True}}}
    assert none_of(installed(wanted), "PodMonitor")
    assert only(installed(wanted, apis=["azmonitoring.coreos.com/v1/PodMonitor"]), "PodMonitor")


def test_rules_and_dashboards_of_the_chart_are_taken_from_files(tmp_path):
    copy = tmp_path / "mcp-server-chart"
    shutil.copytree(chart.CHART, copy, ignore=shutil.ignore_patterns("files"))
    values = merge(INSTALL, {"monitoring": {"prometheusRule": {"enabled": True}, "grafanaDashboard": {"enabled": True}}})
    without = render(values, chart=copy)
    assert none_of(without, "PrometheusRule")
    assert [item["metadata"]["name"] for item in without if item["kind"] == "ConfigMap"] == ["mcp-server"]

    (copy / "files" / "rules").mkdir(parents=True)
    (copy / "files" / "dashboards").mkdir()
    expression = '{{ $labels.instance }} of {{ $value }}'
    group = {"name": "own", "rules": [{"alert": "A", "expr": "up == 0", "annotations": {"summary": expression}}]}
    (copy / "files" / "rules" / "own.yaml").write_text(yaml.safe_dump({"groups": [group]}))
    dashboard = json.dumps({"title": "{{tool}}", "panels": []}, indent=2)
    (copy / "files" / "dashboards" / "own.json").write_text(dashboard)
    objects = render(values, chart=copy)
    assert only(objects, "PrometheusRule")["spec"]["groups"] == [group]
    config = next(item for item in objects if item["metadata"]["name"] == "mcp-server-dashboards")
    assert config["data"] == {"own.json": dashboard}
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_metrics_are_not_on_the_service_by_default_and_go_with_their_port():
    assert [port["name"] for port in server(installed())["ports"]] == ["http", "metrics"]
    assert [port["name"] for port in only(installed(), "Service")["spec"]["ports"]] == ["http"]
    assert [port["name"] for port in server(value_set("one-replica"))["ports"]] == ["http"]


# helm test.


def test_helm_test_runs_check_as_the_server_would_run():
    for path in chart.VALUE_SETS:
        objects = rendered(path)
        if none_of(objects, "Pod"):
            assert path.name == "network-off-values.yaml"
            continue
        pod, deployment = only(objects, "Pod"), only(objects, "Deployment")["spec"]["template"]
        (check,), (container,) = pod["spec"]["containers"], deployment["spec"]["containers"]
        assert check["args"] == ["check"]
        for key in ("image", "env", "envFrom", "securityContext", "volumeMounts"):
            assert check.get(key) == container.get(key), key
        for key in ("serviceAccountName", "securityContext", "volumes", "automountServiceAccountToken", "enableServiceLinks"):
            assert pod["spec"][key] == deployment["spec"][key], key
        use = "azure.workload.identity/use"
        assert pod["metadata"]["labels"].get(use) == deployment["metadata"]["labels"].get(use)
        assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
        assert pod["metadata"]["annotations"]["helm.sh/hook-delete-policy"] == "before-hook-creation,hook-succeeded"
        assert pod["spec"]["restartPolicy"] == "Never"


def test_no_call_is_ever_sent_to_the_pod_of_helm_test():
    objects = installed()
    selector = only(objects, "Service")["spec"]["selector"]
    labels = only(objects, "Pod")["metadata"]["labels"]
    assert not selector.items() <= labels.items()
    assert selector.items() <= only(objects, "Deployment")["spec"]["template"]["metadata"]["labels"].items()


# Pod Security `restricted`, rule by rule.


def test_restricted_no_host_namespaces_paths_or_ports():
    for name, _, spec in every_pod():
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        kinds = {kind for volume in spec["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    for name, container in every_container():
        assert not [port for port in container.get("ports", []) if "hostPort" in port], name


def test_restricted_no_privileges_and_no_escalation():
    for name, container in every_container():
        context = container["securityContext"]
        assert not context.get("privileged") and context["allowPrivilegeEscalation"] is False, name


def test_restricted_runs_as_a_user_who_is_not_root():
    for name, _, spec in every_pod():
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] == 65532, name
        assert spec["securityContext"]["fsGroup"] == 65532, name
    for name, container in every_container():
        assert container["securityContext"]["runAsNonRoot"] is True and container["securityContext"]["runAsUser"] == 65532, name


def test_restricted_seccomp_is_the_runtime_default():
    for name, _, spec in every_pod():
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name


def test_restricted_drops_every_capability():
    for name, container in every_container():
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name


def test_the_root_is_read_only_and_the_temporary_directory_limited():
    for name, container in every_container():
        assert container["securityContext"]["readOnlyRootFilesystem"] is True, name
        assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"], name
    for name, _, spec in every_pod():
        assert {"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}} in spec["volumes"], name


def test_the_kubernetes_api_token_is_never_mounted():
    for name, _, spec in every_pod():
        assert spec["automountServiceAccountToken"] is False, name
    assert only(installed(), "ServiceAccount")["automountServiceAccountToken"] is False


def test_a_service_called_metrics_cannot_change_the_settings():
    for name, _, spec in every_pod():
        assert spec["enableServiceLinks"] is False, name


# AKS deployment safeguards, rule by rule.


def test_safeguard_every_container_has_readiness_and_liveness_probes():
    for name, container in every_container():
        assert "readinessProbe" in container and "livenessProbe" in container, name


def test_safeguard_every_container_has_requests_and_limits_above_the_least():
    def cpu(text):
        return float(text.removesuffix("m")) / 1000 if text.endswith("m") else float(text)

    def mebibytes(text):
        return float(text.removesuffix("Gi")) * 1024 if text.endswith("Gi") else float(text.removesuffix("Mi"))

    for name, container in every_container():
        for part in ("requests", "limits"):
            assert cpu(container["resources"][part]["cpu"]) >= 0.1, name
            assert mebibytes(container["resources"][part]["memory"]) >= 100, name


def test_safeguard_no_image_is_latest_or_without_a_version():
    for name, container in every_container():
        assert re.search(r"(:(?!latest$)[\w][\w.-]*|@sha256:[0-9a-f]{64})$", container["image"]), name


def test_safeguard_images_come_from_the_registry_that_is_allowed():
    for name in ("production", "everything"):
        for _, spec in chart.pods(value_set(name)).values():
            assert all(container["image"].startswith("contoso.azurecr.io/mcp-server") for container in spec["containers"])


def test_safeguard_services_have_selectors_of_their_own():
    for path in chart.VALUE_SETS:
        selectors = [item["spec"]["selector"] for item in rendered(path) if item["kind"] == "Service"]
        assert len(selectors) == 1, path.name
    first, second = (only(installed(name=name), "Service")["spec"]["selector"] for name in ("one", "two"))
    assert first != second


def test_safeguard_pods_are_spread_or_kept_apart():
    for path in chart.VALUE_SETS:
        template = only(rendered(path), "Deployment")["spec"]["template"]
        constraints = template["spec"].get("topologySpreadConstraints", [])
        assert constraints or "podAntiAffinity" in template["spec"].get("affinity", {}), path.name
        for constraint in constraints:
            assert constraint["whenUnsatisfiable"] == "ScheduleAnyway" and constraint["maxSkew"] == 1
            assert constraint["labelSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    keys = [item["topologyKey"] for item in only(installed(), "Deployment")["spec"]["template"]["spec"]["topologySpreadConstraints"]]
    assert keys == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]


def test_safeguard_no_label_belongs_to_aks():
    for path in chart.VALUE_SETS:
        for item in rendered(path):
            assert "kubernetes.azure.com" not in json.dumps(item), path.name


def test_safeguard_every_server_waits_before_it_stops():
    for path in chart.VALUE_SETS:
        assert server(rendered(path))["lifecycle"]["preStop"]["sleep"]["seconds"] >= 10, path.name


def test_safeguard_no_toleration_of_the_system_pool():
    for name, _, spec in every_pod():
        assert not [item for item in spec.get("tolerations", []) if item.get("key") == "CriticalAddonsOnly"], name


def test_checkov_finds_nothing_that_is_not_explained(tmp_path):
    """Once, over every value set, each in a namespace of its own."""
    objects = []
    for path in chart.VALUE_SETS:
        objects += rendered(path, namespace=path.name.removesuffix("-values.yaml"))
    manifests = tmp_path / "all.yaml"
    manifests.write_text(yaml.safe_dump_all(objects))
    config = chart.REPOSITORY / "helm" / "tests" / "checkov.yaml"
    command = [sys.executable, "-m", "checkov.main", "--file", str(manifests), "--config-file", str(config)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    report = json.loads(run.stdout)
    assert report["summary"]["passed"] > 100 and report["summary"]["parsing_errors"] == 0
    failed = {f"{check['check_id']} {check['check_name']}: {check['resource']}" for check in report["results"]["failed_checks"]}
    assert not failed


# Settings ⇔ chart ⇔ comments ⇔ README.


def shown(value):
    """A value as the program's table writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, list) else str(value)


variables = pytest.mark.parametrize("name", chart.settings())
# Where the chart takes a secret from: the map with `existingSecret`, and the key in that Secret.
SECRETS = {"AZURE_CLIENT_SECRET": ("azure", "client-secret"), "OTEL_EXPORTER_OTLP_HEADERS": ("otlp", "headers")}


@variables
def test_every_variable_has_a_value_with_the_same_meaning_and_default(name):
    setting = chart.settings()[name]
    values = {value.name: value for value in chart.documented_values()}
    if setting["secret"]:
        assert name in SECRETS, f"{name} is secret: give it an existing Secret, as azure.existingSecret"
        assert name in values[f"{SECRETS[name][0]}.existingSecret"].comment
        return
    value = values.get(".".join(chart.value_path(name)))
    assert value, f"{name} has no value: add `{'.'.join(chart.value_path(name))}` to values.yaml and values.schema.json"
    assert value.comment.startswith(setting["meaning"]), f"the comment of {value.name} is not: {setting['meaning']}"
    if name == "BACKEND_API_URL":
        assert value.default == "https://api.example.com"
    else:
        assert value.default in (None, "", []) or shown(value.default) == setting["default"]


@variables
def test_every_variable_reaches_the_program(name):
    values = {
        "AZURE_TENANT_ID": "contoso.com",
        "AZURE_CLIENT_ID": "99999999-2222-3333-4444-555555555555",
        "AZURE_AUTHORITY_HOST": "https://login.microsoftonline.us",
        "AZURE_FEDERATED_TOKEN_FILE": "/var/run/secrets/other/token",
        "AZURE_SCOPES": "api://other/.default",
        "BACKEND_API_URL": "https://other.contoso.com",
        "PUBLIC_URL": "https://other.contoso.com/mcp",
        "HOST": "10.0.0.1",
        "LOG_LEVEL": "DEBUG",
        "HTTPS_PROXY": "http://proxy.contoso.com:3128",
        "ALL_PROXY": "http://proxy.contoso.com:3128",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces",
        "ALLOWED_HOSTS": ["a.contoso.com", "[::1]:8000"],
        "TRUSTED_PROXIES": ["10.0.0.0/8", "fd00::/8"],
        "INBOUND_AUDIENCE": [CLIENT, "api://server"],
        "INBOUND_TENANTS": [TENANT],
        "INBOUND_CLIENTS": [CLIENT],
        "INBOUND_SCOPE_NAMES": ["users.read=Users.Read"],
        "INBOUND_ROLE_NAMES": ["users.read=Users.Read.All"],
        "OTEL_TRACES_SAMPLER_ARG": 0.25,
        "MAX_IN_FLIGHT_PER_TOOL": 100,
    }
    if name in SECRETS:
        section, key = SECRETS[name]
        objects = installed({section: {"existingSecret": "secret"}})
        assert chart.process(objects, secrets={"secret": {key: "s"}})["env"][name] == "s"
        return
    section, key = chart.value_path(name)
    schema = json.loads((chart.CHART / "values.schema.json").read_text())["properties"][section]["properties"][key]
    default = chart.load(chart.CHART / "values.yaml")[section][key]
    if name in values:
        value = values[name]
    elif isinstance(default, bool):
        value = not default
    elif isinstance(default, (int, float)):
        value = default + 1
    elif isinstance(default, list):
        value = ["https://a.contoso.com", "https://b.contoso.com"]
    else:
        value = "/other" if "enum" not in schema else next(item for item in schema["enum"] if item != default)
    context = {"workloadIdentity": {"webhook": name == "AZURE_SCOPES"}}
    if name.startswith(("INBOUND_", "BACKEND_AUTH", "OBO_", "FORWARD_")):
        entra = {"inboundAuth": "entra", "inboundAudience": [CLIENT], "publicUrl": "https://a.contoso.com/mcp"}
        context["app"] = merge(entra, {"backendAuth": "on-behalf-of"} if name == "OBO_APP_FALLBACK" else {})
    if name == "AUDIT_REQUIRED":
        context["app"] = {"auditLogFile": "/audit/file"}
    objects = installed(merge(context, {section: {key: value}}))
    assert chart.process(objects)["env"][name] == shown(value)


def test_the_chart_sets_nothing_that_the_program_does_not_know():
    values = chart.load(chart.CHART / "values.yaml")
    known = {chart.value_path(name) for name in chart.settings() if name not in SECRETS}
    assert {("app", key) for key in values["app"]} == {path for path in known if path[0] == "app"}
    environment = set(chart.process(installed({"workloadIdentity": {"webhook": False}}))["env"])
    assert environment <= set(chart.settings())


def test_numbers_keep_their_shape():
    env = chart.process(installed({"app": {"maxRequestBytes": 67108864, "backendApiTimeout": 0.25, "drainDelay": 0}}))["env"]
    assert (env["MAX_REQUEST_BYTES"], env["BACKEND_API_TIMEOUT"], env["DRAIN_DELAY"]) == ("67108864", "0.25", "0")


def test_decimals_can_be_set_on_the_command_line():
    """Helm's `--set` makes numbers of whole numbers only."""
    process = chart.process(installed(helm_python.parse_set_string("app.backendApiTimeout=2.5,app.shutdownGrace=29.5")))
    assert (process["env"]["BACKEND_API_TIMEOUT"], process["env"]["SHUTDOWN_GRACE"]) == ("2.5", "29.5")
    assert process["termination_grace_seconds"] == 65


def test_the_table_of_settings_is_the_one_in_the_example_file():
    example = (chart.REPOSITORY / ".env.example").read_text()
    assert set(re.findall(r"^#?([A-Z][A-Z0-9_]+)=", example, re.MULTILINE)) == set(chart.settings())


def test_every_key_is_commented():
    uncommented = [value.name for value in chart.documented_values() if not value.comment]
    undescribed = [value.name for value in chart.documented_values() if not value.described and not value.is_map]
    assert not uncommented and not undescribed


def test_the_readme_is_up_to_date():
    assert readme.README.read_text() == readme.updated(), "run scripts/chart-test --update-readme"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_value_that_is_named_in_the_documents_exists(path):
    values = chart.load(chart.CHART / "values.yaml")
    text = path.read_text()
    named = set(re.findall(r"--set(?:-string)? ([a-zA-Z]+(?:\.[a-zA-Z]+)*)", text))
    tops = "|".join(key for key, value in values.items() if isinstance(value, dict))
    named |= set(re.findall(rf"[`{{ (]((?:{tops})\.[a-zA-Z]+(?:\.[a-zA-Z]+)*)", text))
    assert named
    for name in named - {"app.kubernetes.io", "azure.workload.identity", "monitoring.coreos.com"}:
        part = values
        for key in name.split("."):
            assert isinstance(part, dict) and key in part, f"{path.name} names {name}"
            part = part[key]


# NOTES.txt.


def test_notes_of_workload_identity():
    text = chart.notes(INSTALL)
    assert "az identity federated-credential create" in text
    assert "--subject system:serviceaccount:mcp-system:mcp-server" in text
    assert "--audiences api://AzureADTokenExchange" in text
    assert f"[?clientId=='{CLIENT}'].name" in text
    # `create` replaces a credential of the same name, so the name holds all that tells two deployments apart.
    assert '--name "$CLUSTER-mcp-system-mcp-server"' in text and "replaces a credential" in text
    assert "kubectl rollout status deployment/mcp-server --namespace mcp-system && helm test mcp-server --namespace mcp-system" in text
    assert "kubectl port-forward service/mcp-server 8000:8000 --namespace mcp-system" in text


def test_notes_of_a_client_secret():
    text = chart.notes(merge(INSTALL, {"azure": {"existingSecret": "entra"}}))
    assert 'kubectl create secret generic entra --namespace mcp-system' in text
    assert '--from-literal=client-secret="$AZURE_CLIENT_SECRET"' in text
    assert "federated" not in text


def test_notes_of_a_route_and_of_an_ingress():
    route = {"httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["mcp.contoso.com"]}}
    assert "kubectl get httproute mcp-server" in chart.notes(merge(INSTALL, route))
    assert "https://mcp.contoso.com/mcp" in chart.notes(merge(INSTALL, route))
    ingress = {"ingress": {"enabled": True, "hosts": [{"host": "old.contoso.com"}]}}
    assert "http://old.contoso.com/mcp" in chart.notes(merge(INSTALL, ingress))
    assert "kubectl get ingress mcp-server" in chart.notes(merge(INSTALL, ingress))


def warned(extra):
    return [line for line in chart.notes(merge(INSTALL, extra)).splitlines() if line.startswith("WARNING")]


SOUND = {
    "networkPolicy": {"ingressFrom": [{"podSelector": {}}]},
    "azure": {"scopes": "api://backend/.default"},
    "image": {"registry": "contoso.azurecr.io"},
    "app": {"backendApiUrl": "https://api.contoso.com/v1"},
}


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"app": {"backendApiUrl": "https://api.example.com"}}, "still the placeholder"),
        ({"azure": {"scopes": "https://management.azure.com/.default"}}, "azure.scopes is still"),
        ({"image": {"registry": ""}}, "image.registry is empty"),
        ({"app": {"backendApiUrl": "http://api.backend.svc:8080"}}, "the NetworkPolicy lets pods reach"),
        ({"app": {"backendApiUrl": "https://api.backend.svc.cluster.local"}}, "the NetworkPolicy lets pods reach"),
        ({"app": {"backendApiUrl": "https://api.contoso.com:8443"}}, "the NetworkPolicy lets pods reach"),
        ({"httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]}}, "httpRoute.hostnames is empty"),
        ({"serviceAccount": {"create": False}}, "serviceAccount.create is false"),
        ({"app": {"publicUrl": "https://a.example/mcp", "allowedHosts": ["b.a.example"]}}, "app.allowedHosts does not list a.example"),
        ({"networkPolicy": {"ingressFrom": []}}, "no caller authentication"),
        ({"networkPolicy": {"enabled": False}}, "no caller authentication"),
        ({"podDisruptionBudget": {"maxUnavailable": 0}}, "allows no eviction"),
        ({"podDisruptionBudget": {"maxUnavailable": "0%"}}, "allows no eviction"),
        ({"podDisruptionBudget": {"maxUnavailable": None, "minAvailable": 2}}, "allows no eviction"),
        ({"podDisruptionBudget": {"maxUnavailable": None, "minAvailable": "51%"}}, "allows no eviction"),
        ({"podDisruptionBudget": {"maxUnavailable": None, "minAvailable": "100%"}}, "allows no eviction"),
        ({"monitoring": {"prometheusRule": {"enabled": True}}}, "runbookBaseUrl is empty"),
    ],
)
def test_notes_warn_of_one_thing_at_a_time(extra, words):
    (warning,) = warned(merge(SOUND, extra))
    assert words in warning


def test_notes_are_silent_when_all_is_well():
    assert warned(SOUND) == []
    assert warned(merge(SOUND, {"app": {"backendApiUrl": "https://api.contoso.com:443"}})) == []
    entra = {"inboundAuth": "entra", "inboundAudience": [CLIENT], "publicUrl": "https://mcp.contoso.com/mcp"}
    for hosts in (["x.example", "mcp.contoso.com:443"], ["*"]):
        assert warned(merge(SOUND, {"app": merge(entra, {"allowedHosts": hosts})})) == []
    assert warned(merge(SOUND, {"networkPolicy": {"ingressFrom": []}, "app": entra})) == []
    assert warned(merge(SOUND, {"podDisruptionBudget": {"maxUnavailable": None, "minAvailable": "50%"}})) == []
    assert warned(merge(SOUND, {"podDisruptionBudget": {"maxUnavailable": None, "minAvailable": 1}})) == []
    closed = {"app": {"backendApiUrl": "http://api.backend.svc:8080"}, "networkPolicy": {"extraEgress": [{}]}}
    assert warned(merge(SOUND, closed)) == []
