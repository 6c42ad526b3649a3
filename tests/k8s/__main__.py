"""Render every overlay and say what is wrong with it: `python -m tests.k8s`."""

from __future__ import annotations

import sys

from tests.k8s import manifests, policies, schemas


def main() -> int:
    """1 where anything is wrong."""
    wrong = 0
    for overlay in manifests.overlays():
        try:
            rendered = manifests.render(overlay)
            found = schemas.problems(rendered) + policies.problems(rendered)
        except manifests.RenderError as error:
            rendered, found = [], [str(error)]
        wrong += len(found)
        print(f"{overlay.relative_to(manifests.K8S.parent)}: {len(rendered)} objects, {len(found)} problems")
        for problem in found:
            print(f"  {problem}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
