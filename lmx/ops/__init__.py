"""Pure functions on arrays: attention, positions, masks, norms, activations."""
