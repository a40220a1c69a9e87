"""`python -m trl_ibtpo` is `trl-ibtpo`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
