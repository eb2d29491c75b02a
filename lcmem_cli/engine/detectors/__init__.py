"""One interface for everything that scores a pair of images, and its registry."""
