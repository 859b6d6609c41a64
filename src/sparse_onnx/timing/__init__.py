"""How long models, layers and nodes take; which layers become sparse."""
