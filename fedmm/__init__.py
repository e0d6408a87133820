"""fedmm: federated tuning of multimodal LLMs whose language model never leaves the server."""

__version__ = "0.1.0"
