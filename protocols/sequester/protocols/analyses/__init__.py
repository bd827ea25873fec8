"""Every analysis is a pair of pure functions around the secure sum, one file each; see `analysis.py`."""
