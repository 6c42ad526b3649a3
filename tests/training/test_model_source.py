"""Where models come from, and how a wrong name is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from orchestrator.errors import ModelError
from orchestrator.training import model_source


def test_a_builtin_config_is_what_its_folder_says(tiny_model: Path) -> None:
    source = model_source.resolve("builtin:tiny-llama")
    written = LlamaConfig.from_pretrained(tiny_model)
    assert LlamaConfig(**source.config).to_diff_dict().items() <= {**written.to_dict(), **source.config}.items()
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert 200_000 < model.num_parameters() < 900_000


def test_the_tiny_tokenizer_reads_back_what_it_wrote(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = "def f(x: int) -> None:  # größer\n\treturn\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 1024


def test_a_misspelt_builtin_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ModelError, match="did you mean builtin:tiny-llama"):
        model_source.resolve("builtin:tinyllama")


def _folder(tmp_path: Path, **config: object) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            "no causal language-model head.*BertForMaskedLM",
        ),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "no causal language model of type t5"),
        ({"model_type": "made-up"}, "type made-up"),
        ({"model_type": "made-up", "architectures": ["XForCausalLM"], "auto_map": {}}, "never run"),
        ({"model_type": "llama", "architectures": 5}, "architectures in its config.json is no list"),
    ],
)
def test_a_model_without_a_causal_head_is_refused(config: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=said):
        model_source.resolve(_folder(tmp_path, **config))


def test_a_causal_model_in_a_local_folder_is_found(tmp_path: Path) -> None:
    folder = _folder(tmp_path, model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=8)
    source = model_source.resolve(folder)
    assert (source.config["hidden_size"], source.folder) == (8, tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no config.json"),
        ("{", "cannot be read"),
        pytest.param("[" * 100_000, "cannot be read", id="deep"),
        ("[]", "no JSON object"),
    ],
)
def test_a_folder_without_a_readable_config_is_refused(text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=said):
        model_source.resolve(str(tmp_path))


def test_weights_that_are_pickles_are_refused(tmp_path: Path) -> None:
    source = model_source.resolve(_folder(tmp_path, model_type="llama", architectures=["LlamaForCausalLM"]))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="safetensors"):
        model_source.materialize(source)


@pytest.mark.parametrize("name", ["./no/such/folder", "/nowhere", "a/b/c"])
def test_a_folder_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        model_source.resolve(name)


def test_a_hub_model_is_refused_in_words_when_the_hub_is_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = (
        "from orchestrator.training import model_source\n"
        "from orchestrator.errors import ModelError\n"
        "try: model_source.resolve('nobody/nothing')\n"
        "except ModelError as error: print(error)\n"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.startswith("model nobody/nothing is no local folder")
    assert "HF_HUB_OFFLINE" in said


@pytest.mark.parametrize("endpoint", ["https://a..b", "http://[bad"])
@pytest.mark.parametrize("model", ["nobody/nothing", "builtin:tiny-llama", "a local one"])
def test_an_endpoint_of_the_hub_that_is_no_address_is_refused(endpoint: str, model: str, tmp_path: Path) -> None:
    if model == "a local one":
        # What transformers has to be asked about, which cannot be imported then.
        (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
        model = str(tmp_path)
    code = (
        "from orchestrator.training import model_source\n"
        "from orchestrator.errors import ModelError\n"
        f"try: model_source.resolve({model!r})\n"
        "except ModelError as error: print(error)\n"
    )
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, env=env)
    assert done.stdout.startswith("HF_ENDPOINT is no address (")
    assert done.stdout.endswith("set it to one like https://huggingface.co, or unset it\n")


def test_a_hub_that_refuses_connections_is_said_not_to_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import file_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refuses(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("check your connection") from ConnectionRefusedError("Connection refused")

    monkeypatch.setattr(file_download, "_get_metadata_or_catch_error", refuses)
    monkeypatch.setattr(model_source, "_is_offline", lambda: False)
    with pytest.raises(ModelError, match=r"no local folder, and the hub does not answer \(Connection refused\)"):
        model_source.resolve("nobody/nothing")


def test_finding_a_builtin_model_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from orchestrator.training import model_source, task, deepspeed_config\n"
        "model_source.resolve('builtin:smollm2-135m')\n"
        "print(sorted({'torch', 'transformers', 'deepspeed', 'peft', 'datasets', 'numpy'} & set(sys.modules)))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout == "[]\n"


def test_a_folder_of_the_cache_is_built_once_and_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    source = model_source.resolve("builtin:tiny-llama")
    folder = model_source.materialize(source)
    written = (folder / "config.json").stat().st_mtime_ns
    assert model_source.materialize(source) == folder
    assert (folder / "config.json").stat().st_mtime_ns == written
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {folder.stat().st_mode & 0o666}


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set ORCHESTRATOR_CACHE"):
        model_source.materialize(model_source.resolve("builtin:tiny-llama"))
