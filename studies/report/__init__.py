"""The report of a result as one HTML file: `report.write_report` puts together what the other modules write."""
