"""A trial out of a sweep: what `from_pretrained` reads is what the trial trained."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.config.sweep_config import DataConfig, SweepConfig, TrackingConfig
from orchestrator.config.sweep_file import to_yaml
from orchestrator.errors import InputError, StorageError
from orchestrator.export.folder import export
from orchestrator.export.model_card import model_card
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import TrialResult, TrialStatus
from orchestrator.results.storage import read_sweep
from orchestrator.sweep.delivered import Delivered, TrialDelivery, write_delivered
from orchestrator.training import model as models
from tests.made_up_sweep import made_up_sweep, made_up_trial, write_made_up
from tests.training.conftest import TINY
from tests.training.launch import make_task, run_trial

CPU = torch.device("cpu")
INPUT_IDS = torch.arange(5, 37).reshape(2, 16)
FILES = {"README.md", "chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def a_sweep(root: Path, tiny_model: Path, *all_settings: dict[str, Any]) -> SweepFolder:
    """A sweep whose trials have adapters that were not trained, and yet do something; later ones are worse."""
    trials = []
    for place, settings in enumerate(all_settings):
        shared = TINY.model_dump(mode="json", exclude={"seed"})
        trials.append(made_up_trial({**shared, **settings}, objective=2.0 + place))
    folder = write_made_up(root, made_up_sweep(trials, searched=("rank",)))
    for trial in trials:
        model = models.build(trial.config, tiny_model, "fp32", CPU, zero3=None)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or trial.config.trains_all_weights):
                parameter.data.normal_(std=0.05)
        models.save(model, folder.trial(trial.trial_id).adapter, writes=True)
    return folder


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    result: torch.Tensor = model.eval()(input_ids=INPUT_IDS).logits
    return result


def base_plus_adapter(folder: SweepFolder, tiny_model: Path, trial: TrialResult) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return logits_of(PeftModel.from_pretrained(base, folder.trial(trial.trial_id).adapter))


def test_the_best_trials_adapter_loads_with_plain_from_pretrained(tiny_model: Path, tmp_path: Path) -> None:
    folder = a_sweep(tmp_path / "sweep", tiny_model, {"rank": 4}, {"rank": 8})
    done = export(folder, None, tmp_path / "out", merge=False, force=False)
    assert (done.trial.config.rank, done.kind) == (4, "adapter")
    assert {file.name for file in done.folder.iterdir()} == {
        *FILES,
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert json.loads((done.folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_model)
    loaded = AutoPeftModelForCausalLM.from_pretrained(done.folder)
    torch.testing.assert_close(logits_of(loaded), base_plus_adapter(folder, tiny_model, done.trial))
    assert GenerationConfig.from_pretrained(done.folder).eos_token_id == 0
    tokenizer = AutoTokenizer.from_pretrained(done.folder)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert chat == "<|user|>\nHello<|end|>\n"


@pytest.mark.parametrize(
    "settings",
    [{}, {"rslora": True}, {"dora": True}, {"precision": "nf4", "target_modules": "all-linear"}, {"precision": "int8"}],
    ids=lambda settings: "-".join(settings) + str(settings.get("precision", "")),
)
def test_a_merged_model_answers_as_base_plus_adapter(
    settings: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    folder = a_sweep(tmp_path / "sweep", tiny_model, settings)
    done = export(folder, None, tmp_path / "out", merge=True, force=False)
    assert {file.name for file in done.folder.iterdir()} == {*FILES, "config.json", "model.safetensors"}
    merged = AutoModelForCausalLM.from_pretrained(done.folder)
    assert not isinstance(merged, PeftModel)
    assert merged.dtype == torch.float32
    assert not hasattr(merged.config, "quantization_config")
    expected = base_plus_adapter(folder, tiny_model, done.trial)
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert (logits_of(base) - expected).abs().max() > 0.01


def test_a_bf16_trial_merges_into_bf16_weights(tiny_model: Path, tmp_path: Path) -> None:
    folder = a_sweep(tmp_path / "sweep", tiny_model, {"precision": "bf16"})
    done = export(folder, None, tmp_path / "out", merge=True, force=False)
    merged = AutoModelForCausalLM.from_pretrained(done.folder)
    assert merged.dtype == torch.bfloat16
    expected = base_plus_adapter(folder, tiny_model, done.trial)
    # 8 bits of mantissa, over two layers.
    torch.testing.assert_close(logits_of(merged.float()), expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("merge", [False, True])
def test_a_full_fine_tune_is_copied_whole(merge: bool, tiny_model: Path, tmp_path: Path) -> None:
    folder = a_sweep(tmp_path / "sweep", tiny_model, {"rank": "full"})
    done = export(folder, None, tmp_path / "out", merge=merge, force=False)
    assert done.kind == "full"
    trained = AutoModelForCausalLM.from_pretrained(folder.trial(done.trial.trial_id).adapter)
    loaded = AutoModelForCausalLM.from_pretrained(done.folder)
    torch.testing.assert_close(logits_of(loaded), logits_of(trained))
    assert loaded.config.use_cache


def test_a_trained_trial_is_exported_with_a_card_that_tells_its_story(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = made_up_trial(TINY.model_dump(mode="json", exclude={"seed"})).model_copy(update={"mlflow_run_id": "run17"})
    folder = write_made_up(tmp_path / "sweep", made_up_sweep([record]))
    data = DataConfig(train="builtin:python-docs", eval=0.1)
    tracking = TrackingConfig(uri="http://me:secret@mlflow:5000")
    asked = SweepConfig(name="made-up", model="builtin:tiny-llama", data=data, tracking=tracking)
    folder.sweep_file.write_text(to_yaml(asked))
    outcome = run_trial(make_task(record.config, tiny_model, tiny_data, folder.trial(record.trial_id).root))
    assert outcome.end.status == "completed", outcome.log
    done = export(folder, record.trial_id, tmp_path / "out", merge=False, force=False)
    loaded = AutoPeftModelForCausalLM.from_pretrained(done.folder, dtype="float32")
    assert loaded.dtype is torch.float32
    torch.testing.assert_close(logits_of(loaded), base_plus_adapter(folder, tiny_model, record))
    card = (done.folder / "README.md").read_text()
    for told in (
        "library_name: peft",
        "names its base by a folder of the machine",
        "How high a LoRA rank pays for itself?",
        "| hash | d41d8cd98f00b204 |",
        "| train | builtin:python-docs |",
        "| MLflow server | http://mlflow:5000 |",
        "| rank | 8 |",
        "| eval_loss | 2.500 |",
        "| MLflow run | [run17](http://mlflow:5000/#/runs/run17) |",
        "| torch | 2.13.0 |",
    ):
        assert told in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(done.folder)
    pasted: dict[str, Any] = {}
    exec(code, pasted)
    assert pasted["model"].dtype is torch.float32
    assert pasted["tokenizer"].eos_token_id == 0
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", "float32"), ("amp_bf16", "float32"), ("bf16", "bfloat16"), ("nf4", "auto")]
)
def test_a_card_loads_an_adapters_base_in_the_type_that_it_was_trained_in(precision: str, dtype: str) -> None:
    trial = made_up_trial({"rank": 8, "precision": precision})
    card = model_card(made_up_sweep([trial]), trial, "adapter", None)
    assert f'from_pretrained(folder, dtype="{dtype}")' in card
    assert ("trained on the base in nf4 and is loaded below with the unquantised base" in card) == (precision == "nf4")


def test_the_card_names_mlflows_run_of_a_trial_that_has_completed_while_its_sweep_is_at_work(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = a_sweep(tmp_path / "sweep", tiny_model, {})
    (trial,) = read_sweep(folder)[0].trials
    assert trial.mlflow_run_id is None
    told = {trial.trial_id: TrialDelivery(run_id="run17"), "other": TrialDelivery()}
    write_delivered(folder, Delivered(server="http://mlflow:5000", sweep_id="abc123", trials=told))
    done = CliRunner().invoke(app, ["export", str(folder.root), "--to", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "| MLflow run | run17 |" in (tmp_path / "out" / "README.md").read_text()


def test_a_folder_that_exists_is_kept_unless_it_is_forced(tiny_model: Path, tmp_path: Path) -> None:
    folder = a_sweep(tmp_path / "sweep", tiny_model, {})
    out = tmp_path / "out"
    out.mkdir()
    words = ["export", str(folder.root), "--to", str(out)]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert "exists already" in refused.stderr
    assert list(out.iterdir()) == []
    for merge in (["--merge"], []):
        forced = CliRunner().invoke(app, [*words, *merge, "--force"])
        assert forced.exit_code == 0, forced.stderr
    assert "peft.AutoPeftModelForCausalLM" in forced.stdout
    assert not (out / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "sweep"]


@pytest.mark.parametrize("merging", [(), ("--merge",)])
def test_an_export_says_nothing_but_where_the_model_is(
    tiny_model: Path, tmp_path: Path, merging: tuple[str, ...]
) -> None:
    folder = a_sweep(tmp_path / "sweep", tiny_model, {})
    command = [
        sys.executable,
        "-m",
        "orchestrator",
        "export",
        str(folder.root),
        *merging,
        "--to",
        str(tmp_path / "out"),
    ]
    # As a user has it: pytest and its fixtures may have told the libraries to be quiet.
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    # The base is made first, as on another machine than the sweep's.
    environment["ORCHESTRATOR_CACHE"] = str(tmp_path / "cache")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("trial ")
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


def test_force_replaces_only_what_export_made(tiny_model: Path, tmp_path: Path) -> None:
    folder = a_sweep(tmp_path / "sweep", tiny_model, {})
    other = a_sweep(tmp_path / "other", tiny_model, {})
    (tmp_path / "mlartifacts" / "1").mkdir(parents=True)
    out = export(folder, None, tmp_path / "out", merge=False, force=False).folder
    (out / "mine.txt").write_text("keep me")
    adapter = next(other.trials()).adapter
    for to in (other.root, adapter, tmp_path / "mlartifacts", out):
        before = sorted(path.name for path in to.rglob("*"))
        with pytest.raises(InputError, match=r"--force replaces what `export` made.*remove this one yourself"):
            export(folder, None, to, merge=False, force=True)
        assert sorted(path.name for path in to.rglob("*")) == before


def test_a_folder_below_a_file_is_told_in_words(tiny_model: Path, tmp_path: Path) -> None:
    folder = a_sweep(tmp_path / "sweep", tiny_model, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*Not a directory"):
        export(folder, None, tmp_path / "file" / "out", merge=False, force=False)


def test_where_no_folder_can_be_made_no_space_is_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    folder = a_sweep(tmp_path / "sweep", tiny_model, {})
    with pytest.raises(StorageError) as refused:
        export(folder, None, Path("/proc/out"), merge=False, force=False)
    assert str(refused.value) == "cannot write /proc/out (nothing can be made in /proc): name another --to"


@pytest.mark.parametrize("around", ["", "sweep"])
def test_force_never_removes_what_the_sweep_lives_in(around: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = a_sweep(tmp_path / "sweep", tiny_model, {})
    with pytest.raises(InputError, match="--force would remove"):
        export(folder, None, tmp_path / around, merge=False, force=True)
    assert next(folder.trials()).adapter.is_dir()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("inside", ["adapter", "new/one", "trials", "trials/any/adapter", "trials/new", "data"])
def test_nothing_is_exported_into_the_sweeps_own_folder(
    inside: str, force: bool, tiny_model: Path, tmp_path: Path
) -> None:
    folder = a_sweep(tmp_path / "sweep", tiny_model, {})
    (folder.root / "data").mkdir()
    before = sorted(folder.root.rglob("*"))
    to = folder.root / inside.replace("any", next(folder.trials()).root.name)
    why = "lies in the sweep's own folder" if force or not to.exists() else "exists already"
    with pytest.raises(InputError, match=why):
        export(folder, None, to, merge=False, force=force)
    assert sorted(folder.root.rglob("*")) == before


def test_a_failed_export_leaves_nothing_and_the_old_folder_as_it_was(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_sweep(tmp_path / "sweep", tiny_model, {})
    out = export(folder, None, tmp_path / "out", merge=False, force=False).folder
    before = sorted(file.name for file in out.iterdir())

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orchestrator.export.folder.model_card", full_disk)
    with pytest.raises(StorageError, match=r"No space left.*free some space there"):
        export(folder, None, out, merge=False, force=True)
    assert sorted(file.name for file in out.iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "sweep"]


def test_what_is_exported_before_the_report_recommends_anything_is_said_in_its_words(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = a_sweep(tmp_path / "sweep", tiny_model, {"rank": 4}, {"rank": 8})
    sweep = read_sweep(folder)[0]

    def told(*statuses: TrialStatus, named: tuple[str, ...] = ()) -> str:
        trials = [
            trial.model_copy(update={"status": status}) for trial, status in zip(sweep.trials, statuses, strict=True)
        ]
        write_made_up(folder.root, sweep.model_copy(update={"trials": tuple(trials), "ended_ms": None}))
        args = ["export", str(folder.root), "--to", str(tmp_path / "out"), "--force", *named]
        done = CliRunner().invoke(app, args)
        assert done.exit_code == 0, done.output
        assert f"trial {sweep.trials[0].trial_id} is in " in done.stdout
        return done.stderr

    early = told(TrialStatus.COMPLETED, TrialStatus.RUNNING)
    assert early.startswith("Too early to tell: rank=4 alone has completed, and 1 of 2 trials have not ended. It is")
    assert early.strip().endswith(" exported as completed so far, and not as recommended")
    assert told(TrialStatus.RUNNING, TrialStatus.RUNNING).strip().endswith("best so far, and not as recommended")
    assert told(TrialStatus.COMPLETED, TrialStatus.COMPLETED) == ""
    named = ("--trial", sweep.trials[0].trial_id)
    assert told(TrialStatus.COMPLETED, TrialStatus.RUNNING, named=named) == ""


def test_an_unknown_trial_hears_of_the_nearest(tiny_model: Path, tmp_path: Path) -> None:
    folder = write_made_up(tmp_path / "sweep", made_up_sweep([made_up_trial({"rank": 8})]))
    known = next(folder.trials()).root.name
    with pytest.raises(InputError, match=f"did you mean {known}"):
        export(folder, known[:-1], tmp_path / "out", merge=False, force=False)
    with pytest.raises(InputError, match=f"there are {known}"):
        export(folder, "zzz", tmp_path / "out", merge=False, force=False)


@pytest.mark.parametrize(
    ("status", "told"),
    [(TrialStatus.INFEASIBLE, "it is infeasible .*27.1 GiB"), (TrialStatus.DIVERGED, "it is diverged .*loss became")],
)
def test_a_trial_without_an_adapter_says_why(status: TrialStatus, told: str, tmp_path: Path) -> None:
    trial = made_up_trial({"rank": 8}, status=status)
    folder = write_made_up(tmp_path / "sweep", made_up_sweep([trial]))
    with pytest.raises(InputError, match=told):
        export(folder, trial.trial_id, tmp_path / "out", merge=False, force=False)
    with pytest.raises(InputError, match=r"No answer: .* is named with --trial is exported"):
        export(folder, None, tmp_path / "out", merge=False, force=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_adapter_is_not_merged_and_not_told_to_be_exported_unmerged(
    file: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = a_sweep(tmp_path / "sweep", tiny_model, {})
    adapter = next(folder.trials()).adapter
    (adapter / file).write_text("{")
    with pytest.raises(InputError, match=f"the adapter in {adapter} is damaged.*: name another with --trial$"):
        export(folder, None, tmp_path / "out", merge=True, force=False)


def test_an_adapter_that_was_cut_off_is_not_exported(tiny_model: Path, tmp_path: Path) -> None:
    folder = a_sweep(tmp_path / "sweep", tiny_model, {})
    weights = next(folder.trials()).adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"is damaged \(adapter_model.safetensors: .*: name another with --trial$"):
        export(folder, None, tmp_path / "out", merge=False, force=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_a_folder_for_an_adapters_file_is_refused_and_not_waited_for(
    make: Callable[[Path], None], file: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = a_sweep(tmp_path / "sweep", tiny_model, {})
    spoilt = next(folder.trials()).adapter / file
    spoilt.unlink()
    make(spoilt)
    with pytest.raises(InputError, match=rf"is damaged \({file} is no file\): name another with --trial$"):
        export(folder, None, tmp_path / "out", merge=False, force=False)


@pytest.mark.parametrize("text", ["[]", "[" * 100_000])
def test_an_adapters_config_that_is_none_is_refused(text: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = a_sweep(tmp_path / "sweep", tiny_model, {})
    (next(folder.trials()).adapter / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match=r"adapter_config\.json is missing or damaged: name another with --trial$"):
        export(folder, None, tmp_path / "out", merge=False, force=False)


@pytest.mark.parametrize("changes", [{"peft_type": "NONSENSE"}, {"r": "x"}])
def test_an_adapter_of_no_kind_is_not_merged(changes: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    folder = a_sweep(tmp_path / "sweep", tiny_model, {})
    file = next(folder.trials()).adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError, match=r"is damaged, or not one of .*: name another with --trial$"):
        export(folder, None, tmp_path / "out", merge=True, force=False)


def test_pickled_weights_are_never_copied(tiny_model: Path, tmp_path: Path) -> None:
    folder = a_sweep(tmp_path / "sweep", tiny_model, {})
    (next(folder.trials()).adapter / "adapter_model.bin").write_bytes(b"pickle")
    done = export(folder, None, tmp_path / "out", merge=False, force=False)
    assert not (done.folder / "adapter_model.bin").exists()
