"""What `mlflow server` makes in a new database (tables, the first experiment, the admin), for one server at a time.

Two servers that start at once would make the same things, and one of them would end. Both find all of it here: who
comes second waits at PostgreSQL for the first.

A database that another MLflow wrote is refused, with what to do. By itself MLflow would upgrade most of them: without a
dump, and while older servers may be at work there.
"""

import os
import sys
from typing import Literal

import mlflow
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from mlflow.server.auth import auth_config, bootstrap_admin_user
from mlflow.server.auth.db import utils as users
from mlflow.server.handlers import initialize_backend_stores
from mlflow.store.db import utils as runs
from sqlalchemy import Engine, text

LOCK = 5000
"""Any number: MLflow takes no such lock itself."""
NEWER = f"""\
The database was written by a newer MLflow than this image's {mlflow.__version__}. Nothing in it was changed.
Put the image back that it was written with, or restore a dump from before, as k8s/README.md has it."""
OLDER = f"""\
The database was written by an older MLflow than this image's {mlflow.__version__}. Nothing in it was changed.
Stop all servers and make a dump, as "A new MLflow version" in k8s/README.md has it; then have it upgraded:
  kubectl set env deployment/mlflow --containers=prepare-database UPGRADE_DATABASE=1"""


def age(engine: Engine, config: Config, version_table: str) -> Literal["newer", "older", "ours"]:
    """Whose schema it is. One without a revision has not been made yet, or not to its end: it will be ours."""
    scripts = ScriptDirectory.from_config(config)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": version_table})
        found = context.get_current_revision()
    if found in (None, scripts.get_current_head()):
        return "ours"
    return "older" if found in {known.revision for known in scripts.walk_revisions()} else "newer"


uri = os.environ["MLFLOW_BACKEND_STORE_URI"]
runs_engine = runs.create_sqlalchemy_engine_with_retry(uri)
users_engine = runs.create_sqlalchemy_engine_with_retry(auth_config.database_uri)
# The lock is this connection's, and goes with it.
with runs_engine.connect() as locked:
    locked.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": LOCK})
    ages = {
        age(runs_engine, runs._get_alembic_config(uri), "alembic_version"),
        age(users_engine, users._get_alembic_config(auth_config.database_uri), "alembic_version_auth"),
    }
    if "newer" in ages:
        sys.exit(NEWER)
    if "older" in ages:
        if os.environ.get("UPGRADE_DATABASE") != "1":
            sys.exit(OLDER)
        # As `mlflow db upgrade` and `python -m mlflow.server.auth db upgrade` do.
        runs._upgrade_db(runs_engine)
        users.migrate(users_engine, "head")
    # Artifacts go through the server, as `mlflow server` without --no-serve-artifacts has it.
    initialize_backend_stores(uri, uri, "mlflow-artifacts:/")
    bootstrap_admin_user()
