"""What must not be shown or kept: passwords in addresses, tokens, and the environment's secrets.

Imports nothing of ours: the commands load it before they know what is asked of them.
"""

from __future__ import annotations

import os
import re
from urllib.parse import unquote, urlsplit

HIDDEN = "[hidden]"
SHORTEST_SECRET = 8
"""A shorter value of the environment would be found in words that are no secret."""
_CREDENTIALS = re.compile(r"(?<=://)[^/\s\"'<>]*@")
_QUERY = re.compile(
    r"([?&](?:[\w-]*(?:token|password|passwd|secret|signature|credential|api_?key)|sig|key)=)[^&\s\"'<>]+", re.I
)
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|glpat-[\w-]{16,}|AKIA[A-Z0-9]{16})\b")
_SECRET_NAME = re.compile(r"TOKEN$|PASSWORD$|SECRET|ACCESS_KEY|API_KEY|CREDENTIAL|PASSWD$", re.I)


def without_secret(text: str) -> str:
    """A text as it may be shown and kept.

    Taken out are the user and password of every address, the value of a query key such as `token=`, tokens that are
    known by their first letters, and the values of this process's environment variables that are named as secrets.
    """
    text = _CREDENTIALS.sub("", text)
    text = _QUERY.sub(rf"\1{HIDDEN}", text)
    text = _TOKEN.sub(HIDDEN, text)
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET and not value.startswith(("/", "~")):
            text = text.replace(value, HIDDEN)
    return text


def without_password(text: str, address: str) -> str:
    """A text without the password in an address, as it is written there and as a server reads it."""
    written = urlsplit(address).password or ""
    for password in filter(None, {written, unquote(written)}):
        # As a word of its own: a short one may be a part of words that tell nothing.
        text = re.sub(rf"(?<!\w){re.escape(password)}(?!\w)", HIDDEN, text)
    return text
