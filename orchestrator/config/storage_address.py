"""The storage as it is named: a path, or the address of a folder in an object store."""

from __future__ import annotations

import re

SCHEME = "s3://"
DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"
"""Beside the sweeps' folders, where no tracking server is named."""
_ADDRESS = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^?#@\\]*)?")


def is_remote(where: str) -> bool:
    """Whether a storage or a folder is named by an address and not by a path."""
    return "://" in where


def name_problem(name: str) -> str | None:
    """Why a sweep's folder cannot have this name, or None; SQLite's own files begin with their database's."""
    if name in (ARTIFACTS, DATABASE) or name.startswith(f"{DATABASE}-"):
        return f"{name} is where MLflow's runs are kept in the storage: choose another name"
    return None


def storage_problem(where: str) -> str | None:
    """Why an address cannot be used, or None; a secret in it would be written into every record."""
    if not is_remote(where) or (_ADDRESS.fullmatch(where) and not {".", ".."} & set(where.split("/"))):
        return None
    return (
        "takes a folder, a mount that all nodes see, or s3://BUCKET/FOLDER; credentials and endpoint come from the "
        "environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and so on)"
    )
