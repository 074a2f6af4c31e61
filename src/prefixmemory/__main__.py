"""``python -m prefixmemory``: for launchers that want a module, such as ``accelerate launch -m prefixmemory train``."""

from prefixmemory.cli import main

if __name__ == "__main__":
    main()
