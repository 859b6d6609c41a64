"""What pruning would bring, before it is done; what a model consists of."""
