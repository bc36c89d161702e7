"""What is in a state dict, for saving and for loading."""
