"""Which code a result was measured with."""

import hashlib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def package_hash() -> str:
    """Return twelve digits that change whenever the analysis does."""
    hasher = hashlib.sha256()
    for path in sorted((ROOT / "prune2deploy" / "graph").rglob("*.py")):
        hasher.update(path.read_bytes())
    return hasher.hexdigest()[:12]
