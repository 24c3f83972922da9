"""Parse, check and build TOML recipes; reopen finished runs."""
