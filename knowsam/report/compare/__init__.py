"""The comparison of settings over seeds and cases: statistics, tables, plots; Markdown, LaTeX, CSV and HTML."""
