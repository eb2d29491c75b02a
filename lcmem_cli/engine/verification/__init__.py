"""Verification: candidates are aligned before they are judged."""
