"""Check that an export computes in its engine what training computed."""
