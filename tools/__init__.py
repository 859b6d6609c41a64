"""The command line: one command a file, each thin over the API."""
