"""The host of the frozen LLM: who is let in, what a round takes, what an LLM does for its clients."""
