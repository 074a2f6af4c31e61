"""What a model says, and how likely it finds what it should have said."""
