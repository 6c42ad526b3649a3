"""Templates and their filters, and JSON that every reader takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.reporting import quantities
from orchestrator.reporting.statistics import spell
from orchestrator.results.records import TrialStatus
from orchestrator.results.secrets import without_secret

if TYPE_CHECKING:
    from markupsafe import Markup


def render_page(template: str, context: Mapping[str, Any]) -> str:
    """One of this folder's templates, filled in."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "memory": quantities.memory,
        "duration": quantities.duration,
        "step_time": quantities.step_time,
        "rate": quantities.rate,
        "number": quantities.number,
        "share": quantities.share,
        "outlay": quantities.outlay,
        "spell": spell,
        "words": status_words,
        "breakable": breakable,
        "shareable": without_secret,
    }
    return environment.get_template(template).render(context)


def breakable(name: str) -> Markup:
    """A name that may go over several lines, so that a table of many columns is no wider than its values are."""
    from markupsafe import Markup

    return Markup("_<wbr>").join(name.split("_"))


def status_words(status: TrialStatus) -> str:
    """A status as a person says it."""
    return "refused" if status is TrialStatus.INFEASIBLE else status.value.replace("_", " ")


def plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
