"""Rows, tokens, masks and batches."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from orchestrator.config.sweep_config import DataConfig
from orchestrator.errors import DataError
from orchestrator.training import data
from orchestrator.training.data_rows import Row, check, read_rows, rows_in_both
from orchestrator.training.data_tokens import tokenize
from orchestrator.training.tokenizer import load_tokenizer

ROWS = [{"text": f"row {number} of a small file"} for number in range(20)]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def _write_jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("text\n" + "".join(f'"{row["text"]}"\n' for row in rows))


def _write_parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


@pytest.mark.parametrize(
    ("encoding", "line", "byte"),
    [("latin-1", 2, "0xe9"), ("cp1252", 2, "0xe9"), ("utf-16", 1, "0xff"), ("utf-16-le", 1, "0x00")],
)
@pytest.mark.parametrize("suffix", ["csv", "txt"])
def test_a_file_of_another_encoding_is_refused_with_its_first_such_line(
    suffix: str, encoding: str, line: int, byte: str, tmp_path: Path
) -> None:
    file = tmp_path / f"rows.{suffix}"
    file.write_text("text\ncafé\n", encoding=encoding)
    with pytest.raises(DataError) as refused:
        check(DataConfig(train=str(file)))
    assert f"{file}: line {line} is not text in UTF-8 (byte {byte}): save the file as UTF-8" in str(refused.value)


@pytest.mark.parametrize("suffix", ["csv", "txt"])
def test_utf_8_is_read_as_it_was_written_with_or_without_a_byte_order_mark(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows.{suffix}"
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_text("text\ncafé\n", encoding=encoding)
        (row,) = read_rows(str(file), "train")
        assert row.columns == {"text": "café" if suffix == "csv" else "text\ncafé"}


@pytest.mark.parametrize(
    ("suffix", "write"), [("jsonl", _write_jsonl), ("csv", _write_csv), ("parquet", _write_parquet)]
)
def test_every_kind_of_file_gives_the_same_tokens(
    suffix: str, write: Callable[[Path, list[dict[str, Any]]], None], tiny_model: Path, tmp_path: Path
) -> None:
    _write_jsonl(tmp_path / "plain.jsonl", ROWS)
    write(tmp_path / f"rows.{suffix}", ROWS)
    plain = data.prepare(DataConfig(train=str(tmp_path / "plain.jsonl")), tiny_model, tmp_path / "plain")
    summary = data.prepare(DataConfig(train=str(tmp_path / f"rows.{suffix}")), tiny_model, tmp_path / "out")
    assert (summary.train_rows, summary.eval_rows, summary.skipped_count) == (19, 1, 0)
    assert summary.hash == plain.hash


def test_a_tokenizer_without_a_class_of_its_own_is_the_one_that_autotokenizer_loads(
    tiny_model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    ours = load_tokenizer(tiny_model)
    assert type(ours) is type(tokenizer)
    texts = ["def f(x):", "Zoë <|end|> naïve\n\n  tabs\t"]
    assert ours(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    for number, one in enumerate((ours, tokenizer)):
        one.save_pretrained(tmp_path / str(number))
    first, second = ({f.name: f.read_text() for f in (tmp_path / n).iterdir()} for n in "01")
    assert first == second


@pytest.mark.parametrize(
    "changed", [{"tokenizer_class": "GPT2Tokenizer"}, {"auto_map": {"AutoTokenizer": "x.Y"}}, None]
)
def test_a_tokenizer_of_another_class_is_left_to_autotokenizer(
    changed: dict[str, Any] | None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    if changed is None:
        file.unlink()
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    asked: list[Path] = []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda folder, **_: asked.append(folder))
    load_tokenizer(tmp_path / "model")
    assert asked == [tmp_path / "model"]


def test_tokenising_loads_no_torch_which_the_driver_has_no_use_for(tiny_model: Path, tmp_path: Path) -> None:
    _write_jsonl(tmp_path / "rows.jsonl", ROWS)
    script = (
        "import sys; from pathlib import Path; from orchestrator.config.sweep_config import DataConfig; "
        "from orchestrator.training import data; "
        "data.prepare(DataConfig(train=sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])); "
        "print('torch' in sys.modules)"
    )
    arguments = [str(tmp_path / "rows.jsonl"), str(tiny_model), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_folder_is_all_its_files_and_text_files_are_cut_in_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(["word " * 60] * 5))
    _write_jsonl(tmp_path / "b.jsonl", ROWS)
    rows = list(read_rows(str(tmp_path), "train"))
    assert len(rows) == 3 + 20
    assert all(row.columns for row in rows)


def test_an_unreadable_row_is_counted_and_named_and_not_fatal(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    _write_jsonl(file, ROWS)
    with file.open("ab") as more:
        more.write(
            b'{"text": \n'
            + b'"no object"\n'
            + b'{"text": 3}\n'
            + b'{"other": "x"}\n'
            + b"\xff\xfe\n"
            + b'{"text": ""}\n'
        )
    summary = data.prepare(DataConfig(train=str(file)), tiny_model, tmp_path / "out")
    assert (summary.train_rows + summary.eval_rows, summary.skipped_count) == (20, 6)
    assert [where for where, _ in summary.skipped] == [f"{file}:{line}" for line in range(21, 27)]


@pytest.mark.parametrize(
    ("name", "text", "data_format", "said"),
    [
        ("a.jsonl", '{"body": "x", "title": "y"}\n', "text", "no column text.*columns seen: body, title"),
        ("a.jsonl", '{"prompt": "x"}\n', "prompt_completion", "no column completion.*columns seen: prompt"),
        ("a.jsonl", "", "text", "no usable row"),
        ("a.jsonl", "{\n{\n", "text", "no usable row: 2 could not be used.*a.jsonl:1.*not JSON"),
        ("a.csv", "text\n", "text", "no usable row"),
        ("a.parquet", "nonsense", "text", "no readable parquet"),
        ("a.docx", "x", "text", "write one of .jsonl"),
        ("a.jsonl", '{"text": "alone"}\n', "text", "one usable row"),
    ],
)
def test_data_that_cannot_be_used_is_refused_with_what_was_seen(
    name: str, text: str, data_format: str, said: str, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    config = DataConfig.model_validate({"train": str(tmp_path / name), "format": data_format})
    with pytest.raises(DataError, match=said):
        data.prepare(config, tiny_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["no/such/file.jsonl", "./nowhere", "~/nowhere/at/all", "builtin:python-doc"])
def test_a_source_that_does_not_exist_is_refused(source: str, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file or folder|did you mean builtin:python-docs"):
        data.prepare(DataConfig(train=source), tiny_model, tmp_path / "out")


def test_a_name_beside_which_there_is_a_folder_here_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        check(DataConfig(train="data/rows"))
    check(DataConfig(train="somebody/rows"))


def test_prepared_data_is_found_again_and_made_anew_when_its_source_changes(tiny_model: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    _write_jsonl(file, ROWS)
    first = data.prepare(DataConfig(train=str(file)), tiny_model, out)
    written = (out / "summary.json").stat().st_mtime_ns
    assert data.prepare(DataConfig(train=str(file)), tiny_model, out) == first
    assert (out / "summary.json").stat().st_mtime_ns == written
    _write_jsonl(file, [*ROWS, {"text": "one more"}])
    assert data.prepare(DataConfig(train=str(file)), tiny_model, out).hash != first.hash


def _other_tokens(file: Path) -> None:
    np.save(file, np.load(file)[::-1].copy())


def _another_type_of_the_same_bytes(file: Path) -> None:
    np.save(file, np.load(file).view(np.uint8))


@pytest.mark.parametrize("name", ["train.tokens", "train.labels", "train.offsets", "eval.tokens"])
@pytest.mark.parametrize(
    "damage",
    [
        _other_tokens,
        _another_type_of_the_same_bytes,
        Path.unlink,
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"PK\x03\x04"),
        lambda file: file.write_bytes(file.read_bytes()[:40]),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(file.read_bytes().replace(b"'descr'", b"'d[[cr'")),
    ],
)
def test_prepared_data_that_was_damaged_since_is_made_anew(
    damage: Callable[[Path], Any], name: str, tiny_model: Path, tmp_path: Path
) -> None:
    file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    _write_jsonl(file, ROWS)
    first = data.prepare(DataConfig(train=str(file)), tiny_model, out)
    array = out / f"{name}.npy"
    written = array.read_bytes()
    damage(array)
    assert not array.exists() or array.read_bytes() != written
    assert data.prepare(DataConfig(train=str(file)), tiny_model, out) == first
    assert array.read_bytes() == written


@pytest.mark.parametrize(
    "changed",
    [{"least_tokens": None}, {"least_tokens": []}, {"least_tokens": {"foo": 9999}}, {"hash": 5}, {"skipped": 3}, None],
)
def test_a_damaged_summary_is_none_and_its_data_is_made_anew(
    changed: dict[str, Any] | None, tiny_model: Path, tmp_path: Path
) -> None:
    file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    _write_jsonl(file, ROWS)
    first = data.prepare(DataConfig(train=str(file)), tiny_model, out)
    summary = out / "summary.json"
    summary.write_text("[" * 100_000 if changed is None else json.dumps(json.loads(summary.read_text()) | changed))
    assert data.read_summary(out) is None
    assert data.prepare(DataConfig(train=str(file)), tiny_model, out) == first
    assert data.read_summary(out) == first


def test_evaluation_rows_that_are_trained_on_are_told(tmp_path: Path) -> None:
    _write_jsonl(tmp_path / "a.jsonl", ROWS)
    _write_jsonl(tmp_path / "b.jsonl", ROWS)
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    a, b, link, both = (str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "link.jsonl", "."))
    docs, docstrings = "builtin:python-docs", "builtin:python-docstrings"
    for train, held_out in ((a, a), (a, link), (both, b), (b, both), (docs, docs)):
        told = rows_in_both(DataConfig(train=train, eval=held_out))
        assert told is not None
        assert (b if both in (train, held_out) else train) in told
    hub = "owner/rows"
    for train, other in ((a, b), (a, 0.1), (docs, docstrings), (docs, a), (hub, hub)):
        assert rows_in_both(DataConfig(train=train, eval=other)) is None


def test_an_evaluation_source_of_its_own_is_used_whole(tiny_model: Path, tmp_path: Path) -> None:
    _write_jsonl(tmp_path / "train.jsonl", ROWS)
    _write_jsonl(tmp_path / "eval.jsonl", ROWS[:7])
    config = DataConfig(train=str(tmp_path / "train.jsonl"), eval=str(tmp_path / "eval.jsonl"))
    summary = data.prepare(config, tiny_model, tmp_path / "out")
    assert (summary.train_rows, summary.eval_rows) == (20, 7)


def _tokenized(row: dict[str, Any], data_format: Any, tokenizer: Any) -> tuple[str, str]:
    """The whole text and the part of it that is learned."""
    outcome = next(iter(tokenize([Row("here", row)], data_format, tokenizer)))
    assert not isinstance(outcome, Row), outcome.why
    _, tokens, mask = outcome
    return tokenizer.decode(tokens), tokenizer.decode(tokens[mask])


def test_a_prompt_is_read_and_not_learned(tokenizer: Any) -> None:
    whole, learned = _tokenized({"prompt": "two plus two: ", "completion": "four"}, "prompt_completion", tokenizer)
    assert whole == "two plus two: four<|end|>"
    assert learned == "four<|end|>"


def test_text_is_learned_but_for_its_first_token_which_nothing_predicts(tokenizer: Any) -> None:
    whole, learned = _tokenized({"text": "a b"}, "text", tokenizer)
    assert whole == "a b<|end|>"
    assert learned == " b<|end|>"


CONVERSATION = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Me."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
    ]
}


def test_only_the_assistants_turns_are_learned(tokenizer: Any) -> None:
    whole, learned = _tokenized(CONVERSATION, "messages", tokenizer)
    assert whole.startswith("<|system|>\nBe brief.<|end|>\n<|user|>\nWho?<|end|>\n<|assistant|>\nMe.<|end|>")
    assert learned == "Me.<|end|>So.<|end|>"


def test_a_chat_template_without_generation_marks_gives_the_same_turns(tokenizer: Any, tiny_model: Path) -> None:
    plain = AutoTokenizer.from_pretrained(tiny_model)
    plain.chat_template = plain.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert _tokenized(CONVERSATION, "messages", plain) == _tokenized(CONVERSATION, "messages", tokenizer)


@pytest.mark.parametrize(
    "messages", ["hello", [], [{"role": "user", "content": "alone"}], [{"role": "assistant"}], [3], None]
)
def test_a_conversation_without_an_answer_is_no_usable_row(messages: Any, tokenizer: Any) -> None:
    outcome = next(iter(tokenize([Row("here", {"messages": messages})], "messages", tokenizer)))
    assert isinstance(outcome, Row)
    assert outcome.why


def test_a_model_without_a_chat_template_cannot_read_messages(tiny_model: Path) -> None:
    plain = AutoTokenizer.from_pretrained(tiny_model)
    plain.chat_template = None
    with pytest.raises(DataError, match="prompt_completion"):
        next(iter(tokenize([Row("here", CONVERSATION)], "messages", plain)))


def test_the_batches_of_a_step_are_the_same_however_they_are_cut(tiny_data: Path) -> None:
    dataset = data.load(tiny_data, "train", 32, packing=False)
    whole = data.global_batch(dataset, 3, 8, seed=5)
    cut = [part for rank in range(2) for part in data.worker_slice(whole, rank, 2, 2)]
    assert [len(part) for part in cut] == [2, 2, 2, 2]
    assert np.concatenate(cut).tolist() == whole.tolist()


def test_an_epoch_shows_every_row_once_and_seeds_change_the_order(tiny_data: Path) -> None:
    dataset = data.load(tiny_data, "train", 32, packing=False)
    size = len(dataset) // 3
    epoch = np.concatenate([data.global_batch(dataset, step, size, seed=0) for step in range(3)])
    assert len(set(epoch.tolist())) == 3 * size
    assert data.global_batch(dataset, 0, size, seed=0).tolist() != data.global_batch(dataset, 0, size, seed=1).tolist()


def test_a_batch_larger_than_the_data_goes_on_in_the_next_epoch(tiny_data: Path) -> None:
    dataset = data.load(tiny_data, "train", 32, packing=False)
    count = len(dataset)
    assert sorted(data.global_batch(dataset, 0, 2 * count, seed=0).tolist()) == sorted([*range(count)] * 2)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_worker_makes_as_many_evaluation_passes_and_every_row_counts_once(workers: int, tiny_data: Path) -> None:
    dataset = data.load(tiny_data, "eval", 32, packing=False)
    batches = [list(data.evaluation_batches(dataset, rank, workers, 4)) for rank in range(workers)]
    assert len({len(own) for own in batches}) == 1
    counted = [row for own in batches for sequences, counts in own if counts for row in sequences.tolist()]
    assert sorted(counted) == list(range(len(dataset)))


def test_rows_are_cut_to_the_sequence_length_and_packing_fills_it(tiny_data: Path) -> None:
    assert data.load(tiny_data, "train", 32, packing=False).lengths.max() == 32
    plain = data.load(tiny_data, "train", 64, packing=False)
    packed = data.load(tiny_data, "train", 64, packing=True)
    assert packed.sequence_tokens.max() <= 64
    assert len(packed) < len(plain)
    assert packed.sequence_tokens.sum() == plain.sequence_tokens.sum()
    assert packed.sequence_labels.sum() == plain.sequence_labels.sum()


def test_a_sequence_length_that_leaves_nothing_to_learn_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    _write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "long " * 50, "completion": "x"}] * 4)
    config = DataConfig(train=str(tmp_path / "rows.jsonl"), format="prompt_completion", eval=0.5)
    data.prepare(config, tiny_model, tmp_path / "out")
    with pytest.raises(DataError, match="raise sequence_length"):
        data.load(tmp_path / "out", "train", 8, packing=False)


def test_the_builtin_instructions_are_signatures_and_their_docstrings() -> None:
    rows = (row for row in read_rows("builtin:python-docstrings", "train") if row.columns)
    first = next(row.columns for row in rows if row.where.startswith("textwrap.py") and row.columns)
    assert first["prompt"].startswith("# textwrap\ndef ")
    assert first["messages"][1]["content"] == first["completion"]


@pytest.mark.parametrize("data_format", ["text", "prompt_completion", "messages"])
def test_a_row_with_half_of_a_surrogate_pair_is_left_out_and_named(
    data_format: Any, tiny_model: Path, tmp_path: Path
) -> None:
    cut = "cut within \ud83d"
    rows = [
        {"text": text, "prompt": "a", "completion": text, "messages": [{"role": "user", "content": text}]}
        for text in ("whole", cut, "whole too")
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=str(file), eval=0.5, format=data_format)
    if data_format == "messages":
        with pytest.raises(DataError):
            data.prepare(config, tiny_model, tmp_path / "out")
        return
    summary = data.prepare(config, tiny_model, tmp_path / "out")
    assert (summary.train_rows, summary.eval_rows, summary.skipped_count) == (1, 1, 1)
    ((where, why),) = summary.skipped
    assert where.endswith("rows.jsonl:2")
    assert "surrogate" in why


def test_of_a_parquet_file_only_the_columns_that_may_be_asked_for_are_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    far = pa.array([10**18, 10**18], pa.int64()).cast(pa.timestamp("ms"))
    bad = pa.Array.from_buffers(pa.string(), 2, pa.array([b"good", b"\xff\xfe"]).buffers())
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pa.table({"text": bad, "when": far}), file)
    good, broken = read_rows(str(file), "train")
    assert good.columns == {"text": "good", "when": None}
    assert broken.columns is None
    assert "decode" in broken.why


def test_rows_of_which_nothing_counts_within_a_trials_length_are_told_for_each_length(
    tiny_model: Path, tmp_path: Path
) -> None:
    prompts = ["short"] * 2 + ["a prompt that is far longer than all the others " * 4] * 3
    rows = [json.dumps({"prompt": prompt, "completion": "answer"}) for prompt in prompts]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "one.jsonl").write_text(rows[0])
    files = {"train": str(tmp_path / "rows.jsonl"), "eval": str(tmp_path / "one.jsonl")}
    out = tmp_path / "out"
    data.prepare(DataConfig(**files, format="prompt_completion"), tiny_model, out)
    told = list(data.left_out_within(out, [1024, 32]))
    assert len(data.load(out, "train", 32, packing=False)) == 2
    assert told == [
        "at sequence_length 32 3 of 5 rows to train on cannot be used, since what is to be learned lies beyond it: "
        "raise it"
    ]


def test_a_sequence_length_within_which_there_is_nothing_to_learn_is_refused_with_the_one_that_it_takes(
    tiny_model: Path, tmp_path: Path
) -> None:
    rows = {"train": ("short", "answer"), "eval": ("a prompt that is far longer than all the others " * 4, "answer")}
    for split, (prompt, completion) in rows.items():
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    files = {split: str(tmp_path / f"{split}.jsonl") for split in rows}
    out = tmp_path / "out"
    summary = data.prepare(DataConfig(**files, format="prompt_completion"), tiny_model, out)
    least = summary.least_tokens["eval"]
    assert summary.least_tokens["train"] < least
    data.require_something_to_learn(summary, least)
    assert len(data.load(out, "eval", least, packing=False)) == 1
    with pytest.raises(DataError, match=f"no row to evaluate on .* raise sequence_length to {least} at least"):
        data.require_something_to_learn(summary, least - 1)
    with pytest.raises(DataError, match="no row to evaluate on"):
        data.load(out, "eval", least - 1, packing=False)
    assert data.read_summary(out) == summary
