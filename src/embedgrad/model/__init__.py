"""The frozen language model: log-probabilities and generation."""
