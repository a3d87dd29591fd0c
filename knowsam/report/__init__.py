"""Runs that are finished, beside each other: what was measured, how sure it is, as tables and pictures."""
