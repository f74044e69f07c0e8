"""The report of a result as one HTML file: `writing.write_report` puts together what the other modules write."""
