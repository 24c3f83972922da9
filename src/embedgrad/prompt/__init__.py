"""A prompt from text to tokens, rows and a saved artifact."""
