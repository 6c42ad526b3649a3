"""`python -m orchestrator` is the same as `orchestrator`."""

from orchestrator.cli import app

if __name__ == "__main__":
    app()
