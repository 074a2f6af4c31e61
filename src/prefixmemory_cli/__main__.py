"""``python -m prefixmemory_cli``: for launchers, such as ``accelerate launch -m prefixmemory_cli train``."""

from prefixmemory_cli import main

if __name__ == "__main__":
    main()
