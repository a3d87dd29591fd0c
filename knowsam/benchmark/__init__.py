"""Measures this package on the machine at hand, against the machine's own limits."""
