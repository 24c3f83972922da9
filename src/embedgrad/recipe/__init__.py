"""A TOML recipe checked and built; finished runs reopened."""
