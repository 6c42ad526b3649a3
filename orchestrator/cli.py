"""The commands: each parses, calls one function, prints, and ends with the contract's exit code.

Imports stand inside the commands, so that `--help` and `plan` answer at once.
"""

from __future__ import annotations

import errno
import functools
import io
import logging
import os
import stat
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from enum import StrEnum
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from orchestrator.errors import InputError, OrchestratorError, StorageError, cut, printable
from orchestrator.results.secrets import without_secret

if TYPE_CHECKING:
    from orchestrator.results.folders import SweepFolder

app = typer.Typer(
    name="orchestrator",
    help="Which LoRA fine-tuning configuration should I use on my hardware?",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
)


class Isolation(StrEnum):
    """What trials share."""

    WARM = "warm"
    FRESH = "fresh"


SweepArgument = Annotated[Path, typer.Argument(metavar="SWEEP", help="A sweep file, as search_spaces/demo.yaml.")]
FolderArgument = Annotated[
    str, typer.Argument(metavar="FOLDER", help="A sweep's folder, as sweeps/demo or s3://bucket/sweeps/demo.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as trial.max_steps=20.")
]
IsolationOption = Annotated[
    Isolation,
    typer.Option(help="warm: worker groups serve trial after trial; fresh: each trial has a TorchTrainer of its own."),
]
NotifyOption = Annotated[
    str | None,
    typer.Option("--notify", metavar="URL", help="A webhook that is told of the end, as JSON; @FILE: written in it."),
]
NameOption = Annotated[str | None, typer.Option("--name", help="Override the sweep's name.")]
StorageOption = Annotated[str | None, typer.Option("--storage", help="Override where the sweep's folder is made.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def main() -> None:
    """The console script."""
    app()


TOLD_OF_PATHS = {
    errno.ENAMETOOLONG: "is longer than a path can be: shorten it",
    errno.EACCES: "may not be reached by this account: give it the right to, or name another",
}
BUG_EXIT_CODE = 70
"""EX_SOFTWARE of sysexits.h: not 1, which says that trials failed."""


def _say(text: str) -> None:
    # Where stderr is closed there is none, and `print` would take stdout.
    if sys.stderr is None:
        return
    try:
        print(printable(without_secret(text)), file=sys.stderr, flush=True)
    except OSError:
        # Who listened has gone away, as a pager does, or its disk is full: what is at work goes on.
        _say_the_rest_to_nobody(sys.stderr)


def _say_the_rest_to_nobody(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _show(text: str) -> None:
    _write(printable(text))


def _write(text: str, end: str = "\n") -> None:
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        is_a_terminal = stat.S_ISCHR(os.fstat(sys.stdout.fileno()).st_mode)
        # What is still held back would be tried once more at exit.
        _say_the_rest_to_nobody(sys.stdout)
        if error.errno == errno.EIO and is_a_terminal:
            # It was closed.
            raise BrokenPipeError from error
        raise StorageError(f"the output cannot be written ({error.strerror}): free some space there") from error


@contextmanager
def _told_errors() -> Iterator[None]:
    """Errors of ours end with their message and exit code; all others are bugs, with a code and their traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # In an encoding that lacks a sign of ours, as latin-1 may be, it is escaped.
            stream.reconfigure(errors="backslashreplace")
    try:
        _log_to_stderr()
        _look_for_current_folder()
        yield
    except OrchestratorError as error:
        _say(f"error: {error}")
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        _say("interrupted: run the same command again")
        raise typer.Exit(130) from error
    except BrokenPipeError as error:
        # The reader of our output went away, as `head` does: nothing is wrong.
        _say_the_rest_to_nobody(sys.stdout)
        raise typer.Exit(0) from error
    except typer.Exit:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None and error.errno in TOLD_OF_PATHS:
            _say(f"error: {cut(str(error.filename))} {TOLD_OF_PATHS[error.errno]}")
            raise typer.Exit(2) from error
        story = "".join(traceback.format_exception(error))
        _say(f"{story}error: this is a bug of orchestrator: report it with what stands above")
        raise typer.Exit(BUG_EXIT_CODE) from error


def _look_for_current_folder() -> None:
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise InputError("the current folder is gone: cd to one that is there") from error


def _log_to_stderr() -> None:
    level = os.environ.get("ORCHESTRATOR_LOG") or "WARNING"
    if level.upper() not in logging.getLevelNamesMapping():
        raise InputError(f"ORCHESTRATOR_LOG={cut(level)}: takes DEBUG, INFO, WARNING or ERROR")
    logging.basicConfig(level=level.upper(), stream=sys.stderr)


def _all_overrides(overrides: list[str] | None, name: str | None, storage: str | None) -> list[str]:
    # Quoted: as YAML, a name such as 2024-01-01 would be a date.
    given = {key: value for key, value in (("name", name), ("storage", storage)) if value is not None}
    for key, value in given.items():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"--{key} {cut(value)} is not text in UTF-8, as records have to be: name another"
            ) from error
    more = [f"{key}={dumps(value, ensure_ascii=False)}" for key, value in given.items()]
    return [*(overrides or []), *more]


@app.command()
def plan(
    sweep: SweepArgument,
    json: JsonOption = False,
    gpu: Annotated[str | None, typer.Option("--gpu", help="Plan for this GPU, as H100 or RTX-4090.")] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, max=100_000, help="How many of them; none: one.")] = None,
    gpu_memory: Annotated[str | None, typer.Option("--gpu-memory", help="Memory of one of them, as 80GiB.")] = None,
    overrides: SetOption = None,
) -> None:
    """Say of every trial, before anything starts, whether it runs, its memory, its time and its cost."""
    with _told_errors():
        from orchestrator.config.sweep_file import load
        from orchestrator.planning.hardware import hardware_for
        from orchestrator.planning.pace import READ_SWEEPS, Pace
        from orchestrator.planning.plan import plan_sweep
        from orchestrator.planning.plan_table import render
        from orchestrator.results.remote import local_storage, sweep_folder
        from orchestrator.results.storage import newest_sweeps
        from orchestrator.sweep.resume import words_for_a_plan
        from orchestrator.training import inputs

        asked = load(sweep, overrides or ())
        hardware = hardware_for(asked.resources.accelerator if gpu is None else gpu, gpus, gpu_memory)
        config = asked.on_hardware(has_gpus=hardware.device == "cuda")
        pace = Pace.of(newest_sweeps(local_storage(config.storage), READ_SWEEPS), config.model, hardware)
        planned = plan_sweep(config, inputs.find_model(config).shape, hardware, pace)
        before = words_for_a_plan(sweep_folder(config.storage, config.name), config, planned)
        told = map(without_secret, (*before, *inputs.missing_here(config), *inputs.doubts(config)))
        planned = planned.model_copy(update={"warnings": (*planned.warnings, *told)})
        _show(planned.model_dump_json(indent=1) if json else render(planned))


@app.command()
def run(
    sweep: SweepArgument,
    name: NameOption = None,
    storage: StorageOption = None,
    address: Annotated[
        str | None,
        typer.Option("--address", help="A Ray cluster, as 10.0.0.1:6379 or auto; none: RAY_ADDRESS, or one made here."),
    ] = None,
    isolation: IsolationOption = Isolation.WARM,
    notify: NotifyOption = None,
    overrides: SetOption = None,
) -> None:
    """Run a sweep to its end and write the report; the same command again goes on where it was left."""
    with _told_errors():
        from orchestrator.config.sweep_file import load

        config = load(sweep, _all_overrides(overrides, name, storage))
        from orchestrator.results.remote import sweep_folder
        from orchestrator.sweep import notification
        from orchestrator.training import inputs

        webhook = notification.address_of(notify) if notify is not None else None
        # Before what follows is loaded: a slip of the pen is told in a second.
        model = inputs.look_at(config)
        for doubt in inputs.doubts(config):
            _say(f"warning: {doubt}")
        from orchestrator.sweep.run import lasting
        from orchestrator.sweep.run import run as run_sweep

        config = lasting(config)
        folder = sweep_folder(config.storage, config.name)
        # The copy of a folder in an object store may go with its pod.
        page = folder.location(folder.report)
        try:
            outcome = run_sweep(config, model, address, isolation.value, _say)
        except OrchestratorError as error:
            if webhook is not None:
                notification.post(webhook, notification.failure_of(config.name, page, error), _say)
            raise
        from orchestrator.reporting import report as reporting
        from orchestrator.results.provenance import ui_command

        if webhook is not None:
            told = notification.end_of(outcome.report, page, outcome.exit_code, outcome.tracking_uri)
            notification.post(webhook, told, _say)
        try:
            _show(reporting.render_text(outcome.report))
        except BrokenPipeError:
            # What has come of the sweep does not hang on who reads of it: `tee` ends at Ctrl-C, and a terminal closes.
            _say_the_rest_to_nobody(sys.stdout)
        _say(f"report: {page}")
        if command := ui_command(outcome.tracking_uri):
            _say(f"MLflow's pages: {command}")
        if not outcome.tracked:
            again = "run the same command again" + ("" if folder.remote else ", or `report`,")
            _say(f"MLflow did not take everything in time: {again} to deliver the rest")
        if outcome.sweep.interrupted:
            _say("interrupted; the state is saved: run the same command again to go on")
        raise typer.Exit(outcome.exit_code)


@app.command()
def submit(
    sweep: SweepArgument,
    address: Annotated[str, typer.Option("--address", help="Ray's dashboard, as http://HEAD:8265.")],
    follow: Annotated[bool, typer.Option("--follow", help="Show the job's log, and end with its exit code.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Leave the job to itself, as without --follow.")] = False,
    name: NameOption = None,
    storage: StorageOption = None,
    isolation: IsolationOption = Isolation.WARM,
    notify: NotifyOption = None,
    install: Annotated[
        bool, typer.Option("--install-requirements", help="For clusters that lack them: takes minutes on every node.")
    ] = False,
    overrides: SetOption = None,
) -> None:
    """Run a sweep as a job of a Ray cluster; the same command again follows it, or goes on where it was left."""
    with _told_errors():
        from orchestrator.config.sweep_file import load, text_of

        if follow and no_wait:
            raise InputError("--follow waits for the job, and --no-wait does not: give one of them")
        changes = _all_overrides(overrides, name, storage)
        config, text = load(sweep, changes), text_of(sweep, changes)
        from orchestrator.submit import server as jobs
        from orchestrator.sweep import notification

        webhook = notification.address_of(notify) if notify is not None else None
        server, job_id = jobs.submit(config, text, address, isolation.value, webhook, install=install, say=_say)
        if follow:
            raise typer.Exit(jobs.follow(server, job_id, functools.partial(_write, end=""), _say))
        _show(job_id)
        _say("follow it: the same command with --follow")
        _say(f"stop it:   ray job stop {job_id} --address {server.shown_address}")


@app.command()
def status(folder: Annotated[str | None, typer.Argument(metavar="[FOLDER]", help="None: the newest.")] = None) -> None:
    """Say how a running or ended sweep stands, read from disk."""
    with _told_errors():
        from orchestrator.reporting.status import render_status
        from orchestrator.results.remote import opened
        from orchestrator.results.storage import newest_sweep

        _show(render_status(opened(folder) if folder else newest_sweep(Path("sweeps"))))


@app.command()
def report(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="FOLDER...", help="A sweep's folder or s3:// address; several are compared."),
    ],
    json: JsonOption = False,
    opens: Annotated[bool, typer.Option("--open", help="Show the page in a browser.")] = False,
) -> None:
    """Print a sweep's answer with its evidence, and write report.html; of several, how they compare."""
    with _told_errors():
        from orchestrator.reporting import report as reporting
        from orchestrator.results.remote import opened
        from orchestrator.sweep.delivered import is_owed

        where = [opened(folder) for folder in folders]
        built = [reporting.build(folder) for folder in where]
        pages = [(f, f.report, reporting.render_html(made)) for f, made in zip(where, built, strict=True)]
        if len(built) == 1:
            answer = reporting.render_json(built[0]) if json else reporting.render_text(built[0])
        else:
            from orchestrator.reporting import comparison_report
            from orchestrator.reporting.comparison import compare

            compared = compare(built)
            pages.append((where[0], where[0].comparison, comparison_report.render_html(compared)))
            answer = comparison_report.render_json(compared) if json else comparison_report.render_text(compared)
        written = [page if _is_written(folder, page, text) else None for folder, page, text in pages]
        _show(answer)
        if page := written[-1]:
            _say(f"report: {page}")
        for folder in filter(is_owed, where):
            from orchestrator.sweep.delivery import deliver_late

            deliver_late(folder, _say)
        if opens and page:
            import webbrowser

            if not webbrowser.open(page.absolute().as_uri()):
                _say("no browser could be opened here: copy the file to where one is")


def _is_written(folder: SweepFolder, page: Path, text: str) -> bool:
    """Whether the page is here to be opened; where it is not, what it says is printed all the same."""
    from orchestrator.results.files import write_atomically
    from orchestrator.results.remote import publish

    try:
        write_atomically(page, text)
    except StorageError as error:
        _say(str(error))
        return False
    try:
        publish(folder, page)
    except StorageError as error:
        _say(str(error))
    return True


@app.command()
def export(
    folder: FolderArgument,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The folder to write.")],
    trial: Annotated[str | None, typer.Option("--trial", metavar="ID", help="None: the recommended one.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into its base, unquantised.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace DIR where export made it.")] = False,
) -> None:
    """Write the recommended adapter, or a trial's, alone or merged into its base, ready for from_pretrained."""
    with _told_errors():
        from orchestrator.export.folder import export as export_trial
        from orchestrator.results.remote import opened
        from orchestrator.sweep.delivered import known_runs

        # Stdout is for our own words, and the libraries of a merge have theirs.
        with redirect_stdout(sys.stderr):
            sweep = opened(folder)
            exported = export_trial(sweep, trial, to, merge=merge, force=force, runs=known_runs(sweep))
        if merge and exported.kind == "full":
            _say("the trial trained all weights: there is no adapter to merge")
        if exported.doubt:
            _say(exported.doubt)
        _show(f"trial {exported.trial.trial_id} is in {exported.folder}; load it with {exported.loader}")


@app.command()
def estimate() -> None:
    """Read JSON lines, write JSON lines: one memory estimate a line."""
    with _told_errors():
        from orchestrator.planning.estimate import estimate_lines
        from orchestrator.training import model_source

        config_of: Callable[[str], Any] = lambda model: model_source.resolve(model).config  # noqa: E731
        for line in estimate_lines(sys.stdin.buffer if sys.stdin else (), config_of):
            _show(line)


@app.command()
def doctor(
    address: Annotated[
        str | None, typer.Option("--address", help="A Ray cluster, as 10.0.0.1:6379 or auto; none: this machine.")
    ] = None,
    storage: Annotated[str | None, typer.Option("--storage", help="Where sweeps are to be kept; none: sweeps.")] = None,
    tracking_uri: Annotated[
        str | None, typer.Option("--tracking-uri", help="An MLflow server; none: MLFLOW_TRACKING_URI.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Say what this machine or cluster can run, and of what it cannot, why and what to change."""
    with _told_errors():
        from orchestrator import doctor as doctors

        found = doctors.examine(address, storage, tracking_uri)
        _show(found.model_dump_json(indent=1) if json else doctors.render(found))
        for check in found.unreachable:
            _say(f"error: {check.what}: {check.detail}")
        raise typer.Exit(3 if found.unreachable else 0)


@app.command()
def schema() -> None:
    """Print the sweep file's JSON schema, for editors."""
    with _told_errors():
        from orchestrator.config.sweep_config import SweepConfig

        _show(dumps(SweepConfig.model_json_schema(), indent=2))
