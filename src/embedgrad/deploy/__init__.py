"""Export refined prompts to other engines, check and serve them."""
