"""The Flower application: the only place that imports flwr."""
