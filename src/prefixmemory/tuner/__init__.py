"""The PEFT lifecycle of memories."""
