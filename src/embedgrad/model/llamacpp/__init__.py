"""llama.cpp as a server in a process of its own."""
