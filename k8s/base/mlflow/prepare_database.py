"""What `mlflow server` makes in a new database (tables, the first experiment, the admin), for one server at a time.

Two servers that start at once would make the same things, and one of them would end. Both find all of it here: who
comes second waits at PostgreSQL for the first. A database of an older MLflow is refused, with what to do.
"""

import os

from mlflow.server.auth import bootstrap_admin_user
from mlflow.server.handlers import initialize_backend_stores
from mlflow.store.db.utils import create_sqlalchemy_engine_with_retry
from sqlalchemy import text

LOCK = 5000
"""Any number: MLflow takes no such lock itself."""

uri = os.environ["MLFLOW_BACKEND_STORE_URI"]
# The lock is this connection's, and goes with it.
with create_sqlalchemy_engine_with_retry(uri).connect() as connection:
    connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": LOCK})
    # Artifacts go through the server, as `mlflow server` without --no-serve-artifacts has it.
    initialize_backend_stores(uri, uri, "mlflow-artifacts:/")
    bootstrap_admin_user()
