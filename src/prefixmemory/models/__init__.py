"""Loading a base model, plain or quantised."""
