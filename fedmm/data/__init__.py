"""Data: functions that make or read examples, and functions that deal them out to clients."""
