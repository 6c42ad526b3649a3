"""One row → its tokens, and which of them count in the loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.errors import DataError
from orchestrator.training.data_rows import COLUMNS, Format, Row

CHUNK_ROWS = 512

Tokens = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


class UnusableRowError(Exception):
    """A row that cannot be learned from: counted and named, never fatal."""


def tokenize(rows: Iterable[Row], data_format: Format, tokenizer: Any) -> Iterator[tuple[Row, Tokens, Mask] | Row]:
    """Tokens and loss mask of each row that can be used; the row itself, with its reason, where it cannot.

    Raises:
        DataError: the format needs a chat template and the model has none.
    """
    if data_format == "messages" and not tokenizer.chat_template:
        raise DataError("format messages needs a chat template and the model has none: use format: prompt_completion")
    for chunk in _chunks(rows):
        if data_format == "text":
            yield from _tokenize_texts(chunk, tokenizer)
            continue
        one = _prompt_completion if data_format == "prompt_completion" else _messages
        for row in chunk:
            try:
                tokens, mask = one(_columns(row, data_format), tokenizer)
            except UnusableRowError as problem:
                yield Row(row.where, None, str(problem))
            else:
                yield row, *_finished(tokens, mask)


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    held: list[Row] = []
    for row in rows:
        held.append(row)
        if len(held) == CHUNK_ROWS:
            yield held
            held = []
    yield held


def _columns(row: Row, data_format: Format) -> dict[str, Any]:
    if row.columns is None:
        raise UnusableRowError(row.why)
    for name in COLUMNS[data_format]:
        if name not in row.columns:
            raise UnusableRowError(f"no column {name!r}")
        value = row.columns[name]
        if name != "messages" and not isinstance(value, str):
            raise UnusableRowError(f"{name} is no text but {type(value).__name__}")
        if name != "messages" and not _is_unicode(value):
            raise UnusableRowError(f"{name} holds half of a surrogate pair, as where a text was cut within an emoji")
        if name != "prompt" and not value:
            raise UnusableRowError(f"{name} is empty")
    return row.columns


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tokenize_texts(chunk: Sequence[Row], tokenizer: Any) -> Iterator[tuple[Row, Tokens, Mask] | Row]:
    """All texts of a chunk in one call, which the tokenizer spreads over the cores."""
    good: list[tuple[Row, str]] = []
    for row in chunk:
        try:
            good.append((row, _columns(row, "text")["text"]))
        except UnusableRowError as problem:
            yield Row(row.where, None, str(problem))
    if not good:
        return
    encoded = tokenizer([text for _, text in good])["input_ids"]
    for (row, _), ids in zip(good, encoded, strict=True):
        whole = _closed(ids, tokenizer)
        yield row, *_finished(whole, [True] * len(whole))


def _closed(ids: list[int], tokenizer: Any) -> list[int]:
    """The tokens with the end-of-text token, so that the model learns to stop."""
    if tokenizer.eos_token_id is None or (ids and ids[-1] == tokenizer.eos_token_id):
        return ids
    return [*ids, tokenizer.eos_token_id]


def _prompt_completion(columns: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[bool]]:
    # Apart, as at inference: there the prompt's tokens are fixed before the completion exists.
    prompt = tokenizer(columns["prompt"])["input_ids"]
    if prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]
    completion = _closed(tokenizer(columns["completion"], add_special_tokens=False)["input_ids"], tokenizer)
    return prompt + completion, [False] * len(prompt) + [True] * len(completion)


def _messages(columns: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[bool]]:
    messages = _checked_messages(columns["messages"])
    try:
        if "{% generation %}" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
            encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
            return encoded["input_ids"], [bool(trained) for trained in encoded["assistant_masks"]]
        return _messages_by_prefix(messages, tokenizer)
    except UnusableRowError:
        raise
    except Exception as error:
        # A chat template is a program of the model's author: it raises what it likes.
        raise UnusableRowError(f"the chat template refuses it ({error})") from error


def _checked_messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise UnusableRowError("messages is no list of {role, content}")
    if not any(message["role"] == "assistant" for message in messages):
        raise UnusableRowError("messages has no assistant turn to learn")
    return messages


def _messages_by_prefix(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Assistant turns are what a longer conversation adds to the shorter one that asks for the turn."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not (answered.startswith(asked) and text.startswith(answered.rstrip())):
            raise UnusableRowError("the chat template rewrites earlier turns, so that its answers cannot be told apart")
        spans.append((len(asked), len(answered.rstrip())))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [any(start >= first and end <= last for first, last in spans) for start, end in encoded["offset_mapping"]]
    return encoded["input_ids"], mask


def _finished(ids: Sequence[int], mask: Sequence[bool]) -> tuple[Tokens, Mask]:
    tokens, labels = np.asarray(ids, dtype=np.int32), np.asarray(mask, dtype=np.bool_)
    # Nothing stands before the first token to predict it from; so rows that are packed together stay apart as well.
    labels[:1] = False
    return tokens, labels
