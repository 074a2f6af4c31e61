"""The read of a memory as one pure function; ``reference.py`` is its oracle."""
