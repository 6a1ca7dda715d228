"""`python -m lego_pipeline.cli`, the same as `lego`."""

import sys

from lego_pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main())
