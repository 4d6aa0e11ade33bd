"""Programs around the package; nothing in the package imports them.

`generate.py`, `compare.py` and `calibrate.py` are run as files. The folders are packages, run as modules from the root
of the checkout: `python -m scripts.benchmarks.attention`.
"""
