"""What must hold of our manifests beyond their schemas; each rule says what is wrong and where."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator
from ipaddress import ip_network
from typing import Any

from tests.k8s import wiring
from tests.k8s.manifests import K8S, Manifest, PodTemplate, name_of, of_kind, pods, ray_clusters

SECRET_NAME = re.compile(r"PASSWORD|PASSWD|TOKEN|SECRET|CREDENTIAL|ACCESS_KEY|API_KEY")
PASSWORD_IN_URI = re.compile(r"://[^/\s:@]+:[^/\s@$]+@")
SHELL = set("'\"`;|&$><\\()")
BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
# The cloud's metadata service, which hands out the node's credentials.
METADATA_SERVICE = "169.254.0.0/16"
# EKS's agent there, which hands out a pod's own.
POD_IDENTITY = "169.254.170.23/32"
KUBERNETES_GRACE_S = 30
STAYS = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
SUBMITTER_RETRIES = 100
PROBES = {"startupProbe", "readinessProbe", "livenessProbe"}
ANSWER_S = 5
SPOT_NOTICE_S = 25
"""What Google's cloud gives a pod of the 30 s that it has; the others give more."""


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


def bounded(pod: PodTemplate) -> Iterator[str]:
    """What a pod writes beside its volumes has a limit, or it fills the node's disk or memory."""
    for volume in pod.spec.get("volumes", []):
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            yield f"volume {volume['name']} has no sizeLimit"


def probed(pod: PodTemplate) -> Iterator[str]:
    """What serves is asked whether it lives, and given more time to answer than Kubernetes' second."""
    for container in pod.spec.get("containers", []):
        if container.get("ports") and not {"readinessProbe", "livenessProbe"} <= container.keys():
            yield f"container {container['name']} has no probes"
        for name in PROBES & container.keys():
            # A port answers from the kernel, however busy its process is.
            if "tcpSocket" not in container[name] and container[name].get("timeoutSeconds", 1) < ANSWER_S:
                yield f"container {container['name']} fails its {name} where it is busy for a second"


def no_secret_is_written_down(manifests: list[Manifest]) -> Iterator[str]:
    """Neither as an object nor in a URI."""
    for manifest in manifests:
        if manifest["kind"] == "Secret":
            yield f"{name_of(manifest)}: a Secret stands in the manifests"
        for where, text in wiring.strings(manifest, ""):
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
                if "ipBlock" in peer and _holds_the_metadata_service(peer["ipBlock"]):
                    yield f"{name_of(policy)}: lets pods reach the metadata service"


def _holds_the_metadata_service(block: dict[str, Any]) -> bool:
    is_near = ip_network(block["cidr"]).overlaps(ip_network(METADATA_SERVICE))
    return is_near and block["cidr"] != POD_IDENTITY and METADATA_SERVICE not in block.get("except", [])


def ray_is_set_up_for_sweeps(manifests: list[Manifest]) -> Iterator[str]:
    """Tokens, our version, a head without work, shared memory that is within the container's limit."""
    for name, cluster in ray_clusters(manifests):
        if cluster.get("authOptions", {}).get("mode") != "token":
            yield f"{name}: Ray asks for no token"
        if not _is_our_ray(cluster.get("rayVersion", "")):
            yield f"{name}: rayVersion {cluster.get('rayVersion')} is not that of pyproject.toml"
        if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
            yield f"{name}: trials may run on the head"
        if cluster["headGroupSpec"]["rayStartParams"].get("num-gpus") != "0":
            yield f"{name}: Ray would count GPUs of the head's machine as the head's"
        if cluster.get("enableInTreeAutoscaling"):
            yield from _autoscaler_problems(name, cluster.get("autoscalerOptions", {}))
            volumes = cluster["headGroupSpec"]["template"]["spec"]["volumes"]
            if not any(volume["name"] == "ray-logs" for volume in volumes):
                yield f"{name}: KubeRay's volume of the head's logs has no sizeLimit"
    for pod in pods(manifests):
        if not pod.is_ray:
            continue
        mounted = {mount["mountPath"]: mount["name"] for mount in pod.containers[0]["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        shared = volumes.get(mounted.get("/dev/shm"), {}).get("emptyDir", {})
        limit = pod.containers[0].get("resources", {}).get("limits", {}).get("memory")
        if shared.get("medium") != "Memory" or "sizeLimit" not in shared:
            yield f"{pod.owner}: /dev/shm is not memory of a given size"
        elif limit and quantity_bytes(shared["sizeLimit"]) > quantity_bytes(limit) / 2:
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
        if spec.get("submitterConfig", {}).get("backoffLimit", 0) < SUBMITTER_RETRIES:
            yield f"{name_of(job)}: a few lost connections of its submitter would end a healthy sweep"
        if "livenessProbe" not in spec["submitterPodTemplate"]["spec"]["containers"][0]:
            yield f"{name_of(job)}: its submitter would follow the log of a head that is gone for ever"
        if SHELL & set(spec.get("entrypoint", "")):
            yield f"{name_of(job)}: the entrypoint has characters that the submitter's shell would act on"


def a_sweep_is_not_moved_to_tidy_up(manifests: list[Manifest]) -> Iterator[str]:
    """Autoscalers empty nodes that are little used: the driver would start again, or trials."""
    for pod in pods(manifests):
        if pod.is_ray and not STAYS.items() <= pod.metadata.get("annotations", {}).items():
            yield f"{pod.owner}: an autoscaler may move it"


def a_driver_may_save_its_state(manifests: list[Manifest]) -> Iterator[str]:
    """Ray waits for a job that is stopped, and the head's pod for its driver, and neither is killed before."""
    for pod in pods(manifests):
        if pod.labels.get("ray.io/node-type") != "head":
            continue
        container = pod.containers[0]
        limits = [int(v["value"]) for v in container.get("env", []) if v["name"] == "RAY_JOB_STOP_WAIT_TIME_S"]
        hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [""])[-1]
        waits_s = sum(map(int, re.findall(r"timeout=(\d+)", hook)))
        if not limits:
            yield f"{pod.owner}: Ray kills a job that is stopped after 3 s"
        elif waits_s < limits[0]:
            yield f"{pod.owner}: goes before its driver has saved its state"
        if pod.spec.get("terminationGracePeriodSeconds", KUBERNETES_GRACE_S) <= waits_s:
            yield f"{pod.owner}: is killed before its preStop of {waits_s} s ends"


def nodes_come_from_zero_and_go(manifests: list[Manifest]) -> Iterator[str]:
    """Where Ray scales, nothing is kept without work; where it does not, the size is said once."""
    for name, cluster in ray_clusters(manifests):
        for group in cluster["workerGroupSpecs"]:
            lowest, highest = group["minReplicas"], group["maxReplicas"]
            if not cluster.get("enableInTreeAutoscaling"):
                if not lowest == group["replicas"] == highest:
                    yield f"{name} {group['groupName']}: nobody scales between {lowest} and {highest}"
            elif lowest or group["replicas"] or not highest:
                yield f"{name} {group['groupName']}: scales from {lowest} to {highest}, and not from zero"
        if cluster.get("enableInTreeAutoscaling") and "idleTimeoutSeconds" not in cluster.get("autoscalerOptions", {}):
            yield f"{name}: idle nodes go after Ray's minute, in which a trial's first node waits for its last"


def spot_nodes_are_left_in_time(manifests: list[Manifest]) -> Iterator[str]:
    """Workers alone run where nodes are taken away, and are gone within the shortest notice."""
    for pod in pods(manifests):
        grace_s = pod.spec.get("terminationGracePeriodSeconds", KUBERNETES_GRACE_S)
        for container in pod.containers:
            command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
            if "--grace-period" in command and int(command[command.index("--grace-period") + 1]) >= grace_s:
                yield f"{pod.owner}: is killed after {grace_s} s, before its preStop ends"
        if not any("spot" in str(toleration) for toleration in pod.spec.get("tolerations", [])):
            continue
        if pod.labels.get("ray.io/node-type") != "worker":
            yield f"{pod.owner}: may run on spot nodes, and nothing goes on without it"
        if grace_s > SPOT_NOTICE_S or "preStop" not in pod.containers[-1].get("lifecycle", {}):
            yield f"{pod.owner}: does not leave a spot node within {SPOT_NOTICE_S} s"


def kueue_may_take_it(manifests: list[Manifest]) -> Iterator[str]:
    """What Kueue asks of a RayJob in its queue, and one priority for all that is admitted together."""
    for job in of_kind(manifests, "RayJob"):
        if "kueue.x-k8s.io/queue-name" not in job["metadata"].get("labels", {}):
            continue
        cluster = job["spec"]["rayClusterSpec"]
        if cluster.get("enableInTreeAutoscaling"):
            yield f"{name_of(job)}: Kueue takes no RayJob that Ray scales"
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        if len({group["template"]["spec"].get("priorityClassName") for group in groups}) > 1:
            yield f"{name_of(job)}: head and workers have unlike priorities"


def a_drain_of_what_serves_ends(manifests: list[Manifest]) -> Iterator[str]:
    """A budget that keeps as many pods as there are would hold a node's drain up for ever."""
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        wanted = budget["spec"]["selector"]["matchLabels"].items()
        for served in of_kind(manifests, "Deployment", "StatefulSet"):
            labels = served["spec"]["template"]["metadata"]["labels"]
            if wanted <= labels.items() and budget["spec"]["minAvailable"] >= served["spec"].get("replicas", 1):
                yield f"{name_of(budget)}: no pod of {name_of(served)} may ever be moved"


def servers_of_one_database_make_it_in_turn(manifests: list[Manifest]) -> Iterator[str]:
    """Two that find it empty would make the same tables at once, and one of them would end."""
    for deployment in of_kind(manifests, "Deployment"):
        if deployment["spec"].get("replicas", 1) > 1:
            before = [c["name"] for c in deployment["spec"]["template"]["spec"].get("initContainers", [])]
            if "prepare-database" not in before:
                yield f"{name_of(deployment)}: its servers would all make the tables of an empty database"


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


def quantity_bytes(quantity: str) -> int:
    """Kubernetes' way to write memory, in bytes."""
    return int(quantity[:-2]) * BINARY[quantity[-2:]]


POD_RULES: tuple[Callable[[PodTemplate], Iterator[str]], ...] = (
    unprivileged,
    pinned,
    sized,
    without_plain_secrets,
    without_rights,
    probed,
    bounded,
)
RULES: tuple[Callable[[list[Manifest]], Iterator[str]], ...] = (
    no_secret_is_written_down,
    nobody_gets_a_right,
    nothing_is_reached_from_outside,
    ray_is_set_up_for_sweeps,
    sweeps_end_and_resume,
    a_sweep_is_not_moved_to_tidy_up,
    a_driver_may_save_its_state,
    nodes_come_from_zero_and_go,
    spot_nodes_are_left_in_time,
    kueue_may_take_it,
    a_drain_of_what_serves_ends,
    servers_of_one_database_make_it_in_turn,
    *wiring.RULES,
)
