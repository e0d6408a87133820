"""The link: one gRPC stream per client and round between a client and the frozen LLM."""
