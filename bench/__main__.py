import sys

from bench.row import ROOT

sys.path.insert(0, str(ROOT / "python"))

from bench.run import main

if __name__ == "__main__":
    sys.exit(main())
