"""A consortium of real processes on this machine, driven by its own command lines: rehearsals, the demo, examples, tests.

It knows no more than a person at a terminal does: it types commands, reads what they print, and compares fingerprints. It
imports neither the hospital nor the consortium. No hospital and no exchange ever runs it.
"""
