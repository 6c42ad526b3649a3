"""MLflow's database and artifacts in the storage folder, where no server is named: they are wherever that lies now."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import create_engine, text

from orchestrator.config.storage_address import ARTIFACTS, DATABASE

# mlflow 3.17.2, store/tracking/dbmodels/models.py and store/model_registry/dbmodels/models.py: whole addresses.
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)


def address(storage: Path) -> str:
    """The database's."""
    return f"sqlite:///{storage / DATABASE}"


def artifacts(storage: Path) -> str:
    """The address below which the artifacts of the storage's experiments lie."""
    return (storage / ARTIFACTS).as_uri()


def is_left_behind(location: str, storage: Path) -> bool:
    """Whether an experiment's artifacts are sought where the storage lay before it was moved or copied."""
    return location.startswith("file:///") and location.endswith(f"/{ARTIFACTS}") and location != artifacts(storage)


def bring_along(location: str, storage: Path) -> None:
    """Seek below the storage whatever is sought below `location`: MLflow has no call for it (3.17.2)."""
    engine = create_engine(address(storage))
    try:
        with engine.begin() as connection:
            for table, column in PLACES:
                connection.execute(
                    text(
                        f"UPDATE {table} SET {column} = :now || substr({column}, length(:before) + 1) "
                        f"WHERE {column} = :before OR instr({column}, :before || '/') = 1"
                    ),
                    {"before": location, "now": artifacts(storage)},
                )
    finally:
        engine.dispose()
