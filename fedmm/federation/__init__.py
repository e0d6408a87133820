"""A client's part in a round, the server's stages, and what both build from the configuration."""
