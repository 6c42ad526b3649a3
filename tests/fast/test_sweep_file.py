from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from orchestrator.config.sweep_config import SweepConfig
from orchestrator.config.sweep_file import load, to_yaml
from orchestrator.errors import InputError, SweepFileError

SMALL = {"name": "small", "model": "builtin:tiny-llama", "data": {"train": "builtin:python-docs"}}


def write(folder: Path, text: str) -> Path:
    file = folder / "sweep.yaml"
    file.write_text(text)
    return file


def problems(folder: Path, text: str) -> dict[str, str]:
    with pytest.raises(SweepFileError) as caught:
        load(write(folder, text))
    return {f"{p.line}: {p.path}": p.message for p in caught.value.problems}


def test_all_problems_are_told_at_once_with_line_path_and_nearest_name(tmp_path: Path) -> None:
    told = problems(
        tmp_path,
        "name: x\n"
        "modle: builtin:tiny-llama\n"
        "model: builtin:tiny-llama\n"
        "rank: 8\n"
        "data: {train: builtin:python-docs, evl: 0.1}\n"
        "trial:\n"
        "  precision: bf17\n"
        "  zero_stage: 7\n"
        "space:\n"
        "  rank: [8, x]\n"
        "scheduler: {asha: {grace_step: 4}}\n",
    )
    assert "did you mean model?" in told["2: modle"]
    assert "under `trial:` or `space:`" in told["4: rank"]
    assert "did you mean eval?" in told["5: data.evl"]
    assert "did you mean bf16?" in told["7: trial.precision"]
    assert "not 7" in told["8: trial.zero_stage"]
    assert "not 'x'" in told["10: space.rank[1]"]
    assert "did you mean grace_steps?" in told["11: scheduler.asha.grace_step"]


def test_a_setting_that_is_shared_and_searched_is_refused(tmp_path: Path) -> None:
    text = yaml.safe_dump(SMALL | {"trial": {"rank": 4}, "space": {"rank": [8]}})
    assert "not both" in " ".join(problems(tmp_path, text).values())


def test_a_precision_that_follows_the_hardware_cannot_be_excluded_by_name(tmp_path: Path) -> None:
    text = SMALL | {"space": {"rank": [4, 8]}, "exclude": [{"precision": "bf16"}]}
    assert "follows the hardware" in " ".join(problems(tmp_path, yaml.safe_dump(text)).values())
    load(write(tmp_path, yaml.safe_dump(text | {"trial": {"precision": "fp32"}})))


@pytest.mark.parametrize("space", [{}, None, {"rank": []}])
def test_an_empty_space_is_refused(tmp_path: Path, space: object) -> None:
    told = problems(tmp_path, yaml.safe_dump(SMALL | {"space": space}))
    assert any("is empty" in message for message in told.values())


def test_an_exclusion_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    text = yaml.safe_dump(SMALL | {"space": {"rank": [8]}, "exclude": [{"rank": 8}]})
    assert "leaves no configuration" in " ".join(problems(tmp_path, text).values())


def test_a_condition_that_can_never_hold_is_refused(tmp_path: Path) -> None:
    space = {"dora": {"choice": [True], "when": {"zero_stage": [9], "precison": "nf4"}}}
    told = " ".join(problems(tmp_path, yaml.safe_dump(SMALL | {"space": space})).values())
    assert "can never hold" in told
    assert "did you mean precision?" in told


def test_a_grid_cannot_walk_a_range_but_random_search_can(tmp_path: Path) -> None:
    sweep = SMALL | {"space": {"learning_rate": {"log_uniform": [1e-5, 1e-3]}}}
    assert "random" in " ".join(problems(tmp_path, yaml.safe_dump(sweep)).values())
    loaded = load(write(tmp_path, yaml.safe_dump(sweep | {"search": {"algorithm": "random"}, "budget": {"trials": 5}})))
    rates = [trial.config.learning_rate for trial in loaded.trials()]
    assert len(rates) == 5
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- a\n", "holds no keys"),
        ("b: 1\na: [", ":2 is not YAML: while parsing"),
        ("", "holds no keys"),
        ("a: &x [*x]\n", "nested deeper"),
    ],
)
def test_a_file_that_is_no_mapping_says_so(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        load(write(tmp_path, text))


def test_aliases_that_stand_for_billions_of_values_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 12)]
    with pytest.raises(InputError, match="without aliases"):
        load(write(tmp_path, "\n".join(lines)))


@pytest.mark.parametrize("number", ["1" + ":59" * 250_000, "1" + ":59" * 300 + ".5", "0x" + "f" * 900_000])
def test_a_number_that_would_take_minutes_to_read_or_cannot_be_is_refused(tmp_path: Path, number: str) -> None:
    text = yaml.safe_dump(SMALL) + f"trial: {{max_steps: {number}}}\n"
    assert list(problems(tmp_path, text).values()) == ["cannot be read (more than 400 characters, and no text)"]


def test_thousands_of_problems_are_told_as_a_hundred_and_that_there_are_more(tmp_path: Path) -> None:
    unknown = "".join(f"k{n}: 1\n" for n in range(3000))
    told = problems(tmp_path, yaml.safe_dump(SMALL) + unknown)
    assert len(told) == 101
    assert list(told.items())[-1] == ("None: the rest of the file", "has more problems: mend these first")
    twice = problems(tmp_path, yaml.safe_dump(SMALL) + "rank: 1\n" * 3000)
    assert len(twice) == 101


def test_more_exclusions_than_can_be_compared_in_time_are_refused(tmp_path: Path) -> None:
    exclude = [{"rank": 1 + n % 300, "seed": n} for n in range(500)]
    raw = SMALL | {"space": {"rank": list(range(1, 301)), "seed": list(range(300))}, "exclude": exclude}
    with pytest.raises(SweepFileError, match="500 entries, too many for 90,000 trials"):
        load(write(tmp_path, yaml.safe_dump(raw)))
    with pytest.raises(SweepFileError, match="1,001 entries, of which 1,000 at most are taken"):
        load(write(tmp_path, yaml.safe_dump(SMALL | {"exclude": [{"rank": 1}] * 1001})))


@pytest.mark.parametrize("value", ["!!bool maybe", "!!int ''", "!!float ''", "!!timestamp soon"])
def test_a_tag_that_the_value_does_not_keep_to_is_a_problem_of_its_line(tmp_path: Path, value: str) -> None:
    told = problems(tmp_path, f"{yaml.safe_dump(SMALL)}trial:\n  rank: {value}\n")
    assert "leave the tag out" in told["6: trial.rank"]


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    assert problems(tmp_path, "name: a\nname: b\n") == {"2: name": "stands twice: keep one"}


def test_a_missing_file_names_its_nearest_neighbour(tmp_path: Path) -> None:
    write(tmp_path, "name: a\n")
    with pytest.raises(InputError, match=r"did you mean sweep\.yaml"):
        load(tmp_path / "swep.yaml")


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("trial.rank=true", "valid integer"),
        ("trial=5", "takes keys with values"),
        ("name=../x", "takes letters"),
        ("name=<script>", "takes letters"),
        ("trial.learning_rate=.nan", "finite"),
        ("storage=s3://key:secret@bucket/x", "come from the environment"),
        ("storage=s3://bucket/../x", "takes a folder"),
        ("storage=ftp://host/x", "takes a folder"),
        ("resources.scale_up_minutes=5", "needs gpus_per_worker"),
        ("resources.accelerator=../x", "takes letters"),
        ("budget.price_per_gpu_hour=1e308", "less than or equal to 1000000000"),
        ("search.repeats=0", "greater than or equal to 1"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(tmp_path: Path, key: str, told: str) -> None:
    with pytest.raises(SweepFileError, match=told):
        load(write(tmp_path, yaml.safe_dump(SMALL)), [key])


@pytest.mark.parametrize(
    ("setting", "domain"),
    [
        ("rank", {"int": [4, 1]}),
        ("rank", {"int": [0, 4]}),
        ("rank", {"uniform": [1, 4]}),
        ("precision", {"int": [1, 4]}),
        ("learning_rate", {"uniform": [float("nan"), 1]}),
        ("rank", {"log_int": [1, 10**22]}),
        ("max_grad_norm", {"uniform": [0.5, float("inf")]}),
        ("max_grad_norm", {"choice": [1.0, float("inf")]}),
        ("max_grad_norm", [1.0, float("inf")]),
        ("alpha", [8, float("inf")]),
    ],
)
def test_a_domain_that_cannot_be_drawn_from_is_refused(tmp_path: Path, setting: str, domain: Any) -> None:
    raw = SMALL | {"space": {setting: domain}, "search": {"algorithm": "random"}}
    with pytest.raises(SweepFileError, match=f"space.{setting}"):
        load(write(tmp_path, yaml.safe_dump(raw)))


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "[1e-4, 5]"])
def test_an_exclusion_means_the_value_however_yaml_reads_it(tmp_path: Path, text: str) -> None:
    space = "space: {learning_rate: [1e-4, 1e-3]}\nexclude: [{learning_rate: " + text + "}]\n"
    sweep = load(write(tmp_path, yaml.safe_dump(SMALL) + space))
    assert [trial.config.learning_rate for trial in sweep.trials()] == [1e-3]


def test_a_list_of_modules_in_an_exclusion_is_one_value(tmp_path: Path) -> None:
    modules = [["q_proj"], ["q_proj", "v_proj"]]
    raw = SMALL | {"space": {"target_modules": modules}, "exclude": [{"target_modules": ["q_proj"]}]}
    (trial,) = load(write(tmp_path, yaml.safe_dump(raw))).trials()
    assert trial.config.target_modules == ("q_proj", "v_proj")


def test_a_text_that_no_file_can_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SweepFileError, match="no file can hold"):
        load(write(tmp_path, yaml.safe_dump(SMALL) + 'question: "\\ud800"\n'))


def test_a_device_is_no_sweep_file() -> None:
    with pytest.raises(InputError, match="no sweep file"):
        load(Path("/dev/zero"))


def test_an_override_wins_and_moves_a_setting_from_space_to_trial(tmp_path: Path) -> None:
    file = write(tmp_path, yaml.safe_dump(SMALL | {"space": {"rank": [8, 16], "dora": [True, False]}}))
    sweep = load(file, ["trial.rank=4", "trial.max_steps=20"])
    assert sweep.trial.rank == 4
    assert sweep.trial.max_steps == 20
    assert list(sweep.domains) == ["dora"]


def test_an_override_that_empties_the_space_leaves_it_out(tmp_path: Path) -> None:
    sweep = load(write(tmp_path, yaml.safe_dump(SMALL | {"space": {"rank": [8, 16]}})), ["trial.rank=4"])
    assert len(sweep.trials()) == 1


@pytest.mark.parametrize("override", ["max_steps", "trial.max_steps=2024-13-45", "trial.rank=[", "=3", "a..b=1"])
def test_a_bad_override_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(InputError, match="--set"):
        load(write(tmp_path, yaml.safe_dump(SMALL)), [override])


def test_a_problem_of_an_override_names_it_and_no_line_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(SweepFileError) as caught:
        load(write(tmp_path, yaml.safe_dump(SMALL)), ["trial.max_steps=-3"])
    (problem,) = caught.value.problems
    assert problem.line is None
    assert problem.message.endswith("(from --set trial.max_steps=-3)")


def test_a_saved_sweep_reads_back_as_the_same_trials(tmp_path: Path) -> None:
    space = {
        "engine": ["ddp", "deepspeed"],
        "zero_stage": {"choice": [1, 2], "when": {"engine": "deepspeed"}},
        "target_modules": [["q_proj"], "all-linear"],
    }
    sweep = load(write(tmp_path, yaml.safe_dump(SMALL | {"space": space, "scheduler": {"asha": {"grace_steps": 4}}})))
    again = load(write(tmp_path, to_yaml(sweep)))
    assert again.trials() == sweep.trials()
    assert again.model_copy(update={"trial": sweep.trial}) == sweep


def test_defaults_follow_the_hardware() -> None:
    sweep = SweepConfig.model_validate(SMALL)
    on_cpu, on_gpu = sweep.on_hardware(has_gpus=False), sweep.on_hardware(has_gpus=True)
    assert (on_cpu.trial.precision, on_cpu.resources.gpus_per_worker) == ("fp32", 0)
    assert (on_gpu.trial.precision, on_gpu.resources.gpus_per_worker) == ("bf16", 1)


@pytest.mark.parametrize("file", sorted(Path("search_spaces").rglob("*.yaml")), ids=str)
def test_every_search_space_loads_fits_the_schema_and_says_what_it_is(file: Path) -> None:
    lines = file.read_text().splitlines()
    sweep = load(file)
    assert lines[0] == f"# Question: {sweep.question}"
    assert lines[1].split() == ["#", "Run:", "orchestrator", "run", str(file)]
    assert lines[2].startswith("# Hardware: ")
    assert lines[3].startswith("# yaml-language-server: $schema=")
    assert (file.parent / lines[3].partition("$schema=")[2]).exists()
    jsonschema.validate(yaml.safe_load(file.read_text()), SweepConfig.model_json_schema())


@pytest.mark.parametrize(
    ("other", "ours"),
    [("epochs: 3", "max_steps"), ("lr: 0.1", "learning_rate"), ("lora_alpha: 16", "alpha"), ("precision: int4", "nf4")],
)
def test_what_other_tools_call_a_setting_is_understood(tmp_path: Path, other: str, ours: str) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(f"name: n\nmodel: m\ndata: {{train: d}}\ntrial: {{{other}}}\nspace: {{rank: [1]}}\n")
    with pytest.raises(SweepFileError, match=rf"did you mean {ours}\?"):
        load(file)


@pytest.mark.parametrize("name", ["grace", "grace_period"])
def test_a_grace_without_its_unit_is_taken_for_one_in_steps(tmp_path: Path, name: str) -> None:
    told = problems(tmp_path, yaml.safe_dump(SMALL | {"scheduler": {"asha": {name: 20}}}))
    assert any("did you mean grace_steps?" in message for message in told.values())


@pytest.mark.parametrize("beside", ["choice: [1.0e-4]", "int: [1, 2]", "log_uniform: [1.0e-5, 1.0e-3]"])
def test_two_kinds_of_values_of_one_setting_are_told_apart_from_an_unknown_key(tmp_path: Path, beside: str) -> None:
    text = yaml.safe_dump(SMALL) + f"space:\n  learning_rate:\n    uniform: [1.0e-5, 1.0e-3]\n    {beside}\n"
    (told,) = problems(tmp_path, text).values()
    assert told == "stands beside another kind of values: keep one of them"


def test_a_scheduler_named_without_its_keys_is_shown_how_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("name: n\nmodel: m\ndata: {train: d}\nspace: {rank: [1]}\nscheduler: asha\n")
    with pytest.raises(SweepFileError, match=r"\{asha: \{grace_steps: 40\}\}"):
        load(file)


@pytest.mark.parametrize(
    ("objective", "tasks", "told"),
    [
        ("{metric: hellaswag/acc, mode: max}", "[]", r":5: objective\.metric: .*evaluate\.tasks"),
        ("{metric: helaswag/acc, mode: max}", "[hellaswag]", r"did you mean hellaswag\?"),
        ("[{metric: loss}, {metric: arc/acc, mode: max}]", "[hellaswag]", r"objective\[1\]\.metric: .*arc"),
        ("{metric: hellaswag/acc}", "[hellaswag]", r":5: objective\.mode: .*max or min"),
        ("{metric: evalloss}", "[hellaswag]", r"did you mean eval_loss\?"),
        ("{metric: accuracy}", "[hellaswag]", r"hellaswag/acc_norm"),
    ],
)
def test_a_score_that_nothing_would_measure_is_refused(tmp_path: Path, objective: str, tasks: str, told: str) -> None:
    file = tmp_path / "sweep.yaml"
    head = "name: n\nmodel: m\ndata: {train: d}\nspace: {rank: [1]}\n"
    file.write_text(f"{head}objective: {objective}\nevaluate: {{tasks: {tasks}}}\n")
    with pytest.raises(SweepFileError, match=told):
        load(file)


@pytest.mark.parametrize(
    ("metric", "worse", "better"),
    [(name, "max", "min") for name in ("eval_loss", "loss", "step_time_s", "peak_memory_bytes")]
    + [("tokens_per_s", "min", "max")],
)
def test_an_objective_that_would_look_for_the_worst_is_refused(
    tmp_path: Path, metric: str, worse: str, better: str
) -> None:
    objective = [{"metric": "grad_norm", "mode": "max"}, {"metric": metric, "mode": worse}]
    (told,) = problems(tmp_path, yaml.safe_dump(SMALL | {"objective": objective})).items()
    assert told[0].endswith(": objective[1].mode")
    assert told[1] == f"would look for the worst {metric}: write {better}, or leave it out"
    load(write(tmp_path, yaml.safe_dump(SMALL | {"objective": {"metric": metric, "mode": better}})))


def test_a_score_decides_in_the_end_and_until_then_eval_loss(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    head = "name: n\nmodel: m\ndata: {train: d}\nspace: {rank: [1]}\nevaluate: {tasks: [mmlu]}\n"
    file.write_text(f"{head}objective: {{metric: mmlu_anatomy/acc, mode: max}}\n")
    sweep = load(file)
    assert [(one.metric, one.mode) for one in sweep.objectives] == [("mmlu_anatomy/acc", "max")]
    assert (sweep.primary.metric, sweep.primary.mode) == ("eval_loss", "min")
    file.write_text(to_yaml(sweep))
    assert load(file) == sweep


@pytest.mark.parametrize("name", ["''", "' '", "a/b", "'a:b'", "'..'"])
def test_a_registered_model_that_mlflow_would_refuse_is_a_problem_of_its_line(name: str, tmp_path: Path) -> None:
    told = problems(tmp_path, f"{yaml.safe_dump(SMALL)}tracking: {{registered_model: {name}}}\n")
    assert any("write a name without / and :" in message for message in told.values())


@pytest.mark.parametrize("name", ["mlflow.db", "mlflow.db-journal", "mlartifacts"])
def test_a_sweep_named_as_what_the_storage_keeps_mlflows_runs_in_is_a_problem_of_its_line(
    name: str, tmp_path: Path
) -> None:
    told = problems(tmp_path, yaml.safe_dump(SMALL | {"name": name}, sort_keys=False))
    line = 1 + list(SMALL).index("name")
    assert told == {f"{line}: name": f"{name} is where MLflow's runs are kept in the storage: choose another name"}


def test_a_name_that_is_too_long_is_told_its_length(tmp_path: Path) -> None:
    told = problems(tmp_path, yaml.safe_dump(SMALL | {"name": "a" * 101}, sort_keys=False))
    assert list(told.values()) == ["has 101 characters, of which 100 at most are taken: shorten it"]
    assert load(write(tmp_path, yaml.safe_dump(SMALL | {"name": "a" * 100}))).name == "a" * 100
