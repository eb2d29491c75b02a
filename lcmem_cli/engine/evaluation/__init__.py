"""Metrics, calibration, benchmark, robustness and audit."""
