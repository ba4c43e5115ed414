"""``python -m vidtok``."""

from vidtok.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
