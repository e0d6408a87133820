"""What is trained: NanoAdapters, adapters inside the LLM, and the schema of what trains and travels."""
