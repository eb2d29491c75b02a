"""Codec (VAE), Siamese network and checkpoints."""
