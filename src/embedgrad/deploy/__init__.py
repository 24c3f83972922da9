"""Export refined prompts to other engines, check them there, and serve them."""
