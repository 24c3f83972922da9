"""File formats that exports are written in."""
