"""File formats of the engines: checkpoints, GGUF, chat templates."""
