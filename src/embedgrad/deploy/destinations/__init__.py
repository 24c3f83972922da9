"""Where a refined prompt can be exported, one module per destination."""
