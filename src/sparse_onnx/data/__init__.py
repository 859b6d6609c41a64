"""What a model is run on: inputs, their sizes, samples, text, gradients."""
