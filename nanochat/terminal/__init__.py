"""A chat in the terminal: what was said, what is typed, what is shown."""
