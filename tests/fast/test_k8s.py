"""The Kubernetes manifests: valid as they are, refused when they are made bad, and running what our own CLI knows."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from orchestrator.cli import app
from tests.k8s import __main__ as script
from tests.k8s import policies, schemas
from tests.k8s.manifests import (
    K8S,
    Manifest,
    PodTemplate,
    RenderError,
    name_of,
    of_kind,
    overlays,
    pods,
    ray_clusters,
    render,
)
from tests.k8s.wiring import secrets_to_make

OVERLAYS = overlays()
rendered = cache(render)
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda folder: folder.name)


def the(manifests: list[Manifest], name: str) -> Any:
    return next(manifest for manifest in manifests if name_of(manifest) == name)


def head(manifests: list[Manifest]) -> Any:
    return the(manifests, "RayJob/sweep")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]


def mlflow(manifests: list[Manifest]) -> Any:
    return the(manifests, "Deployment/mlflow")["spec"]["template"]["spec"]["containers"][0]


def a_secret(manifests: list[Manifest]) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "mlflow"}, "stringData": {"password": "x"}}
    manifests.append(secret)


def a_password_in_a_uri(manifests: list[Manifest]) -> None:
    mlflow(manifests)["env"].append({"name": "BACKEND", "value": "postgresql://mlflow:hunter2@postgres/mlflow"})


def a_service_for_everybody(manifests: list[Manifest]) -> None:
    the(manifests, "Service/mlflow")["spec"]["type"] = "LoadBalancer"


def a_policy_for_everybody(manifests: list[Manifest]) -> None:
    the(manifests, "NetworkPolicy/ray")["spec"]["ingress"].append({"ports": [{"port": 8265}]})


def a_policy_for_every_namespace(manifests: list[Manifest]) -> None:
    the(manifests, "NetworkPolicy/ray")["spec"]["ingress"].append({"from": [{"namespaceSelector": {}}]})


def a_role(manifests: list[Manifest]) -> None:
    rule = {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "r"}, "rules": [rule]}
    manifests.append(role)


REFUSED_BY_SCHEMA: dict[str, Callable[[list[Manifest]], object]] = {
    "unknown field of a core object": lambda m: mlflow(m).update(imagePullPolice="Always"),
    "unknown field of a RayJob": lambda m: the(m, "RayJob/sweep")["spec"].update(backofLimit=2),
    "unknown field in a Ray pod": lambda m: head(m)["containers"][0].update(imagePullPolice="Always"),
    "unknown field of a Ray pod's metadata": lambda m: the(m, "RayJob/sweep")["spec"]["rayClusterSpec"][
        "headGroupSpec"
    ]["template"]["metadata"].update(lables={}),
    "wrong type": lambda m: the(m, "Deployment/mlflow")["spec"].update(replicas="2"),
    "wrong type in a RayJob": lambda m: the(m, "RayJob/sweep")["spec"].update(ttlSecondsAfterFinished="60"),
    "missing field": lambda m: the(m, "Service/mlflow")["spec"]["ports"][0].pop("port"),
    "unknown value": lambda m: the(m, "RayJob/sweep")["spec"]["rayClusterSpec"]["authOptions"].update(mode="tokn"),
    "unknown kind": lambda m: m.append({"apiVersion": "ray.io/v1", "kind": "RayJbo", "metadata": {"name": "x"}}),
    "apiVersion of long ago": lambda m: the(m, "CronJob/mlflow-backup").update(apiVersion="batch/v1beta1"),
}
REFUSED_BY_RULE: dict[str, tuple[Callable[[list[Manifest]], object], str]] = {
    "privileged": (lambda m: mlflow(m)["securityContext"].update(privileged=True), "is privileged"),
    "privileged Ray head": (
        lambda m: head(m)["containers"][0]["securityContext"].update(privileged=True),
        "RayJob/sweep head: container ray-head is privileged",
    ),
    "root": (lambda m: head(m).pop("securityContext"), "may run as root"),
    "root by number": (lambda m: mlflow(m)["securityContext"].update(runAsUser=0), "may run as root"),
    "writable root": (lambda m: mlflow(m)["securityContext"].pop("readOnlyRootFilesystem"), "root file system"),
    "capabilities": (lambda m: mlflow(m)["securityContext"]["capabilities"].update(add=["SYS_ADMIN"]), "capabilities"),
    "host network": (lambda m: head(m).update(hostNetwork=True), "hostNetwork"),
    "host path": (lambda m: head(m)["volumes"].append({"name": "h", "hostPath": {"path": "/"}}), "hostPath"),
    "latest tag": (lambda m: mlflow(m).update(image="orchestrator-mlflow:latest"), "has no fixed tag"),
    "no tag": (lambda m: head(m)["containers"][0].update(image="host:5000/orchestrator"), "has no fixed tag"),
    "no limits": (lambda m: mlflow(m)["resources"].pop("limits"), "no limits.memory"),
    "no requests": (lambda m: head(m)["containers"][0]["resources"].pop("requests"), "no requests.cpu"),
    "no probes": (lambda m: mlflow(m).pop("livenessProbe"), "no probes"),
    "impatient probe": (lambda m: mlflow(m)["readinessProbe"].pop("timeoutSeconds"), "fails its readinessProbe"),
    "Secret object": (a_secret, "Secret/mlflow: a Secret stands in the manifests"),
    "plain secret": (
        lambda m: mlflow(m)["env"].append({"name": "AWS_SECRET_ACCESS_KEY", "value": "abc"}),
        "AWS_SECRET_ACCESS_KEY holds a plain secret",
    ),
    "plain secret in a RayJob": (
        lambda m: head(m)["containers"][0]["env"].append({"name": "HF_TOKEN", "value": "hf_abc"}),
        "HF_TOKEN holds a plain secret",
    ),
    "password in a URI": (a_password_in_a_uri, "holds a password in a URI"),
    "token of the API server": (lambda m: head(m).pop("automountServiceAccountToken"), "holds a token"),
    "role": (a_role, "Role/r: grants rights"),
    "way in": (a_service_for_everybody, "Service/mlflow: is reached from outside"),
    "policy for everybody": (a_policy_for_everybody, "NetworkPolicy/ray: lets everybody in"),
    "policy for every namespace": (a_policy_for_every_namespace, "NetworkPolicy/ray: lets more in"),
    "no default policy": (lambda m: m.remove(the(m, "NetworkPolicy/nothing-by-default")), "no NetworkPolicy refuses"),
    "Ray without token": (
        lambda m: the(m, "RayJob/sweep")["spec"]["rayClusterSpec"].pop("authOptions"),
        "Ray asks for no token",
    ),
    "trials on the head": (
        lambda m: the(m, "RayJob/sweep")["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].pop("num-cpus"),
        "trials may run on the head",
    ),
    "another Ray": (
        lambda m: the(m, "RayJob/sweep")["spec"]["rayClusterSpec"].update(rayVersion="2.52.0"),
        "not that of pyproject.toml",
    ),
    "shared memory on disk": (
        lambda m: head(m)["volumes"][1]["emptyDir"].pop("medium"),
        "/dev/shm is not memory",
    ),
    "too much shared memory": (
        lambda m: head(m)["volumes"][1]["emptyDir"].update(sizeLimit="6Gi"),
        "more than half",
    ),
    "cluster is kept": (
        lambda m: the(m, "RayJob/sweep")["spec"].update(shutdownAfterJobFinishes=False),
        "keeps its cluster",
    ),
    "no deadline": (lambda m: the(m, "RayJob/sweep")["spec"].pop("activeDeadlineSeconds"), "is not set"),
    "submitter that gives up": (
        lambda m: the(m, "RayJob/sweep")["spec"].pop("submitterConfig"),
        "lost connections of its submitter",
    ),
    "submitter that nobody asks whether its head lives": (
        lambda m: the(m, "RayJob/sweep")["spec"]["submitterPodTemplate"]["spec"]["containers"][0].pop("livenessProbe"),
        "would follow the log of a head that is gone",
    ),
    "head that is moved": (
        lambda m: the(m, "RayJob/sweep")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"].pop(
            "annotations"
        ),
        "RayJob/sweep head: an autoscaler may move it",
    ),
    "driver that is killed after 3 s": (
        lambda m: head(m)["containers"][0].update(env=[]),
        "Ray kills a job that is stopped after 3 s",
    ),
    "head that does not wait for its driver": (
        lambda m: head(m)["containers"][0].pop("lifecycle"),
        "goes before its driver has saved its state",
    ),
    "head that is killed while it waits": (
        lambda m: head(m).update(terminationGracePeriodSeconds=60),
        "is killed before its preStop of 90 s ends",
    ),
    "shell in the entrypoint": (
        lambda m: the(m, "RayJob/sweep")["spec"].update(entrypoint="orchestrator run s.yaml || true"),
        "shell would act on",
    ),
    "no such claim": (lambda m: m.remove(the(m, "PersistentVolumeClaim/sweeps")), "PersistentVolumeClaim sweeps does"),
    "no such secret": (
        lambda m: mlflow(m)["env"][2]["valueFrom"]["secretKeyRef"].update(name="postgress"),
        "Secret postgress does not exist",
    ),
}


def cluster(manifests: list[Manifest]) -> Any:
    return the(manifests, "RayCluster/ray")["spec"]


def worker(manifests: list[Manifest]) -> Any:
    return the(manifests, "RayJob/sweep")["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]


def policy(manifests: list[Manifest], name: str) -> Any:
    return the(manifests, f"NetworkPolicy/{name}")["spec"]


def mlflow_may_reach_ray(manifests: list[Manifest]) -> None:
    peer = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "mlflow"}}}
    policy(manifests, "ray")["ingress"].append({"from": [peer], "ports": [{"port": 6379}]})


def a_policy_of_its_own_for_the_head(manifests: list[Manifest]) -> None:
    peer = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "postgres"}}}
    spec = {"podSelector": {"matchLabels": {"ray.io/node-type": "head"}}, "ingress": [{"from": [peer]}]}
    manifests.append({"kind": "NetworkPolicy", "metadata": {"name": "extra"}, "spec": spec})


PRODUCTION, KUEUE = "production", "gpu-kueue"
REFUSED_IN: list[tuple[str, Callable[[list[Manifest]], object], str]] = [
    (PRODUCTION, mlflow_may_reach_ray, "reach ['6379'] of Ray"),
    (PRODUCTION, a_policy_of_its_own_for_the_head, "NetworkPolicy/extra: lets"),
    (PRODUCTION, lambda m: policy(m, "ray")["ingress"][1].pop("ports"), "reach every port of Ray"),
    (PRODUCTION, lambda m: policy(m, "prometheus")["ingress"][0]["ports"].append({"port": 10001}), "of Ray"),
    (PRODUCTION, lambda m: policy(m, "ray")["ingress"].pop(1), "no policy lets RayJob/sweep submitter in, port 8265"),
    (
        PRODUCTION,
        lambda m: policy(m, "ray")["ingress"][1]["from"].pop(),
        "lets KubeRay's operator in from kuberay-system",
    ),
    (PRODUCTION, lambda m: policy(m, "mlflow").pop("ingress"), "no policy lets RayJob/sweep head in, port 5000"),
    (
        PRODUCTION,
        lambda m: policy(m, "postgres")["ingress"][0]["from"].pop(),
        "no policy lets CronJob/mlflow-backup in",
    ),
    (
        PRODUCTION,
        lambda m: policy(m, "mlflow")["egress"][2]["to"][0]["ipBlock"].update(cidr="169.254.0.0/16"),
        "NetworkPolicy/mlflow: lets pods reach the metadata service",
    ),
    (PRODUCTION, lambda m: m.remove(the(m, "NetworkPolicy/ray-to-redis")), "lets it out to StatefulSet/redis"),
    (
        PRODUCTION,
        lambda m: cluster(m)["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"].update(key="pw"),
        "Secret redis has no key pw",
    ),
    (PRODUCTION, lambda m: mlflow(m)["env"][2]["valueFrom"]["secretKeyRef"].update(key="pasword"), "no key pasword"),
    (PRODUCTION, lambda m: cluster(m)["authOptions"].update(secretName="mlflow"), "the key auth_token"),
    (PRODUCTION, lambda m: mlflow(m)["livenessProbe"]["httpGet"].update(port="htpp"), "no port htpp to probe"),
    (PRODUCTION, lambda m: the(m, "Service/redis")["spec"]["ports"][0].update(targetPort="r"), "leads to no port r"),
    (
        PRODUCTION,
        lambda m: the(m, "PodMonitor/ray")["spec"]["podMetricsEndpoints"][0].update(port="dashboard"),
        "no metrics at port dashboard",
    ),
    (PRODUCTION, lambda m: m.remove(the(m, "NetworkPolicy/prometheus")), "no policy lets Prometheus in"),
    (PRODUCTION, lambda m: cluster(m)["workerGroupSpecs"][0].update(minReplicas=1), "not from zero"),
    (PRODUCTION, lambda m: cluster(m)["workerGroupSpecs"][0].update(replicas=4), "not from zero"),
    (
        PRODUCTION,
        lambda m: cluster(m)["headGroupSpec"]["template"]["metadata"].pop("annotations"),
        "RayCluster/ray head: an autoscaler may move it",
    ),
    (PRODUCTION, lambda m: cluster(m)["autoscalerOptions"].pop("idleTimeoutSeconds"), "idle nodes go"),
    (PRODUCTION, lambda m: cluster(m)["headGroupSpec"]["rayStartParams"].pop("num-gpus"), "count GPUs"),
    (
        PRODUCTION,
        lambda m: cluster(m)["headGroupSpec"]["template"]["spec"]["volumes"].pop(),
        "RayCluster/ray: KubeRay's volume of the head's logs has no sizeLimit",
    ),
    (PRODUCTION, lambda m: worker(m).update(terminationGracePeriodSeconds=10), "before its preStop ends"),
    (PRODUCTION, lambda m: worker(m).update(terminationGracePeriodSeconds=60), "does not leave a spot node"),
    (PRODUCTION, lambda m: worker(m)["containers"][0].pop("lifecycle"), "does not leave a spot node"),
    (PRODUCTION, lambda m: head(m).update(tolerations=worker(m)["tolerations"]), "head: may run on spot nodes"),
    (PRODUCTION, lambda m: the(m, "Deployment/mlflow")["spec"].update(replicas=1), "may ever be moved"),
    (
        PRODUCTION,
        lambda m: the(m, "Deployment/mlflow")["spec"]["template"]["spec"].pop("initContainers"),
        "make the tables of an empty database",
    ),
    (PRODUCTION, lambda m: head(m)["volumes"][0]["emptyDir"].pop("sizeLimit"), "volume tmp has no sizeLimit"),
    (
        KUEUE,
        lambda m: the(m, "RayJob/sweep")["spec"]["rayClusterSpec"].update(enableInTreeAutoscaling=True),
        "Kueue takes no RayJob that Ray scales",
    ),
    (KUEUE, lambda m: worker(m).pop("priorityClassName"), "unlike priorities"),
    (KUEUE, lambda m: m.remove(the(m, "PriorityClass/sweep")), "PriorityClass sweep does not exist"),
]


@every_overlay
def test_every_overlay_is_what_kubernetes_and_kuberay_accept_and_what_our_rules_ask(overlay: Path) -> None:
    assert schemas.problems(rendered(overlay)) + policies.problems(rendered(overlay)) == []


@pytest.mark.parametrize("mutate", REFUSED_BY_SCHEMA.values(), ids=REFUSED_BY_SCHEMA)
def test_what_an_api_server_refuses_is_refused(mutate: Callable[[list[Manifest]], object]) -> None:
    good = rendered(K8S / "overlays" / "gpu")
    manifests = copy.deepcopy(good)
    mutate(manifests)
    (bad,) = (manifest for manifest in manifests if manifest not in good)
    assert schemas.problems([bad]) != []


@pytest.mark.parametrize(("mutate", "said"), REFUSED_BY_RULE.values(), ids=REFUSED_BY_RULE)
def test_what_our_rules_forbid_is_refused_and_named(mutate: Callable[[list[Manifest]], object], said: str) -> None:
    manifests = copy.deepcopy(rendered(K8S / "overlays" / "gpu"))
    mutate(manifests)
    found = policies.problems(manifests)
    assert any(said in problem for problem in found), found


@pytest.mark.parametrize(
    ("overlay", "mutate", "said"), REFUSED_IN, ids=lambda value: value if str(value) == value else ""
)
def test_parts_that_do_not_fit_each_other_are_refused_and_named(
    overlay: str, mutate: Callable[[list[Manifest]], object], said: str
) -> None:
    # By way of JSON, or what YAML anchors share would change in several places.
    manifests = json.loads(json.dumps(rendered(K8S / "overlays" / overlay)))
    mutate(manifests)
    found = policies.problems(manifests)
    assert any(said in problem for problem in found), found


PROMISES: dict[str, list[Callable[[list[Manifest]], object]]] = {
    "cpu-demo": [lambda m: "nvidia.com/gpu" not in str(worker(m))],
    "gpu": [lambda m: worker(m)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"],
    "gpu-kueue": [
        lambda m: the(m, "RayJob/sweep")["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "sweeps",
        lambda m: worker(m)["priorityClassName"] == "sweep",
    ],
    "gpu-autoscaling": [
        lambda m: all(spec["enableInTreeAutoscaling"] for _, spec in ray_clusters(m)),
        lambda m: cluster(m)["workerGroupSpecs"][0]["minReplicas"] == 0,
        lambda m: all(spec["workerGroupSpecs"][0]["maxReplicas"] == 8 for _, spec in ray_clusters(m)),
    ],
    "production": [
        lambda m: all(spec["enableInTreeAutoscaling"] for _, spec in ray_clusters(m)),
        lambda m: cluster(m)["gcsFaultToleranceOptions"]["redisAddress"] == "redis:6379",
        lambda m: "spot" in str(worker(m)["tolerations"]),
        lambda m: "NotIn" in str(head(m)["affinity"]),
        lambda m: (
            {budget["metadata"]["name"] for budget in of_kind(m, "PodDisruptionBudget")}
            == {"sweep-head", "ray-head", "mlflow"}
        ),
        lambda m: the(m, "Deployment/mlflow")["spec"]["replicas"] == 2,
        lambda m: any(str(v.get("value")).startswith("s3://") for v in mlflow(m)["env"]),
        lambda m: of_kind(m, "PodMonitor"),
        lambda m: the(m, "ConfigMap/grafana-dashboard")["metadata"]["labels"]["grafana_dashboard"] == "1",
    ],
}


@every_overlay
def test_an_overlay_has_what_its_line_in_the_readme_promises(overlay: Path) -> None:
    manifests = rendered(overlay)
    assert [place for place, kept in enumerate(PROMISES[overlay.name]) if not kept(manifests)] == []
    assert the(manifests, "CronJob/mlflow-backup")["spec"]["concurrencyPolicy"] == "Forbid"


def test_commands_of_the_readme_can_be_given_a_second_time() -> None:
    commands = [line.strip() for line in (K8S / "README.md").read_text().splitlines() if line.strip().startswith("$ ")]
    for place, command in enumerate(commands):
        # A Job of that name stays when it has ended, and cannot be changed.
        if made := re.match(r"\$ kubectl create job ([\w-]+) ", command):
            assert commands[place - 1].startswith(f"$ kubectl delete job {made[1]} --ignore-not-found")
        # What an earlier line has deleted already would be an error, at which kubectl does not wait for the rest.
        if command.startswith("$ kubectl delete -k"):
            assert "--ignore-not-found" in command


def test_redis_is_the_first_process_of_its_pod_and_reads_its_settings_whole(tmp_path: Path) -> None:
    spec = the(rendered(K8S / "overlays" / "production"), "StatefulSet/redis")["spec"]["template"]["spec"]
    stand_in = tmp_path / "redis-server"
    stand_in.write_text("#!/bin/sh\necho $$ $*\ncat\n")
    stand_in.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "REDIS_PASSWORD": "0123abcd"}
    process = subprocess.Popen(
        spec["containers"][0]["command"], env=environment, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    out, _ = process.communicate(timeout=10)
    assert out.splitlines() == [f"{process.pid} -", "requirepass 0123abcd", "appendonly yes", "dir /data"]


@pytest.mark.parametrize(("told_already", "limit_s"), [(True, 20), (False, 0.5)])
def test_a_head_that_goes_waits_for_its_driver_and_tells_one_that_nobody_has_told(
    tmp_path: Path, told_already: bool, limit_s: float
) -> None:
    hook = head(rendered(K8S / "overlays" / "gpu"))["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    # The driver as the image's entry point starts it: it saves its state for a second when it is told.
    program = tmp_path / "orchestrator"
    program.write_text(
        f"#!{sys.executable}\n"
        "import signal, sys, time\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
        "print('running', flush=True)\n"
        "signal.sigwait([signal.SIGTERM])\n"
        "time.sleep(1)\n"
        "print('told twice' if signal.sigpending() else 'saved')\n"
        "sys.exit(130)\n"
    )
    program.chmod(0o755)
    driver = subprocess.Popen([program, "run", "sweep.yaml"], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    assert driver.stdout.readline() == "running\n"
    if told_already:
        driver.terminate()
    # In its container the hook finds all that runs; here it must find this driver alone, and no sweep of somebody's.
    every, ours = 'psutil.process_iter(["cmdline"])', f'psutil.process_iter(["cmdline"]) if process.pid == {driver.pid}'
    assert f"{every} if is_driver(process)" in hook[2]
    script = hook[2].replace(f"{every} if", f"{ours} and")
    waiting = subprocess.Popen([sys.executable, hook[1], script.replace("timeout=60", f"timeout={limit_s}")])
    # Whoever does not wait for its child leaves it a zombie, which is not gone.
    out, _ = driver.communicate(timeout=30)
    assert (driver.returncode, out) == (130, "saved\n")
    assert waiting.wait(timeout=30) == 0


def test_a_demo_needs_no_more_than_its_overlay_says() -> None:
    overlay = K8S / "overlays" / "cpu-demo"
    # What runs before a pod's containers asks for no more than they do.
    requests = [c["resources"]["requests"] for pod in pods(rendered(overlay)) for c in pod.spec["containers"]]
    said = re.search(r"with (\d+) free cores and (\d+) GiB", (overlay / "kustomization.yaml").read_text())
    assert said
    cpus = sum(float(r["cpu"].replace("m", "e-3")) for r in requests)
    memory = sum(policies.quantity_bytes(r["memory"]) for r in requests)
    assert int(said[1]) - 1 < cpus <= int(said[1])
    assert int(said[2]) - 1 < memory / 2**30 <= int(said[2])


def test_a_kustomization_that_does_not_render_is_an_error_with_kustomizes_words(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [gone.yaml]\n")
    with pytest.raises(RenderError, match=r"gone\.yaml"):
        render(tmp_path)


def test_the_script_ends_with_1_and_names_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "overlays" / "bad"
    shutil.copytree(K8S, tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "overlays" / "gpu", bad)
    kustomization = bad / "kustomization.yaml"
    kustomization.write_text(kustomization.read_text().replace("newTag: 0.1.0-cuda", "newTag: latest"))
    monkeypatch.setattr(script.manifests, "overlays", lambda: [bad])
    monkeypatch.setattr(script.manifests, "K8S", tmp_path)
    assert script.main() == 1
    assert "RayJob/sweep head: image orchestrator:latest has no fixed tag" in capsys.readouterr().out


@every_overlay
def test_the_rayjob_runs_a_command_line_that_our_cli_knows_with_the_sweep_file_that_is_mounted(overlay: Path) -> None:
    manifests = rendered(overlay)
    program, command, *arguments = shlex.split(the(manifests, "RayJob/sweep")["spec"]["entrypoint"])
    assert (program, command) == ("orchestrator", "run")
    # Raises on an unknown option, a missing argument or a wrong value.
    parsed = get_command(app).commands["run"].make_context("run", arguments).params  # type: ignore[attr-defined]
    mounts = {mount["mountPath"]: mount["name"] for mount in head(manifests)["containers"][0]["volumeMounts"]}
    assert mounts[str(parsed["sweep"].parent)] == "sweep"
    assert parsed["sweep"].name in the(manifests, "ConfigMap/sweep")["data"]
    for _, cluster in ray_clusters(manifests):
        for template in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            mounts = {m["mountPath"]: m["name"] for m in template["template"]["spec"]["containers"][0]["volumeMounts"]}
            assert mounts[parsed["storage"]] == "sweeps", "all nodes must see the storage"


@pytest.mark.parametrize("gpu", ["T4", "A100-40GB"])
@every_overlay
def test_the_sweep_in_the_config_map_can_be_planned_on_the_pods_that_it_gets(
    overlay: Path, gpu: str, tmp_path: Path
) -> None:
    manifests = rendered(overlay)
    file = tmp_path / "sweep.yaml"
    file.write_text(the(manifests, "ConfigMap/sweep")["data"]["sweep.yaml"])
    job = the(manifests, "RayJob/sweep")["spec"]
    group = job["rayClusterSpec"]["workerGroupSpecs"][0]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = int(limits.get("nvidia.com/gpu", 0))
    hardware = ["--gpu", gpu, "--gpus", str(gpus * group["maxReplicas"])] if gpus else []
    result = CliRunner().invoke(app, ["plan", str(file), "--json", *hardware])
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    # The README lets a T4 in. What it refuses of a space is a result of that space.
    assert plan["runs"] > 0
    sweep = yaml.safe_load(file.read_text())
    resources = sweep["resources"]
    assert resources["scale_up_minutes"] <= 60, "workers that are not there yet, or not yet again, are waited for"
    at_a_time = (gpus or int(limits["cpu"])) * group["maxReplicas"]
    assert resources["max_concurrent"] == at_a_time, "the sweep uses all that its cluster may have"
    assert sweep["resources"]["cpus_per_worker"] <= int(limits["cpu"])
    assert sweep["budget"]["hours"] * 3600 < job["activeDeadlineSeconds"], "a budget ends a sweep cleanly, KubeRay not"


@every_overlay
def test_the_driver_finds_mlflow_where_its_service_is_under_a_name_that_the_server_takes(overlay: Path) -> None:
    manifests = rendered(overlay)
    environment = {variable["name"]: variable for variable in head(manifests)["containers"][0]["env"]}
    _, host, port = environment["MLFLOW_TRACKING_URI"]["value"].replace("//", "").split(":")
    service = the(manifests, f"Service/{host}")
    (pod,) = (pod for pod in pods(manifests) if service["spec"]["selector"].items() <= pod.labels.items())
    assert service["spec"]["ports"][0]["port"] == int(port)
    assert pod.spec["containers"][0]["ports"][0] == {
        "name": service["spec"]["ports"][0]["targetPort"],
        "containerPort": 5000,
    }
    allowed = next(word for word in pod.spec["containers"][0]["command"] if word.startswith("--allowed-hosts="))
    assert f"{host}:{port}" in allowed.partition("=")[2].split(",")


@every_overlay
def test_every_policy_and_budget_selects_pods_that_are_there(overlay: Path) -> None:
    manifests = rendered(overlay)
    labels = [pod.labels for pod in pods(manifests)]
    for manifest in of_kind(manifests, "NetworkPolicy", "PodDisruptionBudget"):
        selector = manifest["spec"].get("podSelector") or manifest["spec"].get("selector") or {}
        wanted = selector.get("matchLabels", {})
        wanted |= {e["key"]: e["values"][0] for e in selector.get("matchExpressions", [])}
        assert any(wanted.items() <= some.items() for some in labels), name_of(manifest)


@every_overlay
def test_everything_lies_in_the_one_namespace(overlay: Path) -> None:
    outside = [m for m in rendered(overlay) if m["metadata"].get("namespace") != "orchestrator"]
    assert {manifest["kind"] for manifest in outside} <= {"Namespace", "PriorityClass"}


def test_the_overlay_that_the_readme_shows_renders_and_is_valid(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    mine = tmp_path / "k8s" / "overlays" / "mine"
    mine.mkdir()
    block, bucket = re.findall(r"```yaml\n(.*?)```", (K8S / "README.md").read_text(), re.DOTALL)
    (mine / "kustomization.yaml").write_text("".join(line[3:] for line in block.splitlines(keepends=True)))
    shutil.copy(K8S.parent / "search_spaces" / "lora_rank.yaml", mine / "sweep.yaml")
    manifests = render(mine)
    assert schemas.problems(manifests) + policies.problems(manifests) == []
    assert head(manifests)["containers"][0]["image"] == "registry.example.com/orchestrator:0.1.0-cuda"
    assert the(manifests, "PersistentVolumeClaim/sweeps")["spec"]["storageClassName"] == "my-rwx-class"
    (mine / "kustomization.yaml").write_text(f"resources: [../production]\npatches:\n{bucket}")
    manifests = render(mine)
    assert schemas.problems(manifests) + policies.problems(manifests) == []
    (server,) = the(manifests, "Deployment/mlflow")["spec"]["template"]["spec"]["containers"]
    assert {"name": "MLFLOW_ARTIFACTS_DESTINATION", "value": "s3://my-bucket/mlflow"} in server["env"]


def test_the_operator_that_the_readme_installs_gives_a_lost_head_an_hour_to_come_back() -> None:
    (install,) = re.findall(r"helm install kuberay-operator (?:.*\\\n)*.*", (K8S / "README.md").read_text())
    assert "--set 'env[0].name=RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS'" in install
    assert "--set-string 'env[0].value=3600'" in install


def test_what_the_readmes_kubectl_commands_name_is_there() -> None:
    manifests = rendered(K8S / "overlays" / "production")
    ports = {m["metadata"]["name"]: m["spec"]["ports"][0]["port"] for m in of_kind(manifests, "Service")}
    # KubeRay's, for the head of the RayCluster.
    ports |= {f"{m['metadata']['name']}-head-svc": 8265 for m in of_kind(manifests, "RayCluster")}
    readme = (K8S / "README.md").read_text()
    forwarded = re.findall(r"kubectl port-forward service/([\w-]+) (\d+)", readme)
    assert {name: int(port) for name, port in forwarded}.items() <= ports.items()
    read = re.findall(r"kubectl get secret ([\w-]+) -o jsonpath='{\.data\.([\w-]+)}'", readme)
    assert all(key in secrets_to_make()[name] for name, key in read)
    verbs = "delete|get|scale|set env|rollout status|--from="
    named = re.findall(rf"(?:{verbs})\s?(rayjob|cronjob|deployment)[ /]([\w-]+)", readme)
    have = {name_of(manifest).lower().replace("/", " ") for manifest in manifests}
    assert {f"{kind} {name}" for kind, name in named} <= have
    selected = re.findall(r"kubectl .*(?:-l|--selector) ([\w./-]+)=(\w+)", readme)
    assert all(any(pod.labels.get(key) == value for pod in pods(manifests)) for key, value in selected)
    assert set(re.findall(r"--containers?=([\w-]+)", readme)) == {"prepare-database"}
    assert (len(forwarded), len(read), len(named), len(selected)) == (2, 2, 12, 5)


def rendered_with_the_readmes_patch(begin: str, overlay: str, tmp_path: Path, *more: tuple[str, str]) -> list[Manifest]:
    """With what README.md has of that begin, and with the same once more where `more` words are replaced."""
    (patch,) = re.findall(rf"`({re.escape(begin)}.*?}})`", (K8S / "README.md").read_text())
    likewise = patch
    for old, new in more:
        likewise = likewise.replace(old, new)
    shutil.copytree(K8S, tmp_path / "k8s")
    mine = tmp_path / "k8s" / "overlays" / "mine"
    mine.mkdir()
    patches = "".join(f"  - {one}\n" for one in dict.fromkeys([patch, likewise]))
    (mine / "kustomization.yaml").write_text(f"resources: [../{overlay}]\npatches:\n{patches}")
    return render(mine)


OF_THE_CLUSTER_THAT_STAYS = ("RayJob, name: sweep", "RayCluster, name: ray"), ("/spec/rayClusterSpec", "/spec")


def test_the_patch_for_the_cluster_that_stays_alone_leaves_no_sweep_that_starts_by_itself(tmp_path: Path) -> None:
    alone = '{target: {kind: RayJob, name: sweep}, patch: \'{"$patch"'
    manifests = rendered_with_the_readmes_patch(alone, "gpu-autoscaling", tmp_path)
    assert of_kind(manifests, "RayJob") == []
    assert cluster(manifests)["headGroupSpec"]
    assert schemas.problems(manifests) + policies.problems(manifests) == []


def test_the_patch_for_unlike_gpus_chooses_the_nodes_and_tells_ray_their_type(tmp_path: Path) -> None:
    typed = (
        "{target: {kind: RayJob, name: sweep}, patch: "
        '\'[{"op": "add", "path": "/spec/rayClusterSpec/workerGroupSpecs/0/template/spec/nodeSelector"'
    )
    manifests = rendered_with_the_readmes_patch(typed, "gpu-autoscaling", tmp_path, *OF_THE_CLUSTER_THAT_STAYS)
    assert schemas.problems(manifests) + policies.problems(manifests) == []
    (group,) = cluster(manifests)["workerGroupSpecs"]
    for pod in (worker(manifests), group["template"]["spec"]):
        assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}
    # As KubeRay puts it on the command line of `ray start`, within quotes of its own.
    assert json.loads(json.loads(group["rayStartParams"]["resources"])) == {"accelerator_type:A100": 1}


def test_the_patch_for_a_registry_with_a_login_renders(tmp_path: Path) -> None:
    accounts = of_kind(
        rendered_with_the_readmes_patch("{target: {kind: ServiceAccount", "production", tmp_path), "ServiceAccount"
    )
    assert len(accounts) >= 5
    assert all(account["imagePullSecrets"] == [{"name": "registry"}] for account in accounts)


def test_the_patch_for_a_cluster_of_one_node_renders(tmp_path: Path) -> None:
    manifests = rendered_with_the_readmes_patch("{target: {kind: PersistentVolumeClaim", "cpu-demo", tmp_path)
    assert schemas.problems(manifests) + policies.problems(manifests) == []
    claims = of_kind(manifests, "PersistentVolumeClaim")
    assert len(claims) >= 2
    assert all(claim["spec"]["accessModes"] == ["ReadWriteOnce"] for claim in claims)


def test_the_pod_that_the_readme_reads_a_report_with_may_start_and_mounts_the_sweeps() -> None:
    (text,) = re.findall(r"<<END\n(.*?)END\n", (K8S / "README.md").read_text(), re.DOTALL)
    pod = yaml.safe_load(text)
    assert schemas.problems([pod]) == []
    assert list(policies.unprivileged(PodTemplate("Pod/reader", pod["metadata"], pod["spec"]))) == []
    manifests = rendered(K8S / "overlays" / "gpu")
    (volume,), (container,) = pod["spec"]["volumes"], pod["spec"]["containers"]
    assert the(manifests, f"PersistentVolumeClaim/{volume['persistentVolumeClaim']['claimName']}")
    assert the(manifests, f"ServiceAccount/{pod['spec']['serviceAccountName']}")
    assert (container["volumeMounts"][0]["name"], container["image"].rpartition("/")[2]) == (
        volume["name"],
        head(manifests)["containers"][0]["image"],
    )


def test_the_patch_for_nvidias_runtime_renders_for_sweeps_and_for_the_cluster_that_stays(tmp_path: Path) -> None:
    runtime = (
        "{target: {kind: RayJob, name: sweep}, patch: "
        '\'[{"op": "add", "path": "/spec/rayClusterSpec/workerGroupSpecs/0/template/spec/runtimeClassName"'
    )
    manifests = rendered_with_the_readmes_patch(runtime, "gpu-autoscaling", tmp_path, *OF_THE_CLUSTER_THAT_STAYS)
    assert schemas.problems(manifests) + policies.problems(manifests) == []
    assert worker(manifests)["runtimeClassName"] == "nvidia"
    assert cluster(manifests)["workerGroupSpecs"][0]["template"]["spec"]["runtimeClassName"] == "nvidia"


def test_the_readme_says_what_room_the_sweep_and_each_of_its_workers_need() -> None:
    (job,) = of_kind(rendered(K8S / "overlays" / KUEUE), "RayJob")
    asked = {"cpu": 0.0, "memory": 0.0, "nvidia.com/gpu": 0.0}
    replicas = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]
    for pod in pods([job]):
        for container in pod.containers:
            requests, count = container["resources"]["requests"], replicas if pod.owner.endswith("workers") else 1
            asked["cpu"] += count * float(requests["cpu"].replace("m", "e-3"))
            asked["memory"] += count * policies.quantity_bytes(requests["memory"]) / 2**30
            asked["nvidia.com/gpu"] += count * int(requests.get("nvidia.com/gpu", 0))
    readme = (K8S / "README.md").read_text()
    said = re.search(r"ask for ([\d.]+) CPUs,\s([\d.]+) GiB and (\d+) GPUs", readme)
    assert said
    assert tuple(map(float, said.groups())) == tuple(asked.values())
    requests = worker([job])["containers"][0]["resources"]["requests"]
    said = re.search(r"A GPU worker asks for (\d+) CPUs and\s+(\d+) GiB", readme)
    assert said
    assert (said[1], f"{said[2]}Gi") == (requests["cpu"], requests["memory"])


def test_the_patch_for_an_object_store_of_an_own_network_renders_and_breaks_no_rule(tmp_path: Path) -> None:
    (patch,) = re.findall(r"`({target: {kind: NetworkPolicy.*?})`", (K8S / "README.md").read_text())
    shutil.copytree(K8S, tmp_path / "k8s")
    mine = tmp_path / "k8s" / "overlays" / "mine"
    mine.mkdir()
    for block in ("10.1.2.3/32", "169.254.170.23/32"):
        named = patch.replace("10.1.2.3/32", block)
        (mine / "kustomization.yaml").write_text(f"resources: [../gpu]\npatches:\n  - {named}\n")
        manifests = render(mine)
        assert policy(manifests, "ray")["egress"][-1]["to"] == [{"ipBlock": {"cidr": block}}]
        assert policies.problems(manifests) == []


def test_the_dashboard_asks_for_metrics_that_ray_has() -> None:
    import ray.dashboard.modules.metrics.dashboards.default_dashboard_panels as rays_own

    dashboard = json.loads((K8S / "components" / "monitoring" / "sweeps.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    names = set(re.findall(r"\b((?:ray|autoscaler)_\w+)\b(?=\{)", " ".join(asked)))
    ours = {name for name in names if name.startswith("ray_orchestrator_")}
    assert len(names - ours) >= 10
    assert names - ours <= set(re.findall(r"\b((?:ray|autoscaler)_\w+)\b", Path(rays_own.__file__).read_text()))
    made = re.findall(r'_gauge\("(\w+)"', (K8S.parent / "orchestrator" / "sweep" / "gauges.py").read_text())
    assert ours == {f"ray_orchestrator_{name}" for name in made}
