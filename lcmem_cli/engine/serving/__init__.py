"""Audits inside a sampling or training loop."""
