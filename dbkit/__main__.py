"""python -m dbkit is the command dbkit."""

import sys

from dbkit.cli import main

sys.exit(main())
