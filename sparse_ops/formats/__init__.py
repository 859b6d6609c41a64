"""How weights are stored: one module a format, each the only one that knows its parts."""
