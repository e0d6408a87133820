"""What a client runs: encoder, connector, token table (frozen, from the host) and adapters (trained, federated)."""
