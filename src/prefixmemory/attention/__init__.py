"""The only contact with the attention of other people's models."""
