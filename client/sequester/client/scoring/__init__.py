"""Scores of single patients, at their own hospital: off until site.toml says `[scoring] enabled = true`.

Nothing here can send: no network is imported, and gate, compute and ingest do not import this package (pyproject.toml).
Read README.md beside this file before it is switched on.
"""
