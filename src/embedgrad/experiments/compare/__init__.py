"""Compare methods on the same rows, with one evaluator and one test."""
