# SPDX-License-Identifier: Apache-2.0
"""``python -m fxslim`` is the ``fxslim`` command."""

import sys

from fxslim.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
