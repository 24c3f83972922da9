"""Scripts that measure what README and docs report."""
