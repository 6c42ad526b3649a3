"""Whether the parts of our manifests fit each other: names, keys, ports, and who may talk to whom."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tests.k8s.manifests import K8S, Manifest, PodTemplate, name_of, of_kind, pods, ray_clusters

RAY_NODES = {"ray.io/is-ray-node": "yes"}
DASHBOARD_PORT = 8265
METRICS_PORTS = (8080, 44217, 44227)
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}
PROMETHEUS = {"app.kubernetes.io/name": "prometheus"}
SUBMITTER = {"app.kubernetes.io/component": "submitter"}


def references_lead_somewhere(manifests: list[Manifest]) -> Iterator[str]:
    """Claims, ConfigMaps and accounts exist; Secrets are those that README.md says how to make."""
    have = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests}
    have |= {("Secret", name) for name in secrets_to_make()}
    for manifest in of_kind(manifests, "StatefulSet"):
        have |= {("Volume", c["metadata"]["name"]) for c in manifest["spec"].get("volumeClaimTemplates", [])}
    for pod in pods(manifests):
        names = {volume["name"] for volume in pod.spec.get("volumes", [])}
        for container in pod.containers:
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in names and ("Volume", mount["name"]) not in have:
                    yield f"{pod.owner}: no volume {mount['name']}"
        for kind, name in _references(pod):
            if (kind, name) not in have:
                yield f"{pod.owner}: {kind} {name} does not exist"
    for owner, cluster in ray_clusters(manifests):
        redis = cluster.get("gcsFaultToleranceOptions", {}).get("redisPassword", {}).get("valueFrom", {})
        secrets = (cluster.get("authOptions", {}).get("secretName"), redis.get("secretKeyRef", {}).get("name"))
        yield from (
            f"{owner}: Secret {name} does not exist" for name in secrets if name and ("Secret", name) not in have
        )


def _references(pod: PodTemplate) -> Iterator[tuple[str, str]]:
    yield "ServiceAccount", pod.spec.get("serviceAccountName", "default")
    if "priorityClassName" in pod.spec:
        yield "PriorityClass", pod.spec["priorityClassName"]
    for volume in pod.spec.get("volumes", []):
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
    for container in pod.containers:
        for variable in container.get("env", []):
            if "secretKeyRef" in variable.get("valueFrom", {}):
                yield "Secret", variable["valueFrom"]["secretKeyRef"]["name"]


def secrets_to_make() -> dict[str, set[str]]:
    """The Secrets that README.md says how to make, with their keys: given there, or told of a file's lines."""
    commands = re.findall(r"create secret generic ([\w-]+) (.*)", (K8S / "README.md").read_text())
    return {name: set(re.findall(r"(?:--from-literal=|(?<= ))([\w-]+)=", options)) for name, options in commands}


def secrets_have_the_keys_that_are_asked_for(manifests: list[Manifest]) -> Iterator[str]:
    """Of a Secret without the key, a pod waits for ever in CreateContainerConfigError."""
    keys = secrets_to_make()
    for manifest in manifests:
        for reference in _secret_references(manifest):
            if reference["key"] not in keys.get(reference["name"], ()):
                yield f"{name_of(manifest)}: Secret {reference['name']} has no key {reference['key']}"
    for owner, cluster in ray_clusters(manifests):
        if "auth_token" not in keys.get(cluster.get("authOptions", {}).get("secretName"), ()):
            yield f"{owner}: KubeRay takes the token from the key auth_token"


def _secret_references(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, list):
        for part in node:
            yield from _secret_references(part)
    if isinstance(node, dict):
        if "secretKeyRef" in node:
            yield node["secretKeyRef"]
        for part in node.values():
            yield from _secret_references(part)


def ports_have_names_that_are_there(manifests: list[Manifest]) -> Iterator[str]:
    """Of Services, probes and what Prometheus reads."""
    every_pod = list(pods(manifests))
    for pod in every_pod:
        for container in pod.containers:
            own = {port.get("name") for port in container.get("ports", [])}
            probes = [container[key] for key in ("startupProbe", "readinessProbe", "livenessProbe") if key in container]
            asked = [probe[how]["port"] for probe in probes for how in ("httpGet", "tcpSocket") if how in probe]
            yield from (f"{pod.owner}: no port {p} to probe" for p in asked if isinstance(p, str) and p not in own)
    for service in of_kind(manifests, "Service"):
        selected = [pod for pod in every_pod if service["spec"]["selector"].items() <= pod.labels.items()]
        have = {port["name"] for pod in selected for c in pod.containers for port in c.get("ports", [])}
        wanted = {port["targetPort"] for port in service["spec"]["ports"]}
        yield from (f"{name_of(service)}: leads to no port {port}" for port in sorted(wanted - have))
    for monitor in of_kind(manifests, "PodMonitor"):
        selected = [pod for pod in every_pod if _selects(monitor["spec"]["selector"], pod.labels)]
        have = {p["name"]: p["containerPort"] for pod in selected for c in pod.containers for p in c.get("ports", [])}
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            if have.get(endpoint["port"]) not in METRICS_PORTS:
                yield f"{name_of(monitor)}: no metrics at port {endpoint['port']}"
        let_in = [
            port["port"]
            for policy in of_kind(manifests, "NetworkPolicy")
            for rule in policy["spec"].get("ingress", [])
            if any(peer.get("podSelector", {}).get("matchLabels") == PROMETHEUS for peer in rule["from"])
            for port in rule["ports"]
        ]
        if not set(METRICS_PORTS) <= set(let_in):
            yield f"{name_of(monitor)}: no policy lets Prometheus in to all of {METRICS_PORTS}"


def rays_ports_are_closed(manifests: list[Manifest]) -> Iterator[str]:
    """Whoever reaches Ray's ports has its cluster: its own pods all of them, submitter and operator the dashboard."""
    for policy in of_kind(manifests, "NetworkPolicy"):
        if not any(pod.is_ray and _selects(policy["spec"]["podSelector"], pod.labels) for pod in pods(manifests)):
            continue
        for rule in policy["spec"].get("ingress", []):
            ports = {port.get("port") for port in rule.get("ports", [])}
            is_range = any("endPort" in port for port in rule.get("ports", []))
            for peer in rule.get("from", []):
                labels = peer.get("podSelector", {}).get("matchLabels", {})
                if labels == RAY_NODES and "namespaceSelector" not in peer:
                    continue
                allowed = {DASHBOARD_PORT} if labels in (OPERATOR, SUBMITTER) else set(METRICS_PORTS)
                if is_range or not ports or not ports <= allowed:
                    named = sorted(map(str, ports)) or "every port"
                    yield f"{name_of(policy)}: lets {labels or peer} reach {named} of Ray"


def kuberay_reaches_the_heads(manifests: list[Manifest]) -> Iterator[str]:
    """From the namespace in which README.md installs it: it asks the dashboard how a job stands."""
    (namespace,) = re.findall(r"helm install kuberay-operator .*--namespace ([\w-]+)", (K8S / "README.md").read_text())
    inside = {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
    operator = {"namespaceSelector": inside, "podSelector": {"matchLabels": OPERATOR}}
    for pod in pods(manifests):
        let_in = [
            port["port"]
            for policy in of_kind(manifests, "NetworkPolicy")
            if _selects(policy["spec"]["podSelector"], pod.labels)
            for rule in policy["spec"].get("ingress", [])
            if operator in rule.get("from", [])
            for port in rule.get("ports", [])
        ]
        if pod.labels.get("ray.io/node-type") == "head" and DASHBOARD_PORT not in let_in:
            yield f"{pod.owner}: no policy lets KubeRay's operator in from {namespace}"


def who_names_a_service_may_reach_it(manifests: list[Manifest]) -> Iterator[str]:
    """By the policies of both sides; a submitter reaches the heads."""
    policies, every_pod = of_kind(manifests, "NetworkPolicy"), list(pods(manifests))
    for pod in every_pod:
        for service in _named_services(pod, manifests):
            for target in every_pod:
                if service["spec"]["selector"].items() <= target.labels.items():
                    port = service["spec"]["ports"][0]["port"]
                    yield from _unreachable(policies, pod, target, port)
        for target in every_pod:
            if SUBMITTER.items() <= pod.labels.items() and target.labels.get("ray.io/node-type") == "head":
                yield from _unreachable(policies, pod, target, DASHBOARD_PORT)
            if pod.is_ray and target.is_ray:
                yield from _unreachable(policies, pod, target, 10002)


def _named_services(pod: PodTemplate, manifests: list[Manifest]) -> Iterator[Manifest]:
    texts = [text for _, text in strings(pod.spec, "")]
    for owner, cluster in ray_clusters(manifests):
        if pod.owner == f"{owner} head":
            texts += [cluster.get("gcsFaultToleranceOptions", {}).get("redisAddress", "")]
    for service in of_kind(manifests, "Service"):
        name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
        is_own = service["spec"]["selector"].items() <= pod.labels.items()
        named = any(re.search(rf"(^|[/@]){name}:{port}\b", text) for text in texts)
        by_variable = any({"name": "PGHOST", "value": name} in c.get("env", []) for c in pod.containers)
        if not is_own and (named or by_variable):
            yield service


def _unreachable(policies: list[Manifest], source: PodTemplate, target: PodTemplate, port: int) -> Iterator[str]:
    if not _lets(policies, "egress", "to", source.labels, target.labels, port):
        yield f"{source.owner}: no policy lets it out to {target.owner}, port {port}"
    if not _lets(policies, "ingress", "from", target.labels, source.labels, port):
        yield f"{target.owner}: no policy lets {source.owner} in, port {port}"


def _lets(
    policies: list[Manifest], way: str, side: str, own: Mapping[str, str], other: Mapping[str, str], port: int
) -> bool:
    return any(
        any("namespaceSelector" not in peer and _selects(peer.get("podSelector"), other) for peer in rule.get(side, []))
        and any(allowed["port"] == port for allowed in rule.get("ports", [{"port": port}]))
        for policy in policies
        if _selects(policy["spec"]["podSelector"], own)
        for rule in policy["spec"].get(way, [])
    )


def _selects(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    if selector is None:
        return False
    by_label = selector.get("matchLabels", {}).items() <= labels.items()
    return by_label and all(labels.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", []))


def strings(node: Any, where: str) -> Iterator[tuple[str, str]]:
    """Every text in it, with its path."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from strings(value, f"{where}.{key}".lstrip("."))
    elif isinstance(node, list):
        for place, value in enumerate(node):
            yield from strings(value, f"{where}[{place}]")
    elif isinstance(node, str):
        yield where, node


RULES: tuple[Callable[[list[Manifest]], Iterator[str]], ...] = (
    references_lead_somewhere,
    secrets_have_the_keys_that_are_asked_for,
    ports_have_names_that_are_there,
    rays_ports_are_closed,
    kuberay_reaches_the_heads,
    who_names_a_service_may_reach_it,
)
