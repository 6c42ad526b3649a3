from __future__ import annotations

import json
from typing import Any

import pytest

from orchestrator.errors import ModelError
from orchestrator.planning.estimate import estimate_lines
from tests.fast.cases import LLAMA_2_7B

PARTS = {"weights", "adapter", "gradients", "optimizer", "activations", "logits", "communication", "framework"}


def unknown(model: str) -> dict[str, Any]:
    raise ModelError(f"no model {model}: name another")


def answer(*lines: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in estimate_lines(lines, unknown)]


def line(**keys: Any) -> str:
    return json.dumps({"id": 1, "model": LLAMA_2_7B, "trial": {"micro_batch_size": 1}, **keys})


def test_an_estimate_has_all_that_the_contract_names() -> None:
    (got,) = answer(line(gpu_memory_bytes=2**36))
    figures = {"allocated_bytes", "reserved_bytes", "device_bytes", "needed_bytes", "low_bytes", "high_bytes"}
    assert set(got) == {"id", "parts", "micro_batch_size", "feasible", "reasons"} | figures
    assert set(got["parts"]) == PARTS
    assert got["low_bytes"] < got["allocated_bytes"] < got["high_bytes"]
    assert got["feasible"] is True


QLORA = {"precision": "nf4", "engine": "ddp", "gradient_checkpointing": True, "sequence_length": 2048}


def test_a_loop_that_is_not_told_counts_as_the_one_that_allocates_more() -> None:
    trial = QLORA | {"micro_batch_size": 4, "global_batch_size": 4}
    untold, trainer, bare, either = answer(
        line(trial=trial), *(line(trial=trial, loop=loop) for loop in ("trainer", "bare", "any"))
    )
    assert trainer["allocated_bytes"] < bare["allocated_bytes"] == untold["allocated_bytes"]
    assert trainer["low_bytes"] == untold["low_bytes"]
    assert bare["high_bytes"] == untold["high_bytes"]
    assert either == untold


def test_without_a_loop_what_would_fit_fits_whatever_trains() -> None:
    trial = QLORA | {"micro_batch_size": 8, "global_batch_size": 8}
    (refused,) = answer(line(trial=trial, gpu_memory_bytes=16 * 2**30))
    assert "fits with micro_batch_size 4" in refused["reasons"][0]
    for loop in ("trainer", "bare", "any"):
        (mended,) = answer(line(trial=trial | {"micro_batch_size": 4}, gpu_memory_bytes=16 * 2**30, loop=loop))
        assert mended["feasible"]


def test_a_family_that_is_not_known_is_noted() -> None:
    (known,) = answer(line())
    assert "notes" not in known
    (got,) = answer(line(model=LLAMA_2_7B | {"model_type": "helium"}))
    assert got["feasible"]
    assert "family, helium, is not known here and counted as a Llama" in got["notes"][0]


@pytest.mark.parametrize("encoder", ["deberta-v2", "mpnet", "nonsense"])
def test_a_model_without_a_causal_head_is_refused_as_plan_does_it(encoder: str) -> None:
    (got, goes_on) = answer(line(model=LLAMA_2_7B | {"model_type": encoder}), line())
    assert got["error"] == (
        f"line 1: model: transformers knows no causal language model of type {encoder}: take another model"
    )
    assert goes_on["feasible"]
    headed = LLAMA_2_7B | {"model_type": encoder, "architectures": ["NewForCausalLM"]}
    assert answer(line(model=headed))[0]["feasible"]


def test_a_config_that_does_not_say_what_it_is_counts_as_a_llama() -> None:
    (got,) = answer(line(model={name: value for name, value in LLAMA_2_7B.items() if name != "model_type"}))
    assert got["feasible"]


def test_an_automatic_micro_batch_is_told_as_the_size_that_it_became() -> None:
    auto = {"micro_batch_size": "auto", "global_batch_size": 16}
    large, small = answer(*(line(trial=auto, gpu_memory_bytes=size * 2**30) for size in (80, 24)))
    assert 16 >= large["micro_batch_size"] > small["micro_batch_size"]
    (named,) = answer(line(trial=auto | {"micro_batch_size": small["micro_batch_size"]}))
    assert named["allocated_bytes"] == small["allocated_bytes"]


def test_what_does_not_fit_says_so_and_still_has_its_figures() -> None:
    (got,) = answer(line(gpu_memory_bytes=2**30))
    assert got["feasible"] is False
    assert got["reasons"]
    assert got["allocated_bytes"] > 2**33
    assert f"needs {got['needed_bytes']:,} bytes of {2**30:,}" in got["reasons"][0]


def test_a_gpu_that_is_nearly_full_holds_what_is_needed_and_the_allocator_keeps_no_more_than_there_is() -> None:
    (free,) = answer(line())
    tight_bytes = free["device_bytes"] - 2**26
    tight, small = answer(line(gpu_memory_bytes=tight_bytes), line(gpu_memory_bytes=free["allocated_bytes"]))
    assert tight["feasible"]
    assert free["allocated_bytes"] < tight["reserved_bytes"] < tight["device_bytes"] == tight_bytes
    assert not small["feasible"]
    assert free["allocated_bytes"] < small["reserved_bytes"] < tight["reserved_bytes"]
    assert small["device_bytes"] > free["allocated_bytes"]


def test_what_does_not_fit_is_told_what_would_help() -> None:
    logits = {"micro_batch_size": 8, "sequence_length": 4096, "gradient_checkpointing": True, "precision": "nf4"}
    (got,) = answer(line(trial=logits, gpu_memory_bytes=12 * 2**30))
    assert got["reasons"][0].endswith(" bytes of 12,884,901,888; fits with micro_batch_size 2")
    (got,) = answer(line(trial={"precision": "fp32", "micro_batch_size": 1}, gpu_memory_bytes=12 * 2**30))
    assert got["reasons"][0].endswith("; fits with precision nf4")
    (got,) = answer(line(gpu_memory_bytes=2**30))
    assert got["reasons"][0].endswith("; use a smaller model")


def test_quantised_weights_under_zero_3_need_room_for_the_whole_model_as_it_loads() -> None:
    trial = {"precision": "nf4", "zero_stage": 3, "gradient_checkpointing": True, "micro_batch_size": 1}
    sharded = {"trial": {**trial, "sequence_length": 64, "global_batch_size": 8}, "workers": 8}
    (free,) = answer(line(**sharded))
    assert free["needed_bytes"] > 1.5 * free["allocated_bytes"]
    enough, less = answer(*(line(**sharded, gpu_memory_bytes=free["needed_bytes"] - short) for short in (0, 1)))
    assert enough["feasible"]
    assert "while it loads" in less["reasons"][0]


def test_the_line_that_an_error_names_is_that_of_the_input_with_its_empty_ones() -> None:
    told = answer("", line(), " ", "no")
    assert told[1]["error"].startswith("line 4: no JSON")


def test_a_byte_order_mark_before_a_line_is_passed_over() -> None:
    marked, plain = estimate_lines([b"\xef\xbb\xbf" + line().encode(), line()], unknown)
    assert marked == plain


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ("{", "no JSON: Expecting property name enclosed in double quotes at column 2"),
        ("rank 8", "no JSON: Expecting value at column 1"),
        ("[]", "object"),
        ('{"id": 7}', "model is missing"),
        (line(id=7, model="no/model"), "no model"),
        (line(id=7, trial={"rnk": 8}), "trial.rnk is no key here; did you mean rank?"),
        (line(id=7, trial={"lora_alpha": 8}), "did you mean alpha?"),
        (line(id=7, trial={"precision": "qlora"}), "did you mean nf4?"),
        (line(id=7, trial=[8]), "trial"),
        (line(id=7, trial=[]), "trial"),
        (line(id=7, trial=False), "trial"),
        (line(id=7, trial=0), "trial"),
        (line(id=7, trial=""), "trial"),
        (line(id=7, trial={"rank": -8}), "greater"),
        (line(id=7, trial={"sequence_length": 10**30}), "less"),
        (line(id=7, workers=0), "workers"),
        (line(id=7, workers=10**40), "workers"),
        (line(id=7, gpu_memory_bytes="24GiB"), "gpu_memory_bytes"),
        (line(id=7, gpu_memory_bytes=24), "from 1,048,576"),
        (line(id=7, model={**LLAMA_2_7B, "hidden_size": None}), "hidden_size"),
        ('{"id": 7, "model": "no/model", "id": 8}', "id is given twice"),
        ('{"id": 7, "model": "no/model", "trial": {"rank": 8, "rank": 16}}', "rank is given twice"),
        (line(id=7, wrkers=2), "did you mean workers?"),
        (line(id=7, loop="mine"), "loop is 'mine': give trainer, bare or any"),
        (line(id=7, loop=["bare"]), "give trainer, bare or any"),
    ],
)
def test_a_bad_line_answers_for_itself_and_the_rest_go_on(bad: str, told: str) -> None:
    good, wrong, after = answer(line(), bad, line(id=2))
    assert told in wrong["error"]
    assert wrong["error"].startswith("line 2: ")
    assert wrong["id"] in (7, None)
    assert "error" not in good
    assert after["id"] == 2
    assert after["allocated_bytes"] == good["allocated_bytes"]


@pytest.mark.parametrize(
    "bad", ['{"id": NaN}', '{"id": 1e999}', '{"id": -Infinity}', b'{"id": "\xff"}', '{"id": 1' + "0" * 5000]
)
def test_an_answer_is_json_whatever_the_line_was(bad: str | bytes) -> None:
    told, after = estimate_lines([bad, line(id=2)], unknown)
    got = json.loads(told, parse_constant=pytest.fail)
    assert got["id"] is None
    assert len(got["error"]) < 200
    assert json.loads(after)["id"] == 2


@pytest.mark.parametrize("heads", [0, 3, 64])
def test_key_value_heads_that_no_model_has_are_refused(heads: int) -> None:
    (got,) = answer(line(model={**LLAMA_2_7B, "num_key_value_heads": heads}))
    assert "key" in got["error"]


def test_a_mixture_all_of_whose_layers_are_dense_is_estimated_quantised() -> None:
    mixture = LLAMA_2_7B | {"model_type": "qwen2_moe", "num_experts": 4, "decoder_sparse_step": 64}
    (got,) = answer(line(model=mixture, trial={"precision": "nf4", "micro_batch_size": 1}))
    assert got["allocated_bytes"] > 2**31


def test_a_model_that_cannot_be_had_is_asked_for_once() -> None:
    asked: list[str] = []

    def none(model: str) -> dict[str, Any]:
        asked.append(model)
        return unknown(model)

    told = [json.loads(one) for one in estimate_lines([line(model="no/model")] * 3, none)]
    assert [one["error"] for one in told] == [f"line {number}: no model no/model: name another" for number in (1, 2, 3)]
    assert asked == ["no/model"]
