"""The training loop: only the prompt changes, by gradient descent."""
