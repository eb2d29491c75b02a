"""Studies that compare detectors: benchmark and robustness."""
