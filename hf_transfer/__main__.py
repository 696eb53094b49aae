"""`python -m hf_transfer`."""

import sys

from .cli import main

sys.exit(main())
