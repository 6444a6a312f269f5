"""Tests that take too long for every run: `python -m pytest tests/long`."""
