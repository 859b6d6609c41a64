"""Make weights zero."""
