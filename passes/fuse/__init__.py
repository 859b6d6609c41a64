"""Join nodes into one operator."""
