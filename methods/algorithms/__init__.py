"""Pure functions of tensors that several methods share."""
