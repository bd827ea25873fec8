"""The code-free Flower bundle: what a study names by its SHA-256, and what Flower calls a FAB.

It refers to the two apps of the installed package and carries none. It is a deflated zip and zlib builds differ, so it
is built once, published with the study and compared by hash; nobody builds it again to compare.
"""

from __future__ import annotations

from sequester.protocols.signing import sha256

# flwr wants both components; no [project].dependencies, so that nothing could be installed anywhere.
PYPROJECT = """\
[project]
name = "sequester"
version = "0.1.0"

[tool.flwr.app]
publisher = "sequester"

[tool.flwr.app.components]
serverapp = "sequester.server.flower.app:app"
clientapp = "sequester.client.gate.flower.app:app"

[tool.flwr.app.config]
study = ""
"""


def standard_bundle() -> bytes:
    """The bundle's bytes, about 600 of them."""
    from flwr.cli.build import build_fab_from_files

    built, _ = build_fab_from_files({"pyproject.toml": PYPROJECT.encode()})
    return bytes(built)


def bundle_sha256(bundle: bytes) -> str:
    """The 64 hex digits by which studies, sites and Flower name a bundle."""
    return sha256(bundle)
