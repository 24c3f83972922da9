"""Export destinations, one module each."""
