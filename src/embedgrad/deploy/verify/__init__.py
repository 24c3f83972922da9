"""Verify that an export computes in its engine what training did."""
