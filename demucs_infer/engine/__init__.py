"""From a track and a network to final stem blocks: tensors in, tensors out."""
