"""What an API server would refuse or misread although it is valid YAML: wrong types, duplicates, combinations, and lost pods."""

import itertools

import chart
import cluster
import kubernetes_validate
import pytest
from chart import INSTALL, merge, none_of, only, render

value_sets = pytest.mark.parametrize("path", chart.VALUE_SETS, ids=lambda path: path.name.removesuffix("-values.yaml"))


def installed(extra=None, **options):
    return render(merge(INSTALL, extra or {}), **options)


def server(objects):
    (container,) = only(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    return container


def valid(objects):
    for item in objects:
        if "." not in item["apiVersion"].split("/")[0] or item["apiVersion"].startswith(("networking.k8s.io", "policy")):
            kubernetes_validate.validate(item, "1.36", strict=True)


# Texts stay texts.

# Each is a number, a boolean or a map where nobody puts it between quotation marks.
TRAPS = {
    "azure": {"existingSecret": "123", "existingSecretKey": "1.0"},
    "otlp": {"existingSecret": "1e3", "existingSecretKey": "0x10"},
    "image": {"repository": "mcp: server", "tag": "20261130", "pullSecrets": [{"name": "0"}]},
    "existingConfigMap": "5",
    "extraEnv": [
        {"name": "READ_ONLY", "value": True},
        {"name": "ENABLED_TOOLS", "value": "{{ .Release.Name }}: x"},
        {"name": "TEXT", "value": "a{{ \": b\" }}"},
    ],
    "envFrom": [{"secretRef": {"name": "9{{ 9 }}"}}],
    "serviceAccount": {"name": "123"},
    "priorityClassName": "yes",
    "runtimeClassName": "on",
    "nameOverride": "1.0",
    "fullnameOverride": "yes",
    "httpRoute": {
        "enabled": True, "parentRefs": [{"name": "1"}], "hostnames": ["1.0"], "paths": [{"type": "PathPrefix", "value": "/a: b"}],
    },
    "ingress": {"enabled": True, "className": "no", "hosts": [{"host": "1e3", "paths": [{"path": "/a: b #c"}]}]},
    "extraVolumes": [{"name": "ca", "configMap": {"name": "1{{ 2 }}"}}],
    "extraVolumeMounts": [{"name": "ca", "mountPath": "/a{{ \": b\" }}"}],
    "commonLabels": {"on": "off"},
    "podAnnotations": {"1": "true"},
    "monitoring": {"podMonitor": {"enabled": True}, "prometheusRule": {"enabled": True}},
    "networkPolicy": {"extraEgress": [{"to": [{"podSelector": {"matchLabels": {"a": "{{ 1 }}"}}}]}]},
    "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {
        "nodeSelectorTerms": [{"matchExpressions": [{"key": "a", "operator": "In", "values": ["1{{ 2 }}"]}]}]}}},
}


def test_texts_that_look_like_numbers_or_maps_stay_texts():
    objects = installed(TRAPS, name="123", namespace="1e3")
    valid(objects)
    for item in objects:
        place = item["metadata"]
        assert (place["namespace"], place["labels"]["app.kubernetes.io/instance"]) == ("1e3", "123")
        assert place["labels"]["app.kubernetes.io/name"] == "1.0" and place["labels"]["on"] == "off"
        assert place["name"].startswith(("yes", "123"))
    deployment = only(objects, "Deployment")
    spec, container = deployment["spec"]["template"]["spec"], server(objects)
    assert container["image"] == "mcp: server:20261130"
    assert (spec["priorityClassName"], spec["runtimeClassName"], spec["serviceAccountName"]) == ("yes", "on", "123")
    assert spec["imagePullSecrets"] == [{"name": "0"}]
    env = {entry["name"]: entry.get("value") or entry["valueFrom"]["secretKeyRef"] for entry in container["env"]}
    assert env["AZURE_CLIENT_SECRET"] == {"name": "123", "key": "1.0"}
    assert env["OTEL_EXPORTER_OTLP_HEADERS"] == {"name": "1e3", "key": "0x10"}
    assert (env["READ_ONLY"], env["ENABLED_TOOLS"], env["TEXT"]) == ("true", "123: x", "a: b")
    sources = [next(iter(source.values()))["name"] for source in container["envFrom"]]
    assert sources == ["yes", "5", "99"]
    assert {"name": "ca", "configMap": {"name": "12"}} in spec["volumes"]
    assert {"name": "ca", "mountPath": "/a: b"} in container["volumeMounts"]
    assert "12" in str(spec["affinity"])
    route, ingress = only(objects, "HTTPRoute")["spec"], only(objects, "Ingress")["spec"]
    assert route["rules"][0]["matches"][0]["path"]["value"] == "/a: b" and route["rules"][0]["backendRefs"][0]["name"] == "yes"
    assert ingress["ingressClassName"] == "no" and ingress["rules"][0]["host"] == "1e3"
    assert ingress["rules"][0]["http"]["paths"][0]["path"] == "/a: b #c"
    assert only(objects, "NetworkPolicy")["spec"]["egress"][-1]["to"][0]["podSelector"]["matchLabels"] == {"a": "1"}


def test_an_own_projection_may_have_any_path():
    path = "/var/run/a: b/c #d"
    objects = installed({"azure": {"federatedTokenFile": path}, "workloadIdentity": {"webhook": False}})
    valid(objects)
    assert chart.process(objects)["env"]["AZURE_FEDERATED_TOKEN_FILE"] == path
    assert {"name": "azure-identity-token", "mountPath": "/var/run/a: b", "readOnly": True} in server(objects)["volumeMounts"]


def test_numbers_of_pass_through_values_keep_their_shape():
    objects = installed({"podSecurityContext": {"runAsUser": 1000660000}, "extraVolumes": [{"name": "t", "emptyDir": {}}]})
    assert only(objects, "Deployment")["spec"]["template"]["spec"]["securityContext"]["runAsUser"] == 1000660000


# Lists whose entries have a key: server-side apply refuses two of one key.

KEYS = {
    "env": ("name",), "volumes": ("name",), "volumeMounts": ("mountPath",), "imagePullSecrets": ("name",), "containers": ("name",),
    "ports": ("containerPort", "port", "protocol"), "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
}


def duplicates(part, name=""):
    if isinstance(part, dict):
        return [found for key, value in part.items() for found in duplicates(value, key)]
    if not isinstance(part, list):
        return []
    found = [twice for item in part for twice in duplicates(item)]
    if name in KEYS:
        keys = [tuple(item.get(key) for key in KEYS[name]) for item in part if isinstance(item, dict)]
        found += [(name, key) for key in keys if keys.count(key) > 1]
    return found


@value_sets
def test_no_list_has_two_entries_of_one_key(path):
    assert not duplicates(render(chart.load(path), apis=chart.CUSTOM_KINDS))


OWN_ENV = [
    {"name": "AZURE_CLIENT_ID", "value": "other"},
    {"name": "OTEL_EXPORTER_OTLP_HEADERS", "valueFrom": {"secretKeyRef": {"name": "mine", "key": "h"}}},
]


@pytest.mark.parametrize("identity", [
    {"workloadIdentity": {"webhook": False}},
    {"azure": {"existingSecret": "entra"}},
], ids=["projection", "client secret"])
def test_extra_env_wins_over_what_the_chart_sets(identity):
    objects = installed(merge(identity, {"otlp": {"existingSecret": "headers"}, "extraEnv": OWN_ENV}))
    assert not duplicates(objects)
    env = {entry["name"]: entry for entry in server(objects)["env"]}
    assert env["AZURE_CLIENT_ID"] == OWN_ENV[0] and env["OTEL_EXPORTER_OTLP_HEADERS"] == OWN_ENV[1]
    assert "AZURE_TENANT_ID" in env


def test_extra_env_may_bring_every_variable_that_the_chart_would_set():
    names = ("AZURE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_FEDERATED_TOKEN_FILE")
    extra = [{"name": name, "value": "x"} for name in names]
    assert server(installed({"workloadIdentity": {"webhook": False}, "extraEnv": extra}))["env"] == extra


def test_extra_volumes_and_mounts_replace_those_of_the_chart():
    own = {
        "extraVolumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}, {"name": "azure-identity-token", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "other", "mountPath": "/var/run/secrets/azure/tokens"}],
        "workloadIdentity": {"webhook": False},
    }
    objects = installed(own)
    assert not duplicates(objects)
    assert only(objects, "Deployment")["spec"]["template"]["spec"]["volumes"] == own["extraVolumes"]
    assert server(objects)["volumeMounts"] == own["extraVolumeMounts"]


def test_an_annotation_of_ones_own_does_not_stand_twice():
    annotations = {"checksum/config": "mine", "contoso.com/note": "x"}
    found = only(installed({"podAnnotations": annotations}), "Deployment")["spec"]["template"]["metadata"]["annotations"]
    assert found["contoso.com/note"] == "x" and "checksum/config" in found


# Merged defaults that do not go together.


def test_recreate_has_no_rolling_update():
    assert only(installed({"strategy": {"type": "Recreate"}}), "Deployment")["spec"]["strategy"] == {"type": "Recreate"}


@pytest.mark.parametrize("handler", [{"exec": {"command": ["/a"]}}, {"httpGet": {"path": "/", "port": 1}}])
def test_another_pre_stop_replaces_the_sleep(handler):
    objects = installed({"lifecycle": {"preStop": handler}})
    assert server(objects)["lifecycle"] == {"preStop": handler}
    assert chart.process(objects)["termination_grace_seconds"] == 50  # its time is unknown: 25 + 5, and 20 to spare


def test_a_lifecycle_without_pre_stop_is_left_out():
    assert "lifecycle" not in server(installed({"lifecycle": {"preStop": None}}))


# What only the program knew.

ENTRA = {
    "app": {
        "inboundAuth": "entra",
        "inboundAudience": [chart.CLIENT],
        "publicUrl": "https://mcp.contoso.com/mcp",
    },
}


def test_the_host_of_the_public_url_is_allowed():
    def hosts(url, **more):
        app = merge(ENTRA["app"], {"publicUrl": url}, more)
        return chart.process(installed({"app": app}))["env"]["ALLOWED_HOSTS"].split(",")

    assert "mcp.contoso.com" in hosts("https://mcp.contoso.com/mcp")
    assert "mcp.contoso.com" in hosts("https://mcp.contoso.com:8443/mcp")
    assert "[fd00::1]" in hosts("https://[fd00::1]:8443/mcp")
    assert hosts("https://mcp.contoso.com/mcp", allowedHosts=["x.example"]) == ["x.example"]


@pytest.mark.parametrize("source", [
    {"existingConfigMap": "more"},
    {"envFrom": [{"configMapRef": {"name": "more"}}]},
    {"extraEnv": [{"name": "INBOUND_AUDIENCE", "value": "x"}, {"name": "PUBLIC_URL", "value": "https://a.example/mcp"}]},
], ids=["existingConfigMap", "envFrom", "extraEnv"])
def test_what_comes_from_elsewhere_is_not_missed(source):
    assert installed(merge({"app": {"inboundAuth": "entra"}}, source))


# IPv6.


def test_egress_over_https_includes_ipv6():
    https = only(installed(), "NetworkPolicy")["spec"]["egress"][1]["to"]
    assert [peer["ipBlock"]["cidr"] for peer in https] == ["0.0.0.0/0", "::/0"]
    assert https[0]["ipBlock"]["except"] == ["169.254.169.254/32"]


def test_a_dual_stack_service_when_asked():
    assert "ipFamilyPolicy" not in only(installed(), "Service")["spec"]
    service = only(installed({"service": {"ipFamilyPolicy": "PreferDualStack"}, "app": {"host": "::"}}), "Service")
    assert service["spec"]["ipFamilyPolicy"] == "PreferDualStack"


# Replicas of the running Deployment, while an autoscaler decides.

HELM = {"manager": "helm", "operation": "Apply", "fieldsV1": {"f:spec": {"f:template": {}}}}
HELM_WITH_REPLICAS = {"manager": "helm", "operation": "Apply", "fieldsV1": {"f:spec": {"f:replicas": {}, "f:template": {}}}}
HELM_3 = {"manager": "helm", "operation": "Update", "fieldsV1": {"f:spec": {"f:template": {}}}}
AUTOSCALER = {
    "manager": "kube-controller-manager", "operation": "Update", "subresource": "scale", "fieldsV1": {"f:spec": {"f:replicas": {}}},
}
SCALER = cluster.live({"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "spec": {"minReplicas": 4}})


def deployment(replicas, *managers):
    item = {"apiVersion": "apps/v1", "kind": "Deployment", "spec": {"replicas": replicas}}
    return cluster.live(item, managedFields=list(managers))


@pytest.mark.parametrize(("objects", "replicas"), [
    # Never installed: the autoscaler starts it.
    ([], None),
    # Autoscaling was off: Helm gives up `replicas`, and the API server would set it to 1.
    ([deployment(4, HELM_WITH_REPLICAS)], 4),
    ([deployment(7, HELM_WITH_REPLICAS)], 7),
    ([deployment(1, HELM_WITH_REPLICAS)], 4),
    ([deployment(4, HELM_3)], 4),
    # Autoscaling is on, and the field is still Helm's: as above.
    ([deployment(5, HELM_WITH_REPLICAS), SCALER], 5),
    ([deployment(5, HELM_WITH_REPLICAS, AUTOSCALER), SCALER], 5),
    # The autoscaler owns it: naming a number would conflict with the next one that it sets.
    ([deployment(6, HELM, AUTOSCALER), SCALER], None),
    ([deployment(6, HELM), SCALER], None),
    # Helm 3 compares manifests, and removes what the last one had: the number stays what it is.
    ([deployment(6, HELM_3, AUTOSCALER), SCALER], 6),
    # Switched off by hand.
    ([deployment(0, HELM_3, AUTOSCALER), SCALER], 0),
])
def test_no_pod_is_lost_when_an_autoscaler_takes_over(objects, replicas):
    values = merge(INSTALL, {"autoscaling": {"minReplicas": 4}})
    spec = only(cluster.render(values, *objects), "Deployment")["spec"]
    assert spec.get("replicas") == replicas


def test_without_an_autoscaler_the_value_decides():
    values = merge(INSTALL, {"autoscaling": {"enabled": False}, "replicaCount": 3})
    objects = cluster.render(values, deployment(7, HELM, AUTOSCALER), SCALER)
    assert only(objects, "Deployment")["spec"]["replicas"] == 3 and none_of(objects, "HorizontalPodAutoscaler")


# Runbooks.


def test_alerts_link_to_a_runbook_only_where_one_is_named():
    def links(**extra):
        rules = {"monitoring": {"prometheusRule": {"enabled": True, **extra}}}
        groups = only(installed(rules), "PrometheusRule")["spec"]["groups"]
        alerts = [rule for rule in itertools.chain(*(group["rules"] for group in groups)) if "alert" in rule]
        assert len(alerts) > 10
        return {rule["alert"]: rule["annotations"].get("runbook_url") for rule in alerts}

    assert set(links().values()) == {None}
    for base in ("https://git.contoso.com/mcp/blob/main", "https://git.contoso.com/mcp/blob/main/"):
        for alert, link in links(runbookBaseUrl=base).items():
            assert link == f"https://git.contoso.com/mcp/blob/main/docs/operations.md#{alert.lower()}"


# An audit file for each pod.


def test_the_example_of_an_audit_file_gives_every_pod_a_folder_of_its_own():
    objects = render(chart.load(chart.CHART / "ci" / "audit-file-values.yaml"))
    claim = only(objects, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"] and claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    for _, spec in chart.pods(objects).values():
        (container,) = spec["containers"]
        (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "audit"]
        (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "audit"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        names = {entry["name"]: entry.get("valueFrom") for entry in container["env"]}
        assert mount["subPathExpr"] == "$(POD_NAME)" and names["POD_NAME"] == {"fieldRef": {"fieldPath": "metadata.name"}}
        settings = only(objects, "ConfigMap")["data"]
        assert settings["AUDIT_LOG_FILE"].startswith(mount["mountPath"] + "/")
