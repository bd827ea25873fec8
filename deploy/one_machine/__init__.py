"""A consortium of real processes on this machine, driven by its own command lines: for the demo, the examples, the tests.

It lies in `deploy/`, not in the product: no hospital runs it. It knows no more than a person at a terminal does: it types
commands, reads what they print, and compares fingerprints. Scripts put `deploy/` on their path, the tests by pyproject.
"""
