"""An API server for `lookup`: it knows the chart's kinds and holds the objects that a test puts into it.

Helm asks it for its version, its kinds, whether it validates fields, and for single objects; with `dry_run="server"` it changes nothing.
"""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import chart
import helm_python
import yaml

KINDS = {
    "v1": {"configmaps": "ConfigMap", "pods": "Pod", "serviceaccounts": "ServiceAccount", "services": "Service"},
    "apps/v1": {"deployments": "Deployment"},
    "autoscaling/v2": {"horizontalpodautoscalers": "HorizontalPodAutoscaler"},
    "networking.k8s.io/v1": {"ingresses": "Ingress", "networkpolicies": "NetworkPolicy"},
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
}


def root(version):
    return f"apis/{version}" if "/" in version else f"api/{version}"


def groups():
    found = []
    for version in KINDS:
        if "/" in version:
            entry = {"groupVersion": version, "version": version.split("/")[1]}
            found.append({"name": version.split("/")[0], "versions": [entry], "preferredVersion": entry})
    return found


def resources(version):
    verbs = ["get", "list", "create", "patch"]
    return [
        {"name": name, "singularName": "", "namespaced": True, "kind": kind, "verbs": verbs}
        for name, kind in KINDS[version].items()
    ]


def fields(version):
    """An OpenAPI document that says only that the server validates fields itself."""
    group, _, number = version.rpartition("/")
    paths = {}
    for name, kind in KINDS[version].items():
        patch = {"parameters": [{"name": "fieldValidation", "in": "query"}], "responses": {}}
        patch["x-kubernetes-group-version-kind"] = {"group": group, "version": number, "kind": kind}
        paths[f"/{root(version)}/namespaces/{{namespace}}/{name}/{{name}}"] = {"patch": patch}
    return {"openapi": "3.0.0", "info": {"title": "cluster", "version": "1"}, "paths": paths}


def documents(objects):
    """Path → answer."""
    found = {
        "version": {"major": "1", "minor": "36", "gitVersion": "v1.36.0"},
        "api": {"kind": "APIVersions", "versions": ["v1"]},
        "apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups()},
        "openapi/v3": {"paths": {root(version): {"serverRelativeURL": f"/openapi/v3/{root(version)}"} for version in KINDS}},
    }
    for version in KINDS:
        found[root(version)] = {"kind": "APIResourceList", "groupVersion": version, "resources": resources(version)}
        found[f"openapi/v3/{root(version)}"] = fields(version)
    for item in objects:
        names = {kind: name for name, kind in KINDS[item["apiVersion"]].items()}
        place = item["metadata"]
        path = f"{root(item['apiVersion'])}/namespaces/{place['namespace']}/{names[item['kind']]}/{place['name']}"
        found[path] = item
    return found


@contextlib.contextmanager
def serving(objects):
    answers = documents(objects)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answer = answers.get(self.path.split("?")[0].strip("/"))
            missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
            text = json.dumps(answer or missing).encode()
            self.send_response(200 if answer else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def live(item, **metadata):
    """An object as it stands in the cluster: Helm takes over only what belongs to its release."""
    own = {"meta.helm.sh/release-name": chart.RELEASE, "meta.helm.sh/release-namespace": chart.NAMESPACE}
    labels = {"app.kubernetes.io/managed-by": "Helm"}
    place = {"name": chart.RELEASE, "namespace": chart.NAMESPACE, "annotations": own, "labels": labels}
    return chart.merge({"metadata": place}, item, {"metadata": metadata})


def render(values, *objects):
    """Every object of the release, as Helm renders it for a cluster that holds `objects`."""
    with serving(objects) as address:
        config = helm_python.Config(kube_apiserver=address, storage_driver="memory", namespace=chart.NAMESPACE)
        release = config.install(str(chart.CHART), chart.RELEASE, values, namespace=chart.NAMESPACE, dry_run="server")
    return [item for item in yaml.load_all(release["manifest"], chart.StrictLoader) if item]
