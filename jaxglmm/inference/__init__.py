"""What is asked of a model after the fit."""
