"""Runs that are trained and scored, as a person reads them.

``compare/`` sets runs beside each other by statistics; ``page/`` shows what is known of each. Neither knows the other;
what both need stands beside them.
"""
