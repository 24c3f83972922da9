"""Where a refined prompt can go: one file for each destination."""
