"""Stages: what the server does with open images, before the first round and after each. See conf/captions/."""
