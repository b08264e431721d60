"""Hostile input for everything that reads files: real files, changed; `python -m tests.fuzz --minutes 60`."""
