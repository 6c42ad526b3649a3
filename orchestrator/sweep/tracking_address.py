"""Which tracking server a sweep has."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.store.db.db_types import DATABASE_ENGINES

from orchestrator.config.sweep_config import SweepConfig
from orchestrator.errors import InputError, cut
from orchestrator.results.remote import local_storage
from orchestrator.results.secrets import without_password, without_secret
from orchestrator.sweep import own_database

NO_PART_OF_AN_ADDRESS = frozenset("%?#")
"""In a path within one they mean something else (mlflow 3.17, sqlalchemy 2)."""


def tracking_uri(sweep: SweepConfig) -> str:
    """The server that the sweep file names, or MLFLOW_TRACKING_URI, or a database in the storage folder.

    Raises:
        InputError: what is named is no address, or that database would have none.
    """
    if named := sweep.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"):
        try:
            parts = urlsplit(named)
            good = parts.scheme not in ("http", "https") or (bool(parts.hostname) and (parts.port or 1) > 0)
        except ValueError:
            good = False
        if not good:
            raise InputError(
                f"the tracking server's address {cut(without_secret(named))} is none: write one such as "
                "http://mlflow:5000 (tracking.uri, or MLFLOW_TRACKING_URI)"
            )
        return named
    storage = local_storage(sweep.storage)
    if found := sorted(NO_PART_OF_AN_ADDRESS & set(str(storage))):
        raise InputError(
            f"storage {sweep.storage}: MLflow's database there would have no address, since its path holds "
            f"{' and '.join(found)}: name another folder, or a tracking server (tracking.uri)"
        )
    return own_database.address(storage)


def require_address(sweep: SweepConfig) -> None:
    """Look at the server's address without asking there.

    Raises:
        InputError: it is none, or none of a kind that MLflow knows.
    """
    uri = tracking_uri(sweep)
    scheme = urlsplit(uri).scheme
    if scheme in ("http", "https") or scheme.partition("+")[0] in DATABASE_ENGINES:
        return
    try:
        # Packages may add kinds of their own: MLflow alone knows them all.
        MlflowClient(uri)
    except Exception as error:
        raise InputError(
            f"the tracking server's address {cut(without_secret(uri))} is none that MLflow takes "
            f"({first_line(error, uri)}): write one such as http://mlflow:5000 (tracking.uri, or MLFLOW_TRACKING_URI)"
        ) from error


def first_line(error: Exception, uri: str) -> str:
    """Without the password of the server's address, which its answer may repeat."""
    line = (str(error).strip().splitlines() or [""])[0]
    return without_secret(without_password(line, uri))[:300]
