"""Reports: a result as one HTML file; `report.write_report` puts it together.

The sentences on the induction study come from `studies.analyses.findings` and `conclusion`.
"""
