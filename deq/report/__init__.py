"""One page about a sweep: ``python -m deq.report SWEEP_DIR``.

It reads the files of the run folders, never the model: torch is not needed, and a sweep can be looked at while it runs.
"""
