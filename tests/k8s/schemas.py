"""Objects against their schemas, unknown fields refused: core ones against Kubernetes', the rest against their CRDs.

What only an API server does is not done: CEL rules (`x-kubernetes-validations`), defaults and admission webhooks.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.k8s.manifests import Manifest, name_of, pods

CRDS = Path(__file__).parent / "crds"
OLDEST, NEWEST = "1.30", "1.37"
"""The Kubernetes versions that the manifests are for."""


def problems(manifests: list[Manifest]) -> list[str]:
    """What the API server would refuse."""
    return [f"{name_of(manifest)}: {problem}" for manifest in manifests for problem in _problems(manifest)]


def _problems(manifest: Manifest) -> list[str]:
    validator = _crds().get((manifest.get("apiVersion"), manifest.get("kind")))
    if not validator:
        return _core_problems(manifest)
    found = [_told(error) for error in validator.iter_errors(manifest)]
    # A CRD leaves metadata to the API server, which knows one kind of it.
    for metadata in (manifest.get("metadata", {}), *(pod.metadata for pod in pods([manifest]))):
        found += _core_problems({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata})
    return found


def _core_problems(manifest: Manifest) -> list[str]:
    found = []
    for version in (OLDEST, NEWEST):
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"Kubernetes {version}: {_told(error)}")
        except kubernetes_validate.SchemaNotFoundError:
            found.append(f"no schema for {manifest.get('apiVersion')} {manifest.get('kind')} in Kubernetes {version}")
    return found


def _told(error: jsonschema.ValidationError) -> str:
    return f"{'.'.join(map(str, error.absolute_path)) or '(top)'}: {error.message[:300]}"


@cache
def _crds() -> dict[tuple[Any, Any], jsonschema.Draft202012Validator]:
    validators = {}
    for file in sorted(CRDS.glob("*.yaml")):
        spec = yaml.load(file.read_text(), yaml.CSafeLoader)["spec"]
        for version in spec["versions"]:
            key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
            validators[key] = jsonschema.Draft202012Validator(_closed(version["schema"]["openAPIV3Schema"]))
    return validators


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema as JSON schema, in which a field that is not named is an error."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    closed = dict(schema)
    if schema.get("nullable"):
        closed["type"] = [schema["type"], "null"]
    if "properties" in schema:
        closed["properties"] = {name: _closed(part) for name, part in schema["properties"].items()}
        open_ended = {"x-kubernetes-preserve-unknown-fields", "x-kubernetes-embedded-resource", "additionalProperties"}
        if not open_ended & schema.keys():
            closed["additionalProperties"] = False
    if isinstance(schema.get("additionalProperties"), dict):
        closed["additionalProperties"] = _closed(schema["additionalProperties"])
    if "items" in schema:
        closed["items"] = _closed(schema["items"])
    return closed
