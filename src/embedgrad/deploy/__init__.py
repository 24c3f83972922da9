"""Refined prompts in the formats of the engines that serve them."""
