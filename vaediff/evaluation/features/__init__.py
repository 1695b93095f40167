"""Feature networks with published or trained weights: uint8 images -> feature vectors."""
