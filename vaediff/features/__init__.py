"""Networks with published weights: uint8 images -> feature vectors, or a distance of two images."""
