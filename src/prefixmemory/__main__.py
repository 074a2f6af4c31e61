"""``python -m prefixmemory``: the command, for launchers that want a module."""

from prefixmemory_cli import main

if __name__ == "__main__":
    main()
