"""Image lists, decoding, pairs and perturbations."""
