"""A run's configuration: composed by Hydra, typed, checked, and what follows from it."""
