"""Pictures as HTML, PNG and SVG."""
