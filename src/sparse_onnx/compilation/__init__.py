"""One compilation: recipe, steps, decisions about the whole, rows of the report."""
