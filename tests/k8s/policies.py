"""What must hold of our manifests beyond their schemas; each rule says what is wrong and where."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator
from typing import Any

from tests.k8s.manifests import K8S, Manifest, PodTemplate, name_of, of_kind, pods, ray_clusters

SECRET_NAME = re.compile(r"PASSWORD|PASSWD|TOKEN|SECRET|CREDENTIAL|ACCESS_KEY|API_KEY")
PASSWORD_IN_URI = re.compile(r"://[^/\s:@]+:[^/\s@$]+@")
SHELL = set("'\"`;|&$><\\()")
BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
# The cloud's metadata service, which hands out the node's credentials.
METADATA_SERVICE = "169.254.0.0/16"


def problems(manifests: list[Manifest]) -> list[str]:
    """Everything that a rule has against what was rendered."""
    of_pods = [f"{pod.owner}: {said}" for pod in pods(manifests) for rule in POD_RULES for said in rule(pod)]
    return of_pods + [said for rule in RULES for said in rule(manifests)]


def unprivileged(pod: PodTemplate) -> Iterator[str]:
    """Pod Security's `restricted`, and a root file system that nobody writes to."""
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec.get(key):
            yield f"{key} is set"
    for volume in pod.spec.get("volumes", []):
        if "hostPath" in volume:
            yield f"volume {volume['name']} is a hostPath"
    whole = pod.spec.get("securityContext", {})
    if whole.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "seccompProfile is not RuntimeDefault"
    for container in pod.containers:
        name, own = container["name"], container.get("securityContext", {})
        if own.get("privileged"):
            yield f"container {name} is privileged"
        if not {**whole, **own}.get("runAsNonRoot") or {**whole, **own}.get("runAsUser") == 0:
            yield f"container {name} may run as root"
        if own.get("allowPrivilegeEscalation") is not False:
            yield f"container {name} may gain privileges"
        if not own.get("readOnlyRootFilesystem"):
            yield f"container {name} may write to its root file system"
        if own.get("capabilities") != {"drop": ["ALL"]}:
            yield f"container {name} keeps capabilities"
        if any("hostPort" in port for port in container.get("ports", [])):
            yield f"container {name} has a hostPort"


def pinned(pod: PodTemplate) -> Iterator[str]:
    """An image names a version."""
    for container in pod.containers:
        image = container.get("image", "")
        tag = image.rpartition("/")[2].partition(":")[2]
        if "@sha256:" not in image and (not tag or tag == "latest"):
            yield f"image {image or '(none)'} has no fixed tag"


def sized(pod: PodTemplate) -> Iterator[str]:
    """Requests and limits of CPU and memory."""
    for container in pod.containers:
        for kind in ("requests", "limits"):
            for resource in ("cpu", "memory"):
                if resource not in container.get("resources", {}).get(kind, {}):
                    yield f"container {container['name']} has no {kind}.{resource}"


def without_plain_secrets(pod: PodTemplate) -> Iterator[str]:
    """A secret comes by reference."""
    for container in pod.containers:
        for variable in container.get("env", []):
            if SECRET_NAME.search(variable["name"]) and "value" in variable:
                yield f"{variable['name']} holds a plain secret"


def without_rights(pod: PodTemplate) -> Iterator[str]:
    """An account of its own, whose token only the autoscaler's head holds."""
    account = pod.spec.get("serviceAccountName")
    if not account:
        yield "has no service account of its own"
    if pod.spec.get("automountServiceAccountToken") is not False and account != "ray-autoscaler":
        yield "holds a token of the API server"


def probed(pod: PodTemplate) -> Iterator[str]:
    """What serves is asked whether it lives."""
    for container in pod.spec.get("containers", []):
        if container.get("ports") and not {"readinessProbe", "livenessProbe"} <= container.keys():
            yield f"container {container['name']} has no probes"


def no_secret_is_written_down(manifests: list[Manifest]) -> Iterator[str]:
    """Neither as an object nor in a URI."""
    for manifest in manifests:
        if manifest["kind"] == "Secret":
            yield f"{name_of(manifest)}: a Secret stands in the manifests"
        for where, text in _strings(manifest, ""):
            if PASSWORD_IN_URI.search(text):
                yield f"{name_of(manifest)}: {where} holds a password in a URI"


def nobody_gets_a_right(manifests: list[Manifest]) -> Iterator[str]:
    """Roles are KubeRay's own to bind, for its autoscaler."""
    for manifest in of_kind(manifests, "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"):
        yield f"{name_of(manifest)}: grants rights"
    for account in of_kind(manifests, "ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield f"{name_of(account)}: its token is mounted by default"


def nothing_is_reached_from_outside(manifests: list[Manifest]) -> Iterator[str]:
    """All traffic is refused but what a policy names, and no policy names the world."""
    for manifest in manifests:
        if manifest["kind"] in ("Ingress", "HTTPRoute", "Gateway"):
            yield f"{name_of(manifest)}: opens a way in"
    for service in of_kind(manifests, "Service"):
        if service["spec"].get("type", "ClusterIP") != "ClusterIP" or "externalIPs" in service["spec"]:
            yield f"{name_of(service)}: is reached from outside"
    policies = of_kind(manifests, "NetworkPolicy")
    if not any(_denies_all(policy["spec"]) for policy in policies):
        yield "no NetworkPolicy refuses everything by default"
    for policy in policies:
        for rule in policy["spec"].get("ingress", []):
            if not rule.get("from"):
                yield f"{name_of(policy)}: lets everybody in"
            for peer in rule.get("from", []):
                selectors = [peer[key] for key in ("podSelector", "namespaceSelector") if key in peer]
                if not selectors or {} in selectors or "podSelector" not in peer:
                    yield f"{name_of(policy)}: lets more in than pods of a name ({peer})"
        for rule in policy["spec"].get("egress", []):
            for peer in rule.get("to", []):
                if "ipBlock" in peer and METADATA_SERVICE not in peer["ipBlock"].get("except", []):
                    yield f"{name_of(policy)}: lets pods reach the metadata service"


def ray_is_set_up_for_sweeps(manifests: list[Manifest]) -> Iterator[str]:
    """Tokens, our version, a head without work, shared memory that is within the container's limit."""
    for name, cluster in ray_clusters(manifests):
        if cluster.get("authOptions", {}).get("mode") != "token":
            yield f"{name}: Ray asks for no token"
        if not _is_our_ray(cluster.get("rayVersion", "")):
            yield f"{name}: rayVersion {cluster.get('rayVersion')} is not that of pyproject.toml"
        if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
            yield f"{name}: trials may run on the head"
        if cluster.get("enableInTreeAutoscaling"):
            yield from _autoscaler_problems(name, cluster.get("autoscalerOptions", {}))
    for pod in pods(manifests):
        if not pod.owner.startswith("Ray") or pod.owner.endswith("submitter"):
            continue
        mounted = {mount["mountPath"]: mount["name"] for mount in pod.containers[0]["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        shared = volumes.get(mounted.get("/dev/shm"), {}).get("emptyDir", {})
        limit = pod.containers[0].get("resources", {}).get("limits", {}).get("memory")
        if shared.get("medium") != "Memory" or "sizeLimit" not in shared:
            yield f"{pod.owner}: /dev/shm is not memory of a given size"
        elif limit and _bytes(shared["sizeLimit"]) > _bytes(limit) / 2:
            yield f"{pod.owner}: /dev/shm may take more than half of the container's memory"


def sweeps_end_and_resume(manifests: list[Manifest]) -> Iterator[str]:
    """A RayJob gives its cluster back, has an end, and is tried again; its command survives KubeRay's shell."""
    for job in of_kind(manifests, "RayJob"):
        spec = job["spec"]
        if not spec.get("shutdownAfterJobFinishes"):
            yield f"{name_of(job)}: keeps its cluster"
        yield from (
            f"{name_of(job)}: {key} is not set"
            for key in ("ttlSecondsAfterFinished", "activeDeadlineSeconds", "preRunningDeadlineSeconds", "backoffLimit")
            if key not in spec
        )
        if SHELL & set(spec.get("entrypoint", "")):
            yield f"{name_of(job)}: the entrypoint has characters that the submitter's shell would act on"


def references_lead_somewhere(manifests: list[Manifest]) -> Iterator[str]:
    """Claims, ConfigMaps and accounts exist; Secrets are those that README.md says how to make."""
    have = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests}
    readme = (K8S / "README.md").read_text()
    have |= {("Secret", name) for name in re.findall(r"create secret generic ([\w-]+)", readme)}
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


def _autoscaler_problems(name: str, options: dict[str, Any]) -> Iterator[str]:
    container = {"name": "autoscaler", "image": "as-the-head:1", **options}
    pod = PodTemplate(
        f"{name} autoscaler",
        {},
        {
            "containers": [container],
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        },
    )
    yield from (f"{pod.owner}: {said}" for rule in (unprivileged, sized, without_plain_secrets) for said in rule(pod))


def _denies_all(spec: dict[str, Any]) -> bool:
    rules = spec.get("ingress") or spec.get("egress")
    return spec["podSelector"] == {} and set(spec.get("policyTypes", [])) == {"Ingress", "Egress"} and not rules


def _is_our_ray(version: str) -> bool:
    project = tomllib.loads((K8S.parent / "pyproject.toml").read_text())["project"]
    wanted = next(line for line in project["dependencies"] if line.startswith("ray["))
    lowest = wanted.partition(">=")[2].partition(",")[0]
    return version.split(".")[:2] == lowest.split(".")[:2]


def _bytes(quantity: str) -> int:
    return int(quantity[:-2]) * BINARY[quantity[-2:]]


def _strings(node: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _strings(value, f"{where}.{key}".lstrip("."))
    elif isinstance(node, list):
        for place, value in enumerate(node):
            yield from _strings(value, f"{where}[{place}]")
    elif isinstance(node, str):
        yield where, node


POD_RULES: tuple[Callable[[PodTemplate], Iterator[str]], ...] = (
    unprivileged,
    pinned,
    sized,
    without_plain_secrets,
    without_rights,
    probed,
)
RULES: tuple[Callable[[list[Manifest]], Iterator[str]], ...] = (
    no_secret_is_written_down,
    nobody_gets_a_right,
    nothing_is_reached_from_outside,
    ray_is_set_up_for_sweeps,
    sweeps_end_and_resume,
    references_lead_somewhere,
)
