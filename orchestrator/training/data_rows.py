"""Rows out of a data source: the running Python's own library, local files, or the hub."""

from __future__ import annotations

import ast
import csv
import difflib
import hashlib
import inspect
import itertools
import json
import os
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.config.local_path import local_path
from orchestrator.config.sweep_config import DataConfig
from orchestrator.errors import DataError, cut, first_line

Role = Literal["train", "eval"]
Format = Literal["text", "prompt_completion", "messages"]
COLUMNS: dict[Format, tuple[str, ...]] = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
}
_READ = frozenset(name for columns in COLUMNS.values() for name in columns)
CHECKED_ROWS = 100
DOCUMENT_CHARACTERS = 500
"""Paragraphs are joined to documents of about this length."""
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_SPLITS: dict[Role, tuple[str, ...]] = {"train": ("train",), "eval": ("validation", "test", "train")}


@dataclass(frozen=True, slots=True)
class Row:
    """One row, and where it stands; `columns` is None where it could not be read."""

    where: str
    columns: dict[str, Any] | None
    why: str = ""


def check(data: DataConfig) -> None:
    """Look at the first rows of every source that is on this machine, so that a slip of the pen costs no start.

    Raises:
        DataError: a source does not exist or has no row with the columns of its format.
    """
    for source, role in _sources(data):
        if not local_files(source):
            # Built in, with rows that serve every format, or on the hub: its rows come with the whole of it.
            continue
        first = list(itertools.islice(read_rows(source, role), CHECKED_ROWS))
        if len(first) < CHECKED_ROWS and all(row.columns is None for row in first):
            why = f": {first[0].where}: {first[0].why}" if first else ""
            raise DataError(f"data {cut(source)} has no usable row{why}. Mend the rows or name another source")
        seen = dict.fromkeys(str(name) for row in first if row.columns is not None for name in row.columns)
        if told := missing_columns(source, data.format, tuple(seen)):
            raise DataError(told)


def rows_in_both(data: DataConfig) -> str | None:
    """What to say where trials are evaluated on rows that they train on. Of a hub id two splits are read.

    Raises:
        DataError: a source does not exist.
    """
    if not isinstance(data.eval, str):
        return None
    if data.train.startswith("builtin:"):
        shared = [data.train] if data.eval == data.train else []
    else:
        train, held_out = ({file.resolve() for file in local_files(source)} for source in (data.train, data.eval))
        shared = sorted(map(str, train & held_out))
    if not shared:
        return None
    return (
        f"data.eval and data.train both have the rows of {cut(shared[0])}: the evaluation is on what was learned, and "
        "tells nothing of new text. Name other rows, or a fraction of data.train"
    )


def _sources(data: DataConfig) -> Iterator[tuple[str, Role]]:
    yield data.train, "train"
    if isinstance(data.eval, str):
        yield data.eval, "eval"


def missing_columns(source: str, data_format: Format, seen: Sequence[str]) -> str | None:
    """What to say where rows were seen and none had a column of the format."""
    missing = [name for name in COLUMNS[data_format] if name not in seen]
    if not (seen and missing):
        return None
    return (
        f"data {cut(source)} has no column {' or '.join(missing)}, which format: {data_format} reads; "
        f"columns seen: {cut(', '.join(seen))}. Rename one or choose another format"
    )


def read_rows(source: str, role: Role) -> Iterator[Row]:
    """Every row of a source.

    Raises:
        DataError: there is no such source, or nothing of it can be read.
    """
    if source.startswith("builtin:"):
        yield from _builtin(source)()
    elif files := local_files(source):
        for file in files:
            yield from _READERS[file.suffix.lower()](file)
    else:
        yield from _hub_rows(source, role)


def local_files(source: str) -> list[Path]:
    """The files of a local source; none of one that is built in or a hub id.

    Raises:
        DataError: there is no such source, or its files are of no kind that is read.
    """
    if source.startswith("builtin:"):
        _builtin(source)
        return []
    path = local_path(source)
    if path.exists():
        return _files(path)
    # `data/rows` beside a folder `data` is a slip of the pen sooner than somebody's data set on the hub.
    is_beside = "/" in source and path.parent.is_dir()
    if path.suffix.lower() in _READERS or is_beside or not _HUB_ID.match(source):
        raise DataError(f"data {cut(source)}: no such file or folder; name one that exists (looked in {Path.cwd()})")
    return []


def fingerprint(source: str) -> str:
    """What tells that a source is still the same, without reading all of it."""
    path = local_path(source)
    if source.startswith("builtin:"):
        return f"{source} {platform.python_version()}"
    if not path.exists():
        return source
    stats = [(str(file), file.stat()) for file in _files(path)]
    parts = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix.lower() not in _READERS:
            raise DataError(f"data {path}: a {path.suffix or 'suffixless'} file; write one of {', '.join(_READERS)}")
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _READERS and file.is_file())
    if not files:
        raise DataError(f"data {path}: the folder holds no file of {', '.join(_READERS)}")
    return files


def _json_lines(file: Path) -> Iterator[Row]:
    with _opened(file) as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file}:{number}"
            if not line.strip():
                continue
            try:
                columns = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                yield Row(where, None, f"not JSON ({error})")
                continue
            yield Row(where, columns) if isinstance(columns, dict) else Row(where, None, "not a JSON object")


def _opened(file: Path) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise DataError(f"data {file} cannot be read ({error}): check its permissions") from error


def _comma_separated(file: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(_text_lines(file))
    while True:
        try:
            columns = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(f"{file}:{reader.line_num}", None, str(error))
            continue
        where = f"{file}:{reader.line_num}"
        fits = None not in columns and None not in columns.values()
        yield Row(where, dict(columns)) if fits else Row(where, None, "not as many fields as the header")


def _text_lines(file: Path) -> Iterator[str]:
    """The lines of a file that has one encoding: it is not read as another one than it was written in.

    Raises:
        DataError: with the first line that is not UTF-8, or has a zero byte in it, as UTF-16 has.
    """
    with _opened(file) as raw:
        for number, line in enumerate(raw, start=1):
            try:
                text = line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise DataError(_not_utf8(file, number, line[error.start])) from error
            if "\0" in text:
                raise DataError(_not_utf8(file, number, 0))
            yield text


def _not_utf8(file: Path, number: int, byte: int) -> str:
    return f"data {file}: line {number} is not text in UTF-8 (byte 0x{byte:02x}): save the file as UTF-8"


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        # The others may hold what is no value in Python, as years past 9999; their names are told.
        others = dict.fromkeys(name for name in table.schema_arrow.names if name not in _READ)
        for batch in table.iter_batches(columns=[name for name in table.schema_arrow.names if name in _READ]):
            for number in range(batch.num_rows):
                yield _parquet_row(f"{file}: a row", others, batch.slice(number, 1))
    except (OSError, pyarrow.lib.ArrowException) as error:
        raise DataError(f"data {file} is no readable parquet file ({error}): write it again") from error


def _parquet_row(where: str, others: dict[str, Any], row: Any) -> Row:
    try:
        (columns,) = row.to_pylist()
    except (ValueError, OverflowError) as error:
        return Row(where, None, str(error))
    return Row(where, others | columns)


def _plain_text(file: Path) -> Iterator[Row]:
    for number, document in enumerate(_documents("".join(_text_lines(file))), start=1):
        yield Row(f"{file}: document {number}", {"text": document})


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".parquet": _parquet,
    ".csv": _comma_separated,
    ".txt": _plain_text,
}


def _documents(text: str) -> Iterator[str]:
    """Paragraphs, joined until they have some length: a heading alone teaches nothing."""
    held: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.strip():
            held.append(paragraph.strip("\n"))
        if sum(map(len, held)) >= DOCUMENT_CHARACTERS:
            yield "\n\n".join(held)
            held = []
    if held:
        yield "\n\n".join(held)


def _builtin(source: str) -> Callable[[], Iterator[Row]]:
    builtins = {"builtin:python-docs": _python_docs, "builtin:python-docstrings": _python_docstrings}
    if source not in builtins:
        nearest = difflib.get_close_matches(source, builtins, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(builtins)}"
        raise DataError(f"data {cut(source)} does not exist; {hint}")
    return builtins[source]


def _instruction(where: str, prompt: str, completion: str, text: str) -> Row:
    """A row that serves all three formats."""
    messages = [{"role": "user", "content": prompt.strip()}, {"role": "assistant", "content": completion}]
    return Row(where, {"text": text, "prompt": prompt, "completion": completion, "messages": messages})


def _python_docs() -> Iterator[Row]:
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        for number, document in enumerate(_documents(topics[topic]), start=1):
            prompt = f"Python's documentation on {topic}, part {number}:\n"
            yield _instruction(f"{topic} {number}", prompt, document, document)


def _python_docstrings() -> Iterator[Row]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(_modules(library)):
        module = file.relative_to(library)
        try:
            tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError) as error:
            yield Row(str(module), None, f"not Python ({error})")
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (docstring := ast.get_docstring(node)):
                yield _docstring_row(module, node, docstring)


def _modules(library: Path) -> Iterator[Path]:
    """Without what is installed beside the library, which may be a hundred times as much to walk through."""
    left_out = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "turtledemo"}
    for folder, below, files in os.walk(library):
        below[:] = set(below) - left_out
        yield from (Path(folder, file) for file in files if file.endswith(".py"))


def _docstring_row(module: Path, node: ast.FunctionDef | ast.AsyncFunctionDef, docstring: str) -> Row:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    signature = f"def {node.name}({ast.unparse(node.args)}){returns}:"
    prompt = f"# {module.with_suffix('').as_posix().replace('/', '.')}\n{signature}\n"
    completion = inspect.cleandoc(docstring)
    return _instruction(f"{module}:{node.lineno}", prompt, completion, f"{prompt}{completion}")


def _hub_rows(source: str, role: Role) -> Iterator[Row]:
    from datasets import get_dataset_split_names, load_dataset

    try:
        present = get_dataset_split_names(source)
        split = next((name for name in _SPLITS[role] if name in present), present[0])
        dataset = load_dataset(source, split=split)
    except Exception as error:
        # datasets passes on whatever its hub client, its readers and its scripts raise.
        raise DataError(
            f"data {cut(source)} is no local file, and the hub has none to give ({cut(first_line(error))}); "
            "check the name, connect to the hub, or name a local file"
        ) from error
    for number, columns in enumerate(dataset):
        yield Row(f"{source} {split} {number}", dict(columns))
