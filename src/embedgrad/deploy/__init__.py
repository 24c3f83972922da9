"""Refined prompts in other engines: exported, verified, served."""
