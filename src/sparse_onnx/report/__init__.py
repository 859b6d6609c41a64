"""The report of a compilation as JSON and as a page."""
