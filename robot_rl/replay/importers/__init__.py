"""Import other recordings into an episode store."""
