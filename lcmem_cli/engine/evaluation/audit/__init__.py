"""The audit of a generated set against its training set."""
