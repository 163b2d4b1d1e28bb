"""From bytes that cannot be trusted to the weights of a network, and where such bytes are kept."""
