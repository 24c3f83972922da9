"""The training loop: gradient descent on the prompt alone."""
